"""A root port: the bridge to one hot-pluggable slot.

PCI Express Base 5.0, sections 7.5.1.3 (header of type 1) and 7.5.3 (link, slot and root registers). What the guest
writes takes effect at once: bus numbers, windows, and whether the link is up. A link that goes down (slot power off,
link disabled, secondary bus reset) resets the function behind it, which then answers nothing.

Left out: VGA and ISA modes of the bridge, latency timers, error forwarding. Prefetchable windows are 64 bits wide, I/O
windows 32, but a port has one only while the function behind it has I/O BARs: all ports together have room for 15, and
Linux complains of each port that it cannot give one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import Command, Header, PciIds
from kvmpy.devices.pci.express import (
    PORT_NUMBER_SHIFT,
    SLOT_EMPTY,
    SLOT_NUMBER_SHIFT,
    SLOT_NUMBERS,
    SLOT_OCCUPIED,
    Link,
    RootPortCapability,
    SlotControl,
    SlotStatus,
)
from kvmpy.devices.pci.function import PciFunction, PciFunctionState
from kvmpy.devices.pci.msi import Msi
from kvmpy.devices.registers import Field, RegisterSpace
from kvmpy.irq import MsiSink

IDS: Final = PciIds(vendor=0x1B36, device=0x000C, class_code=0x06_0400)  # as QEMU's pcie-root-port: drivers know it
NOWHERE: Final = range(0)


class BridgeControl(IntEnum):
    PARITY = 0x0001
    SERR = 0x0002
    SECONDARY_BUS_RESET = 0x0040


IO_WINDOW: Final = ("io_base", "io_limit", "io_base_high", "io_limit_high")
BRIDGE_CONTROL_BITS: Final = BridgeControl.PARITY | BridgeControl.SERR | BridgeControl.SECONDARY_BUS_RESET


class BridgeHeader(Header):
    """Type 1."""

    primary = Field(0x18, 1, writable=0xFF)
    secondary = Field(0x19, 1, writable=0xFF)
    subordinate = Field(0x1A, 1, writable=0xFF)
    io_base = Field(0x1C, 1, reset=0x01, writable=0xF0)
    io_limit = Field(0x1D, 1, reset=0x01, writable=0xF0)
    secondary_status = Field(0x1E, 2, clear=0xF900)
    memory_base = Field(0x20, 2, writable=0xFFF0)
    memory_limit = Field(0x22, 2, writable=0xFFF0)
    prefetchable_base = Field(0x24, 2, reset=0x0001, writable=0xFFF0)
    prefetchable_limit = Field(0x26, 2, reset=0x0001, writable=0xFFF0)
    prefetchable_base_high = Field(0x28, 4, writable=0xFFFF_FFFF)
    prefetchable_limit_high = Field(0x2C, 4, writable=0xFFFF_FFFF)
    io_base_high = Field(0x30, 2, writable=0xFFFF)
    io_limit_high = Field(0x32, 2, writable=0xFFFF)
    bridge_control = Field(0x3E, 2, writable=BRIDGE_CONTROL_BITS)

    TYPE = 1
    BARS = 2

    def __init__(self, space: RegisterSpace, ids: PciIds, pin: int) -> None:
        super().__init__(space, ids, pin)
        self._has_io_window = True
        self.set_io_window(there=False)
        self.on_window: Callable[[], object] = lambda: None
        self.on_bridge_control: Callable[[], object] = lambda: None

    @io_base.changed
    @io_limit.changed
    @memory_base.changed
    @memory_limit.changed
    @prefetchable_base.changed
    @prefetchable_limit.changed
    @prefetchable_base_high.changed
    @prefetchable_limit_high.changed
    @io_base_high.changed
    @io_limit_high.changed
    def _window_changed(self, old: int, new: int) -> None:
        self.on_window()

    @bridge_control.changed
    def _bridge_control_changed(self, old: int, new: int) -> None:
        self.on_bridge_control()

    def set_io_window(self, *, there: bool) -> None:
        """Have an I/O window, or none: its registers are constant 0 then."""
        if there != self._has_io_window:
            self._has_io_window = there
            (self.implement if there else self.leave_out)(*IO_WINDOW)

    @property
    def io(self) -> range:
        """The ports the window names; empty where the limit is below the base."""
        if not self._has_io_window:
            return NOWHERE
        base = self.io_base_high << 16 | (self.io_base & 0xF0) << 8
        return range(base, (self.io_limit_high << 16 | (self.io_limit & 0xF0) << 8 | 0xFFF) + 1)

    @property
    def memory(self) -> range:
        """The addresses of the 32-bit window."""
        return range((self.memory_base & 0xFFF0) << 16, ((self.memory_limit & 0xFFF0) << 16 | 0xF_FFFF) + 1)

    @property
    def prefetchable(self) -> range:
        """The addresses of the prefetchable window."""
        base = self.prefetchable_base_high << 32 | (self.prefetchable_base & 0xFFF0) << 16
        limit = self.prefetchable_limit_high << 32 | (self.prefetchable_limit & 0xFFF0) << 16 | 0xF_FFFF
        return range(base, limit + 1)


class Forwards(NamedTuple):
    """What a port passes on to the other side now."""

    io: range = NOWHERE
    memory: range = NOWHERE
    prefetchable: range = NOWHERE


class Seats(Protocol):
    """Where a port's function is put in the machine: `PciRoot` as the port sees it."""

    lock: threading.RLock

    def seat(self, function: PciFunction[Any]) -> None:
        """``function`` is behind the port from now on."""

    def unseat(self, function: PciFunction[Any]) -> None:
        """It is not any more; none of its BARs is mapped and its interrupt is low."""


