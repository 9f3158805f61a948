"""The DSDT's terms: the devices a guest cannot find by itself, and how to switch off.

Device ids: PNP0501 is a 16550A, PNP0B00 a PC's clock, QEMU0001 the pvpanic port (QEMU's docs/specs/pvpanic.rst),
ACPI0007 a processor (ACPI 6.5, section 8.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvmpy.boot import aml, resources

SLEEP_TYPE_OFF: Final = 5  # SLP_TYP for \_S5; the PM1 control register's device knows the same number
PRESENT: Final = 0xF  # present, enabled, shown, working: ACPI 6.5, section 6.3.7

SERIAL_PORTS: Final = 8
RTC_PORTS: Final = 2
PVPANIC_PORTS: Final = 1


def sleep_states() -> bytes:
    """Soft off, the one sleep state there is: ACPI 6.5, section 7.4.2.6."""
    return aml.name("\\_S5", aml.package(SLEEP_TYPE_OFF, SLEEP_TYPE_OFF, 0, 0))


def devices(*, serial: tuple[int, int], rtc: tuple[int, int], pvpanic: int, apic_ids: Sequence[int]) -> bytes:
    """The platform's devices in \\_SB; ``serial`` and ``rtc`` are (port, IRQ)."""
    return aml.scope(
        "\\_SB",
        _device(
            "COM1", aml.eisa_id("PNP0501"), resources.io(serial[0], SERIAL_PORTS), resources.irq_no_flags(serial[1])
        ),
        _device("RTC", aml.eisa_id("PNP0B00"), resources.io(rtc[0], RTC_PORTS), resources.irq_no_flags(rtc[1])),
        _device("PEVT", aml.string("QEMU0001"), resources.io(pvpanic, PVPANIC_PORTS)),
        *(_processor(apic_id) for apic_id in apic_ids),
    )


def _device(where: str, hid: bytes, *descriptors: bytes) -> bytes:
    return aml.device(
        where,
        aml.name("_HID", hid),
        aml.name("_UID", 1),
        aml.name("_STA", PRESENT),
        aml.name("_CRS", resources.template(*descriptors)),
    )


def _processor(apic_id: int) -> bytes:
    """The processor that the MADT lists under the same _UID."""
    return aml.device(f"C{apic_id:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", apic_id))
