"""The POST code port 0x80: a guest's milestones with the host's time.

A guest writes a number and the first time of each number is kept. Linux also writes to port 0x80 to pass a microsecond
(native_io_delay), so any number may turn up and later writes of a number must be cheap and change nothing: there are at
most 256 stamps. The stamps are the host's, tell of the first boot and do not migrate; the last number written does: the
guest can read it. Of a read, and of a number that it has a stamp of, the device need not hear.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvmpy.devices.base import Device
from kvmpy.latch import Latch
from kvmpy.state import State, u8


class DebugPortState(State):
    NAME = "debug-port"
    VERSION = 1
    last: u8 = 0


class DebugPort(Device[DebugPortState]):
    """One byte at port 0x80. ``clock`` gives nanoseconds of any origin."""

    def __init__(self, name: str, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(name, DebugPortState())
        self._clock = clock
        self._stamps: dict[int, int] = {}
        self.last = Latch(0, 1)
        self.post_load()

    @property
    def stamps(self) -> tuple[tuple[int, int], ...]:
        """``(value, nanoseconds)`` of each value's first write, oldest first; a reset forgets none. Any thread."""
        with self.lock:
            return tuple(self._stamps.items())

    def read(self, offset: int, size: int) -> int:
        return self.last.value

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if value not in self._stamps:
            self._stamps[value] = self._clock()
            self.last.heard(value)
        self.last.set(value, reads=True)

    def post_load(self) -> None:
        self.last.set(self.state.last, reads=True)

    def pause(self) -> None:
        self.state.last = self.last.value
