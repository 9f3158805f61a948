"""Flat guests: a few instructions in 32-bit mode that either VMM boots as a kernel.

Assembled by hand, so that neither an assembler nor a kernel's version is between two measurements. All have what QEMU's
q35 and kvmpy have in common: the first serial port, port 0x604 for power-off, a LAPIC, and the ECAM at 3 GiB - 256 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tests.fakes.pvh_kernel import LOAD_AT

ACCESSES: Final[Mapping[str, bytes]] = {
    "PIO write": b"\x66\xba\x80\x00\xee",  # mov dx, 0x80; out dx, al
    "PIO read": b"\x66\xba\x80\x00\xec",  # mov dx, 0x80; in al, dx
    "MMIO write": b"\xa3\x00\x00\x00\xd0",  # mov [0xd0000000], eax: nobody answers
    "MMIO read": b"\xa1\x00\x00\x00\xd0",  # mov eax, [0xd0000000]
    "ECAM read": b"\xa1\x00\x00\x00\xb0",  # mov eax, [0xb0000000]: the host bridge
    "PIO write, a device": b"\x66\xba\xff\x03\xee",  # mov dx, 0x3ff; out dx, al: the UART's scratch register
    "PIO read, a device": b"\x66\xba\xff\x03\xec",
    "in the kernel": b"\xe4\x21",  # in al, 0x21: the PIC, of which no VMM hears
}
"""What a guest does again and again; EAX and EDX are free."""
POWER_OFF: Final = (
    b"\x66\xba\x04\x06"  # mov dx, 0x604
    b"\x66\xb8\x00\x34\x66\xef"  # mov ax, 0x3400; out dx, ax: kvmpy's S5
    b"\x66\xb8\x00\x20\x66\xef"  # mov ax, 0x2000; out dx, ax: q35's S5
    b"\xfa\xf4\xeb\xfc"  # cli; hlt; jmp to cli
)
TELL: Final = b"\x66\xba\xf8\x03\xb0\x4b\xee"  # mov dx, 0x3f8; mov al, 'K'; out dx, al
HALT: Final = b"\xfa\xf4\xeb\xfc"  # cli; hlt; jmp to cli

FIRST: Final = 16
"""MiB, where a guest's writing begins."""
LOW, HOLE, HIGH = 2048, 3072, 4096
"""MiB: where RAM below 4 GiB ends at least, how much of it is not above 4 GiB at most, and where the rest begins."""
TRIPS: Final = (0x20_0000, 0x40_0000)
"""Where each vCPU keeps its round trips."""
FLAGS: Final = 0x1F_F000  # how many vCPUs are ready; 4 on: how often one has come to a meeting
TRAMPOLINE: Final = 0x8000
CHUNK: Final = 16  # bytes, the UART's FIFO


def stopwatch(count: int, cpus: int) -> bytes:
    """Each vCPU makes ``count`` of every access, timing each by TSC; the first says all of it on the serial line.

    After each kind of access they wait for each other: else the one that is ahead would have the next to itself.
    A round trip is a little-endian dword, of the first vCPU's accesses in their order, then of the second's.
    """
    wake = _wake_other() if cpus == 2 else b""
    own = b"\xbe" + _dword(TRIPS[0])  # mov esi, TRIPS[0]
    away = LOAD_AT + len(wake) + len(own)
    code = (wake.replace(_dword(0x1234_5678), _dword(away)) if wake else b"") + own
    for number, access in enumerate(ACCESSES.values(), 1):
        code += b"\xb9" + _dword(count) + _timed(access)  # mov ecx, count
        code += _meet(number * cpus)
    # The other has nothing to say: cmp esi, TRIPS[1]; jb on; hlt
    code += b"\x81\xfe" + _dword(TRIPS[1]) + b"\x72\x04" + HALT
    for buffer in TRIPS[:cpus]:
        code += _say(buffer, 4 * count * len(ACCESSES))
    return code + POWER_OFF


def loop_of(access: bytes, count: int | None = None) -> bytes:
    """``access`` for ever, or ``count`` times and then power-off. ECX is the counter."""
    if count is None:
        return access + bytes((0xEB, -(len(access) + 2) & 0xFF))  # jmp to the access
    again = bytes((0xE2, -(len(access) + 2) & 0xFF))  # loop to the access
    return b"\xb9" + _dword(count) + access + again + POWER_OFF


