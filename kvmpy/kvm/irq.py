"""Interrupts in the kernel: lines and GSI routes, irqfds, ioeventfds.

Each GSI has routes: to a pin of the PIC and of the IOAPIC, or to an MSI message. KVM_SET_GSI_ROUTING replaces the whole
table at once, so one object holds it. An irqfd turns a signal on an eventfd into an interrupt with nobody of ours
involved; with a resample eventfd it is a level interrupt, which the kernel lowers at the guest's EOI and then tells us.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from kvmpy.abi import kvm as abi
from kvmpy.errors import HostError
from kvmpy.host.eventfd import EventFd
from kvmpy.irq import Event, MsiMessage

PIC_PINS: Final = 8
IOAPIC_PINS: Final = 24
# KVM_MAX_IRQ_ROUTES is 4096 on x86; the pins take the first 24.
GSI_LIMIT: Final = 4096


class Line:
    """One pin of the interrupt controllers, driven by one device (a `Wire`).

    KVM keeps what `set` and what each attachment say apart: the pin is high while any of them is.
    """

    def __init__(self, vm_fd: int, gsi: int) -> None:
        self._vm_fd = vm_fd
        self.gsi = gsi
        self._level = False

    def set(self, *, level: bool) -> None:
        """Drive the line; KVM hears of changes only."""
        if level != self._level:
            abi.KVM_IRQ_LINE(self._vm_fd, abi.IrqLevel.new(irq=self.gsi, level=level))
            self._level = level

    def attach(self, trigger: Event, resample: Event) -> IrqFd:
        """Let ``trigger`` assert the line, until the guest's EOI. Raises IoctlError."""
        return IrqFd(self._vm_fd, self.gsi, trigger, resample)


class Routing:
    """The VM's GSI routing table: the default pins, and the messages added to them.

    The table is kept as KVM takes it and changed in place: with hundreds of vectors, building it anew for each change
    would take longer than the change.
    """

    def __init__(self, vm_fd: int) -> None:
        self._vm_fd = vm_fd
        self._lock = threading.Lock()
        self._messages: dict[int, MsiMessage] = {}
        self._places: dict[int, int] = {}  # of each GSI with a message, its entry
        self._free: list[int] = []  # GSIs that were given back
        self._then: list[Callable[[], object]] | None = None  # in a batch: what waits for its end
        self._is_behind = False  # in a batch: KVM has to be told something
        pins = _default_pins()
        self._table = abi.IrqRouting.new(nr=len(pins), entries=len(pins) + GSI_LIMIT - IOAPIC_PINS)
        for index, pin in enumerate(pins):
            self._table.entries[index] = pin

    @property
    def messages(self) -> Mapping[int, MsiMessage]:
        """GSI to message, of those that have one."""
        return self._messages

    def add(self, message: MsiMessage) -> int:
        """Route a free GSI to ``message``; returns the GSI. Raises HostError, the table unchanged."""
        with self._lock:
            gsi = self._free[-1] if self._free else IOAPIC_PINS + len(self._messages)
            if gsi >= GSI_LIMIT:
                raise HostError(f"KVM_SET_GSI_ROUTING: all {GSI_LIMIT} interrupt routes of the machine are in use")
            place = self._table.nr
            self._put(place, gsi, message)
            self._table.nr = place + 1
            try:
                self._commit()
            except BaseException:
                self._table.nr = place
                raise
            if self._free:
                self._free.pop()
            self._messages[gsi], self._places[gsi] = message, place
            return gsi

    def change(self, gsi: int, message: MsiMessage) -> None:
        """Send ``gsi`` elsewhere. Raises IoctlError, the table unchanged."""
        with self._lock:
            place, earlier = self._places[gsi], self._messages[gsi]
            self._put(place, gsi, message)
            try:
                self._commit()
            except BaseException:
                self._put(place, gsi, earlier)
                raise
            self._messages[gsi] = message

    def remove(self, gsi: int) -> None:
        """Free a GSI that `add` gave: the last entry takes its place. Raises IoctlError, the table unchanged."""
        with self._lock:
            place, last = self._places[gsi], self._table.nr - 1
            moved = self._table.entries[last].gsi
            self._put(place, moved, self._messages[moved])
            self._table.nr = last
            try:
                self._commit()
            except BaseException:
                self._put(place, gsi, self._messages[gsi])
                self._table.nr = last + 1
                raise
            self._places[moved] = place
            del self._places[gsi], self._messages[gsi]
            self._free.append(gsi)

    def commit(self) -> None:
        """Hand the whole table to KVM, the default pins included."""
        with self._lock:
            self._commit()

    def _put(self, place: int, gsi: int, message: MsiMessage) -> None:
        address = {"address_lo": message.address & 0xFFFF_FFFF, "address_hi": message.address >> 32}
        self._table.entries[place] = {
            "gsi": gsi,
            "type": abi.ROUTING_MSI,
            "u": {"msi": {**address, "data": message.data}},
        }

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Within, nothing is told to KVM; at the end everything at once. Raises HostError there, as each would have.

        For a machine that stands still: what is signalled meanwhile waits.
        """
        with self._lock:
            self._then = []
        try:
            yield
        finally:
            with self._lock:
                then, self._then = self._then, None
                if self._is_behind:  # KVM waits for a grace period each time
                    self._commit()
            for call in then:
                call()

    def once_routed(self, call: Callable[[], object]) -> None:
        """Call when KVM knows of what was added up to here: now, unless in a batch."""
        with self._lock:
            if self._then is not None:
                self._then.append(call)
                return
        call()

    def _commit(self) -> None:
        self._is_behind = self._then is not None
        if not self._is_behind:
            abi.KVM_SET_GSI_ROUTING(self._vm_fd, self._table)


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

    def __init__(self, vm_fd: int, gsi: int, trigger: Event, resample: Event | None = None) -> None:
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
