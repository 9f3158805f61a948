"""How far a migration is: its status, what has been sent, and when everything happened. Any thread reads it.

Moments are by the monotonic clock of the side that saw them; the other side is told them by CLOCK_REALTIME. The
blackout is from the last instruction here to the first one there: of two hosts whose clocks differ neither can know
it better than to within what the source saw by its own clock, so the difference is kept within that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Protocol

from kvmpy.migration.messages import Outcome
from kvmpy.migration.status import LEGAL, OVER, Status

MS: Final = 1e6  # nanoseconds
MOST_ROUNDS: Final = 1000
"""Rounds that are remembered; one that goes on for hours has more, and the last are the ones of interest."""


class Phase(NamedTuple):
    """A part of it: ``start`` and ``end`` by time.monotonic_ns()."""

    name: str
    start: int
    end: int


class Round(NamedTuple):
    """One pass over the dirty pages: ``pages`` include ``zero_pages``, ``dirty_rate`` is pages a second."""

    number: int
    start: int
    pages: int
    zero_pages: int
    size: int
    seconds: float
    dirty_rate: float


class Said(NamedTuple):
    """A phase of the other side's: by CLOCK_REALTIME, in nanoseconds."""

    name: str
    start_ns: int
    ns: int


class Counts(NamedTuple):
    """So many pages have been moved, zero pages among them, in so many bytes; so many bytes are left."""

    pages: int
    zero_pages: int
    size: int
    remaining: int


class Sends(Protocol):
    """Who sends pages."""

    @property
    def sent(self) -> tuple[int, int, int]:
        """(pages, zero pages among them, bytes) so far."""


