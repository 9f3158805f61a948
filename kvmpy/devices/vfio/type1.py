"""The guest's RAM mapped for DMA by a type 1 IOMMU: a device's addresses are guest-physical ones.

Mapping pins every page, so it takes time and counts as locked memory; both are looked at before. It is done in chunks,
between which it can be given up, and never while a vCPU waits. Mapped RAM must not be taken away from below (no
MADV_DONTNEED, no balloon): the device would go on with pages that the guest has no more.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvmpy.abi import vfio as abi
from kvmpy.errors import HostError, IoctlError
from kvmpy.log import Log
from kvmpy.memory import Ram

log = Log(__name__)

MIB: Final = 1 << 20
CHUNK: Final = 256 * MIB
HUGE_PAGE: Final = 2 * MIB
CAP_IPC_LOCK: Final = 1 << 14  # linux/capability.h: no limit on locked memory


class Type1:
    """The maps of one container (a `kvmpy.memory.MemoryListener`): all RAM, and nothing else.

    Once ``is_wanted`` says no, nothing more is mapped.
    """

    def __init__(self, fd: int) -> None:
        """``fd`` is a container's whose IOMMU is set. Raises IoctlError."""
        self._fd = fd
        self.is_wanted: Callable[[], bool] = lambda: True
        info, data = abi.VFIO_IOMMU_GET_INFO(fd)
        self._ranges: Sequence[range] | None = None  # None: this kernel does not say
        self._available: int | None = None
        if info.flags & abi.IOMMU_INFO_CAPS:
            for kind, offset in abi.chain(data, info.cap_offset):
                if kind == abi.CAP_IOVA_RANGE:
                    self._ranges = abi.iova_ranges(data, offset)
                elif kind == abi.CAP_DMA_AVAIL:
                    self._available = abi.dma_available(data, offset)

    def check(self, block: Ram) -> None:
        """Raises HostError where it is known already that the block cannot be mapped."""
        self._check_range(block)
        self._step(block)

    def ram_added(self, block: Ram) -> None:
        """Raises HostError where the IOMMU or the kernel cannot map all of it; none of it is mapped then."""
        self._check_range(block)
        step = self._step(block)
        at = 0
        try:
            while at < block.size:
                if not self.is_wanted():
                    raise HostError("vfio: mapping the guest's memory for DMA was given up")
                size = min(step, block.size - at)
                self._map(block.hva + at, block.gpa + at, size)
                at += size
        except IoctlError as e:
            self._unmap(block.gpa, at)
            raise HostError(
                f"{e}: mapping the guest's memory at {block.gpa + at:#x} for DMA; see the kernel's log, "
                "and whether memory can be locked (ulimit -l)"
            ) from e
        except BaseException:
            self._unmap(block.gpa, at)
            raise

    def ram_removed(self, block: Ram) -> None:
        """No device reaches it when this returns."""
        self._unmap(block.gpa, block.size)

    def _check_range(self, block: Ram) -> None:
        if self._ranges is None or any(block.gpa in r and block.end - 1 in r for r in self._ranges):
            return
        allowed = ", ".join(f"{r.start:#x}-{r.stop - 1:#x}" for r in self._ranges) or "none"
        raise HostError(
            f"vfio: the guest's memory at {block.gpa:#x}-{block.end - 1:#x} is not within what this host's IOMMU can "
            f"map ({allowed}); give the guest less memory"
        )

    def _step(self, block: Ram) -> int:
        """Bytes for each map: larger than usual where the kernel takes but few of them."""
        if self._available is None:
            return CHUNK
        if not self._available:
            raise HostError("vfio: this host's IOMMU takes no more maps; raise dma_entry_limit of vfio_iommu_type1")
        least = -(-block.size // max(self._available // 2, 1))  # half of them, so that the next block has some too
        return CHUNK if least <= CHUNK else -(-least // HUGE_PAGE) * HUGE_PAGE

    def _map(self, hva: int, iova: int, size: int) -> None:
        abi.VFIO_IOMMU_MAP_DMA(self._fd, flags=abi.DMA_READ | abi.DMA_WRITE, vaddr=hva, iova=iova, size=size)
        if self._available is not None:
            self._available -= 1

    def _unmap(self, iova: int, size: int) -> None:
        """One request takes every map in the range. It fails where none is left, else by a mistake of ours."""
        if not size:
            return
        try:
            done = abi.VFIO_IOMMU_UNMAP_DMA(self._fd, iova=iova, size=size)
            if done.size != size:
                log.error("vfio: %#x of %#x bytes at %#x were mapped for DMA", done.size, size, iova)
        except IoctlError as e:
            if self._is_gone():
                return
            log.error("%s: the guest's memory at %#x stays mapped for DMA until the device is closed", e, iova)

    def _is_gone(self) -> bool:
        """Whether the container has lost its IOMMU, and so every map: the host took its last group's last device back.

        The kernel does that as soon as the device is closed, and then answers every request so.
        """
        try:
            abi.VFIO_IOMMU_GET_INFO(self._fd)
        except IoctlError as e:
            return e.errno == errno.EINVAL
        return False


def check_locked_memory(needed: int, status: Path = Path("/proc/self/status")) -> None:
    """Raises HostError where the process may not lock ``needed`` bytes more."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    if int(fields.get("CapEff", "0"), 16) & CAP_IPC_LOCK:
        return
    locked = int(fields.get("VmLck", "0 kB").split()[0]) << 10
    if locked + needed > limit:
        raise HostError(
            f"vfio: a passed-through device needs all of the guest's memory locked, {needed // MIB} MiB, and this "
            f"process may lock {max(limit - locked, 0) // MIB} MiB more; run as root, or raise the limit "
            "(ulimit -l, or LimitMEMLOCK= of the service)"
        )
