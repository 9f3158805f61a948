"""The zero page, struct boot_params: what a boot loader tells a Linux kernel started by its own boot protocol.

Offsets are those of Documentation/arch/x86/zero-page.rst and of "The Real-Mode Kernel Header" in boot.rst; the setup
header sits at the same offsets in a bzImage and in the zero page. Only the fields kvmpy reads or writes are here. The
`ext_` fields stay zero: command line and initrd always lie below 4 GiB.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from kvmpy.boot.kernel import BootInfo

SIZE: Final = 4096


class Field(msgspec.Struct, frozen=True):
    """A little-endian number of ``format`` at ``offset``."""

    offset: int
    format: str

    def get(self, page: bytes | bytearray) -> int:
        """The number in ``page``."""
        (value,) = struct.unpack_from("<" + self.format, page, self.offset)
        return int(value)

    def put(self, page: bytearray, value: int) -> None:
        """Store ``value`` in ``page``."""
        struct.pack_into("<" + self.format, page, self.offset, value)


ACPI_RSDP_ADDR: Final = Field(0x070, "Q")
E820_ENTRIES: Final = Field(0x1E8, "B")
SETUP_SECTS: Final = Field(0x1F1, "B")
SYSSIZE: Final = Field(0x1F4, "I")  # of the protected-mode part, in units of 16 bytes
BOOT_FLAG: Final = Field(0x1FE, "H")
JUMP_OFFSET: Final = Field(0x201, "B")  # a short jump over the header: says where the header ends
HEADER: Final = Field(0x202, "I")
VERSION: Final = Field(0x206, "H")
KERNEL_VERSION: Final = Field(0x20E, "H")  # where the version string is, less 0x200
TYPE_OF_LOADER: Final = Field(0x210, "B")
LOADFLAGS: Final = Field(0x211, "B")
RAMDISK_IMAGE: Final = Field(0x218, "I")
RAMDISK_SIZE: Final = Field(0x21C, "I")
CMD_LINE_PTR: Final = Field(0x228, "I")
INITRD_ADDR_MAX: Final = Field(0x22C, "I")
XLOADFLAGS: Final = Field(0x236, "H")
CMDLINE_SIZE: Final = Field(0x238, "I")
PREF_ADDRESS: Final = Field(0x258, "Q")
INIT_SIZE: Final = Field(0x260, "I")

SETUP_HEADER_START: Final = 0x1F1
SETUP_HEADER_LIMIT: Final = 0x290  # where the zero page goes on with edd_mbr_sig_buffer
E820_TABLE: Final = 0x2D0
E820_ENTRY: Final = struct.Struct("<QQI")
E820_MAX_ENTRIES: Final = 128

LOADER_UNDEFINED: Final = 0xFF
PROTOCOL_WITH_RSDP: Final = 0x020E


def zero_page(setup_header: bytes, info: BootInfo) -> bytes:
    """The page for a kernel with this setup header.

    LOADFLAGS keeps the kernel's value: CAN_USE_HEAP speaks to the real-mode part, which never runs.
    """
    if len(info.memory_map) > E820_MAX_ENTRIES:
        raise ValueError(f"a memory map of {len(info.memory_map)} entries: the zero page holds {E820_MAX_ENTRIES}")
    page = bytearray(SIZE)
    page[SETUP_HEADER_START : SETUP_HEADER_START + len(setup_header)] = setup_header
    TYPE_OF_LOADER.put(page, LOADER_UNDEFINED)
    CMD_LINE_PTR.put(page, info.command_line)
    if info.initrd:
        RAMDISK_IMAGE.put(page, info.initrd.start)
        RAMDISK_SIZE.put(page, len(info.initrd))
    if VERSION.get(page) >= PROTOCOL_WITH_RSDP:
        ACPI_RSDP_ADDR.put(page, info.rsdp)
    E820_ENTRIES.put(page, len(info.memory_map))
    for index, entry in enumerate(info.memory_map):
        E820_ENTRY.pack_into(page, E820_TABLE + index * E820_ENTRY.size, entry.gpa, entry.size, entry.type)
    return bytes(page)
