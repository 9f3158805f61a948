"""While there is a log, every page of guest memory that a device writes is in it: whatever the driver does.

The driver's own writes are not the device's: memory is compared from the moment the driver has written to the moment
the device has come to rest.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.virtio.blk_request import Answer, Kind
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.devices.virtio.net_state import NetFeature
from kvmpy.devices.virtio.queue import Virtqueue
from kvmpy.errors import HostError
from kvmpy.memory import GuestMemory, Ram
from kvmpy.pagebits import PAGE, PageBits, WriteLog
from tests.counts import count
from tests.fakes.blk_rig import BlkRig, header
from tests.fakes.disk import FakeDisk
from tests.fakes.net_rig import CONTROLLED, MERGEABLE, OK, PLAIN, net_rig
from tests.fakes.rig import Parts
from tests.fakes.virtio_driver import Bytes, RingDriver, guest_memory
from tests.fakes.virtio_rigs import blk, console, net, rng
from tests.fakes.watch import Watch

EXAMPLES: Final = count(8, 3000)
HIGH: Final = 1 << 32


# Any driver


DEVICES: Final[dict[str, Callable[[Parts], Any]]] = {"blk": blk, "rng": rng, "console": console, "net": net}
VALUES = st.one_of(st.integers(0, 255), st.integers(0, (1 << 24) - 1))


def test_devices_below_are_all_there_are() -> None:
    with ExitStack() as resources:
        tested = {type(make(Parts(resources)).device) for make in DEVICES.values()}
    assert tested == {kind for kind in VirtioDevice.__subclasses__() if kind.__module__.startswith("kvmpy.")}


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_page_that_a_device_changes_is_in_the_log(name: str, data: st.DataObject) -> None:
    with ExitStack() as resources:
        rig = DEVICES[name](Parts(resources))
        watch, settle = Watch(rig.memory), rig.settle

        def settle_and_check() -> None:
            watch.begin()
            settle()
            watch.check()
            watch.begin()

        rig.settle = settle_and_check
        operations = st.sampled_from(["offer", "offer", "offer", *rig.host])
        rig.start(1 | data.draw(VALUES) << 1)
        for what, value in data.draw(st.lists(st.tuples(operations, VALUES), min_size=1, max_size=15)):
            watch.begin()
            rig.host[what](value)
            watch.check()
        rig.memory.stop_log()


# What the drivers above seldom come to


def test_frame_of_many_pages_marks_each_and_none_besides() -> None:
    with net_rig(size=8, room=3 * PAGE) as rig:
        rig.start(MERGEABLE)
        rig.lend(2 * PAGE, count=6)
        watch = Watch(rig.memory)
        rig.tap.send(bytes(range(1, 251)) * 40)
        rig.loop.run()
        changed = watch.changed()
        assert len(changed) >= 4
        assert changed <= (logged := watch.logged())
        assert len(logged) <= len(changed) + 2  # the used ring, and where a frame's last chain begins
        assert len(rig.received()) == 1


@pytest.mark.parametrize("features", [PLAIN, MERGEABLE], ids=["dropped", "held"])
@pytest.mark.parametrize("pause", [False, True])
def test_buffer_that_a_frame_filled_for_nothing_is_in_the_log(features: int, pause: bool) -> None:
    with net_rig(size=2, room=2 * PAGE) as rig:
        rig.start(features)
        rig.lend(5000)  # of two pages or three, and the used ring is in one of them at most
        watch = Watch(rig.memory)
        rig.tap.send(b"x" * 9000)
        rig.loop.run()
        if pause:
            rig.net.pause()
        assert len(watch.check()) >= 2
        assert rig.received() == []


def test_answer_to_a_command_is_in_the_log() -> None:
    with net_rig() as rig:
        rig.start(CONTROLLED)
        ring = rig.guest.queues[2]
        assert rig.net.acked(NetFeature.CTRL_VQ)
        head = ring.offer([b"\0\0", b"\1"], [1])
        rig.memory.write(ring._chains[head][1][0][0], b"\xff")
        watch = Watch(rig.memory)
        rig.guest.kick(2)
        assert watch.check()
        assert ring.used() == [(head, 1)]
        assert ring.content(head) == bytes([OK])


class HalfDisk(FakeDisk):
    """Reads half of what is asked for, and fails."""

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers[: len(buffers) // 2 + 1]:
            buffer[:] = b"h" * len(buffer)
        raise OSError(errno.EIO, "half")


@pytest.mark.parametrize("disk", [FakeDisk, HalfDisk])
def test_pages_of_a_read_are_in_the_log_though_it_fails(disk: type[FakeDisk]) -> None:
    made = disk()
    made.content[:] = b"c" * len(made.content)
    rig = BlkRig(made)
    try:
        head = rig.offer([header(Kind.IN)], [2048, 2048, 2048, 1], kick=False)
        watch = Watch(rig.memory)
        rig.kick()
        rig.wait()
        expected = Answer.OK if disk is FakeDisk else Answer.IOERR
        assert rig.ring.content(head)[-1] == expected
        assert len(watch.check()) >= 2
    finally:
        rig.close()


def test_read_that_ends_when_its_device_is_broken_already_is_in_the_log() -> None:
    disk = FakeDisk()
    disk.content[:] = b"c" * len(disk.content)
    rig = BlkRig(disk)
    try:
        disk.go.clear()
        rig.offer([header(Kind.IN)], [4096, 1])
        disk.log.wait_until(bool)
        rig.device.break_("for the test")
        watch = Watch(rig.memory)
        disk.go.set()
        rig.device.pause()  # waits for what is under way
        assert watch.check()
    finally:
        rig.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_wish_for_kicks_is_in_the_log(event_idx: bool) -> None:
    memory = guest_memory(1 << 20)
    driver = RingDriver(memory, 0x1000, 8, event_idx=event_idx)
    queue = Virtqueue("queue", memory, 8)
    driver.begin_at(queue.state, 5)
    driver.configure(queue.state)
    queue.start(indirect=False, event_idx=event_idx)
    watch = Watch(memory)
    if event_idx:
        driver.offer(writable=[8])
        assert queue.pop()
        watch.begin()
        queue.set_notification(enabled=True)
    else:
        queue.set_notification(enabled=False)
    assert watch.check() == {driver.device // PAGE * PAGE}
    queue.close()


# The log itself


class Follower:
    """Somebody who writes past us."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.notes = refuses, [""]
        self.notes.clear()

    def log_started(self, log: WriteLog) -> None:
        if self.refuses:
            raise HostError("this one cannot")
        self.notes.append(f"started {log.size}")

    def log_stopped(self) -> None:
        self.notes.append("stopped")


