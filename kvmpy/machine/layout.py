"""The machine's map: every guest-physical address, I/O port and interrupt, and why it is there.

Nothing else writes an address. docs/memory-map.md is made from this file.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvmpy.boot.placement import LowMemory

GIB: Final = 1 << 30


class Extent(NamedTuple):
    """``size`` bytes, or ports, from ``base`` on."""

    base: int
    size: int


# Guest-physical memory

LOW_RAM_END: Final = 0xB000_0000
"""RAM ends here and goes on at 4 GiB; between them are ECAM and the 32-bit MMIO windows."""
LOW_RAM_END_1GIB_PAGES: Final = 0x8000_0000
"""With 1 GiB pages, so that offset in the file and address agree modulo the page."""
HIGH_RAM: Final = 4 * GIB
LEGACY_HOLE: Final = Extent(0xA_0000, 0x6_0000)
"""VGA and BIOS of a PC: RAM to KVM, reserved to the guest. The ACPI tables are at its end."""
IOAPIC: Final = Extent(0xFEC0_0000, 0x1000)
LAPIC: Final = Extent(0xFEE0_0000, 0x1000)
IDENTITY_MAP: Final = Extent(0xFEFF_C000, 0x1000)
TSS: Final = Extent(0xFEFF_D000, 0x3000)
"""KVM's own pages for real mode on Intel processors; reserved to the guest, as is the identity map."""

LOW_MEMORY: Final = LowMemory(
    gdt=0x500,
    start_info=0x6000,
    boot_params=0x7000,
    page_tables=0x9000,
    command_line=0x2_0000,
    acpi=range(0xE_0000, 0x10_0000),  # where an operating system without UEFI scans for the RSDP
)
"""What a kernel is given besides itself. Linux takes over these pages once it runs."""

RESERVED: Final = (LEGACY_HOLE, Extent(IDENTITY_MAP.base, IDENTITY_MAP.size + TSS.size))
"""What the memory map calls reserved."""

# I/O ports

I8042_DATA: Final = Extent(0x60, 1)
I8042_COMMAND: Final = Extent(0x64, 1)
CMOS: Final = Extent(0x70, 2)
DEBUG_PORT: Final = Extent(0x80, 1)
COM1: Final = Extent(0x3F8, 8)
PVPANIC: Final = Extent(0x505, 1)
ACPI_PM: Final = Extent(0x600, 16)
RESET: Final = Extent(0xCF9, 1)
"""One byte inside the dword of PCI's 0xCF8: accesses are told apart by their size."""

# Interrupts (GSIs)

COM1_IRQ: Final = 4
RTC_IRQ: Final = 8
SCI_IRQ: Final = 9


def ram(size: int, *, huge_page: int = 0) -> tuple[Extent, ...]:
    """Where ``size`` bytes of RAM go: below the hole, and what does not fit there from 4 GiB on."""
    low_end = LOW_RAM_END_1GIB_PAGES if huge_page == GIB else LOW_RAM_END
    low = Extent(0, min(size, low_end))
    return (low,) if size <= low_end else (low, Extent(HIGH_RAM, size - low_end))
