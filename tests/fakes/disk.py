"""A disk in memory that keeps notes, and that a test can slow down, break, and pull the plug of."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from kvmpy.abi.block import Alignment
from kvmpy.host.image import SECTOR, Geometry
from tests.fakes.loop import BOUND, Inbox


class FakeDisk:
    """A `kvmpy.devices.virtio.blk_request.Disk`.

    ``log`` has each call as it began. While ``go`` is clear, calls wait before they do anything. ``fails`` raises by
    the name of the call. ``content`` is what reads see, ``durable`` what would be left after a power cut.
    """

    def __init__(self, sectors: int = 128, *, readonly: bool = False, can_unmap: bool = True) -> None:
        self.path, self.readonly, self.direct, self.sectors = "disk.raw", readonly, True, sectors
        self.geometry = Geometry(
            size=sectors * SECTOR,
            is_device=False,
            block_size=SECTOR,
            physical_block_size=4096,
            alignment=Alignment(1, 1),
            discard_granularity=4096,
            can_unmap=can_unmap and not readonly,
        )
        self.content = bytearray(sectors * SECTOR)
        self.durable = bytes(self.content)
        self.log: Inbox[str] = Inbox()
        self.go = threading.Event()
        self.go.set()
        self.fails: dict[str, Exception] = {}
        self._lock = threading.Lock()

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._begin("read", offset, sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        assert not self.readonly
        data = b"".join(buffers)
        self._begin("write", offset, len(data))
        with self._lock:
            self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        with self._lock:
            seen = bytes(self.content)
        self._begin("flush")
        self.durable = seen

    def lock(self) -> None:
        self._begin("lock")

    def unlock(self) -> None:
        self._begin("unlock")

    def discard(self, offset: int, size: int) -> None:
        assert not self.readonly
        self._begin("discard", offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        assert not self.readonly
        self._begin("unmap" if unmap else "zero", offset, size)
        with self._lock:
            self.content[offset : offset + size] = bytes(size)

    @property
    def calls(self) -> list[str]:
        """What has been asked so far; ``go`` or not."""
        return list(self.log.items)

    def _begin(self, call: str, offset: int = 0, size: int = 0) -> None:
        assert 0 <= offset <= offset + size <= len(self.content)
        self.log.put(f"{call} {offset // SECTOR}+{size // SECTOR}" if size else call)
        assert self.go.wait(BOUND), "a test left the disk hanging"
        if call in self.fails:
            raise self.fails[call]


class Hanging:
    """A disk of the host, as ``disk``, that answers nothing while ``go`` is clear; ``begun`` has each read as it comes.

    A read that hangs is as one in the kernel: it fills the guest's buffers when it comes back, whatever has become of
    them.
    """

    def __init__(self, disk: Any) -> None:
        self._disk = disk
        self.begun: Inbox[int] = Inbox()
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.begun.put(offset)
        assert self.go.wait(4 * BOUND), "a test left the disk hanging"
        self._disk.read(offset, buffers)
