"""The CPUID a guest sees: its own topology, and otherwise what KVM supports, for any KVM and any number of vCPUs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.abi import kvm as abi
from kvmpy.kvm.cpuid import EDX_HTT, guest_cpuid
from tests.counts import count

EXAMPLES = count(20, 5000)

REGISTERS = ("eax", "ebx", "ecx", "edx")
TOUCHED = (0x1, 0x4, 0xB, 0x1F, 0x8000_0008, 0x8000_001D, 0x8000_001E)
COUNTS = (1, 2, 3, 4, 5, 8, 63, 64, 65, 128, 200, 254)

words = st.integers(0, 0xFFFF_FFFF) | st.sampled_from([0, 0xFFFF_FFFF])
functions = st.sampled_from([0x0, *TOUCHED, 0x2, 0x7, 0xD, 0x4000_0000, 0x4000_0001, 0x8000_0000]) | words
entries = st.builds(
    lambda function, index, flags, eax, ebx, ecx, edx: abi.CpuidEntry2.new(
        function=function, index=index, flags=flags, eax=eax, ebx=ebx, ecx=ecx, edx=edx
    ),
    functions,
    st.integers(0, 4),
    st.integers(0, 7),
    *[words] * 4,
)


def entry(function: int, index: int = 0, **registers: int) -> abi.CpuidEntry2:
    return abi.CpuidEntry2.new(function=function, index=index, **registers)


def cache(function: int, index: int, level: int, kind: int) -> abi.CpuidEntry2:
    """A cache shared by 8 of 16 logical processors of the host."""
    return entry(function, index, eax=kind | level << 5 | 7 << 14 | 15 << 26, ebx=0x1C0_003F, ecx=0x3F)


# What a KVM on a machine with many cores says, as far as it matters here
SUPPORTED = [
    entry(0x0, eax=0x1F, ebx=0x756E_6547, ecx=0x6C65_746E, edx=0x4965_6E69),
    entry(0x1, eax=0x806F8, ebx=0x2B40_0800, ecx=0x1, edx=EDX_HTT | 1),
    *[cache(0x4, n, level, kind) for n, (level, kind) in enumerate([(1, 1), (1, 2), (2, 3), (3, 3), (0, 0)])],
    entry(0x7, ebx=0xF1BF_07AB),
    entry(0xB, ecx=0x1234, edx=0x99),
    entry(0x1F, ecx=0x1234, edx=0x99),
    entry(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D_564B),
    entry(0x8000_0008, eax=0x3030, ecx=0x0001_F0FF, edx=0x1234),
    *[cache(0x8000_001D, n, level, kind) for n, (level, kind) in enumerate([(1, 1), (1, 2), (2, 3), (3, 3), (0, 0)])],
    entry(0x8000_001E, eax=77, ebx=0x0101, ecx=0x0703),
]


def table_of(apic_id: int, vcpus: int, supported: list[abi.CpuidEntry2] = SUPPORTED) -> dict[tuple[int, int], Any]:
    table = guest_cpuid(supported, apic_id, vcpus, tsc_deadline=True)
    found = {(leaf["function"], leaf["index"]): leaf for leaf in table}
    assert len(found) == len(table)
    return found


@settings(max_examples=EXAMPLES)
@given(st.lists(entries, max_size=12), st.integers(1, 254), st.data(), st.booleans())
def test_every_value_of_every_table_fits_its_register(
    supported: list[abi.CpuidEntry2], vcpus: int, data: Any, tsc_deadline: bool
) -> None:
    table = guest_cpuid(supported, data.draw(st.integers(0, vcpus - 1)), vcpus, tsc_deadline=tsc_deadline)
    assert all(0 <= value <= 0xFFFF_FFFF for leaf in table for value in leaf.values())
    abi.Cpuid2.new(nent=len(table), entries=table)


@settings(max_examples=EXAMPLES)
@given(st.lists(entries, max_size=12), st.integers(1, 254))
def test_every_leaf_that_is_not_about_topology_is_as_kvm_gave_it(supported: list[abi.CpuidEntry2], vcpus: int) -> None:
    table = guest_cpuid(supported, 0, vcpus, tsc_deadline=True)
    kept = [tuple(leaf.values()) for leaf in table if leaf["function"] not in TOUCHED]
    given_ = [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in supported]
    assert kept == [fields for fields in given_ if fields[0] not in TOUCHED]


def test_kvms_table_itself_is_left_alone() -> None:
    before = [bytes(abi_bytes(e)) for e in SUPPORTED]
    guest_cpuid(SUPPORTED, 3, 8, tsc_deadline=True)
    assert [bytes(abi_bytes(e)) for e in SUPPORTED] == before


def abi_bytes(e: Any) -> list[int]:
    return [byte for register in REGISTERS for byte in getattr(e, register).to_bytes(4, "little")]


@pytest.mark.parametrize("vcpus", COUNTS)
def test_each_vcpu_finds_its_own_apic_id_everywhere(vcpus: int) -> None:
    tables = [table_of(apic_id, vcpus) for apic_id in range(vcpus)]
    assert [table[0x1, 0]["ebx"] >> 24 for table in tables] == list(range(vcpus))
    assert [table[0xB, 0]["edx"] for table in tables] == list(range(vcpus))
    assert [table[0x1F, 1]["edx"] for table in tables] == list(range(vcpus))
    assert [table[0x8000_001E, 0]["eax"] for table in tables] == list(range(vcpus))
    assert [table[0x8000_001E, 0]["ebx"] for table in tables] == list(range(vcpus))


@pytest.mark.parametrize("function", [0xB, 0x1F])
@pytest.mark.parametrize("vcpus", COUNTS)
def test_extended_topology_is_one_thread_a_core_and_one_socket(function: int, vcpus: int) -> None:
    table = table_of(vcpus - 1, vcpus)
    threads, cores, end = (table[function, index] for index in range(3))
    assert (threads["eax"], threads["ebx"], threads["ecx"]) == (0, 1, 0x100)
    assert (cores["ebx"], cores["ecx"]) == (vcpus, 0x201)
    assert (end["eax"], end["ebx"], end["ecx"]) == (0, 0, 2)
    assert (vcpus - 1) >> cores["eax"] == 0
    assert cores["eax"] == 0 or (vcpus - 1) >> (cores["eax"] - 1) == 1
    assert all(leaf["flags"] == abi.CPUID_SIGNIFICANT_INDEX for leaf in (threads, cores, end))


def test_topology_leaves_beyond_the_highest_leaf_are_left_out() -> None:
    table = table_of(0, 2, [entry(0x0, eax=0xD), entry(0xB), entry(0x1F)])
    assert sorted({function for function, _ in table}) == [0x0, 0xB]
    assert sorted(table_of(0, 2, [entry(0x0, eax=0x5), entry(0xB)])) == [(0, 0)]
    assert table_of(0, 2, []) == {}


@pytest.mark.parametrize("vcpus", COUNTS)
def test_feature_leaf_counts_the_logical_processors(vcpus: int) -> None:
    leaf = table_of(0, vcpus)[0x1, 0]
    assert leaf["ebx"] >> 16 & 0xFF == vcpus
    assert leaf["ebx"] & 0xFFFF == 0x0800
    assert bool(leaf["edx"] & EDX_HTT) is (vcpus > 1)
    assert leaf["edx"] & ~EDX_HTT == 1


def test_guest_sees_a_hypervisor_an_x2apic_and_the_deadline_timer_where_there_is_one() -> None:
    def features(*, tsc_deadline: bool) -> int:
        return guest_cpuid([entry(0x1, ecx=0x1)], 0, 1, tsc_deadline=tsc_deadline)[0]["ecx"]

    assert features(tsc_deadline=True) == 1 << 31 | 1 << 24 | 1 << 21 | 1
    assert features(tsc_deadline=False) == 1 << 31 | 1 << 21 | 1


@pytest.mark.parametrize("function", [0x4, 0x8000_001D])
@pytest.mark.parametrize("vcpus", COUNTS)
def test_caches_of_a_core_are_its_own_and_the_last_is_everybodys(function: int, vcpus: int) -> None:
    table = table_of(0, vcpus)
    assert [table[function, index]["eax"] >> 14 & 0xFFF for index in range(4)] == [0, 0, 0, vcpus - 1]


@pytest.mark.parametrize("vcpus", COUNTS)
def test_intels_cache_leaf_counts_the_cores_as_far_as_its_six_bits_go(vcpus: int) -> None:
    table = table_of(0, vcpus)
    assert [table[0x4, index]["eax"] >> 26 for index in range(4)] == [min(vcpus - 1, 63)] * 4


@pytest.mark.parametrize("function", [0x4, 0x8000_001D])
def test_caches_keep_their_kind_level_and_size_and_the_end_of_the_list_ends_it(function: int) -> None:
    table = table_of(0, 4)
    assert [table[function, index]["eax"] & 0x3FFF for index in range(4)] == [0x21, 0x22, 0x43, 0x63]
    assert [table[function, index]["ebx"] for index in range(4)] == [0x1C0_003F] * 4
    assert table[function, 4]["eax"] & 0x1F == 0


@pytest.mark.parametrize("vcpus", COUNTS)
def test_amds_core_count_has_room_for_every_apic_id(vcpus: int) -> None:
    leaf = table_of(0, vcpus)[0x8000_0008, 0]
    assert leaf["ecx"] & 0xFF == vcpus - 1
    assert 1 << (leaf["ecx"] >> 12 & 0xF) >= vcpus
    assert leaf["ecx"] & ~0xF0FF == 0x0001_0000
    assert (leaf["eax"], leaf["edx"]) == (0x3030, 0x1234)


def test_amds_topology_is_one_thread_a_core_on_one_node() -> None:
    leaf = table_of(5, 8)[0x8000_001E, 0]
    assert (leaf["ebx"] >> 8, leaf["ecx"]) == (0, 0)
