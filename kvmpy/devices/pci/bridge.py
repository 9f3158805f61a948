"""The header of a bridge: bus numbers, windows, bridge control (PCI Express Base 5.0, section 7.5.1.3, type 1).

Left out: VGA and ISA modes, latency timers, error forwarding. Prefetchable windows are 64 bits wide, I/O windows 32,
but a bridge has one only while the function behind it has I/O BARs: all ports together have room for 15, and Linux
complains of each port that it cannot give one.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from kvmpy.devices.pci.config import Header, PciIds
from kvmpy.devices.registers import Field, RegisterSpace

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
        self.on_addressing: Callable[[], object] = lambda: None
        self.on_bridge_control: Callable[[], object] = lambda: None

    @secondary.changed
    @subordinate.changed
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
    def _addressing_changed(self, old: int, new: int) -> None:
        self.on_addressing()

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
