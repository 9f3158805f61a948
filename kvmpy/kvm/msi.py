"""Message-signalled interrupts by irqfd: a signal on a vector's eventfd is an interrupt, wherever it comes from.

A vector without a route has no irqfd, so signals wait in its eventfd. Assigning an irqfd to an eventfd that is already
signalled delivers at once (virt/kvm/eventfd.c, kvm_irqfd_assign polls it): that is how a masked vector's pending bit
becomes an interrupt when it is unmasked, also where the kernel's vhost was the one that signalled.
"""

from __future__ import annotations

import select

from kvmpy.host.eventfd import EventFd
from kvmpy.irq import MsiMessage
from kvmpy.kvm.irq import IrqFd, Routing


class Vector:
    """One vector (a `kvmpy.irq.MsiVector`). Its function's lock serializes `route` and `close`."""

    def __init__(self, vm_fd: int, routing: Routing) -> None:
        self._vm_fd, self._routing = vm_fd, routing
        self._event = EventFd()
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)
        self._gsi: int | None = None
        self._irqfd: IrqFd | None = None
        self._wanted = False

    @property
    def fd(self) -> int:
        """The eventfd to signal; it stays ours."""
        return self._event.fd

    @property
    def pending(self) -> bool:
        """Whether a signal waits; with a route the kernel takes it at once."""
        return self._irqfd is None and bool(self._poll.poll(0))

    def signal(self) -> None:
        """Cause the interrupt."""
        self._event.signal()

    def route(self, message: MsiMessage | None) -> None:
        """Deliver signals as ``message``, or keep them. Raises HostError with the earlier route kept."""
        if message is None:
            self._silence()
            return
        if self._gsi is None:
            self._gsi = self._routing.add(message)
        elif self._routing.messages[self._gsi] != message:
            self._routing.change(self._gsi, message)
        self._wanted = True
        if self._irqfd is None:
            self._routing.once_routed(self._assign)

    def discard(self) -> None:
        """Forget a signal that waits."""
        self._event.take()

    def close(self) -> None:
        """Give the eventfd and the route back; closing twice is allowed."""
        self._silence()
        if self._gsi is not None:
            self._routing.remove(self._gsi)
            self._gsi = None
        self._event.close()

    def _assign(self) -> None:
        """Have the kernel take the signals, unless they are not wanted any more."""
        if self._wanted and self._irqfd is None and self._gsi is not None:
            self._irqfd = IrqFd(self._vm_fd, self._gsi, self._event)

    def _silence(self) -> None:
        self._wanted = False
        if self._irqfd is not None:
            self._irqfd.close()
            self._irqfd = None
