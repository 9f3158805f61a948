"""The destination's failover primaries are made ready for a guest once it has been accepted, and not before (R43, R54).

A machine that waits has its primaries open and checked. To use one it must be reset, and all RAM mapped for its DMA,
which pins it: for a guest that may never come that is too much, and for one that comes it takes as long as its RAM is
large. So it is done by threads of the primaries' own, beside the pages that arrive, and the source is told: it does not
stop the guest before. What has not been done when the guest runs here is waited for by whoever plugs it in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol, cast

from kvmpy.errors import IncompatibleError, MigrationError
from kvmpy.log import Log
from kvmpy.machine.machine import Machine
from kvmpy.migration.aside import aside
from kvmpy.migration.main_channel import printable
from kvmpy.migration.messages import Outcome
from kvmpy.migration.progress import Progress
from kvmpy.migration.stop import Deadline, Stop

log = Log(__name__)

LATE: Final = "a failover primary of the destination is not prepared"


class Primary(Protocol):
    """A function that is checked: `kvmpy.devices.vfio.pci.VfioPci` is one."""

    @property
    def is_ready(self) -> bool:
        """It can be plugged in."""

    @property
    def problem(self) -> str | None:
        """Why it cannot be used."""

    def prepare(self, then: Callable[[], object]) -> None:
        """Begin with it; ``then`` runs when it is done, or could not be."""


class Preparation:
    """Of all primaries of ``machine``; ``on_end`` is told what became of them, once, by a thread of theirs.

    One that could not be used anyway the source has been told of with ACCEPT.
    `begin`, and at the end `hush`, by the migration's thread.
    """

    def __init__(self, machine: Machine, progress: Progress, on_end: Callable[[tuple[Outcome, ...]], object]) -> None:
        plugged = machine.board.inventory.plugged
        primaries = {name: cast(Primary, each.function) for name, each in plugged.items() if each.standby}
        self._primaries = {name: each for name, each in primaries.items() if each.problem is None}
        self._progress, self._on_end = progress, on_end
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._left = set(self._primaries)
        self._over = threading.Event()

    def begin(self) -> None:
        """Prepare them all, each by itself. Does not wait."""
        self._progress.preparing = True
        start = time.monotonic_ns()
        for name, primary in self._primaries.items():
            primary.prepare(partial(self._done, name, primary, start))
        if not self._primaries:
            self._end()

    def wait(self, stop: Stop, seconds: float, *, require: bool) -> None:
        """Until that is over, for one who cannot be told later.

        What comes to nothing, or takes longer, is only warned of unless all are ``require``d: then it raises
        MigrationError. Raises MigrationCancelled, HostError.
        """
        try:
            aside("prepare", self._over.wait, stop, Deadline(seconds), LATE)
        except MigrationError as e:
            stop.check()
            if require:
                raise
            log.warning("migration: %s: the guest goes on without them until they are", e)
        if require and (problems := failures(self._progress.prepared)):
            raise IncompatibleError(*problems)

    def hush(self) -> None:
        """Tell nobody any more. What has begun goes on."""
        with self._telling:
            self._on_end = lambda outcomes: None

    def _done(self, name: str, primary: Primary, start: int) -> None:
        end, problem = time.monotonic_ns(), None if primary.is_ready else str(primary.problem)
        self._progress.stamp(f"prepare {name}", start, end)
        self._progress.prepared.append(Outcome.of(name, end - start, problem))
        with self._lock:
            self._left.remove(name)
            is_last = not self._left
        if is_last:
            self._end()

    def _end(self) -> None:
        self._progress.preparing = False
        self._over.set()
        with self._telling:
            self._on_end(tuple(self._progress.prepared))


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """What an operator is told of those that cannot be used."""
    return [
        f"device {printable(each.device)}: the destination cannot prepare its primary: {printable(each.problem)}"
        for each in outcomes
        if each.problem
    ]
