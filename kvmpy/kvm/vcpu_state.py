"""A vCPU's registers out of KVM, and into it.

    states = [save(vcpu) for vcpu in vcpus]

    for vcpu, state in zip(vcpus, states): load(vcpu, state)
    load_tsc(vcpus, states)                # kvmpy.kvm.tsc: all vCPUs' at once

The vCPU must not be running, must have completed its last access (`Vcpu.complete`), and have its CPUID. RAM is loaded
before: KVM writes to it when the MSR that says where the guest's wall clock is gets its value. The order of
saving: MP_STATE first, for reading it makes KVM take in a pending INIT or start-up IPI, which changes registers; the
events last, for reading them may deliver an exception's payload, and every other register has been read by then. The
order of loading is each ioctl's demand on those before it, said beside it.

What is loaded is hostile: State has checked its widths and lengths, here every length is checked against this KVM's,
and KVM refuses what makes no sense. A refusal leaves the vCPU partly loaded, and not to be run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvmpy._native import ffi
from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.kvm import msrs, structs, tsc
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vcpu_registers import (
    NESTED_MAX,
    XSAVE_MIN,
    DebugregsState,
    EventsState,
    RegsState,
    SregsState,
    VcpuRegisters,
)
from kvmpy.state import StateError

APART: Final = frozenset((msrs.TSC, msrs.TSC_DEADLINE, *msrs.HYPERV))


def save(vcpu: Vcpu) -> VcpuRegisters:
    """A copy of every register; changes nothing. Raises IoctlError naming the vCPU."""
    with _named(vcpu):
        mp_state = abi.KVM_GET_MP_STATE(vcpu.fd).mp_state
        regs = structs.read(RegsState, abi.KVM_GET_REGS(vcpu.fd))
        sregs, pdptrs = _get_sregs(vcpu)
        return VcpuRegisters(
            mp_state=mp_state,
            regs=regs,
            sregs=sregs,
            pdptrs=pdptrs,
            debugregs=structs.read(DebugregsState, abi.KVM_GET_DEBUGREGS(vcpu.fd)),
            xcrs=_get_xcrs(vcpu),
            xsave=_get_xsave(vcpu),
            lapic=_get_lapic(vcpu),
            msrs=_get_msrs(vcpu),
            nested=_get_nested(vcpu),
            tsc=tsc.save_tsc(vcpu),
            events=structs.read(EventsState, abi.KVM_GET_VCPU_EVENTS(vcpu.fd)),
        )


def load(vcpu: Vcpu, state: VcpuRegisters) -> None:
    """Set every register but the TSC and its deadline, which are `load_tsc`'s.

    Raises StateError or IoctlError, naming the vCPU and what was refused; the vCPU is then not to be run.
    """
    with _named(vcpu):
        values = dict(state.msrs)
        features = {index: values.pop(index) for index in msrs.FEATURES if index in values}
        others = {index: value for index, value in values.items() if index not in APART}
        events = _events(vcpu, state.events)
        xsave = _xsave(vcpu, state.xsave)
        set_msrs(vcpu, features)  # before the CR4.VMXE and the nested state that they allow
        tsc.set_khz(vcpu, state.tsc.khz)  # before whatever counts by it
        _set_sregs(vcpu, state)  # EFER before the nested state, the APIC's base before the APIC
        if state.nested is not None:
            _set_nested(vcpu, state.nested)  # takes what is set now for the outer guest's, so the inner's come after it
        abi.KVM_SET_REGS(vcpu.fd, abi.Regs.new(**structs.fields(state.regs)))
        if state.xcrs:
            entries = [{"xcr": xcr, "value": value} for xcr, value in state.xcrs]
            abi.KVM_SET_XCRS(vcpu.fd, abi.Xcrs.new(nr_xcrs=len(entries), xcrs=entries))
        abi.set_xsave(vcpu.fd, xsave)
        abi.KVM_SET_DEBUGREGS(vcpu.fd, abi.Debugregs.new(**structs.fields(state.debugregs)))
        abi.KVM_SET_LAPIC(vcpu.fd, abi.LapicState.new(regs=state.lapic))
        set_msrs(vcpu, others)
        abi.KVM_SET_MP_STATE(vcpu.fd, abi.MpState.new(mp_state=state.mp_state))
        abi.KVM_SET_VCPU_EVENTS(vcpu.fd, events)


def saved_msrs(vcpu: Vcpu) -> list[int]:
    """The indices whose values are saved, of those that this vCPU turns out to have."""
    listed = dict.fromkeys((*vcpu.vm.system.msr_indices(), *msrs.MTRRS))
    mcg_cap = vcpu.get_msrs([msrs.MCG_CAP]).get(msrs.MCG_CAP, 0)
    limit = vcpu.msr_limit
    return [i for i in (*listed, *msrs.banks(mcg_cap)) if i not in APART and (limit is None or i in limit)]


@contextmanager
def _named(vcpu: Vcpu) -> Iterator[None]:
    """Errors say which vCPU."""
    try:
        yield
    except IoctlError as e:
        raise IoctlError(f"vCPU {vcpu.index}: {e.request}", e.errno or 0) from e
    except StateError as e:
        raise StateError(f"vCPU {vcpu.index}: {e}") from e


def _get_sregs(vcpu: Vcpu) -> tuple[SregsState, tuple[int, int, int, int] | None]:
    if not vcpu.vm.check("KVM_CAP_SREGS2"):
        return structs.read(SregsState, abi.KVM_GET_SREGS(vcpu.fd)), None
    sregs = abi.KVM_GET_SREGS2(vcpu.fd)
    a, b, c, d = sregs.pdptrs
    valid = sregs.flags & abi.SREGS2_PDPTRS_VALID
    return structs.read(SregsState, sregs), (a, b, c, d) if valid else None


def _set_sregs(vcpu: Vcpu, state: VcpuRegisters) -> None:
    """Where there is no KVM_SET_SREGS2, KVM reads the PDPTRs from where CR3 says, as a processor does at MOV CR3."""
    fields = structs.fields(state.sregs)
    if not vcpu.vm.check("KVM_CAP_SREGS2"):
        abi.KVM_SET_SREGS(vcpu.fd, abi.Sregs.new(**fields))
        return
    if state.pdptrs is not None:
        fields |= {"flags": abi.SREGS2_PDPTRS_VALID, "pdptrs": list(state.pdptrs)}
    abi.KVM_SET_SREGS2(vcpu.fd, abi.Sregs2.new(**fields))


def _get_xcrs(vcpu: Vcpu) -> tuple[tuple[int, int], ...]:
    if not vcpu.vm.check("KVM_CAP_XCRS"):
        return ()
    xcrs = abi.KVM_GET_XCRS(vcpu.fd)
    return tuple((xcrs.xcrs[n].xcr, xcrs.xcrs[n].value) for n in range(xcrs.nr_xcrs))


def xsave_size(vcpu: Vcpu) -> int:
    """How long this KVM's XSAVE area is."""
    return max(vcpu.vm.check("KVM_CAP_XSAVE2"), XSAVE_MIN)


