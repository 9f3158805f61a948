"""A guest whose every step is seen from outside, and that dirties memory as it goes."""

from __future__ import annotations

import struct
from typing import Final

from tests.fakes.paced_guest import paced

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

# For ever, and mostly at rest. It counts by grace of interrupt controllers, a timer and a vCPU that waits, all of which
# must arrive where it goes.
COUNTS: Final = paced(
    BEGIN,
    b"\xb9" + struct.pack("<I", STEPS)  # mov ecx, STEPS
    + STEP + b"\xe2" + struct.pack("b", -len(STEP) - 2),  # next: ...; loop next
    RATE,
)  # fmt: skip

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
