"""The stream of pages, and what its channels share.

A stream is records, little-endian: u64 gpa, u32 pages, u32 kind, and what belongs to it.

    DATA   1  1 to 1024 pages follow, as they are in memory
    ZERO   2  1 to 1024 pages are zero; nothing follows
    END    3  gpa is the round that is over, pages is 0; nothing follows
    ZSTD   4  a batch of DATA and ZERO records, packed: gpa is its size unpacked, pages how many bytes follow
    BATCH  5  a batch, not packed: both numbers are its size

A batch has at most 1 MiB. Batches are for channels on which bytes do not pass as they are: the other side knows from
them how much to fetch in one go. And they are a must where anything but the network reads the pages (a compressor,
TLS): the guest writes them at any time, and only a copy holds still.

The records are read and written in C (abi/pages.c), which knows these numbers from nowhere else.
"""

from __future__ import annotations

import errno
import math
import struct
from typing import Any, Final, Protocol

from kvmpy._native import ffi, lib
from kvmpy.errors import MigrationCancelled, MigrationError, errno_name

RECORD: Final = struct.Struct("<QII")
DATA: Final[int] = lib.KVMPY_PAGE_DATA
ZERO: Final[int] = lib.KVMPY_PAGE_ZERO
END: Final[int] = lib.KVMPY_PAGE_END
ZSTD: Final[int] = lib.KVMPY_PAGE_ZSTD
BATCH: Final[int] = lib.KVMPY_PAGE_BATCH
MOST_PAGES: Final[int] = lib.KVMPY_MOST_PAGES
MOST_BATCH: Final[int] = lib.KVMPY_MOST_BATCH
MOST_CHANNELS: Final = 64

_PLAIN_TEXT: Final = {
    errno.EPIPE: "the other side has closed it",
    errno.ECONNRESET: "the other side has closed it",
    errno.ENODATA: "it ended too early",
}


class PageChannel(Protocol):
    """One connection, a `kvmpy.migration.transport.Channel`. Whatever fails there raises MigrationError."""

    timeout: float  # seconds without progress that a wait may take

    @property
    def raw_fd(self) -> int | None:
        """The descriptor, where bytes pass it as they are; None where they are encrypted."""

    def send(self, *buffers: Any) -> None:
        """All of the buffers."""

    def receive(self, size: int) -> bytes | bytearray:
        """Exactly ``size`` bytes."""

    def receive_into(self, buffer: Any) -> None:
        """Exactly as many bytes as it is long."""

    def shutdown(self) -> None:
        """Whoever waits on it fails now. Any thread."""


class Flow:
    """What all channels of one side share: the bandwidth limit, and whether it is over. Any thread."""

    def __init__(self, rate: int = 0) -> None:
        self.c: Any = ffi.new("struct kvmpy_flow *")
        self.rate = rate

    @property
    def rate(self) -> int:
        """Bytes a second of all channels together, 0 for no limit."""
        return int(self.c.rate)

    @rate.setter
    def rate(self, rate: int) -> None:
        if rate < 0:
            raise ValueError(f"a bandwidth of {rate}")
        self.c.rate = rate

    @property
    def cancelled(self) -> bool:
        """Whether it is over."""
        return bool(self.c.cancelled)

    def cancel(self) -> None:
        """Every native call for this flow ends within a tenth of a second."""
        self.c.cancelled = 1


def failure(name: str, result: int, timeout: float) -> MigrationError:
    """What the ``result`` of a native call for the channel ``name`` means, a negative errno."""
    if result == -errno.ECANCELED:
        return MigrationCancelled(f"{name}: cancelled")
    if result == -errno.ETIMEDOUT:
        return MigrationError(f"{name}: nothing passed for {timeout:g} s: the other side hangs, or the network between")
    return MigrationError(f"{name}: {errno_name(-result)}: {_PLAIN_TEXT.get(-result, 'the connection failed')}")


def milliseconds(seconds: float) -> int:
    """A timeout for a native call; infinity is none."""
    return -1 if math.isinf(seconds) else max(int(seconds * 1000), 1)
