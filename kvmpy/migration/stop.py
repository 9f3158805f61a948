"""What wakes a thread of a migration that waits: for the other side, for a connection, for a handshake."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from time import monotonic
from typing import Final, Self

from kvmpy.errors import MigrationCancelled, StreamError
from kvmpy.host.eventfd import EventFd

TIMEOUT: Final = 10.0  # seconds that the other side, or what lies between, may take for anything
LONGEST: Final = 7 * 86400.0  # whoever waits so long waits for ever


class Deadline:
    """Until when something must have happened."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 where it is over."""
        return max(0.0, self._end - monotonic())


class Stop:
    """One for all that a migration waits for; once set it stays so. `set` is for any thread.

    Every wait polls ``fd`` beside what it waits for, those in C too: it is readable from `set` on, and nobody reads it.
    """

    def __init__(self) -> None:
        self._event = EventFd()
        self._lock = threading.Lock()
        self._calls: list[Callable[[], object]] = []
        self.reason: str | None = None

    @property
    def fd(self) -> int:
        return self._event.fd

    def set(self, reason: str = "cancelled") -> None:
        """Wake all waits, those to come too: they raise MigrationCancelled with the first ``reason``."""
        with self._lock:
            if self.reason is None:
                self.reason = reason
            if self._event.fd >= 0:
                self._event.signal()
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def then(self, call: Callable[[], object]) -> None:
        """Have ``call`` made once it is set, by whoever sets it: for those who wait for something else than ``fd``."""
        with self._lock:
            if self.reason is None:
                self._calls.append(call)
                return
        call()

    def check(self) -> None:
        """Raises MigrationCancelled once it is set."""
        if self.reason is not None:
            raise MigrationCancelled(self.reason)

    def wait(self, fd: int, events: int, deadline: Deadline, what: str) -> None:
        """Until ``fd`` is ready. Raises StreamError, "``what`` within n seconds", or MigrationCancelled."""
        if not self.wait_any({fd: events}, deadline):
            raise StreamError(f"{what} within {deadline.seconds:g} seconds")

    def wait_any(self, events: dict[int, int], deadline: Deadline | None) -> list[int]:
        """Which of these descriptors are ready; none where time is over."""
        self.check()
        poll = select.poll()
        for fd, wanted in events.items():
            poll.register(fd, wanted)
        poll.register(self.fd, select.POLLIN)
        left = LONGEST if deadline is None else min(deadline.left, LONGEST)
        # Up, or the last fraction of a millisecond would be polled away.
        ready = poll.poll(None if left == LONGEST else int(left * 1000) + 1)
        self.check()
        return [fd for fd, _ in ready if fd in events]

    def close(self) -> None:
        """Only when nobody waits any more."""
        with self._lock:
            self._calls.clear()
            self._event.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
