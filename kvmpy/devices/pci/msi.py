"""MSI: one vector with a mask and a pending bit (PCI Express Base 5.0, section 7.7.1).

A message is a write to memory, so a function that is no bus master sends none: its vector has no route then either.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from kvmpy.devices.pci.config import Capability
from kvmpy.devices.registers import Field, RegisterSpace
from kvmpy.errors import HostError
from kvmpy.irq import MsiMessage, MsiVector
from kvmpy.trace import Tracepoint

trace_refused = Tracepoint("pci.route", "function vector problem")


class MsiControl(IntEnum):
    ENABLE = 0x0001
    ADDRESS_64 = 0x0080
    MASKING = 0x0100


ADDRESS_BITS: Final = 0xFFFF_FFFC


class MsiCapability(Capability, size=0x18):
    """The layout with 64 address bits and per-vector masking."""

    control = Field(0x02, 2, reset=MsiControl.ADDRESS_64 | MsiControl.MASKING, writable=MsiControl.ENABLE)
    address = Field(0x04, 4, writable=ADDRESS_BITS)
    address_high = Field(0x08, 4, writable=0xFFFF_FFFF)
    data = Field(0x0C, 2, writable=0xFFFF)
    mask = Field(0x10, 4, writable=0x1)
    pending = Field(0x14, 4, hardware=0x1)

    ID = 0x05

    def __init__(self, space: RegisterSpace, offset: int) -> None:
        super().__init__(space, offset)
        self.on_change: Callable[[], object] = lambda: None
        self.is_pending: Callable[[], bool] = lambda: False

    @control.changed
    @address.changed
    @address_high.changed
    @data.changed
    @mask.changed
    def _changed(self, old: int, new: int) -> None:
        self.on_change()

    @pending.reading
    def _reading_pending(self) -> None:
        self.pending = int(self.is_pending())


class Msi:
    """A function's MSI. Its function's lock is held, but for `signal`, which any thread may call."""

    def __init__(self, name: str, capability: MsiCapability, vector: MsiVector) -> None:
        self._name, self._capability, self._vector = name, capability, vector
        self.bus_master = False
        capability.on_change = self.update
        capability.is_pending = lambda: vector.pending

    @property
    def enabled(self) -> bool:
        """Whether the guest has chosen MSI rather than INTx."""
        return bool(self._capability.control & MsiControl.ENABLE)

    def signal(self) -> None:
        """Send the message, or keep it while that is masked."""
        self._vector.signal()

    def update(self) -> None:
        """Route the vector as the registers now say."""
        c = self._capability
        message = None
        if self.enabled and self.bus_master and not c.mask:
            message = MsiMessage(c.address_high << 32 | c.address, c.data)
        route(self._name, 0, self._vector, message)

    def reset(self) -> None:
        """Forget what waits; the registers are reset already."""
        self.update()
        self._vector.discard()

    def settle(self) -> None:
        """Bring the pending bit up to date, before a save."""
        self._capability.pending = int(self._vector.pending)

    def post_load(self) -> None:
        """The registers come from another machine."""
        if self._capability.pending:
            self._vector.signal()
        self.update()

    def close(self) -> None:
        """Give the vector back."""
        self._vector.close()


def route(name: str, index: int, vector: MsiVector, message: MsiMessage | None) -> bool:
    """Route ``vector``; False where the host refused, which leaves it as it was."""
    try:
        vector.route(message)
    except HostError as e:
        if trace_refused:
            trace_refused(name, index, e)
        return False
    return True
