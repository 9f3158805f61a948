"""ELF vmlinux: an unpacked Linux kernel, started at the PVH entry its Xen note names.

The file is untrusted: every offset and count is checked against the file and against a limit. Formats: the System V
gABI, chapters 4 and 5; the note is XEN_ELFNOTE_PHYS32_ENTRY of Xen's public/elfnote.h. e_entry is not used: it is the
64-bit entry, and there a kernel would want a setup header that vmlinux does not have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from kvmpy.boot.kernel import EntryMode, Kernel, Segment
from kvmpy.boot.source import Reader

MAGIC: Final = b"\x7fELF"
ELFCLASS64: Final = 2
ELFDATA2LSB: Final = 1
EM_X86_64: Final = 62
PT_LOAD: Final = 1
PT_NOTE: Final = 4
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
LINUX_ELFNOTE_BUILD_SALT: Final = 0x100

FILE_HEADER: Final = struct.Struct("<4sBB10xHHIQQQIHHHHHH")
PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
NOTE_HEADER: Final = struct.Struct("<III")

MAX_PROGRAM_HEADERS: Final = 128  # Linux has 5
MAX_TABLE_SIZE: Final = 64 << 10  # Linux has half a KiB of notes
COMMAND_LINE_MAX: Final = 2047  # Linux's COMMAND_LINE_SIZE on x86, less the NUL; PVH has no field for it
ADDRESS_MAX: Final = 0xFFFF_FFFF  # PVH enters in 32-bit mode


def parse(reader: Reader) -> Kernel:
    """Read and check headers and notes. Raises ConfigError, saying what is wrong with the image."""
    segments: list[Segment] = []
    notes: list[tuple[bytes, int, bytes]] = []
    for kind, _, offset, _, gpa, file_size, size, align in PROGRAM_HEADER.iter_unpack(_program_headers(reader)):
        if kind == PT_NOTE:
            notes += _notes(_read(reader, offset, file_size, "notes"), 8 if align == 8 else 4)
        elif kind == PT_LOAD and size:
            segments.append(_segment(reader, Segment(gpa, size, offset, file_size)))

    _check_overlap(reader, segments)
    ip = _pvh_entry(reader, notes)
    if not any(segment.gpa <= ip < segment.gpa + segment.size for segment in segments):
        raise reader.source.error(f"has its PVH entry {ip:#x} outside its segments: damaged")
    salt = next((desc for name, kind, desc in notes if (name, kind) == (b"Linux", LINUX_ELFNOTE_BUILD_SALT)), b"")
    build = salt.rstrip(b"\0").decode("ascii", "replace")
    return Kernel(
        description=f"ELF vmlinux, PVH entry {ip:#x}" + (f", build {build}" if build and build.isprintable() else ""),
        mode=EntryMode.PVH32,
        ip=ip,
        segments=tuple(segments),
        footprint=range(
            min(segment.gpa for segment in segments), max(segment.gpa + segment.size for segment in segments)
        ),
        command_line_max=COMMAND_LINE_MAX,
        initrd_max=ADDRESS_MAX,
    )


def _program_headers(reader: Reader) -> bytes:
    error = reader.source.error
    head = reader.read(0, FILE_HEADER.size)
    if len(head) < FILE_HEADER.size:
        raise error(f"is cut off inside its ELF header: {reader.size} bytes")
    _, elf_class, order, _, machine, _, _, offset, _, _, _, entry_size, count, *_ = FILE_HEADER.unpack(head)
    if elf_class != ELFCLASS64:
        raise error("is a 32-bit ELF file; kvmpy starts 64-bit kernels only")
    if order != ELFDATA2LSB or machine != EM_X86_64:
        raise error(f"is an ELF file for another machine (e_machine {machine}); kvmpy starts x86-64 kernels only")
    if entry_size != PROGRAM_HEADER.size or not 0 < count <= MAX_PROGRAM_HEADERS:
        raise error(f"has {count} program headers of {entry_size} bytes: an object file, or damaged")
    return _read(reader, offset, count * entry_size, "program headers")


def _segment(reader: Reader, segment: Segment) -> Segment:
    """``segment``, which the file was checked to hold."""
    if segment.file_size > segment.size:
        raise reader.source.error(f"has a segment of {segment.size} bytes that holds {segment.file_size}: damaged")
    if segment.offset + segment.file_size > reader.size:
        end = segment.offset + segment.file_size
        raise reader.source.error(f"is cut off: {reader.size} bytes, and a segment ends at {end}")
    return segment


def _check_overlap(reader: Reader, segments: list[Segment]) -> None:
    """No two segments share an address: they could load the same memory again and again, for as long as they like."""
    for low, high in pairwise(sorted(segments, key=lambda segment: segment.gpa)):
        if high.gpa < low.gpa + low.size:
            spans = " and ".join(f"{each.gpa:#x}-{each.gpa + each.size - 1:#x}" for each in (low, high))
            raise reader.source.error(f"has segments that overlap, {spans}: damaged")


def _read(reader: Reader, offset: int, size: int, what: str) -> bytes:
    if offset + size > reader.size:
        raise reader.source.error(f"is cut off: {reader.size} bytes, and its {what} end at {offset + size}")
    if size > MAX_TABLE_SIZE:
        raise reader.source.error(f"has {size} bytes of {what}: damaged")
    return reader.read(offset, size)


def _notes(data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Each note's name, type and descriptor; a note that does not fit ends the list."""
    position = 0
    while position + NOTE_HEADER.size <= len(data):
        name_size, desc_size, kind = NOTE_HEADER.unpack_from(data, position)
        name = position + NOTE_HEADER.size
        desc = position + _padded(NOTE_HEADER.size + name_size, align)
        if desc + desc_size > len(data):
            return
        yield data[name : name + name_size].rstrip(b"\0"), kind, data[desc : desc + desc_size]
        position = desc + _padded(desc_size, align)


def _padded(size: int, align: int) -> int:
    return -(-size // align) * align


def _pvh_entry(reader: Reader, notes: list[tuple[bytes, int, bytes]]) -> int:
    for name, kind, desc in notes:
        if (name, kind) == (b"Xen", XEN_ELFNOTE_PHYS32_ENTRY):
            # Linux writes an address of its own width; Xen's elfnote.h wants 4 bytes.
            if len(desc) not in (4, 8):
                raise reader.source.error(f"has a PVH note of {len(desc)} bytes: damaged")
            return int.from_bytes(desc, "little")
    raise reader.source.error(
        "is an ELF file without a PVH entry (Xen note 18); a kernel built with CONFIG_PVH=y has one, or use the bzImage"
    )
