"""The machine's map, its run states, and a vCPU's first registers: what must hold of the tables."""

from __future__ import annotations

import errno
from itertools import combinations
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.abi import kvm as abi
from kvmpy.boot.kernel import EntryMode
from kvmpy.boot.plan import Entry
from kvmpy.errors import IoctlError
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine import layout, registers
from kvmpy.machine.layout import (
    GIB,
    HIGH_RAM,
    LOW_RAM_END,
    LOW_RAM_END_1GIB_PAGES,
    Extent,
    is_addressable,
    mmio64,
    ram,
)
from kvmpy.machine.runstate import LEGAL, RunState

PORTS = {
    name: extent
    for name, extent in vars(layout).items()
    if isinstance(extent, Extent) and extent.base < 0x1_0000 and name != "RESET"
}
PAGES = ("ECAM", "MMIO32", "IOAPIC", "LAPIC", "IDENTITY_MAP", "TSS")
TIB = 1 << 40


def overlap(one: Extent, other: Extent) -> bool:
    return one.base < other.base + other.size and other.base < one.base + one.size


@pytest.mark.parametrize(("one", "other"), list(combinations(PORTS, 2)))
def test_no_port_belongs_to_two_devices(one: str, other: str) -> None:
    assert not overlap(PORTS[one], PORTS[other])


def test_the_reset_register_is_inside_the_port_that_owns_it_on_the_bus() -> None:
    assert (layout.PCI_CONFIG.base + 1, 1) == layout.RESET


def test_the_ports_on_the_pci_bus_are_all_but_those_that_configure_it() -> None:
    low, high = layout.PCI_IO_RANGES
    assert (low.base, low.size, high.base + high.size) == (0, layout.PCI_CONFIG.base, 0x1_0000)
    assert high.base == layout.PCI_CONFIG.base + layout.PCI_CONFIG.size
    assert high.base <= layout.PCI_IO.base
    assert layout.PCI_IO.base + layout.PCI_IO.size == high.base + high.size


@pytest.mark.parametrize(("one", "other"), list(combinations(PAGES, 2)))
def test_pages_below_4_gib_are_each_for_one_thing(one: str, other: str) -> None:
    assert not overlap(getattr(layout, one), getattr(layout, other))


@pytest.mark.parametrize("name", PAGES)
def test_pages_below_4_gib_are_aligned_and_never_ram(name: str) -> None:
    extent = getattr(layout, name)
    assert (extent.base % 4096, extent.size % 4096) == (0, 0)
    assert extent.base >= LOW_RAM_END
    assert extent.base + extent.size <= HIGH_RAM


def test_interrupts_are_told_apart_and_are_pins_of_the_ioapic() -> None:
    irqs = (layout.COM1_IRQ, layout.RTC_IRQ, layout.SCI_IRQ, *layout.PCI_IRQS)
    assert len(set(irqs)) == len(irqs) == 7
    assert all(0 < irq < 24 and irq != 2 for irq in irqs)


def test_kvms_own_pages_are_reserved() -> None:
    assert any(
        r.base <= layout.TSS.base and layout.TSS.base + layout.TSS.size <= r.base + r.size for r in layout.RESERVED
    )
    assert any(r.base <= layout.IDENTITY_MAP.base < r.base + r.size for r in layout.RESERVED)


def test_ecam_is_one_mib_for_each_bus_and_reserved() -> None:
    assert (layout.ECAM.base % layout.ECAM.size, layout.ECAM.size) == (0, 256 << 20)
    assert layout.ECAM in layout.RESERVED


@given(st.integers(1, 16 * TIB), st.sampled_from([0, 2 << 20, GIB]))
def test_ram_adds_up_and_leaves_the_hole_free(size: int, huge_page: int) -> None:
    extents = ram(size, huge_page=huge_page)
    assert sum(extent.size for extent in extents) == size
    assert all(extent.size > 0 for extent in extents)
    assert extents[0].base == 0
    assert extents[0].size <= LOW_RAM_END
    assert [extent.base for extent in extents[1:]] == [HIGH_RAM] * (len(extents) - 1)


@pytest.mark.parametrize(
    ("size", "huge_page", "expected"),
    [
        (LOW_RAM_END, 0, [(0, LOW_RAM_END)]),
        (LOW_RAM_END + 4096, 0, [(0, LOW_RAM_END), (HIGH_RAM, 4096)]),
        (2 * GIB, GIB, [(0, 2 * GIB)]),
        (3 * GIB, GIB, [(0, 2 * GIB), (HIGH_RAM, GIB)]),
    ],
)
def test_ram_goes_on_at_4_gib_exactly_where_the_hole_begins(
    size: int, huge_page: int, expected: list[tuple[int, int]]
) -> None:
    assert list(ram(size, huge_page=huge_page)) == expected


@given(st.integers(1, 64))
def test_with_huge_pages_of_1_gib_offset_and_address_agree_modulo_the_page(gibibytes: int) -> None:
    offset = 0
    for extent in ram(gibibytes * GIB, huge_page=GIB):
        assert (extent.base - offset) % GIB == 0
        offset += extent.size
    assert LOW_RAM_END_1GIB_PAGES % GIB == 0


@given(st.integers(1, 16 * TIB), st.integers(0, 255), st.sampled_from([0, 2 << 20, GIB]))
def test_the_64_bit_window_is_above_ram_and_aligned_to_its_size(size: int, ports: int, huge_page: int) -> None:
    base, window = mmio64(size, ports, huge_page=huge_page)
    last = ram(size, huge_page=huge_page)[-1]
    assert max(HIGH_RAM, last.base + last.size) <= base < max(HIGH_RAM, last.base + last.size) + window
    assert (window.bit_count(), base % window) == (1, 0)
    assert (ports + 1) * GIB <= window


