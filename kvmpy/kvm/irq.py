"""Interrupts in the kernel: lines and GSI routes, irqfds, ioeventfds.

Each GSI has routes: to a pin of the PIC and of the IOAPIC, or to an MSI message. KVM_SET_GSI_ROUTING replaces the whole
table at once, so one object holds it. An irqfd turns a signal on an eventfd into an interrupt with nobody of ours
involved; with a resample eventfd it is a level interrupt, which the kernel lowers at the guest's EOI and then tells us.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final, NamedTuple

from kvmpy.abi import kvm as abi
from kvmpy.host.eventfd import EventFd

PIC_PINS: Final = 8
IOAPIC_PINS: Final = 24
# KVM_MAX_IRQ_ROUTES is 4096 on x86; the pins take the first 24.
GSI_LIMIT: Final = 4096


class MsiMessage(NamedTuple):
    """What the guest programmed: a 64-bit address and 32 bits of data."""

    address: int
    data: int


class Line:
    """One pin of the interrupt controllers, driven by one device (an `IrqLine`)."""

    def __init__(self, vm_fd: int, gsi: int) -> None:
        self._vm_fd = vm_fd
        self.gsi = gsi
        self._level = False

    def set(self, *, level: bool) -> None:
        """Drive the line; KVM hears of changes only."""
        if level != self._level:
            abi.KVM_IRQ_LINE(self._vm_fd, abi.IrqLevel.new(irq=self.gsi, level=level))
            self._level = level


class Routing:
    """The VM's GSI routing table: the default pins, and the messages added to them."""

    def __init__(self, vm_fd: int) -> None:
        self._vm_fd = vm_fd
        self._lock = threading.Lock()
        self._messages: dict[int, MsiMessage] = {}

    @property
    def messages(self) -> Mapping[int, MsiMessage]:
        """GSI to message, of those that have one."""
        return self._messages

    def add(self, message: MsiMessage) -> int:
        """Route a free GSI to ``message``; returns the GSI. Raises IoctlError, the table unchanged."""
        with self._lock:
            gsi = next(n for n in range(IOAPIC_PINS, GSI_LIMIT) if n not in self._messages)
            self._set({**self._messages, gsi: message})
            return gsi

    def change(self, gsi: int, message: MsiMessage) -> None:
        """Send ``gsi`` elsewhere."""
        with self._lock:
            self._set({**self._messages, gsi: message})

    def remove(self, gsi: int) -> None:
        """Free a GSI that `add` gave."""
        with self._lock:
            self._set({n: message for n, message in self._messages.items() if n != gsi})

    def commit(self) -> None:
        """Hand the whole table to KVM, the default pins included."""
        with self._lock:
            self._set(self._messages)

    def _set(self, messages: dict[int, MsiMessage]) -> None:
        entries = _default_pins()
        for gsi, message in messages.items():
            msi = {
                "address_lo": message.address & 0xFFFF_FFFF,
                "address_hi": message.address >> 32,
                "data": message.data,
            }
            entries.append({"gsi": gsi, "type": abi.ROUTING_MSI, "u": {"msi": msi}})
        abi.KVM_SET_GSI_ROUTING(self._vm_fd, abi.IrqRouting.new(nr=len(entries), entries=entries))
        self._messages = dict(messages)


def _default_pins() -> list[dict[str, object]]:
    """Every ISA pin on the PICs and the IOAPIC, the rest on the IOAPIC alone. GSI n is IOAPIC pin n, but 0 is pin 2."""

    def pin(gsi: int, chip: int, number: int) -> dict[str, object]:
        return {"gsi": gsi, "type": abi.ROUTING_IRQCHIP, "u": {"irqchip": {"irqchip": chip, "pin": number}}}

    entries = [pin(n, abi.IRQCHIP_PIC_MASTER, n) for n in range(PIC_PINS)]
    entries += [pin(PIC_PINS + n, abi.IRQCHIP_PIC_SLAVE, n) for n in range(PIC_PINS)]
    entries += [pin(n, abi.IRQCHIP_IOAPIC, 2 if n == 0 else n) for n in range(IOAPIC_PINS) if n != 2]
    return entries


class IrqFd:
    """An eventfd whose signal is an interrupt on ``gsi``; with ``resample`` a level interrupt.

    After the guest's EOI of a level interrupt the kernel lowers the line and signals ``resample``: whoever drives the
    line signals again if it is still high.
    """

    def __init__(self, vm_fd: int, gsi: int, trigger: EventFd, resample: EventFd | None = None) -> None:
        self._vm_fd, self._gsi, self._trigger = vm_fd, gsi, trigger
        flags = 0 if resample is None else abi.IRQFD_RESAMPLE
        resample_fd = 0 if resample is None else resample.fd
        abi.KVM_IRQFD(vm_fd, abi.Irqfd.new(fd=trigger.fd, gsi=gsi, flags=flags, resamplefd=resample_fd))

    def close(self) -> None:
        """Take the eventfd off the GSI; the eventfd stays open."""
        abi.KVM_IRQFD(self._vm_fd, abi.Irqfd.new(fd=self._trigger.fd, gsi=self._gsi, flags=abi.IRQFD_DEASSIGN))


class IoEventFd:
    """A guest's write to an address that only signals an eventfd: absorbed in the kernel, no exit.

    ``size`` is 1, 2, 4 or 8 bytes, or 0 for any (KVM_CAP_IOEVENTFD_ANY_LENGTH); ``match`` limits it to one value.
    """

    def __init__(
        self, vm_fd: int, addr: int, size: int, event: EventFd, *, pio: bool = False, match: int | None = None
    ) -> None:
        self._vm_fd = vm_fd
        flags = (abi.IOEVENTFD_PIO if pio else 0) | (0 if match is None else abi.IOEVENTFD_DATAMATCH)
        self._fields = {"addr": addr, "len": size, "fd": event.fd, "flags": flags, "datamatch": match or 0}
        abi.KVM_IOEVENTFD(vm_fd, abi.Ioeventfd.new(**self._fields))

    def close(self) -> None:
        """Let the address exit again; the eventfd stays open."""
        fields = {**self._fields, "flags": self._fields["flags"] | abi.IOEVENTFD_DEASSIGN}
        abi.KVM_IOEVENTFD(self._vm_fd, abi.Ioeventfd.new(**fields))
