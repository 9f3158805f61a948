"""Every difference between two processors is named, and a baseline is what all of them have."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.abi import kvm as abi
from kvmpy.errors import HostError
from kvmpy.kvm import cpu_baseline
from kvmpy.kvm.cpu_baseline import intersection
from kvmpy.kvm.cpu_features import ARCH_CAPABILITIES, NAMES, VOLATILE, Word
from kvmpy.kvm.cpu_model import CpuDescription, differences
from kvmpy.kvm.cpuid import CpuidLeaf, guest_cpuid
from kvmpy.state import load, save
from tests.counts import count

EXAMPLES = count(25, 5000)
INTEL = {"ebx": 0x756E_6547, "ecx": 0x6C65_746E, "edx": 0x4965_6E69}
AMD = {"ebx": 0x6874_7541, "ecx": 0x444D_4163, "edx": 0x6974_6E65}
SAPPHIRE_RAPIDS, SKYLAKE = 0x806F8, 0x50654


def processor(**changes: Any) -> CpuDescription:
    """A server of a few years ago."""
    cpuid = (
        CpuidLeaf(function=0, eax=0x1F, **INTEL),
        CpuidLeaf(function=1, eax=SKYLAKE, ecx=0x7FFE_FBFF, edx=0x0F8B_FBFF),
        CpuidLeaf(function=7, flags=1, ebx=0xD19F_27EB, edx=0x2C00_0000),
        CpuidLeaf(function=7, index=1, flags=1),
        CpuidLeaf(function=0xA, eax=0x0730_0802, edx=0x603),
        CpuidLeaf(function=0xD, flags=1, eax=0x2E7, ebx=0xA88, ecx=0xA88),
        CpuidLeaf(function=0xD, index=1, flags=1, eax=0xF),
        CpuidLeaf(function=0xD, index=2, flags=1, eax=0x100, ebx=0x240),
        CpuidLeaf(function=0xD, index=5, flags=1, eax=0x40, ebx=0x440),
        CpuidLeaf(function=0xD, index=6, flags=1, eax=0x200, ebx=0x480),
        CpuidLeaf(function=0xD, index=7, flags=1, eax=0x400, ebx=0x680),
        CpuidLeaf(function=0xD, index=9, flags=1, eax=8, ebx=0xA80),
        CpuidLeaf(function=0x15, eax=2, ebx=216, ecx=25_000_000),
        CpuidLeaf(function=0x1D, index=1, flags=1),
        CpuidLeaf(function=0x4000_0000, eax=0x4000_0001, ebx=0x4B4D_564B, ecx=0x564B_4D56, edx=0x4D),
        CpuidLeaf(function=0x4000_0001, eax=0x0100_7EFB),
        CpuidLeaf(function=0x8000_0000, eax=0x8000_0008),
        CpuidLeaf(function=0x8000_0001, ecx=0x121, edx=0x2C10_0800),
        CpuidLeaf(function=0x8000_0008, eax=0x302E),
    )
    known: dict[str, Any] = {
        "cpuid": cpuid,
        "msrs": (0x10A, 0x174, 0x175, 0x48, 0x4B56_4D01),
        "feature_msrs": ((0x10A, 0x2B), (0x345, 0x2000), (0x480, 5)),
        "tsc_khz": 2_100_000,
        "xsave_size": 4096,
        "nested_size": 8320,
    }
    return CpuDescription(**(known | changes))


def changed(function: int, index: int = 0, **registers: int) -> CpuDescription:
    made = processor()
    for name, value in registers.items():
        setattr(made.leaves[function, index], name, value)
    return made


def said(*found: str) -> list[str]:
    return [f"{each}: the source's guest has it, this host's KVM does not" for each in found]


def test_a_processor_is_no_different_from_itself() -> None:
    assert differences(processor(), processor()) == []


def test_more_here_is_no_harm() -> None:
    more = changed(7, ebx=0xFFFF_FFFF)
    more.msrs, more.xsave_size, more.nested_size = (*more.msrs, 0x1C9), 11_264, 9000
    assert differences(processor(), more) == []


def test_every_missing_feature_is_named_by_leaf_register_bit_and_name() -> None:
    here = changed(7, ebx=0xD19F_27EB & ~(1 << 5 | 1 << 16), edx=0)
    here.leaves[0x8000_0001, 0].ecx = 1
    here.leaves[0x4000_0001, 0].eax &= ~(1 << 5)
    assert differences(processor(), here) == said(
        "CPUID 7.0 EBX bit 5 (avx2)",
        "CPUID 7.0 EBX bit 16 (avx512f)",
        "CPUID 7.0 EDX bit 26 (spec_ctrl)",
        "CPUID 7.0 EDX bit 27 (intel_stibp)",
        "CPUID 7.0 EDX bit 29 (arch_capabilities)",
        "CPUID 0x40000001 EAX bit 5 (kvm_steal_time)",
        "CPUID 0x80000001 ECX bit 5 (abm)",
        "CPUID 0x80000001 ECX bit 8 (3dnowprefetch)",
    )


def test_a_leaf_that_is_missing_has_no_features() -> None:
    here = processor()
    here.cpuid = tuple(leaf for leaf in here.cpuid if (leaf.function, leaf.index) != (0xD, 1))
    names = ("0 (xsaveopt)", "1 (xsavec)", "2 (xgetbv1)", "3 (xsaves)")
    assert differences(processor(), here) == said(*(f"CPUID 0xd.1 EAX bit {name}" for name in names))


@pytest.mark.parametrize("word", VOLATILE)
def test_bits_that_follow_from_what_the_guest_does_are_not_compared(word: Word) -> None:
    with_it, without = processor(), processor()
    for each, value in ((with_it, 0xFFFF_FFFF), (without, 0xFFFF_FFFF & ~VOLATILE[word])):
        setattr(each.leaves[word.function, word.subleaf], word.register, value)
    assert differences(with_it, without) == []


def by_amd(cpu: CpuDescription) -> None:
    leaf = cpu.leaves[0, 0]
    leaf.ebx, leaf.ecx, leaf.edx = AMD["ebx"], AMD["ecx"], AMD["edx"]


def without_mds_no(cpu: CpuDescription) -> None:
    cpu.feature_msrs = ((0x10A, 0x0B), (0x345, 0x2000), (0x480, 5))


def with_another_layout(cpu: CpuDescription) -> None:
    cpu.leaves[0xD, 9].ebx = 0x980


def with_other_tiles(cpu: CpuDescription) -> None:
    cpu.leaves[0x1D, 1].eax = 7


OTHERS: dict[str, tuple[Callable[[CpuDescription], object], str]] = {
    "vendor": (
        by_amd,
        "CPUID 0: the source's guest has a processor by 'GenuineIntel', this host's is by 'AuthenticAMD'",
    ),
    "msr": (lambda cpu: setattr(cpu, "msrs", cpu.msrs[:-1]), said("MSR 0x4b564d01")[0]),
    "arch capabilities": (without_mds_no, said("MSR 0x10a (ARCH_CAPABILITIES) bit 5 (mds_no)")[0]),
    "tsc": (
        lambda cpu: setattr(cpu, "tsc_khz", 2_101_000),
        "TSC: the source's guest counts at 2100000 kHz, this host at 2101000 kHz, and its KVM cannot scale one to "
        "the other (KVM_CAP_TSC_CONTROL)",
    ),
    "xsave": (
        lambda cpu: setattr(cpu, "xsave_size", 2000),
        "XSAVE: the source's guest has a state of 2696 bytes, this host's KVM takes 2000",
    ),
    "nested": (
        lambda cpu: setattr(cpu, "nested_size", 0),
        "nested guests: the source's guest can have some, their state takes 8320 bytes, and this host's KVM takes 0",
    ),
    "counters": (
        lambda cpu: setattr(cpu.leaves[0xA, 0], "eax", 0x0730_0402),
        "CPUID 0xa EAX: general performance counters: the source's guest has 8, this host's KVM gives 4",
    ),
    "address": (
        lambda cpu: setattr(cpu.leaves[0x8000_0008, 0], "eax", 0x3027),
        "CPUID 0x80000008 EAX: bits of a physical address: the source's guest has 46, this host's KVM gives 39",
    ),
    "xsave layout": (
        with_another_layout,
        "CPUID 0xd.9 (pkru): its state has 8 bytes at 0xa80 for the source's guest, and 8 at 0x980 on this host",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_what_else_a_host_can_lack_is_named(change: Callable[[CpuDescription], object], message: str) -> None:
    here = processor()
    change(here)
    assert differences(processor(), here) == [message]


def test_amx_tiles_are_compared_only_for_a_guest_that_has_them() -> None:
    guest, here = processor(), processor()
    with_other_tiles(here)
    assert differences(guest, here) == []
    for each in (guest, here):
        each.leaves[7, 0].edx |= 1 << 24
    assert differences(guest, here) == ["CPUID 0x1d.1: the source's guest has other AMX tiles than this host"]


@pytest.mark.parametrize(
    ("khz", "control", "blocks"),
    [
        (2_100_525, False, False),
        (2_100_526, False, True),
        (2_099_475, False, False),
        (9_000_000, True, False),
        (0, False, False),
    ],
)
def test_the_tsc_may_differ_by_250_ppm_or_be_scaled(khz: int, control: bool, blocks: bool) -> None:
    here = processor(tsc_khz=khz, tsc_control=control)
    assert bool(differences(processor(), here)) is blocks


def test_every_blocker_is_named_at_once() -> None:
    here = processor()
    independent = [each for name, each in OTHERS.items() if name != "xsave"]
    for change, _ in independent:
        change(here)
    assert sorted(differences(processor(), here)) == sorted(message for _, message in independent)


def test_every_word_has_32_bits_at_most_and_names_like_those_of_linux() -> None:
    assert [word for word, names in NAMES.items() if len(names) > 32] == []
    names = [name for names in NAMES.values() for name in (*names, *ARCH_CAPABILITIES)]
    assert [name for name in names if not re.fullmatch(r"-|[a-z0-9_]+", name)] == []


@pytest.mark.parametrize(
    ("word", "bit", "name"),
    [  # one near the end of each long word: a name left out would move it
        (Word(0x1, 0, "edx"), 31, "pbe"),
        (Word(0x1, 0, "ecx"), 31, "hypervisor"),
        (Word(0x7, 0, "ebx"), 31, "avx512vl"),
        (Word(0x7, 0, "ecx"), 31, "pks"),
        (Word(0x7, 0, "edx"), 31, "spec_ctrl_ssbd"),
        (Word(0x7, 1, "eax"), 26, "lam"),
        (Word(0x7, 1, "edx"), 19, "avx10"),
        (Word(0xD, 0, "eax"), 18, "xtile_data"),
        (Word(0x4000_0001, 0, "eax"), 24, "kvm_clocksource_stable"),
        (Word(0x8000_0001, 0, "edx"), 31, "3dnow"),
        (Word(0x8000_0001, 0, "ecx"), 29, "mwaitx"),
        (Word(0x8000_0007, 0, "edx"), 8, "nonstop_tsc"),
        (Word(0x8000_0008, 0, "ebx"), 31, "brs"),
        (Word(0x8000_000A, 0, "edx"), 25, "vnmi"),
        (Word(0x8000_0021, 0, "eax"), 30, "srso_user_kernel_no"),
    ],
)
def test_names_are_in_their_places(word: Word, bit: int, name: str) -> None:
    assert NAMES[word][bit] == name


@pytest.mark.parametrize(("bit", "name"), [(0, "rdcl_no"), (13, "sbdr_ssdp_no"), (19, "rrsba"), (28, "rfds_clear")])
def test_names_of_arch_capabilities_are_in_their_places(bit: int, name: str) -> None:
    assert ARCH_CAPABILITIES[bit] == name


# Baselines


def newer() -> CpuDescription:
    """With AVX10 and more of everything, another model, and without AVX-512."""
    made = processor(
        msrs=(0x10A, 0x174, 0x175, 0x48, 0x1C9, 0x4B56_4D01),
        feature_msrs=((0x10A, 0x2F), (0x345, 0), (0x480, 5)),
        tsc_khz=2_700_000,
        tsc_control=True,
        xsave_size=11_264,
    )
    leaves = made.leaves
    leaves[1, 0].eax = SAPPHIRE_RAPIDS
    leaves[7, 0].ebx = 0x019C_27EB & ~(1 << 16) | 1 << 29
    leaves[7, 1].eax = 0x10
    leaves[0xA, 0].eax = 0x0830_0602
    leaves[0xD, 0].eax, leaves[0x8000_0008, 0].eax = 0x207, 0x3934
    return made


def test_a_baseline_has_what_all_hosts_have_and_the_oldest_ones_name() -> None:
    found = intersection([("new", newer()), ("old", processor())])
    assert differences(found, processor()) == differences(found, newer()) == []
    leaves = found.leaves
    assert leaves[1, 0].eax == SKYLAKE
    assert leaves[7, 0].ebx == newer().leaves[7, 0].ebx & processor().leaves[7, 0].ebx
    assert leaves[7, 1].eax == 0
    assert leaves[0xA, 0].eax & 0xFFFF == 0x0602
    assert leaves[0x8000_0008, 0].eax == 0x302E
    assert (leaves[0xD, 0].eax, leaves[0xD, 0].ecx) == (0x207, 0xA88)
    assert [n for function, n in leaves if function == 0xD] == [0, 1, 2, 9]
    assert leaves[0x15, 0] == CpuidLeaf(function=0x15), "how fast one host's clock is, is not the fleet's"
    assert found.msrs == (0x48, 0x10A, 0x174, 0x175, 0x4B56_4D01)
    assert (found.tsc_khz, found.tsc_control, found.xsave_size) == (0, False, 4096)


def test_a_weakness_of_one_host_is_one_of_the_baselines() -> None:
    found = dict(intersection([("a", processor()), ("b", newer())]).feature_msrs)
    assert found == {0x10A: 0x2B | 1 << 2, 0x345: 0, 0x480: 5}


def test_hosts_whose_vmx_differs_have_a_baseline_without() -> None:
    other = processor(feature_msrs=((0x10A, 0x2B), (0x480, 6)))
    found = intersection([("a", processor()), ("b", other)])
    assert found.leaves[1, 0].ecx & 1 << 5 == 0
    assert 0x480 not in dict(found.feature_msrs)


def test_hosts_of_two_vendors_have_no_baseline_and_both_are_named() -> None:
    amd = changed(0, **AMD)
    with pytest.raises(HostError, match=r"^b: a processor by 'AuthenticAMD', and a has one by 'GenuineIntel'"):
        intersection([("a", processor()), ("b", amd)])


def test_hosts_that_lay_out_their_state_differently_have_none_either() -> None:
    other = processor()
    with_another_layout(other)
    with pytest.raises(HostError, match=r"^[ab]: CPUID 0xd.9 \(pkru\): its state has 8 bytes"):
        intersection([("a", processor()), ("b", other)])


def test_the_order_of_the_hosts_does_not_matter() -> None:
    assert intersection([("a", processor()), ("b", newer())]) == intersection([("b", newer()), ("a", processor())])


def test_a_host_alone_is_its_own_baseline_but_for_the_clock() -> None:
    found = intersection([("a", processor())])
    assert [leaf for leaf in found.cpuid if leaf.function != 0x15] == [
        leaf for leaf in processor().cpuid if leaf.function != 0x15
    ]


words = st.integers(0, 2**32 - 1)
functions = st.sampled_from(sorted({word.function for word in NAMES} | {0, 4, 0xA, 0xB, 0x15, 0x1D, 0x8000_0000}))
leaves = st.builds(CpuidLeaf, functions, st.integers(0, 3), st.just(1), words, words, words, words)
descriptions = st.builds(
    CpuDescription,
    st.lists(leaves, max_size=12).map(tuple),
    st.lists(words, max_size=4).map(tuple),
    st.lists(st.tuples(st.sampled_from([0x10A, 0x345, 0x480]), st.integers(0, 2**64 - 1)), max_size=3).map(tuple),
    words,
    st.booleans(),
    st.just(0xFFFF_FFFF),  # there is room for what CPUID says, as with any real KVM
    words,
)


@settings(max_examples=EXAMPLES)
@given(descriptions, descriptions)
def test_any_two_descriptions_can_be_compared_and_what_is_no_different_is_one(
    a: CpuDescription, b: CpuDescription
) -> None:
    assert all(isinstance(each, str) for each in differences(a, b))
    assert differences(a, a) == []


@settings(max_examples=EXAMPLES)
@given(descriptions, descriptions)
def test_a_baseline_runs_on_each_of_its_hosts_or_there_is_none(a: CpuDescription, b: CpuDescription) -> None:
    try:
        found = intersection([("a", a), ("b", b)])
    except HostError:
        return
    assert differences(found, a) == differences(found, b) == []
    assert load(CpuDescription, json.loads(cpu_baseline.text(found))) == found


@settings(max_examples=EXAMPLES)
@given(descriptions)
def test_any_baseline_makes_a_table_that_fits(description: CpuDescription) -> None:
    decoded = load(CpuDescription, json.loads(json.dumps(save(description))))
    table = guest_cpuid(decoded.cpuid, 1, 2, tsc_deadline=False)
    abi.Cpuid2.new(nent=len(table), entries=table)
    assert guest_cpuid([CpuidLeaf(**leaf) for leaf in table], 1, 2, tsc_deadline=False) == table


def test_a_file_keeps_a_description(tmp_path: Path) -> None:
    path = str(tmp_path / "host.json")
    cpu_baseline.write(path, processor())
    assert cpu_baseline.read(path) == processor()


def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    """As root that would else be the host's /dev/null."""
    fifo, link, file = tmp_path / "fifo", tmp_path / "link", tmp_path / "host.json"
    os.mkfifo(fifo)
    link.symlink_to(file)
    with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        cpu_baseline.write(str(fifo), processor())
        assert json.loads(reader.read())
    assert fifo.is_fifo()
    cpu_baseline.write(str(link), processor())
    assert link.is_symlink()
    assert cpu_baseline.read(str(file)) == processor()


