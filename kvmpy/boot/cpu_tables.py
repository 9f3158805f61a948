"""The tables the boot vCPU's registers point at when it enters the kernel: descriptors and an identity map.

Documentation/arch/x86/boot.rst, "64-bit boot protocol", asks for flat segments at __BOOT_CS and __BOOT_DS and for
paging with everything the kernel is given mapped one to one. PVH asks for flat 32-bit segments and no paging. Formats:
Intel SDM volume 3, sections 3.4.5 and 4.5.
"""

from __future__ import annotations

import struct
from typing import Final

from kvmpy.boot.kernel import EntryMode

CODE_SELECTOR: Final = 0x10  # __BOOT_CS
DATA_SELECTOR: Final = 0x18  # __BOOT_DS
GDT_SIZE: Final = DATA_SELECTOR + 8

# Base 0, limit 4 GiB, present, privilege 0.
CODE_64: Final = 0x00AF_9B00_0000_FFFF
CODE_32: Final = 0x00CF_9B00_0000_FFFF
DATA: Final = 0x00CF_9300_0000_FFFF

PAGE: Final = 4096
LARGE_PAGE: Final = 2 << 20
ENTRIES: Final = 512
DIRECTORIES: Final = 4  # of 1 GiB each
PAGE_TABLES_SIZE: Final = (2 + DIRECTORIES) * PAGE

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
LARGE: Final = 1 << 7


def gdt(mode: EntryMode) -> bytes:
    """Flat segments at CODE_SELECTOR and DATA_SELECTOR."""
    code = CODE_64 if mode is EntryMode.LINUX64 else CODE_32
    return struct.pack("<4Q", 0, 0, code, DATA)


def page_tables(gpa: int) -> bytes:
    """Page tables for ``gpa`` that map the first 4 GiB one to one in 2 MiB pages; CR3 is ``gpa``."""
    pointers, directories = gpa + PAGE, gpa + 2 * PAGE
    table = PRESENT | WRITABLE
    words = [pointers | table, *[0] * (ENTRIES - 1)]
    words += [directories + index * PAGE | table for index in range(DIRECTORIES)] + [0] * (ENTRIES - DIRECTORIES)
    words += [index * LARGE_PAGE | table | LARGE for index in range(DIRECTORIES * ENTRIES)]
    return struct.pack(f"<{len(words)}Q", *words)