def toucher(memory: int, pages: int, ticks: int, low: int = LOW) -> bytes:
    """Writes a word into each page of `extents`, says "K", and goes on with ``pages`` a second of those below ``low``
    MiB, one after the other, by a TSC of ``ticks`` a second; with no pages it halts.

    What comes after the filling is in long mode where that has reached above 4 GiB: its bytes mean the same there.
    """
    (_, least), *above = extents(memory, low)
    begin = b"\xbf" + _dword(FIRST << 20) + b"\xb9" + _dword(least * 256)  # mov edi, FIRST MiB; mov ecx, pages
    write = b"\xff\x07\x81\xc7\x00\x10\x00\x00"  # inc dword [edi]; add edi, 4096
    fill = begin + write + b"\xe2\xf6"  # loop to the write
    if above:
        fill += _fill_above(LOAD_AT + len(fill), above[0][1])
    if not pages:
        return fill + TELL + HALT
    paced = (
        b"\x0f\x31\x29\xe8\x78\xfa"  # next: rdtsc; sub eax, ebp; js next
        + b"\x81\xc5"
        + _dword(ticks // pages)  # add ebp, ticks of a page
        + write
        + b"\xe2\xea"  # loop next
    )
    again = begin + paced
    clock = b"\x0f\x31\x89\xc5"  # rdtsc; mov ebp, eax
    return fill + TELL + clock + again + bytes((0xEB, -(len(again) + 2) & 0xFF))  # jmp again


def extents(memory: int, low: int = LOW) -> Sequence[tuple[int, int]]:
    """Where a `toucher` of so many MiB writes, and how many MiB there: what is RAM with either VMM."""
    if memory <= low:
        return [(FIRST, memory - FIRST)]
    return [(FIRST, low - FIRST), (HIGH, memory - HOLE)]


def _fill_above(here: int, mib: int) -> bytes:
    """At ``here``, go on in long mode, by pages of 2 MiB, and write into ``mib`` from 4 GiB on."""
    gibs = HIGH // 1024 + (mib + 1023) // 1024
    tables = (
        b"\xbf\x00\x00\x01\x00\x31\xc0\xb9\x00\x08\x00\x00\xf3\xab"  # two empty tables at 0x10000
        + b"\xb8\x83\x00\x00\x00\x31\xd2\xb9"
        + _dword(512 * gibs)  # mov eax, 0x83; xor edx, edx; mov ecx, pages of 2 MiB
        + b"\x89\x07\x89\x57\x04\x05\x00\x00\x20\x00\x83\xd2\x00\x83\xc7\x08\xe2\xee"  # each into the directories
        + b"\xc7\x05\x00\x00\x01\x00\x03\x10\x01\x00"  # mov dword [0x10000], 0x11003
        + b"\xbf\x00\x10\x01\x00\xb8\x03\x20\x01\x00\xb9"
        + _dword(gibs)  # mov edi, 0x11000; mov eax, 0x12003; mov ecx, directories
        + b"\x89\x07\x05\x00\x10\x00\x00\x83\xc7\x08\xe2\xf4"  # each into the table of them
    )
    enter = (
        b"\x0f\x20\xe0\x0c\x20\x0f\x22\xe0"  # mov eax, cr4; or al, 0x20 (PAE); mov cr4, eax
        b"\xb8\x00\x00\x01\x00\x0f\x22\xd8"  # mov eax, 0x10000; mov cr3, eax
        b"\xb9\x80\x00\x00\xc0\x0f\x32\x80\xcc\x01\x0f\x30"  # mov ecx, EFER; rdmsr; or ah, 1 (LME); wrmsr
        b"\x0f\x20\xc0\x0d\x00\x00\x00\x80\x0f\x22\xc0"  # mov eax, cr0; or eax, 1 << 31 (PG); mov cr0, eax
    )
    gdt = bytes(8) + b"\xff\xff\x00\x00\x00\x9b\xaf\x00"  # 8: code, 64 bits
    at_gdt = here + len(tables) + len(enter) + 7 + 7
    jump = b"\x0f\x01\x15" + _dword(at_gdt + len(gdt))  # lgdt [pointer]
    jump += b"\xea" + _dword(at_gdt + len(gdt) + 6) + b"\x08\x00"  # jmp 8:fill
    pointer = (len(gdt) - 1).to_bytes(2, "little") + _dword(at_gdt)
    fill = (
        b"\x48\xbf\x00\x00\x00\x00\x01\x00\x00\x00\xb9"
        + _dword(mib * 256)  # mov rdi, 4 GiB; mov ecx, pages
        + b"\xff\x07\x48\x81\xc7\x00\x10\x00\x00\xe2\xf5"  # inc dword [rdi]; add rdi, 4096; loop to the inc
    )
    return tables + enter + jump + gdt + pointer + fill


def _timed(access: bytes) -> bytes:
    loop = (
        b"\x0f\x31\x89\xc5"  # again: rdtsc; mov ebp, eax
        + access
        + b"\x0f\x31\x29\xe8"  # rdtsc; sub eax, ebp
        + b"\x89\x06\x83\xc6\x04"  # mov [esi], eax; add esi, 4
    )
    return loop + bytes((0xE2, -(len(loop) + 2) & 0xFF))  # loop again


def _meet(arrivals: int) -> bytes:
    """Go on when there have been so many, of all vCPUs at all meetings."""
    arrive = b"\xf0\xff\x05" + _dword(FLAGS + 4)  # lock inc dword [arrivals]
    return arrive + b"\x83\x3d" + _dword(FLAGS + 4) + bytes((arrivals,)) + b"\x72\xf7"  # wait: cmp; jb wait


def _say(buffer: int, size: int) -> bytes:
    """``size`` bytes from ``buffer`` on to the serial line, a FIFO full at a time."""
    return (
        b"\x66\xba\xfa\x03\xb0\x01\xee"  # mov dx, 0x3fa; mov al, 1; out dx, al: FIFO on
        + b"\xbe"
        + _dword(buffer)  # mov esi, buffer
        + b"\xbb"
        + _dword(size // CHUNK)  # mov ebx, chunks
        + b"\x66\xba\xfd\x03"  # next: mov dx, 0x3fd
        + b"\xec\xa8\x20\x74\xfb"  # wait: in al, dx; test al, 0x20 (THR empty); jz wait
        + b"\x66\xba\xf8\x03"  # mov dx, 0x3f8
        + b"\xb9"
        + _dword(CHUNK)  # mov ecx, CHUNK
        + b"\xf3\x6e"  # rep outsb
        + b"\x4b\x75\xe7"  # dec ebx; jnz next
    )


def _wake_other() -> bytes:
    """Start the other vCPU at 0x12345678, where the first one goes on, too, once it is there."""
    gdt = (
        bytes(8)
        + b"\xff\xff\x00\x00\x00\x9b\xcf\x00"  # 8: code, 4 GiB
        + b"\xff\xff\x00\x00\x00\x93\xcf\x00"  # 16: data, 4 GiB
    )
    at_gdt, flat = 0x36, 0x18
    code = (
        b"\xfa"  # cli
        + b"\x2e\x66\x0f\x01\x16"
        + (at_gdt + len(gdt)).to_bytes(2, "little")  # lgdt cs:[pointer]
        + b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # mov eax, cr0; or al, 1; mov cr0, eax
        + b"\x66\xea"
        + _dword(TRAMPOLINE + flat)
        + b"\x08\x00"  # jmp 8:flat
        + b"\x66\xb8\x10\x00\x8e\xd8"  # flat: mov ax, 16; mov ds, ax
        + b"\xbe"
        + _dword(TRIPS[1])  # mov esi, TRIPS[1]
        + b"\xff\x05"
        + _dword(FLAGS)  # inc dword [ready]
        + b"\xb8\x78\x56\x34\x12\xff\xe0"  # mov eax, 0x12345678; jmp eax
    ).ljust(at_gdt, b"\x90")
    there = code + gdt + (len(gdt) - 1).to_bytes(2, "little") + _dword(TRAMPOLINE + at_gdt)
    copy = b"\xbe%s\xbf%s\xb9%s\xf3\xa4"  # mov esi, there; mov edi, TRAMPOLINE; mov ecx, its length; rep movsb
    start = (
        b"\xc7\x05\xf0\x00\xe0\xfe\xff\x01\x00\x00"  # mov dword [SVR], 0x1ff: LAPIC on
        b"\xc7\x05\x00\x03\xe0\xfe\x00\x45\x0c\x00"  # mov dword [ICR], 0xc4500: INIT to all others
        b"\xb9\x00\x00\x01\x00\xe2\xfe"  # mov ecx, 0x10000; loop $
        + b"\xc7\x05\x00\x03\xe0\xfe"
        + _dword(0xC4600 | TRAMPOLINE >> 12)  # mov dword [ICR], 0xc4608: start-up
        + b"\x83\x3d"
        + _dword(FLAGS)
        + b"\x00\x74\xf7"  # wait: cmp dword [ready], 0; je wait
    )
    skip = bytes((0xEB, len(there)))  # jmp over what follows
    moved = copy % (_dword(LOAD_AT + len(skip)), _dword(TRAMPOLINE), _dword(len(there)))
    return skip + there + moved + start


def _dword(value: int) -> bytes:
    return value.to_bytes(4, "little")
