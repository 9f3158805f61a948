"""Which kernel format a file has, and what it is instead where it has none."""

from __future__ import annotations

from typing import Final

from kvmpy.boot import bzimage, elf
from kvmpy.boot.kernel import Kernel
from kvmpy.boot.source import Reader

HEAD: Final = 4096

# (offset, bytes there, what the file is): what operators hand in by mistake.
OTHERS: Final = (
    (0, b"\x1f\x8b", "gzip data: unpack it"),
    (0, b"\xfd7zXZ\0", "xz data: unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data: unpack it"),
    (0, b"BZh", "bzip2 data: unpack it"),
    (0, b"\x04\x22\x4d\x18", "LZ4 data: unpack it"),
    (0, b"\x02\x21\x4c\x18", "LZ4 data: unpack it"),
    (0, b"070701", "a cpio archive: is this the initrd?"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (56, b"ARM\x64", "a kernel for arm64"),
    (0, b"MZ", "an EFI program without a Linux setup header, such as a unified kernel image: use the kernel in it"),
    (510, b"\x55\xaa", "a disk image or a boot sector without a Linux setup header"),
)


def examine(reader: Reader) -> Kernel:
    """Read the kernel's headers. Raises ConfigError, saying what the file is if it is no kernel."""
    head = reader.read(0, HEAD)
    if bzimage.is_bzimage(head):
        return bzimage.parse(reader)
    if head.startswith(elf.MAGIC):
        return elf.parse(reader)
    raise reader.source.error(f"is neither a bzImage nor an ELF vmlinux but {_describe(head)}")


def _describe(head: bytes) -> str:
    for offset, magic, what in OTHERS:
        if head.startswith(magic, offset):
            return what
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "text"
    if len(head) < HEAD:
        return f"{len(head)} bytes of something else: too short for either"
    return f"something else, starting with {head[:8].hex(' ')}"