class Progress:
    """One migration, of one side; ``other`` is what the other one is. ``total`` is the bytes of RAM.

    ``preparing``: the destination has failover primaries that are not prepared yet; ``prepared`` are those that are, or
    cannot be. ``on_status`` is told each new status; by the thread that changes it, which must not be kept.
    """

    def __init__(
        self, total: int, on_status: Callable[[Status], object] = lambda status: None, *, other: str = "destination"
    ) -> None:
        self.status = Status.NONE
        self.other = other
        self.total = total
        self.error: str | None = None
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.primaries: list[str] = []
        self.preparing = False
        self.prepared: list[Outcome] = []
        self.phases: list[Phase] = []
        self.rounds: deque[Round] = deque(maxlen=MOST_ROUNDS)
        self.pages = self.zero_pages = self.size = self.downtime_size = self.passes = 0
        self.remaining = total
        self.expected_downtime: float | None = None
        self.throttle = 0
        self.not_converging: str | None = None
        self.stopped: int | None = None  # by the monotonic clock, as are all below
        self.stopped_ns = 0  # and by CLOCK_REALTIME
        self.went: int | None = None
        self.heard: int | None = None
        self.first_run_ns = 0  # at the destination, by CLOCK_REALTIME
        self.said: list[Said] = []
        self.began = time.monotonic_ns()
        self.began_ns = time.time_ns()
        self.active: int | None = None
        self.ended: int | None = None
        self._sent: Callable[[], tuple[int, int, int]] | None = None
        self._on_status = on_status
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether nothing goes on (any more)."""
        return self.status in OVER

    def become(self, status: Status) -> None:
        """Change the status."""
        with self._lock:
            if self.status is Status.CANCELLING and status not in OVER:
                return  # whoever goes on will hear of it
            if status not in LEGAL[self.status]:
                raise AssertionError(f"a migration that is {self.status.value} cannot become {status.value}")
            self.status = status
            if status is Status.ACTIVE and self.active is None:
                self.active = time.monotonic_ns()
            if status in OVER:
                self.ended = time.monotonic_ns()
        self._on_status(status)

    def cancelling(self) -> None:
        """Somebody wants it to end, unless it has."""
        with self._lock:
            if self.is_over or self.status is Status.CANCELLING:
                return
            self.status = Status.CANCELLING
        self._on_status(Status.CANCELLING)

    def fail(self, status: Status, error: str) -> None:
        """It has come to nothing, because of ``error``."""
        self.error = error
        self.become(status)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Stamp what is done within."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.phases.append(Phase(name, start, time.monotonic_ns()))

    def stamp(self, name: str, start: int, end: int) -> None:
        """A phase that is over, by the monotonic clock."""
        self.phases.append(Phase(name, start, end))

    def add(self, made: Round) -> None:
        """One more round is over."""
        with self._lock:
            self.rounds.append(made)
        self.remaining = 0
        self.pages += made.pages
        self.zero_pages += made.zero_pages
        self.size += made.size
        if self.stopped is not None:
            self.downtime_size += made.size

    @contextmanager
    def following(self, pages: Sends) -> Iterator[None]:
        """Within, it is told what has been sent by now, and not only in the rounds that are over."""
        self._sent = lambda: pages.sent
        try:
            yield
        finally:
            self.pages, self.zero_pages, self.size = pages.sent
            self.remaining, self._sent = self._counts().remaining, None

    def note_round(self, number: int, remaining: int, received: tuple[int, int, int]) -> None:
        """At the destination: round ``number`` begins, and so much has come: pages, zero pages, bytes."""
        self.passes, self.remaining = number, remaining
        self.pages, self.zero_pages, self.size = received

    def realtime(self, moment: int) -> int:
        """A moment of the monotonic clock by CLOCK_REALTIME, as that was when it began."""
        return self.began_ns + moment - self.began

    @property
    def blackout(self) -> float | None:
        """Milliseconds from the last instruction here to the first there; None while that is not known."""
        if not self.stopped_ns or not self.first_run_ns:
            return None
        said = self.first_run_ns - self.stopped_ns
        if self.stopped is None or self.went is None or self.heard is None:
            return max(0, said) / MS
        return max(self.went - self.stopped, min(said, self.heard - self.stopped)) / MS

    def info(self) -> dict[str, Any]:
        """For query-migrate."""
        if self.status is Status.NONE:
            return {}
        now = self.ended or time.monotonic_ns()
        with self._lock:
            rounds = tuple(self.rounds)
        known = {
            "total-time": round((now - self.began) / MS),
            "setup-time": None if self.active is None else round((self.active - self.began) / MS),
            "expected-downtime": None if self.expected_downtime is None else round(self.expected_downtime),
            "downtime": None if self.blackout is None else round(self.blackout),
            "blackout-ms": self.blackout,
            "stopped-ms": None if self.stopped is None else (self.stopped - self.began) / MS,
            "stopped-ns": self.stopped_ns or None,
            "error-desc": self.error,
            "cpu-throttle-percentage": self.throttle or None,
            "not-converging": self.not_converging,
            "problems": self.problems or None,
            "warnings": self.warnings or None,
            "primaries": self.primaries or None,
            "preparing": (self.preparing and not self.is_over) or None,
            "prepared": [self._outcome(each) for each in tuple(self.prepared)] or None,
        }
        return {
            "status": self.status.value,
            **{key: value for key, value in known.items() if value is not None},
            "ram": self._ram(),
            "phases": [self._phase(*phase) for phase in tuple(self.phases)],
            "rounds": [self._round(each) for each in rounds],
            **({self.other: self._other()} if self.said else {}),
        }

    def _ram(self) -> dict[str, Any]:
        last = self.rounds[-1] if self.rounds else None
        sent = self._counts()
        normal = sent.pages - sent.zero_pages
        seconds = last.seconds if last is not None and last.seconds else 0.0
        return {
            "transferred": sent.size,
            "remaining": sent.remaining,
            "total": self.total,
            "duplicate": sent.zero_pages,
            "normal": normal,
            "normal-bytes": normal * 4096,
            "dirty-pages-rate": int(last.dirty_rate) if last is not None else 0,
            "mbps": last.size * 8 / seconds / 1e6 if last is not None and seconds else 0.0,
            "dirty-sync-count": self.passes,
            "page-size": 4096,
            "multifd-bytes": sent.size,
            "pages-per-second": int(last.pages / seconds) if last is not None and seconds else 0,
            "precopy-bytes": sent.size - self.downtime_size,
            "downtime-bytes": self.downtime_size,
            "postcopy-requests": 0,
            "postcopy-bytes": 0,
            "dirty-sync-missed-zero-copy": 0,
        }

    def _counts(self) -> Counts:
        """What has been moved by now."""
        before, sent = self.pages, self._sent
        pages, zero_pages, size = (before, self.zero_pages, self.size) if sent is None else sent()
        return Counts(pages, zero_pages, size, max(0, self.remaining - (pages - before) * 4096))

    def _phase(self, name: str, start: int, end: int) -> dict[str, Any]:
        return {"name": name, "start-ms": (start - self.began) / MS, "ms": (end - start) / MS}

    def _outcome(self, each: Outcome) -> dict[str, Any]:
        return {"device-id": each.device, "ms": each.ns / MS, "problem": each.problem}

    def _round(self, each: Round) -> dict[str, Any]:
        return {
            "number": each.number,
            "start-ms": (each.start - self.began) / MS,
            "pages": each.pages,
            "zero-pages": each.zero_pages,
            "bytes": each.size,
            "ms": each.seconds * 1000,
            "dirty-rate": each.dirty_rate,
        }

    def _other(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "phases": [
                {"name": name, "start-ms": (start - self.began_ns) / MS, "ms": length / MS}
                for name, start, length in self.said
            ]
        }
        if self.first_run_ns:
            said |= {"first-run-ns": self.first_run_ns, "first-run-ms": (self.first_run_ns - self.began_ns) / MS}
        return said
