"""The registers of a root port: bus numbers and windows, its link, its slot's status, its interrupt.

PCI Express Base 5.0, sections 7.5.1.3 (header of type 1) and 7.5.3 (link, slot and root registers). What the guest
writes takes effect at once: bus numbers, windows, and whether what is behind can be reached. Where that ends (slot
power off, link disabled, secondary bus reset) the function is reset, and answers nothing.

The link is reported active from the moment a card comes, also while the guest has not given the slot power: Linux
takes no interrupt for presence where there is a button, but it does for the link.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from kvmpy.devices.pci.bridge import NOWHERE, BridgeControl, BridgeHeader
from kvmpy.devices.pci.config import Command, PciIds
from kvmpy.devices.pci.express import (
    PORT_NUMBER_SHIFT,
    SLOT_NUMBER_SHIFT,
    SLOT_NUMBERS,
    Link,
    RootPortCapability,
    SlotControl,
    SlotStatus,
)
from kvmpy.devices.pci.function import PciFunction, PciFunctionState
from kvmpy.devices.pci.msi import Msi
from kvmpy.irq import MsiSink

IDS: Final = PciIds(vendor=0x1B36, device=0x000C, class_code=0x06_0400)  # as QEMU's pcie-root-port: drivers know it


class Forwards(msgspec.Struct, frozen=True):
    """What a port passes on to the other side now."""

    io: range = NOWHERE
    memory: range = NOWHERE
    prefetchable: range = NOWHERE


class RootPortState(PciFunctionState):
    NAME = "pcie-root-port"
    VERSION = 1


class PortRegisters(PciFunction[RootPortState]):
    """A root port without a will of its own. It interrupts by MSI, else by INTx; `RootPort` is the whole of it.

    ``buses`` are the numbers of those behind it, for any thread to read.
    """

    header: BridgeHeader
    express: RootPortCapability
    msi: Msi

    def __init__(self, name: str, slot: int, sink: MsiSink, *, power_controller: bool) -> None:
        if slot not in SLOT_NUMBERS:
            raise ValueError(f"{name}: no slot can have the number {slot}")
        super().__init__(name, RootPortState(), IDS, header=BridgeHeader, express=RootPortCapability)
        self.express.preset(
            slot_capability=self.express.slot_capability | slot << SLOT_NUMBER_SHIFT,
            link_capability=self.express.link_capability | (slot & 0xFF) << PORT_NUMBER_SHIFT,
        )
        if not power_controller:
            self.express.leave_out_power_controller()
        self.add_msi(sink)
        self.slot = slot
        self.behind: PciFunction[Any] | None = None
        self.forwards = Forwards()
        self.buses = NOWHERE
        self._reachable = self._interrupting = False
        self.on_numbers: Callable[[], object] = lambda: None  # told when others may be found behind it, or elsewhere
        self.header.on_addressing = self._decode
        self.header.on_bridge_control = self._follow_link
        self.express.on_link = self._follow_link
        self.express.on_events = self._drive
        self.msi.on_change = self._drive

    @property
    def reachable(self) -> bool:
        """Whether the function behind answers."""
        return self._reachable

    def config_write(self, offset: int, size: int, value: int) -> None:
        with self.lock:
            super().config_write(offset, size, self.express.keep_unseen_events(offset, size, value))

    def _preset_only_for_reset(self, control: int, status: int) -> None:
        now = self.express.slot_control, self.express.slot_status
        self.express.preset(slot_control=self._possible(control), slot_status=status)
        self.express.slot_control, self.express.slot_status = now

    def _possible(self, control: int) -> int:
        return control if self.express.has_power_controller else control & ~SlotControl.POWER_OFF

    def _is_link_held(self) -> bool:
        """The guest keeps the link down."""
        return bool(
            self.express.link_control & Link.DISABLE or self.header.bridge_control & BridgeControl.SECONDARY_BUS_RESET
        )

    def _follow_link(self) -> None:
        """Whether the function answers may have changed. Where it does no longer, it is reset."""
        was = self._reachable
        self._reach()
        if was and not self._reachable and self.behind is not None:
            with self.behind.lock:
                self.behind.bus_reset()
        self._report_link(active=self._reachable)
        self._drive()

    def _reach(self) -> None:
        has_power = not self.express.slot_control & SlotControl.POWER_OFF
        self._reachable = self.behind is not None and has_power and not self._is_link_held()
        self._decode()

    def _report_link(self, *, active: bool) -> None:
        """Say that the link has changed, if it has."""
        if active != bool(self.express.link_status & Link.ACTIVE):
            self.express.slot_status |= SlotStatus.LINK_CHANGED
            self._set_link(active=active)

    def _set_link(self, *, active: bool) -> None:
        status = self.express.link_status
        self.express.link_status = status | Link.ACTIVE if active else status & ~Link.ACTIVE

    def _drive(self) -> None:
        """Interrupt as the events say: by one message each time they begin, or by a level while there are any."""
        wanted = self.express.interrupt_wanted
        interrupting = wanted and self.msi.enabled
        if interrupting and not self._interrupting:
            self.msi.signal()
        elif self._interrupting and not interrupting:
            self.msi.discard()  # one that is masked still: its reason is gone
        self._interrupting = interrupting
        self.intx.set(level=wanted and not self.msi.enabled)

    def _decode(self) -> None:
        super()._decode()
        header, command, up = self.header, self.header.command, self._reachable
        self.buses = range(header.secondary, header.subordinate + 1)
        self.on_numbers()
        forwards = Forwards(
            io=header.io if up and command & Command.IO else NOWHERE,
            memory=header.memory if up and command & Command.MEMORY else NOWHERE,
            prefetchable=header.prefetchable if up and command & Command.MEMORY else NOWHERE,
        )
        if forwards != self.forwards:
            self.forwards = forwards
            self.on_decode()
