"""The memory map a guest is given: what of its address space is RAM and what it must leave alone.

The types are those of the E820 BIOS call (ACPI 6.5, section 15); PVH's start info uses the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import msgspec


class MemoryType(IntEnum):
    """The address range types that kvmpy uses."""

    RAM = 1
    RESERVED = 2


class MapEntry(msgspec.Struct, frozen=True):
    """[gpa, gpa+size) is of one type."""

    gpa: int
    size: int
    type: MemoryType


def memory_map(ram: Sequence[tuple[int, int]], reserved: Sequence[tuple[int, int]]) -> tuple[MapEntry, ...]:
    """The map of ``ram`` less ``reserved``, both of (gpa, size): sorted, without overlaps or empty entries."""
    holes = _merged(reserved)
    entries = [MapEntry(hole.start, hole.stop - hole.start, MemoryType.RESERVED) for hole in holes]
    for gpa, size in ram:
        start, end = gpa, gpa + size
        for hole in holes:
            if hole.stop <= start or end <= hole.start:
                continue
            if start < hole.start:
                entries.append(MapEntry(start, hole.start - start, MemoryType.RAM))
            start = hole.stop
        if start < end:
            entries.append(MapEntry(start, end - start, MemoryType.RAM))
    return tuple(sorted(entries, key=lambda entry: entry.gpa))


def _merged(ranges: Sequence[tuple[int, int]]) -> list[range]:
    merged: list[range] = []
    for gpa, size in sorted(ranges):
        if size == 0:
            continue
        if merged and gpa <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, gpa + size))
        else:
            merged.append(range(gpa, gpa + size))
    return merged
