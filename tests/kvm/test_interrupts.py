"""Interrupts and notifications that the kernel carries: irqfd, resample, ioeventfd, MSI routes."""

from __future__ import annotations

import select

from kvmpy.abi import kvm as abi
from kvmpy.host.eventfd import EventFd
from kvmpy.irq import MsiMessage, MsiVector
from kvmpy.kvm.exits import PioWrite
from kvmpy.kvm.irq import GSI_LIMIT, IOAPIC_PINS, IoEventFd, IrqFd
from tests.kvm.conftest import FlatGuest, MakeGuest, run

GSI = 4
REPORT = 0xE9
HANDLER = 0x2000
OUT_REPORT = b"\xba\xe9\x00\xee"  # mov dx, 0xe9; out dx, al
EOI = b"\xb0\x20\xe6\x20"  # mov al, 0x20; out 0x20, al

# The PIC as a PC's firmware sets it: vectors from 0x20 on, everything masked but IRQ 4; then report and wait.
START_PIC = (
    b"\xb0\x11\xe6\x20"  # mov al, 0x11; out 0x20, al      ICW1: edge, cascade, ICW4 follows
    b"\xb0\x20\xe6\x21"  # mov al, 0x20; out 0x21, al      ICW2: vectors from 0x20
    b"\xb0\x04\xe6\x21"  # mov al, 0x04; out 0x21, al      ICW3
    b"\xb0\x01\xe6\x21"  # mov al, 0x01; out 0x21, al      ICW4: 8086 mode
    b"\xb0\xef\xe6\x21"  # mov al, 0xef; out 0x21, al      mask all but IRQ 4
)
LEVEL_IRQ_4 = b"\xba\xd0\x04\xb0\x10\xee"  # mov dx, 0x4d0; mov al, 0x10; out dx, al
READY = b"\xb0\x52" + OUT_REPORT  # mov al, 'R'
WAIT = b"\xfb\xf4\xeb\xfd"  # sti; hlt; jmp to the hlt
HANDLE = EOI + b"\xb0\x49" + OUT_REPORT + b"\xcf"  # 'I'; iret


def waits(vector: MsiVector) -> bool:
    """Whether a signal waits, as a call: mypy believes that an attribute stays what an assert said."""
    return vector.pending


def waiting_guest(make_guest: MakeGuest, *, level: bool = False) -> FlatGuest:
    """A guest that reports 'R', waits, and reports 'I' from its handler of IRQ 4."""
    guest = make_guest(irqchip=True)
    guest.load(START_PIC + (LEVEL_IRQ_4 if level else b"") + READY + WAIT)
    guest.memory.write(4 * 0x24, HANDLER.to_bytes(2, "little") + b"\0\0")
    guest.memory.write(HANDLER, HANDLE)
    return guest


def test_a_signal_on_an_irqfd_reaches_the_guests_handler(make_guest: MakeGuest) -> None:
    guest = waiting_guest(make_guest)
    with EventFd() as trigger:
        irqfd = IrqFd(guest.vm.fd, GSI, trigger)
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("R"),))
        trigger.signal()
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))
        irqfd.close()


def test_the_end_of_a_level_interrupt_signals_resample(make_guest: MakeGuest) -> None:
    guest = waiting_guest(make_guest, level=True)
    with EventFd() as trigger, EventFd() as resample:
        irqfd = IrqFd(guest.vm.fd, GSI, trigger, resample)
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("R"),))
        assert resample.take() == 0
        trigger.signal()
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))
        assert select.select([resample], [], [], 30)[0]
        irqfd.close()


def test_a_line_raised_by_us_reaches_the_guests_handler(make_guest: MakeGuest) -> None:
    guest = waiting_guest(make_guest)
    line = guest.vm.line(GSI)
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("R"),))
    line.set(level=True)
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))


def test_an_ioeventfd_absorbs_the_write_it_matches_and_no_other(make_guest: MakeGuest) -> None:
    guest = make_guest()
    out_510 = b"\xba\x10\x05\xee"  # mov dx, 0x510; out dx, al
    guest.load(b"\xb0\x01" + out_510 + out_510 + b"\xb0\x02" + out_510)
    with EventFd() as event:
        ioeventfd = IoEventFd(guest.vm.fd, 0x510, 1, event, pio=True, match=1)
        assert run(guest.vcpu) == PioWrite(0x510, 1, (2,))
        assert event.take() == 2
        ioeventfd.close()


