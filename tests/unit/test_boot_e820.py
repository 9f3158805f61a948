"""The memory map given to guests, against a byte-by-byte model of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmpy.boot.e820 import MapEntry, MemoryType, memory_map

SPACE = 64

ranges = st.tuples(st.integers(0, SPACE - 1), st.integers(0, SPACE // 2))


@st.composite
def ram_blocks(draw: st.DrawFn) -> list[tuple[int, int]]:
    """RAM blocks without overlaps."""
    edges = sorted(draw(st.sets(st.integers(0, SPACE), max_size=6)))
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=False)]


def addresses(extents: list[tuple[int, int]]) -> set[int]:
    return {gpa for start, size in extents for gpa in range(start, start + size)}


def of_type(entries: tuple[MapEntry, ...], kind: MemoryType) -> list[tuple[int, int]]:
    return [(entry.gpa, entry.size) for entry in entries if entry.type is kind]


@given(ram=ram_blocks(), reserved=st.lists(ranges, max_size=5))
def test_each_address_is_what_it_was_said_to_be(ram: list[tuple[int, int]], reserved: list[tuple[int, int]]) -> None:
    entries = memory_map(ram, reserved)
    assert addresses(of_type(entries, MemoryType.RESERVED)) == addresses(reserved)
    assert addresses(of_type(entries, MemoryType.RAM)) == addresses(ram) - addresses(reserved)


@given(ram=ram_blocks(), reserved=st.lists(ranges, max_size=5))
def test_entries_are_sorted_and_never_overlap(ram: list[tuple[int, int]], reserved: list[tuple[int, int]]) -> None:
    entries = memory_map(ram, reserved)
    ends = [entry.gpa + entry.size for entry in entries]
    assert all(entry.size > 0 for entry in entries)
    assert all(end <= entry.gpa for end, entry in zip(ends, entries[1:], strict=False))


def test_the_map_of_a_guest_with_ram_on_both_sides_of_the_hole() -> None:
    low, high = (0, 0xB000_0000), (0x1_0000_0000, 0x1000_0000)
    assert memory_map([low, high], [(0xA_0000, 0x6_0000), (0xB000_0000, 0x1000_0000)]) == (
        MapEntry(0, 0xA_0000, MemoryType.RAM),
        MapEntry(0xA_0000, 0x6_0000, MemoryType.RESERVED),
        MapEntry(0x10_0000, 0xB000_0000 - 0x10_0000, MemoryType.RAM),
        MapEntry(0xB000_0000, 0x1000_0000, MemoryType.RESERVED),
        MapEntry(0x1_0000_0000, 0x1000_0000, MemoryType.RAM),
    )
