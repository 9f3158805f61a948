"""Loads and stores where there is no RAM, of every width the processor has."""

from __future__ import annotations

import pytest

from kvmpy.boot import cpu_tables
from kvmpy.boot.kernel import EntryMode
from kvmpy.boot.plan import Entry
from kvmpy.kvm.exits import Halted, MmioRead, MmioWrite
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.registers import enter
from tests.kvm.conftest import CODE, MakeGuest, run

GDT, PAGE_TABLES = 0x500, 0x9000
DEVICE = 0xD000_0000
SET_RBX = b"\x48\xbb\x00\x00\x00\xd0\x00\x00\x00\x00"  # mov rbx, 0xd0000000
SET_RAX = b"\x48\xb8\x88\x77\x66\x55\x44\x33\x22\x11"  # mov rax, 0x1122334455667788
HLT = b"\xf4"


def load_64(make_guest: MakeGuest, code: bytes) -> Vcpu:
    """``code`` in long mode, as a kernel is entered."""
    guest = make_guest()
    guest.memory.write(GDT, cpu_tables.gdt(EntryMode.LINUX64))
    guest.memory.write(PAGE_TABLES, cpu_tables.page_tables(PAGE_TABLES))
    guest.memory.write(CODE, code)
    enter(guest.vcpu, Entry(EntryMode.LINUX64, ip=CODE, info=0, gdt=GDT, page_tables=PAGE_TABLES))
    return guest.vcpu


@pytest.mark.parametrize(
    ("store", "size", "value"),
    [
        (b"\x88\x03", 1, 0x88),  # mov [rbx], al
        (b"\x66\x89\x03", 2, 0x7788),  # mov [rbx], ax
        (b"\x89\x03", 4, 0x55667788),  # mov [rbx], eax
        (b"\x48\x89\x03", 8, 0x1122334455667788),  # mov [rbx], rax
    ],
    ids=["1", "2", "4", "8"],
)
def test_a_store_beyond_ram_is_an_mmio_write(make_guest: MakeGuest, store: bytes, size: int, value: int) -> None:
    vcpu = load_64(make_guest, SET_RBX + SET_RAX + store + HLT)
    assert run(vcpu) == MmioWrite(DEVICE, size, value)
    assert run(vcpu) == Halted()


@pytest.mark.parametrize(
    ("fetch", "size", "rax"),
    [
        (b"\x8a\x03", 1, 0x1122334455667701),  # mov al, [rbx]
        (b"\x66\x8b\x03", 2, 0x1122334455660201),  # mov ax, [rbx]
        (b"\x8b\x03", 4, 0x04030201),  # mov eax, [rbx]
        (b"\x48\x8b\x03", 8, 0x0807060504030201),  # mov rax, [rbx]
    ],
    ids=["1", "2", "4", "8"],
)
def test_a_load_beyond_ram_gets_the_reply(make_guest: MakeGuest, fetch: bytes, size: int, rax: int) -> None:
    vcpu = load_64(make_guest, SET_RBX + SET_RAX + fetch + HLT)
    assert run(vcpu) == MmioRead(DEVICE, size)
    vcpu.reply(0x0807060504030201)
    assert run(vcpu) == Halted()
    assert vcpu.regs.rax == rax


def test_a_pending_load_is_finished_without_running_on(make_guest: MakeGuest) -> None:
    vcpu = load_64(make_guest, SET_RBX + SET_RAX + b"\x8b\x03" + b"\x31\xc0" + HLT)  # mov eax,[rbx]; xor eax,eax
    assert run(vcpu) == MmioRead(DEVICE, 4)
    vcpu.reply(0xCAFE)
    vcpu.complete()
    assert vcpu.regs.rax == 0xCAFE
    vcpu.accept()
    assert run(vcpu) == Halted()
    assert vcpu.regs.rax == 0


def test_an_access_across_a_page_comes_in_two_and_is_finished_as_one(make_guest: MakeGuest) -> None:
    across = b"\x48\xbb\xfd\x0f\x00\xd0\x00\x00\x00\x00"  # mov rbx, 0xd0000ffd
    vcpu = load_64(make_guest, across + b"\x48\x8b\x03" + b"\x31\xc0" + HLT)  # mov rax,[rbx]; xor eax,eax
    assert run(vcpu) == MmioRead(DEVICE + 0xFFD, 3)
    vcpu.reply(0x030201)
    vcpu.complete()
    assert vcpu.regs.rax == 0xFFFFFFFFFF_030201
    vcpu.accept()
    assert run(vcpu) == Halted()
