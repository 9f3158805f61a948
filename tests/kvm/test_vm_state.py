"""Interrupt controllers, PIT and clock travel to a second VM; the clock has gone on meanwhile."""

from __future__ import annotations

import json
import logging
import time

import pytest

from kvmpy.abi import kvm as abi
from kvmpy.kvm.vm import Vm
from kvmpy.kvm.vm_state import (
    ClockState,
    InterruptsState,
    PicState,
    RedirectionState,
    VmState,
    load_clock,
    load_interrupts,
    save_clock,
    save_interrupts,
    save_vm,
)
from kvmpy.state import load, save
from tests.kvm.conftest import MakeGuest

SECOND = 10**9
PRECISE = 20_000_000  # nanoseconds; the clock itself is precise, this test's machine may be busy


def distinctive(state: InterruptsState) -> InterruptsState:
    """Remapped PICs, an interrupt in service, two IOAPIC pins routed (one is level, and masked), the PIT counting."""
    state.pic_master = PicState(imr=0xFB, irq_base=0x20, isr=1, elcr=0x20, elcr_mask=state.pic_master.elcr_mask)
    state.pic_slave = PicState(imr=0xFF, irq_base=0x28, elcr=0x0C, elcr_mask=state.pic_slave.elcr_mask)
    pins = list(state.ioapic.redirtbl)
    pins[4], pins[10] = RedirectionState(bits=0x31), RedirectionState(bits=0x0100_0000_0001_A03A)
    state.ioapic.redirtbl, state.ioapic.ioregsel, state.ioapic.id = tuple(pins), 0x12, 1
    first = state.pit.channels[0]
    first.count, first.mode, first.rw_mode, first.latched_count, first.count_latched = 11932, 2, 3, 77, 3
    return state


def test_interrupt_controllers_and_pit_are_the_same_in_a_second_vm(make_guest: MakeGuest) -> None:
    source, destination = (make_guest(irqchip=True).vm for _ in range(2))
    fresh, wanted = save_interrupts(source), distinctive(save_interrupts(source))
    load_interrupts(source, wanted)
    state = save_vm(source)
    assert state.interrupts == wanted != fresh
    load_interrupts(destination, load(VmState, json.loads(json.dumps(save(state)))).interrupts)
    assert save_interrupts(destination) == wanted


def test_a_line_that_is_high_is_so_in_a_second_vm(make_guest: MakeGuest) -> None:
    source, destination = (make_guest(irqchip=True).vm for _ in range(2))
    source.line(10).set(level=True)
    load_interrupts(destination, save_interrupts(source))
    assert save_interrupts(destination).ioapic.irr == 1 << 10


def test_the_clock_has_gone_on_by_the_time_between(make_guest: MakeGuest) -> None:
    source, destination = (make_guest(irqchip=True).vm for _ in range(2))
    load_clock(source, ClockState(nanoseconds=5000 * SECOND, realtime=time.clock_gettime_ns(time.CLOCK_REALTIME)))
    before = save_clock(source)
    assert 5000 * SECOND <= before.nanoseconds < 5100 * SECOND
    before.realtime -= 60 * SECOND  # as if it had been a minute
    load_clock(destination, before)
    after = save_clock(destination)
    assert after.nanoseconds - before.nanoseconds == pytest.approx(after.realtime - before.realtime, abs=PRECISE)


def test_where_the_kernel_does_not_account_for_the_time_kvmpy_does(make_guest: MakeGuest) -> None:
    vm = make_guest(irqchip=True).vm
    vm._capabilities["KVM_CAP_ADJUST_CLOCK"] = abi.CLOCK_REALTIME >> 1
    realtime = time.clock_gettime_ns(time.CLOCK_REALTIME) - 60 * SECOND
    load_clock(vm, ClockState(nanoseconds=SECOND, realtime=realtime))
    after = save_clock(vm)
    assert after.nanoseconds - SECOND == pytest.approx(after.realtime - realtime, abs=PRECISE)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_host_that_is_behind_says_so_and_the_clock_does_not_go_back(
    make_guest: MakeGuest, caplog: pytest.LogCaptureFixture, kernel: bool
) -> None:
    vm: Vm = make_guest(irqchip=True).vm
    vm._capabilities["KVM_CAP_ADJUST_CLOCK"] = abi.CLOCK_REALTIME if kernel else 1
    future = time.clock_gettime_ns(time.CLOCK_REALTIME) + 7 * SECOND
    with caplog.at_level(logging.WARNING):
        load_clock(vm, ClockState(nanoseconds=5000 * SECOND, realtime=future))
    assert 5000 * SECOND <= save_clock(vm).nanoseconds < 5001 * SECOND
    assert "this host's clock is 6.9" in caplog.text or "this host's clock is 7.0" in caplog.text
