"""INTx: level interrupts on four wires that many functions share."""

from __future__ import annotations

import threading

from kvmpy.irq import Attachment, Event, Wire

PINS = 4


class SharedLine:
    """A wired OR: ``line`` is high while any of its sources is. Any thread."""

    def __init__(self, line: Wire) -> None:
        self._line = line
        self._high: set[Source] = set()
        self._lock = threading.Lock()

    def source(self) -> Source:
        """A new wire to pull; low. It costs nothing once it is low and forgotten."""
        return Source(self)

    def drive(self, source: Source, *, level: bool) -> None:
        """Used by Source."""
        # Under the lock: else the last of two changes could reach the line first.
        with self._lock:
            if level:
                self._high.add(source)
            else:
                self._high.discard(source)
            self._line.set(level=bool(self._high))

    def attach(self, trigger: Event, resample: Event) -> Attachment:
        """Used by Source."""
        return self._line.attach(trigger, resample)


class Source:
    """One function's wire (a `Wire`)."""

    def __init__(self, shared: SharedLine) -> None:
        self._shared = shared

    def set(self, *, level: bool) -> None:
        """Drive the wire."""
        self._shared.drive(self, level=level)

    def attach(self, trigger: Event, resample: Event) -> Attachment:
        """Let the kernel drive the wire too. Raises HostError."""
        return self._shared.attach(trigger, resample)


class Unconnected:
    """The wire of a function that is in no machine (a `Wire`), and an attachment to it."""

    def set(self, *, level: bool) -> None:
        """Nobody listens."""

    def attach(self, trigger: Event, resample: Event) -> Attachment:
        """Nobody listens."""
        return self

    def close(self) -> None:
        """There is nothing to let go of."""


def swizzle(pin: int, device: int) -> int:
    """What pin 1 to 4 (INTA to INTD) of ``device`` is on the other side of its bridge, or as index of four lines + 1.

    PCI-to-PCI Bridge 1.2, section 9.1.
    """
    return (pin - 1 + device) % PINS + 1
