"""What is on the PCI buses, found as firmware finds it: by configuration accesses alone.

`scan` numbers the buses depth first (PCI-to-PCI Bridge Architecture 1.2, section 3.2.5) and sizes every BAR by writing
ones to it, with the function's decoders off (PCI Express Base 6.0, section 7.5.1.2.1); they stay off. Registers and
their bits are those of chapter 7.5 there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum, IntEnum
from typing import Final

import msgspec

from kvmpy.devices.pci.config import MULTI_FUNCTION, Command, Status
from kvmpy.devices.pci.express import SLOT_IMPLEMENTED, TYPE_SHIFT, Slot
from kvmpy.devices.pci.ports import ConfigAccess
from kvmpy.errors import HostError

ABSENT: Final = 0xFFFF
ONES: Final = 0xFFFF_FFFF
LAST_BUS: Final = 255
DEVICES: Final = range(32)
FUNCTIONS: Final = range(8)


class Reg(IntEnum):
    """Offsets in configuration space."""

    VENDOR = 0x00
    COMMAND = 0x04
    STATUS = 0x06
    HEADER_TYPE = 0x0E
    BAR0 = 0x10
    ROM = 0x30
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D
    # Of a bridge, instead of the BARs from the third on and of the ROM:
    BUSES = 0x18
    SECONDARY_BUS = 0x19
    SUBORDINATE_BUS = 0x1A
    IO_BASE = 0x1C
    MEMORY_BASE = 0x20
    PREFETCHABLE_BASE = 0x24
    PREFETCHABLE_BASE_UPPER = 0x28
    PREFETCHABLE_LIMIT_UPPER = 0x2C
    IO_UPPER = 0x30
    BRIDGE_ROM = 0x38


BRIDGE: Final = 1
BARS: Final = {0: 6, BRIDGE: 2}  # by header type
ROMS: Final = {0: Reg.ROM, BRIDGE: Reg.BRIDGE_ROM}

BAR_IO: Final = 1 << 0
BAR_TYPE: Final = 3 << 1
BAR_64_BITS: Final = 2 << 1
BAR_PREFETCHABLE: Final = 1 << 3
BAR_IO_FLAGS: Final = 0x3
BAR_MEMORY_FLAGS: Final = 0xF
ROM_FLAGS: Final = 0x7FF
IO_BASE_BITS: Final = 0xF0  # constant 0 in a bridge that forwards no ports

EXPRESS: Final = 0x10  # a capability's id; its flags and its slot's capabilities:
EXPRESS_FLAGS: Final = 0x02
EXPRESS_SLOT: Final = 0x14
ONE_DEVICE_BELOW: Final = (0x4, 0x6)  # types of port, root and downstream: a link leads to device 0 alone
MOST_CAPABILITIES: Final = 48  # of 4 bytes, behind the header: no list is longer


class Space(Enum):
    """Where a BAR goes."""

    IO = "I/O"
    MEM32 = "32-bit MMIO"
    MEM64 = "64-bit MMIO"

    @property
    def decoder(self) -> Command:
        """The bit of the command register that lets a function answer there."""
        return Command.IO if self is Space.IO else Command.MEMORY


class Function(msgspec.Struct, eq=False):
    """A function, and if it is a bridge what is behind it. ``turn`` is how far its pins are swizzled on the way up.

    ``expected`` are the BARs, with their sizes, of what is to come behind it.
    """

    config: ConfigAccess
    bus: int
    devfn: int
    turn: int
    header_type: int
    bars: Sequence[Bar] = ()
    below: Sequence[Function] = ()
    forwards_io: bool = False
    one_device_below: bool = False
    hot_pluggable: bool = False
    expected: Sequence[tuple[Space, int]] = ()
    decoders: int = 0

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.devfn >> 3:02x}.{self.devfn & 7}"

    @property
    def is_bridge(self) -> bool:
        return self.header_type == BRIDGE

    def forwards(self, space: Space) -> bool:
        """Whether it can open a window there."""
        return self.is_bridge and (self.forwards_io or space is not Space.IO)

    def read(self, offset: int, size: int) -> int:
        """The ``size`` bytes at ``offset`` of its configuration space."""
        return self.config.read(self.bus, self.devfn, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value`` at ``offset`` of its configuration space."""
        self.config.write(self.bus, self.devfn, offset, size, value)


class Bar(msgspec.Struct, frozen=True):
    """A base address register, or the ROM's; aligned to its size, which is in bytes."""

    function: Function
    register: int
    size: int
    space: Space
    is_wide: bool

    @property
    def alignment(self) -> int:
        return self.size

    def __str__(self) -> str:
        return f"PCI {self.function}: the BAR at {self.register:#x}"

    def place(self, address: int) -> None:
        """Program it; a ROM stays disabled."""
        self.function.write(self.register, 4, address & ONES)
        if self.is_wide:
            self.function.write(self.register + 4, 4, address >> 32)
        self.function.decoders |= self.space.decoder


