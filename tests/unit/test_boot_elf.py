"""ELF vmlinux: what is accepted, what is read from it, and a clear refusal for everything else."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kvmpy.boot.kernel import EntryMode, Segment
from kvmpy.errors import ConfigError
from tests.unit.test_boot_bzimage import examined

TEXT = b"\x90" * 64
DATA = b"data" * 8
TEXT_OFFSET = 0x1000
DATA_OFFSET = 0x1100
NOTES_OFFSET = 0x1200
LOAD_AT = 0x20_0000
ENTRY = LOAD_AT + 0x10
BSS = 0x1_0000

PHYS32_ENTRY = 18
BUILD_SALT = 0x100


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    padded = [part + bytes(-len(part) % 4) for part in (name, desc)]
    return struct.pack("<III", len(name), len(desc), kind) + b"".join(padded)


NOTES = (
    note(b"Xen\0", 6, b"linux\0")
    + note(b"Linux\0", BUILD_SALT, b"6.1.0-test\0")
    + note(b"Xen\0", PHYS32_ENTRY, struct.pack("<Q", ENTRY))
)


def vmlinux(
    *,
    elf_class: int = 2,
    machine: int = 62,
    notes: bytes = NOTES,
    notes_size: int | None = None,
    text_at: int = LOAD_AT,
    text_size: int = len(TEXT),
    header_size: int = 56,
    header_count: int = 3,
) -> bytes:
    """An ELF executable with a text segment, a data segment with a bss, and notes."""
    headers = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", elf_class, 1, 1, 2, machine, 1, 0, 64, 0, 0, 64, header_size, header_count, 0, 0, 0),
    )
    program_header = struct.Struct("<IIQQQQQQ")
    headers += program_header.pack(1, 5, TEXT_OFFSET, 0, text_at, text_size, text_size, 4096)
    headers += program_header.pack(1, 6, DATA_OFFSET, 0, LOAD_AT + 0x1000, len(DATA), len(DATA) + BSS, 4096)
    size = len(notes) if notes_size is None else notes_size
    headers += program_header.pack(4, 4, NOTES_OFFSET, 0, 0, size, size, 4)
    image = bytearray(NOTES_OFFSET)
    image[: len(headers)] = headers
    image[TEXT_OFFSET : TEXT_OFFSET + len(TEXT)] = TEXT
    image[DATA_OFFSET : DATA_OFFSET + len(DATA)] = DATA
    return bytes(image + notes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vmlinux"


def test_a_vmlinux_is_started_at_its_pvh_entry(path: Path) -> None:
    kernel = examined(path, vmlinux())
    assert kernel.description == "ELF vmlinux, PVH entry 0x200010, build 6.1.0-test"
    assert (kernel.mode, kernel.ip) == (EntryMode.PVH32, ENTRY)
    assert kernel.command_line_max == 2047


def test_segments_go_to_their_physical_addresses_with_their_bss(path: Path) -> None:
    kernel = examined(path, vmlinux())
    assert kernel.segments == (
        Segment(LOAD_AT, len(TEXT), TEXT_OFFSET, len(TEXT)),
        Segment(LOAD_AT + 0x1000, len(DATA) + BSS, DATA_OFFSET, len(DATA)),
    )
    assert kernel.footprint == range(LOAD_AT, LOAD_AT + 0x1000 + len(DATA) + BSS)


def test_a_pvh_note_of_four_bytes_is_as_good(path: Path) -> None:
    kernel = examined(path, vmlinux(notes=note(b"Xen\0", PHYS32_ENTRY, struct.pack("<I", ENTRY))))
    assert (kernel.ip, kernel.description) == (ENTRY, "ELF vmlinux, PVH entry 0x200010")


@pytest.mark.parametrize(
    "text_at",
    [
        LOAD_AT + 0x1000 - len(TEXT),
        LOAD_AT + 0x1000 + len(DATA) + BSS,  # the program headers need not be in order
    ],
)
def test_segments_may_touch(path: Path, text_at: int) -> None:
    entry = note(b"Xen\0", PHYS32_ENTRY, struct.pack("<Q", text_at))
    kernel = examined(path, vmlinux(text_at=text_at, notes=entry))
    assert [segment.gpa for segment in kernel.segments] == [text_at, LOAD_AT + 0x1000]


REFUSED = {
    "overlap, 0x200fc1-0x201000 and 0x201000-0x21101f: damaged": vmlinux(text_at=LOAD_AT + 0x1001 - len(TEXT)),
    "overlap, 0x201000-0x21101f and 0x21101f-0x21105e: damaged": vmlinux(text_at=LOAD_AT + 0x101F + BSS),
    "overlap, 0x201000-0x20103f and 0x201000-0x21101f: damaged": vmlinux(text_at=LOAD_AT + 0x1000),
    "32-bit ELF file": vmlinux(elf_class=1),
    "for another machine (e_machine 183)": vmlinux(machine=183),
    "inside its ELF header": vmlinux()[:40],
    "its program headers end at": vmlinux()[:100],
    "a segment ends at": vmlinux()[: DATA_OFFSET + 1],
    "its notes end at": vmlinux()[:-1],
    "bytes of notes: damaged": vmlinux(notes=NOTES + bytes(1 << 17)),
    "0 program headers": vmlinux(header_count=0),
    "65535 program headers": vmlinux(header_count=65535),
    "program headers of 1 bytes": vmlinux(header_size=1),
    "CONFIG_PVH=y": vmlinux(notes=note(b"Xen\0", 6, b"linux\0")),
    "without a PVH entry (Xen note 18)": vmlinux(notes=note(b"GNU\0", PHYS32_ENTRY, bytes(8))),
    "without a PVH entry": vmlinux(notes_size=len(NOTES) - 1),
    "PVH note of 3 bytes": vmlinux(notes=note(b"Xen\0", PHYS32_ENTRY, bytes(3))),
    "PVH entry 0x10 outside its segments": vmlinux(notes=note(b"Xen\0", PHYS32_ENTRY, struct.pack("<I", 0x10))),
}


@pytest.mark.parametrize("text", REFUSED)
def test_an_elf_file_that_is_no_usable_kernel_is_refused_with_the_reason(path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        examined(path, REFUSED[text])
    assert str(caught.value).startswith(f"boot.kernel: {path}: ")
    assert text in str(caught.value)
