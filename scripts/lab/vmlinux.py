"""The ELF kernel inside a bzImage, unpacked without the kernel's own script.

A bzImage is a boot sector, a real-mode part, and a protected-mode part that holds a compressed vmlinux. Since boot
protocol 2.08 the header says where (Documentation/arch/x86/boot.rst, payload_offset). The compressor is known by its
magic number. Debian builds its generic kernel with xz and its cloud kernel with LZ4, which Python's library lacks, so
the LZ4 decoder is here. After the compressed data comes the uncompressed size, 4 bytes, little-endian.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import Final

HEADER_MAGIC = (0x202, b"HdrS")
VERSION_OFFSET, SETUP_SECTORS_OFFSET, PAYLOAD_OFFSET = 0x206, 0x1F1, 0x248
PAYLOAD_SINCE = 0x0208
SECTOR = 512
DEFAULT_SETUP_SECTORS = 4  # what a 0 in the header means
ELF_MAGIC = b"\x7fELF"
GZIP, BZIP2, XZ, LZMA, LZ4 = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x5d\0\0", b"\x02\x21\x4c\x18"
ZLIB_GZIP_CONTAINER = 31  # zlib's number for "a gzip header, the largest window"

LZ4_LONG: Final = 15  # a length of 15 goes on in the next bytes, each of 255 asks for one more
LZ4_SHORTEST_MATCH: Final = 4


class KernelFormatError(ValueError):
    """The file is not a bzImage that can be unpacked here."""


def extract(image: bytes) -> bytes:
    """The vmlinux inside the bzImage ``image``."""
    at, magic = HEADER_MAGIC
    if image[at : at + len(magic)] != magic:
        raise KernelFormatError("not a bzImage: no HdrS at 0x202")
    (version,) = struct.unpack_from("<H", image, VERSION_OFFSET)
    if version < PAYLOAD_SINCE:
        raise KernelFormatError(f"boot protocol {version:#06x} is older than {PAYLOAD_SINCE:#06x}: no payload offset")
    setup = ((image[SETUP_SECTORS_OFFSET] or DEFAULT_SETUP_SECTORS) + 1) * SECTOR
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    payload = image[setup + offset : setup + offset + length]
    elf = _decompress(payload)
    (size,) = struct.unpack("<I", payload[-4:])
    if not elf.startswith(ELF_MAGIC) or len(elf) != size:
        raise KernelFormatError(f"the payload is not an ELF file of {size} bytes but {len(elf)}: {elf[:4].hex()}")
    return elf


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(GZIP):
        return zlib.decompressobj(wbits=ZLIB_GZIP_CONTAINER).decompress(payload)
    if payload.startswith(BZIP2):
        return bz2.BZ2Decompressor().decompress(payload)
    if payload.startswith((XZ, LZMA)):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(LZ4):
        return _lz4_legacy(payload)
    raise KernelFormatError(f"the payload is compressed in an unknown way: {payload[:6].hex()}")


def _lz4_legacy(payload: bytes) -> bytes:
    """Decode lz4's legacy frame: the magic, then blocks of a length and that many bytes."""
    (total,) = struct.unpack("<I", payload[-4:])
    plain = bytearray()
    at = len(LZ4)
    while len(plain) < total:
        (length,) = struct.unpack_from("<I", payload, at)
        at += 4
        plain += _lz4_block(payload[at : at + length])
        at += length
    return bytes(plain)


def _lz4_block(block: bytes) -> bytearray:
    """Decode one block: sequences of a token, literal bytes, and a match in what was decoded (lz4_Block_format.md).

    A kernel has millions of bytes: everything in the loop is a local, and nothing is done per byte of a literal or
    match.
    """
    plain = bytearray()
    at, end = 0, len(block)
    while True:
        token = block[at]
        at += 1
        literals = token >> 4
        if literals == LZ4_LONG:
            while (more := block[at]) == 255:
                literals += 255
                at += 1
            literals += more
            at += 1
        plain += block[at : at + literals]
        at += literals
        if at >= end:  # the last sequence has no match
            return plain
        distance = block[at] | block[at + 1] << 8
        at += 2
        length = token & 0x0F
        if length == LZ4_LONG:
            while (more := block[at]) == 255:
                length += 255
                at += 1
            length += more
            at += 1
        length += LZ4_SHORTEST_MATCH
        start = len(plain) - distance
        if distance >= length:
            plain += plain[start : start + length]
        else:  # the match overlaps what it makes: a repeated pattern
            plain += (plain[start:] * (length // distance + 1))[:length]
