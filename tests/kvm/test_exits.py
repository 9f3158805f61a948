"""Each instruction that leaves the guest arrives as the exit it should be, with the right operands."""

from __future__ import annotations

import pytest

from kvmpy.kvm.exits import Halted, MmioWrite, PioRead, PioWrite
from tests.kvm.conftest import MakeGuest, run

HLT = b"\xf4"
SET_DX = b"\xba\xf8\x03"  # mov dx, 0x3f8
SET_EAX = b"\x66\xb8\x44\x33\x22\x11"  # mov eax, 0x11223344
SET_DS = b"\xb8\x00\xf0\x8e\xd8"  # mov ax, 0xf000; mov ds, ax: [0] is 0xf0000, where there is no RAM here


@pytest.mark.parametrize(
    ("out", "size", "value"),
    [(b"\xee", 1, 0x44), (b"\xef", 2, 0x3344), (b"\x66\xef", 4, 0x11223344)],
    ids=["byte", "word", "dword"],
)
def test_out_arrives_with_port_size_and_value(make_guest: MakeGuest, out: bytes, size: int, value: int) -> None:
    vcpu = make_guest().load(SET_DX + SET_EAX + out + HLT)
    assert run(vcpu) == PioWrite(0x3F8, size, (value,))
    assert run(vcpu) == Halted()


@pytest.mark.parametrize(
    ("code", "size", "rax"),
    [(b"\xec", 1, 0x112233DD), (b"\xed", 2, 0x1122CCDD), (b"\x66\xed", 4, 0xAABBCCDD)],
    ids=["byte", "word", "dword"],
)
def test_in_gets_the_reply_and_nothing_wider(make_guest: MakeGuest, code: bytes, size: int, rax: int) -> None:
    vcpu = make_guest().load(SET_DX + SET_EAX + code + HLT)
    assert run(vcpu) == PioRead(0x3F8, size, 1)
    vcpu.reply(0xAABBCCDD)
    assert run(vcpu) == Halted()
    assert vcpu.regs.rax == rax


def test_string_output_carries_every_item(make_guest: MakeGuest) -> None:
    guest = make_guest()
    vcpu = guest.load(SET_DX + b"\xbe\x00\x20\xb9\x03\x00\xf3\x6f" + HLT)  # mov si,0x2000; mov cx,3; rep outsw
    guest.memory.write(0x2000, b"\x11\x22\x33\x44\x55\x66")
    items: list[int] = []
    while isinstance(seen := run(vcpu), PioWrite):
        assert (seen.port, seen.size) == (0x3F8, 2)
        items += seen.values
    assert seen == Halted()
    assert items == [0x2211, 0x4433, 0x6655]


def test_string_input_fills_memory_in_order(make_guest: MakeGuest) -> None:
    guest = make_guest()
    vcpu = guest.load(SET_DX + b"\xbf\x00\x20\xb9\x04\x00\xf3\x6c" + HLT)  # mov di,0x2000; mov cx,4; rep insb
    next_byte = iter(range(1, 5))
    while isinstance(seen := run(vcpu), PioRead):
        vcpu.reply_all([next(next_byte) for _ in range(seen.repeat)])
    assert seen == Halted()
    assert guest.memory.read(0x2000, 4) == b"\x01\x02\x03\x04"


@pytest.mark.parametrize(
    ("store", "size", "value"),
    [
        (b"\x67\x88\x03", 1, 0x44),  # mov [ebx], al
        (b"\x67\x89\x03", 2, 0x3344),  # mov [ebx], ax
        (b"\x66\x67\x89\x03", 4, 0x11223344),  # mov [ebx], eax
    ],
    ids=["byte", "word", "dword"],
)
def test_a_store_beyond_ram_arrives_as_mmio(make_guest: MakeGuest, store: bytes, size: int, value: int) -> None:
    guest = make_guest()
    set_ebx = b"\x66\xbb\x00\x00\x00\xd0"  # mov ebx, 0xd0000000
    vcpu = guest.load(set_ebx + SET_EAX + store + HLT)
    sregs = vcpu.sregs
    sregs.ds.limit, sregs.ds.g = 0xFFFF_FFFF, 1
    vcpu.sregs = sregs
    assert run(vcpu) == MmioWrite(0xD000_0000, size, value)
    assert run(vcpu) == Halted()
