"""Writes docs/memory-map.md from kvmpy/machine/layout.py; with --check, only says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvmpy.machine import layout
from kvmpy.machine.layout import Extent

PAGE: Final = Path(__file__).parent.parent / "docs" / "memory-map.md"
INTRODUCTION: Final = """\
# The machine's map

Where everything is for the guest. The one place that says so is `kvmpy/machine/layout.py`; this page is written from
it by `scripts/memory_map.py`.
"""


def page() -> str:
    """The page as it should be."""
    return "\n".join([INTRODUCTION, *_memory(), "", *_ports(), "", *_interrupts(), ""])


def _memory() -> Iterator[str]:
    low = layout.LOW_MEMORY
    yield from ("## Guest-physical memory", "", "| from | to | what |", "|---|---|---|")
    yield _row(0, layout.LOW_RAM_END, "RAM, as much as there is")
    for gpa, what in sorted(
        (
            (low.gdt, "the boot vCPU's descriptor table"),
            (low.start_info, "PVH start info"),
            (low.boot_params, "Linux's zero page"),
            (low.page_tables, "page tables: the first 4 GiB, one to one"),
            (low.command_line, "the kernel's command line"),
        )
    ):
        yield f"| {gpa:#x} | | at boot: {what} |"
    yield _extent(layout.LEGACY_HOLE, "reserved: a PC's VGA and BIOS")
    yield _row(low.acpi.start, low.acpi.stop, "in it: the ACPI tables, RSDP first")
    yield _extent(layout.ECAM, "reserved: ECAM, the configuration space of PCI Express")
    yield _extent(layout.MMIO32, "PCI: 32-bit window for BARs")
    yield _extent(layout.IOAPIC, "IOAPIC")
    yield _extent(layout.LAPIC, "local APIC, each vCPU's own")
    yield _extent(layout.IDENTITY_MAP, "KVM's identity map")
    yield _extent(layout.TSS, "KVM's task state segment")
    yield f"| {layout.HIGH_RAM:#x} | | RAM that did not fit below |"
    yield ""
    yield f"With 1 GiB pages the RAM below 4 GiB ends at {layout.LOW_RAM_END_1GIB_PAGES:#x}."
    yield ""
    yield "PCI's 64-bit window for BARs is above the RAM, as big as it must be, aligned to its size:"
    yield from ("", "| RAM | root ports | from | to |", "|---|---|---|---|")
    for gib, ports in ((1, 0), (4, 2), (16, 4), (64, 16)):
        window = layout.mmio64(gib * layout.GIB, ports)
        yield f"| {gib} GiB | {ports} | {window.base:#x} | {window.base + window.size - 1:#x} |"


def _ports() -> Iterator[str]:
    yield from ("## I/O ports", "", "| from | to | what |", "|---|---|---|")
    yield _extent(layout.I8042_DATA, "i8042 data")
    yield _extent(layout.I8042_COMMAND, "i8042 command and status")
    yield _extent(layout.CMOS, "CMOS and real-time clock")
    yield _extent(layout.DEBUG_PORT, "debug port: boot time stamps")
    yield _extent(layout.COM1, "COM1, a 16550A")
    yield _extent(layout.PVPANIC, "pvpanic")
    yield _extent(layout.ACPI_PM, "ACPI power management: PM1 event and control blocks, timer")
    yield _extent(layout.PCI_CONFIG, "PCI configuration: address and data")
    yield _extent(layout.RESET, "in it, for accesses of one byte: reset register")
    yield _extent(layout.PCI_IO, "PCI: window for BARs")


def _interrupts() -> Iterator[str]:
    yield from ("## Interrupts", "", "| GSI | what |", "|---|---|")
    yield "| 2 | the PIT, ISA interrupt 0 |"
    yield f"| {layout.COM1_IRQ} | COM1 |"
    yield f"| {layout.RTC_IRQ} | real-time clock |"
    yield f"| {layout.SCI_IRQ} | ACPI's SCI, level, active high |"
    for number, gsi in enumerate(layout.PCI_IRQS):
        pins = ", ".join(f"INT{'ABCD'[(number - device) % 4]} of device {device}" for device in range(4))
        yield f"| {gsi} | PCI: {pins}, and so on |"


def _extent(extent: Extent, what: str) -> str:
    return _row(extent.base, extent.base + extent.size, what)


def _row(start: int, stop: int, what: str) -> str:
    return f"| {start:#x} | {stop - 1:#x} | {what} |"


def main() -> int:
    """Write the page, or check it; returns the exit code."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print(f"{PAGE.name} is not what kvmpy/machine/layout.py says: run scripts/memory_map.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
