"""A million random operations on everything a guest can reach, by two threads at once, with the io thread as a third.

Meanwhile an operator plugs cards in and takes them out again.

Nothing escapes, no thread dies or hangs, whatever state a device is in can be saved and loaded, no BAR lies over RAM,
and after a reset every device does its work.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.loop import open_descriptors, switching_often
from tests.fuzz.machine import WORKERS, FuzzMachine
from tests.fuzz.operations import Map, Vcpu
from tests.fuzz.works import everything_works

VCPUS: Final = 2
OPERATIONS: Final = count(40_000, 1_000_000)
ROUND: Final = 500  # operations of each vCPU between two pauses
PLUG_EVERY: Final = 0.02  # seconds, on average
# Seconds for a round: it takes a fraction of one, and a deadlock for ever.
BOUND: Final = 60.0
SEED: Final = int(os.environ.get("KVMPY_SEED", "20260101"))


class Errors(logging.Handler):
    """What was logged as an error: of a guest there is none."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))


@pytest.fixture
def errors() -> Iterator[Errors]:
    handler = Errors()
    logging.getLogger("kvmpy").addHandler(handler)
    with switching_often():
        yield handler
    logging.getLogger("kvmpy").removeHandler(handler)


class Campaign:
    """Rounds of operations on one machine; what is between them depends on ``seed`` too."""

    def __init__(self, machine: FuzzMachine, seed: int) -> None:
        self.machine, self.dice = machine, random.Random(seed)
        here = Map(machine)
        self.vcpus = [Vcpu(machine, here, seed + 1 + index) for index in range(VCPUS)]
        self._failed: list[tuple[str, BaseException]] = []
        self._over = threading.Event()

    def round(self, operations: int) -> None:
        """As vCPUs do, until they are parked, and an operator beside them."""
        threads = [
            threading.Thread(target=self._run, args=(vcpu, operations), name=f"vcpu{index}", daemon=True)
            for index, vcpu in enumerate(self.vcpus)
        ]
        self._over.clear()
        operator = threading.Thread(target=self._operate, name="operator", daemon=True)
        for thread in (*threads, operator):
            thread.start()
        for thread in (*threads, operator):
            thread.join(BOUND)
            self._over.set()
            if thread.is_alive():
                faulthandler.dump_traceback()
                raise AssertionError(f"a deadlock: {[vcpu.last for vcpu in self.vcpus]}")
        for what, error in self._failed:
            raise AssertionError(f"escaped from {what}: {error!r}") from error

    def between(self) -> None:
        """What a control thread does, and what must hold whenever it does."""
        machine, dice = self.machine, self.dice
        machine.pause()
        self._check()
        if dice.random() < 0.2:
            machine.move()
        asked = "reset" in machine.power.requests
        machine.power.requests.clear()
        if asked or dice.random() < 0.1:
            machine.reset()
            machine.resume()
            everything_works(machine)
        else:
            machine.resume()

    def _check(self) -> None:
        machine = self.machine
        for window in machine.mmio.windows:
            assert not machine.memory.overlaps(window.base, window.size), f"{window} is over RAM"
        for device in machine.devices:
            with device.lock:
                section = save(device.state)
            assert save(load(type(device.state), section)) == section, device.name
        for function in machine.virtio:
            if function.device.broken is None:
                in_flight = {queue.name: queue.in_flight for queue in function.device.queues}
                assert not any(in_flight.values()), f"neither pushed nor rewound: {in_flight}"
        machine.sink.take()
        alive = {thread.name for thread in threading.enumerate()}
        assert {"io", *(f"blk-vd0-{number}" for number in range(WORKERS))} <= alive

    def _operate(self) -> None:
        try:
            while not self._over.wait(self.dice.expovariate(1 / PLUG_EVERY)):
                self.machine.operate(self.dice)
        except BaseException as e:  # noqa: BLE001  raised again by `round`
            self._failed.append(("operator", e))

    def _run(self, vcpu: Vcpu, operations: int) -> None:
        try:
            vcpu.run(operations)
        except BaseException as e:  # noqa: BLE001  raised again by `round`
            self._failed.append((vcpu.last, e))


@pytest.mark.timeout(count(120, 3600))
def test_machine_survives_a_hostile_guest(errors: Errors, tmp_path: Path) -> None:
    descriptors, threads = open_descriptors(), threading.active_count()
    try:
        with ExitStack() as resources:
            machine = FuzzMachine(resources, tmp_path)
            machine.io.start()
            machine.set_up_pci()
            machine.resume()
            everything_works(machine)
            campaign = Campaign(machine, SEED)
            for _ in range(OPERATIONS // (VCPUS * ROUND)):
                campaign.round(ROUND)
                campaign.between()
                assert not errors.records, errors.records[0]
            machine.pause()
            machine.reset()
            machine.resume()
            everything_works(machine)
            machine.pause()
    except BaseException:
        print(f"the seed was {SEED}: KVMPY_SEED={SEED} make fuzz")
        raise
    assert not errors.records, errors.records[0]
    assert {function.name for _, function in machine.places} == set(machine.released), "each has come and gone"
    assert (open_descriptors(), threading.active_count()) == (descriptors, threads)
