"""AML terms, by the grammar and by ACPICA, which disassembles, recompiles and runs what the emitter makes."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.boot import aml, resources
from tests.conftest import skip_or_fail

PCI_HOST_BRIDGE_UUID = "33DB4D5B-1FF7-401C-9657-7441C03DD766"


class Acpica:
    """Intel's iasl and acpiexec, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def disassembled(self, table: bytes) -> str:
        """``table`` as source, which was compiled again without a complaint."""
        path = self.directory / "table.dat"
        path.write_bytes(table)
        self._run("iasl", "-d", path)
        source = path.with_suffix(".dsl")
        assert re.search(r"0 Errors, 0 Warnings", self._run("iasl", source))
        return source.read_text()

    def evaluated(self, table: bytes, *commands: str) -> str:
        """What acpiexec prints for each "PATH ARGUMENTS"."""
        path = self.directory / "table.aml"
        path.write_bytes(table)
        # Without the last, it waits a second for more.
        batch = [*(f"evaluate {command}" for command in commands), "quit"]
        output = self._run("acpiexec", "-b", "; ".join(batch), path)
        return output.partition("Evaluating")[2]

    def _run(self, *command: str | Path) -> str:
        done = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert not re.search(r"ACPI (BIOS )?(Error|Warning)|^Error|^Warning|AE_[A-Z]", output, re.MULTILINE), output
        return output


@pytest.fixture
def acpica(tmp_path: Path) -> Acpica:
    if not (shutil.which("iasl") and shutil.which("acpiexec")):
        skip_or_fail("acpica", "needs iasl and acpiexec: install acpica-tools")
    return Acpica(tmp_path)


