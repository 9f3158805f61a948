"""What a migration costs a guest's exits, as the distribution of their round trips.

A flat guest writes to a port as fast as it can, and to another page of memory every sixteenth time. From one such write
to the next is a round trip: the exit, the bus, a device, and the way back. That is measured in turns in one run, with
nothing else going on, and while a migration sends pages to a process that waits for the guest; it is kept from being
completed by a downtime limit of nothing. The ratios count, not the times: the destination, which would be on another
host, gets what the guest and the sender leave of this machine's processors, and a machine that is busy otherwise has
long tails without any migration.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
from array import array
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Final

from bench.figures import Curves, distribution
from bench.program import main
from bench.rows import Pair, Row
from bench.vmms import Flat
from kvmpy.cli.run import SWITCH_INTERVAL
from kvmpy.config.schema import load
from kvmpy.devices.base import Device
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.migration.control import Migrations
from kvmpy.migration.parameters import OnNoConvergence
from kvmpy.migration.status import Status
from kvmpy.state import State

PORT: Final = 0x0CC0
MEMORY: Final = 256  # MiB
QUANTILES: Final = (("median", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("longest", 1.0))
LEAST: Final = ("nice", "-n", "19")  # the destination has another host's processors: it is not to take the guest's
BUDGETED, IDLE = "p99.9", "kvmpy, idle"
# 16384 pages from 16 MiB on, one after the other.
GUEST: Final = (
    b"\xbb\x00\x00\x00\x00"  # mov ebx, 0
    b"\x66\xba" + PORT.to_bytes(2, "little") + b"\xb9\x10\x00\x00\x00"  # again: mov dx, PORT; mov ecx, 16
    b"\xee"  # next: out dx, al
    b"\xe2\xfd"  # loop next
    b"\x43"  # inc ebx
    b"\x89\xd8"  # mov eax, ebx
    b"\x25\xff\x3f\x00\x00"  # and eax, 0x3fff
    b"\xc1\xe0\x0c"  # shl eax, 12
    b"\x89\x98\x00\x00\x00\x01"  # mov [eax + 0x1000000], ebx
    b"\xeb\xe1"  # jmp again
)


class NothingState(State):
    NAME = "bench-stopwatch"


class Stopwatch(Device[NothingState]):
    """Stamps each write, from `begin` until there are enough."""

    def __init__(self) -> None:
        super().__init__("stopwatch", NothingState())
        self._stamps, self._count = array("q", [0]), 1

    def begin(self, count: int) -> None:
        stamps = array("q", bytes(8 * count))
        with self.lock:
            self._stamps, self._count = stamps, 0

    @property
    def is_done(self) -> bool:
        return self._count >= len(self._stamps)

    def take(self) -> list[int]:
        """The round trips, in nanoseconds, the shortest first."""
        stamps = self._stamps
        return sorted(after - before for before, after in pairwise(stamps))

    def write(self, offset: int, size: int, value: int) -> None:
        if self._count < len(self._stamps):
            self._stamps[self._count] = time.monotonic_ns()
            self._count += 1


class Rig:
    """The guest here, and a process that waits for it."""

    def __init__(self, stack: ExitStack, memory: int) -> None:
        self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._flat = Flat(self._directory, GUEST, memory=memory)
        self.machine = stack.enter_context(Machine(load(self._flat.config("exits-here"))))
        self._turns = 0
        self.watch = Stopwatch()
        self.machine.board.pio.map(PORT, 1, self.watch)
        self.migrations = Migrations(self.machine)
        self.migrations.set_parameters(downtime_limit=0, x_on_no_convergence=OnNoConvergence.CONTINUE)
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        stack.callback(gc.enable)
        stack.callback(gc.unfreeze)
        sys.setswitchinterval(SWITCH_INTERVAL)
        gc.collect()
        gc.freeze()
        gc.disable()  # as kvmpy run does
        self.machine.start()

    def migrating(self, stack: ExitStack) -> None:
        """Begin a migration that is cancelled with ``stack``, and wait until pages travel."""
        self._turns += 1
        config, path = self._flat.config("exits-there"), self._directory / f"stream{self._turns}"
        there = stack.enter_context(
            subprocess.Popen(
                [*LEAST, sys.executable, "-m", "kvmpy", "run", str(config), "--incoming", f"unix:{path}"],
                env={**os.environ, "KVMPY_RUNTIME_DIR": str(self._directory)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
        stack.callback(there.kill)
        assert there.stderr is not None
        while b"waiting for the guest" not in (line := there.stderr.readline()):
            assert line, "the destination has ended"
        self.migrations.migrate(f"unix:{path}")
        stack.callback(self._cancel)
        while self.migrations.progress.status is not Status.ACTIVE:
            assert not self.migrations.progress.is_over, self.migrations.progress.error
            time.sleep(0.01)

    def measure(self, exits: int) -> list[int]:
        self.watch.begin(exits)
        while not self.watch.is_done and self.machine.state is not RunState.POSTMIGRATE:
            time.sleep(0.05)
        return self.watch.take()

    def bring_back(self) -> bool:
        """A guest that has gone after all, having written nothing for a moment; whether it had."""
        has_gone = self.machine.state is RunState.POSTMIGRATE
        if has_gone:
            self.machine.resume(force=True)
        return has_gone

    def _cancel(self) -> None:
        self.migrations.cancel()
        self.migrations.wait()


def measure(quick: bool) -> list[Row]:
    """A row for each quantile, of what is found in turns in one process."""
    exits, turns = (5_000, 3) if quick else (20_000, 7)
    idle: list[list[int]] = []
    moving: list[list[int]] = []
    gone = 0
    with ExitStack() as stack:
        rig = Rig(stack, MEMORY)
        rig.measure(exits)  # the first are of a cold machine
        while len(idle) < turns:
            before = rig.measure(exits)
            with ExitStack() as migration:
                rig.migrating(migration)
                meanwhile = rig.measure(exits)
            if not rig.bring_back():
                idle.append(before)
                moving.append(meanwhile)
            elif (gone := gone + 1) > turns:
                raise RuntimeError(f"the guest has gone {gone} times, for it wrote nothing for a moment")
    lines = {IDLE: distribution(flat(idle)), "while migrating": distribution(flat(moving))}
    curves = Curves("A round trip of a port's write, by kvmpy's stamps", "us", "per cent of all", lines, log_x=True)
    return [
        Pair(
            f"exits: {name} while migrating",
            quantile(moving, share),
            quantile(idle, share),
            budget="exit while migrating" if name == BUDGETED else None,
            peer_name=IDLE,
            note=f"{exits} exits in each of {turns} turns" + f"; {gone} more ended too soon" * bool(gone),
            figure=curves if name == BUDGETED else None,
        ).row()
        for name, share in QUANTILES
    ]


def flat(turns: list[list[int]]) -> list[float]:
    """In microseconds."""
    return [ns / 1000 for turn in turns for ns in turn]


def quantile(turns: list[list[int]], share: float) -> list[float]:
    """Of each turn, in seconds."""
    return [turn[min(int(len(turn) * share), len(turn) - 1)] / 1e9 for turn in turns]


if __name__ == "__main__":
    main("migrating_exits", measure)
