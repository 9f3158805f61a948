"""A tree of PCI functions with configuration space and nothing else, as firmware and an operating system see it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

SIZE: Final = 256
ROM: Final = {0: 0x30, 1: 0x38}
IO, MEM32, MEM64, MEM64_PREFETCHABLE = 0b0001, 0b0000, 0b0100, 0b1100  # a BAR's low bits
EXPRESS: Final = 0x60
HOT_PLUG_SLOT: Final = 0x40
ROOT_PORT, UPSTREAM, DOWNSTREAM = 0x4, 0x5, 0x6


class FakeFunction:
    """One function; ``bars`` are (kind, size) by index. Registers change only where a real one's would."""

    def __init__(
        self, bars: dict[int, tuple[int, int]] | None = None, *, rom: int = 0, pin: int = 0, header_type: int = 0
    ) -> None:
        self.header_type = header_type & 0x7F
        self.data, self.writable = bytearray(SIZE), bytearray(SIZE)
        self.bars = bars or {}
        self.below: dict[int, FakeFunction] = {}
        self.sized_while_decoding = False
        self._register(0x00, 0x1234_1AF4)
        self._register(0x04, 0, 0x0000_0547)
        self._register(0x0C, header_type << 16)
        self._register(0x3C, pin << 8, 0xFF)
        for index, (kind, size) in self.bars.items():
            mask = -size & ~(0x3 if kind & IO else 0xF)
            self._register(0x10 + 4 * index, kind, mask)
            if kind & 0b100:
                self._register(0x14 + 4 * index, 0, mask >> 32)
        self.rom = rom
        if rom:
            self._register(ROM[self.header_type], 0, -rom & 0xFFFF_F800 | 1)

    def _register(self, offset: int, value: int, writable: int = 0) -> None:
        self.data[offset : offset + 4] = value.to_bytes(4, "little")
        self.writable[offset : offset + 4] = (writable & 0xFFFF_FFFF).to_bytes(4, "little")

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= value < 1 << 8 * size
        if value == 0xFFFF_FFFF and self.data[4] & 0b11:
            self.sized_while_decoding = True
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            self.data[at] = self.data[at] & ~self.writable[at] | byte & self.writable[at]

    def express(self, port_type: int, slot: int | None = None) -> FakeFunction:
        """Give it a PCI Express capability, behind another one; ``slot`` are a slot's capabilities."""
        self._register(0x04, 0x0010_0000, 0x0547)
        self._register(0x34, 0x40)
        self._register(0x40, EXPRESS << 8 | 0x01)
        self._register(EXPRESS, (port_type << 4 | 2 | (slot is not None) << 8) << 16 | 0x10)
        self._register(EXPRESS + 0x14, slot or 0)
        return self

    def bar(self, index: int) -> int:
        """The address that was programmed."""
        address = self.read(0x10 + 4 * index, 4)
        if address & IO:
            return address & ~0x3
        return address & ~0xF | (self.read(0x14 + 4 * index, 4) << 32 if address & 0b100 else 0)

    @property
    def command(self) -> int:
        return self.read(0x04, 2)

    # Of a bridge

    @property
    def buses(self) -> tuple[int, int, int]:
        """Primary, secondary and subordinate."""
        primary, secondary, subordinate = self.data[0x18:0x1B]
        return primary, secondary, subordinate

    @property
    def io(self) -> range:
        base = (self.data[0x1C] & 0xF0) << 8 | self.read(0x30, 2) << 16
        return range(base, ((self.data[0x1D] & 0xF0) << 8 | self.read(0x32, 2) << 16 | 0xFFF) + 1)

    @property
    def mem32(self) -> range:
        return range((self.read(0x20, 2) & 0xFFF0) << 16, ((self.read(0x22, 2) & 0xFFF0) << 16 | 0xF_FFFF) + 1)

    @property
    def mem64(self) -> range:
        base = (self.read(0x24, 2) & 0xFFF0) << 16 | self.read(0x28, 4) << 32
        return range(base, ((self.read(0x26, 2) & 0xFFF0) << 16 | self.read(0x2C, 4) << 32 | 0xF_FFFF) + 1)


def bridge(
    below: Sequence[FakeFunction] = (),
    *,
    port_type: int | None = ROOT_PORT,
    hot_plug: bool = False,
    multi_function: bool = False,
    pin: int = 0,
    ports: bool = True,
) -> FakeFunction:
    """A bridge with ``below`` as devices 0, 1, ... behind it; with port type None it is no PCI Express.

    Without ``ports`` it forwards memory alone.
    """
    function = FakeFunction(header_type=1 | multi_function << 7, pin=pin)
    function.writable[0x18:0x1B] = b"\xff\xff\xff"
    function.data[0x1C:0x1E] = b"\x01\x01"
    function.data[0x24:0x28] = b"\x01\x00\x01\x00"
    for first, mask in ((0x1C, b"\xf0\xf0"), (0x20, b"\xf0\xff" * 4), (0x28, b"\xff" * 12)):
        function.writable[first : first + len(mask)] = mask
    if not ports:
        function.data[0x1C:0x1E] = function.writable[0x1C:0x1E] = bytes(2)
    function.below = {device << 3: child for device, child in enumerate(below)}
    if port_type is not None:
        function.express(port_type, HOT_PLUG_SLOT if hot_plug else None)
    return function


@dataclass
class FakeConfigSpace:
    """Who answers is found by the bus numbers in the bridges, as in hardware; ``root`` is by devfn."""

    root: dict[int, FakeFunction]
    lock: threading.RLock = field(default_factory=threading.RLock)
    accesses: int = 0
    written: list[tuple[int, int]] = field(default_factory=list)

    def read(self, bus: int, devfn: int, offset: int, size: int) -> int:
        self.accesses += 1
        function = self.find(bus, devfn)
        return (1 << 8 * size) - 1 if function is None else function.read(offset, size)

    def write(self, bus: int, devfn: int, offset: int, size: int, value: int) -> None:
        self.accesses += 1
        self.written.append((bus, devfn))
        if function := self.find(bus, devfn):
            function.write(offset, size, value)

    def find(self, bus: int, devfn: int) -> FakeFunction | None:
        functions, here = self.root, 0
        while here != bus:
            ways = [f for f in functions.values() if f.header_type == 1 and f.buses[1] <= bus <= f.buses[2]]
            if not ways:
                return None
            (way,) = ways  # or two would answer
            functions, here = way.below, way.buses[1]
        return functions.get(devfn)

    def functions(self) -> Iterator[FakeFunction]:
        waiting = list(self.root.values())
        while waiting:
            function = waiting.pop(0)
            yield function
            waiting.extend(function.below.values())
