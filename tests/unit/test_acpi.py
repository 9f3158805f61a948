"""The ACPI tables: linked, summed, and read by ACPICA as they were meant."""

from __future__ import annotations

import re
import struct

import pytest
from msgspec.structs import replace

from kvmpy.boot import aml
from kvmpy.boot.acpi import AcpiDescription, build
from tests.unit.test_aml import Acpica, acpica

__all__ = ["acpica"]

BASE = 0xE_0000
DESCRIPTION = AcpiDescription(
    cpus=(0, 1),
    lapic=0xFEE0_0000,
    ioapic=0xFEC0_0000,
    ioapic_id=0,
    sci_irq=9,
    pm1a_event=0x600,
    pm1a_control=0x604,
    pm_timer=0x608,
    reset_port=0xCF9,
    reset_value=6,
    serial=(0x3F8, 4),
    rtc=(0x70, 8),
    pvpanic_port=0x505,
)


def table_at(blob: bytes, gpa: int) -> bytes:
    (size,) = struct.unpack_from("<I", blob, gpa - BASE + 4)
    return blob[gpa - BASE : gpa - BASE + size]


def tables(description: AcpiDescription = DESCRIPTION) -> dict[str, bytes]:
    """The tables as an operating system finds them: from the RSDP."""
    blob = build(description, BASE)
    (xsdt_at,) = struct.unpack_from("<Q", blob, 24)
    xsdt = table_at(blob, xsdt_at)
    found = {
        table[:4].decode(): table for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]) if (table := table_at(blob, gpa))
    }
    facs_at, dsdt_at = struct.unpack_from("<II", found["FACP"], 36)
    return {**found, "XSDT": xsdt, "FACS": table_at(blob, facs_at), "DSDT": table_at(blob, dsdt_at)}


def test_the_rsdp_is_where_a_scan_of_the_bios_area_finds_it() -> None:
    blob = build(DESCRIPTION, BASE)
    assert blob.startswith(b"RSD PTR ")
    assert (sum(blob[:20]) % 256, sum(blob[:36]) % 256) == (0, 0)
    assert struct.unpack_from("<BII", blob, 15) == (2, 0, 36)


def test_tables_are_found_from_the_rsdp() -> None:
    assert sorted(tables()) == ["APIC", "DSDT", "FACP", "FACS", "XSDT"]


@pytest.mark.parametrize("signature", ["APIC", "DSDT", "FACP", "XSDT"])
def test_each_table_sums_to_zero_and_is_ours(signature: str) -> None:
    table = tables()[signature]
    assert sum(table) % 256 == 0
    assert table[10:24] == b"KVMPY " + (b"KVMPY" + signature.encode())[:8]


def test_the_facs_is_aligned() -> None:
    facs_at = struct.unpack_from("<I", tables()["FACP"], 36)[0]
    assert facs_at % 64 == 0
    assert len(tables()["FACS"]) == 64


def test_a_base_that_is_not_aligned_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="0xe0010"):
        build(DESCRIPTION, BASE + 16)


def fields(source: str) -> dict[str, str]:
    """``name : value`` of a disassembled data table; of a name that occurs again, the first."""
    pairs = re.findall(r"^(?:\[[^]]*\])? +(.*?) : (.*?)\s*$", source, re.MULTILINE)
    return dict(reversed(pairs))


def test_acpica_reads_the_fadt(acpica: Acpica) -> None:
    fadt = tables()["FACP"]
    shown = fields(acpica.disassembled(fadt))
    expected = {
        "Revision": "06",
        "SCI Interrupt": "0009",
        "SMI Command Port": "00000000",
        "PM1A Event Block Address": "00000600",
        "PM1A Control Block Address": "00000604",
        "PM Timer Block Address": "00000608",
        "PM1 Event Block Length": "04",
        "PM1 Control Block Length": "02",
        "PM Timer Block Length": "04",
        "RTC Century Index": "32",
        "Boot Flags (decoded below)": "0005",
        "Legacy Devices Supported (V2)": "1",
        "8042 Present on ports 60/64 (V2)": "0",
        "VGA Not Present (V4)": "1",
        "MSI Not Supported (V4)": "0",
        "WBINVD instruction is operational (V1)": "1",
        "All CPUs support C1 (V1)": "1",
        "Control Method Power Button (V1)": "0",
        "Control Method Sleep Button (V1)": "1",
        "RTC wake not in fixed reg space (V1)": "1",
        "32-bit PM Timer (V1)": "1",
        "Reset Register Supported (V2)": "1",
        "Hardware Reduced (V5)": "0",
        "Value to cause reset": "06",
        "Hypervisor ID": "00000059504D564B",
    }
    assert len(fadt) == 276
    assert {name: shown.get(name) for name in expected} == expected


