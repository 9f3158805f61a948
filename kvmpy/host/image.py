"""What lies behind a drive's path: opened as a disk and as nothing else, and examined, before a guest relies on it.

The kernel is asked or tried, never guessed at by a version: how it wants direct I/O aligned (statx(2), STATX_DIOALIGN,
Linux 6.1; before that, a read that works), whether space can be given back, who else has the device.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from typing import Final

import msgspec

from kvmpy.abi import block as abi
from kvmpy.errors import HostError, refusal

SECTOR: Final = 512
# Where nobody says how O_DIRECT wants offsets aligned, these are tried.
ALIGNMENTS: Final = (512, 1024, 2048, 4096)
ADVICE: Final = {
    errno.ENOENT: "attach the storage that it is on, or make a new disk, such as with `truncate -s 8G`",
    errno.EACCES: "run as a user who may open it",
    errno.EPERM: "run as a user who may open it",
    errno.EROFS: "set readonly = true",
    errno.ENXIO: "the device behind it is gone",
    errno.ENOMEDIUM: "there is no medium in it",
}


class Geometry(msgspec.Struct, frozen=True):
    """A disk in bytes. ``alignment`` is what direct I/O wants; ones where the page cache is in between."""

    size: int
    is_device: bool
    block_size: int
    physical_block_size: int
    alignment: abi.Alignment
    discard_granularity: int
    can_unmap: bool


def open_image(path: str, *, readonly: bool, direct: bool) -> int:
    """A descriptor of the file or block device at ``path``. Raises HostError, saying what to do.

    What it is gets looked at before it is opened: to open a tape or a watchdog would do something.
    """
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            kind = os.fstat(handle).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise HostError(f"{path}: neither a file nor a block device")
            fd = _reopen(handle, (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if direct else 0))
        finally:
            os.close(handle)
    except OSError as e:
        if e.errno == errno.EINVAL and direct:
            raise HostError(_no_direct(path)) from e
        why = refusal(e.errno, "cannot be opened", ADVICE.get(e.errno or 0, ""))
        raise HostError(f"{path}: {why}") from e
    if stat.S_ISBLK(kind) and not readonly and _is_claimed(fd):
        os.close(fd)
        raise HostError(f"{path}: EBUSY: the host itself uses it: mounted, or part of LVM, RAID or the like")
    return fd


def examine(fd: int, path: str, *, readonly: bool, direct: bool) -> Geometry:
    """What ``fd``, open on ``path``, is as a disk. Raises HostError, saying what to do."""
    try:
        status = os.fstat(fd)
        if stat.S_ISBLK(status.st_mode):
            geometry = _examine_device(fd, status.st_rdev, path, readonly=readonly, direct=direct)
        else:
            geometry = _examine_file(fd, status, path, readonly=readonly, direct=direct)
    except OSError as e:
        raise HostError(f"{path}: {refusal(e.errno, 'cannot be examined')}") from e
    size, block = geometry.size, geometry.alignment.offset
    if not size:
        raise HostError(f"{path}: it is empty; give it a size, such as with `truncate -s 8G`")
    if size % SECTOR:
        raise HostError(f"{path}: its size of {size} bytes is no multiple of {SECTOR}; see `truncate -s %{SECTOR}`")
    if size % block:
        raise HostError(
            f'{path}: cache = "none" needs a size that is a multiple of {block} bytes here, and it has {size}; '
            f'see `truncate -s %{block}`, or use cache = "writeback"'
        )
    return geometry


def _examine_device(fd: int, device: int, path: str, *, readonly: bool, direct: bool) -> Geometry:
    if not readonly and abi.BLKROGET(fd):
        raise HostError(f"{path}: the device takes no writes; set readonly = true")
    block_size = abi.BLKSSZGET(fd)
    return Geometry(
        size=abi.BLKGETSIZE64(fd),
        is_device=True,
        block_size=block_size,
        physical_block_size=abi.BLKPBSZGET(fd),
        alignment=_alignment(fd, path, block_size) if direct else abi.Alignment(1, 1),
        discard_granularity=max(_queue_limit(device, "discard_granularity"), block_size),
        can_unmap=not readonly and _queue_limit(device, "discard_max_bytes") > 0,
    )


def _examine_file(fd: int, status: os.stat_result, path: str, *, readonly: bool, direct: bool) -> Geometry:
    """A file has sectors of 512 bytes wherever it lies: a guest's partition table counts in them."""
    cluster = min(max(status.st_blksize, SECTOR), mmap.PAGESIZE)
    return Geometry(
        size=status.st_size,
        is_device=False,
        block_size=SECTOR,
        physical_block_size=cluster,
        alignment=_alignment(fd, path, None) if direct else abi.Alignment(1, 1),
        discard_granularity=cluster,
        can_unmap=not readonly and _can_punch(fd, status.st_size),
    )


def _alignment(fd: int, path: str, block_size: int | None) -> abi.Alignment:
    """What direct I/O wants; ``block_size`` is a device's."""
    said = abi.direct_alignment(fd)
    if said is None:
        offset = block_size or _try_alignments(fd)
        return abi.Alignment(offset, offset)
    if not said.offset:
        raise HostError(_no_direct(path))
    return abi.Alignment(said.memory, max(said.offset, SECTOR))


def _try_alignments(fd: int) -> int:
    """The finest reads that the file takes."""
    buffer = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
    for size in ALIGNMENTS:
        try:
            os.preadv(fd, [buffer[:size]], size)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        else:
            return size
    return ALIGNMENTS[-1]


def _can_punch(fd: int, size: int) -> bool:
    """Whether the filesystem takes space back; tried behind the end, where there is nothing to lose."""
    try:
        abi.fallocate(fd, abi.PUNCH_HOLE | abi.KEEP_SIZE, size, mmap.PAGESIZE)
    except OSError:
        return False
    return True


def _reopen(fd: int, flags: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def _is_claimed(fd: int) -> bool:
    """Whether somebody has a block device for himself, as a mounted filesystem does."""
    try:
        os.close(_reopen(fd, os.O_RDONLY | os.O_EXCL))
    except OSError as e:
        return e.errno == errno.EBUSY
    return False


def _no_direct(path: str) -> str:
    return (
        f"{path}: EINVAL: its filesystem has no direct I/O; "
        'use cache = "writeback" (which blocks migration to another host), or another filesystem'
    )


def _queue_limit(device: int, name: str) -> int:
    """A number that sysfs has on a block device, or on the disk that it is a partition of; 0 where there is none."""
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{base}/queue", f"{base}/../queue"):
        try:
            with open(f"{queue}/{name}", "rb") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return 0
