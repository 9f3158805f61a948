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
from kvmpy.log import Log

log = Log(__name__)


class RoutedVector:
    """A vector of ``name`` and where its messages go now: the host is asked only for changes. With the function's lock.

    A host that refuses a route costs the guest that interrupt. That is logged once for each vector, since the guest can
    ask again and again.
    """

    def __init__(self, name: str, index: int, vector: MsiVector) -> None:
        self.vector = vector
        self._name, self._index = name, index
        self._message: MsiMessage | None = None
        self._refused = False

    def route(self, message: MsiMessage | None) -> None:
        """Deliver as ``message``, or keep what is signalled."""
        if message == self._message:
            return
        try:
            self.vector.route(message)
        except HostError as e:
            if not self._refused:
                self._refused = True
                log.error("%s: interrupt %d does not reach the guest: %s", self._name, self._index, e)
            return
        self._message = message


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
    """A function's MSI. Its function's lock is held, but for `signal`, which any thread may call.

    ``on_change`` is told after the guest has changed a register of it, ``on_routed`` that it wants messages.
    """

    def __init__(self, name: str, capability: MsiCapability, vector: MsiVector) -> None:
        self._capability, self._vector, self._routed = capability, vector, RoutedVector(name, 0, vector)
        self.bus_master = False
        self.on_change: Callable[[], object] = lambda: None
        self.on_routed: Callable[[], object] = lambda: None
        capability.on_change = self._changed
        capability.is_pending = lambda: vector.pending

    @property
    def enabled(self) -> bool:
        """Whether the guest has chosen MSI rather than INTx."""
        return bool(self._capability.control & MsiControl.ENABLE)

    @property
    def fd(self) -> int:
        """The eventfd that anybody may signal as `signal` does."""
        return self._vector.fd

    def signal(self) -> None:
        """Send the message, or keep it while that is masked."""
        self._vector.signal()

    def discard(self) -> None:
        """Forget a message that is still kept."""
        self._vector.discard()

    def update(self) -> None:
        """Route the vector as the registers now say."""
        c = self._capability
        message = None
        if self.enabled and self.bus_master and not c.mask:
            message = MsiMessage(c.address_high << 32 | c.address, c.data)
        self._routed.route(message)
        if message is not None:
            self.on_routed()

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

    def _changed(self) -> None:
        self.update()
        self.on_change()