def block(*terms: bytes) -> bytes:
    """A DSDT of ``terms``."""
    body = b"".join(terms)
    header = struct.pack("<4sIBB6s8sI4sI", b"DSDT", 36 + len(body), 2, 0, b"KVMPY ", b"KVMPYTST", 1, b"KVMP", 1)
    table = bytearray(header + body)
    table[9] = -sum(table) % 256
    return bytes(table)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (0xFFFF_FFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "ff"),
    ],
)
def test_an_integer_takes_the_shortest_constant(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_an_integer_has_64_bits(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("CDW1", b"CDW1"),
        ("RTC", b"RTC_"),
        ("\\", b"\\\0"),
        ("\\_SB", b"\\_SB_"),
        ("^^PCI0", b"^^PCI0"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("\\_SB.PCI0.RP1", b"\\\x2f\x03_SB_PCI0RP1_"),
    ],
)
def test_a_name_is_a_path_of_padded_segments(name: str, encoded: bytes) -> None:
    assert aml.path(name) == encoded


@pytest.mark.parametrize("name", ["", "com1", "COM12", "1COM", "A..B", "\\\\A", "\\^A", "A.", "É"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        aml.path(name)


REFUSALS: dict[str, Callable[[], bytes]] = {
    "NUL": lambda: aml.string("a\0b"),
    "EISA id": lambda: aml.eisa_id("PNP050"),
    "UUID": lambda: aml.to_uuid("33DB4D5B"),
    "8 arguments": lambda: aml.method("M", 8),
    "number 8 of 8": lambda: aml.local(8),
    "number 7 of 7": lambda: aml.arg(7),
    "too many": lambda: aml.buffer(bytes(1 << 28)),
}


@pytest.mark.parametrize("text", REFUSALS)
def test_what_aml_cannot_say_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        REFUSALS[text]()


def test_an_eisa_id_is_compressed() -> None:
    assert aml.eisa_id("PNP0501") == b"\x0c\x41\xd0\x05\x01"


def package_length(term: bytes) -> tuple[int, int]:
    """The PkgLength that follows the first byte of ``term``, and its width: ACPI 6.5, section 20.2.4."""
    more = term[1] >> 6
    low = term[1] & (0xF if more else 0x3F)
    return low | int.from_bytes(term[2 : 2 + more], "little") << 4, 1 + more


@pytest.mark.parametrize(("limit", "width"), [(0x3F, 1), (0xFFF, 2), (0xF_FFFF, 3)])
def test_a_package_length_grows_when_it_must(limit: int, width: int) -> None:
    def filler(size: int) -> bytes:
        return aml.else_(bytes(size))

    assert package_length(filler(limit - width)) == (limit, width)
    assert package_length(filler(limit - width + 1)) == (limit + 2, width + 1)


@given(size=st.integers(0, 0x12_0000))
def test_a_package_length_counts_all_behind_the_opcode(size: int) -> None:
    term = aml.else_(bytes(size))
    length, width = package_length(term)
    assert length == len(term) - 1
    assert term[1 + width :] == bytes(size)


def test_acpica_reads_buffers_of_every_width(acpica: Acpica) -> None:
    table = block(*(aml.name(f"B{size:03X}", aml.buffer(bytes(size))) for size in (8, 0x3C, 0x40, 0xFF8, 0xFFF)))
    output = acpica.evaluated(table, "B008", "B03C", "B040", "BFF8", "BFFF")
    assert re.findall(r"\[Buffer\] Length ([0-9A-F]+)", output) == ["08", "3C", "40", "FF8", "FFF"]


def test_acpica_reads_back_every_integer(acpica: Acpica) -> None:
    values = [0, 1, 2, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1]
    output = acpica.evaluated(block(aml.name("INTS", aml.package(*values))), "INTS")
    assert [int(shown, 16) for shown in re.findall(r"\[Integer\] = ([0-9A-F]+)", output)] == values


def test_acpica_reads_back_every_resource(acpica: Acpica) -> None:
    source = acpica.disassembled(
        block(
            aml.device(
                "DEV0",
                aml.name("_HID", aml.eisa_id("PNP0A08")),
                aml.name(
                    "_CRS",
                    resources.template(
                        resources.io(0xCF8, 8),
                        resources.irq_no_flags(4, 9),
                        resources.interrupt([9, 20], shared=True),
                        resources.interrupt([5], edge=True, active_low=True),
                        resources.memory32_fixed(0xFED0_0000, 0x1000),
                        resources.memory32_fixed(0xFED1_0000, 0x1000, writable=False),
                        resources.word_bus_number(0, 256),
                        resources.word_io(0x0D00, 0xF300),
                        resources.dword_io(0x0, 0x0CF8),
                        resources.dword_memory(0xC000_0000, 0x3EC0_0000),
                        resources.qword_memory(0x80_0000_0000, 0x80_0000_0000, prefetchable=True),
                    ),
                ),
            )
        )
    )
    shown = " ".join(re.sub(r"//.*", "", source).split())
    assert "IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08, )" in shown
    assert "IRQNoFlags () {4,9}" in shown
    assert "Interrupt (ResourceConsumer, Level, ActiveHigh, Shared, ,, ) { 0x00000009, 0x00000014, }" in shown
    assert "Interrupt (ResourceConsumer, Edge, ActiveLow, Exclusive, ,, ) { 0x00000005, }" in shown
    assert "Memory32Fixed (ReadWrite, 0xFED00000, 0x00001000, )" in shown
    assert "Memory32Fixed (ReadOnly, 0xFED10000, 0x00001000, )" in shown
    fixed = "MinFixed, MaxFixed, PosDecode"
    assert f"WordBusNumber (ResourceProducer, {fixed}, 0x0000, 0x0000, 0x00FF, 0x0000, 0x0100," in shown
    assert f"WordIO (ResourceProducer, {fixed}, EntireRange, 0x0000, 0x0D00, 0xFFFF, 0x0000, 0xF300," in shown
    assert f"DWordIO (ResourceProducer, {fixed}, EntireRange, 0x00000000, 0x00000000, 0x00000CF7," in shown
    assert "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite," in shown
    assert "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Prefetchable, ReadWrite," in shown
    assert "0x0000000000000000, 0x0000008000000000, 0x000000FFFFFFFFFF, 0x0000000000000000," in shown


def host_bridge() -> bytes:
    """A PCI host bridge with an interrupt routing table and an _OSC that grants what 0x1D has."""
    error = aml.or_(aml.path("CDW1"), 4, aml.path("CDW1"))
    reduced = aml.or_(aml.path("CDW1"), 0x10, aml.path("CDW1"))
    return block(
        aml.scope(
            "\\_SB",
            aml.device(
                "PCI0",
                aml.name("_HID", aml.eisa_id("PNP0A08")),
                aml.name("_CID", aml.eisa_id("PNP0A03")),
                aml.name("_SEG", 0),
                aml.name("_PRT", aml.package(aml.package(0x1_FFFF, 0, 0, 16), aml.package(0x1_FFFF, 1, 0, 17))),
                aml.method(
                    "_OSC",
                    4,
                    aml.create_dword_field(aml.arg(3), 0, "CDW1"),
                    aml.if_(
                        aml.lequal(aml.arg(0), aml.to_uuid(PCI_HOST_BRIDGE_UUID)),
                        aml.create_dword_field(aml.arg(3), 8, "CDW3"),
                        aml.and_(aml.path("CDW3"), 0x1D, aml.local(0)),
                        aml.if_(aml.lnot(aml.lequal(aml.path("CDW3"), aml.local(0))), reduced),
                        aml.store(aml.local(0), aml.path("CDW3")),
                    ),
                    aml.else_(error),
                    aml.return_(aml.arg(3)),
                    serialized=True,
                ),
            ),
        )
    )


def test_acpica_shows_a_pci_host_bridge_as_it_was_meant(acpica: Acpica) -> None:
    source = acpica.disassembled(host_bridge())
    assert f'ToUUID ("{PCI_HOST_BRIDGE_UUID.lower()}")' in source
    assert 'EisaId ("PNP0A08")' in source
    assert "Method (_OSC, 4, Serialized)" in source
    assert "Local0 = (CDW3 & 0x1D)" in source


def test_acpica_runs_an_osc_method_to_both_ends(acpica: Acpica) -> None:
    uuid = "(5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66)"
    asked = "(00 00 00 00 00 00 00 00 FF 00 00 00)"
    output = acpica.evaluated(
        host_bridge(), f"\\_SB.PCI0._OSC {uuid} 1 3 {asked}", f"\\_SB.PCI0._OSC (00) 1 3 {asked}", "\\_SB.PCI0._PRT"
    )
    granted, refused = re.findall(r"0000: ([0-9A-F ]{35})", output)
    assert bytes.fromhex(granted) == struct.pack("<III", 0x10, 0, 0x1D)
    assert bytes.fromhex(refused) == struct.pack("<III", 0x04, 0, 0xFF)
    assert "000000000001FFFF" in output
