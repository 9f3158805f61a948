"""What ACPI says of the PCI bus, read and run by ACPICA with the arguments that Linux has."""

from __future__ import annotations

import re
import struct

import pytest
from msgspec.structs import replace

from kvmpy.boot import pci_tables
from kvmpy.boot.acpi import build
from kvmpy.machine import layout
from tests.unit.test_acpi import DESCRIPTION, tables
from tests.unit.test_aml import Acpica, acpica

__all__ = ["acpica"]

MEM64 = layout.mmio64(8 * layout.GIB, 2)
TERMS = pci_tables.dsdt(
    buses=3,
    io=layout.PCI_IO_RANGES,
    mem32=layout.MMIO32,
    mem64=MEM64,
    irqs=layout.PCI_IRQS,
    reserved=(layout.ECAM, layout.IDENTITY_MAP, layout.TSS),
)
DSDT = tables(replace(DESCRIPTION, extra_dsdt=[TERMS]))["DSDT"]

UUID = "(5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66)"
OTHER_UUID = "(6B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66)"
QUERY = 1
SUPPORTED_BY_LINUX = 0x11F  # extended configuration, ASPM, clock PM, segments, MSI, HPX
HOT_PLUG, SHPC, PME, AER, CAPABILITIES, LTR, DPC = (1 << bit for bit in (0, 1, 2, 3, 4, 5, 7))


def buffers(output: str) -> list[bytes]:
    """The buffers that acpiexec shows."""
    found = re.findall(r"\[Buffer\] Length ([0-9A-F]+) =((?:\s*[0-9A-F]+: (?:[0-9A-F]{2} )+.*)+)", output)
    shown = [re.findall(r"^\s*[0-9A-F]+: ((?:[0-9A-F]{2} )+)", lines, re.MULTILINE) for _, lines in found]
    return [bytes.fromhex("".join(lines)) for lines in shown]


def osc(acpica: Acpica, *asked: int, uuid: str = UUID, revision: int = 1) -> tuple[int, ...]:
    """The dwords that _OSC returns for ``asked``."""
    argument = " ".join(f"{byte:02X}" for byte in struct.pack(f"<{len(asked)}I", *asked))
    output = acpica.evaluated(DSDT, f"\\_SB.PCI0._OSC {uuid} {revision} {len(asked)} ({argument})")
    (answer,) = buffers(output)
    return struct.unpack(f"<{len(asked)}I", answer)


def test_the_mcfg_says_where_ecam_is(acpica: Acpica) -> None:
    found = tables(replace(DESCRIPTION, extra_tables=[(b"MCFG", pci_tables.mcfg(layout.ECAM.base, buses=3))]))
    shown = acpica.disassembled(found["MCFG"])
    for expected in ("Base Address : 00000000B0000000", "Segment Group Number : 0000", "Start Bus Number : 00"):
        assert expected in shown
    assert "End Bus Number : 02" in shown


def test_the_host_bridge_is_pci_express_on_bus_0(acpica: Acpica) -> None:
    source = acpica.disassembled(DSDT)
    for expected in (
        'Name (_HID, EisaId ("PNP0A08")',
        'Name (_CID, EisaId ("PNP0A03")',
        "Name (_UID, Zero)",
        "Name (_SEG, Zero)",
        "Name (_BBN, Zero)",
        "Method (_OSC, 4, Serialized)",
    ):
        assert expected in source


def test_the_host_bridges_windows_leave_out_what_configures_the_bus(acpica: Acpica) -> None:
    source = acpica.disassembled(DSDT)
    shown = " ".join(re.sub(r"//.*", "", source[source.index("PCI0") : source.index("MRES")]).split())
    descriptors = re.findall(r"(Word\w+|DWord\w+|QWord\w+) \(([^)]*)", shown)
    ranges = [
        (kind, int(first, 16), int(last, 16))
        for kind, body in descriptors
        for first, last in re.findall(r"0x[0-9A-F]+, 0x([0-9A-F]+), 0x([0-9A-F]+), 0x0+, 0x[0-9A-F]+", body)
    ]
    assert ranges == [
        ("WordBusNumber", 0, 2),
        ("WordIO", 0, 0xCF7),
        ("WordIO", 0xD00, 0xFFFF),
        ("DWordMemory", 0xC000_0000, 0xFEBF_FFFF),
        ("QWordMemory", MEM64.base, MEM64.base + MEM64.size - 1),
    ]
    assert "Prefetchable" not in shown


def test_ecam_and_kvms_own_pages_are_a_motherboards_resources(acpica: Acpica) -> None:
    source = acpica.disassembled(DSDT)
    shown = " ".join(re.sub(r"//.*", "", source[source.index("MRES") :]).split())
    assert 'EisaId ("PNP0C02")' in shown
    assert re.findall(r"Memory32Fixed \(ReadWrite, 0x([0-9A-F]+), 0x([0-9A-F]+),", shown) == [
        ("B0000000", "10000000"),
        ("FEFFC000", "00001000"),
        ("FEFFD000", "00003000"),
    ]


def test_every_pin_of_every_device_is_wired_to_an_interrupt_for_good(acpica: Acpica) -> None:
    output = acpica.evaluated(DSDT, "\\_SB.PCI0._PRT")
    numbers = [int(shown, 16) for shown in re.findall(r"\[Integer\] = ([0-9A-F]+)", output)]
    entries = [tuple(numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
    assert entries == [
        (device << 16 | 0xFFFF, pin, 0, 16 + (device + pin) % 4) for device in range(32) for pin in range(4)
    ]


@pytest.mark.parametrize("query", [0, QUERY])
def test_native_control_is_granted_whether_asked_or_taken(acpica: Acpica, query: int) -> None:
    wanted = HOT_PLUG | PME | AER | CAPABILITIES | LTR
    assert osc(acpica, query, SUPPORTED_BY_LINUX, wanted) == (query, SUPPORTED_BY_LINUX, wanted)


@pytest.mark.parametrize("denied", [SHPC, DPC])
def test_what_there_is_not_is_masked_and_said_so(acpica: Acpica, denied: int) -> None:
    wanted = HOT_PLUG | CAPABILITIES
    assert osc(acpica, QUERY, SUPPORTED_BY_LINUX, wanted | denied) == (QUERY | 0x10, SUPPORTED_BY_LINUX, wanted)


def test_nothing_is_granted_that_was_not_asked_for(acpica: Acpica) -> None:
    assert osc(acpica, 0, SUPPORTED_BY_LINUX, 0) == (0, SUPPORTED_BY_LINUX, 0)


def test_an_unknown_revision_is_said_so_and_answered(acpica: Acpica) -> None:
    assert osc(acpica, 0, SUPPORTED_BY_LINUX, HOT_PLUG, revision=2) == (0x08, SUPPORTED_BY_LINUX, HOT_PLUG)


@pytest.mark.parametrize("asked", [(0,), (0, SUPPORTED_BY_LINUX, HOT_PLUG)])
def test_another_uuid_is_not_recognised_and_nothing_is_touched(acpica: Acpica, asked: tuple[int, ...]) -> None:
    assert osc(acpica, *asked, uuid=OTHER_UUID) == (0x04, *asked[1:])


def test_the_tables_of_the_largest_guest_fit_the_bios_area() -> None:
    description = replace(DESCRIPTION, cpus=range(1024), extra_dsdt=[TERMS], extra_tables=[(b"MCFG", bytes(24))])
    assert len(build(description, layout.LOW_MEMORY.acpi.start)) < len(layout.LOW_MEMORY.acpi)