def two_blocks() -> GuestMemory:
    memory = guest_memory(1 << 20)
    memory.add(Ram(HIGH, 1 << 20, Bytes(1 << 20)))
    return memory


def test_write_is_in_the_log_while_there_is_one() -> None:
    memory = two_blocks()
    memory.write(0, b"before")
    log = memory.start_log()
    memory.write(HIGH + 2 * PAGE - 1, b"xy")
    memory.mark(5 * PAGE, 1)
    memory.stop_log()
    memory.write(7 * PAGE, b"after")
    low, high = PageBits(256), PageBits(256)
    log.take(0, low)
    log.take(HIGH, high)
    assert [page for page in range(256) if page in low] == [5]
    assert [page for page in range(256) if page in high] == [1, 2]


def test_follower_hears_of_the_log_and_one_that_comes_later_too() -> None:
    memory, first, second = two_blocks(), Follower(), Follower()
    memory.follow_log(first)
    memory.start_log()
    memory.follow_log(second)
    memory.unfollow_log(first)
    memory.stop_log()
    memory.stop_log()
    size = (HIGH + (1 << 20)) // PAGE
    assert first.notes == [f"started {size}", "stopped"]
    assert second.notes == [f"started {size}", "stopped"]


def test_follower_that_cannot_leaves_no_log() -> None:
    memory, good, bad = two_blocks(), Follower(), Follower(refuses=True)
    memory.follow_log(good)
    memory.follow_log(bad)
    with pytest.raises(HostError, match="this one cannot"):
        memory.start_log()
    assert memory.log is None
    assert good.notes[1:] == ["stopped"]


def test_new_log_ends_the_one_before() -> None:
    memory, follower = two_blocks(), Follower()
    memory.follow_log(follower)
    first = memory.start_log()
    assert memory.start_log() is not first
    assert [note.split()[0] for note in follower.notes] == ["started", "stopped", "started"]


def test_memory_does_not_grow_under_a_log() -> None:
    memory = two_blocks()
    memory.start_log()
    with pytest.raises(ValueError, match="logged"):
        memory.add(Ram(2 * HIGH, PAGE, Bytes(PAGE)))


def test_closing_memory_ends_its_log() -> None:
    memory, follower = two_blocks(), Follower()
    memory.follow_log(follower)
    memory.start_log()
    memory.close()
    assert follower.notes[-1] == "stopped"
