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
ECAM: Final = Extent(0xB000_0000, 256 << 20)
"""PCI Express configuration space: 1 MiB for each of 256 buses."""
MMIO32: Final = Extent(0xC000_0000, 0x3EC0_0000)
"""The 32-bit window for BARs, up to the IOAPIC. The 64-bit one is above RAM: `mmio64`."""
MMIO64_LEAST: Final = 4 * GIB
MMIO64_PER_PORT: Final = GIB
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

RESERVED: Final = (LEGACY_HOLE, ECAM, Extent(IDENTITY_MAP.base, IDENTITY_MAP.size + TSS.size))
"""What the memory map calls reserved. Linux uses ECAM only where it is."""

# I/O ports

I8042_DATA: Final = Extent(0x60, 1)
I8042_COMMAND: Final = Extent(0x64, 1)
CMOS: Final = Extent(0x70, 2)
DEBUG_PORT: Final = Extent(0x80, 1)
COM1: Final = Extent(0x3F8, 8)
PVPANIC: Final = Extent(0x505, 1)
ACPI_PM: Final = Extent(0x600, 16)
PCI_CONFIG: Final = Extent(0xCF8, 8)
"""Address and data, the way to configuration space that is older than ECAM."""
RESET: Final = Extent(0xCF9, 1)
"""One byte inside the dword of PCI's 0xCF8: accesses are told apart by their size, so PCI_CONFIG is what is mapped."""
PCI_IO: Final = Extent(0x1000, 0xF000)
"""The ports for BARs: Linux, too, gives none below."""
PCI_IO_RANGES: Final = (Extent(0, PCI_CONFIG.base), Extent(0xD00, 0xF300))
"""The ports that lie on the PCI bus: all but those that configure it."""

# Interrupts (GSIs)

COM1_IRQ: Final = 4
RTC_IRQ: Final = 8
SCI_IRQ: Final = 9
PCI_IRQS: Final = range(16, 20)
"""INTA to INTD of device 0 on the root bus, and so on in turn."""


def ram(size: int, *, huge_page: int = 0) -> tuple[Extent, ...]:
    """Where ``size`` bytes of RAM go: below the hole, and what does not fit there from 4 GiB on."""
    low_end = LOW_RAM_END_1GIB_PAGES if huge_page == GIB else LOW_RAM_END
    low = Extent(0, min(size, low_end))
    return (low,) if size <= low_end else (low, Extent(HIGH_RAM, size - low_end))


def mmio64(size: int, ports: int, *, huge_page: int = 0) -> Extent:
    """The 64-bit window for BARs of a machine with ``size`` bytes of RAM and ``ports`` root ports.

    Above the RAM, a power of two, aligned to itself; low, because some processors have but 36 address bits.
    """
    last = ram(size, huge_page=huge_page)[-1]
    free = max(HIGH_RAM, last.base + last.size)
    needed = max(MMIO64_LEAST, (ports + 1) * MMIO64_PER_PORT)  # one more for the devices on the root bus
    window = 1 << (needed - 1).bit_length()
    return Extent(-(-free // window) * window, window)


def is_addressable(extent: Extent, address_bits: int) -> bool:
    """Whether a processor with so many physical address bits (MAXPHYADDR) reaches all of ``extent``."""
    return extent.base + extent.size <= 1 << address_bits
