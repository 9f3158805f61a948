"""A guest that a timer wakes, again and again, and that rests in between: many leave each other a processor.

Timer and interrupt controllers are the PC's old ones, and everything is done by the interrupt itself. It begins with an
empty stack and never returns, for KVM's emulator, which some hosts run such guests with, knows no IRET in protected
mode.
"""

from __future__ import annotations

import struct
from typing import Final

from tests.fakes.pvh_kernel import LOAD_AT

HZ: Final = 1_193_182  # what the PIT counts in a second
FIRST: Final = 0x20  # the vector of IRQ 0, and there are eight
GATE: Final = struct.Struct("<HHBBH")  # offset, selector, 0, kind, offset: Intel SDM volume 3, section 6.11
INTERRUPT_GATE: Final = 0x8E  # present, of 32 bits
CODE_SELECTOR: Final = 0x10

LIDT: Final = b"\x0f\x01\x1d"  # lidt [...]
START_PIC: Final = (
    b"\xb0\x11\xe6\x20"  # mov al, 0x11; out 0x20, al    ICW1: edge, cascade, ICW4 follows
    b"\xb0\x20\xe6\x21"  # mov al, 0x20; out 0x21, al    ICW2: vectors from 0x20
    b"\xb0\x04\xe6\x21"  # mov al, 0x04; out 0x21, al    ICW3
    b"\xb0\x01\xe6\x21"  # mov al, 0x01; out 0x21, al    ICW4: 8086 mode
    b"\xb0\xfe\xe6\x21"  # mov al, 0xfe; out 0x21, al    mask all but IRQ 0
)
WOKEN: Final = (
    b"\xbc\x00\x00\x08\x00"  # mov esp, 0x80000
    b"\xb0\x20\xe6\x20"  # mov al, 0x20; out 0x20, al    end of interrupt
)
REST: Final = b"\xfb\xf4\xeb\xfc"  # rest: sti; hlt; jmp rest


def paced(begin: bytes, tick: bytes, rate: int) -> bytes:
    """Does ``begin`` once, then ``tick`` at once and ``rate`` times a second; what they do is the same wherever it is.

    A tick may change any register. One that takes longer than to the next is not disturbed.
    """
    at = LOAD_AT + len(begin) + len(LIDT) + 4 + len(START_PIC) + len(_start_timer(rate))
    woken = WOKEN + tick + REST
    tables = at + len(woken)
    gate = GATE.pack(at & 0xFFFF, CODE_SELECTOR, 0, INTERRUPT_GATE, at >> 16)
    idt = bytes(FIRST * GATE.size) + 8 * gate
    code = begin + LIDT + struct.pack("<I", tables) + START_PIC + _start_timer(rate) + woken
    return code + struct.pack("<HI", len(idt) - 1, tables + 6) + idt


def _start_timer(rate: int) -> bytes:
    low, high = (HZ // rate).to_bytes(2, "little")
    return (
        b"\xb0\x34\xe6\x43"  # mov al, 0x34; out 0x43, al    counter 0: low byte, high byte, and a pulse each time
        + bytes((0xB0, low, 0xE6, 0x40))  # mov al, low; out 0x40, al
        + bytes((0xB0, high, 0xE6, 0x40))  # mov al, high; out 0x40, al
    )
