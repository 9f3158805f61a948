"""Which BARs are mapped, and where: the guest's wishes, the windows of the bridges above, and what is there already.

A BAR is mapped if its function decodes, all of it lies in a window of the host bridge and in one that the port above
forwards, it covers no RAM and nothing else is there. Any other wish is no error, as on real hardware: the BAR answers
nowhere (tracepoint ``pci.bar``), and is tried again whenever any decode changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from kvmpy.bus import Bus, Window
from kvmpy.devices.base import Shortcuts
from kvmpy.devices.pci.bar import Bar, BarKind, trace_bar
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.root_port import RootPort


class PciWindows(NamedTuple):
    """The addresses that belong to the PCI bus: ports, and memory below and above 4 GiB."""

    io: range
    mem32: range
    mem64: range


class Remains:
    """Where the BARs were of a function that was torn out: reads as 0 (a `kvmpy.bus.Target`) until `close`.

    While that is still busy it reads as all ones: a driver waits for the 0 before it uses its buffers for other things.
    """

    def __init__(
        self, name: str, function: PciFunction[Any], bus: Bus, places: Sequence[range], then: Callable[[], object]
    ) -> None:
        """``then`` is called when they are free again."""
        self.name, self.lock = name, threading.RLock()
        self._function = function if function.busy else None  # not kept for nothing: it is about to be given up
        self._bus, self._then = bus, then
        self._windows: list[Window] = []
        for place in places:
            with suppress(ValueError):  # something else is there by now
                self._windows.append(bus.map(place.start, len(place), self))

    def read(self, offset: int, size: int) -> int:
        """A guest's read."""
        if self._function is not None and not self._function.busy:
            self._function = None
        return 0 if self._function is None else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write, which has no effect."""

    def close(self) -> None:
        """Answer no more; closing twice is allowed."""
        self._function = None
        while self._windows:
            self._bus.unmap(self._windows.pop())
        self._then()


class Decoder:
    """The one who maps BARs.

    It reads what functions and ports publish, never their registers, so it needs no lock of theirs: any thread may
    call, holding one or not.
    """

    def __init__(
        self, mmio: Bus, pio: Bus, shortcuts: Shortcuts, windows: PciWindows, is_ram: Callable[[int, int], bool]
    ) -> None:
        self._mmio, self._pio, self._shortcuts = mmio, pio, shortcuts
        self._windows, self._is_ram = windows, is_ram
        self._functions: dict[PciFunction[Any], RootPort | None] = {}
        self._lock = threading.Lock()

    def add(self, function: PciFunction[Any], port: RootPort | None) -> None:
        """``function`` sits behind ``port``, or on the root complex."""
        with self._lock:
            self._functions[function] = port
        self.update()

    def remove(self, function: PciFunction[Any]) -> None:
        """``function`` leaves; nothing of it is mapped after this."""
        with self._lock:
            del self._functions[function]
            for bar in function.bars.values():
                bar.unmap()
        self.update()

    def places(self, function: PciFunction[Any]) -> list[range]:
        """Where its BARs in memory are mapped now."""
        bars = [bar for bar in function.bars.values() if bar.kind is not BarKind.IO]
        return [range(bar.address, bar.address + bar.size) for bar in bars if bar.address is not None]

    def remains(self, name: str, function: PciFunction[Any], places: Sequence[range]) -> Remains:
        """Have ``places``, where ``function`` was, read as 0 once it is not busy, until what is returned is closed."""
        return Remains(name, function, self._mmio, places, self.update)

    def update(self) -> None:
        """Something that decides has changed: move what must move."""
        with self._lock:
            places = [
                (bar, self._place(bar, port))
                for function, port in self._functions.items()
                for bar in function.bars.values()
            ]
            for bar, address in places:
                if bar.address != address:
                    bar.unmap()
            for bar, address in places:
                if address is not None and bar.address is None:
                    bar.map(self._pio if bar.kind is BarKind.IO else self._mmio, self._shortcuts, address)

    def _place(self, bar: Bar, port: RootPort | None) -> int | None:
        """Where ``bar`` is to be mapped, None for nowhere."""
        base = bar.programmed
        if base is None:
            return None
        here, above = self._windows, None if port is None else port.forwards
        if bar.kind is BarKind.IO:
            allowed = _holds(base, bar.size, here.io) and (above is None or _holds(base, bar.size, above.io))
        else:
            allowed = (
                _holds(base, bar.size, here.mem32, here.mem64)
                and (above is None or _holds(base, bar.size, above.memory, above.prefetchable))
                and not self._is_ram(base, bar.size)
            )
        if not allowed and trace_bar:
            trace_bar(bar.name, bar.index, "outside", base)
        return base if allowed else None


def _holds(base: int, size: int, *windows: range) -> bool:
    return any(base in window and base + size - 1 in window for window in windows)
