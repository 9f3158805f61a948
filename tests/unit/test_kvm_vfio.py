"""KVM is told of the groups of passed-through devices, where it wants to know."""

from __future__ import annotations

import errno
import os
from typing import Any, cast

import pytest

from kvmpy._native import ffi
from kvmpy.abi import ioctl
from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.kvm.vfio import VfioGroups
from kvmpy.kvm.vm import Vm
from tests.fakes.kernel import Kernel

GROUP = 5


class FakeVm:
    fd = 77


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)

    def create(request: Any) -> int:
        request.fd = os.open(os.devnull, os.O_RDONLY)
        return 0

    kernel.answers["KVM_CREATE_DEVICE"] = create
    return kernel


@pytest.fixture
def told(kernel: Kernel) -> list[tuple[int, int]]:
    """Attribute and descriptor of each request."""
    told: list[tuple[int, int]] = []

    def set_attribute(attr: Any) -> int:
        assert attr.group == abi.VFIO_GROUP
        told.append((attr.attr, ffi.cast("int32_t *", attr.addr)[0]))
        return 0

    kernel.answers["KVM_SET_DEVICE_ATTR"] = set_attribute
    return told


def groups() -> VfioGroups:
    return VfioGroups(cast("Vm", FakeVm()))


def test_the_device_is_made_once_and_told_of_each_group(kernel: Kernel, told: list[tuple[int, int]]) -> None:
    listener = groups()
    assert kernel.seen == []
    listener.group_added(GROUP)
    listener.group_added(GROUP + 1)
    listener.group_removed(GROUP)
    assert [made["type"] for made in kernel.named("KVM_CREATE_DEVICE")] == [abi.DEVICE_VFIO]
    assert told == [(abi.VFIO_GROUP_ADD, 5), (abi.VFIO_GROUP_ADD, 6), (abi.VFIO_GROUP_DEL, 5)]
    listener.close()
    listener.close()


def test_a_kvm_that_does_not_want_to_know_is_no_obstacle(kernel: Kernel, told: list[tuple[int, int]]) -> None:
    kernel.fail("KVM_CREATE_DEVICE", errno.ENODEV)
    listener = groups()
    listener.group_added(GROUP)
    listener.group_removed(GROUP)
    listener.close()
    assert told == []


def test_any_other_failure_is_one(kernel: Kernel) -> None:
    kernel.fail("KVM_CREATE_DEVICE", errno.EMFILE)
    with pytest.raises(IoctlError, match="KVM_CREATE_DEVICE: EMFILE"):
        groups().group_added(GROUP)
