"""The host's side of a disk: a raw image, in a regular file or a block device.

All methods block and may be called by several threads at once; what the kernel says no to is an OSError. Offsets and
sizes are in bytes, multiples of 512, and within the disk: whoever takes them from a guest has checked them.

With O_DIRECT (``direct``) nothing of the disk stays in this host's memory. The kernel then wants memory, offsets and
lengths aligned; what is not goes through a buffer that is. A write of less than a block, which only a guest that
thinks in smaller blocks sends, reads the block and writes it back: alone, or a write beside it could be undone.

A write is durable once a `flush` that began after it has returned, never before. Where the page cache is in between,
the kernel reports pages it could not write to one fdatasync only and then takes them for clean: so once a flush has
failed, all do.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Self

from kvmpy._native import ffi
from kvmpy.abi import block as abi
from kvmpy.host import lock
from kvmpy.host.image import SECTOR, examine, open_image

IOV_MAX: Final = 1024  # limits.h: buffers in one preadv or pwritev
# What is copied, or zeroed by hand, at a time: short enough to do with the GIL held.
PIECE: Final = 256 * 1024
# How a kernel, a filesystem or a device says that it does not have an operation.
UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV}

Transfer = Callable[[int, list[memoryview], int], int]
_POINTER: Final = ffi.typeof("uintptr_t")


class Disk:
    """An open image. ``sectors`` are of 512 bytes, all other sizes in bytes."""

    def __init__(self, path: str, *, readonly: bool, direct: bool, locked: bool = False) -> None:
        """Open ``path``, and lock it only where it is to be ``locked``. Raises HostError, saying what to do."""
        self.path, self.readonly, self.direct = path, readonly, direct
        self._fd = open_image(path, readonly=readonly, direct=direct)
        try:
            if locked:
                self.lock()  # first: whether space can be given back is tried behind an end that others may move
            self.geometry = examine(self._fd, path, readonly=readonly, direct=direct)
        except BaseException:
            self.close()
            raise
        self.sectors = self.geometry.size // SECTOR
        self._memory, self._block = self.geometry.alignment
        self._turns = _Turns()
        self._missing: set[str] = set()
        self._flush_failed: int | None = None

    @classmethod
    def open(cls, path: str, *, readonly: bool, direct: bool) -> Self:
        """Open ``path`` and lock it. Raises HostError, saying what to do."""
        return cls(path, readonly=readonly, direct=direct, locked=True)

    def lock(self) -> None:
        """Keep others from writing, or if we do, from opening it. Raises HostError that says who has it."""
        lock.lock(self._fd, self.path, shared=self.readonly)

    def unlock(self) -> None:
        """Let somebody else have it, as at the end of a migration."""
        lock.unlock(self._fd)

    def close(self) -> None:
        """Close it, and with it its lock; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` with what is at ``offset``."""
        if self._fits(offset, buffers):
            self._move(os.preadv, offset, buffers)
            return
        for at, piece in _pieces(offset, buffers):
            start, bounce = self._bounce(at, piece)
            self._move(os.preadv, start, [bounce])
            position = at - start
            for buffer in piece:
                buffer[:] = bounce[position : position + len(buffer)]
                position += len(buffer)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Store ``buffers`` at ``offset``."""
        if self._fits(offset, buffers):
            with self._turns.together():
                self._move(os.pwritev, offset, buffers)
            return
        for at, piece in _pieces(offset, buffers):
            start, bounce = self._bounce(at, piece)
            partial = start != at or len(bounce) != sum(map(len, piece))
            with self._turns.alone() if partial else self._turns.together():
                if partial:
                    self._move(os.preadv, start, [bounce])
                position = at - start
                for buffer in piece:
                    bounce[position : position + len(buffer)] = buffer
                    position += len(buffer)
                self._move(os.pwritev, start, [bounce])

    def flush(self) -> None:
        """Make durable what has been written."""
        if self._flush_failed is not None:
            raise OSError(self._flush_failed, f"an earlier flush failed: {os.strerror(self._flush_failed)}")
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            if not self.direct:
                self._flush_failed = e.errno
            raise

    def discard(self, offset: int, size: int) -> None:
        """Say that nobody needs what is there: a hint, which the host may not understand, then nothing happens."""
        geometry = self.geometry
        # A filesystem would zero the parts of clusters at both ends, which is work for nothing.
        unit = geometry.block_size if geometry.is_device else geometry.discard_granularity
        start, end = _whole(offset, size, unit)
        if start < end:
            self._try("discard", self._discard, start, end - start)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Store zeros; with ``unmap``, the space may be given back to the host."""
        start, end = _whole(offset, size, self.geometry.block_size)
        self._write_zeros(offset, start - offset)
        self._write_zeros(end, offset + size - end)
        if start < end and not (
            (unmap and self.geometry.can_unmap and self._try("punch", self._punch, start, end - start))
            or self._try("zero", self._zero, start, end - start)
        ):
            self._write_zeros(start, end - start)

    def _fits(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Whether the kernel takes it as it is."""
        if not self.direct:
            return True
        misfit = offset
        for buffer in buffers:
            misfit |= len(buffer)
        if misfit % self._block:
            return False
        cast, address = ffi.cast, ffi.from_buffer
        return not any(int(cast(_POINTER, address(buffer))) % self._memory for buffer in buffers)

    def _bounce(self, offset: int, buffers: Sequence[memoryview]) -> tuple[int, memoryview]:
        """Where the whole blocks around a piece begin, and aligned memory for them."""
        start = offset - offset % self._block
        end = offset + sum(map(len, buffers))
        return start, memoryview(mmap.mmap(-1, end + -end % self._block - start))

    def _move(self, transfer: Transfer, offset: int, buffers: Sequence[memoryview]) -> None:
        """Transfer all of it, in as many calls as that takes."""
        left = [buffer for buffer in buffers if buffer]
        while left:
            moved = transfer(self._fd, left[:IOV_MAX], offset)
            if not moved:
                raise OSError(errno.EIO, "the file has become shorter")
            offset += moved
            _drop(left, moved)

    def _try(self, name: str, operation: Callable[[int, int], object], offset: int, size: int) -> bool:
        """Do it if the host has the operation; whether it had."""
        if name in self._missing:
            return False
        try:
            with self._turns.together():
                operation(offset, size)
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
            self._missing.add(name)
            return False
        return True

    def _discard(self, offset: int, size: int) -> None:
        if self.geometry.is_device:
            abi.BLKDISCARD(self._fd, offset, size)
        else:
            self._punch(offset, size)

    def _punch(self, offset: int, size: int) -> None:
        # On a block device too: zeros, by way of a discard or not at all.
        abi.fallocate(self._fd, abi.PUNCH_HOLE | abi.KEEP_SIZE, offset, size)

    def _zero(self, offset: int, size: int) -> None:
        if self.geometry.is_device:
            abi.BLKZEROOUT(self._fd, offset, size)
        else:
            abi.fallocate(self._fd, abi.ZERO_RANGE | abi.KEEP_SIZE, offset, size)

    def _write_zeros(self, offset: int, size: int) -> None:
        zeros = memoryview(mmap.mmap(-1, PIECE))
        for at in range(0, size, PIECE):
            self.write(offset + at, [zeros[: min(PIECE, size - at)]])


class _Turns:
    """Writes go together; one that rewrites what it read goes alone, and those behind it wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = 0  # under way or waiting

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._alone += 1
            self._changed.wait_for(lambda: not self._together)
            self._together = -1
        try:
            yield
        finally:
            with self._changed:
                self._together = 0
                self._alone -= 1
                self._changed.notify_all()


def _whole(offset: int, size: int, unit: int) -> tuple[int, int]:
    """Begin and end of the whole units in a range; where there is none, both are the beginning."""
    start, end = offset + -offset % unit, (offset + size) // unit * unit
    return (start, end) if start < end else (offset, offset)


def _pieces(offset: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """The same transfer in pieces of at most PIECE bytes."""
    left = [*buffers]
    while left:
        room, piece = PIECE, []
        for buffer in left:
            piece.append(buffer[:room])
            room -= len(piece[-1])
            if not room:
                break
        yield offset, piece
        offset += PIECE - room
        _drop(left, PIECE - room)


def _drop(buffers: list[memoryview], size: int) -> None:
    """Take the first ``size`` bytes away."""
    whole = 0
    for buffer in buffers:
        if len(buffer) > size:
            break
        size -= len(buffer)
        whole += 1
    del buffers[:whole]
    if size:
        buffers[0] = buffers[0][size:]