def test_the_64_bit_registers_of_the_fadt_repeat_the_32_bit_ones() -> None:
    fadt = tables()["FACP"]
    event, control, timer = (struct.unpack_from("<BBBBQ", fadt, offset) for offset in (148, 172, 208))
    assert event == (1, 32, 0, 2, 0x600)
    assert control == (1, 16, 0, 2, 0x604)
    assert timer == (1, 32, 0, 3, 0x608)
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0xCF9)


def test_acpica_reads_the_madt(acpica: Acpica) -> None:
    shown = acpica.disassembled(tables()["APIC"])
    assert shown.count("[Processor Local APIC]") == 2
    assert "Local Apic Address : FEE00000" in shown
    assert "PC-AT Compatibility : 1" in shown
    assert re.search(r"\[I/O APIC\].*?I/O Apic ID : 00.*?Address : FEC00000.*?Interrupt : 00000000", shown, re.DOTALL)
    assert re.search(r"Source : 00\n.*?Interrupt : 00000002\n.*?\(decoded below\) : 0000", shown)
    assert re.search(r"Source : 09\n.*?Interrupt : 00000009\n.*?\(decoded below\) : 000D", shown)
    assert re.search(r"\[Local APIC NMI\].*?Processor ID : FF.*?LINT : 01", shown, re.DOTALL)
    assert "x2APIC" not in shown


def test_processors_beyond_the_xapic_are_x2apic_entries(acpica: Acpica) -> None:
    shown = acpica.disassembled(tables(replace(DESCRIPTION, cpus=(0, 254, 255, 300)))["APIC"])
    assert shown.count("[Processor Local APIC]") == 2
    assert re.findall(r"Processor x2Apic ID : ([0-9A-F]+)", shown) == ["000000FF", "0000012C"]
    assert re.search(r"\[Local x2APIC NMI\].*?Processor UID : FFFFFFFF.*?LINT : 01", shown, re.DOTALL)


def test_acpica_reads_the_devices(acpica: Acpica) -> None:
    source = acpica.disassembled(tables()["DSDT"])
    assert source.count('Name (_HID, "ACPI0007"') == 2
    assert 'Name (_HID, EisaId ("PNP0501")' in source
    assert 'Name (_HID, EisaId ("PNP0B00")' in source
    assert 'Name (_HID, "QEMU0001")' in source


def test_acpica_evaluates_soft_off_and_the_devices(acpica: Acpica) -> None:
    devices = [f"\\_SB.{device}.{name}" for device in ("COM1", "RTC", "PEVT") for name in ("_STA", "_CRS")]
    output = acpica.evaluated(tables()["DSDT"], "\\_S5", *devices, "\\_SB.C001._UID")
    integers = [int(shown, 16) for shown in re.findall(r"\[Integer\] = ([0-9A-F]+)", output)]
    assert integers == [5, 5, 0, 0, 0xF, 0xF, 0xF, 1]
    descriptors = [shown.split() for shown in re.findall(r"0000: ((?:[0-9A-F]{2} )+)", output)]
    assert ["".join(shown) for shown in descriptors] == [
        "4701F803F8030108" + "221000" + "7900",
        "4701700070000102" + "220001" + "7900",
        "4701050505050101" + "7900",
    ]


def test_the_machine_can_add_devices_and_tables(acpica: Acpica) -> None:
    device = aml.scope("\\_SB", aml.device("PCI0", aml.name("_HID", aml.eisa_id("PNP0A08"))))
    segment = struct.pack("<8xQHBB4x", 0xB000_0000, 0, 0, 255)
    found = tables(replace(DESCRIPTION, extra_dsdt=[device], extra_tables=[(b"MCFG", segment)]))
    assert "Base Address : 00000000B0000000" in acpica.disassembled(found["MCFG"])
    assert "Device (PCI0)" in acpica.disassembled(found["DSDT"])


def test_the_tables_of_the_largest_guest_fit_the_bios_area() -> None:
    assert len(build(replace(DESCRIPTION, cpus=range(1024)), BASE)) < 0x2_0000
