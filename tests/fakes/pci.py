"""A PCI bus with nothing but fakes around it, a card to plug in, and configuration accesses as a kernel makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from kvmpy.bus import Bus
from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import Command, PciIds
from kvmpy.devices.pci.decode import PciWindows
from kvmpy.devices.pci.function import PciFunction, PciFunctionState
from kvmpy.devices.pci.host_bridge import HostBridge
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.reset_register import ResetRegister
from tests.fakes.host import Clock, Line, Switch
from tests.fakes.interrupts import FakeDoorbells, FakeSink

RAM_END: Final = 0x8000_0000
ECAM: Final = 0xB000_0000
CONFIG_ADDRESS: Final = 0xCF8
CONFIG_DATA: Final = 0xCFC
WINDOWS: Final = PciWindows(
    io=range(0x1000, 0x1_0000), mem32=range(0xC000_0000, 0xFEC0_0000), mem64=range(1 << 36, 1 << 40)
)
IDS: Final = PciIds(
    vendor=0x1AF4, device=0x1041, class_code=0x02_0000, revision=1, subsystem_vendor=0x1AF4, subsystem=0x0040
)


class CardState(PciFunctionState):
    NAME = "test-card"


class Card(PciFunction[CardState]):
    """An endpoint. Each BAR reads as the low bits of the offset; ``written`` has each write: offset, size, value."""

    def __init__(self, name: str = "card", *, bars: dict[int, tuple[int, BarKind]] | None = None, pin: int = 1) -> None:
        super().__init__(name, CardState(), IDS, pin=pin)
        self.written: list[tuple[int, int, int]] = []
        self.bus_master: list[bool] = []
        for index, (size, kind) in (bars or {}).items():
            self.add_bar(index, size, kind, self)

    def read(self, offset: int, size: int) -> int:
        return offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))

    def on_bus_master(self, enabled: bool) -> None:
        self.bus_master.append(enabled)


class ConfigWindow:
    """A function's configuration space as a `kvmpy.bus.Target`, for tests that want all of a device on a bus."""

    def __init__(self, function: PciFunction[Any]) -> None:
        self.name, self.lock, self._function = function.name, function.lock, function

    def read(self, offset: int, size: int) -> int:
        return self._function.config_read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._function.config_write(offset, size, value)


class Accesses:
    """Configuration space of one function through ECAM."""

    def __init__(self, board: Board, bus: int, device: int, function: int = 0) -> None:
        self._board, self.base = board, ECAM + (bus << 20 | device << 15 | function << 12)

    def read(self, offset: int, size: int) -> int:
        return self._board.mmio.read(self.base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._board.mmio.write(self.base + offset, size, value)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """ID and offset of each, followed as Linux does: a bounded number of times."""
        at = self.read(0x34, 1)
        for _ in range(48):
            if at < 0x40:
                return
            yield self.read(at, 1), at
            at = self.read(at + 1, 1)
        raise AssertionError("the chain has no end")

    def capability(self, wanted: int) -> int:
        return dict(self.capabilities())[wanted]

    def size_bar(self, offset: int) -> tuple[int, int]:
        """What Linux's __pci_read_base does, with decoding off: (the register as it was, the mask of its size)."""
        was = self.read(offset, 4)
        self.write(offset, 4, 0xFFFF_FFFF)
        mask = self.read(offset, 4)
        self.write(offset, 4, was)
        return was, mask

    def place(self, index: int, address: int, *, wide: bool = False) -> None:
        """Program a BAR; ``wide`` for one of 64 bits."""
        self.write(0x10 + 4 * index, 4, address & 0xFFFF_FFFF)
        if wide:
            self.write(0x14 + 4 * index, 4, address >> 32)

    def enable(self, command: int = Command.IO | Command.MEMORY | Command.BUS_MASTER) -> None:
        self.write(0x04, 2, command)


class Board:
    """A root complex with its buses, four lines, RAM below 2 GiB; a host bridge at 00:00.0."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.mmio, self.pio = Bus("mmio"), Bus("pio")
        self.doorbells, self.sink, self.power = FakeDoorbells(), FakeSink(), Switch()
        self.clock = clock or Clock()
        self.lines = [Line() for _ in range(4)]
        self.reset_register = ResetRegister("reset", self.power)
        self.root = PciRoot(
            self.mmio,
            self.pio,
            self.doorbells,
            self.lines,
            WINDOWS,
            lambda gpa, size: gpa < RAM_END,
            self.reset_register,
        )
        self.mmio.map(ECAM, 256 << 20, self.root.ecam)
        self.pio.map(CONFIG_ADDRESS, 8, self.root.ports, widest=4)
        self.host_bridge = HostBridge("host-bridge")
        self.root.add(self.host_bridge, 0)

    def config(self, bus: int, device: int, function: int = 0) -> Accesses:
        return Accesses(self, bus, device, function)

    def add(self, function: PciFunction[Any], device: int) -> Accesses:
        """On bus 0."""
        self.root.add(function, device)
        return self.config(0, device)

    def add_port(
        self, device: int = 1, slot: int = 1, *, bus: int | None = None, power_controller: bool = True
    ) -> tuple[RootPort, Accesses]:
        """A root port on bus 0, its secondary bus numbered ``bus``."""
        timer, now = self.clock.timer, self.clock.utc
        port = RootPort(f"root{slot}", slot, self.sink, timer, now, power_controller=power_controller)
        config = self.add(port, device)
        port.resume()
        if bus is not None:
            config.write(0x18, 4, bus << 16 | bus << 8)
        return port, config

    def close(self) -> None:
        self.sink.close()


def open_windows(config: Accesses, memory: range, prefetchable: range, io: range = range(0)) -> None:
    """Program a port's windows, which are whole MiB (4 KiB of I/O), and let it forward."""
    config.write(0x20, 4, memory.start >> 16 & 0xFFF0 | (memory.stop - 1 >> 16 & 0xFFF0) << 16)
    config.write(0x24, 4, prefetchable.start >> 16 & 0xFFF0 | (prefetchable.stop - 1 >> 16 & 0xFFF0) << 16)
    config.write(0x28, 4, prefetchable.start >> 32)
    config.write(0x2C, 4, prefetchable.stop - 1 >> 32)
    if io:
        config.write(0x1C, 2, io.start >> 8 & 0xF0 | (io.stop - 1 >> 8 & 0xF0) << 8)
    config.enable()