def test_a_file_that_cannot_be_put_in_its_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "host.json", tmp_path / "other"
    (tmp_path / "host.json.new").symlink_to(other)
    cpu_baseline.write(str(path), processor())
    assert not other.exists(), "written through somebody's link"

    def full(_from: str, _to: str) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(HostError, match=r"host.json: ENOSPC: cannot be written"):
        cpu_baseline.write(str(path), processor(xsave_size=0))
    assert cpu_baseline.read(str(path)) == processor()
    assert {each.name for each in tmp_path.iterdir()} == {"host.json", "host.json.new"}


FILES = {
    "no json": (b"{", "is not JSON"),
    "no text": (b"\xff\xfe", "is not JSON"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "other json": (b"[]", "is no CPU baseline: cpu: a section has exactly the keys name, version and state"),
    "large": (b" " * ((1 << 20) + 1), "more than 1048576 bytes"),
    "newer": (b'{"name": "cpu", "version": 99, "state": {}}', "cpu: version 99 is not one of 1 to"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_baseline_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "fleet.json"
    path.write_bytes(content)
    with pytest.raises(HostError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}"):
        cpu_baseline.read(str(path))


def test_a_file_that_cannot_be_read_or_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"none.json: ENOENT: cannot be read"):
        cpu_baseline.read(str(tmp_path / "none.json"))
    with pytest.raises(HostError, match=r"none/x.json: ENOENT: cannot be written"):
        cpu_baseline.write(str(tmp_path / "none" / "x.json"), processor())
