"""bzImage: a compressed Linux kernel, started by the 64-bit boot protocol.

Documentation/arch/x86/boot.rst is the specification. The protected-mode part is loaded at its preferred address, below
which neither a relocatable nor a fixed kernel can run; the real-mode part never runs. The kernel needs init_size bytes
from there on before it looks at the memory map.
"""

from __future__ import annotations

from typing import Final

from kvmpy.boot import boot_params
from kvmpy.boot.kernel import EntryMode, Kernel, Segment
from kvmpy.boot.source import Reader

MAGIC: Final = 0x53726448  # "HdrS"
BOOT_SECTOR_FLAG: Final = 0xAA55
HEADER_END: Final = 0x264  # of protocol 2.12: init_size is its last field here
SECTOR: Final = 512
DEFAULT_SETUP_SECTS: Final = 4  # what 0 means
PARAGRAPH: Final = 16

OLDEST_PROTOCOL: Final = 0x020C
LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0
ENTRY_64: Final = 0x200  # from the load address
VERSION_STRING_MAX: Final = 256


def is_bzimage(head: bytes) -> bool:
    """Whether a file that starts with ``head`` has a Linux setup header."""
    return len(head) >= boot_params.VERSION.offset and boot_params.HEADER.get(head) == MAGIC


def parse(reader: Reader) -> Kernel:
    """Read and check the header. Raises ConfigError, saying what is wrong with the image."""
    head = reader.read(0, boot_params.SETUP_HEADER_LIMIT)
    error = reader.source.error
    if len(head) < HEADER_END:
        raise error(f"is cut off inside its setup header: {reader.size} bytes")
    if boot_params.BOOT_FLAG.get(head) != BOOT_SECTOR_FLAG:
        raise error("has a setup header but no boot sector flag: damaged, or not a kernel")
    protocol = boot_params.VERSION.get(head)
    shown = f"{protocol >> 8}.{protocol & 0xFF:02}"
    if protocol < OLDEST_PROTOCOL:
        raise error(f"speaks boot protocol {shown}; kvmpy needs 2.12, of Linux 3.8, or later")
    if not boot_params.LOADFLAGS.get(head) & LOADED_HIGH:
        raise error("is a zImage, which loads below 1 MiB; kvmpy needs a bzImage")
    if not boot_params.XLOADFLAGS.get(head) & XLF_KERNEL_64:
        raise error("is a 32-bit kernel; kvmpy starts 64-bit kernels only")

    offset = (1 + (boot_params.SETUP_SECTS.get(head) or DEFAULT_SETUP_SECTS)) * SECTOR
    size = boot_params.SYSSIZE.get(head) * PARAGRAPH
    if offset + size > reader.size:
        raise error(f"is cut off: {reader.size} bytes, and its header speaks of {offset + size}")
    gpa = boot_params.PREF_ADDRESS.get(head)
    header_end = min(boot_params.HEADER.offset + boot_params.JUMP_OFFSET.get(head), boot_params.SETUP_HEADER_LIMIT)
    return Kernel(
        description=f"bzImage, 64-bit boot protocol {shown}, Linux {_release(reader, head)}",
        mode=EntryMode.LINUX64,
        ip=gpa + ENTRY_64,
        segments=(Segment(gpa, size, offset, size),),
        footprint=range(gpa, gpa + max(size, boot_params.INIT_SIZE.get(head))),
        command_line_max=boot_params.CMDLINE_SIZE.get(head),
        initrd_max=boot_params.INITRD_ADDR_MAX.get(head),
        setup_header=head[boot_params.SETUP_HEADER_START : header_end],
    )


def _release(reader: Reader, head: bytes) -> str:
    """The first word of the version string, such as "6.1.0-42-amd64"."""
    offset = boot_params.KERNEL_VERSION.get(head)
    text = reader.read(offset + SECTOR, VERSION_STRING_MAX).split(b"\0")[0] if offset else b""
    words = text.decode("ascii", "replace").split()
    return words[0] if words and words[0].isprintable() else "of unknown version"
