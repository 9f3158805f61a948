"""Host memory that the guest reaches as if it were RAM, and that is none: how a passed-through BAR is mapped."""

from __future__ import annotations

import mmap

import pytest

from kvmpy._native import ffi
from kvmpy.boot import cpu_tables
from kvmpy.boot.kernel import EntryMode
from kvmpy.boot.plan import Entry
from kvmpy.errors import GuestError, IoctlError
from kvmpy.kvm.exits import Halted, MmioRead
from kvmpy.machine.registers import enter
from tests.kvm.conftest import CODE, FlatGuest, MakeGuest, run

GDT, PAGE_TABLES = 0x500, 0x9000
DEVICE = 0xD000_0000
COPY = b"\x48\xbb\x00\x00\x00\xd0\x00\x00\x00\x00" + b"\x48\x8b\x03" + b"\x48\x89\x43\x08" + b"\xf4"
"""mov rbx, 0xd0000000; mov rax, [rbx]; mov [rbx + 8], rax; hlt"""


def begin(guest: FlatGuest) -> None:
    guest.memory.write(GDT, cpu_tables.gdt(EntryMode.LINUX64))
    guest.memory.write(PAGE_TABLES, cpu_tables.page_tables(PAGE_TABLES))
    guest.memory.write(CODE, COPY)
    enter(guest.vcpu, Entry(EntryMode.LINUX64, ip=CODE, info=0, gdt=GDT, page_tables=PAGE_TABLES))


def test_a_guest_reaches_a_direct_slot_with_no_exit_until_it_is_closed(make_guest: MakeGuest) -> None:
    guest = make_guest()
    registers = mmap.mmap(-1, mmap.PAGESIZE)
    registers[:8] = b"register"
    slot = guest.vm.direct(DEVICE, mmap.PAGESIZE, int(ffi.cast("uintptr_t", ffi.from_buffer(registers))))
    begin(guest)
    assert run(guest.vcpu) == Halted()
    assert registers[8:16] == b"register"
    with pytest.raises(GuestError):
        guest.memory.read(DEVICE, 8)
    slot.close()
    begin(guest)
    assert run(guest.vcpu) == MmioRead(DEVICE, 8)
    slot.close()


def test_a_slot_over_another_is_refused_and_numbers_are_used_again(make_guest: MakeGuest) -> None:
    vm = make_guest().vm
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    hva = int(ffi.cast("uintptr_t", ffi.from_buffer(pages)))
    with pytest.raises(IoctlError, match="KVM_SET_USER_MEMORY_REGION: EEXIST"):
        vm.direct(0x1000, mmap.PAGESIZE, hva)
    slots = [vm.direct(DEVICE + n * mmap.PAGESIZE, mmap.PAGESIZE, hva) for n in range(3)]
    assert [slot.number for slot in slots] == [1, 2, 3], "0 is RAM's"
    slots[1].close()
    again = vm.direct(DEVICE + mmap.PAGESIZE, mmap.PAGESIZE, hva)
    assert again.number == 2
    for slot in (slots[0], again, slots[2]):
        slot.close()
