"""A kernel of a few bytes: an ELF file with a PVH note, so that a whole machine boots in a millisecond.

It enters in 32-bit protected mode with flat segments and no paging, EBX pointing at the start info.
"""

from __future__ import annotations

import struct
from typing import Final

LOAD_AT: Final = 0x10_0000
EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR: Final = struct.Struct("<IIQQQQQQ")
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18

# Code that ends the machine through ACPI: mov dx, 0x604; mov ax, 0x3400 (S5, SLP_EN); out dx, ax; jmp $
POWER_OFF: Final = b"\x66\xba\x04\x06\x66\xb8\x00\x34\x66\xef\xeb\xfe"
# and that does nothing, for ever: jmp $
SPIN: Final = b"\xeb\xfe"
# or waits for ever, and takes no processor: hlt, with interrupts off; jmp to it
HALT: Final = b"\xf4\xeb\xfd"

# How the configuration of a small machine begins whose kernel is such a file, "kernel" beside it.
SMALL_MACHINE: Final = """\
name = "m"
[boot]
kernel = "kernel"
[machine]
memory = "16MiB"
[console]
serial = "null"
"""


def pvh_kernel(code: bytes) -> bytes:
    """An ELF64 file that loads ``code`` at LOAD_AT and enters it there."""
    note = struct.pack("<III4sI", 4, 4, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", LOAD_AT)
    headers = EHDR.size + 2 * PHDR.size
    at_note, at_code = headers, headers + len(note)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return (
        EHDR.pack(ident, 2, 62, 1, LOAD_AT, EHDR.size, 0, 0, EHDR.size, PHDR.size, 2, 0, 0, 0)
        + PHDR.pack(PT_LOAD, 5, at_code, LOAD_AT, LOAD_AT, len(code), len(code), 1)
        + PHDR.pack(PT_NOTE, 4, at_note, 0, 0, len(note), len(note), 4)
        + note
        + code
    )
