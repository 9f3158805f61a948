"""Every register travels: a state no VM has by itself is set in one, saved, loaded into a second, and saved again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import pytest

from kvmpy.errors import IoctlError
from kvmpy.kvm import msrs
from kvmpy.kvm.cpuid import guest_cpuid
from kvmpy.kvm.tsc import has_offset, load_tsc, save_tsc
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vcpu_registers import (
    DebugregsState,
    EventsState,
    InterruptState,
    NmiState,
    RegsState,
    VcpuRegisters,
)
from kvmpy.kvm.vcpu_state import load, save, saved_msrs, xsave_size
from kvmpy.state import StateError
from kvmpy.state import load as decode
from kvmpy.state import save as encode
from tests.kvm.conftest import CODE, MakeGuest, run

HLT = b"\xf4"
KVM_MSRS = (0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D02, 0x4B56_4D03, 0x4B56_4D04, 0x4B56_4D05)
PAGED: Final = 1 << 31
TSC_SECOND = 10**9

MakeVcpu = Callable[[], Vcpu]


@pytest.fixture
def make_vcpu(make_guest: MakeGuest) -> MakeVcpu:
    """``make_vcpu()``: the vCPU of a new VM, with the CPUID of a machine with one."""

    def make() -> Vcpu:
        vcpu = make_guest(irqchip=True).vcpu
        vcpu.set_cpuid(guest_cpuid(vcpu.vm.system.supported_cpuid(), 0, 1, tsc_deadline=True))
        return vcpu

    return make


def _regs(state: VcpuRegisters) -> None:
    names = [name for name in RegsState.__struct_fields__ if name not in ("rip", "rflags")]
    state.regs = RegsState(**{name: n * 0x0101_0101_0101_0101 for n, name in enumerate(names, 1)}, rip=0x1234, rflags=3)


def _sregs(state: VcpuRegisters) -> None:
    sregs = state.sregs
    sregs.ds.base, sregs.ds.selector, sregs.ds.limit = 0x1_2340, 0x1234, 0xFFF0
    sregs.gdt.base, sregs.gdt.limit, sregs.idt.base = 0x5000, 0x27, 0x6000
    sregs.cr2, sregs.cr4 = 0x7777_8888, 0x600


def _debugregs(state: VcpuRegisters) -> None:
    state.debugregs = DebugregsState(db=(0x1000, 0x2000, 0x3000, 0x4000), dr6=0xFFFF_0FF1, dr7=0x402)


def _xcrs(state: VcpuRegisters) -> None:
    state.xcrs = ((0, 7),)


def _xsave(state: VcpuRegisters) -> None:
    """Legacy region: FCW, an x87 register, XMM0; XSTATE_BV says that both components are in use."""
    area = bytearray(state.xsave)
    area[0:2], area[24:28] = b"\x7f\x02", b"\x80\x1f\0\0"
    area[32:42], area[160:176] = bytes(range(10)), bytes(range(100, 116))
    area[512] = 3
    state.xsave = bytes(area)


def _lapic(state: VcpuRegisters) -> None:
    """Enabled by its spurious vector, a priority, a masked timer; interrupt 0x31 in service, and 0x51 requested."""
    task_priority, spurious, in_service, requested = (0x80, 0x40), (0xF0, 0x1FF), (0x110, 1 << 17), (0x220, 1 << 17)
    processor_priority = (0xA0, 0x40)
    timer = ((0x320, 0x1_00EC), (0x3E0, 0xB))
    state.lapic = with_apic(state, task_priority, processor_priority, spurious, in_service, requested, *timer)
    state.sregs.cr8 = 4


def with_apic(state: VcpuRegisters, *registers: tuple[int, int]) -> bytes:
    page = bytearray(state.lapic)
    for offset, value in registers:
        page[offset : offset + 4] = value.to_bytes(4, "little")
    return bytes(page)


def _msrs(state: VcpuRegisters) -> None:
    changed = {0x174: 0x10, 0x175: 0x8000, 0x176: 0x9000, 0x277: 0x0007_0406_0007_0406, 0xC000_0082: 0x7777, 0x200: 6}
    state.msrs = tuple((dict(state.msrs) | changed).items())


def _kvm_msrs(state: VcpuRegisters) -> None:
    changed = {0x4B56_4D00: 0x3000, 0x4B56_4D01: 0x4001, 0x4B56_4D03: 0x5041, 0x4B56_4D04: 0x6005, 0x4B56_4D05: 0}
    shared = {0x11: 0x3000, 0x12: 0x4001}  # the same two under their old numbers
    state.msrs = tuple((dict(state.msrs) | changed | shared).items())


def _events(state: VcpuRegisters) -> None:
    state.events.interrupt = InterruptState(injected=1, nr=0x31)
    state.events.nmi = NmiState(masked=1)
    state.events.interrupt.shadow = 3  # AMD has one for both of them


def _pending_nmi(state: VcpuRegisters) -> None:
    state.events.nmi.pending = 1


def _pending_exception(state: VcpuRegisters) -> None:
    """A page fault that is not delivered yet, with the address that CR2 shall have."""
    state.events.exception.pending, state.events.exception.nr = 1, 14
    state.events.exception.has_error_code, state.events.exception.error_code = 1, 6
    state.events.exception_has_payload, state.events.exception_payload = 1, 0x1234_5000


def _triple_fault(state: VcpuRegisters) -> None:
    state.events.triple_fault.pending = 1


def _halted(state: VcpuRegisters) -> None:
    state.mp_state = 3  # KVM_MP_STATE_HALTED


CHANGES = {
    "KVM_SET_REGS": _regs,
    "KVM_SET_SREGS": _sregs,
    "KVM_SET_DEBUGREGS": _debugregs,
    "KVM_SET_XCRS": _xcrs,
    "KVM_SET_XSAVE": _xsave,
    "KVM_SET_LAPIC": _lapic,
    "KVM_SET_MSRS": _msrs,
    "KVM_SET_MSRS of KVM's own": _kvm_msrs,
    "KVM_SET_VCPU_EVENTS": _events,
    "KVM_SET_VCPU_EVENTS with an NMI": _pending_nmi,
    "KVM_SET_VCPU_EVENTS with an exception": _pending_exception,
    "KVM_SET_VCPU_EVENTS with a triple fault": _triple_fault,
    "KVM_SET_MP_STATE": _halted,
}


def without_time(state: VcpuRegisters) -> dict[str, Any]:
    section: dict[str, Any] = encode(state)["state"]
    del section["tsc"]
    return section


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_loaded_is_what_is_saved_and_so_in_a_second_vm(
    make_vcpu: MakeVcpu, change: Callable[[VcpuRegisters], None]
) -> None:
    source, destination = make_vcpu(), make_vcpu()
    fresh, wanted = save(source), save(source)
    change(wanted)
    load(source, wanted)
    saved = save(source)
    assert without_time(saved) == without_time(wanted) != without_time(fresh)
    load(destination, decode(VcpuRegisters, json.loads(json.dumps(encode(saved)))))
    assert without_time(save(destination)) == without_time(saved)


def test_pdptrs_travel_where_kvm_keeps_them(make_vcpu: MakeVcpu) -> None:
    """PAE paging: the four are in the processor, and memory does not have them."""
    source, destination = make_vcpu(), make_vcpu()
    state, entries = save(source), (0x3001, 0x4001, 0x5001, 0x6001)
    state.sregs.cr0, state.sregs.cr3, state.sregs.cr4, state.pdptrs = PAGED | 1, 0x2000, 0x20, entries
    load(source, state)
    saved = save(source)
    # A KVM without hardware support takes the CR0 and does not page.
    assert saved.pdptrs == (entries if saved.sregs.cr0 & PAGED and source.vm.check("KVM_CAP_SREGS2") else None)
    load(destination, saved)
    assert without_time(save(destination)) == without_time(saved)


def test_saving_changes_nothing(make_vcpu: MakeVcpu) -> None:
    vcpu = make_vcpu()
    state = save(vcpu)
    _pending_exception(state)
    load(vcpu, state)
    assert without_time(save(vcpu)) == without_time(save(vcpu)) == without_time(state)


def test_every_msr_that_kvm_lists_is_saved_or_cannot_be_read(make_vcpu: MakeVcpu) -> None:
    vcpu = make_vcpu()
    listed, saved = vcpu.vm.system.msr_indices(), dict(save(vcpu).msrs)
    apart = (msrs.TSC, msrs.TSC_DEADLINE, *msrs.HYPERV)
    unread = [index for index in listed if index not in saved and index not in apart]
    assert vcpu.get_msrs(unread) == {}
    assert [index for index in KVM_MSRS if index in listed and index not in saved] == []


def test_mtrrs_and_machine_check_banks_are_saved_though_kvm_does_not_list_them(make_vcpu: MakeVcpu) -> None:
    vcpu = make_vcpu()
    assert {0x2FF, 0x200, 0x250, 0x400} <= set(saved_msrs(vcpu)) - set(vcpu.vm.system.msr_indices())
    assert {0x2FF, 0x200, 0x250, 0x400} <= dict(save(vcpu).msrs).keys()


def test_a_guest_goes_on_in_a_second_vm_where_it_was(make_guest: MakeGuest) -> None:
    code = b"\x40\x40\xf4\x40\x40\x40\xf4"  # inc ax twice; hlt; inc ax three times; hlt
    guests = [make_guest() for _ in range(2)]
    for guest in guests:
        guest.load(code)
    source, destination = (guest.vcpu for guest in guests)
    run(source)
    destination.regs = source.regs
    run(destination)
    assert (destination.regs.rax, destination.regs.rip) == (5, CODE + 7)


def test_the_tsc_goes_on_by_the_time_that_has_passed(make_vcpu: MakeVcpu) -> None:
    source, destination = make_vcpu(), make_vcpu()
    state = save(source)
    load(destination, state)
    load_tsc([destination], [state])
    after = save_tsc(destination)
    expected = state.tsc.value + (after.realtime - state.tsc.realtime) * state.tsc.khz // 1_000_000
    assert after.value == pytest.approx(expected, abs=state.tsc.khz * 20)  # of 20 ms: the machine may be busy


def test_the_vcpus_tscs_have_the_offsets_that_they_had(make_vcpu: MakeVcpu) -> None:
    vcpu = make_vcpu()
    others = [Vcpu(vcpu.vm, index) for index in (1, 2)]
    vcpus = [vcpu, *others]
    try:
        states = [save(each) for each in vcpus]
        for state, offset in zip(states, (1000, 1000, 1777), strict=True):
            state.tsc.offset = offset
        load_tsc(vcpus, states)
        after = [save_tsc(each) for each in vcpus]
    finally:
        for each in others:
            each.close()
    if not has_offset(vcpu):
        assert [each.offset for each in after] == [None] * 3
        return
    first = after[0].offset
    assert first is not None
    # The second is that of a KVM which accepts an offset and has none.
    assert [(each.offset or 0) - first for each in after] in ([0, 0, 777], [0, 0, 0])


def test_the_deadline_timer_is_set_after_the_tsc(make_vcpu: MakeVcpu) -> None:
    source, destination = make_vcpu(), make_vcpu()
    state = save(source)
    state.lapic = with_apic(state, (0xF0, 0x1FF), (0x320, 2 << 17 | 0xEC))
    state.tsc.deadline = save_tsc(source).value + 3600 * TSC_SECOND
    load(destination, state)
    load_tsc([destination], [state])
    assert save_tsc(destination).deadline == state.tsc.deadline


def _long_xsave(state: VcpuRegisters, vcpu: Vcpu) -> None:
    state.xsave = bytes(xsave_size(vcpu) + 63) + b"\1"


def _unknown_msr(state: VcpuRegisters, _: Vcpu) -> None:
    state.msrs = ((0x174, 1), (0x7FFF_FFF0, 1))


def _nested(state: VcpuRegisters, _: Vcpu) -> None:
    state.nested = bytes(128)


HOSTILE: dict[str, tuple[Callable[[VcpuRegisters, Vcpu], object], str]] = {
    "mp state": (lambda state, _: setattr(state, "mp_state", 99), r"^vCPU 0: KVM_SET_MP_STATE: EINVAL$"),
    "sregs": (lambda state, _: setattr(state.sregs, "cr0", PAGED), r"^vCPU 0: KVM_SET_SREGS2?: EINVAL$"),
    "debugregs": (lambda state, _: setattr(state.debugregs, "dr7", 1 << 40), r"^vCPU 0: KVM_SET_DEBUGREGS: EINVAL$"),
    "xcrs": (lambda state, _: setattr(state, "xcrs", ((0, 1 << 60),)), r"^vCPU 0: KVM_SET_XCRS: EINVAL$"),
    "xsave": (_long_xsave, r"^vCPU 0: xsave: \d+ bytes, and this host's area has \d+$"),
    "msr": (_unknown_msr, r"^vCPU 0: KVM_SET_MSRS: this host's KVM refuses MSR 0x7ffffff0 = 0x1$"),
    "nested": (_nested, r"^vCPU 0: nested: 128 bytes that say 0, and this host's KVM takes \d+ at most$"),
    "events": (lambda state, _: setattr(state.events, "flags", 1 << 31), r"^vCPU 0: KVM_SET_VCPU_EVENTS: EINVAL$"),
}


@pytest.mark.parametrize(("spoil", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_state_is_refused_by_vcpu_request_and_errno(
    make_vcpu: MakeVcpu, spoil: Callable[[VcpuRegisters, Vcpu], object], message: str
) -> None:
    vcpu = make_vcpu()
    state = save(vcpu)
    spoil(state, vcpu)
    with pytest.raises((StateError, IoctlError), match=message):
        load(vcpu, state)


def test_flags_of_events_that_this_kvm_does_not_know_are_dropped_if_nothing_is_pending(make_vcpu: MakeVcpu) -> None:
    vcpu = make_vcpu()
    vcpu.vm._capabilities |= {"KVM_CAP_EXCEPTION_PAYLOAD": 0, "KVM_CAP_X86_TRIPLE_FAULT_EVENT": 0}
    state = save(vcpu)
    state.events = EventsState(flags=state.events.flags | 0x30)
    load(vcpu, state)
    state.events.triple_fault.pending = 1
    with pytest.raises(StateError, match="vCPU 0: events: one is pending that needs KVM_CAP_X86_TRIPLE_FAULT_EVENT"):
        load(vcpu, state)
