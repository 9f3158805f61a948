"""The flat guests of bench/ do what is measured of them. Nothing is measured here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.exits import split
from bench.guests import ACCESSES, TELL, extents, loop_of, stopwatch, toucher
from bench.vmms import Flat
from kvmpy.config.schema import load
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome
from tests.fakes.loop import BOUND

COUNT = 16


@pytest.fixture(autouse=True)
def _kvm(system: System) -> None:
    """Skips where there is none."""


@pytest.mark.parametrize("cpus", [1, 2])
def test_each_vcpu_times_all_accesses_and_the_first_says_all_of_it(tmp_path: Path, cpus: int) -> None:
    flat = Flat(tmp_path, stopwatch(COUNT, cpus), cpus=cpus, serial="file")
    assert outcome(flat) is Outcome.POWER_OFF
    found = split(flat.said(), cpus)
    assert [len(trips) for trips in found.values()] == [COUNT * cpus] * len(ACCESSES)
    assert all(trip for trips in found.values() for trip in trips)


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)
def test_a_loop_ends(tmp_path: Path, access: bytes) -> None:
    assert outcome(Flat(tmp_path, loop_of(access, COUNT))) is Outcome.POWER_OFF


@pytest.mark.parametrize("pages", [0, 1000])
def test_a_guest_writes_to_its_memory_before_it_says_so(tmp_path: Path, pages: int) -> None:
    flat = Flat(tmp_path, toucher(18, pages, 10**9), memory=18, serial="file")
    with Machine(load(flat.config())) as machine:
        machine.start()
        while not flat.said():
            assert machine.wait(0.01) is None
        view = machine.board.memory.view(16 << 20, 2 << 20)
        assert all(view[page] for page in range(0, 2 << 20, 4096))
        view.release()
    assert TELL[-2] == flat.said()[0]


def test_a_large_guest_writes_to_what_is_above_four_gib_too(tmp_path: Path) -> None:
    memory, low = 3072 + 2, 18
    flat = Flat(tmp_path, toucher(memory, 0, 10**9, low), memory=memory, serial="file")
    with Machine(load(flat.config())) as machine:
        machine.start()
        while not flat.said():
            assert machine.wait(0.01) is None
        for base, size in extents(memory, low):
            view = machine.board.memory.view(base << 20, size << 20)
            assert all(view[page] for page in range(0, size << 20, 4096))
            view.release()


def outcome(flat: Flat) -> Outcome | None:
    with Machine(load(flat.config())) as machine:
        machine.start()
        return machine.wait(BOUND)
