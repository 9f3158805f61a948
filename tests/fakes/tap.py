"""A tap without a kernel: each queue is a socket pair that keeps frames apart, and what is set is noted."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from kvmpy.errors import HostError
from kvmpy.host.tap import OFFLOADS

HEADER = bytes(12)


class SilentTap:
    """A `kvmpy.devices.virtio.net.NetBackend` without descriptors, for a device that nobody drives."""

    name = "tap-fake"

    def __init__(self, queues: int = 1, offloads: int = OFFLOADS[0]) -> None:
        self.fds = [-1] * queues
        self.offloads = offloads
        self.offload, self.queues = 0, queues
        self._filter: tuple[list[bytes] | None, bool] = (None, False)
        self.counted = (0, 0)
        self.refuses: HostError | None = None

    def set_offload(self, offloads: int) -> int:
        self._refuse()
        self.offload = offloads
        return offloads

    def set_queues(self, count: int) -> None:
        self._refuse()
        self.queues = count

    def set_filter(self, addresses: Sequence[bytes] | None, *, all_multicast: bool = False) -> None:
        self._refuse()
        self._filter = (None if addresses is None else list(addresses), all_multicast)

    def frames(self) -> tuple[int, int]:
        """What the host's kernel would have counted."""
        return self.counted

    def passes(self) -> tuple[list[bytes] | None, bool]:
        """The filter, as a call: mypy believes that an attribute stays what an assert said."""
        return self._filter

    def _refuse(self) -> None:
        if self.refuses is not None:
            raise self.refuses


class FakeTap(SilentTap):
    """One with wires: ``wires`` are the far ends, what the network sends and gets."""

    def __init__(self, queues: int = 1, offloads: int = OFFLOADS[0]) -> None:
        super().__init__(queues, offloads)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(queues)]
        self.near = [pair[0] for pair in pairs]
        self.wires = [pair[1] for pair in pairs]
        for end in self.near + self.wires:
            end.setblocking(False)
        self.fds = [end.fileno() for end in self.near]

    def send(self, frame: bytes, queue: int = 0) -> None:
        """The network sends ``frame``, behind a header of zeros."""
        self.wires[queue].send(HEADER + frame)

    def sent(self, queue: int = 0) -> list[bytes]:
        """What the guest has sent since the last call, headers and all."""
        frames = []
        while True:
            try:
                frames.append(self.wires[queue].recv(1 << 17))
            except BlockingIOError:
                return frames

    def flood(self, size: int = 1000, queue: int = 0) -> list[bytes]:
        """Send numbered frames until no more fit; returns them."""
        frames: list[bytes] = []
        while True:
            frame = len(frames).to_bytes(4, "little").ljust(size, b"\xa5")
            try:
                self.send(frame, queue)
            except BlockingIOError:
                return frames
            frames.append(frame)

    def stuff(self, queue: int = 0) -> int:
        """Fill the guest's way out; returns how many frames that took."""
        count = 0
        while True:
            try:
                self.near[queue].send(bytes(2000))
            except BlockingIOError:
                return count
            count += 1

    def close(self) -> None:
        for end in self.near + self.wires:
            end.close()