def scan(config: ConfigAccess) -> Sequence[Function]:
    """The functions on bus 0, and behind its bridges all the others. Raises HostError if there are too many buses."""
    return _Numbering(config).scan(0, DEVICES, 0)


def walk(functions: Sequence[Function]) -> Iterator[Function]:
    """``functions`` and all behind them, each bridge before what is behind it."""
    for function in functions:
        yield function
        yield from walk(function.below)


class _Numbering:
    def __init__(self, config: ConfigAccess) -> None:
        self._config = config
        self._last = 0

    def scan(self, bus: int, devices: range, turn: int) -> Sequence[Function]:
        """The functions on ``bus``, whose number is programmed."""
        functions = [function for device in devices for function in self._device(bus, device, turn)]
        bridges = [function for function in functions if function.is_bridge]
        for bridge in bridges:
            bridge.write(Reg.BUSES, 4, 0)  # or an older number of one could be the new one of another
        for bridge in bridges:
            self._descend(bridge)
        return functions

    def _device(self, bus: int, device: int, turn: int) -> Iterator[Function]:
        for number in FUNCTIONS:
            devfn = device << 3 | number
            if self._config.read(bus, devfn, Reg.VENDOR, 2) != ABSENT:
                header_type = self._config.read(bus, devfn, Reg.HEADER_TYPE, 1)
                function = Function(self._config, bus, devfn, turn + device, header_type & ~MULTI_FUNCTION)
                _examine(function)
                yield function
                if number == 0 and not header_type & MULTI_FUNCTION:
                    return
            elif number == 0:
                return

    def _descend(self, bridge: Function) -> None:
        if self._last == LAST_BUS:
            raise HostError(
                f"PCI {bridge}: no bus number is left for what is behind it; give the machine fewer bridges"
            )
        self._last = secondary = self._last + 1
        bridge.write(Reg.BUSES, 1, bridge.bus)
        bridge.write(Reg.SECONDARY_BUS, 1, secondary)
        bridge.write(Reg.SUBORDINATE_BUS, 1, LAST_BUS)
        bridge.below = self.scan(secondary, range(1) if bridge.one_device_below else DEVICES, bridge.turn)
        bridge.write(Reg.SUBORDINATE_BUS, 1, self._last)


def _examine(function: Function) -> None:
    """Turn off its decoders, size its BARs, and see what sort of port it is."""
    command = function.read(Reg.COMMAND, 2)
    function.write(Reg.COMMAND, 2, command & ~(Command.IO | Command.MEMORY))
    function.bars = tuple(_bars(function))
    if function.is_bridge:
        function.write(Reg.IO_BASE, 1, IO_BASE_BITS)
        function.forwards_io = bool(function.read(Reg.IO_BASE, 1) & IO_BASE_BITS)
    if function.is_bridge and (express := _express(function)):
        flags = function.read(express + EXPRESS_FLAGS, 2)
        function.one_device_below = flags >> TYPE_SHIFT & 0xF in ONE_DEVICE_BELOW
        if flags & SLOT_IMPLEMENTED:
            function.hot_pluggable = bool(function.read(express + EXPRESS_SLOT, 4) & Slot.HOT_PLUG)


def _bars(function: Function) -> Iterator[Bar]:
    registers = iter(range(Reg.BAR0, Reg.BAR0 + 4 * BARS.get(function.header_type, 0), 4))
    for register in registers:
        answer = _probe(function, register)
        if answer & BAR_IO:
            mask, space, is_wide = answer & ~BAR_IO_FLAGS, Space.IO, False
        else:
            mask, space, is_wide = answer & ~BAR_MEMORY_FLAGS, Space.MEM32, answer & BAR_TYPE == BAR_64_BITS
        if is_wide:
            mask |= _probe(function, next(registers)) << 32
            space = Space.MEM64 if answer & BAR_PREFETCHABLE else Space.MEM32
        if mask:
            yield Bar(function, register, mask & -mask, space, is_wide)
    if function.header_type in ROMS:
        rom = ROMS[function.header_type]
        if mask := _probe(function, rom, ones=ONES & ~ROM_FLAGS) & ~ROM_FLAGS:
            yield Bar(function, rom, mask & -mask, Space.MEM32, is_wide=False)


def _probe(function: Function, register: int, ones: int = ONES) -> int:
    """What a BAR says when ones are written to it; then it is nowhere, until it is placed."""
    function.write(register, 4, ones)
    answer = function.read(register, 4)
    function.write(register, 4, 0)
    return answer


def _express(function: Function) -> int:
    """Where its PCI Express capability is; 0 if it has none."""
    if not function.read(Reg.STATUS, 2) & Status.CAPABILITIES:
        return 0
    offset = function.read(Reg.CAPABILITIES, 1)
    for _ in range(MOST_CAPABILITIES):
        if not offset or function.read(offset, 1) == EXPRESS:
            return offset
        offset = function.read(offset + 1, 1)
    return 0
