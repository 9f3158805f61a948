"""The PCI Express capability, version 2 (PCI Express Base 5.0, section 7.5.3): an endpoint's and a root port's.

The links are emulated, so they are always trained at one speed and width, which both ends report alike.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from kvmpy.devices.pci.config import Capability
from kvmpy.devices.registers import Field, RegisterSpace


class PortType(IntEnum):
    ENDPOINT = 0
    ROOT_PORT = 4
    INTEGRATED_ENDPOINT = 9


class Link(IntEnum):
    """Bits of link control and status that mean something here."""

    DISABLE = 0x0010  # control
    ACTIVE = 0x2000  # status: data link layer link active


VERSION: Final = 2
TYPE_SHIFT: Final = 4
SLOT_IMPLEMENTED: Final = 0x0100  # in flags
ACTIVE_REPORTING: Final = 1 << 20  # in link capability
PORT_NUMBER_SHIFT: Final = 24

GT_16: Final = 4  # 16 GT/s
LANES: Final = 16
LINK: Final = LANES << 4 | GT_16  # as in link capability and link status alike
SPEEDS_UP_TO_GT_16: Final = 0x1E
SLOT_CLOCK: Final = 0x1000  # link status: both ends run from one clock


class ExpressCapability(Capability, size=0x3C):
    """What every type has, and the link registers of those with a link. The other registers read as 0."""

    flags = Field(0x02, 2, reset=PortType.ENDPOINT << TYPE_SHIFT | VERSION)
    device_capability = Field(0x04, 4, reset=0x0000_8021)  # role-based errors, extended tags, payload up to 256 bytes
    device_control = Field(0x08, 2, reset=0x2910, writable=0x79FF)  # reads of 512 bytes, payload of 128
    device_status = Field(0x0A, 2, clear=0x000F)
    link_capability = Field(0x0C, 4, reset=LINK)
    link_control = Field(0x10, 2, writable=0x00CB)
    link_status = Field(0x12, 2, reset=SLOT_CLOCK | LINK)
    device_capability2 = Field(0x24, 4, reset=0x0000_0010)  # completion timeouts can be disabled: there are none
    device_control2 = Field(0x28, 2, writable=0x0010)
    link_capability2 = Field(0x2C, 4, reset=SPEEDS_UP_TO_GT_16)
    link_control2 = Field(0x30, 2, reset=GT_16, writable=0x000F)

    ID = 0x10

    def integrate(self) -> None:
        """Sits on the root complex itself: another type, and no link."""
        self.preset(flags=PortType.INTEGRATED_ENDPOINT << TYPE_SHIFT | VERSION)
        self.leave_out(*(name for name in self.FIELDS if name.startswith("link_")))


class Slot(IntEnum):
    """Slot capability."""

    ATTENTION_BUTTON = 0x01
    POWER_CONTROLLER = 0x02
    ATTENTION_INDICATOR = 0x08
    POWER_INDICATOR = 0x10
    SURPRISE = 0x20
    HOT_PLUG = 0x40
    NO_COMMAND_COMPLETED = 1 << 18


class SlotControl(IntEnum):
    BUTTON_ENABLE = 0x0001
    FAULT_ENABLE = 0x0002
    PRESENCE_ENABLE = 0x0008
    INTERRUPT_ENABLE = 0x0020
    ATTENTION_ON = 0x0040
    ATTENTION_OFF = 0x00C0
    ATTENTION = 0x00C0  # the whole field
    POWER_INDICATOR_ON = 0x0100
    POWER_INDICATOR_OFF = 0x0300
    POWER_INDICATOR = 0x0300  # the whole field
    POWER_OFF = 0x0400
    LINK_ENABLE = 0x1000


class SlotStatus(IntEnum):
    BUTTON = 0x0001
    FAULT = 0x0002
    LATCH_CHANGED = 0x0004
    PRESENCE_CHANGED = 0x0008
    COMMAND_COMPLETED = 0x0010
    PRESENT = 0x0040
    LINK_CHANGED = 0x0100


SLOT: Final = (
    Slot.ATTENTION_BUTTON
    | Slot.POWER_CONTROLLER
    | Slot.ATTENTION_INDICATOR
    | Slot.POWER_INDICATOR
    | Slot.SURPRISE
    | Slot.HOT_PLUG
    | Slot.NO_COMMAND_COMPLETED
)
"""Commands take effect at once, so nothing waits for their completion: half the interrupts of a plug, and no timeout.

