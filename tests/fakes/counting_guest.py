"""A guest whose every step is seen from outside, and that dirties memory as it goes."""

from __future__ import annotations

import struct
from typing import Final

from tests.fakes.pvh_kernel import LOAD_AT

NEEDS: Final = "16MiB"
STEPS: Final = 16
"""How often it counts before it rests."""
RATE: Final = 250
"""How often it does so in a second."""

# Waits until the serial line takes a byte, sends the low byte of a counter, counts, and writes the counter into one of
# 2048 pages from 4 MiB on, the next one each time. So one that stops and goes on elsewhere must send the next byte
# there, and each byte sent is a page dirtied.
STEP: Final = (
    b"\x66\xba\xfd\x03"  # mov dx, 0x3fd
    b"\xec"  # wait: in al, dx
    b"\xa8\x20"  # test al, 0x20 (THR empty)
    b"\x74\xfb"  # jz wait
    b"\x66\xba\xf8\x03"  # mov dx, 0x3f8
    b"\x88\xd8"  # mov al, bl
    b"\xee"  # out dx, al
    b"\x43"  # inc ebx
    b"\x89\xd8"  # mov eax, ebx
    b"\x25\xff\x07\x00\x00"  # and eax, 0x7ff
    b"\xc1\xe0\x0c"  # shl eax, 12
    b"\x89\x98\x00\x00\x40\x00"  # mov [eax + 0x400000], ebx
)
BEGIN: Final = b"\x31\xdb"  # xor ebx, ebx
# For ever, and with all that there is of a processor.
COUNTS_BUSILY: Final = BEGIN + STEP + b"\xeb" + struct.pack("b", -len(STEP) - 2)  # again: ...; jmp again

DIVISOR: Final = 1_193_182 // RATE
START_TIMER: Final = (
    b"\xb0\x11\xe6\x20"  # mov al, 0x11; out 0x20, al    PIC, ICW1: edge, cascade, ICW4 follows
    b"\xb0\x20\xe6\x21"  # mov al, 0x20; out 0x21, al    ICW2: vectors from 0x20
    b"\xb0\x04\xe6\x21"  # mov al, 0x04; out 0x21, al    ICW3
    b"\xb0\x01\xe6\x21"  # mov al, 0x01; out 0x21, al    ICW4: 8086 mode
    b"\xb0\xfe\xe6\x21"  # mov al, 0xfe; out 0x21, al    mask all but IRQ 0
    b"\xb0\x34\xe6\x43"  # mov al, 0x34; out 0x43, al    PIT, counter 0: a pulse, again and again
    + bytes([0xB0, DIVISOR & 0xFF, 0xE6, 0x40])  # mov al, low; out 0x40, al
    + bytes([0xB0, DIVISOR >> 8, 0xE6, 0x40])  # mov al, high; out 0x40, al
)
# What the timer does: it begins with an empty stack and ends by waiting, and never returns, for KVM's emulator knows no
# IRET in protected mode.
TICK: Final = (
    b"\xbc\x00\x00\x08\x00"  # mov esp, 0x80000
    b"\xb0\x20\xe6\x20"  # mov al, 0x20; out 0x20, al    end of interrupt
    + b"\xb9" + struct.pack("<I", STEPS)  # mov ecx, STEPS
    + STEP + b"\xe2" + struct.pack("b", -len(STEP) - 2)  # next: ...; loop next
    + b"\xfb\xf4\xeb\xfc"  # rest: sti; hlt; jmp rest
)  # fmt: skip


def _counts() -> bytes:
    """The program, and behind it what its LIDT is given: limit and base, and 0x28 gates, those from 0x20 on to TICK."""
    load = b"\x0f\x01\x1d"  # lidt [...]
    tick = LOAD_AT + len(BEGIN + load) + 4 + len(START_TIMER)
    tables = tick + len(TICK)
    gate = struct.pack("<HHBBH", tick & 0xFFFF, 0x10, 0, 0x8E, tick >> 16)  # an interrupt gate, present
    code = BEGIN + load + struct.pack("<I", tables) + START_TIMER + TICK
    return code + struct.pack("<HI", 0x28 * 8 - 1, tables + 6) + bytes(0x20 * 8) + gate * 8


# For ever, and mostly at rest: several of these leave each other, and their VMMs, the processors. That it counts at all
# is due to interrupt controllers, timer and a vCPU that waits, and all of these must arrive where it goes.
COUNTS: Final = _counts()

# The same without a word: writes to 3 MiB from 4 MiB on as fast as it can.
WRITES: Final = (
    b"\xbf\x00\x00\x40\x00"  # again: mov edi, 0x400000
    b"\xb9\x00\x03\x00\x00"  # mov ecx, 768
    b"\xff\x07"  # next: inc dword [edi]
    b"\x81\xc7\x00\x10\x00\x00"  # add edi, 4096
    b"\xe2\xf6"  # loop next
    b"\xeb\xea"  # jmp again
)


def gap(said: bytes) -> int | None:
    """Where what the guest has said, in all places one after the other, is not one count; None where it is."""
    counts = bytes(range(256)) * (len(said) // 256 + 2)
    if not said or counts[said[0] :].startswith(said):  # by far faster than to look at each
        return None
    return next(at for at in range(1, len(said)) if said[at] != (said[at - 1] + 1) % 256)
