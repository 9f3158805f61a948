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
@pytest.mark.parametrize(("memory", "low"), [(18, 2048), (3072 + 2, 18)], ids=["small", "above 4 GiB"])
def test_a_guest_has_written_to_all_of_its_memory_when_it_says_so_and_goes_on_below(
    tmp_path: Path, memory: int, low: int, pages: int
) -> None:
    flat = Flat(tmp_path, toucher(memory, pages, 10**9, low), memory=memory, serial="file")
    with Machine(load(flat.config())) as machine:
        machine.start()
        while not flat.said():
            assert machine.wait(0.01) is None
        views = [machine.board.memory.view(base << 20, size << 20) for base, size in extents(memory, low)]
        lower = views[0]
        assert all(view[page] for view in views for page in range(0, len(view), 4096))
        while pages and not (lower[0] > 2 and lower[len(lower) - 4096] > 1):  # once through all, and again
            assert machine.wait(0.01) is None
        assert {view[page] for view in (views if not pages else views[1:]) for page in range(0, len(view), 4096)} <= {1}
        for view in views:
            view.release()
    assert TELL[-2] == flat.said()[0]


def outcome(flat: Flat) -> Outcome | None:
    with Machine(load(flat.config())) as machine:
        machine.start()
        return machine.wait(BOUND)
