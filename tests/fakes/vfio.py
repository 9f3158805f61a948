"""A kernel with VFIO, a NIC bound to it, and an IOMMU: it keeps what it is told and insists on the kernel's rules.

A device's descriptor is a memfd with all its regions in it, so pread, pwrite and mmap are the real ones; its registers
are plain memory, which a reset that resets clears.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvmpy._native import ffi
from kvmpy.abi import ioctl
from kvmpy.abi import vfio as abi
from kvmpy.errors import IoctlError
from tests.fakes.kernel import Kernel

ADDRESS: Final = "0000:5e:00.2"
GROUP: Final = 7
REGION_SHIFT: Final = 20
CONFIG: Final = 7
INTX, MSI, MSIX, ERROR, REQUEST = range(5)
READ_WRITE_MMAP: Final = 7
PM, MSI_CAP, EXPRESS, MSIX_CAP, VENDOR = 0xC8, 0xD0, 0xE0, 0xA0, 0x50
FLR: Final = 1 << 28
SERIAL: Final = 0x5254_00FF_FF6F_55CC
BAR0_SIZE, TABLE_BAR_SIZE, IO_SIZE, SMALL = 0x8000, 0x4000, 0x20, 0x100


def config_space(*, flr: bool = True, vectors: int = 5, pin: int = 1, header_type: int = 0x80) -> bytearray:
    """That of a network controller: five BARs, every usual capability, and one that is nobody's business."""
    data = bytearray(4096)

    def put(at: int, size: int, value: int) -> None:
        data[at : at + size] = value.to_bytes(size, "little")

    for at, size, value in (
        *((0x00, 2, 0x8086), (0x02, 2, 0x10CA), (0x06, 2, 0x0010), (0x08, 1, 1), (0x09, 3, 0x02_0000)),
        *((0x0E, 1, header_type), (0x2C, 2, 0x1AF4), (0x2E, 2, 0x1100), (0x34, 1, PM), (0x3D, 1, pin)),
        *((0x10, 4, 0x0000_0000), (0x14, 4, 0x0000_0001), (0x18, 4, 0x0000_000C), (0x20, 4, 0x0), (0x30, 4, 0)),
        *((PM, 2, MSI_CAP << 8 | 0x01), (PM + 2, 2, 0xC823)),
        *((MSI_CAP, 2, EXPRESS << 8 | 0x05), (MSI_CAP + 2, 2, 0x0080)),
        *((EXPRESS, 2, MSIX_CAP << 8 | 0x10), (EXPRESS + 2, 2, 0x0002), (EXPRESS + 4, 4, FLR * flr | 0x8CC1)),
        *((MSIX_CAP, 2, VENDOR << 8 | 0x11), (MSIX_CAP + 2, 2, vectors - 1)),
        *((MSIX_CAP + 4, 4, 0x0000 | 2), (MSIX_CAP + 8, 4, 0x2000 | 2), (VENDOR, 2, 0x09)),
        *((0x100, 4, 0x1401_0001), (0x140, 4, 0x0001_0003), (0x144, 8, SERIAL)),
    ):
        put(at, size, value)
    return data


