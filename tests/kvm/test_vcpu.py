"""Kicks, registers and what a VM keeps: nothing is lost, and what is read can be put back."""

from __future__ import annotations

import os
import threading

import pytest

from kvmpy.errors import HostError, IoctlError
from kvmpy.kvm.exits import Exit, Halted, Interrupted
from kvmpy.kvm.system import System
from kvmpy.kvm.vcpu import Vcpu
from tests.kvm.conftest import CODE, MakeGuest, run

SPIN = b"\xeb\xfe"
HLT = b"\xf4"


def test_a_kick_before_the_run_is_not_lost(make_guest: MakeGuest) -> None:
    vcpu = make_guest().load(SPIN)
    vcpu.kick(threading.get_native_id())
    assert run(vcpu) == Interrupted()


def test_an_accepted_kick_is_over(make_guest: MakeGuest) -> None:
    vcpu = make_guest().load(HLT)
    vcpu.kick(threading.get_native_id())
    assert run(vcpu) == Interrupted()
    vcpu.accept()
    assert run(vcpu) == Halted()


def test_a_kick_stops_a_guest_that_never_exits(make_guest: MakeGuest) -> None:
    vcpu = make_guest().load(SPIN)
    seen: list[Exit] = []
    runner = threading.Thread(target=lambda: seen.append(run(vcpu)))
    runner.start()
    vcpu.kick(runner.native_id or 0)
    runner.join(60)
    assert seen == [Interrupted()]
    assert vcpu.regs.rip == CODE


def test_an_unknown_msr_is_left_out_and_the_rest_is_read(make_guest: MakeGuest) -> None:
    vcpu = make_guest().vcpu
    assert vcpu.get_msrs([0xC000_0080, 0x7FFF_FFF0, 0x174]).keys() == {0xC000_0080, 0x174}
    assert vcpu.set_msrs({0x174: 0x10, 0x7FFF_FFF0: 1, 0x176: 0x20}) == [0x7FFF_FFF0]
    assert vcpu.get_msrs([0x174, 0x176]) == {0x174: 0x10, 0x176: 0x20}


def test_more_msrs_than_kvm_takes_at_once_are_read_and_set_all_the_same(make_guest: MakeGuest) -> None:
    vcpu = make_guest().vcpu
    many = [0x174, 0x175, 0x176] * 200
    assert vcpu.set_msrs(dict.fromkeys(many, 0x1000)) == []
    assert vcpu.get_msrs(many) == {0x174: 0x1000, 0x175: 0x1000, 0x176: 0x1000}
    absent = range(0x7FFF_0000, 0x7FFF_0000 + 300)
    assert vcpu.set_msrs({0x174: 1} | dict.fromkeys(absent, 1) | {0x176: 2}) == list(absent)
    assert vcpu.get_msrs([0x174, *absent, 0x176]) == {0x174: 1, 0x176: 2}


def test_a_vcpu_beyond_the_limit_is_refused_by_name(make_guest: MakeGuest, system: System) -> None:
    vm = make_guest().vm
    with pytest.raises(IoctlError, match="KVM_CREATE_VCPU: E"):
        Vcpu(vm, system.check("KVM_CAP_MAX_VCPU_ID") or 4096)


def test_a_missing_device_node_says_what_to_do() -> None:
    with pytest.raises(HostError, match=r"/nonexistent/kvm: ENOENT: .*modprobe"):
        System("/nonexistent/kvm")


def test_something_else_than_kvm_is_refused() -> None:
    with pytest.raises(HostError, match=r"/dev/null: is not KVM \(KVM_GET_API_VERSION: ENOTTY\)"):
        System(os.devnull)