class RootPortState(PciFunctionState):
    NAME = "pcie-root-port"
    VERSION = 1


class RootPort(PciFunction[RootPortState]):
    """The port of physical slot ``slot``, which must be the only one with that number. It interrupts by MSI.

    ``behind`` is the function in the slot; ``forwards`` what reaches it, for any thread to read.
    """

    header: BridgeHeader
    express: RootPortCapability
    msi: Msi

    def __init__(self, name: str, slot: int, sink: MsiSink) -> None:
        if slot not in SLOT_NUMBERS:
            raise ValueError(f"{name}: no slot can have the number {slot}")
        super().__init__(name, RootPortState(), IDS, header=BridgeHeader, express=RootPortCapability)
        self.express.preset(
            slot_capability=self.express.slot_capability | slot << SLOT_NUMBER_SHIFT,
            link_capability=self.express.link_capability | (slot & 0xFF) << PORT_NUMBER_SHIFT,
        )
        self.add_msi(sink)
        self.slot = slot
        self.behind: PciFunction[Any] | None = None
        self.forwards = Forwards()
        self.seats: Seats | None = None  # set by PciRoot
        self.header.on_window = self._decode
        self.header.on_bridge_control = self._follow_link
        self.express.on_link = self._follow_link

    @property
    def link_active(self) -> bool:
        """Whether the function behind can be reached."""
        return bool(self.express.link_status & Link.ACTIVE)

    def plug(self, function: PciFunction[Any]) -> None:
        """Put ``function`` in the slot, before the machine runs: present and powered from power-on on."""
        seats = self._seats()
        with seats.lock, self.lock:
            if self.behind is not None:
                raise ValueError(f"{self.name}: {self.behind.name} is in the slot")
            self.behind = function
            self.header.set_io_window(there=any(bar.kind is BarKind.IO for bar in function.bars.values()))
            seats.seat(function)
            self._preset(SLOT_OCCUPIED, SlotStatus.PRESENT)

    def unplug(self) -> None:
        """Take the function out of the slot, while the machine stands still; it is reset. Nothing happens if empty."""
        seats = self._seats()
        with seats.lock, self.lock:
            if self.behind is not None:
                self._preset(SLOT_EMPTY, 0)
                seats.unseat(self.behind)
                self.header.set_io_window(there=False)
                self.behind = None

    def post_load(self) -> None:
        # Whether a card is there is a fact of this machine; the function behind has a state of its own.
        present = SlotStatus.PRESENT if self.behind is not None else 0
        super().post_load()
        self.express.slot_status = self.express.slot_status & ~SlotStatus.PRESENT | present
        self._set_link(active=self._link_wanted())

    def info(self) -> dict[str, Any]:
        with self.lock:
            behind = None if self.behind is None else self.behind.name
            return super().info() | {"slot": self.slot, "bus": self.header.secondary, "behind": behind}

    def _seats(self) -> Seats:
        if self.seats is None:
            raise ValueError(f"{self.name} is in no machine yet")
        return self.seats

    def _preset(self, control: int, status: int) -> None:
        self.express.preset(slot_control=control, slot_status=status)
        self._follow_link()

    def _link_wanted(self) -> bool:
        off = (
            self.express.slot_control & SlotControl.POWER_OFF
            or self.express.link_control & Link.DISABLE
            or self.header.bridge_control & BridgeControl.SECONDARY_BUS_RESET
        )
        return self.behind is not None and not off

    def _follow_link(self) -> None:
        """Bring the link up or down; down, it resets what is behind."""
        was, active = self.link_active, self._link_wanted()
        self._set_link(active=active)
        if was and not active and self.behind is not None:
            with self.behind.lock:
                self.behind.bus_reset()

    def _set_link(self, *, active: bool) -> None:
        status = self.express.link_status
        self.express.link_status = status | Link.ACTIVE if active else status & ~Link.ACTIVE
        self._decode()

    def _decode(self) -> None:
        super()._decode()
        header, command, up = self.header, self.header.command, self.link_active
        forwards = Forwards(
            io=header.io if up and command & Command.IO else NOWHERE,
            memory=header.memory if up and command & Command.MEMORY else NOWHERE,
            prefetchable=header.prefetchable if up and command & Command.MEMORY else NOWHERE,
        )
        if forwards != self.forwards:
            self.forwards = forwards
            self.on_decode()