@dataclass
class FakeNic:
    """``regions`` are size and flags by index, ``areas`` the sparse ones; ``counts`` interrupts by index."""

    config: bytearray = field(default_factory=config_space)
    regions: dict[int, tuple[int, int]] = field(
        default_factory=lambda: {
            0: (BAR0_SIZE, READ_WRITE_MMAP),
            1: (IO_SIZE, 3),
            2: (TABLE_BAR_SIZE, READ_WRITE_MMAP),
            4: (SMALL, READ_WRITE_MMAP),
        }
    )
    areas: dict[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=lambda: {INTX: 1, MSI: 1, MSIX: 5, ERROR: 1, REQUEST: 1})
    flags: int = abi.DEVICE_PCI | abi.DEVICE_RESETS
    dependents: Sequence[str] = (ADDRESS,)
    fd: int = -1
    triggers: dict[int, list[int]] = field(default_factory=dict)
    unmask: int = -1
    resets: list[str] = field(default_factory=list)
    command_at_reset: list[int] = field(default_factory=list)
    resetting: Callable[[], object] = lambda: None

    def open(self) -> int:
        self.close()
        self.fd = os.memfd_create("vfio-device")
        os.ftruncate(self.fd, (CONFIG + 1) << REGION_SHIFT)
        os.pwrite(self.fd, self.config, CONFIG << REGION_SHIFT)
        return os.dup(self.fd)

    def close(self) -> None:
        """Forget the memory behind the device, which it keeps as long as a test may look at it."""
        fd, self.fd = self.fd, -1  # in this order: other threads ask meanwhile whose a request is
        if fd >= 0:
            os.close(fd)

    @property
    def command(self) -> int:
        return self.peek(CONFIG, 4, 2)

    def peek(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(os.pread(self.fd, size, (region << REGION_SHIFT) + offset), "little")

    def poke(self, region: int, offset: int, size: int, value: int) -> None:
        os.pwrite(self.fd, value.to_bytes(size, "little"), (region << REGION_SHIFT) + offset)

    def reset(self, how: str) -> None:
        self.command_at_reset.append(self.command)
        self.resetting()
        for index, (size, _) in self.regions.items():
            os.pwrite(self.fd, bytes(size), index << REGION_SHIFT)
        self.resets.append(how)

    def signal(self, index: int, vector: int = 0) -> None:
        """The device interrupts: the kernel signals whatever is tied to that."""
        os.eventfd_write(self.triggers[index][vector], 1)


class VfioKernel(Kernel):
    """One NIC in a group of its own. ``directory`` is /dev/vfio; ``maps`` are size and host address by DMA address."""

    def __init__(self, directory: Path, nic: FakeNic | None = None) -> None:
        super().__init__()
        self.directory, self.nic = directory, nic or FakeNic()
        for name in ("vfio", str(GROUP), str(GROUP + 1)):
            (directory / name).touch()
        self.maps: dict[int, tuple[int, int]] = {}
        self.viable, self.extension = True, 1
        self.ranges: Sequence[tuple[int, int]] = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1))
        self.available: int | None = 65535
        self.most_vectors = 64
        self.told: list[str] = []
        self._beside = ioctl.sys_ioctl  # another one's, where a test has two

    def __call__(self, name: str, fd: int, request: int, argument: Any) -> int:
        if not self._has(fd):
            return self._beside(name, fd, request, argument)
        answered = super().__call__(name, fd, request, argument)
        if name in self.answers:
            return answered
        handler = getattr(self, f"_{name.lower()}", None)
        return 0 if handler is None else int(handler(argument) or 0)

    def _has(self, fd: int) -> bool:
        """Whether ``fd`` is a descriptor of ours."""
        if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{self.directory}/"):
            return True
        return self.nic.fd >= 0 and os.path.sameopenfile(fd, self.nic.fd)

    # A listener of groups

    def group_added(self, group: int) -> None:
        os.fstat(group)
        self.told.append("added")

    def group_removed(self, group: int) -> None:
        os.fstat(group)
        self.told.append("removed")

    # The container and the group

    def _vfio_check_extension(self, argument: Any) -> int:
        return self.extension

    def _vfio_group_get_status(self, argument: Any) -> None:
        argument.flags = abi.GROUP_VIABLE if self.viable else 0

    def _vfio_group_get_device_fd(self, argument: Any) -> int:
        if ffi.string(argument).decode() != ADDRESS:
            raise IoctlError("VFIO_GROUP_GET_DEVICE_FD", errno.ENODEV)
        return self.nic.open()

    def _vfio_iommu_get_info(self, argument: Any) -> None:
        base = ffi.sizeof("struct vfio_iommu_type1_info")
        ranges = b"".join(start.to_bytes(8, "little") + end.to_bytes(8, "little") for start, end in self.ranges)
        data = _capability(base, 1, len(self.ranges).to_bytes(8, "little") + ranges, last=self.available is None)
        if self.available is not None:
            data += _capability(base + len(data), 3, self.available.to_bytes(8, "little"), last=True)
        argument.flags = 3
        self._answer(argument, base, data)

    def _vfio_iommu_map_dma(self, argument: Any) -> None:
        for start, (size, _) in self.maps.items():
            if argument.iova < start + size and start < argument.iova + argument.size:
                raise IoctlError("VFIO_IOMMU_MAP_DMA", errno.EEXIST)
        if self.available is not None:
            if not self.available:
                raise IoctlError("VFIO_IOMMU_MAP_DMA", errno.ENOSPC)
            self.available -= 1
        self.maps[argument.iova] = argument.size, argument.vaddr

    def _vfio_iommu_unmap_dma(self, argument: Any) -> None:
        end, taken = argument.iova + argument.size, 0
        for start, (size, _) in list(self.maps.items()):
            if argument.iova <= start and start + size <= end:
                taken += self.maps.pop(start)[0]
                if self.available is not None:
                    self.available += 1
            elif start < end and argument.iova < start + size:
                raise IoctlError("VFIO_IOMMU_UNMAP_DMA", errno.EINVAL)
        argument.size = taken

    # The device

    def _vfio_device_get_info(self, argument: Any) -> None:
        argument.flags, argument.num_regions, argument.num_irqs = self.nic.flags, 9, 5

    def _vfio_device_get_region_info(self, argument: Any) -> None:
        index = argument.index
        size, flags = (len(self.nic.config), 3) if index == CONFIG else self.nic.regions.get(index, (0, 0))
        argument.size, argument.offset = size, index << REGION_SHIFT
        areas = self.nic.areas.get(index)
        argument.flags = flags | (abi.REGION_CAPS if areas is not None else 0)
        if areas is not None:
            body = b"".join(offset.to_bytes(8, "little") + extent.to_bytes(8, "little") for offset, extent in areas)
            base = ffi.sizeof("struct vfio_region_info")
            self._answer(argument, base, _capability(base, 1, len(areas).to_bytes(8, "little") + body, last=True))

    def _vfio_device_get_irq_info(self, argument: Any) -> None:
        argument.count = self.nic.counts.get(argument.index, 0)
        argument.flags = abi.IRQ_EVENTFD

    def _vfio_device_set_irqs(self, argument: Any) -> int:
        nic, index, count = self.nic, argument.index, argument.count
        assert argument.argsz == ffi.sizeof("struct vfio_irq_set") + len(argument.data)
        data = bytes(argument.data[n] for n in range(len(argument.data)))
        fds = [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]
        for fd in fds:
            os.eventfd_write(fd, 0)  # or it is none
        if argument.start + count > nic.counts.get(index, 0):
            raise IoctlError("VFIO_DEVICE_SET_IRQS", errno.EINVAL)
        if argument.flags & abi.IRQ_UNMASK:
            if INTX not in nic.triggers:
                raise IoctlError("VFIO_DEVICE_SET_IRQS", errno.EINVAL)
            nic.unmask = fds[0]
        elif not count:
            if nic.triggers.pop(index, None) is None:
                raise IoctlError("VFIO_DEVICE_SET_IRQS", errno.EINVAL)
        else:
            if index <= MSIX and any(other <= MSIX for other in nic.triggers):
                raise IoctlError("VFIO_DEVICE_SET_IRQS", errno.EINVAL)
            if count > self.most_vectors:
                return self.most_vectors
            nic.triggers[index] = fds
        return 0

    def _vfio_device_reset(self, argument: Any) -> None:
        if not self.nic.flags & abi.DEVICE_RESETS:
            raise IoctlError("VFIO_DEVICE_RESET", errno.EINVAL)
        self.nic.reset("function")

    def _vfio_device_get_pci_hot_reset_info(self, argument: Any) -> None:
        if not self.nic.dependents:
            raise IoctlError("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", errno.ENODEV)
        argument.count = len(self.nic.dependents)
        for n, address in enumerate(self.nic.dependents):
            segment, bus, place = address.split(":")
            device, function = place.split(".")
            entry = argument.devices[n]
            entry.group_id, entry.segment, entry.bus = GROUP, int(segment, 16), int(bus, 16)
            entry.devfn = int(device, 16) << 3 | int(function)

    def _vfio_device_pci_hot_reset(self, argument: Any) -> None:
        os.fstat(argument.group_fds[0])
        self.nic.reset("bus")

    @staticmethod
    def _answer(argument: Any, base: int, data: bytes) -> None:
        """With capabilities, if there is room; else say how much is wanted."""
        argument.cap_offset = 0
        if argument.argsz >= base + len(data):
            argument.cap_offset = base
            ffi.memmove(ffi.cast("char *", argument) + base, data, len(data))
        argument.argsz = max(argument.argsz, base + len(data))


def _capability(at: int, kind: int, body: bytes, *, last: bool) -> bytes:
    size = 8 + len(body)
    return (
        kind.to_bytes(2, "little") + (1).to_bytes(2, "little") + (0 if last else at + size).to_bytes(4, "little") + body
    )
