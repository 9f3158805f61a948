"""KVM's VFIO device: it tells KVM which groups of the host's devices work for the guest.

KVM then knows whether their DMA is coherent with the guest's caches (WBINVD must reach the processor where it is not),
and some drivers of the host want to know the VM before they open a device.
"""

from __future__ import annotations

import errno
import os

from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.kvm.vm import Vm
from kvmpy.log import Log

log = Log(__name__)


class VfioGroups:
    """Those of one VM (a `kvmpy.devices.vfio.container.GroupListener`). The device is made when it is first needed."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._fd: int | None = None

    def group_added(self, group: int) -> None:
        """The descriptor ``group`` is that of a group with a container. Raises IoctlError."""
        if self._fd is None:
            self._fd = self._create()
        if self._fd >= 0:
            abi.set_vfio_group(self._fd, abi.VFIO_GROUP_ADD, group)

    def group_removed(self, group: int) -> None:
        """It is about to be closed."""
        if self._fd is not None and self._fd >= 0:
            abi.set_vfio_group(self._fd, abi.VFIO_GROUP_DEL, group)

    def close(self) -> None:
        """Close the device; closing twice is allowed."""
        if self._fd is not None and self._fd >= 0:
            os.close(self._fd)
        self._fd = None

    def _create(self) -> int:
        """The descriptor, -1 where this KVM has no such device: that costs what the module's text says."""
        request = abi.CreateDevice.new(type=abi.DEVICE_VFIO)
        try:
            abi.KVM_CREATE_DEVICE(self._vm.fd, request)
        except IoctlError as e:
            if e.errno not in (errno.ENODEV, errno.ENOTTY):
                raise
            log.info("this KVM is not told of passed-through devices: %s", e)
            return -1
        return request.fd
