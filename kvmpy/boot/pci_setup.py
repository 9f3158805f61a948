"""Gives every BAR its place, as firmware does before the operating system starts, which then keeps what it finds.

Bottom up, each bridge's windows are made as large as what is behind it, and those of a port with a hot-pluggable slot
large enough for what may come. Top down, everything is placed, the most aligned first, which leaves no gaps between
powers of two. An I/O BAR behind a bridge that forwards no ports stays off. Then the decoders are turned on. The system
enables bus mastering of what it has a driver for; bridges forward it from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol, TypeVar

import msgspec

from kvmpy.boot.pci_scan import Bar, Function, Reg, Space, scan, walk
from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import Command
from kvmpy.devices.pci.decode import PciWindows
from kvmpy.devices.pci.ports import ConfigAccess
from kvmpy.errors import HostError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

GRANULARITY: Final = {Space.IO: 4 * KIB, Space.MEM32: MIB, Space.MEM64: MIB}  # of a bridge's window
FOR_HOT_PLUG: Final = {Space.IO: 0, Space.MEM32: 16 * MIB, Space.MEM64: GIB}
CLOSED: Final = {Space.IO: (0xF000, 0xFFF), Space.MEM32: (0xFFF0_0000, 0xF_FFFF), Space.MEM64: (0xFFF0_0000, 0xF_FFFF)}


NOTHING: Final[Mapping[int, Sequence[tuple[Space, int]]]] = MappingProxyType({})


class Placeable(Protocol):
    """What needs addresses, in bytes."""

    @property
    def size(self) -> int: ...

    @property
    def alignment(self) -> int: ...


P = TypeVar("P", bound=Placeable)


class BridgeWindow(msgspec.Struct, frozen=True):
    """What a bridge forwards: ``contents`` are placed relative to its base."""

    bridge: Function
    space: Space
    contents: Sequence[tuple[int, Bar | BridgeWindow]]
    size: int
    alignment: int

    def __str__(self) -> str:
        return f"PCI {self.bridge}: the window for what is behind it"

    def place(self, address: int) -> None:
        """Open the window there, and place what is in it."""
        _forward(self.bridge, self.space, address, address + self.size - 1)
        self.bridge.decoders |= self.space.decoder
        for offset, item in self.contents:
            item.place(address + offset)


ON_ROOT: Final = "a BAR on the root bus"
COMING: Final = "a BAR of what is to come behind it"

Sizes = Sequence[tuple[Space, int]]
Expected = Mapping[int, Sizes]


class Behind(msgspec.Struct, frozen=True):
    """What a port with a hot-pluggable slot has behind it: the BARs of what is in it, and of what is to come (R27)."""

    port: str
    bars: Sizes
    expected: Sizes

    def each(self, space: Space) -> Iterator[tuple[int, str]]:
        """How large each of them is, and what it is."""
        for sizes, what in ((self.bars, "a BAR of what is behind it"), (self.expected, COMING)):
            yield from ((size, f"{self.port}: {what}") for where, size in sizes if where is space)

    def window(self, space: Space) -> Extent:
        """What the port would forward."""
        bars = _packed(_extents(self.bars, space), 0)
        if space is Space.IO and not bars:  # an empty slot's port forwards none
            return Extent(self.port, 0, 1)
        return Extent(f"{self.port}: the window for what is behind it", *_window_size(bars, self.expected, space))


class Extent(msgspec.Struct, frozen=True):
    """Addresses that somebody needs, in bytes."""

    whose: str
    size: int
    alignment: int

    def __str__(self) -> str:
        return self.whose


def set_up(config: ConfigAccess, windows: PciWindows, irqs: Sequence[int], expected: Expected = NOTHING) -> None:
    """Number the buses and place every BAR in ``windows``; ``irqs`` are the GSIs of device 0's INTA to INTD.

    ``expected`` has, by the devfn of its port on bus 0, the BARs of what is to come and cannot be seen yet (R27).

    Starts from any state of the bus, as long as nothing else uses it. Raises HostError naming the function that does
    not fit.
    """
    functions = scan(config)
    for function in functions:
        function.expected = expected.get(function.devfn, ())
    for function in walk(functions):
        if function.is_bridge:
            for space in Space:
                _forward(function, space, *CLOSED[space])
    for space, window in _windows(windows):
        _require_size(_bars(functions, space), space, window)
        for address, item in _fitting(_contents(functions, space), space, window):
            item.place(address)
    for function in walk(functions):
        _enable(function, irqs)


def require_room(windows: PciWindows, on_root: Sizes, behind: Sequence[Behind]) -> None:
    """Whether `set_up` would find a place for all BARs of such a machine, whose bus is left as it is.

    Raises HostError naming what does not fit.
    """
    for space, window in _windows(windows):
        bars = [(size, ON_ROOT) for where, size in on_root if where is space]
        _require_size([*bars, *(bar for port in behind for bar in port.each(space))], space, window)
        needed = [*_extents(on_root, space), *(port.window(space) for port in behind)]
        _fitting([extent for extent in needed if extent.size], space, window)


def space(kind: BarKind) -> Space:
    """Where a BAR of that kind goes."""
    match kind:
        case BarKind.IO:
            return Space.IO
        case BarKind.MEM64_PREFETCHABLE:
            return Space.MEM64
    return Space.MEM32


def _bars(functions: Sequence[Function], space: Space) -> Iterator[tuple[int, str]]:
    """How large each is, and what it is."""
    for function in walk(functions):
        yield from ((bar.size, str(bar)) for bar in function.bars if bar.space is space)
        coming = f"PCI {function}: {COMING}"
        yield from ((size, coming) for where, size in function.expected if where is space)


def _require_size(bars: Iterable[tuple[int, str]], space: Space, window: range) -> None:
    """Raises HostError where one BAR is larger than all of the window, whatever else there is."""
    largest, bar = max(bars, default=(0, ""))
    if largest > len(window):
        more = "; only more root ports make that larger (docs/passthrough.md)" if space is Space.MEM64 else ""
        raise HostError(
            f"{bar} has {largest:#x} bytes, and all of the {space.value} window {len(window):#x}: "
            f"this machine cannot be given such a device{more}"
        )


def _contents(functions: Sequence[Function], space: Space) -> list[Bar | BridgeWindow]:
    """What ``functions`` need of ``space`` on the bus they are on."""
    items: list[Bar | BridgeWindow] = [bar for function in functions for bar in function.bars if bar.space is space]
    windows = [_window(function, space) for function in functions if function.forwards(space)]
    return items + [window for window in windows if window.size]


def _window(bridge: Function, space: Space) -> BridgeWindow:
    contents = _packed(_contents(bridge.below, space), 0)
    size, alignment = _window_size(contents, bridge.expected if bridge.hot_pluggable else None, space)
    return BridgeWindow(bridge, space, contents, size, alignment)


def _window_size(contents: Sequence[tuple[int, Placeable]], expected: Sizes | None, space: Space) -> tuple[int, int]:
    """Of a bridge with ``contents``, and its alignment; ``expected`` is None where nothing can be plugged in."""
    at_least = 0 if expected is None else max(FOR_HOT_PLUG[space], _room(expected, space))
    granularity = GRANULARITY[space]
    end = max((offset + item.size for offset, item in contents), default=0)
    size = _aligned(max(end, at_least), granularity)
    return size, max(granularity, at_least, *(item.alignment for _, item in contents))


def _room(expected: Sizes, space: Space) -> int:
    """A power of two in which those BARs find their places, and aligned to it the largest of them does."""
    needed = sum(size for where, size in expected if where is space)
    return 1 << (needed - 1).bit_length() if needed else 0


def _extents(bars: Sizes, space: Space) -> list[Extent]:
    return [Extent(ON_ROOT, size, size) for where, size in bars if where is space]


def _windows(windows: PciWindows) -> Sequence[tuple[Space, range]]:
    return (Space.IO, windows.io), (Space.MEM32, windows.mem32), (Space.MEM64, windows.mem64)


def _fitting(items: Sequence[P], space: Space, window: range) -> Sequence[tuple[int, P]]:
    """Each with its address in ``window``. Raises HostError naming the one that has none there."""
    placed = _packed(items, window.start)
    for address, item in placed:
        if address + item.size > window.stop:
            raise HostError(
                f"{item}, {item.size:#x} bytes, does not fit the {space.value} window, "
                f"{window.start:#x} to {window.stop - 1:#x}; give the machine fewer devices or root ports"
            )
    return placed


def _packed(items: Sequence[P], start: int) -> Sequence[tuple[int, P]]:
    """Each of ``items`` with its address, from ``start`` on."""
    placed = []
    for item in sorted(items, key=lambda item: (item.alignment, item.size), reverse=True):
        address = _aligned(start, item.alignment)
        placed.append((address, item))
        start = address + item.size
    return placed


def _aligned(address: int, alignment: int) -> int:
    return -(-address // alignment) * alignment


def _forward(bridge: Function, space: Space, first: int, last: int) -> None:
    """Program one of a bridge's windows: PCI Express Base 6.0, section 7.5.1.3."""
    match space:
        case Space.IO:
            bridge.write(Reg.IO_BASE, 2, first >> 8 & 0xF0 | last & 0xF000)
            bridge.write(Reg.IO_UPPER, 4, first >> 16 | last & 0xFFFF_0000)
        case Space.MEM32:
            bridge.write(Reg.MEMORY_BASE, 4, first >> 16 & 0xFFF0 | last & 0xFFF0_0000)
        case Space.MEM64:
            bridge.write(Reg.PREFETCHABLE_BASE, 4, first >> 16 & 0xFFF0 | last & 0xFFF0_0000)
            bridge.write(Reg.PREFETCHABLE_BASE_UPPER, 4, first >> 32)
            bridge.write(Reg.PREFETCHABLE_LIMIT_UPPER, 4, last >> 32)


def _enable(function: Function, irqs: Sequence[int]) -> None:
    """Say which interrupt it has, and let it answer."""
    if pin := function.read(Reg.INTERRUPT_PIN, 1):
        function.write(Reg.INTERRUPT_LINE, 1, irqs[(function.turn + pin - 1) % len(irqs)])
    enabled = function.decoders | (Command.BUS_MASTER if function.is_bridge else 0)
    function.write(Reg.COMMAND, 2, function.read(Reg.COMMAND, 2) | enabled)
