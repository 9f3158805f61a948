"""How a device speaks of interrupts: a line it sets, and messages it sends.

Devices are given these; who implements them, KVM's irqchip or a test's list, is not their business.
"""

from __future__ import annotations

from typing import Protocol

import msgspec


class IrqLine(Protocol):
    """A wire to an interrupt controller. Setting it to the level it has is allowed and does nothing."""

    def set(self, *, level: bool) -> None:
        """Drive the line. Any thread; never blocks."""


class Event(Protocol):
    """An eventfd, by which the kernel is told, or tells."""

    @property
    def fd(self) -> int:
        """Its descriptor."""


class Attachment(Protocol):
    """What `Wire.attach` gave."""

    def close(self) -> None:
        """Let go of the wire, which is low then as far as this source goes."""


class Wire(IrqLine, Protocol):
    """A line that the kernel can drive too, for a source of interrupts that it has itself."""

    def attach(self, trigger: Event, resample: Event) -> Attachment:
        """Let a signal on ``trigger`` assert the line, until the guest's EOI: that lowers it and signals ``resample``,
        and whoever drives ``trigger`` signals again if it is still wanted. Raises HostError.
        """


class MsiMessage(msgspec.Struct, frozen=True):
    """What the guest programmed: a 64-bit address and 32 bits of data."""

    address: int
    data: int


class MsiVector(Protocol):
    """One message-signalled interrupt: an eventfd that anybody may signal, also the kernel (vhost, vfio).

    While it has a route, a signal is an interrupt with nobody of ours involved. While it has none (masked, or not
    programmed yet), signals wait in the eventfd: that is the pending bit, and the next route delivers them as one.
    """

    @property
    def fd(self) -> int:
        """The eventfd to signal; it stays ours."""

    @property
    def pending(self) -> bool:
        """Whether a signal waits; looking does not take it."""

    def signal(self) -> None:
        """Cause the interrupt. Any thread; never blocks."""

    def route(self, message: MsiMessage | None) -> None:
        """Deliver signals as ``message``, or keep them. Raises HostError with the earlier route kept."""

    def discard(self) -> None:
        """Forget a signal that waits."""

    def close(self) -> None:
        """Give the eventfd and the route back; closing twice is allowed."""


class MsiSink(Protocol):
    """Where a function's vectors come from."""

    def vector(self) -> MsiVector:
        """A new vector without a route. Raises HostError where the host has no more."""