The button is how a guest is asked; that a card may also leave unasked is declared, so that no driver is caught out.
"""
SLOT_NUMBER_SHIFT: Final = 19
SLOT_NUMBERS: Final = range(1, 1 << 13)
SLOT_CONTROL_BITS: Final = (
    SlotControl.BUTTON_ENABLE
    | SlotControl.FAULT_ENABLE
    | SlotControl.PRESENCE_ENABLE
    | SlotControl.INTERRUPT_ENABLE
    | SlotControl.ATTENTION
    | SlotControl.POWER_INDICATOR
    | SlotControl.POWER_OFF
    | SlotControl.LINK_ENABLE
)
SLOT_EMPTY: Final = SlotControl.ATTENTION_OFF | SlotControl.POWER_INDICATOR_OFF | SlotControl.POWER_OFF
SLOT_OCCUPIED: Final = SlotControl.ATTENTION_OFF | SlotControl.POWER_INDICATOR_ON
SLOT_EVENTS: Final = SlotStatus.BUTTON | SlotStatus.FAULT | SlotStatus.PRESENCE_CHANGED | SlotStatus.LINK_CHANGED
CLEARABLE: Final = SLOT_EVENTS | SlotStatus.LATCH_CHANGED | SlotStatus.COMMAND_COMPLETED
"""What a guest may write ones to; the last two are never set."""


class RootPortCapability(ExpressCapability):
    """A root port with a hot-plug slot. The hooks are told of what the guest has written."""

    flags = Field(0x02, 2, reset=SLOT_IMPLEMENTED | PortType.ROOT_PORT << TYPE_SHIFT | VERSION)
    link_capability = Field(0x0C, 4, reset=ACTIVE_REPORTING | LINK)
    link_control = Field(0x10, 2, writable=0x00D3)  # retrain (0x20) reads as 0: it is done at once
    link_status = Field(0x12, 2, reset=SLOT_CLOCK | LINK, hardware=Link.ACTIVE)
    slot_capability = Field(0x14, 4, reset=SLOT)
    slot_control = Field(0x18, 2, reset=SLOT_EMPTY, writable=SLOT_CONTROL_BITS)
    slot_status = Field(0x1A, 2, clear=SLOT_EVENTS, hardware=SlotStatus.PRESENT)
    root_control = Field(0x1C, 2, writable=0x000F)
    root_status = Field(0x20, 4, clear=0x0001_0000)

    def __init__(self, space: RegisterSpace, offset: int, **resets: int) -> None:
        super().__init__(space, offset, **resets)
        self.on_link: Callable[[], object] = lambda: None
        self.on_slot: Callable[[int, int], object] = lambda old, new: None
        self.on_events: Callable[[], object] = lambda: None

    @link_control.changed
    def _link_changed(self, old: int, new: int) -> None:
        self.on_link()

    @slot_control.changed
    def _slot_changed(self, old: int, new: int) -> None:
        self.on_slot(old, new)

    @slot_status.changed
    def _events_changed(self, old: int, new: int) -> None:
        self.on_events()

    def leave_out_power_controller(self) -> None:
        """A card has power while it is in the slot."""
        self.preset(slot_capability=self.slot_capability & ~Slot.POWER_CONTROLLER)
        writable = SLOT_CONTROL_BITS & ~SlotControl.POWER_OFF
        self._define("slot_control", reset=SLOT_EMPTY & ~SlotControl.POWER_OFF, writable=writable)

    @property
    def has_power_controller(self) -> bool:
        """Whether the guest decides when the slot has power."""
        return bool(self.slot_capability & Slot.POWER_CONTROLLER)

    @property
    def interrupt_wanted(self) -> bool:
        """Whether there is an event of those that the guest wants to be interrupted for."""
        control = self.slot_control
        enabled = control & (SlotStatus.BUTTON | SlotStatus.FAULT | SlotStatus.PRESENCE_CHANGED)  # the same bits
        if control & SlotControl.LINK_ENABLE:
            enabled |= SlotStatus.LINK_CHANGED
        return bool(control & SlotControl.INTERRUPT_ENABLE and self.slot_status & enabled)

    def keep_unseen_events(self, offset: int, size: int, value: int) -> int:
        """``value``, to be written to the space, without ones for slot status if some are for events that are not set.

        A guest that has read the register writes what it has seen. One that wipes it unread, as drivers do at first,
        would lose what has just happened, and a card with it.
        """
        at = self.offset + RootPortCapability.slot_status.offset - offset
        ones = value & (1 << 8 * size) - 1
        ones = ones >> 8 * at if at >= 0 else ones << -8 * at
        if not ones & CLEARABLE & ~self.slot_status:
            return value
        kept = 0xFFFF << 8 * at if at >= 0 else 0xFFFF >> -8 * at
        return value & ~kept
