"""The CPUID a guest sees: what KVM supports, with this vCPU's own topology in it.

One socket, one thread a core, as many cores as vCPUs; a vCPU's APIC id is its index. The leaves of KVM's own
paravirtual interface (0x4000_0000) stay as KVM gives them. Leaves: Intel SDM volume 2 "CPUID", AMD APM volume 3
appendix E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvmpy.abi import kvm as abi
from kvmpy.state import State, u32

TOPOLOGY: Final = (0xB, 0x1F)
ADDRESS_SIZES: Final = 0x8000_0008

# Leaf 1
EDX_HTT: Final = 1 << 28
ECX_X2APIC: Final = 1 << 21
ECX_TSC_DEADLINE: Final = 1 << 24
ECX_HYPERVISOR: Final = 1 << 31
# Leaf 0xB, ECX bits 8 to 15: what the level counts
LEVEL_THREAD: Final = 1
LEVEL_CORE: Final = 2


class CpuidLeaf(State):
    """struct kvm_cpuid_entry2, where it is kept or travels."""

    function: u32 = 0
    index: u32 = 0
    flags: u32 = 0
    eax: u32 = 0
    ebx: u32 = 0
    ecx: u32 = 0
    edx: u32 = 0


Leaf = abi.CpuidEntry2 | CpuidLeaf


def guest_cpuid(supported: Sequence[Leaf], apic_id: int, vcpus: int, *, tsc_deadline: bool) -> list[dict[str, int]]:
    """The table for KVM_SET_CPUID2 of one vCPU of ``vcpus``, as fields of `CpuidEntry2`.

    ``supported`` is what KVM can give, or a table that this made before: then only the APIC id changes.
    """
    table = [_fields(entry) for entry in supported if entry.function not in TOPOLOGY]
    bits = max(vcpus - 1, 0).bit_length()
    for leaf in table:
        match leaf["function"]:
            case 0x1:  # features, APIC id
                leaf["ebx"] = leaf["ebx"] & 0xFFFF | min(vcpus, 255) << 16 | (apic_id & 0xFF) << 24
                leaf["ecx"] |= ECX_HYPERVISOR | ECX_X2APIC
                if tsc_deadline:
                    leaf["ecx"] |= ECX_TSC_DEADLINE
                leaf["edx"] = leaf["edx"] | EDX_HTT if vcpus > 1 else leaf["edx"] & ~EDX_HTT
            case 0x4:  # Intel's caches
                _share_intel_cache(leaf, vcpus)
            case 0x8000_0008:  # AMD's core count
                leaf["ecx"] = leaf["ecx"] & ~0xF0FF | bits << 12 | min(vcpus - 1, 255)
            case 0x8000_001D:  # AMD's caches
                _share_amd_cache(leaf, vcpus)
            case 0x8000_001E:  # AMD's topology
                leaf["eax"], leaf["ebx"], leaf["ecx"] = apic_id, apic_id & 0xFF, 0
    highest = next((leaf["eax"] for leaf in table if leaf["function"] == 0), 0)
    for function in TOPOLOGY:
        if function <= highest:
            table += _topology(function, apic_id, vcpus, bits)
    return table


def address_bits(supported: Sequence[Leaf]) -> int:
    """How many bits a physical address has (MAXPHYADDR); 36 where the processor does not say."""
    return next((entry.eax & 0xFF for entry in supported if entry.function == ADDRESS_SIZES), 36)


def _topology(function: int, apic_id: int, vcpus: int, bits: int) -> list[dict[str, int]]:
    """Extended topology: threads (one a core), then cores, then the level that ends the list."""
    levels = ((0, 1, LEVEL_THREAD), (bits, vcpus, LEVEL_CORE), (0, 0, 0))
    return [
        {
            "function": function,
            "index": index,
            "flags": abi.CPUID_SIGNIFICANT_INDEX,
            "eax": shift,
            "ebx": count,
            "ecx": index | kind << 8,
            "edx": apic_id,
        }
        for index, (shift, count, kind) in enumerate(levels)
    ]


def _share_intel_cache(leaf: dict[str, int], vcpus: int) -> None:
    """Leaf 4: the first two levels belong to one core, the third to the socket; cores in the socket."""
    if leaf["eax"] & 0x1F:
        level = leaf["eax"] >> 5 & 7
        sharing = vcpus - 1 if level >= 3 else 0
        leaf["eax"] = leaf["eax"] & 0x3FFF | sharing << 14 & 0x03FF_C000 | min(vcpus - 1, 63) << 26


def _share_amd_cache(leaf: dict[str, int], vcpus: int) -> None:
    """Leaf 0x8000_001D: the same in AMD's form, which has no count of cores."""
    if leaf["eax"] & 0x1F:
        level = leaf["eax"] >> 5 & 7
        sharing = vcpus - 1 if level >= 3 else 0
        leaf["eax"] = leaf["eax"] & ~0x03FF_C000 | sharing << 14 & 0x03FF_C000


def _fields(entry: Leaf) -> dict[str, int]:
    return {name: getattr(entry, name) for name in abi.CpuidEntry2.__annotations__}
