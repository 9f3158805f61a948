"""What KVM keeps for the whole VM: the PICs, the IOAPIC, the PIT, and the guest's clock.

    state = save_vm(vm)

    load_interrupts(vm, state.interrupts)  # after the vCPUs' registers: a level that is high is delivered again at once
    load_clock(vm, state.clock)            # last, right before the vCPUs run

The clock is kvmclock: nanoseconds that the guest adds to the time of day of its boot. It goes on while the guest is
paused (docs/adr/0005), and so it does over a migration: at the destination it is set to its value plus the real time
that has passed since it was read, or the guest's time of day would be late by each blackout. Kernels from 5.16 on
read clock and CLOCK_REALTIME at one instant where their TSC is stable, and add what has passed when the clock is set;
where they do not, the stamp and the addition are ours, and off by the time of two system calls. Both hosts must keep
time; one that is behind the other leaves the clock as it was and says so, for kvmclock never goes back.

The PIT starts its count anew when it is set: KVM does not take over when it was loaded.
"""

import time
from typing import Annotated, Any, ClassVar, Final

from msgspec import Meta, field

from kvmpy.abi import kvm as abi
from kvmpy.kvm import structs
from kvmpy.kvm.tsc import MASK, passed
from kvmpy.kvm.vm import Vm
from kvmpy.state import State, part, u8, u16, u32, u64

IOAPIC_PINS: Final = 24
MASKED: Final = 1 << 16
TRIES: Final = 5


class PicState(State):
    """struct kvm_pic_state."""

    last_irr: u8 = 0
    irr: u8 = 0
    imr: u8 = 0
    isr: u8 = 0
    priority_add: u8 = 0
    irq_base: u8 = 0
    read_reg_select: u8 = 0
    poll: u8 = 0
    special_mask: u8 = 0
    init_state: u8 = 0
    auto_eoi: u8 = 0
    rotate_on_auto_eoi: u8 = 0
    special_fully_nested_mode: u8 = 0
    init4: u8 = 0
    elcr: u8 = 0
    elcr_mask: u8 = 0


class RedirectionState(State):
    bits: u64 = MASKED


Redirections = Annotated[tuple[RedirectionState, ...], Meta(min_length=IOAPIC_PINS, max_length=IOAPIC_PINS)]


class IoapicState(State):
    """struct kvm_ioapic_state."""

    base_address: u64 = 0xFEC0_0000
    ioregsel: u32 = 0
    id: u32 = 0
    irr: u32 = 0
    redirtbl: Redirections = field(default_factory=lambda: tuple(RedirectionState() for _ in range(IOAPIC_PINS)))


class PitChannelState(State):
    """struct kvm_pit_channel_state."""

    count: Annotated[int, Meta(ge=0, le=0x1_0000)] = 0x1_0000
    latched_count: u16 = 0
    count_latched: u8 = 0
    status_latched: u8 = 0
    status: u8 = 0
    read_state: u8 = 0
    write_state: u8 = 0
    write_latch: u8 = 0
    rw_mode: u8 = 0
    mode: u8 = 0xFF
    bcd: u8 = 0
    gate: u8 = 0


class PitState(State):
    """struct kvm_pit_state2."""

    channels: tuple[PitChannelState, PitChannelState, PitChannelState] = field(
        default_factory=lambda: (PitChannelState(gate=1), PitChannelState(gate=1), PitChannelState())
    )
    flags: u32 = 0


class InterruptsState(State):
    pic_master: PicState = part(PicState)
    pic_slave: PicState = part(PicState)
    ioapic: IoapicState = part(IoapicState)
    pit: PitState = part(PitState)


class ClockState(State):
    """kvmclock's ``nanoseconds`` at ``realtime`` (CLOCK_REALTIME, in nanoseconds)."""

    nanoseconds: u64 = 0
    realtime: u64 = 0


class VmState(State):
    """Everything of a VM that is not a vCPU's."""

    NAME: ClassVar = "vm"

    interrupts: InterruptsState = part(InterruptsState)
    clock: ClockState = part(ClockState)


def save_vm(vm: Vm) -> VmState:
    """A copy of the interrupt controllers, the PIT and the clock; changes nothing. Raises IoctlError."""
    return VmState(interrupts=save_interrupts(vm), clock=save_clock(vm))


def save_interrupts(vm: Vm) -> InterruptsState:
    """The interrupt controllers and the PIT. Raises IoctlError."""
    master, slave, ioapic = (
        abi.Irqchip.new(chip_id=chip) for chip in (abi.IRQCHIP_PIC_MASTER, abi.IRQCHIP_PIC_SLAVE, abi.IRQCHIP_IOAPIC)
    )
    for chip in (master, slave, ioapic):
        abi.KVM_GET_IRQCHIP(vm.fd, chip)
    return InterruptsState(
        pic_master=structs.read(PicState, _chip(master).pic),
        pic_slave=structs.read(PicState, _chip(slave).pic),
        ioapic=structs.read(IoapicState, _chip(ioapic).ioapic),
        pit=structs.read(PitState, abi.KVM_GET_PIT2(vm.fd)),
    )


def load_interrupts(vm: Vm, state: InterruptsState) -> None:
    """Put back what `save_interrupts` gave. Raises IoctlError."""
    for chip, name, content in (
        (abi.IRQCHIP_IOAPIC, "ioapic", state.ioapic),
        (abi.IRQCHIP_PIC_MASTER, "pic", state.pic_master),
        (abi.IRQCHIP_PIC_SLAVE, "pic", state.pic_slave),
    ):
        abi.KVM_SET_IRQCHIP(vm.fd, abi.Irqchip.new(chip_id=chip, chip={name: structs.fields(content)}))
    abi.KVM_SET_PIT2(vm.fd, abi.PitState2.new(**structs.fields(state.pit)))


def save_clock(vm: Vm) -> ClockState:
    """The clock with the time it was read at: the kernel's own stamp, or the closest of a few of ours."""
    found = []
    for _ in range(TRIES):
        before = _realtime()
        clock = abi.KVM_GET_CLOCK(vm.fd)
        after = _realtime()
        if clock.flags & abi.CLOCK_REALTIME:
            return ClockState(nanoseconds=clock.clock, realtime=clock.realtime)
        found.append((after - before, clock.clock, (before + after) // 2))
    _, nanoseconds, realtime = min(found)
    return ClockState(nanoseconds=nanoseconds, realtime=realtime)


def load_clock(vm: Vm, state: ClockState) -> None:
    """Let the clock run on as if it had never been stopped. Raises IoctlError."""
    gap = passed(state.realtime, _realtime())
    if vm.check("KVM_CAP_ADJUST_CLOCK") & abi.CLOCK_REALTIME:
        fields = {"clock": state.nanoseconds, "realtime": state.realtime, "flags": abi.CLOCK_REALTIME}
    else:
        fields = {"clock": state.nanoseconds + gap & MASK}
    abi.KVM_SET_CLOCK(vm.fd, abi.ClockData.new(**fields))


def _chip(irqchip: abi.Irqchip) -> Any:
    return irqchip.chip


def _realtime() -> int:
    return time.clock_gettime_ns(time.CLOCK_REALTIME)
