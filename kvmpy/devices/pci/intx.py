"""INTx: level interrupts on four wires that many functions share."""

from __future__ import annotations

import threading

from kvmpy.irq import IrqLine

PINS = 4


class SharedLine:
    """A wired OR: ``line`` is high while any of its sources is. Any thread."""

    def __init__(self, line: IrqLine) -> None:
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


class Source:
    """One function's wire (an `IrqLine`)."""

    def __init__(self, shared: SharedLine) -> None:
        self._shared = shared

    def set(self, *, level: bool) -> None:
        """Drive the wire."""
        self._shared.drive(self, level=level)


class Unconnected:
    """The wire of a function that is in no machine (an `IrqLine`)."""

    def set(self, *, level: bool) -> None:
        """Nobody listens."""


def swizzle(pin: int, device: int) -> int:
    """What pin 1 to 4 (INTA to INTD) of ``device`` is on the other side of its bridge, or as index of four lines + 1.

    PCI-to-PCI Bridge 1.2, section 9.1.
    """
    return (pin - 1 + device) % PINS + 1
