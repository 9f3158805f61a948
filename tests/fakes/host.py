"""What devices are given, under a test's control: an interrupt line, a power switch, clocks, a timer, a terminal."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.irq import Event


class Attached:
    """What drives a Line from outside: eventfds, as the kernel would use them."""

    def __init__(self, line: Line, trigger: Event, resample: Event) -> None:
        self._line, self.trigger, self.resample = line, trigger, resample

    def close(self) -> None:
        if self in self._line.attached:
            self._line.attached.remove(self)


class Line:
    """An interrupt line: its level, and each change of it; ``attached`` is what the kernel drives it by."""

    def __init__(self) -> None:
        self.level = False
        self.changes: list[bool] = []
        self.attached: list[Attached] = []

    def attach(self, trigger: Event, resample: Event) -> Attached:
        self.attached.append(Attached(self, trigger, resample))
        return self.attached[-1]

    def high(self) -> bool:
        """The level, as a call: mypy believes that an attribute stays what an assert said."""
        return self.level

    def set(self, *, level: bool) -> None:
        assert isinstance(level, bool)
        if level is not self.level:
            self.changes.append(level)
        self.level = level


class Switch:
    """A power switch: the requests in order."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def request_reset(self) -> None:
        self.requests.append("reset")

    def request_shutdown(self) -> None:
        self.requests.append("shutdown")

    def report_panic(self) -> None:
        self.requests.append("panic")


class Clock:
    """Time that passes when told: ``ns`` counts from an arbitrary origin, ``utc`` gives seconds since 1970.

    Timers made by it ring while it passes, each at its time.
    """

    def __init__(self, utc: float = 1_700_000_000.0) -> None:
        self.now_ns = round(utc * 1e9)
        self.timers: list[ManualTimer] = []

    def ns(self) -> int:
        return self.now_ns

    def utc(self) -> float:
        return self.now_ns / 1e9

    def timer(self, callback: Callable[[], object]) -> ManualTimer:
        timer = ManualTimer(self, callback)
        self.timers.append(timer)
        return timer

    def pass_(self, seconds: float) -> None:
        end = self.now_ns + round(seconds * 1e9)
        while due := [(timer.due, timer) for timer in self.timers if timer.due is not None and timer.due <= end]:
            at, first = min(due, key=lambda entry: entry[0])
            self.now_ns = max(self.now_ns, at)
            first.ring()
        self.now_ns = end


class ManualTimer:
    """A Timer: ``due`` is when it rings, in its clock's nanoseconds; ``rings`` counts."""

    def __init__(self, clock: Clock, callback: Callable[[], object]) -> None:
        self.clock, self.callback = clock, callback
        self.due: int | None = None
        self.rings = 0

    def arm(self, seconds: float) -> None:
        assert seconds >= 0
        self.due = self.clock.now_ns + round(seconds * 1e9) + 1000  # a timer is never early

    def cancel(self) -> None:
        self.due = None

    def ring(self) -> None:
        self.due = None
        self.rings += 1
        self.callback()


class Screen:
    """A terminal that takes ``room_left`` bytes; None is any number."""

    def __init__(self, room_left: int | None = None) -> None:
        self.text = b""
        self.room_left = room_left

    def room(self) -> bool:
        return self.room_left is None or self.room_left > 0

    def take(self, data: bytes) -> None:
        self.text += data
        if self.room_left is not None:
            self.room_left -= len(data)
