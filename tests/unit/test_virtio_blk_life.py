"""A virtio disk is paused, reset, broken and closed with requests under way: none is lost, none is done twice."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmpy.abi.virtio import Status
from kvmpy.devices.virtio import blk
from kvmpy.devices.virtio.blk import BlkState
from kvmpy.devices.virtio.blk_request import Answer, Kind
from kvmpy.errors import HostError
from kvmpy.host.disk import Disk as HostDisk
from kvmpy.state import load, save
from tests.fakes.blk_rig import BlkRig, header
from tests.fakes.disk import FakeDisk
from tests.fakes.loop import BOUND, Inbox, poll, running

WORKERS = 4
UNTOUCHED = 0xEE


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def rig(disk: FakeDisk) -> Iterator[BlkRig]:
    rig = BlkRig(disk, workers=WORKERS)
    yield rig
    disk.go.set()
    rig.close()


def aside(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread, within: float = BOUND) -> bool:
    thread.join(within)
    return not thread.is_alive()


def hang(rig: BlkRig, disk: FakeDisk, count: int) -> list[int]:
    """``count`` reads, of which as many as there are workers are with a disk that does not answer."""
    disk.go.clear()
    heads = [rig.offer([header(Kind.IN, n)], [512, 1]) for n in range(count)]
    disk.log.wait(min(count, WORKERS))
    return heads


def mark(rig: BlkRig, heads: list[int]) -> None:
    """Put something into the status byte of each request that no device puts there."""
    for head in heads:
        gpa, _ = rig.ring.writable(head)[-1]
        rig.memory.write(gpa, bytes([UNTOUCHED]))


def untouched(rig: BlkRig, heads: list[int]) -> bool:
    return all(rig.memory.read(rig.ring.writable(head)[-1][0], 1) == bytes([UNTOUCHED]) for head in heads)


def waits(rig: BlkRig) -> None:
    """Until the device has been withdrawn; the lock is free then only because somebody waits for the disk."""
    until = time.monotonic() + BOUND
    while True:
        with rig.device.lock:
            if not rig.device.running:
                return
        assert time.monotonic() < until, "nobody waits"


def reset(rig: BlkRig) -> None:
    with rig.device.lock:
        rig.device.write_status(0)


def master(rig: BlkRig, *, enabled: bool) -> None:
    with rig.device.lock:
        rig.device.set_bus_master(enabled=enabled)


def test_pause_returns_when_all_that_was_taken_is_done(rig: BlkRig, disk: FakeDisk) -> None:
    heads = hang(rig, disk, 10)
    pausing = aside(rig.device.pause)
    waits(rig)
    assert rig.ring.used() == []
    disk.go.set()
    assert ended(pausing)
    assert {head for head, _ in rig.ring.used()} == set(heads)
    assert rig.device.queues[0].in_flight == 0
    assert rig.device.info()["under-way"] == 0


def test_paused_disk_takes_nothing_and_goes_on_where_it_was(rig: BlkRig, disk: FakeDisk) -> None:
    rig.device.pause()
    heads = [rig.offer([header(Kind.IN, n)], [512, 1]) for n in range(5)]
    assert disk.calls == []
    rig.device.resume()
    rig.kick()
    assert set(rig.wait(5)) == set(heads)
    assert len(disk.calls) == 5


def test_disk_that_was_saved_paused_goes_on_elsewhere(rig: BlkRig, disk: FakeDisk) -> None:
    rig.device.config_write(32, 1, 0)
    hang(rig, disk, 6)
    pausing = aside(rig.device.pause)
    waits(rig)
    disk.go.set()
    assert ended(pausing)
    rig.wait(6)
    late = rig.offer([header(Kind.OUT, 7), b"l" * 512], [1], kick=False)
    section = save(rig.device.state)
    assert load(BlkState, section) == rig.device.state

    with rig.device.lock:
        rig.device.state = load(BlkState, section)
        rig.device.post_load()
    rig.device.resume()
    rig.kick()
    assert set(rig.wait()) == {late}
    assert disk.calls[-2:] == ["write 7+1", "flush"]  # the driver's choice of the cache came along


def test_nobody_else_waits_for_the_lock_while_a_pause_waits_for_the_disk(rig: BlkRig, disk: FakeDisk) -> None:
    hang(rig, disk, 1)
    pausing = aside(rig.device.pause)
    waits(rig)
    assert rig.device.lock.acquire(timeout=BOUND)
    rig.device.lock.release()
    rig.kick()  # the io thread's callback returns
    assert rig.device.info()["under-way"] == 1
    disk.go.set()
    assert ended(pausing)


def test_reset_waits_for_nobody_and_reads_as_done_when_the_disk_is(rig: BlkRig, disk: FakeDisk) -> None:
    heads = hang(rig, disk, 3)
    mark(rig, heads)
    reset(rig)  # returns, though the disk does not answer
    assert rig.guest.status() != 0
    disk.go.set()
    poll(lambda: rig.guest.status() == 0)
    assert rig.ring.used() == []
    assert untouched(rig, heads)
    assert rig.transport.heard.items == []
    rig.guest.start()
    assert rig.ask(Kind.IN, 0, into=512)[0] is Answer.OK


def test_what_no_worker_has_begun_when_the_driver_resets_is_not_done(rig: BlkRig, disk: FakeDisk) -> None:
    hang(rig, disk, 20)
    reset(rig)
    disk.go.set()
    poll(lambda: rig.guest.status() == 0)
    assert len(disk.calls) == WORKERS
    assert rig.device.info()["under-way"] == 0


def test_driver_that_does_not_wait_for_its_reset_starts_nothing(rig: BlkRig, disk: FakeDisk) -> None:
    hang(rig, disk, 1)
    reset(rig)
    before = rig.guest.status()
    for status in (Status.ACKNOWLEDGE, Status.DRIVER, Status.DRIVER_OK, 0xFF):
        with rig.device.lock:
            rig.device.write_status(status)
        assert rig.guest.status() == before
    disk.go.set()
    poll(lambda: rig.guest.status() == 0)
    assert not rig.device.running


def test_resets_while_one_is_not_complete_are_that_one(rig: BlkRig, disk: FakeDisk) -> None:
    hang(rig, disk, 2)
    for _ in range(3):
        reset(rig)
    disk.go.set()
    rig.guest.start()
    assert rig.ask(Kind.IN, 0, into=512)[0] is Answer.OK


def test_break_and_the_reset_after_it_wait_for_nobody(rig: BlkRig, disk: FakeDisk) -> None:
    heads = hang(rig, disk, 2)
    mark(rig, heads)
    rig.ring.put(9999)  # no such descriptor
    rig.ring.publish()
    rig.kick()
    rig.wait_until_broken()
    assert rig.guest.status() & Status.NEEDS_RESET
    reset(rig)
    assert rig.guest.status() != 0
    disk.go.set()
    poll(lambda: rig.guest.status() == 0)
    assert rig.ring.used() == []  # a device that needs a reset gives nothing back
    assert untouched(rig, heads)
    rig.guest.start()
    assert rig.ask(Kind.IN, 0, into=512)[0] is Answer.OK


def test_disk_that_may_not_reach_memory_gives_back_what_it_had_and_takes_no_more(rig: BlkRig, disk: FakeDisk) -> None:
    heads = hang(rig, disk, 3)
    master(rig, enabled=False)  # returns, though the disk does not answer
    late = rig.offer([header(Kind.IN, 9)], [512, 1])
    assert disk.calls == ["read 0+1", "read 1+1", "read 2+1"]
    disk.go.set()
    assert set(rig.wait(3)) == set(heads)  # as a write that was posted earlier
    poll(lambda: not rig.device.busy)
    assert not rig.device.queues[0].running
    master(rig, enabled=True)
    rig.kick()
    assert set(rig.wait(1)) == {late}


def test_disk_that_may_reach_memory_again_goes_on_when_it_is_done_with_what_it_had(rig: BlkRig, disk: FakeDisk) -> None:
    heads = hang(rig, disk, 2)
    master(rig, enabled=False)
    master(rig, enabled=True)
    assert not rig.device.running
    late = rig.offer([header(Kind.IN, 9)], [512, 1])
    disk.go.set()
    assert set(rig.wait(2)) == set(heads)
    poll(lambda: rig.device.running)
    rig.kick()
    assert set(rig.wait(1)) == {late}
    assert rig.device.queues[0].in_flight == 0


def test_pause_can_be_begun_without_waiting(rig: BlkRig, disk: FakeDisk) -> None:
    assert rig.device.begin_pause()
    rig.device.resume()
    heads = hang(rig, disk, 2)
    assert not rig.device.begin_pause()
    disk.go.set()
    assert set(rig.wait(2)) == set(heads)
    poll(rig.device.begin_pause)


def test_pause_waits_for_what_a_broken_disk_left(rig: BlkRig, disk: FakeDisk) -> None:
    hang(rig, disk, 2)
    rig.device.break_("a test")
    pausing = aside(rig.device.pause)
    assert not ended(pausing, 0.1)
    disk.go.set()
    assert ended(pausing)


def test_request_that_breaks_the_device_leaves_the_others_to_end(rig: BlkRig, disk: FakeDisk) -> None:
    hang(rig, disk, 2)
    rig.offer([b"short"], [1])
    rig.wait_until_broken()
    disk.go.set()
    rig.device.pause()
    assert rig.device.info()["under-way"] == 0


def test_operator_hears_of_a_disk_that_hangs_a_pause(
    rig: BlkRig, disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blk, "PATIENCE", 0.01)
    said: Inbox[str] = Inbox()
    monkeypatch.setattr(blk.log, "warning", lambda words, *values: said.put(words % values))
    hang(rig, disk, 3)
    pausing = aside(rig.device.pause)
    assert said.wait(2)[:2] == ["vd0/virtio-blk: disk.raw does not answer: 3 requests are not done"] * 2
    disk.go.set()
    assert ended(pausing)


def test_close_ends_the_workers_and_waits_for_the_disk(rig: BlkRig, disk: FakeDisk) -> None:
    names = {thread.name for thread in threading.enumerate()}
    assert {f"blk-vd0-{n}" for n in range(WORKERS)} <= names
    hang(rig, disk, 2)
    closing = aside(rig.close)
    waits(rig)
    disk.go.set()
    assert ended(closing)
    assert not {thread.name for thread in threading.enumerate()} & {f"blk-vd0-{n}" for n in range(WORKERS)}


def test_disk_for_which_there_are_no_threads_is_refused(disk: FakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_threads)
    with pytest.raises(HostError, match="EAGAIN: no thread for the disk; raise the limit of processes"):
        BlkRig(disk)


def test_under_random_pauses_and_resets_every_write_is_done_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    disk = HostDisk.open(str(path), readonly=False, direct=False)
    chance = random.Random(7)
    with running("io") as io:
        rig = BlkRig(disk, queues=2, loop=io)
        written: dict[int, bytes] = {}
        for turn in range(60):
            waiting: list[set[int]] = [set(), set()]
            for _ in range(chance.randrange(1, 20)):
                queue, sector = chance.randrange(2), chance.randrange(2048)
                if sector not in written or written[sector][0] != turn:
                    written[sector] = bytes([turn]) + chance.randbytes(511)
                    request = [header(Kind.OUT, sector), written[sector]]
                    waiting[queue].add(rig.offer(request, [1], queue=queue, kick=bool(chance.randrange(2))))
            match chance.randrange(3):
                case 0:
                    rig.device.pause()
                    with rig.device.lock:
                        rig.device.state = load(BlkState, save(rig.device.state))
                        rig.device.post_load()
                    rig.device.resume()
                case 1:
                    rig.device.pause()
                    rig.device.resume()
            for queue, heads in enumerate(waiting):
                rig.kick(queue)
                assert set(rig.wait(len(heads), queue=queue)) == heads if heads else True
            if not chance.randrange(8):
                rig.guest.start(rig.device.features & ~(1 << 29))
        rig.close()
    disk.close()
    content = path.read_bytes()
    assert all(content[sector * 512 : sector * 512 + 512] == data for sector, data in written.items())


# Handed over to another host


def test_a_disk_is_durable_before_it_is_unlocked(rig: BlkRig, disk: FakeDisk) -> None:
    rig.device.pause()
    assert not rig.device.is_durable
    rig.device.make_durable()
    rig.device.hand_over()
    assert disk.calls == ["flush", "unlock"]
    rig.device.take_over()
    assert disk.calls[2:] == ["lock"]


def test_a_disk_whose_writes_may_be_lost_stays_locked(rig: BlkRig, disk: FakeDisk) -> None:
    disk.fails["flush"] = OSError(errno.EIO, "I/O error")
    rig.device.pause()
    with pytest.raises(HostError, match=r"disk\.raw: EIO: what was written may not be there for others"):
        rig.device.make_durable()
    assert "unlock" not in disk.calls