def test_a_closed_ioeventfd_lets_the_write_exit(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.load(b"\xba\x10\x05\xee")
    with EventFd() as event:
        IoEventFd(guest.vm.fd, 0x510, 1, event, pio=True).close()
        assert run(guest.vcpu) == PioWrite(0x510, 1, (0,))
        assert event.take() == 0


def guest_with_local_apic(make_guest: MakeGuest) -> FlatGuest:
    """A guest that reports 'R', waits, and reports 'I' from its handler of vector 0x24, its local APIC switched on."""
    guest = make_guest(irqchip=True)
    guest.load(READY + WAIT)
    guest.memory.write(4 * 0x24, HANDLER.to_bytes(2, "little") + b"\0\0")
    guest.memory.write(HANDLER, b"\xb0\x49" + OUT_REPORT + b"\xcf")
    lapic = abi.KVM_GET_LAPIC(guest.vcpu.fd)
    lapic.regs[0xF1] = b"\x01"  # spurious-interrupt vector register, bit 8: APIC software enable
    abi.KVM_SET_LAPIC(guest.vcpu.fd, lapic)
    return guest


def test_a_message_reaches_the_guests_handler(make_guest: MakeGuest) -> None:
    guest = guest_with_local_apic(make_guest)
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("R"),))
    guest.vm.signal_msi(MsiMessage(0xFEE0_0000, 0x24))
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))


def test_a_signal_on_an_irqfd_sends_the_message_its_gsi_is_routed_to(make_guest: MakeGuest) -> None:
    guest = guest_with_local_apic(make_guest)
    gsi = guest.vm.routing.add(MsiMessage(0xFEE0_0000, 0x99))
    guest.vm.routing.change(gsi, MsiMessage(0xFEE0_0000, 0x24))
    with EventFd() as trigger:
        irqfd = IrqFd(guest.vm.fd, gsi, trigger)
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("R"),))
        trigger.signal()
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))
        irqfd.close()


def test_message_routes_get_free_gsis_and_give_them_back(make_guest: MakeGuest) -> None:
    routing = make_guest(irqchip=True).vm.routing
    first = routing.add(MsiMessage(0xFEE0_0000, 0x41))
    second = routing.add(MsiMessage(0xFEE0_0000, 0x42))
    routing.remove(first)
    assert (first, second) == (IOAPIC_PINS, IOAPIC_PINS + 1)
    assert routing.add(MsiMessage(0xFEE0_0000, 0x43)) == first
    assert dict(routing.messages) == {first: MsiMessage(0xFEE0_0000, 0x43), second: MsiMessage(0xFEE0_0000, 0x42)}
    assert max(routing.messages) < GSI_LIMIT


def test_a_vector_that_was_signalled_while_masked_interrupts_once_when_it_gets_its_route(make_guest: MakeGuest) -> None:
    guest = guest_with_local_apic(make_guest)
    vector = guest.vm.vector()
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("R"),))
    vector.signal()
    vector.signal()
    assert waits(vector)
    vector.route(MsiMessage(0xFEE0_0000, 0x24))
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))
    assert not waits(vector)
    vector.route(None)
    assert not waits(vector)
    vector.signal()
    assert waits(vector)
    vector.route(MsiMessage(0xFEE0_0000, 0x24))
    assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("I"),))
    vector.close()
    assert not guest.vm.routing.messages


def test_a_doorbell_takes_writes_of_every_width_without_an_exit(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.load(
        b"\xc6\x07\x01"  # mov byte [bx], 1
        b"\xc7\x07\x01\x00"  # mov word [bx], 1
        b"\x66\xc7\x07\x01\x00\x00\x00"  # mov dword [bx], 1
        b"\xb0\x44" + OUT_REPORT
    )
    sregs = guest.vcpu.sregs
    sregs.ds.base = 0xD000_0000
    guest.vcpu.sregs = sregs
    with EventFd() as event:
        closing = guest.vm.doorbell(0xD000_0000, event)
        assert run(guest.vcpu) == PioWrite(REPORT, 1, (ord("D"),))
        assert event.take() == 3
        closing.close()
