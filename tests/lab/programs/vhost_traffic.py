"""Frames between a real tap and rings in memory, through the kernel's vhost-net. Run by pytest in an emulated host.

A driver model is the guest; nothing needs KVM. It sleeps until an eventfd calls it, so a lost interrupt is a test that
hangs, as a lost kick is. Frames are numbered in each direction: exactly the next one is right, to its last byte.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from kvmpy._native import lib
from kvmpy.abi.virtio import Feature, feature_mask
from kvmpy.devices.vhost import MRG_RXBUF, VhostNet
from kvmpy.devices.virtio.queue import Virtqueue
from kvmpy.host.eventfd import EventFd
from kvmpy.host.memory import Mapping
from kvmpy.host.tap import HEADER_SIZE, Tap
from kvmpy.memory import GuestMemory, Ram
from tests.counts import count
from tests.fakes.loop import BOUND, running, settle
from tests.fakes.vhost import FakeOwner
from tests.fakes.virtio_driver import NEXT, RingDriver

TAP: Final = "vhosttest"
ETHERTYPE: Final = 0x88B5  # for local experiments
ETHERNET: Final = struct.pack(">6s6sH", b"\x02guest", b"\x02host.", ETHERTYPE)
IPV4: Final = 0x0800
ENTRIES: Final = 64
WINDOW: Final = 32  # frames under way in each direction: fewer than any queue on the way drops
ROOM: Final = 2048
HIGH: Final = 1 << 32
BLOCK: Final = 8 << 20
FRAMES: Final = count(200, 5000)
CHANGES: Final = count(60, 1000)


def frame(number: int, tag: int = 0) -> bytes:
    """The frame of that number, of a size and with a content that follow from it."""
    size = 60 + number * 37 % 1400
    return (ETHERNET + struct.pack(">HQ", tag, number)).ljust(size, bytes([number % 251]))


def number_of(data: bytes) -> int:
    tag_and_number: tuple[int, int] = struct.unpack_from(">HQ", data, len(ETHERNET))
    return tag_and_number[1]


class Pair:
    """A network driver with one pair of queues, and the queues it drives."""

    def __init__(self, memory: GuestMemory, gpa: int, *, event_idx: bool, buffer: int) -> None:
        self.event_idx, self.buffer = event_idx, buffer
        self.rx = RingDriver(memory, gpa, ENTRIES, event_idx=event_idx, room=ROOM)
        self.tx = RingDriver(memory, HIGH + gpa, ENTRIES, event_idx=event_idx, indirect=True, room=ROOM)
        self.drivers = (self.rx, self.tx)
        self.queues = (Virtqueue("rx", memory, ENTRIES), Virtqueue("tx", memory, ENTRIES))
        self.calls = [EventFd(), EventFd()]
        for driver, queue in zip(self.drivers, self.queues, strict=True):
            driver.configure(queue.state)
        self.refill()

    def refill(self) -> None:
        """Offer every free descriptor to receive into, and kick where that is asked for."""
        while self.rx.free:
            self.rx.offer(writable=[self.buffer])
        self.kick(0)

    def send(self, data: bytes) -> None:
        self.tx.offer(readable=[bytes(HEADER_SIZE), data])

    def kick(self, index: int) -> None:
        lib.kvmpy_fence()
        if self.drivers[index].needs_kick():
            self.queues[index].kick.signal()

    def received(self) -> list[bytes]:
        """The frames that have come in, put together from as many buffers as each takes."""
        frames = []
        used = iter(self.rx.used())
        for head, written in used:
            data = self.rx.content(head)[:written]
            for _ in range(int.from_bytes(data[10:12], "little") - 1):
                head, written = next(used)
                data += self.rx.content(head)[:written]
            frames.append(data[HEADER_SIZE:])
        self.refill()
        return frames

    def would_sleep(self) -> bool:
        """Ask for interrupts on both rings, and whether there is nothing to do until one comes."""
        there = [driver.want_interrupts(wanted=True) for driver in self.drivers]
        lib.kvmpy_fence()
        return not any(there) and not any(driver.want_interrupts(wanted=True) for driver in self.drivers)

    def close(self) -> None:
        for queue, call in zip(self.queues, self.calls, strict=True):
            queue.close()
            call.close()


class Rig:
    """Pairs of rings in two blocks of memory, a tap, a socket at the tap's other end, and vhost between them."""

    def __init__(self, *, pairs: int = 1, event_idx: bool = True, buffer: int = ROOM) -> None:
        with contextlib.ExitStack() as stack:
            self.tap = Tap.open(TAP, pairs)
            stack.callback(self.tap.close)
            if (quiet := Path(f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6")).exists():
                quiet.write_text("1")
            self.tap.set_up()
            self.wire = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)))
            self.wire.bind((TAP, ETHERTYPE))
            self.wire.setblocking(False)
            self.io = stack.enter_context(running("io"))
            self.memory = GuestMemory()
            low, high, self.spare = (self._block(stack, gpa) for gpa in (0, HIGH, 2 * HIGH))
            self.memory.add(low)
            self.memory.add(high)
            stack.callback(self.memory.close)
            self.pairs = [Pair(self.memory, n << 20, event_idx=event_idx, buffer=buffer) for n in range(pairs)]
            for pair in self.pairs:
                stack.callback(pair.close)
            self.device = FakeOwner()
            self.vhost = VhostNet(self.memory, self.io, pairs)
            stack.callback(self.vhost.close)
            self.features = feature_mask(MRG_RXBUF, Feature.VERSION_1, Feature.INDIRECT_DESC)
            self.features |= feature_mask(Feature.EVENT_IDX) if event_idx else 0
            assert self.features & ~self.vhost.features() == 0
            self._stack = stack.pop_all()

    def _block(self, stack: contextlib.ExitStack, gpa: int) -> Ram:
        mapping = Mapping(BLOCK)
        stack.callback(mapping.close)
        return Ram(gpa, BLOCK, mapping)

    def take(self, index: int = 0) -> None:
        pair = self.pairs[index]
        calls = [call.fd for call in pair.calls]
        with self.device.lock:
            self.vhost.take(
                index, self.device, *pair.queues, tap=self.tap.fds[index], calls=calls, features=self.features
            )

    def give_back(self, index: int = 0) -> None:
        with self.device.lock:
            self.vhost.give_back(index)
        assert [queue.in_flight for queue in self.pairs[index].queues] == [0, 0]

    def serve_here(self, most: int) -> None:
        """Userspace has the rings for a moment, and as many as ``most`` frames in each direction."""
        pair, tap = self.pairs[0], self.tap.fds[0]
        rx, tx = pair.queues
        for queue in pair.queues:
            queue.start(indirect=True, event_idx=pair.event_idx)
        for _ in range(most):
            if (chain := tx.pop()) is not None:
                os.writev(tap, chain.readable)
                tx.push(chain, 0)
            if (chain := rx.pop()) is not None:
                try:
                    size = os.readv(tap, chain.writable)
                except BlockingIOError:
                    rx.rewind(1)
                    continue
                chain.writable[0][10:12] = b"\x01\x00"  # num_buffers
                rx.push(chain, size)
        for queue, call in zip(pair.queues, pair.calls, strict=True):
            queue.set_notification(enabled=True)
            if queue.needs_interrupt():
                call.signal()
            queue.stop()

    def exchange(self, frames: int, between: Callable[[], object] = lambda: None) -> None:
        """``frames`` each way through the first pair, every one of them exactly once and in order.

        ``between`` is called now and then, with frames under way.
        """
        pair = self.pairs[0]
        told = got = said = heard = 0
        while got < frames or heard < frames:
            while told < min(frames, got + WINDOW):
                self.wire.send(frame(told))
                told += 1
            while said < min(frames, heard + WINDOW) and len(pair.tx.free) > 1:
                pair.send(frame(said, tag=1))
                said += 1
            pair.kick(1)
            between()
            pair.tx.used()
            before = got, heard
            for data in pair.received():
                assert data == frame(got)
                got += 1
            for data in self.heard():
                assert data == frame(heard, tag=1)
                heard += 1
            if (got, heard) == before and pair.would_sleep():
                self.sleep(f"{got} of {told} in, {heard} of {said} out")

    def heard(self) -> Iterator[bytes]:
        """The frames that have come out of the tap."""
        with contextlib.suppress(BlockingIOError):
            while True:
                yield self.wire.recv(65536)

    def sleep(self, where: str = "") -> None:
        """Until a call comes, or a frame."""
        calls = [call for pair in self.pairs for call in pair.calls]
        ready = select.select([self.wire.fileno(), *(call.fd for call in calls)], [], [], BOUND)[0]
        states = [queue.state for pair in self.pairs for queue in pair.queues]
        assert ready, f"nothing comes: {where}; {states}; {self.device.broken.items}"
        for call in calls:
            call.take()

    def hear_one(self) -> bytes:
        while True:
            for data in self.heard():
                return data
            self.sleep()

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def rig(*, pairs: int = 1, event_idx: bool = True, buffer: int = ROOM) -> Iterator[Rig]:
    made = Rig(pairs=pairs, event_idx=event_idx, buffer=buffer)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_flow_both_ways(event_idx: bool) -> None:
    with rig(event_idx=event_idx) as it:
        it.take()
        it.exchange(FRAMES)


