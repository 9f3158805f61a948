"""Tracepoints of a running machine, sent to the client that asked for them.

Any thread takes a line here, under a device's lock perhaps, so taking one only appends it; the control thread sends
what has come together a few times a second. A client that reads slower than the machine traces loses lines, which are
counted, and nothing else: neither its session nor the machine waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from kvmpy import trace
from kvmpy.host.reactor import Reactor

BATCH_SECONDS: Final = 0.05
MOST_WAITING: Final = 10_000
MOST_SENT: Final = 200
"""Lines of one event: less than a session's backlog takes."""


class TraceFeed:
    """``send`` is given the lines and how many were lost before them; False where it can take none now."""

    def __init__(self, control: Reactor, send: Callable[[dict[str, Any]], bool]) -> None:
        self._send = send
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._armed = False
        self._timer = control.timer(self._flush)

    def enable(self, glob: str) -> list[str]:
        """Feed every tracepoint that matches; returns the names it matches now."""
        return trace.enable(glob, self.take)

    def close(self) -> None:
        """Feed nothing more."""
        trace.disable(self.take)
        self._timer.cancel()
        # Both hold whoever holds us, and nobody collects circles while a machine runs.
        self._timer.callback = _nothing
        self._send = _nowhere

    def take(self, line: str) -> None:
        """One traced line. Any thread."""
        if len(self._lines) >= MOST_WAITING:
            self._dropped += 1
        else:
            self._lines.append(line)
        if not self._armed:
            self._armed = True
            self._timer.arm(BATCH_SECONDS)

    def _flush(self) -> None:
        self._armed = False
        lines = [self._lines[n] for n in range(min(len(self._lines), MOST_SENT))]
        dropped, self._dropped = self._dropped, 0
        if lines and self._send({"lines": lines, "dropped": dropped}):
            for _ in lines:
                self._lines.popleft()
        else:
            self._dropped += dropped
        if self._lines:
            self._armed = True
            self._timer.arm(BATCH_SECONDS)


def _nothing() -> None:
    pass


def _nowhere(_: dict[str, Any]) -> bool:
    return True
