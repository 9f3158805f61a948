"""Resource descriptors: what a device's _CRS lists, in the bytes of ACPI 6.5, section 6.4.

Each function returns one descriptor; `template` makes the buffer a _CRS returns. Ranges are fixed: kvmpy, being the
firmware, has decided.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from kvmpy.boot import aml

END_TAG: Final = b"\x79\x00"  # 6.4.2.9; checksum 0 is not checked

# The resource type of an address space descriptor: 6.4.3.5.1.
MEMORY_RANGE: Final = 0
IO_RANGE: Final = 1
BUS_NUMBER_RANGE: Final = 2
# Its general flags: a producer's, positively decoded, with both ends fixed.
FIXED_RANGE: Final = 1 << 2 | 1 << 3
# Its type-specific flags: 6.4.3.5.5.
WRITABLE: Final = 1 << 0
PREFETCHABLE: Final = 3 << 1
ENTIRE_IO_RANGE: Final = 3


def template(*descriptors: bytes) -> bytes:
    """The buffer of ``descriptors``, as ASL's ResourceTemplate makes it."""
    return aml.buffer(b"".join(descriptors) + END_TAG)


def io(port: int, size: int) -> bytes:
    """IO, decoded with 16 bits: 6.4.2.5."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def irq_no_flags(*irqs: int) -> bytes:
    """IRQNoFlags: edge-triggered, active high, not shared: 6.4.2.1."""
    return struct.pack("<BH", 0x22, sum(1 << irq for irq in irqs))


def interrupt(gsis: Sequence[int], *, edge: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """Interrupt, for a device that uses it: 6.4.3.6."""
    flags = 1 | edge << 1 | active_low << 2 | shared << 3
    return struct.pack(f"<BHBB{len(gsis)}I", 0x89, 2 + 4 * len(gsis), flags, len(gsis), *gsis)


def memory32_fixed(gpa: int, size: int, *, writable: bool = True) -> bytes:
    """Memory32Fixed: 6.4.3.4."""
    return struct.pack("<BHBII", 0x86, 9, writable, gpa, size)


def word_bus_number(first: int, count: int) -> bytes:
    """WordBusNumber, of a bridge: 6.4.3.5.3."""
    return _address_space(0x88, "H", BUS_NUMBER_RANGE, 0, first, count)


def word_io(port: int, size: int) -> bytes:
    """WordIO, of a bridge: 6.4.3.5.3."""
    return _address_space(0x88, "H", IO_RANGE, ENTIRE_IO_RANGE, port, size)


def dword_io(port: int, size: int) -> bytes:
    """DWordIO, of a bridge: 6.4.3.5.2."""
    return _address_space(0x87, "I", IO_RANGE, ENTIRE_IO_RANGE, port, size)


def dword_memory(gpa: int, size: int, *, prefetchable: bool = False) -> bytes:
    """DWordMemory, of a bridge: 6.4.3.5.2."""
    return _address_space(0x87, "I", MEMORY_RANGE, _memory_flags(prefetchable), gpa, size)


def qword_memory(gpa: int, size: int, *, prefetchable: bool = False) -> bytes:
    """QWordMemory, of a bridge: 6.4.3.5.1."""
    return _address_space(0x8A, "Q", MEMORY_RANGE, _memory_flags(prefetchable), gpa, size)


def _memory_flags(prefetchable: bool) -> int:
    return WRITABLE | PREFETCHABLE * prefetchable


def _address_space(tag: int, width: str, kind: int, flags: int, first: int, size: int) -> bytes:
    body = struct.pack(f"<BBB5{width}", kind, FIXED_RANGE, flags, 0, first, first + size - 1, 0, size)
    return struct.pack("<BH", tag, len(body)) + body
