"""linux/fs.h and linux/falloc.h, typed: what is asked of a disk, a block device or a file.

Values come from the compiler (block.cdef); this file only puts types on them.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from kvmpy._native import ffi, lib
from kvmpy.abi import ioctl
from kvmpy.abi.ioctl import GetNumber, Unsized


class GetInt(Unsized):
    """A C int out."""

    def __call__(self, fd: int) -> int:
        value = ffi.new("int *")
        ioctl.sys_ioctl(self.name, fd, self.number, value)
        return int(value[0])


class PutRange(Unsized):
    """A range of bytes in: where it begins, and its length."""

    def __call__(self, fd: int, offset: int, size: int) -> int:
        return ioctl.sys_ioctl(self.name, fd, self.number, ffi.new("uint64_t[2]", [offset, size]))


BLKROGET = GetInt("BLKROGET")
BLKSSZGET = GetInt("BLKSSZGET")
BLKPBSZGET = GetInt("BLKPBSZGET")
BLKGETSIZE64 = GetNumber("BLKGETSIZE64", "size_t")
BLKDISCARD = PutRange("BLKDISCARD")
BLKZEROOUT = PutRange("BLKZEROOUT")

KEEP_SIZE: Final[int] = lib.FALLOC_FL_KEEP_SIZE
PUNCH_HOLE: Final[int] = lib.FALLOC_FL_PUNCH_HOLE
ZERO_RANGE: Final[int] = lib.FALLOC_FL_ZERO_RANGE


class Alignment(NamedTuple):
    """What O_DIRECT asks of one file, in bytes: of memory, and of offsets and lengths. Zeros: it cannot do it."""

    memory: int
    offset: int


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """fallocate(2), which Python has only without a mode. Raises OSError."""
    if (result := lib.kvmpy_fallocate(fd, mode, offset, size)) < 0:
        raise OSError(-result, os.strerror(-result))


def direct_alignment(fd: int) -> Alignment | None:
    """What statx(2) says of direct I/O (STATX_DIOALIGN, Linux 6.1); None where kernel or filesystem says nothing."""
    said = ffi.new("uint32_t[2]")
    return Alignment(said[0], said[1]) if lib.kvmpy_direct_alignment(fd, said) == 0 else None
