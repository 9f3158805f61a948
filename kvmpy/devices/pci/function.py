"""A function of PCI Express: configuration space, BARs, interrupts. Concrete devices are subclasses.

    class RngState(PciFunctionState):
        NAME = "pci-rng"
        seed: u32 = 0

    class Rng(PciFunction[RngState]):
        def __init__(self, name: str, sink: MsiSink) -> None:
            super().__init__(name, RngState(), PciIds(vendor=0x1AF4, device=0x1044, class_code=0xFF0000))
            bar = self.add_bar(0, 0x4000, BarKind.MEM64_PREFETCHABLE, self)
            self.add_msix(2, sink, bar, table_offset=0x1000, pba_offset=0x2000)

Whatever the function has is declared in __init__; `PciRoot.add` or `RootPort.plug` then puts it in a machine.
The migratable state is the bytes the guest sees. They are validated on load: constant bits must be this machine's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

from msgspec import Meta, field

from kvmpy.bus import Target
from kvmpy.devices.base import Device
from kvmpy.devices.pci.bar import Bar, BarKind, Rom
from kvmpy.devices.pci.config import CONFIG_SIZE, Command, ConfigSpace, EndpointHeader, Header, PciIds, Status
from kvmpy.devices.pci.express import ExpressCapability
from kvmpy.devices.pci.intx import Unconnected
from kvmpy.devices.pci.msi import Msi, MsiCapability
from kvmpy.devices.pci.msix import VECTORS, Msix, MsixCapability, pba_size, table_size, take
from kvmpy.irq import MsiSink, Wire
from kvmpy.state import State, StateError, part


class PciState(State):
    """Empty in a fresh state: the function fills in its own power-on content."""

    NAME = "pci"
    VERSION = 1
    config: Annotated[bytearray, Meta(max_length=CONFIG_SIZE)] = field(default_factory=bytearray)
    msix_table: Annotated[bytearray, Meta(max_length=table_size(VECTORS[-1]))] = field(default_factory=bytearray)
    msix_pending: Annotated[bytes, Meta(max_length=pba_size(VECTORS[-1]))] = b""


class PciFunctionState(State):
    """What the state of every function starts with."""

    NAME = "pci-function"
    pci: PciState = part(PciState)


F = TypeVar("F", bound=PciFunctionState)


class IntxPin:
    """A function's INTx (an `IrqLine`): a bit of the status register; ``wire`` follows it unless it is disabled."""

    def __init__(self, function: PciFunction[Any]) -> None:
        self._function = function
        self.wire: Wire = Unconnected()

    def set(self, *, level: bool) -> None:
        """Assert or deassert it. Any thread; takes the function's lock."""
        with self._function.lock:
            header = self._function.header
            header.status = header.status & ~Status.INTERRUPT | (Status.INTERRUPT if level else 0)
            self.drive()

    def drive(self) -> None:
        """Set the wire as the registers say."""
        header = self._function.header
        asserted = header.status & Status.INTERRUPT and not header.command & Command.INTX_DISABLE
        self.wire.set(level=bool(asserted))