def test_large_frames_come_in_several_small_buffers() -> None:
    with rig(buffer=256) as it:
        it.take()
        it.exchange(FRAMES)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("meanwhile", [0, 4])
def test_no_frame_is_lost_or_repeated_however_often_the_rings_change_hands(meanwhile: int, event_idx: bool) -> None:
    chance = random.Random(meanwhile)
    changes = 0

    with rig(event_idx=event_idx) as it:

        def change_hands() -> None:
            nonlocal changes
            if chance.random() < 0.7:
                it.give_back()
                it.serve_here(chance.randint(0, meanwhile))
                it.take()
                changes += 1

        it.take()
        while changes < CHANGES:
            it.exchange(WINDOW * 2, change_hands)
        assert it.device.broken.items == []


def test_call_eventfd_may_change_at_any_time() -> None:
    chance = random.Random(2)
    with rig() as it:
        pair = it.pairs[0]

        def change_calls() -> None:
            if chance.random() < 0.5:
                old, pair.calls = pair.calls, [EventFd(), EventFd()]
                it.vhost.set_call(0, [call.fd for call in pair.calls])
                for call in old:
                    call.close()

        it.take()
        it.exchange(FRAMES, change_calls)


def test_call_waits_in_its_eventfd_and_none_is_none() -> None:
    with rig() as it:
        pair = it.pairs[0]
        it.take()
        assert pair.would_sleep()
        it.wire.send(frame(0))
        assert select.select([pair.calls[0]], [], [], BOUND)[0]  # and nobody takes it: a masked vector
        assert pair.received() == [frame(0)]
        it.vhost.set_call(0, [-1, -1])
        pair.calls[0].take()
        assert pair.would_sleep()
        it.wire.send(frame(1))
        while not (received := pair.received()):
            settle(it.io)
        assert received == [frame(1)]
        assert pair.calls[0].take() == 0


