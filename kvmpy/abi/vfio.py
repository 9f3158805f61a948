"""linux/vfio.h, typed: constants, structs and requests by their kernel names.

Values and layouts come from the compiler (vfio.cdef); this file only puts types on them. VFIO's structs say how large
they are in ``argsz``, and the kernel may answer with more than was asked for: a chain of capabilities behind the
struct. `Info` asks again with room for it; `chain` walks it without trusting it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, MutableSequence, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from kvmpy._native import ffi, lib
from kvmpy.abi import ioctl
from kvmpy.abi.ioctl import Call, Layout, Unsized
from kvmpy.errors import IoctlError

# The largest answer taken: thousands of areas, ranges or devices.
MOST_BYTES: Final = 1 << 16


class GroupStatus(Layout, c="struct vfio_group_status"):
    argsz: int
    flags: int


class IommuType1Info(Layout, c="struct vfio_iommu_type1_info"):
    argsz: int
    flags: int
    iova_pgsizes: int
    cap_offset: int


class DmaMap(Layout, c="struct vfio_iommu_type1_dma_map"):
    argsz: int
    flags: int
    vaddr: int
    iova: int
    size: int


class DmaUnmap(Layout, c="struct vfio_iommu_type1_dma_unmap"):
    argsz: int
    flags: int
    iova: int
    size: int


class DeviceInfo(Layout, c="struct vfio_device_info"):
    argsz: int
    flags: int
    num_regions: int
    num_irqs: int


class RegionInfo(Layout, c="struct vfio_region_info"):
    argsz: int
    flags: int
    index: int
    cap_offset: int
    size: int
    offset: int


class IrqInfo(Layout, c="struct vfio_irq_info"):
    argsz: int
    flags: int
    index: int
    count: int


class IrqSet(Layout, c="struct vfio_irq_set"):
    argsz: int
    flags: int
    index: int
    start: int
    count: int
    data: MutableSequence[int]


class PciHotResetInfo(Layout, c="struct vfio_pci_hot_reset_info"):
    argsz: int
    flags: int
    count: int
    devices: MutableSequence[Any]


class PciHotReset(Layout, c="struct vfio_pci_hot_reset"):
    argsz: int
    flags: int
    count: int
    group_fds: MutableSequence[int]


T = TypeVar("T", bound=Layout)


class PutSized(Unsized, Generic[T]):
    """A struct in, or both ways, that says its own size: ``argsz`` is filled in."""

    def __init__(self, name: str, layout: type[T]) -> None:
        super().__init__(name)
        self.layout = layout

    def __call__(self, fd: int, **fields: object) -> T:
        value: Any = self.layout.new(**fields)
        value.argsz = ffi.sizeof(value[0])
        if (left := ioctl.sys_ioctl(self.name, fd, self.number, value)) > 0:
            # Only VFIO_DEVICE_SET_IRQS says so: that many vectors there are, fewer than it was asked for.
            raise IoctlError(self.name, errno.ENOSPC, f"the host has {left} interrupt vectors left")
        made: T = value
        return made


class Answer(NamedTuple, Generic[T]):
    """``info``, and all bytes of which it is the beginning."""

    info: T
    data: bytes


class Info(Unsized, Generic[T]):
    """A struct out, as long as the kernel wants it to be."""

    def __init__(self, name: str, layout: type[T]) -> None:
        super().__init__(name)
        self.layout = layout

    def __call__(self, fd: int, **fields: int) -> Answer[T]:
        size = ffi.sizeof(self.layout.C)
        while True:
            buffer = ffi.new("char[]", size)
            info = ffi.cast(f"{self.layout.C} *", buffer)
            for name, value in (*fields.items(), ("argsz", size)):
                setattr(info, name, value)
            ioctl.sys_ioctl(self.name, fd, self.number, info)
            if info.argsz <= size or info.argsz > MOST_BYTES:
                whole = ffi.buffer(buffer)[:]
                return Answer(ffi.from_buffer(f"{self.layout.C} *", whole), whole)
            size = info.argsz


class PutFd(Unsized):
    """A descriptor in, by its address."""

    def __call__(self, fd: int, descriptor: int) -> int:
        return ioctl.sys_ioctl(self.name, fd, self.number, ffi.new("int32_t *", descriptor))


class GetByName(Unsized):
    """A descriptor out: that of whatever has a name."""

    def __call__(self, fd: int, name: str) -> int:
        return ioctl.sys_ioctl(self.name, fd, self.number, ffi.new("char[]", name.encode()))


VFIO_GET_API_VERSION = Call("VFIO_GET_API_VERSION")
VFIO_CHECK_EXTENSION = Call("VFIO_CHECK_EXTENSION")
VFIO_SET_IOMMU = Call("VFIO_SET_IOMMU")
VFIO_GROUP_GET_STATUS = PutSized("VFIO_GROUP_GET_STATUS", GroupStatus)
VFIO_GROUP_SET_CONTAINER = PutFd("VFIO_GROUP_SET_CONTAINER")
VFIO_GROUP_GET_DEVICE_FD = GetByName("VFIO_GROUP_GET_DEVICE_FD")

VFIO_IOMMU_GET_INFO = Info("VFIO_IOMMU_GET_INFO", IommuType1Info)
VFIO_IOMMU_MAP_DMA = PutSized("VFIO_IOMMU_MAP_DMA", DmaMap)
VFIO_IOMMU_UNMAP_DMA = PutSized("VFIO_IOMMU_UNMAP_DMA", DmaUnmap)

VFIO_DEVICE_GET_INFO = Info("VFIO_DEVICE_GET_INFO", DeviceInfo)
VFIO_DEVICE_GET_REGION_INFO = Info("VFIO_DEVICE_GET_REGION_INFO", RegionInfo)
VFIO_DEVICE_GET_IRQ_INFO = Info("VFIO_DEVICE_GET_IRQ_INFO", IrqInfo)
VFIO_DEVICE_SET_IRQS = PutSized("VFIO_DEVICE_SET_IRQS", IrqSet)
VFIO_DEVICE_RESET = Call("VFIO_DEVICE_RESET")
VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = PutSized("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", PciHotResetInfo)
VFIO_DEVICE_PCI_HOT_RESET = PutSized("VFIO_DEVICE_PCI_HOT_RESET", PciHotReset)

API_VERSION: Final[int] = lib.VFIO_API_VERSION
TYPE1V2_IOMMU: Final[int] = lib.VFIO_TYPE1v2_IOMMU
GROUP_VIABLE: Final[int] = lib.VFIO_GROUP_FLAGS_VIABLE
IOMMU_INFO_CAPS: Final[int] = lib.VFIO_IOMMU_INFO_CAPS
CAP_IOVA_RANGE: Final[int] = lib.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE
CAP_DMA_AVAIL: Final[int] = lib.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL
DMA_READ: Final[int] = lib.VFIO_DMA_MAP_FLAG_READ
DMA_WRITE: Final[int] = lib.VFIO_DMA_MAP_FLAG_WRITE
DEVICE_RESETS: Final[int] = lib.VFIO_DEVICE_FLAGS_RESET
DEVICE_PCI: Final[int] = lib.VFIO_DEVICE_FLAGS_PCI
REGION_READ: Final[int] = lib.VFIO_REGION_INFO_FLAG_READ
REGION_WRITE: Final[int] = lib.VFIO_REGION_INFO_FLAG_WRITE
REGION_MMAP: Final[int] = lib.VFIO_REGION_INFO_FLAG_MMAP
REGION_CAPS: Final[int] = lib.VFIO_REGION_INFO_FLAG_CAPS
CAP_SPARSE_MMAP: Final[int] = lib.VFIO_REGION_INFO_CAP_SPARSE_MMAP
BAR0_REGION: Final[int] = lib.VFIO_PCI_BAR0_REGION_INDEX
ROM_REGION: Final[int] = lib.VFIO_PCI_ROM_REGION_INDEX
CONFIG_REGION: Final[int] = lib.VFIO_PCI_CONFIG_REGION_INDEX
INTX_IRQ: Final[int] = lib.VFIO_PCI_INTX_IRQ_INDEX
MSI_IRQ: Final[int] = lib.VFIO_PCI_MSI_IRQ_INDEX
MSIX_IRQ: Final[int] = lib.VFIO_PCI_MSIX_IRQ_INDEX
ERROR_IRQ: Final[int] = lib.VFIO_PCI_ERR_IRQ_INDEX
REQUEST_IRQ: Final[int] = lib.VFIO_PCI_REQ_IRQ_INDEX
IRQ_EVENTFD: Final[int] = lib.VFIO_IRQ_INFO_EVENTFD
IRQ_NO_DATA: Final[int] = lib.VFIO_IRQ_SET_DATA_NONE
IRQ_EVENTFDS: Final[int] = lib.VFIO_IRQ_SET_DATA_EVENTFD
IRQ_UNMASK: Final[int] = lib.VFIO_IRQ_SET_ACTION_UNMASK
IRQ_TRIGGER: Final[int] = lib.VFIO_IRQ_SET_ACTION_TRIGGER


class Extent(NamedTuple):
    """``size`` bytes from ``offset`` on."""

    offset: int
    size: int


def chain(data: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """ID and offset of each capability in an answer, from that at ``offset`` on; ends where the chain is wrong."""
    size, seen = ffi.sizeof("struct vfio_info_cap_header"), set[int]()
    while offset not in seen and 0 < offset <= len(data) - size:
        seen.add(offset)
        header = _at("vfio_info_cap_header", data, offset)
        yield header.id, offset
        offset = header.next


def sparse_areas(data: bytes, offset: int) -> Sequence[Extent]:
    """Of VFIO_REGION_INFO_CAP_SPARSE_MMAP at ``offset``: what may be mapped. Those that the answer has no room for are
    not there."""
    fixed, each = (ffi.sizeof(f"struct vfio_region_{name}") for name in ("info_cap_sparse_mmap", "sparse_mmap_area"))
    if len(data) < offset + fixed:
        return []
    found = _at("vfio_region_info_cap_sparse_mmap", data, offset)
    count = min(found.nr_areas, (len(data) - offset - fixed) // each)
    return [Extent(found.areas[n].offset, found.areas[n].size) for n in range(count)]


def iova_ranges(data: bytes, offset: int) -> Sequence[range]:
    """Of VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE at ``offset``: the addresses that a device can be given."""
    fixed, each = ffi.sizeof("struct vfio_iommu_type1_info_cap_iova_range"), ffi.sizeof("struct vfio_iova_range")
    if len(data) < offset + fixed:
        return []
    found = _at("vfio_iommu_type1_info_cap_iova_range", data, offset)
    count = min(found.nr_iovas, (len(data) - offset - fixed) // each)
    return [range(found.iova_ranges[n].start, found.iova_ranges[n].end + 1) for n in range(count)]


def dma_available(data: bytes, offset: int) -> int | None:
    """Of VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL at ``offset``: how many more maps the kernel takes."""
    if len(data) < offset + ffi.sizeof("struct vfio_iommu_type1_info_dma_avail"):
        return None
    return int(_at("vfio_iommu_type1_info_dma_avail", data, offset).avail)


def bind(fd: int, index: int, action: int, descriptors: Sequence[int]) -> None:
    """VFIO_DEVICE_SET_IRQS: have the first interrupts of ``index`` tied to eventfds; -1 is none."""
    data = b"".join(descriptor.to_bytes(4, "little", signed=True) for descriptor in descriptors)
    flags = IRQ_EVENTFDS | action
    VFIO_DEVICE_SET_IRQS(fd, flags=flags, index=index, start=0, count=len(descriptors), data=list(data))


def unbind(fd: int, index: int) -> None:
    """VFIO_DEVICE_SET_IRQS: disable all interrupts of ``index``."""
    VFIO_DEVICE_SET_IRQS(fd, flags=IRQ_NO_DATA | IRQ_TRIGGER, index=index, start=0, count=0)


def _at(struct: str, data: bytes, offset: int) -> Any:
    """A struct that begins at ``offset``, all of which is there. It keeps a copy of ``data`` alive."""
    return ffi.from_buffer(f"struct {struct} *", data[offset:])
