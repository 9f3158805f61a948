"""The time stamp counters of a machine's vCPUs, carried from one host's to another's.

The guest's TSC is the host's, scaled, plus an offset. Two hosts' counters have nothing in common but the time of day,
so the value of one vCPU travels with a CLOCK_REALTIME stamp, and is set to where it would be by now. A guest whose
clock is the TSC then has the right time, as has one that uses kvmclock (vm_state.py does the same there). The other
vCPUs get the same offset, plus the difference that theirs had: that is exact, and it must be, for a guest whose vCPUs
differ by a microsecond takes its TSC for broken. Where KVM does not tell offsets (before Linux 5.16), every vCPU is
given the same value, and KVM takes values set within a second of each other as meant to be equal.

A host with an unstable TSC has no such constant, and KVM mends its vCPUs' values when they move between processors.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Final

from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.kvm import msrs
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vcpu_registers import TscState, VcpuRegisters
from kvmpy.log import Log

log = Log(__name__)

MASK: Final = 2**64 - 1
TRIES: Final = 5
LVT_TIMER: Final = 0x320  # in the local APIC's page
LVT_MASKED: Final = 1 << 16
LVT_MODE: Final = 3 << 17
LVT_DEADLINE: Final = 2 << 17


def save_tsc(vcpu: Vcpu) -> TscState:
    """The vCPU must not run. Raises IoctlError."""
    value, realtime = _read(vcpu)
    return TscState(
        khz=khz(vcpu),
        value=value,
        realtime=realtime,
        offset=abi.get_tsc_offset(vcpu.fd) if has_offset(vcpu) else None,
        deadline=vcpu.get_msrs([msrs.TSC_DEADLINE]).get(msrs.TSC_DEADLINE, 0),
    )


def set_khz(vcpu: Vcpu, wanted: int) -> None:
    """Give the vCPU's TSC that frequency, before anything that counts by it. Raises IoctlError where KVM cannot.

    Without KVM_CAP_TSC_CONTROL it takes what is within 250 ppm of the host's, and no more.
    """
    if wanted and wanted != khz(vcpu):
        abi.KVM_SET_TSC_KHZ(vcpu.fd, wanted)


def load_tsc(vcpus: Sequence[Vcpu], states: Sequence[VcpuRegisters], *, goes_on: bool = True) -> None:
    """Set the TSC of all vCPUs at once, then their deadline timers. After `load` of each of them.

    ``goes_on``: add the time that has passed since they were saved; without it (a reset), they are as they were.
    Raises IoctlError.
    """
    if not vcpus:
        return
    first = states[0].tsc
    now, realtime = _read(vcpus[0])
    wanted = first.value + (passed(first.realtime, realtime) * khz(vcpus[0]) // 1_000_000 if goes_on else 0)
    if all(map(has_offset, vcpus)):
        base = abi.get_tsc_offset(vcpus[0].fd) + wanted - now
        for vcpu, state in zip(vcpus, states, strict=True):
            abi.set_tsc_offset(vcpu.fd, base + _ahead(state.tsc, first) & MASK)
    else:
        for vcpu in vcpus:
            vcpu.set_msrs({msrs.TSC: wanted & MASK})
    for vcpu, state in zip(vcpus, states, strict=True):
        if deadline := _deadline(state):
            vcpu.set_msrs({msrs.TSC_DEADLINE: deadline})


def passed(since: int, now: int) -> int:
    """Nanoseconds from a stamp of the source's CLOCK_REALTIME to one of ours; never less than none."""
    if now < since:
        log.warning(
            "this host's clock is %.3f s behind the one that the guest comes from: have both keep time (NTP)",
            (since - now) / 1e9,
        )
    return max(now - since, 0)


def khz(vcpu: Vcpu) -> int:
    """The frequency of the vCPU's TSC, 0 where KVM does not tell."""
    if not vcpu.vm.check("KVM_CAP_GET_TSC_KHZ"):
        return 0
    try:
        return abi.KVM_GET_TSC_KHZ(vcpu.fd)
    except IoctlError as e:
        if e.errno != errno.EIO:  # an unstable TSC, on kernels that say so
            raise
        return 0


def has_offset(vcpu: Vcpu) -> bool:
    """Whether KVM tells this vCPU's offset, and can set it."""
    try:
        abi.KVM_HAS_DEVICE_ATTR(vcpu.fd, abi.DeviceAttr.new(group=abi.TSC_CTRL, attr=abi.TSC_OFFSET))
    except IoctlError:
        return False
    return True


def _read(vcpu: Vcpu) -> tuple[int, int]:
    """The TSC and the time, read together: of a few tries, the one that took least."""
    found, table = [], abi.new_msrs([(msrs.TSC, 0)])
    for _ in range(TRIES):
        before = time.clock_gettime_ns(time.CLOCK_REALTIME)
        abi.KVM_GET_MSRS(vcpu.fd, table)
        after = time.clock_gettime_ns(time.CLOCK_REALTIME)
        [(_, value)] = abi.msr_values(table, 1)
        found.append((after - before, value, (before + after) // 2))
    return min(found)[1:]


def _ahead(tsc: TscState, first: TscState) -> int:
    return tsc.offset - first.offset if tsc.offset is not None and first.offset is not None else 0


def _deadline(state: VcpuRegisters) -> int:
    """When the deadline timer is due: at once where it had expired and the interrupt was not delivered yet.

    KVM reads such a deadline as 0. A guest that has none gets an interrupt that it did not ask for, once.
    """
    timer = int.from_bytes(state.lapic[LVT_TIMER : LVT_TIMER + 4], "little")
    if timer & LVT_MODE != LVT_DEADLINE:
        return 0
    return state.tsc.deadline or (0 if timer & LVT_MASKED else state.tsc.value)
