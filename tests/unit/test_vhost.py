"""vhost: what the kernel is told and in which order; whatever fails, the rings are where they were."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy.abi import ioctl
from kvmpy.devices.vhost import HANDLED, VhostNet
from kvmpy.devices.virtio.queue import Virtqueue
from kvmpy.errors import GuestError, HostError, IoctlError
from kvmpy.host.eventfd import EventFd
from kvmpy.host.reactor import Reactor
from kvmpy.memory import GuestMemory, Ram
from tests.fakes.loop import open_descriptors, running, settle
from tests.fakes.vhost import LOG_ALL, FakeOwner, FakeRing, FakeVhost, VhostKernel
from tests.fakes.virtio_driver import Bytes, RingDriver

SIZE = 8
TAP = 77
LOW = Ram(0, 1 << 20, Bytes(1 << 20))
HIGH = Ram(1 << 32, 1 << 20, Bytes(1 << 20))
EVERYTHING = (1 << 64) - 1
SET_UP = [f"VHOST_SET_VRING_{what}" for what in ("NUM", "BASE", "ADDR", "ERR", "CALL", "KICK")]
TAKE = ["VHOST_SET_FEATURES", *SET_UP, *SET_UP, "VHOST_NET_SET_BACKEND", "VHOST_NET_SET_BACKEND"]
LET_GO = [*(f"VHOST_SET_VRING_{what}" for what in ("KICK", "CALL", "ERR")), "VHOST_GET_VRING_BASE"]
GIVE_BACK = ["VHOST_NET_SET_BACKEND", "VHOST_NET_SET_BACKEND", *LET_GO, *LET_GO]


class Rig:
    """A device with pairs of queues in guest memory, and a vhost for it on a fake kernel."""

    def __init__(self, kernel: VhostKernel, io: Reactor, pairs: int = 1) -> None:
        self.kernel, self.io = kernel, io
        self.memory = GuestMemory()
        self.memory.add(LOW)
        self.memory.add(HIGH)
        self.device = FakeOwner()
        self.drivers = [
            RingDriver(self.memory, 0x1000 + n * 0x1_0000 if n % 2 else HIGH.gpa + n * 0x1_0000, SIZE)
            for n in range(2 * pairs)
        ]
        self.queues = [Virtqueue(f"queue {n}", self.memory, SIZE) for n in range(2 * pairs)]
        for driver, queue in zip(self.drivers, self.queues, strict=True):
            driver.configure(queue.state)
        self.calls = [EventFd() for _ in self.queues]
        self.vhost = VhostNet(self.memory, io, pairs, os.devnull)
        kernel.seen.clear()

    @property
    def kernels(self) -> list[FakeVhost]:
        """What the kernel knows of each pair."""
        return list(self.kernel.opened.values())

    def ring(self, index: int) -> FakeRing:
        return self.kernels[index // 2].rings[index % 2]

    def take(self, pair: int = 0, features: int = EVERYTHING) -> None:
        rx, tx = self.queues[2 * pair : 2 * pair + 2]
        calls = [event.fd for event in self.calls[2 * pair : 2 * pair + 2]]
        with self.device.lock:
            self.vhost.take(pair, self.device, rx, tx, tap=TAP, calls=calls, features=features)

    def give_back(self, pair: int = 0) -> None:
        with self.device.lock:
            self.vhost.give_back(pair)

    def serve(self, index: int, count: int) -> None:
        """The kernel takes ``count`` chains of a ring and returns them."""
        driver = self.drivers[index]
        driver.store(driver.device + 2, driver.load(driver.device + 2) + count & 0xFFFF)
        self.ring(index).base = self.ring(index).base + count & 0xFFFF

    def at(self, index: int) -> tuple[int, int]:
        state = self.queues[index].state
        return state.last_avail, state.next_used

    def set_at(self, index: int, position: int) -> None:
        """Have the queue go on at this index, all that came before used."""
        state, driver = self.queues[index].state, self.drivers[index]
        state.last_avail = state.next_used = position
        driver.store(driver.device + 2, position)

    def report_broken(self, index: int) -> None:
        """The kernel says that the guest has broken a ring."""
        os.eventfd_write(self.ring(index).error, 1)

    def close(self) -> None:
        self.vhost.close()
        for queue in self.queues:
            queue.close()
        for event in self.calls:
            event.close()
        self.memory.close()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> VhostKernel:
    kernel = VhostKernel()
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)
    return kernel


@pytest.fixture
def io() -> Iterator[Reactor]:
    with running("io") as reactor:
        yield reactor


@pytest.fixture
def rig(kernel: VhostKernel, io: Reactor) -> Iterator[Rig]:
    rig = Rig(kernel, io)
    yield rig
    rig.close()


@pytest.fixture
def two(kernel: VhostKernel, io: Reactor) -> Iterator[Rig]:
    """Two pairs."""
    rig = Rig(kernel, io, pairs=2)
    yield rig
    rig.close()


# Setting up


def test_each_pair_has_a_descriptor_of_its_own_with_all_of_memory(two: Rig) -> None:
    table = [(block.gpa, block.size, block.hva) for block in (LOW, HIGH)]
    assert [(kernel.owned, kernel.table) for kernel in two.kernels] == [(True, table)] * 2


def test_descriptor_is_owned_before_anything_else_and_only_once(kernel: VhostKernel, io: Reactor) -> None:
    VhostNet(GuestMemory(), io, 2, os.devnull).close()
    assert kernel.names() == ["VHOST_SET_OWNER", "VHOST_GET_FEATURES"] * 2


def test_host_without_vhost_net_is_told_what_to_do(io: Reactor) -> None:
    with pytest.raises(
        HostError, match=r"^/dev/nowhere: ENOENT: cannot be opened; load vhost_net .*, or set vhost = false$"
    ):
        VhostNet(GuestMemory(), io, 1, "/dev/nowhere")


@pytest.mark.parametrize("requests", range(6))  # two owners, two features, a table each
def test_vhost_that_cannot_be_set_up_leaves_nothing_open(kernel: VhostKernel, io: Reactor, requests: int) -> None:
    memory = GuestMemory()
    memory.add(LOW)
    before = open_descriptors()
    kernel.countdown = requests
    with pytest.raises(IoctlError):
        VhostNet(memory, io, 2, os.devnull)
    assert open_descriptors() == before


def test_features_are_those_that_vhost_handles_and_no_others(rig: Rig) -> None:
    assert rig.vhost.features() == sum(1 << number for number in (15, 28, 29, 32))


def test_feature_that_this_kernel_lacks_is_not_offered(kernel: VhostKernel, io: Reactor) -> None:
    kernel.offers &= ~(1 << 29)
    vhost = VhostNet(GuestMemory(), io, 1, os.devnull)
    assert vhost.features() == HANDLED & ~(1 << 29)
    vhost.close()


# Lending


def test_kernel_is_told_everything_before_it_gets_a_backend(rig: Rig) -> None:
    rig.take()
    assert rig.kernel.names() == TAKE
    assert rig.vhost.lent(0)


def test_kernel_gets_the_rings_where_they_are_and_how_far_they_came(rig: Rig) -> None:
    rig.set_at(0, 65535)
    rig.set_at(1, 40)
    rig.take()
    for index, (block, base) in enumerate(((HIGH, 65535), (LOW, 40))):
        ring, driver = rig.ring(index), rig.drivers[index]
        assert (ring.num, ring.base, ring.backend) == (SIZE, base, TAP)
        assert (ring.desc, ring.avail, ring.used) == tuple(
            block.hva + gpa - block.gpa for gpa in (driver.desc, driver.driver, driver.device)
        )
        assert (ring.kick, ring.call) == (rig.queues[index].kick.fd, rig.calls[index].fd)


def test_kernel_gets_only_features_that_it_handles(rig: Rig) -> None:
    rig.take(features=EVERYTHING)
    assert rig.kernels[0].features == rig.vhost.features()
    rig.give_back()
    rig.take(features=1 << 32 | 1 << 5)
    assert rig.kernels[0].features == 1 << 32


def test_what_was_offered_before_is_not_missed(rig: Rig) -> None:
    rig.take()
    assert [queue.kick.take() for queue in rig.queues] == [1, 1]


def test_pairs_are_lent_one_by_one(two: Rig) -> None:
    two.take(1)
    assert [two.vhost.lent(pair) for pair in range(2)] == [False, True]
    assert [two.ring(index).idle for index in range(4)] == [True, True, False, False]
    two.take(0)
    two.give_back(1)
    assert [two.ring(index).idle for index in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("failing", range(len(TAKE)))
def test_request_that_fails_leaves_the_rings_with_us(rig: Rig, failing: int) -> None:
    rig.set_at(0, 7)
    rig.set_at(1, 9)
    rig.kernel.countdown = failing
    with pytest.raises(IoctlError, match=rf"^{TAKE[failing]}: EIO$"):
        rig.take()
    assert not rig.vhost.lent(0)
    assert rig.ring(0).idle
    assert rig.ring(1).idle
    assert [rig.at(0), rig.at(1)] == [(7, 7), (9, 9)]
    rig.take()
    assert rig.ring(0).backend == rig.ring(1).backend == TAP


def test_frames_that_came_before_the_other_ring_failed_are_kept(rig: Rig) -> None:
    def backend(file: Any) -> int:
        if (file.index, file.fd) == (1, TAP):
            raise IoctlError("VHOST_NET_SET_BACKEND", errno.EBADFD)
        if file.fd == TAP:
            rig.serve(0, 3)
        return 0

    rig.kernel.answers["VHOST_NET_SET_BACKEND"] = backend
    with pytest.raises(IoctlError, match=r"^VHOST_NET_SET_BACKEND: EBADFD$"):
        rig.take()
    assert [rig.at(0), rig.at(1)] == [(3, 3), (0, 0)]


@pytest.mark.parametrize("part", ["desc", "driver", "device"])
@pytest.mark.parametrize("gpa", [LOW.size - 16, LOW.size, HIGH.gpa - 16, HIGH.gpa + HIGH.size - 16, 2**64 - 16, 0x1001])
def test_ring_that_is_not_all_in_ram_is_the_guests_fault(rig: Rig, part: str, gpa: int) -> None:
    for index in (0, 1):
        before = getattr(rig.queues[index].state, part)
        setattr(rig.queues[index].state, part, gpa)
        with pytest.raises(GuestError, match=rf"^queue {index}: a ring at {gpa:#x}\+"):
            rig.take()
        setattr(rig.queues[index].state, part, before)
    assert not rig.vhost.lent(0)
    assert rig.kernel.names() == []


def test_ring_may_end_where_ram_ends(rig: Rig) -> None:
    rig.queues[0].state.desc = LOW.size - 16 * SIZE
    rig.queues[1].state.driver = HIGH.gpa + HIGH.size - (6 + 2 * SIZE)
    rig.take()
    assert rig.ring(0).desc == LOW.hva + LOW.size - 16 * SIZE


# Taking back


def test_kernel_stops_before_it_is_asked_how_far_it_came(rig: Rig) -> None:
    rig.take()
    rig.kernel.seen.clear()
    rig.give_back()
    assert rig.kernel.names() == GIVE_BACK
    assert rig.ring(0).idle
    assert rig.ring(1).idle


def test_queues_go_on_where_the_kernel_stopped(rig: Rig) -> None:
    rig.set_at(0, 65534)
    rig.take()
    rig.serve(0, 5)
    rig.serve(1, 2)
    rig.ring(0).base += 1  # taken and not used, as the kernel never leaves it; but that is its word
    rig.give_back()
    assert [rig.at(0), rig.at(1)] == [(4, 3), (2, 2)]


def test_giving_back_twice_or_what_was_never_lent_is_nothing(rig: Rig) -> None:
    rig.give_back()
    rig.take()
    rig.serve(0, 1)
    rig.give_back()
    rig.kernel.seen.clear()
    rig.set_at(0, 3)
    rig.give_back()
    assert rig.kernel.names() == []
    assert rig.at(0) == (3, 3)


@pytest.mark.parametrize("failing", range(len(GIVE_BACK)))
def test_kernel_that_does_not_let_go_is_closed(rig: Rig, failing: int) -> None:
    rig.take()
    rig.serve(0, 3)
    rig.serve(1, 4)
    before = open_descriptors()
    rig.kernel.countdown = failing
    rig.give_back()
    assert len(set(before) - set(open_descriptors())) == 1
    assert [rig.at(0), rig.at(1)] == [(3, 3), (4, 4)]
    with pytest.raises(HostError, match="has failed on this queue pair before"):
        rig.take()
    assert [rig.at(0), rig.at(1)] == [(3, 3), (4, 4)]


# Interrupts


def test_other_eventfd_is_signalled_from_now_on_and_for_what_the_last_one_got(rig: Rig) -> None:
    rig.take()
    with EventFd() as rx, EventFd() as tx:
        rig.vhost.set_call(0, [rx.fd, tx.fd])
        assert [rig.ring(0).call, rig.ring(1).call] == [rx.fd, tx.fd]
        assert [rx.take(), tx.take()] == [1, 1]
        rig.vhost.set_call(0, [-1, tx.fd])
        assert rig.ring(0).call == -1


def test_eventfd_of_what_is_not_lent_is_nobodys_concern(rig: Rig) -> None:
    rig.vhost.set_call(0, [rig.calls[0].fd, -1])
    assert rig.kernel.names() == []
    assert rig.calls[0].take() == 0


# Broken rings


@pytest.mark.parametrize(("index", "name"), [(0, "receive"), (1, "transmit"), (2, "receive"), (3, "transmit")])
def test_ring_that_the_kernel_finds_broken_breaks_the_device(two: Rig, index: int, name: str) -> None:
    two.take(0)
    two.take(1)
    two.report_broken(index)
    assert two.device.broken.wait() == [f"vhost: the {name} ring of queue pair {index // 2} is broken"]
    assert not two.vhost.lent(index // 2)
    assert two.vhost.lent(1 - index // 2)


def test_report_that_comes_after_the_rings_breaks_nothing(rig: Rig) -> None:
    rig.take()
    with rig.device.lock:
        rig.report_broken(0)
        rig.report_broken(1)
        rig.give_back()
        rig.take()
    settle(rig.io)
    assert rig.vhost.lent(0)
    assert rig.device.broken.items == []


@pytest.mark.parametrize("failing", range(len(GIVE_BACK)))
def test_report_of_a_kernel_that_does_not_let_go_is_heard_once(rig: Rig, failing: int) -> None:
    rig.take()
    rig.kernel.countdown = failing
    rig.report_broken(1)
    rig.device.broken.wait()
    settle(rig.io)
    assert len(rig.device.broken.items) == 1


# Memory that comes and goes


def block(gpa: int) -> Ram:
    return Ram(gpa, 0x1000, Bytes(0x1000))


def test_new_memory_is_reachable_while_rings_are_lent(two: Rig) -> None:
    two.take()
    two.memory.add(new := block(1 << 33))
    assert [kernel.table[-1] for kernel in two.kernels] == [(new.gpa, new.size, new.hva)] * 2
    assert two.vhost.lent(0)


@pytest.mark.parametrize("failing", [0, 1])
def test_memory_that_the_kernel_refuses_is_in_no_table(two: Rig, failing: int) -> None:
    before = two.kernels[0].table
    two.take()
    two.kernel.countdown = failing
    with pytest.raises(IoctlError, match=r"^VHOST_SET_MEM_TABLE: EIO$"):
        two.memory.add(block(1 << 33))
    assert [kernel.table for kernel in two.kernels] == [before] * 2
    assert two.vhost.lent(0)
    assert two.device.broken.items == []


def test_memory_without_rings_leaves_quietly(rig: Rig) -> None:
    before = rig.kernels[0].table
    new = block(1 << 33)
    rig.memory.add(new)
    rig.take()
    rig.vhost.ram_removed(new)
    assert rig.kernels[0].table == before
    assert rig.vhost.lent(0)
    rig.vhost.ram_added(new)  # which the memory will take away


def test_rings_in_memory_that_leaves_are_ours_again_before_it_has_left(rig: Rig) -> None:
    rig.take()
    rig.serve(0, 2)
    rig.vhost.ram_removed(HIGH)
    assert rig.ring(0).idle
    assert rig.at(0) == (2, 2)
    assert rig.device.broken.items == ["vhost: memory is taken away that its rings need"]
    assert rig.kernels[0].table == [(LOW.gpa, LOW.size, LOW.hva)]
    with pytest.raises(GuestError):
        rig.take()
    rig.vhost.ram_added(HIGH)


def test_kernel_that_does_not_forget_memory_is_closed(two: Rig) -> None:
    new = block(1 << 33)
    two.memory.add(new)
    two.take(0)
    two.take(1)
    two.kernel.countdown = 1
    two.vhost.ram_removed(new)
    assert [two.vhost.lent(0), two.vhost.lent(1)] == [True, False]
    assert two.device.broken.items == ["vhost: memory is taken away that its rings need"]
    two.vhost.ram_added(new)
    assert two.kernels[0].table[-1] == (new.gpa, new.size, new.hva)


# The end


def test_memory_may_be_closed_first(rig: Rig) -> None:
    rig.take()
    rig.memory.close()
    assert rig.kernels[0].table == []
    assert not rig.vhost.lent(0)
    rig.give_back()


def test_closing_takes_back_what_is_lent_and_leaves_nothing_open(kernel: VhostKernel, io: Reactor) -> None:
    before = open_descriptors()
    rig = Rig(kernel, io, pairs=2)
    rig.take(1)
    rig.serve(3, 1)
    rig.vhost.close()
    assert rig.at(3) == (1, 1)
    rig.vhost.close()
    rig.give_back(1)
    rig.close()
    assert open_descriptors() == before
    settle(io)


def test_memory_tells_nobody_who_is_closed(kernel: VhostKernel, io: Reactor) -> None:
    memory = GuestMemory()
    memory.add(LOW)
    vhost = VhostNet(memory, io, 1, os.devnull)
    assert memory._listeners == [vhost]
    kernel.seen.clear()
    vhost.close()
    assert (memory._listeners, memory._followers, kernel.names()) == ([], [], [])


def test_memory_tells_nobody_who_could_not_log(kernel: VhostKernel, io: Reactor) -> None:
    memory = GuestMemory()
    memory.add(LOW)
    memory.start_log()
    kernel.offers &= ~(1 << LOG_ALL)
    with pytest.raises(HostError, match="does not log what it writes"):
        VhostNet(memory, io, 1, os.devnull)
    assert (memory._listeners, memory._followers) == ([], [])
    memory.stop_log()


# Logging what the kernel writes


def test_rings_that_are_lent_are_logged_while_there_is_a_log_and_go_on(two: Rig) -> None:
    two.take(0)
    log = two.memory.start_log()
    kernel = two.kernels[0]
    assert kernel.logs
    assert kernel.log_base == log.address
    assert [ring.log_gpa for ring in kernel.rings] == [driver.device for driver in two.drivers[:2]]
    assert kernel.features & ~(1 << LOG_ALL) == two.vhost.features()
    two.memory.stop_log()
    assert kernel.logs_nothing
    assert kernel.features == two.vhost.features()
    assert two.vhost.lent(0)
    assert [ring.backend for ring in kernel.rings] == [TAP, TAP]


def test_rings_that_are_lent_while_there_is_a_log_are_logged_too_each_time(two: Rig) -> None:
    log = two.memory.start_log()
    for _ in range(2):
        two.take(1)
        assert two.kernels[1].logs
        assert two.kernels[1].log_base == log.address
        two.give_back(1)
    two.memory.stop_log()
    two.take(1)
    assert two.kernels[1].logs_nothing


def test_second_log_is_as_good_as_the_first(rig: Rig) -> None:
    rig.take()
    for _ in range(3):
        log = rig.memory.start_log()
        assert rig.kernels[0].logs
        assert rig.kernels[0].log_base == log.address
        rig.memory.stop_log()
        assert rig.kernels[0].logs_nothing


def test_vhost_that_comes_while_there_is_a_log_logs(kernel: VhostKernel, io: Reactor) -> None:
    memory = GuestMemory()
    memory.add(LOW)
    log = memory.start_log()
    vhost = VhostNet(memory, io, 1, os.devnull)
    (opened,) = kernel.opened.values()
    assert opened.log_base == log.address
    vhost.close()
    memory.stop_log()


START = ["GET_FEATURES", "SET_LOG_BASE", "SET_FEATURES", "SET_VRING_ADDR", "SET_VRING_ADDR"]


def test_log_has_its_place_before_it_is_written_to(rig: Rig) -> None:
    rig.take()
    rig.kernel.seen.clear()
    rig.memory.start_log()
    assert rig.kernel.names() == [f"VHOST_{name}" for name in START]


@pytest.mark.parametrize("failing", range(2 * len(START)))
def test_log_that_cannot_be_started_is_not_there_and_frames_go_on(two: Rig, failing: int) -> None:
    two.take(0)
    two.take(1)
    two.kernel.countdown = failing
    with pytest.raises(IoctlError, match=rf"^VHOST_{START[failing % len(START)]}: EIO$"):
        two.memory.start_log()
    assert two.memory.log is None
    assert all(kernel.logs_nothing for kernel in two.kernels)
    assert [two.vhost.lent(pair) for pair in range(2)] == [True, True]
    assert two.device.broken.items == []
    two.memory.start_log()
    assert all(kernel.logs for kernel in two.kernels)


@pytest.mark.parametrize("failing", range(3))
def test_kernel_that_does_not_stop_to_log_loses_the_pair(two: Rig, failing: int) -> None:
    two.take(0)
    two.take(1)
    two.memory.start_log()
    before = open_descriptors()
    two.kernel.countdown = failing
    two.memory.stop_log()
    assert two.memory.log is None
    assert len(set(before) - set(open_descriptors())) == 1
    assert two.device.broken.items == ["vhost: the kernel does not stop to log what it writes"]
    assert [two.vhost.lent(pair) for pair in range(2)] == [False, True]
    assert two.kernels[1].logs_nothing


def test_kernel_that_cannot_log_is_named_and_what_to_do(rig: Rig) -> None:
    rig.kernel.offers &= ~(1 << LOG_ALL)
    rig.take()
    with pytest.raises(
        HostError, match=r"^vhost: this kernel does not log what it writes; set vhost = false to migrate$"
    ):
        rig.memory.start_log()
    assert rig.vhost.lent(0)
    assert rig.memory.log is None
