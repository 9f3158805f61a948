"""KVM's dirty log on a fake kernel: as much manual protection as there is, and all slots or none."""

from __future__ import annotations

import errno
from typing import Any, cast

import pytest

from kvmpy._native import lib
from kvmpy.abi import ioctl
from kvmpy.errors import IoctlError
from kvmpy.kvm.dirty import KvmDirtyLog, ToClear
from kvmpy.kvm.vm import Vm
from kvmpy.memory import Ram
from kvmpy.pagebits import PAGE, PageBits
from tests.fakes.kernel import Kernel
from tests.fakes.virtio_driver import Bytes

BLOCKS = [Ram(0, 64 * PAGE, Bytes(0)), Ram(1 << 32, 100 * PAGE, Bytes(0))]
SLOTS = {0: 3, 1 << 32: 7}


class FakeSystem:
    def __init__(self, offers: int) -> None:
        self.offers = offers

    def check(self, name: str) -> int:
        assert name == "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"
        return self.offers


class FakeVm:
    """A VM of two slots: ``logging`` are those that are logged, ``refuses`` one that cannot be changed."""

    fd = 55

    def __init__(self, offers: int) -> None:
        self.system = FakeSystem(offers)
        self.logging: set[int] = set()
        self.refuses = -1

    def slot_at(self, gpa: int) -> int:
        return SLOTS[gpa]

    def set_logging(self, number: int, *, enabled: bool) -> None:
        if number == self.refuses:
            raise IoctlError("KVM_SET_USER_MEMORY_REGION", errno.ENOMEM)
        if enabled:
            self.logging.add(number)
        else:
            self.logging.discard(number)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)
    return kernel


def make(offers: int, *, manual: bool = True) -> tuple[FakeVm, KvmDirtyLog]:
    vm = FakeVm(offers)
    return vm, KvmDirtyLog(cast("Vm", vm), BLOCKS, manual=manual)


@pytest.mark.parametrize("offers", [1, 3])
def test_manual_protection_is_used_as_far_as_it_is_offered(kernel: Kernel, offers: int) -> None:
    vm, log = make(offers)
    log.start()
    (enabled,) = kernel.named("KVM_ENABLE_CAP")
    assert (enabled["cap"], enabled["args"]) == (lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, [offers, 0, 0, 0])
    assert vm.logging == {3, 7}
    assert [log.to_clear(block) for block in BLOCKS] == [ToClear(55, 3), ToClear(55, 7)]


def test_what_is_offered_beyond_that_stays_off(kernel: Kernel) -> None:
    _, log = make(0xFF)
    log.start()
    assert kernel.named("KVM_ENABLE_CAP")[0]["args"][0] == 3


@pytest.mark.parametrize(("offers", "manual"), [(0, True), (3, False)])
def test_log_that_reading_clears_needs_nothing(kernel: Kernel, offers: int, manual: bool) -> None:
    vm, log = make(offers, manual=manual)
    log.start()
    assert kernel.named("KVM_ENABLE_CAP") == []
    assert vm.logging == {3, 7}
    assert log.to_clear(BLOCKS[0]) is None


def test_start_that_fails_leaves_no_slot_logged(kernel: Kernel) -> None:
    vm, log = make(3)
    vm.refuses = 7
    with pytest.raises(IoctlError, match="KVM_SET_USER_MEMORY_REGION: ENOMEM"):
        log.start()
    assert vm.logging == set()
    vm.refuses = -1
    log.start()
    assert vm.logging == {3, 7}


def test_stop_tries_every_slot_and_may_be_tried_again(kernel: Kernel) -> None:
    vm, log = make(3)
    log.start()
    vm.refuses = 3
    with pytest.raises(IoctlError):
        log.stop()
    assert vm.logging == {3}
    vm.refuses = -1
    log.stop()
    log.stop()
    assert vm.logging == set()


def test_capability_is_enabled_once(kernel: Kernel) -> None:
    _, log = make(3)
    for _ in range(3):
        log.start()
        log.stop()
    assert len(kernel.named("KVM_ENABLE_CAP")) == 1


def test_what_the_kernel_says_is_added(kernel: Kernel) -> None:
    _, log = make(3)
    log.start()

    def answer(argument: Any) -> int:
        bits = log._read[BLOCKS[1]]
        assert (argument.slot, argument.padding2) == (7, bits.address)
        bits.clear()
        bits.set(99, 1)
        return 0

    kernel.answers["KVM_GET_DIRTY_LOG"] = answer
    into = PageBits(100)
    into.set(0, 1)
    log.collect(BLOCKS[1], into)
    assert [page for page in range(100) if page in into] == [0, 99]
