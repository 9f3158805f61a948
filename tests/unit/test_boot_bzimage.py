"""bzImage headers: what is accepted, what is read from them, and a clear refusal for everything else."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kvmpy.boot.examine import examine
from kvmpy.boot.kernel import EntryMode, Kernel
from kvmpy.boot.source import Source
from kvmpy.errors import ConfigError

SETUP_SECTS = 2
CODE = bytes(range(256)) * 16
CODE_OFFSET = (1 + SETUP_SECTS) * 512


def bzimage(
    *,
    protocol: int = 0x020F,
    loadflags: int = 1,
    xloadflags: int = 1,
    load_at: int = 0x10_0000,
    init_size: int = 0x4_0000,
    cmdline_size: int = 255,
    initrd_max: int = 0x7FFF_FFFF,
    boot_flag: int = 0xAA55,
    version: bytes = b"6.1.0-test (builder@host) #1 SMP",
    code: bytes = CODE,
) -> bytes:
    """A bzImage as the kernel's build lays it out: boot sector, setup sectors, protected-mode code."""
    image = bytearray(CODE_OFFSET)
    struct.pack_into("<B", image, 0x1F1, SETUP_SECTS)
    struct.pack_into("<I", image, 0x1F4, len(code) // 16)
    struct.pack_into("<H", image, 0x1FE, boot_flag)
    struct.pack_into("<BB", image, 0x200, 0xEB, 0x6A)
    struct.pack_into("<4sH", image, 0x202, b"HdrS", protocol)
    struct.pack_into("<H", image, 0x20E, 0x300)
    struct.pack_into("<BB", image, 0x210, 0, loadflags)
    struct.pack_into("<I", image, 0x22C, initrd_max)
    struct.pack_into("<HI", image, 0x236, xloadflags, cmdline_size)
    struct.pack_into("<QI", image, 0x258, load_at, init_size)
    image[0x500 : 0x500 + len(version) + 1] = version + b"\0"
    return bytes(image + code)


def examined(path: Path, data: bytes) -> Kernel:
    path.write_bytes(data)
    with Source("boot.kernel", path).open() as reader:
        return examine(reader)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vmlinuz"


def test_a_bzimage_is_started_in_64_bit_mode_at_its_preferred_address(path: Path) -> None:
    kernel = examined(path, bzimage())
    assert kernel.description == "bzImage, 64-bit boot protocol 2.15, Linux 6.1.0-test"
    assert (kernel.mode, kernel.ip) == (EntryMode.LINUX64, 0x10_0200)
    assert kernel.footprint == range(0x10_0000, 0x14_0000)
    assert (kernel.command_line_max, kernel.initrd_max) == (255, 0x7FFF_FFFF)


def test_the_protected_mode_part_is_what_is_loaded(path: Path) -> None:
    (segment,) = examined(path, bzimage() + b"signature").segments
    assert (segment.gpa, segment.size, segment.offset, segment.file_size) == (0x10_0000, 4096, CODE_OFFSET, 4096)


def test_the_setup_header_ends_where_its_jump_says(path: Path) -> None:
    image = bzimage()
    assert examined(path, image).setup_header == image[0x1F1 : 0x202 + 0x6A]


def test_a_kernel_longer_than_its_init_size_keeps_room_for_itself(path: Path) -> None:
    assert examined(path, bzimage(init_size=16)).footprint == range(0x10_0000, 0x10_1000)


@pytest.mark.parametrize("version", [b"", b"\xff\xfe", b"\x1b[2J"])
def test_a_version_string_that_cannot_be_shown_is_not(path: Path, version: bytes) -> None:
    description = examined(path, bzimage(version=version)).description
    assert description.isprintable()


REFUSED = {
    "boot protocol 2.11; kvmpy needs 2.12": bzimage(protocol=0x020B),
    "zImage": bzimage(loadflags=0),
    "32-bit kernel": bzimage(xloadflags=0),
    "no boot sector flag": bzimage(boot_flag=0),
    "cut off: 5631 bytes, and its header speaks of 5632": bzimage()[:-1],
    "cut off inside its setup header": bzimage()[:0x230],
    "gzip data: unpack it": b"\x1f\x8b\x08" + bytes(100),
    "xz data": b"\xfd7zXZ\0" + bytes(100),
    "zstd data": b"\x28\xb5\x2f\xfd" + bytes(100),
    "but text": b"#!/bin/sh\nexit 0\n",
    "EFI program without a Linux setup header": b"MZ" + bytes(5000),
    "arm64": b"MZ" + bytes(54) + b"ARM\x64" + bytes(5000),
    "cpio archive": b"070701" + bytes(100),
    "a disk image or a boot sector": bytes(510) + b"\x55\xaa" + bytes(8000),
    "3 bytes of something else: too short": b"\x00\x01\x02",
    "something else, starting with de ad": b"\xde\xad" * 4096,
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_that_is_no_usable_kernel_is_named_for_what_it_is(path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        examined(path, REFUSED[text])
    assert str(caught.value).startswith(f"boot.kernel: {path}: ")
    assert text in str(caught.value)
