"""The machine's map: the page about it is up to date, and nothing in it overlaps."""

from __future__ import annotations

from itertools import combinations

import pytest

from kvmpy.machine import layout
from scripts import memory_map

MEMORY = (layout.LEGACY_HOLE, layout.ECAM, layout.MMIO32, layout.IOAPIC, layout.LAPIC, layout.IDENTITY_MAP, layout.TSS)
PORTS = (
    *(layout.I8042_DATA, layout.I8042_COMMAND, layout.CMOS, layout.DEBUG_PORT),
    *(layout.COM1, layout.PVPANIC, layout.ACPI_PM, layout.PCI_CONFIG, layout.PCI_IO),
)
MIB, GIB = 1 << 20, 1 << 30


def test_the_page_is_up_to_date() -> None:
    assert memory_map.PAGE.read_text() == memory_map.page()


@pytest.mark.parametrize("extents", [MEMORY, PORTS], ids=["memory", "ports"])
def test_nothing_overlaps(extents: tuple[layout.Extent, ...]) -> None:
    assert [pair for pair in combinations(sorted(extents), 2) if pair[0].base + pair[0].size > pair[1].base] == []


@pytest.mark.parametrize(
    ("size", "huge_page", "blocks"),
    [
        (512 * MIB, 0, [(0, 512 * MIB)]),
        (layout.LOW_RAM_END, 0, [(0, layout.LOW_RAM_END)]),
        (4 * GIB, 0, [(0, layout.LOW_RAM_END), (4 * GIB, 4 * GIB - layout.LOW_RAM_END)]),
        (3 * GIB, GIB, [(0, 2 * GIB), (4 * GIB, GIB)]),
    ],
)
def test_ram_that_does_not_fit_below_the_hole_goes_on_at_4_gib(
    size: int, huge_page: int, blocks: list[tuple[int, int]]
) -> None:
    assert list(layout.ram(size, huge_page=huge_page)) == blocks


def test_the_boot_structures_and_the_reserved_ranges_leave_the_rest_free() -> None:
    assert [extent.base for extent in layout.RESERVED] == [0xA_0000, 0xB000_0000, 0xFEFF_C000]
    assert layout.LOW_MEMORY.acpi.start >= layout.LEGACY_HOLE.base
    assert layout.LOW_MEMORY.acpi.stop <= layout.LEGACY_HOLE.base + layout.LEGACY_HOLE.size
