"""What a guest has been told of its processor, and whether another host can go on with that.

    source = describe_guest(vcpu)                  # of the machine that leaves, into the stream's header
    problems = differences(source, describe_host(vcpu))
    adopt(vcpus, source)                           # at the destination, before any vCPU has run

The guest keeps the CPUID it was started with for as long as it lives, wherever it goes: what is compared is whether
this host's KVM can do all of it. More is no harm. Models, steppings, caches and brand strings are told and not
compared: no instruction depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Final

from msgspec import Meta

from kvmpy.errors import IoctlError
from kvmpy.kvm import msrs, tsc
from kvmpy.kvm.cpu_features import ARCH_CAPABILITIES, COUNTS, INVERTED, NAMES, VOLATILE, Word, leaf_text
from kvmpy.kvm.cpuid import CpuidLeaf, guest_cpuid
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vcpu_registers import MOST_MSRS, Pair
from kvmpy.kvm.vcpu_state import nested_size, saved_msrs, set_msrs, xsave_size
from kvmpy.state import State, StateError, u32

MOST_LEAVES: Final = 1024
TOLERANCE_PPM: Final = 250  # KVM's own tsc_tolerance_ppm
SOURCE: Final = "the source's guest"
XSAVE: Final = 0xD
# Leaves whose registers describe a format: all of them the same, or what is behind them does not work.
FORMATS: Final = {0x1D: Word(0x7, 0, "edx"), 0x1E: Word(0x7, 0, "edx")}
AMX_TILE: Final = 1 << 24
# Without FEATURE_CONTROL, which the guest's firmware sets
FEATURES: Final = tuple(index for index in msrs.FEATURES if index != msrs.FEATURE_CONTROL)

Key = tuple[int, int]


class CpuDescription(State):
    """A processor: that of a guest, or the most that a host can give one.

    ``cpuid`` is vCPU 0's. ``msrs`` are those that make up its state, ``feature_msrs`` the values of those that say what
    it can do. ``tsc_khz`` is 0 where it is not known; ``nested_size`` 0 where a guest can have no guests.
    """

    NAME: ClassVar = "cpu"

    cpuid: Annotated[tuple[CpuidLeaf, ...], Meta(max_length=MOST_LEAVES)] = ()
    msrs: Annotated[tuple[u32, ...], Meta(max_length=MOST_MSRS)] = ()
    feature_msrs: Annotated[tuple[Pair, ...], Meta(max_length=MOST_MSRS)] = ()
    tsc_khz: u32 = 0
    tsc_control: bool = False
    xsave_size: u32 = 0
    nested_size: u32 = 0

    @property
    def leaves(self) -> dict[Key, CpuidLeaf]:
        """By function and index; of two alike, the first."""
        found: dict[Key, CpuidLeaf] = {}
        for leaf in self.cpuid:
            found.setdefault((leaf.function, leaf.index), leaf)
        return found

    @property
    def vendor(self) -> str:
        """ "GenuineIntel", "AuthenticAMD"; empty where leaf 0 is missing."""
        leaf = self.leaves.get((0, 0), CpuidLeaf())
        text = b"".join(word.to_bytes(4, "little") for word in (leaf.ebx, leaf.edx, leaf.ecx))
        return text.decode("ascii", "replace").strip("\0")


def describe_guest(vcpu: Vcpu) -> CpuDescription:
    """The processor that the guest of ``vcpu`` has. Raises IoctlError."""
    return _describe(vcpu, vcpu.cpuid, vcpu.get_msrs(list(FEATURES)))


def describe_host(vcpu: Vcpu, vcpus: int = 1) -> CpuDescription:
    """The most that this host's KVM can give ``vcpus`` vCPUs; ``vcpu``, not run yet, is to ask. Raises IoctlError."""
    system = vcpu.vm.system
    tsc_deadline = bool(system.check("KVM_CAP_TSC_DEADLINE_TIMER"))
    table = guest_cpuid(system.supported_cpuid(), 0, vcpus, tsc_deadline=tsc_deadline)
    features = system.feature_msrs()
    return _describe(vcpu, table, {index: features[index] for index in FEATURES if index in features})


def _describe(vcpu: Vcpu, table: list[dict[str, int]], features: dict[int, int]) -> CpuDescription:
    return CpuDescription(
        cpuid=tuple(CpuidLeaf(**leaf) for leaf in table),
        msrs=tuple(sorted(vcpu.get_msrs(saved_msrs(vcpu)))),
        feature_msrs=tuple(sorted(features.items())),
        tsc_khz=tsc.khz(vcpu),
        tsc_control=bool(vcpu.vm.check("KVM_CAP_TSC_CONTROL")),
        xsave_size=xsave_size(vcpu),
        nested_size=nested_size(vcpu),
    )


def adopt(vcpus: Sequence[Vcpu], cpu: CpuDescription) -> None:
    """Make the vCPUs' processors that of ``cpu``: CPUID (but each its own APIC id), features, MSRs that are saved.

    None of them has run. Raises StateError or IoctlError where KVM refuses.
    """
    for vcpu in vcpus:
        # tsc_deadline: the table has the bit, or the guest was never told of it
        table = guest_cpuid(cpu.cpuid, vcpu.index, len(vcpus), tsc_deadline=False)
        try:
            vcpu.set_cpuid(table)
        except IoctlError as e:
            raise IoctlError(f"vCPU {vcpu.index}: {e.request}", e.errno or 0) from e
        features = {index: value for index, value in cpu.feature_msrs if index in FEATURES}
        try:
            set_msrs(vcpu, features)
        except StateError as e:
            raise StateError(f"vCPU {vcpu.index}: {e}") from e
        vcpu.msr_limit = frozenset(cpu.msrs)