def _get_xsave(vcpu: Vcpu) -> bytes:
    if vcpu.vm.check("KVM_CAP_XSAVE2"):
        return abi.get_xsave2(vcpu.fd, xsave_size(vcpu))
    area = abi.KVM_GET_XSAVE(vcpu.fd)
    return bytes(ffi.buffer(area.region))


def _xsave(vcpu: Vcpu, area: bytes) -> bytes:
    """The area with as many bytes as KVM reads: what this host's has more of, or less, is in its initial state."""
    size = xsave_size(vcpu)
    if any(area[size:]):
        raise StateError(f"xsave: {len(area)} bytes, and this host's area has {size}")
    return area[:size].ljust(size, b"\0")


def _get_lapic(vcpu: Vcpu) -> bytes:
    lapic = abi.KVM_GET_LAPIC(vcpu.fd)
    return bytes(ffi.buffer(lapic.regs))


def _get_msrs(vcpu: Vcpu) -> tuple[tuple[int, int], ...]:
    """To ask for one that the vCPU does not have costs as much as for all that it has, so that is done once."""
    values = vcpu.get_msrs(saved_msrs(vcpu) if vcpu.msrs is None else vcpu.msrs)
    vcpu.msrs = list(values)
    return tuple(values.items())


def set_msrs(vcpu: Vcpu, values: dict[int, int]) -> None:
    """Raises StateError for those that KVM does not take, unless they have that value already."""
    refused = vcpu.set_msrs(values)
    has = vcpu.get_msrs(refused)
    lost = [f"{index:#x} = {values[index]:#x}" for index in refused if has.get(index) != values[index]]
    if lost:
        raise StateError(f"KVM_SET_MSRS: this host's KVM refuses MSR {', '.join(lost)}")


def nested_size(vcpu: Vcpu) -> int:
    """The most bytes of nested state; 0 where this vCPU can have no guest of its own."""
    return min(vcpu.vm.check("KVM_CAP_NESTED_STATE"), NESTED_MAX) if vcpu.can_nest else 0


def _get_nested(vcpu: Vcpu) -> bytes | None:
    size = nested_size(vcpu)
    return abi.get_nested_state(vcpu.fd, size) if size else None


def _set_nested(vcpu: Vcpu, data: bytes) -> None:
    limit, said = nested_size(vcpu), abi.nested_state_size(data)
    if said != len(data) or len(data) > limit:
        raise StateError(f"nested: {len(data)} bytes that say {said}, and this host's KVM takes {limit} at most")
    abi.set_nested_state(vcpu.fd, data)


def _events(vcpu: Vcpu, state: EventsState) -> abi.VcpuEvents:
    """Without the flags that this KVM does not know, if nothing stands behind them; else raises StateError."""
    flags = state.flags
    for name, flag, stands in (
        ("KVM_CAP_EXCEPTION_PAYLOAD", abi.EVENT_PAYLOAD, state.exception.pending or state.exception_has_payload),
        ("KVM_CAP_X86_TRIPLE_FAULT_EVENT", abi.EVENT_TRIPLE_FAULT, state.triple_fault.pending),
    ):
        if flags & flag and not vcpu.vm.check(name):
            if stands:
                raise StateError(f"events: one is pending that needs {name}, and this host's KVM does not have it")
            flags &= ~flag
    return abi.VcpuEvents.new(**{**structs.fields(state), "flags": flags})
