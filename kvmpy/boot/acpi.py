"""The ACPI tables: RSDP, XSDT, FADT, FACS, MADT, DSDT, and what else the machine adds.

ACPI 6.5, chapter 5, is the specification. The machine is always in ACPI mode (it has no SMI command), with fixed
hardware for the power button, the PM timer and soft off, and without sleep states. `build` puts the RSDP first, where
the boot protocols point and where a scan of the BIOS area finds it too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from kvmpy.boot import dsdt
from kvmpy.boot.fadt import facs, fadt
from kvmpy.boot.madt import madt

OEM_ID: Final = b"KVMPY "
CREATOR_ID: Final = b"KVMP"

HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")  # 5.2.6: signature, length, revision, checksum, OEM, creator
HEADER_CHECKSUM: Final = 9
RSDP: Final = struct.Struct("<8sB6sBIIQB3x")  # 5.2.5.3: signature, checksum, OEM, revision, RSDT, length, XSDT, sum
RSDP_CHECKSUM: Final = 8  # of the first 20 bytes, all that ACPI 1.0 knew
RSDP_V1_SIZE: Final = 20
RSDP_EXTENDED_CHECKSUM: Final = 32

ALIGNMENT: Final = 64  # the FACS needs it: 5.2.10

# Revisions of the tables: 5.2.5.3, 5.2.8, 5.2.9, 5.2.12, 5.2.11.1.
RSDP_REVISION: Final = 2
XSDT_REVISION: Final = 1
FADT_REVISION: Final = 6
MADT_REVISION: Final = 5
DSDT_REVISION: Final = 2  # from 2 on, AML's integers have 64 bits
EXTRA_REVISION: Final = 1


class AcpiDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the tables tell of the machine: ports, gpas and interrupts in plain numbers.

    ``extra_dsdt`` are AML terms for the DSDT's root; ``extra_tables`` are (signature, body behind the header), of
    revision 1.
    """

    cpus: Sequence[int]  # APIC ids
    lapic: int
    ioapic: int
    ioapic_id: int
    sci_irq: int
    pm1a_event: int
    pm1a_control: int
    pm_timer: int
    reset_port: int
    reset_value: int
    serial: tuple[int, int]  # port, IRQ
    rtc: tuple[int, int]  # port, IRQ
    pvpanic_port: int
    extra_dsdt: Sequence[bytes] = ()
    extra_tables: Sequence[tuple[bytes, bytes]] = ()


def build(description: AcpiDescription, base: int) -> bytes:
    """All tables as they lie from ``base`` on, the RSDP first; ``base`` is 64-byte aligned and below 4 GiB."""
    if base % ALIGNMENT:
        raise ValueError(f"ACPI tables at {base:#x}: must be aligned to {ALIGNMENT} bytes")
    blob = bytearray(RSDP.size)

    def place(table: bytes) -> int:
        """Append ``table``, aligned; its gpa."""
        blob.extend(bytes(-len(blob) % ALIGNMENT))
        blob.extend(table)
        return base + len(blob) - len(table)

    tables = [
        _table(b"FACP", FADT_REVISION, _fadt(description, place(facs()), place(_dsdt(description)))),
        _table(b"APIC", MADT_REVISION, _madt(description)),
        *(_table(signature, EXTRA_REVISION, body) for signature, body in description.extra_tables),
    ]
    gpas = [place(table) for table in tables]
    xsdt = place(_table(b"XSDT", XSDT_REVISION, struct.pack(f"<{len(gpas)}Q", *gpas)))
    blob[: RSDP.size] = _rsdp(xsdt)
    return bytes(blob)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(RSDP.pack(b"RSD PTR ", 0, OEM_ID, RSDP_REVISION, 0, RSDP.size, xsdt, 0))
    rsdp[RSDP_CHECKSUM] = -sum(rsdp[:RSDP_V1_SIZE]) % 256
    rsdp[RSDP_EXTENDED_CHECKSUM] = -sum(rsdp) % 256
    return bytes(rsdp)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    table_id = (b"KVMPY" + signature)[:8]
    length = HEADER.size + len(body)
    table = bytearray(HEADER.pack(signature, length, revision, 0, OEM_ID, table_id, 1, CREATOR_ID, 1) + body)
    table[HEADER_CHECKSUM] = -sum(table) % 256
    return bytes(table)


def _dsdt(description: AcpiDescription) -> bytes:
    devices = dsdt.devices(
        serial=description.serial, rtc=description.rtc, pvpanic=description.pvpanic_port, apic_ids=description.cpus
    )
    return _table(b"DSDT", DSDT_REVISION, b"".join((dsdt.sleep_states(), devices, *description.extra_dsdt)))


def _fadt(description: AcpiDescription, facs_gpa: int, dsdt_gpa: int) -> bytes:
    return fadt(
        facs_gpa=facs_gpa,
        dsdt_gpa=dsdt_gpa,
        sci_irq=description.sci_irq,
        pm1a_event=description.pm1a_event,
        pm1a_control=description.pm1a_control,
        pm_timer=description.pm_timer,
        reset_port=description.reset_port,
        reset_value=description.reset_value,
    )


def _madt(description: AcpiDescription) -> bytes:
    return madt(
        apic_ids=description.cpus,
        lapic=description.lapic,
        ioapic=description.ioapic,
        ioapic_id=description.ioapic_id,
        sci_irq=description.sci_irq,
    )