def differences(wanted: CpuDescription, here: CpuDescription, whose: str = SOURCE) -> list[str]:
    """Everything that ``wanted``, which ``whose`` names, has and ``here`` does not; empty where it can go on here."""
    return [
        *_vendor(wanted, here, whose),
        *_features(wanted, here, whose),
        *_counts(wanted, here, whose),
        *_layouts(wanted, here, whose),
        *_msrs(wanted, here, whose),
        *_tsc(wanted, here, whose),
        *_sizes(wanted, here, whose),
    ]


def _vendor(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    if wanted.vendor != here.vendor:
        yield f"CPUID 0: {whose} has a processor by {_shown(wanted.vendor)}, this host's is by {_shown(here.vendor)}"


def _shown(vendor: str) -> str:
    return repr(vendor[:12])


def missing_bits(wanted: CpuDescription, here: CpuDescription) -> Iterator[tuple[Word, int]]:
    """Each feature that ``wanted`` has and ``here`` does not: its word, and the bit's number."""
    mine, theirs = here.leaves, wanted.leaves
    for word in NAMES:
        needed = _word(theirs, word) & ~_word(mine, word) & ~VOLATILE.get(word, 0)
        yield from ((word, bit) for bit in range(32) if needed >> bit & 1)


def _word(leaves: dict[Key, CpuidLeaf], word: Word) -> int:
    leaf = leaves.get((word.function, word.subleaf))
    return getattr(leaf, word.register) if leaf is not None else 0


def _features(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    for word, bit in missing_bits(wanted, here):
        yield f"{word.bit(bit)}: {whose} has it, this host's KVM does not"
    theirs, mine = (dict(each.feature_msrs).get(msrs.ARCH_CAPABILITIES, 0) for each in (wanted, here))
    for bit in range(64):
        if theirs & ~mine & ~INVERTED & 1 << bit:
            name = ARCH_CAPABILITIES[bit] if bit < len(ARCH_CAPABILITIES) else "-"
            what = f"MSR {msrs.ARCH_CAPABILITIES:#x} (ARCH_CAPABILITIES) bit {bit} ({name})"
            yield f"{what}: {whose} has it, this host's KVM does not"


def _counts(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    mine, theirs = here.leaves, wanted.leaves
    for count in COUNTS:
        word = Word(count.function, count.subleaf, count.register)
        needed, found = count.of(_word(theirs, word)), count.of(_word(mine, word))
        if needed > found:
            place = f"CPUID {leaf_text(count.function, count.subleaf)} {count.register.upper()}"
            yield f"{place}: {count.meaning}: {whose} has {needed}, this host's KVM gives {found}"


def _layouts(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    """Where each component is in the XSAVE area, and what AMX's tiles are like."""
    mine, theirs = here.leaves, wanted.leaves
    user, supervisor = Word(XSAVE, 0, "eax"), Word(XSAVE, 1, "ecx")
    both = (_word(theirs, user) | _word(theirs, supervisor)) & (_word(mine, user) | _word(mine, supervisor))
    for component in range(2, 32):
        a, b = (leaves.get((XSAVE, component), CpuidLeaf()) for leaves in (theirs, mine))
        if both >> component & 1 and (a.eax, a.ebx) != (b.eax, b.ebx):
            name = NAMES[user][component] if component < len(NAMES[user]) else "-"
            yield (
                f"CPUID {leaf_text(XSAVE, component)} ({name}): its state has {a.eax} bytes at {a.ebx:#x} for {whose}, "
                f"and {b.eax} at {b.ebx:#x} on this host"
            )
    for (function, index), leaf in theirs.items():
        gate = FORMATS.get(function)
        other = mine.get((function, index), CpuidLeaf())
        if gate and _word(theirs, gate) & AMX_TILE and registers(leaf) != registers(other):
            yield f"CPUID {leaf_text(function, index)}: {whose} has other AMX tiles than this host"


def registers(leaf: CpuidLeaf) -> tuple[int, int, int, int]:
    return leaf.eax, leaf.ebx, leaf.ecx, leaf.edx


def _msrs(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    for index in sorted(set(wanted.msrs) - set(here.msrs)):
        yield f"MSR {index:#x}: {whose} has it, this host's KVM does not"


def _tsc(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    theirs, mine = wanted.tsc_khz, here.tsc_khz
    if theirs and mine and not here.tsc_control and abs(theirs - mine) * 1_000_000 > TOLERANCE_PPM * theirs:
        yield (
            f"TSC: {whose} counts at {theirs} kHz, this host at {mine} kHz, "
            f"and its KVM cannot scale one to the other (KVM_CAP_TSC_CONTROL)"
        )


def _sizes(wanted: CpuDescription, here: CpuDescription, whose: str) -> Iterator[str]:
    area = _word(wanted.leaves, Word(XSAVE, 0, "ecx"))
    if area > here.xsave_size:
        yield f"XSAVE: {whose} has a state of {area} bytes, this host's KVM takes {here.xsave_size}"
    if wanted.nested_size > here.nested_size:
        yield (
            f"nested guests: {whose} can have some, their state takes {wanted.nested_size} bytes, "
            f"and this host's KVM takes {here.nested_size}"
        )
