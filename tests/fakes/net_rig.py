"""A network device, a driver for it, and the network on the other side: all in the test's own thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvmpy.abi.virtio import Feature, feature_mask
from kvmpy.devices.virtio.net import Lender, VirtioNet
from kvmpy.devices.virtio.net_state import NetFeature
from tests.fakes.tap import HEADER, FakeTap
from tests.fakes.virtio_driver import guest_memory
from tests.fakes.virtio_rig import Guest, ManualLoop

MAC = bytes.fromhex("525400123456")
RAM = 2 << 20
RX, TX = 0, 1
OK, ERR = 0, 1

# A driver of small frames, each in a chain of its own; and one that takes whatever the host has.
PLAIN = feature_mask(NetFeature.MAC, NetFeature.STATUS)
MERGEABLE = PLAIN | feature_mask(NetFeature.MRG_RXBUF)
CONTROLLED = MERGEABLE | feature_mask(
    NetFeature.CTRL_VQ,
    NetFeature.CTRL_RX,
    NetFeature.CTRL_RX_EXTRA,
    NetFeature.CTRL_VLAN,
    NetFeature.CTRL_MAC_ADDR,
    NetFeature.CTRL_GUEST_OFFLOADS,
    NetFeature.GUEST_ANNOUNCE,
    NetFeature.GUEST_CSUM,
    NetFeature.GUEST_TSO4,
)


class NetRig:
    """``guest`` drives ``net``, whose ``tap`` has the network's ends of the wire."""

    def __init__(
        self, *, pairs: int = 1, size: int = 8, room: int = 4096, mtu: int | None = None, vhost: Lender | None = None
    ) -> None:
        self.memory, self.loop, self.tap = guest_memory(RAM), ManualLoop(), FakeTap(pairs)
        self.net = VirtioNet("net1", self.memory, self.loop, self.tap, MAC, mtu=mtu, vhost=vhost)
        self.guest = Guest(self.net, self.memory, size=size, room=room)

    def start(self, features: int = MERGEABLE, *, event_idx: bool = True) -> None:
        """Begin as a driver that accepts ``features``."""
        self.guest.start(features | (feature_mask(Feature.EVENT_IDX) if event_idx else 0))
        self.loop.run()

    def lend(self, *sizes: int, count: int = 1, queue: int = RX) -> list[int]:
        """Offer ``count`` chains of writable buffers, kick, and run; returns their heads."""
        heads = [self.guest.queues[queue].offer(writable=sizes) for _ in range(count)]
        self.guest.kick(queue)
        return heads

    def send(self, *pieces: bytes, queue: int = TX) -> int:
        """Offer a frame, header included, kick, and run."""
        head = self.guest.queues[queue].offer(pieces)
        self.guest.kick(queue)
        return head

    def received(self, queue: int = RX) -> list[bytes]:
        """The frames the guest has got since the last call, without headers, put together as a driver does."""
        ring, frames = self.guest.queues[queue], []
        used = iter(ring.used())
        for head, written in used:
            data = ring.content(head)[:written]
            for _ in range(int.from_bytes(data[10:12], "little") - 1):
                head, written = next(used)
                data += ring.content(head)[:written]
            frames.append(data[len(HEADER) :])
        return frames

    def command(self, class_: int, command: int, data: bytes = b"") -> int:
        """Do a command of the control queue; its answer."""
        return self.raw_command([bytes((class_, command)), data] if data else [bytes((class_, command))])[0]

    def raw_command(self, readable: Sequence[bytes], writable: Sequence[int] = (1,)) -> bytes:
        """Put buffers into the control queue; what came back in the writable ones."""
        index = 2 * len(self.tap.fds) if self.net.acked(NetFeature.MQ) else 2
        ring = self.guest.queues[index]
        head = ring.offer(readable, writable)
        self.guest.kick(index)
        assert [used for used, _ in ring.used()] == [head]
        return ring.content(head)

    def close(self) -> None:
        self.guest.close()
        self.tap.close()
        backing = self.memory.blocks[0].backing
        self.memory.close()
        backing.view.release()  # a BufferError if anybody still held guest memory


@contextmanager
def net_rig(
    *, pairs: int = 1, size: int = 8, room: int = 4096, mtu: int | None = None, vhost: Lender | None = None
) -> Iterator[NetRig]:
    """A NetRig, closed at the end."""
    rig = NetRig(pairs=pairs, size=size, room=room, mtu=mtu, vhost=vhost)
    try:
        yield rig
    finally:
        rig.close()