class PciFunction(Device[F]):
    """``state`` is fresh; ``pin`` is 1 to 4 for INTA to INTD, 0 for none; ``lock`` is shared with a part of the device.

    Every function but the host bridge has a PCI Express capability, ``express``.
    """

    ZERO_WHEN_TORN_OUT: ClassVar[bool] = False
    """What was its BARs reads 0, not all ones, until the guest has turned the slot off, once it is no longer `busy`."""

    def __init__(
        self,
        name: str,
        state: F,
        ids: PciIds,
        *,
        header: type[Header] = EndpointHeader,
        express: type[ExpressCapability] | None = ExpressCapability,
        pin: int = 1,
        lock: threading.RLock | None = None,
    ) -> None:
        super().__init__(name, state)
        if lock is not None:
            self.lock = lock
        self.config = ConfigSpace(header, ids, pin)
        self.header: Header = self.config.header
        self.header.on_command = self._follow
        self.express = None if express is None else self.config.add_capability(express)
        self.bars: dict[int, Bar] = {}
        self.msix: Msix | None = None
        self.msi: Msi | None = None
        self.intx = IntxPin(self)
        self.on_decode: Callable[[], object] = lambda: None  # told when a BAR's or a bridge's addresses have changed
        self._bus_master = False
        self._bind()

    def add_bar(self, index: int, size: int, kind: BarKind, target: Target, widest: int = 8) -> Bar:
        """Declare BAR ``index``: ``size`` bytes, a power of two, in which ``target`` (with our lock) is told offsets.

        A 64-bit one takes register index + 1 too. Accesses wider than ``widest`` reach the target in pieces.
        """
        taken = {i + n for i, bar in self.bars.items() for n in range(bar.kind.registers)}
        registers = range(index, index + kind.registers)
        if index < 0 or registers[-1] >= self.header.BARS or not taken.isdisjoint(registers):
            raise ValueError(f"{self.name}: BAR {index} is not free")
        bar = Bar(self.name, index, size, kind, target, widest)
        self._declare(bar, kind.value)
        return bar

    def add_rom(self, size: int, target: Target, widest: int = 8) -> Rom:
        """Declare the expansion ROM: 2 KiB to 16 MiB, a power of two, that ``target`` (with our lock) is read for."""
        if Rom.INDEX in self.bars or self.header.TYPE != EndpointHeader.TYPE:
            raise ValueError(f"{self.name}: no place for an expansion ROM")
        rom = Rom(self.name, size, target, widest)
        self._declare(rom, 0)
        return rom

    def add_msix(
        self, vectors: int, sink: MsiSink, bar: Bar, table_offset: int, pba_offset: int, pba_bar: Bar | None = None
    ) -> Msix:
        """Add MSI-X with its table in ``bar``, and there too, or in ``pba_bar``, its pending bits.

        Raises HostError where the host has no more vectors.
        """
        pba_bar = pba_bar or bar
        if vectors not in VECTORS or (table_offset | pba_offset) % 8:
            raise ValueError(f"{self.name}: no MSI-X with {vectors} vectors at {table_offset:#x} and {pba_offset:#x}")
        capability = self.config.add_capability(
            MsixCapability, control=vectors - 1, table=table_offset | bar.index, pba=pba_offset | pba_bar.index
        )
        self.msix = Msix(self.name, capability, take(sink, vectors))
        bar.trap(table_offset, table_size(vectors), self.msix.table)
        pba_bar.trap(pba_offset, pba_size(vectors), self.msix.pba)
        self._bind()
        return self.msix

    def add_msi(self, sink: MsiSink) -> Msi:
        """Add MSI with one vector. Raises HostError where the host has no more."""
        self.msi = Msi(self.name, self.config.add_capability(MsiCapability), sink.vector())
        return self.msi

    @property
    def busy(self) -> bool:
        """What it has begun may still reach the guest's memory, though it is reset, or out of its slot. Any thread."""
        return False

    def config_read(self, offset: int, size: int) -> int:
        """A guest's read of configuration space: any width and alignment; all ones outside."""
        with self.lock:
            return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """A guest's write to configuration space: any width and alignment; ignored outside."""
        with self.lock:
            self.config.write(offset, size, value)

    def on_bus_master(self, enabled: bool) -> None:
        """The guest has allowed, or no longer allows, the function to use memory. With the lock."""

    def bus_reset(self) -> None:
        """The link above went down: all is as at power-on, while the machine runs. With the lock."""
        self.reset()

    def release(self) -> None:
        """The function leaves its slot: from here on it begins nothing, and interrupts nobody. With the lock.

        By a vCPU's thread: what takes long, such as the reset of a real device, is for `close`.
        """
        self._follow_bus_master(False)
        self.bus_reset()

    def reset(self) -> None:
        self.state = type(self.state)()
        self.config.reset()
        if self.msix is not None:
            self.msix.reset()
        if self.msi is not None:
            self.msi.reset()
        self._bind()
        self.post_load()

    def post_load(self) -> None:
        """Raises StateError where the state is not one that this function could have had."""
        pci = self.state.pci
        self._follow_bus_master(False)  # no vector has a route until its table is there
        try:
            self.config.adopt(pci.config)
            if self.msix is not None:
                self.msix.adopt(pci.msix_table, pci.msix_pending)
            elif pci.msix_table or pci.msix_pending:
                raise StateError("an MSI-X table, and the function has none")
        except StateError as e:
            raise StateError(f"{self.name}: {e}") from e
        if self.msi is not None:
            self.msi.post_load()
        self._follow()

    def pause(self) -> None:
        with self.lock:
            if self.msix is not None:
                self.state.pci.msix_pending = self.msix.settle()
            if self.msi is not None:
                self.msi.settle()

    def info(self) -> dict[str, Any]:
        with self.lock:
            header = self.header
            return {
                "id": f"{header.vendor:04x}:{header.device:04x}",
                "bars": {str(i): bar.address for i, bar in self.bars.items()},
                "interrupts": self._interrupts(),
            }

    def close(self) -> None:
        self.intx.wire.set(level=False)
        for bar in self.bars.values():
            bar.unmap()
        if self.msix is not None:
            self.msix.close()
        if self.msi is not None:
            self.msi.close()

    def _interrupts(self) -> str:
        if self.msix is not None and self.msix.enabled:
            return "msix"
        return "msi" if self.msi is not None and self.msi.enabled else "intx"

    def _declare(self, bar: Bar, reset: int) -> None:
        width = 4 * bar.kind.registers
        self.config.define(
            bar.register,
            width,
            reset=reset,
            writable=(1 << 8 * width) - bar.size | bar.enable,
            changed=lambda old, new: self._decode(),
        )
        self.bars[bar.index] = bar

    def _bind(self) -> None:
        """The state is the bytes the guest sees, the same objects."""
        self.state.pci.config = self.config.content
        if self.msix is not None:
            self.state.pci.msix_table = self.msix.table.content
            self.state.pci.msix_pending = bytes(pba_size(self.msix.size))

    def _follow(self) -> None:
        """Let everything follow from the command register and the BARs."""
        self.intx.drive()
        self._follow_bus_master(bool(self.header.command & Command.BUS_MASTER))
        self._decode()

    def _follow_bus_master(self, enabled: bool) -> None:
        if enabled == self._bus_master:
            return
        self._bus_master = enabled
        for interrupts in (self.msix, self.msi):
            if interrupts is not None:
                interrupts.bus_master = enabled
                interrupts.update()
        self.on_bus_master(enabled)

    def _decode(self) -> None:
        """Tell the root where the BARs want to be now, if that has changed."""
        command, changed = self.header.command, False
        for bar in self.bars.values():
            enable = Command.IO if bar.kind is BarKind.IO else Command.MEMORY
            value = self.config.get(bar.register, 4 * bar.kind.registers)
            address = value & -bar.size if command & enable and value & bar.enable == bar.enable else None
            changed |= address != bar.programmed
            bar.programmed = address
        if changed:
            self.on_decode()
