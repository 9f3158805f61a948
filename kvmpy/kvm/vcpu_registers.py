"""A vCPU's registers as they travel, named as linux/kvm.h and asm/kvm.h name them.

Left out is what KVM has no ioctl for: a queued start-up IPI's vector (KVM_GET_VCPU_EVENTS never tells it; reading
MP_STATE first makes KVM take it in), and what the guest cannot see.
"""

from typing import Annotated, ClassVar, Final

from msgspec import Meta

from kvmpy.state import State, part, u8, u16, u32, u64

XSAVE_MIN: Final = 4096  # sizeof(struct kvm_xsave): KVM_CAP_XSAVE2 never says less
XSAVE_MAX: Final = 0x1_0000  # AMX makes it 11 KiB
NESTED_HEADER: Final = 128
NESTED_MAX: Final = 0x1_0000  # VMX needs 128 + 2 * 4096 bytes, SVM half of that
LAPIC_SIZE: Final = 0x400
MOST_MSRS: Final = 4096
MOST_XCRS: Final = 16  # KVM_MAX_XCRS

Four = tuple[u64, u64, u64, u64]
Pair = tuple[u32, u64]


class RegsState(State):
    """struct kvm_regs."""

    rax: u64 = 0
    rbx: u64 = 0
    rcx: u64 = 0
    rdx: u64 = 0
    rsi: u64 = 0
    rdi: u64 = 0
    rsp: u64 = 0
    rbp: u64 = 0
    r8: u64 = 0
    r9: u64 = 0
    r10: u64 = 0
    r11: u64 = 0
    r12: u64 = 0
    r13: u64 = 0
    r14: u64 = 0
    r15: u64 = 0
    rip: u64 = 0xFFF0
    rflags: u64 = 2


class SegmentState(State):
    """struct kvm_segment."""

    base: u64 = 0
    limit: u32 = 0xFFFF
    selector: u16 = 0
    type: u8 = 3
    present: u8 = 1
    dpl: u8 = 0
    db: u8 = 0
    s: u8 = 1
    l: u8 = 0  # noqa: E741  the field's name in the header: a 64-bit code segment
    g: u8 = 0
    avl: u8 = 0
    unusable: u8 = 0


class TableState(State):
    """struct kvm_dtable."""

    base: u64 = 0
    limit: u16 = 0xFFFF


class SregsState(State):
    """What struct kvm_sregs and kvm_sregs2 have in common: an interrupt under way is in EventsState too."""

    cs: SegmentState = part(SegmentState)
    ds: SegmentState = part(SegmentState)
    es: SegmentState = part(SegmentState)
    fs: SegmentState = part(SegmentState)
    gs: SegmentState = part(SegmentState)
    ss: SegmentState = part(SegmentState)
    tr: SegmentState = part(SegmentState)
    ldt: SegmentState = part(SegmentState)
    gdt: TableState = part(TableState)
    idt: TableState = part(TableState)
    cr0: u64 = 0x6000_0010
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u64 = 0
    efer: u64 = 0
    apic_base: u64 = 0xFEE0_0800


class DebugregsState(State):
    """struct kvm_debugregs."""

    db: Four = (0, 0, 0, 0)
    dr6: u64 = 0xFFFF_0FF0
    dr7: u64 = 0x400


class ExceptionState(State):
    injected: u8 = 0
    nr: u8 = 0
    has_error_code: u8 = 0
    pending: u8 = 0
    error_code: u32 = 0


class InterruptState(State):
    injected: u8 = 0
    nr: u8 = 0
    soft: u8 = 0
    shadow: u8 = 0


class NmiState(State):
    injected: u8 = 0
    pending: u8 = 0
    masked: u8 = 0


class SmiState(State):
    smm: u8 = 0
    pending: u8 = 0
    smm_inside_nmi: u8 = 0
    latched_init: u8 = 0


class TripleFaultState(State):
    pending: u8 = 0


class EventsState(State):
    """struct kvm_vcpu_events. ``flags`` says which of the others the saving kernel knew."""

    exception: ExceptionState = part(ExceptionState)
    interrupt: InterruptState = part(InterruptState)
    nmi: NmiState = part(NmiState)
    sipi_vector: u32 = 0
    flags: u32 = 0
    smi: SmiState = part(SmiState)
    triple_fault: TripleFaultState = part(TripleFaultState)
    exception_has_payload: u8 = 0
    exception_payload: u64 = 0


class TscState(State):
    """The time stamp counter: its ``value`` at ``realtime`` (CLOCK_REALTIME, in nanoseconds).

    ``offset`` is what was added to the saving host's own, where KVM tells it: the difference of two vCPUs' offsets is
    exact, that of two values read one after the other is not.
    """

    khz: u32 = 0
    value: u64 = 0
    realtime: u64 = 0
    offset: u64 | None = None
    deadline: u64 = 0


class VcpuRegisters(State):
    """Everything of one vCPU. MSRs are (index, value); ``pdptrs`` is None unless KVM says that they count."""

    NAME: ClassVar = "vcpu"

    mp_state: u32 = 0
    regs: RegsState = part(RegsState)
    sregs: SregsState = part(SregsState)
    pdptrs: Four | None = None
    debugregs: DebugregsState = part(DebugregsState)
    xcrs: Annotated[tuple[Pair, ...], Meta(max_length=MOST_XCRS)] = ()
    xsave: Annotated[bytes, Meta(min_length=XSAVE_MIN, max_length=XSAVE_MAX)] = bytes(XSAVE_MIN)
    lapic: Annotated[bytes, Meta(min_length=LAPIC_SIZE, max_length=LAPIC_SIZE)] = bytes(LAPIC_SIZE)
    msrs: Annotated[tuple[Pair, ...], Meta(max_length=MOST_MSRS)] = ()
    nested: Annotated[bytes, Meta(min_length=NESTED_HEADER, max_length=NESTED_MAX)] | None = None
    events: EventsState = part(EventsState)
    tsc: TscState = part(TscState)