# Each breaks the ring of a driver that is about to offer the descriptor 0.
GARBAGE: Final[dict[str, Callable[[RingDriver], None]]] = {
    "the available index jumps": lambda driver: driver.store(driver.driver + 2, 20000),
    "the head is beyond the table": lambda driver: driver.put(ENTRIES),
    "the chain never ends": lambda driver: driver.write_desc(0, 0x1000, 16, NEXT, 0),
    "the buffer is not in RAM": lambda driver: driver.write_desc(0, 1 << 40, 1600, 0),
    "the buffer ends behind RAM": lambda driver: driver.write_desc(0, BLOCK - 16, 1600, 0),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_ring_that_the_guest_broke_is_given_back_and_works_again_after_a_reset(garbage: str) -> None:
    with rig() as it:
        pair = it.pairs[0]
        it.take()
        it.exchange(8)
        it.give_back()
        pair.tx = RingDriver(it.memory, HIGH + (4 << 20), ENTRIES, event_idx=True, indirect=True, room=ROOM)
        reset(pair)
        it.take()
        GARBAGE[garbage](pair.tx)
        if "index" not in garbage:
            pair.tx.put(0)
            pair.tx.publish()
        pair.queues[1].kick.signal()
        assert it.device.broken.wait() == ["vhost: the transmit ring of queue pair 0 is broken"]
        assert not it.vhost.lent(0)

        pair.tx = RingDriver(it.memory, HIGH + (4 << 20), ENTRIES, event_idx=True, indirect=True, room=ROOM)
        reset(pair)
        it.take()
        it.exchange(FRAMES)


def reset(pair: Pair) -> None:
    """The driver begins again with its transmit ring; the receive ring goes on."""
    pair.drivers = (pair.rx, pair.tx)
    state = pair.queues[1].state
    state.last_avail = state.next_used = 0
    pair.tx.configure(state)


def test_receive_ring_that_the_guest_broke_is_reported_when_a_frame_comes() -> None:
    with rig() as it:
        pair = it.pairs[0]
        it.take()
        it.exchange(8)
        for entry in range(ENTRIES):
            pair.rx.store(pair.rx.driver + 4 + 2 * entry, ENTRIES)
        it.wire.send(frame(0))
        assert it.device.broken.wait() == ["vhost: the receive ring of queue pair 0 is broken"]


def test_memory_that_comes_while_rings_are_lent_is_reachable_and_once_gone_is_not() -> None:
    with rig() as it:
        pair = it.pairs[0]
        it.take()
        it.exchange(8)
        block = it.spare
        it.memory.add(block)
        header_and_frame = bytes(HEADER_SIZE) + frame(3)

        def offer_from_the_new_block() -> None:
            it.memory.write(block.gpa, header_and_frame)
            head = pair.tx.free[0]
            pair.tx.write_desc(head, block.gpa, len(header_and_frame), 0)
            pair.tx.put(head)
            pair.tx.publish()
            pair.queues[1].kick.signal()

        offer_from_the_new_block()
        assert it.hear_one() == frame(3)
        it.vhost.ram_removed(block)
        assert it.vhost.lent(0)
        offer_from_the_new_block()
        assert it.device.broken.wait() == ["vhost: the transmit ring of queue pair 0 is broken"]
        assert list(it.heard()) == []
        it.vhost.ram_added(block)  # for the memory to take away


def test_memory_with_rings_may_be_closed_first() -> None:
    with rig() as it:
        it.take()
        it.exchange(8)
        it.memory.close()
        assert it.device.broken.items == ["vhost: memory is taken away that its rings need"]
        assert not it.vhost.lent(0)


def test_tap_that_is_none_leaves_the_rings_with_us() -> None:
    with rig() as it, EventFd() as no_tap:
        real, it.tap.fds[0] = it.tap.fds[0], no_tap.fd
        try:
            with pytest.raises(OSError, match=r"^VHOST_NET_SET_BACKEND: ") as caught:
                it.take()
        finally:
            it.tap.fds[0] = real
        assert caught.value.errno in (errno.ENOTSOCK, errno.EINVAL, errno.EBADFD)
        assert not it.vhost.lent(0)
        it.take()
        it.exchange(FRAMES)


def test_every_pair_moves_frames_while_others_change_hands() -> None:
    flows = 64
    with rig(pairs=3) as it:
        for index in range(3):
            it.take(index)
        for number in range(flows):
            index = number % 3
            it.give_back(index)
            it.pairs[index].send(frame(number, tag=1))
            it.take(index)
            it.pairs[index].kick(1)
            assert it.hear_one() == frame(number, tag=1)
        for port in range(flows):
            it.wire.sendto(flow(port), (TAP, IPV4))
        by_pair: list[list[bytes]] = [[], [], []]
        while sum(map(len, by_pair)) < flows:
            for pair, received in zip(it.pairs, by_pair, strict=True):
                received += pair.received()
            if all(pair.would_sleep() for pair in it.pairs):
                it.sleep(f"{[len(received) for received in by_pair]}")
        assert all(by_pair)
        seen = [data for received in by_pair for data in received]
        assert sorted(seen) == sorted(flow(port) for port in range(flows))


def flow(port: int) -> bytes:
    """A UDP datagram from that port: the tap spreads these over its queues."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 46, 0, 0, 64, 17, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    udp = struct.pack(">HHHH", 1024 + port, 9, 26, 0)
    return ETHERNET[:12] + IPV4.to_bytes(2, "big") + ip + udp + bytes(18)