@pytest.mark.parametrize(
    ("size", "ports", "huge_page", "expected"),
    [
        (1 * GIB, 0, 0, (4 * GIB, 4 * GIB)),
        (4 * GIB, 3, 0, (8 * GIB, 4 * GIB)),
        (4 * GIB, 4, 0, (8 * GIB, 8 * GIB)),
        (LOW_RAM_END + 4 * GIB, 0, 0, (8 * GIB, 4 * GIB)),
        (LOW_RAM_END + 4 * GIB, 0, GIB, (12 * GIB, 4 * GIB)),  # 1 GiB pages: less of the RAM is below 4 GiB
    ],
)
def test_the_64_bit_window_is_as_low_as_can_be(
    size: int, ports: int, huge_page: int, expected: tuple[int, int]
) -> None:
    assert mmio64(size, ports, huge_page=huge_page) == expected


@pytest.mark.parametrize("size", [1 * GIB, 8 * GIB, 32 * GIB])
@pytest.mark.parametrize("ports", [0, 2, 15])
def test_ordinary_guests_64_bit_window_fits_36_address_bits(size: int, ports: int) -> None:
    assert is_addressable(mmio64(size, ports), 36)


def test_a_window_that_ends_where_the_address_bits_do_is_addressable() -> None:
    assert is_addressable(Extent(60 * GIB, 4 * GIB), 36)
    assert not is_addressable(Extent(64 * GIB, 4 * GIB), 36)


# Run states


def test_every_state_says_where_it_leads() -> None:
    assert LEGAL.keys() == set(RunState)


@pytest.mark.parametrize("state", [state for state in RunState if state is not RunState.SHUTDOWN])
def test_every_state_can_end(state: RunState) -> None:
    assert RunState.SHUTDOWN in LEGAL[state]
    assert state not in LEGAL[state]


def test_nothing_follows_shutdown_and_nothing_leads_back_to_prelaunch() -> None:
    assert LEGAL[RunState.SHUTDOWN] == frozenset()
    assert all(RunState.PRELAUNCH not in states for states in LEGAL.values())


@pytest.mark.parametrize("state", [RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR])
def test_guest_that_failed_does_not_run_again(state: RunState) -> None:
    assert LEGAL[state] == {RunState.SHUTDOWN}


# A vCPU's first registers


def fresh_vcpu() -> Any:
    """Registers as after a processor's reset, as far as it matters: real mode at the reset vector."""
    sregs = abi.Sregs.new(cr0=0x6000_0010, apic_base=0xFEE0_0900)
    sregs.cs.base, sregs.cs.selector = 0xFFFF_0000, 0xF000
    return SimpleNamespace(sregs=sregs, regs=abi.Regs.new(rip=0xFFF0, rdx=0x600))


def enter(mode: EntryMode) -> Any:
    vcpu = fresh_vcpu()
    fields = {"mode": mode, "ip": 0x100_0200, "info": 0x7000, "gdt": 0x500, "page_tables": 0x9000}
    registers.enter(cast(Vcpu, vcpu), Entry(**cast(Any, fields)))
    return vcpu


def test_64_bit_boot_protocol_has_its_registers() -> None:
    vcpu = enter(EntryMode.LINUX64)
    assert (vcpu.regs.rip, vcpu.regs.rsi, vcpu.regs.rflags) == (0x100_0200, 0x7000, 2)
    assert (vcpu.sregs.cr0, vcpu.sregs.cr3, vcpu.sregs.cr4) == (0x8000_0011, 0x9000, 0x20)
    assert vcpu.sregs.efer == 0x500
    assert (vcpu.sregs.cs.l, vcpu.sregs.cs.db) == (1, 0)


def test_pvh_boot_protocol_has_its_registers() -> None:
    vcpu = enter(EntryMode.PVH32)
    assert (vcpu.regs.rip, vcpu.regs.rbx, vcpu.regs.rflags) == (0x100_0200, 0x7000, 2)
    assert (vcpu.sregs.cr0, vcpu.sregs.cr4, vcpu.sregs.efer) == (0x11, 0, 0)
    assert (vcpu.sregs.cs.l, vcpu.sregs.cs.db) == (0, 1)


@pytest.mark.parametrize("mode", EntryMode)
def test_segments_are_flat_and_the_processors_own_settings_stay(mode: EntryMode) -> None:
    sregs = enter(mode).sregs
    segments = [getattr(sregs, name) for name in ("cs", "ds", "es", "fs", "gs", "ss")]
    assert {(s.base, s.limit, s.g, s.present, s.s, s.dpl, s.unusable) for s in segments} == {
        (0, 0xFFFF_FFFF, 1, 1, 1, 0, 0)
    }
    assert [s.type for s in segments] == [0xB, 3, 3, 3, 3, 3]
    assert (sregs.gdt.base, sregs.idt.limit) == (0x500, 0)
    assert sregs.apic_base == 0xFEE0_0900


def test_dump_names_every_register_and_segment() -> None:
    vcpu = enter(EntryMode.LINUX64)
    text = registers.dump(cast(Vcpu, vcpu))
    assert "rip 0000000001000200" in text
    assert "cr3 0000000000009000" in text
    assert "cs 0010 base 0000000000000000 limit ffffffff type b dpl 0 64-bit" in text
    assert all(f"{name} " in text for name in (*abi.Regs.__annotations__, "cr4", "efer", "tr", "gs"))


def test_dump_of_a_vcpu_that_kvm_has_given_up_is_empty() -> None:
    class Dead:
        @property
        def regs(self) -> abi.Regs:
            raise IoctlError("KVM_GET_REGS", errno.EIO)

    assert registers.dump(cast(Vcpu, Dead())) == ""
