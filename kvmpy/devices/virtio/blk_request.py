"""One request to a virtio-blk disk: taken apart, checked, and carried out (Virtio 1.2, section 5.2.6).

Nothing here waits for anybody but the disk, and nothing needs a lock: any thread may do it. Every number in a request
is the guest's. What it asks for that is not there, out of range or of the wrong size is answered with an error; only a
chain that cannot hold a request at all is a GuestError.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from kvmpy.devices.virtio.queue import Chain
from kvmpy.errors import GuestError
from kvmpy.host.image import SECTOR, Geometry

# Ranges in one discard or write-zeroes request, and sectors in one range: some disks need long for each, some zero by
# writing, and a pause waits for all of it.
MOST_RANGES: Final = 32
MOST_DISCARDED: Final = (1 << 30) // SECTOR
MOST_ZEROED: Final = (64 << 20) // SECTOR
ID_SIZE: Final = 20

_HEADER: Final = struct.Struct("<IIQ")  # struct virtio_blk_req: type, reserved, sector
_RANGE: Final = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes: sector, sectors, flags
_UNMAP: Final = 1


class Kind(IntEnum):
    """Types of requests."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Answer(IntEnum):
    """What the status byte of a request says."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Disk(Protocol):
    """What it is asked of; a `kvmpy.host.disk.Disk`. Its methods block, and may raise OSError."""

    path: str
    readonly: bool
    direct: bool
    sectors: int
    geometry: Geometry

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` with what is at ``offset``."""

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Store ``buffers`` at ``offset``."""

    def flush(self) -> None:
        """Make durable what has been written."""

    def discard(self, offset: int, size: int) -> None:
        """Nobody needs what is there."""

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Store zeros; with ``unmap``, the space may be given back."""

    def lock(self) -> None:
        """Keep others away. Raises HostError that says who has it."""

    def unlock(self) -> None:
        """Let others have it."""


class Request(NamedTuple):
    """A chain taken apart: what the driver sends, what it wants filled, and the byte for the answer. Sizes in bytes."""

    kind: int
    sector: int
    readable: list[memoryview]
    readable_size: int
    writable: list[memoryview]
    writable_size: int
    status: memoryview

    @classmethod
    def of(cls, chain: Chain) -> Request:
        """However the driver has cut it: the layout of the buffers means nothing (section 2.7.4). Raises GuestError."""
        if chain.readable_size < _HEADER.size or not chain.writable_size:
            raise GuestError(
                "a request without a header or a status: "
                f"{chain.readable_size:#x} bytes to read, {chain.writable_size:#x} to write"
            )
        header, readable = _split(chain.readable, _HEADER.size)
        kind, _, sector = _HEADER.unpack(b"".join(header))  # a copy: it cannot change any more
        writable, status = _split(chain.writable, chain.writable_size - 1)
        return cls(
            kind, sector, readable, chain.readable_size - _HEADER.size, writable, chain.writable_size - 1, status[0]
        )

    @property
    def name(self) -> str:
        """What kind it is, in a word."""
        return _NAMES.get(self.kind, "unknown")

    def written(self, answer: Answer) -> int:
        """How much of the writable part is filled without a gap, from its first byte on (section 2.7.8.2)."""
        data = 0
        if answer is Answer.OK and self.kind in (Kind.IN, Kind.GET_ID):
            data = self.writable_size if self.kind == Kind.IN else min(self.writable_size, ID_SIZE)
        return data + 1 if data == self.writable_size else data


_NAMES: Final[dict[int, str]] = {kind.value: kind.name.lower() for kind in Kind}


def carry_out(request: Request, disk: Disk, offered: Sequence[Kind], serial: bytes) -> Answer:
    """Do it, now. ``offered`` are the kinds that depend on a feature and may be used. Raises OSError."""
    kind, offset = request.kind, request.sector * SECTOR
    if kind in (Kind.OUT, Kind.DISCARD, Kind.WRITE_ZEROES) and disk.readonly:
        return Answer.IOERR
    match kind:
        case Kind.IN if _fits(disk, request.sector, request.writable_size):
            disk.read(offset, request.writable)
        case Kind.OUT if _fits(disk, request.sector, request.readable_size):
            disk.write(offset, request.readable)
        case Kind.IN | Kind.OUT:
            return Answer.IOERR
        case Kind.FLUSH:
            disk.flush()
        case Kind.GET_ID:
            _fill(request.writable, serial)
        case Kind.DISCARD if kind in offered:
            return _do_ranges(request, disk, MOST_DISCARDED, 0)
        case Kind.WRITE_ZEROES if kind in offered:
            return _do_ranges(request, disk, MOST_ZEROED, _UNMAP)
        case _:
            return Answer.UNSUPP
    return Answer.OK


def _do_ranges(request: Request, disk: Disk, most: int, known_flags: int) -> Answer:
    """Discard, or write zeroes: nothing at all, unless every range is right."""
    if not 0 < request.readable_size <= MOST_RANGES * _RANGE.size or request.readable_size % _RANGE.size:
        return Answer.IOERR
    ranges = list(_RANGE.iter_unpack(b"".join(request.readable)))
    if any(flags & ~known_flags for _, _, flags in ranges):
        return Answer.UNSUPP
    if not all(count <= most and _fits(disk, sector, count * SECTOR) for sector, count, _ in ranges):
        return Answer.IOERR
    for sector, count, flags in ranges:
        if request.kind == Kind.DISCARD:
            disk.discard(sector * SECTOR, count * SECTOR)
        else:
            disk.write_zeroes(sector * SECTOR, count * SECTOR, unmap=bool(flags & _UNMAP))
    return Answer.OK


def _fits(disk: Disk, sector: int, size: int) -> bool:
    return size % SECTOR == 0 and sector + size // SECTOR <= disk.sectors


def _split(buffers: list[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``size`` bytes, and the rest.

    Without an empty piece of a buffer that begins there: for direct I/O it would have to be aligned like all others,
    and a status byte of its own is not.
    """
    for index, buffer in enumerate(buffers):
        if size < len(buffer):
            piece = [buffer[:size]] if size else []
            return [*buffers[:index], *piece], [buffer[size:], *buffers[index + 1 :]]
        size -= len(buffer)
    return buffers, []


def _fill(buffers: list[memoryview], data: bytes) -> None:
    for buffer in buffers:
        piece, data = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(piece)] = piece
