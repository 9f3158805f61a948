"""A virtio disk with a driver, without a bus: the disk answers in its own threads, so a test waits for interrupts."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise

from kvmpy.abi.virtio import Feature
from kvmpy.devices.virtio.blk import VirtioBlk
from kvmpy.devices.virtio.blk_request import Answer, Disk
from kvmpy.devices.virtio.device import Loop
from tests.fakes.loop import Inbox
from tests.fakes.virtio_driver import RingDriver, guest_memory
from tests.fakes.virtio_rig import FakeTransport, Guest, ManualLoop

ROOM = 12 * 1024
RAM = 4 << 20


class HeardTransport(FakeTransport):
    """A FakeTransport whose interrupts can be waited for: ``heard`` has queue numbers, and -1 for the configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Inbox[int] = Inbox()

    def interrupt_queue(self, index: int) -> None:
        super().interrupt_queue(index)
        self.heard.put(index)

    def interrupt_config(self) -> None:
        super().interrupt_config()
        self.heard.put(-1)


class BlkRig:
    """A disk "vd0" with serial "serial-7" and its driver, live."""

    def __init__(
        self, disk: Disk, *, queues: int = 1, workers: int = 4, loop: Loop | None = None, size: int = 64
    ) -> None:
        self.memory = guest_memory(RAM)
        self.device = VirtioBlk(
            "vd0/virtio-blk", self.memory, loop or ManualLoop(), disk, serial="serial-7", queues=queues, workers=workers
        )
        self.guest = Guest(self.device, self.memory, room=ROOM, size=size)
        self.transport = self.guest.transport = self.device.transport = HeardTransport()
        # Without an event index, each used chain interrupts.
        self.guest.start(self.device.features & ~(1 << Feature.EVENT_IDX))

    @property
    def ring(self) -> RingDriver:
        """The first queue's."""
        return self.guest.queues[0]

    def offer(self, readable: Sequence[bytes], writable: Sequence[int], *, queue: int = 0, kick: bool = True) -> int:
        head = self.guest.queues[queue].offer(list(readable), list(writable))
        if kick:
            self.kick(queue)
        return head

    def kick(self, queue: int = 0) -> None:
        """As a driver that never trusts the device's wish not to be kicked."""
        self.guest.queues[queue].needs_kick()
        self.transport.doorbells[queue].signal()
        if isinstance(self.device.io, ManualLoop):
            self.device.io.run()

    def wait(self, count: int = 1, *, queue: int = 0) -> dict[int, int]:
        """Wait until ``count`` chains have come back; which, and how much of each was written."""
        came: dict[int, int] = {}

        def enough(_: list[int]) -> bool:
            came.update(self.guest.queues[queue].used())
            return len(came) >= count

        self.transport.heard.wait_until(enough)
        return came

    def wait_until_broken(self) -> None:
        self.transport.heard.wait_until(lambda heard: -1 in heard)
        self.transport.heard.items.clear()

    def ask(
        self, kind: int, sector: int = 0, data: bytes = b"", *, into: int = 0, queue: int = 0
    ) -> tuple[Answer, bytes]:
        """One request, to its end: the answer, and what it filled."""
        head = self.offer([header(kind, sector), data], [into, 1] if into else [1], queue=queue)
        self.wait(queue=queue)
        content = self.guest.queues[queue].content(head)
        return Answer(content[-1]), content[:-1]

    def gpa_of(self, head: int) -> int:
        """Where the buffers of a chain begin."""
        table = int.from_bytes(self.memory.read(self.ring.desc + 16 * head, 8), "little")
        return int.from_bytes(self.memory.read(table, 8), "little")

    def close(self) -> None:
        """End it; closing twice is allowed."""
        if self.device.queues[0].kick.fd >= 0:
            self.guest.close()
            backing = self.memory.blocks[0].backing
            self.memory.close()
            backing.view.release()  # a BufferError if anybody still held guest memory


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """``data`` in pieces."""
    ends = sorted({0, len(data), *(place for place in places if place < len(data))})
    return [data[start:end] for start, end in pairwise(ends)]
