"""Host memory for guest RAM.

Private anonymous memory with transparent huge pages, because shmem gets none on most hosts and neither vhost nor vfio
needs it. A memfd only where another process maps it (`shared`) or where pages come from hugetlbfs. Too little
memory is an error here and now, with both numbers; hugetlb pages are reserved by mmap itself, so the guest
never meets a SIGBUS.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import Final

from kvmpy._native import ffi
from kvmpy.errors import HostError, errno_name

StrPath = str | os.PathLike[str]  # pathlib costs 5 ms of every start
MIB: Final = 1 << 20
# mmap.h and memfd.h: the huge page size is its log2, 26 bits up.
MFD_HUGETLB: Final = 4
HUGE_SHIFT: Final = 26
MADV_POPULATE_WRITE: Final = 23
MAP_NORESERVE: Final = 0x4000  # not in Python's mmap before 3.13
# Populated in steps: one call over all of RAM could not be interrupted for seconds.
POPULATE_STEP: Final = 256 * MIB
# A block begins on this boundary, so that a huge page of the guest can be one of the host's.
ALIGNMENT: Final = 2 * MIB


class Mapping:
    """``size`` bytes of memory for the guest, owned. Any thread may touch it until `close`."""

    def __init__(self, size: int, *, huge_page: int = 0, shared: bool = False, reserve: bool = False) -> None:
        """``size`` in bytes, a multiple of ``huge_page`` (bytes, 0 for none).

        Raises HostError where the host has not that much memory, or not that many huge pages.
        """
        self.size = size
        self._fd = -1
        if not huge_page:
            _check_available(size)
        try:
            if shared or huge_page:
                self._map_memfd(size, huge_page)
            else:
                self._map_anonymous(size)
            if reserve:
                self._populate()
        except BaseException:
            self.close()
            raise

    @property
    def hva(self) -> int:
        """Host-virtual address of the first byte."""
        return self._hva

    @property
    def view(self) -> memoryview:
        """All of it, writable."""
        return self._view

    @property
    def fd(self) -> int:
        """The memfd behind it, -1 for anonymous memory."""
        return self._fd

    def close(self) -> None:
        """Unmap it. Views on it must have been released."""
        if hasattr(self, "_view"):
            self._view.release()
            self._whole.release()
            self._mmap.close()
            del self._view
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _map_anonymous(self, size: int) -> None:
        # Not every kernel aligns a large mapping to huge pages, so ask for one more and begin at the boundary.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._adopt(self._mmap_or_say(-1, size + ALIGNMENT, flags), size)
        # A kernel built without huge pages has nothing to say but EINVAL.
        with contextlib.suppress(OSError):
            self._mmap.madvise(mmap.MADV_HUGEPAGE)

    def _map_memfd(self, size: int, huge_page: int) -> None:
        flags = os.MFD_CLOEXEC
        if huge_page:
            flags |= MFD_HUGETLB | (huge_page.bit_length() - 1) << HUGE_SHIFT
        try:
            self._fd = os.memfd_create("guest-ram", flags)
            os.ftruncate(self._fd, size)
        except OSError as e:
            raise HostError(_huge_page_advice(size, huge_page, e)) from e
        self._adopt(self._mmap_or_say(self._fd, size, mmap.MAP_SHARED, huge_page), size)

    def _mmap_or_say(self, fd: int, length: int, flags: int, huge_page: int = 0) -> mmap.mmap:
        try:
            return mmap.mmap(fd, length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as e:
            raise HostError(_huge_page_advice(self.size, huge_page, e)) from e

    def _adopt(self, mapping: mmap.mmap, size: int) -> None:
        self._mmap = mapping
        self._whole = memoryview(mapping)
        address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._whole)))
        offset = -address % ALIGNMENT if len(self._whole) > size else 0
        self._hva = address + offset
        self._view = self._whole[offset : offset + size]
        mapping.madvise(mmap.MADV_DONTFORK)

    def _populate(self) -> None:
        start = self._hva - int(ffi.cast("uintptr_t", ffi.from_buffer(self._whole)))
        for at in range(0, self.size, POPULATE_STEP):
            try:
                self._mmap.madvise(MADV_POPULATE_WRITE, start + at, min(POPULATE_STEP, self.size - at))
            except OSError as e:
                raise HostError(
                    f"machine.reserve: {errno_name(e.errno or 0)} after {at // MIB} of {self.size // MIB} MiB: "
                    + (
                        "MADV_POPULATE_WRITE needs Linux 5.14; leave reserve off"
                        if e.errno == errno.EINVAL
                        else "the host ran out of memory; give the guest less"
                    )
                ) from e


def _huge_page_advice(size: int, huge_page: int, e: OSError) -> str:
    name = errno_name(e.errno or 0)
    if not huge_page:
        return f"machine.memory: {name}: the host does not give {size // MIB} MiB; give the guest less"
    pages, kib = size // huge_page, huge_page >> 10
    return (
        f"machine.hugepages: {name}: {pages} huge pages of {kib} KiB are not free; "
        f"write {pages} or more to /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
    )


def _check_available(size: int) -> None:
    available = available_memory()
    if size > available:
        raise HostError(
            f"machine.memory: the guest wants {size // MIB} MiB and this host has {available // MIB} MiB available"
        )


def available_memory() -> int:
    """Bytes a new guest can have: what /proc/meminfo calls available, less where a cgroup allows less."""
    fields = dict(line.split(":", 1) for line in _lines("/proc/meminfo"))
    available = int(fields["MemAvailable"].split()[0]) << 10
    limit = _cgroup_room()
    return available if limit is None else min(available, limit)


def _cgroup_room(root: StrPath = "/sys/fs/cgroup", membership: StrPath = "/proc/self/cgroup") -> int | None:
    """What the memory controllers (cgroup v2) above us still allow, in bytes; None without a limit.

    Cached file pages count as free, as they do in MemAvailable: the kernel drops them first.
    """
    try:
        group = next(line[3:] for line in _lines(membership) if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    names = [name for name in group.split("/") if name]
    path = (os.path.join(root, *names[:depth]) for depth in range(len(names) + 1))
    return min((room for directory in path if (room := _room(directory)) is not None), default=None)


def _room(directory: str) -> int | None:
    """What one cgroup still allows; None where it has no limit."""
    try:
        limit, used = (int(_lines(f"{directory}/{name}")[0]) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in _lines(f"{directory}/memory.stat"))
        return limit - used + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError, IndexError):  # the root has no such files, and "max" is no number
        return None


def _lines(path: StrPath) -> list[str]:
    with open(path) as file:
        return file.read().splitlines()
