"""Groups of devices that the host's IOMMU keeps apart, and the one container in which the guest's RAM is mapped.

A group is what the IOMMU cannot take apart, so it is the guest's as a whole or not at all. All groups of a machine
share a container: RAM is mapped once, when the first device needs it, and unmapped when the last group leaves. Until
then nothing is pinned, but it has been looked at whether RAM can be. What is here is the kernel's older interface,
which every kernel has; iommufd would be another `DmaSpace`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Protocol

import msgspec

from kvmpy.abi import vfio as abi
from kvmpy.devices.vfio.type1 import Type1, check_locked_memory
from kvmpy.errors import HostError, IoctlError, errno_name
from kvmpy.memory import GuestMemory

DIRECTORY: Final = "/dev/vfio"


class GroupListener(Protocol):
    """Somebody who must know the groups' descriptors: KVM."""

    def group_added(self, group: int) -> None:
        """The descriptor ``group`` is that of a group with a container. Raises HostError."""

    def group_removed(self, group: int) -> None:
        """It is about to be closed."""


class DmaSpace(Protocol):
    """Where devices are opened so that their DMA reaches the guest's RAM and nothing else.

    By any thread that may block.
    """

    def open(self, address: str, group: int) -> int:
        """The descriptor of the function at ``address``, whose DMA reaches nothing yet.

        Raises HostError, with nothing changed, also where RAM could not be mapped.
        """

    def map_memory(self, is_wanted: Callable[[], bool]) -> None:
        """Let the DMA of all devices reach all RAM, which is pinned by that: seconds, for a large guest.

        Nothing happens where that has been done. Raises HostError, with nothing mapped; soon, once ``is_wanted`` says
        no more.
        """

    def close(self, descriptor: int, group: int) -> None:
        """Close a descriptor that `open` gave. The last one out unmaps."""

    def group_fd(self, group: int) -> int:
        """The group's own descriptor, which proves that its devices are ours."""


class Group(msgspec.Struct):
    """An open group, and how many of its devices are open."""

    fd: int
    devices: int = 0


class Container:
    """A `DmaSpace` for the RAM in ``memory``; ``listener`` is told of every group while it is open."""

    def __init__(self, memory: GuestMemory, listener: GroupListener, directory: str = DIRECTORY) -> None:
        self._memory, self._listener, self._directory = memory, listener, directory
        self._lock = threading.Lock()
        self._mapping = threading.Lock()  # not the other: devices come and go while memory is mapped
        self._is_mapped = False
        self._fd = -1
        self._groups: dict[int, Group] = {}
        self._type1: Type1 | None = None

    def open(self, address: str, group: int) -> int:
        """Raises HostError, with nothing changed."""
        with self._lock, ExitStack() as undo:
            joined = self._groups.get(group) or self._join(group, undo)
            try:
                descriptor = abi.VFIO_GROUP_GET_DEVICE_FD(joined.fd, address)
            except IoctlError as e:
                raise HostError(f"{address}: {e}: {_device_advice(e.errno)}") from e
            joined.devices += 1
            undo.pop_all()
        return descriptor

    def close(self, descriptor: int, group: int) -> None:
        """Give a device back; what it kept of the group and of the container goes with the last of each."""
        with self._lock:
            os.close(descriptor)
            joined = self._groups[group]
            joined.devices -= 1
            if not joined.devices:
                self._leave(group)

    def map_memory(self, is_wanted: Callable[[], bool]) -> None:
        """Whoever calls has a device open, until this returns."""
        with self._mapping:
            if self._is_mapped:
                return
            assert self._type1 is not None, "there is a device"
            self._type1.is_wanted = is_wanted
            try:
                self._memory.listen(self._type1)
            finally:
                self._type1.is_wanted = lambda: True  # of RAM that comes later it is not this device's to say
            self._is_mapped = True

    def group_fd(self, group: int) -> int:
        """The group's own descriptor."""
        return self._groups[group].fd

    def _join(self, number: int, undo: ExitStack) -> Group:
        group = Group(self._open_group(number))
        self._groups[number] = group
        undo.callback(self._forget, number)
        if self._fd < 0:
            self._fd = self._open_container()
            undo.callback(self._close_container)
        try:
            abi.VFIO_GROUP_SET_CONTAINER(group.fd, self._fd)
            if self._type1 is None:
                abi.VFIO_SET_IOMMU(self._fd, abi.TYPE1V2_IOMMU)
        except IoctlError as e:
            raise HostError(f"{self._directory}/{number}: {e}: {_group_advice(e.errno)}") from e
        if self._type1 is None:
            self._check_memory(undo)
        self._listener.group_added(group.fd)
        undo.callback(self._listener.group_removed, group.fd)
        return group

    def _check_memory(self, undo: ExitStack) -> None:
        """Whether RAM can be mapped, as far as that can be known."""
        type1 = Type1(self._fd)
        for block in self._memory.blocks:
            type1.check(block)
        check_locked_memory(self._memory.size)
        self._type1 = type1
        undo.callback(self._unmap_memory)

    def _unmap_memory(self) -> None:
        if self._type1 is not None:
            self._memory.unlisten(self._type1)
            self._type1, self._is_mapped = None, False

    def _leave(self, number: int) -> None:
        self._listener.group_removed(self._groups[number].fd)
        if len(self._groups) == 1:
            self._unmap_memory()
        self._forget(number)
        if not self._groups:
            self._close_container()

    def _forget(self, number: int) -> None:
        os.close(self._groups.pop(number).fd)

    def _close_container(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def _open_group(self, number: int) -> int:
        path = f"{self._directory}/{number}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise HostError(f"{path}: {errno_name(e.errno or 0)}: {_open_advice(e.errno)}") from e
        try:
            if not abi.VFIO_GROUP_GET_STATUS(fd).flags & abi.GROUP_VIABLE:
                raise HostError(
                    f"{path}: the IOMMU cannot keep this group's devices apart, and one of them still has a driver of "
                    f"the host; bind all of /sys/kernel/iommu_groups/{number}/devices to vfio-pci"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open_container(self) -> int:
        path = f"{self._directory}/vfio"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise HostError(f"{path}: {errno_name(e.errno or 0)}: {_open_advice(e.errno)}") from e
        try:
            version = abi.VFIO_GET_API_VERSION(fd)
            if version != abi.API_VERSION or not abi.VFIO_CHECK_EXTENSION(fd, abi.TYPE1V2_IOMMU):
                raise HostError(
                    f"{path}: this kernel's VFIO, version {version}, has no type 1 IOMMU; load vfio_iommu_type1"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd


def _open_advice(number: int | None) -> str:
    match number:
        case errno.ENOENT:
            return "load vfio_pci (modprobe vfio_pci), and bind the device to it"
        case errno.EBUSY:
            return "another process has it; end that one, or give this machine another device"
        case errno.EACCES | errno.EPERM:
            return "not permitted: run as root, or give the user this file"
        case _:
            return "it cannot be opened"


def _group_advice(number: int | None) -> str:
    if number == errno.EPERM:
        return (
            "the host has no interrupt remapping, without which a device could send any interrupt; switch it on in the "
            "firmware and the kernel"
        )
    return "the IOMMU does not take this group beside the machine's others; see the kernel's log"


def _device_advice(number: int | None) -> str:
    if number == errno.ENODEV:
        return "no such device in its group: it is gone, or not bound to vfio-pci"
    return "it cannot be opened; see the kernel's log"
