"""The life of a virtio device: negotiation in order, no handler outside it, and a broken ring stops one device."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest

from kvmpy.abi.virtio import Feature, Status, feature_mask
from kvmpy.devices.virtio.device import BUGS_LOGGED, RING_FEATURES, VirtioDevice
from kvmpy.errors import GuestError, HostError
from kvmpy.host.reactor import Reactor
from kvmpy.memory import GuestMemory
from kvmpy.state import load, save
from tests.fakes.loop import BOUND, each, open_descriptors, running, settle
from tests.fakes.virtio_driver import guest_memory, unmap
from tests.fakes.virtio_echo import Echo, EchoState
from tests.fakes.virtio_rig import Guest, ManualLoop

RAM = 1 << 20
LIVE = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = guest_memory(RAM)
    yield memory
    unmap(memory)


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def device(memory: GuestMemory, loop: ManualLoop) -> Echo:
    return Echo("echo", memory, loop)


@pytest.fixture
def guest(device: Echo, memory: GuestMemory) -> Iterator[Guest]:
    guest = Guest(device, memory)
    yield guest
    guest.close()


def echo(guest: Guest, index: int = 0) -> bytes:
    """Send something, and have what came back."""
    ring = guest.queues[index]
    head = ring.offer([b"hello"], [5])
    guest.kick(index)
    assert ring.used() == [(head, 5)]
    return ring.content(head)


def test_it_serves_each_queue_and_interrupts(guest: Guest) -> None:
    guest.start()
    assert (echo(guest, 0), echo(guest, 1)) == (b"hello", b"hello")
    assert guest.transport.take() == [0, 1]


def test_what_was_offered_before_driver_ok_is_served_without_a_kick(guest: Guest, loop: ManualLoop) -> None:
    guest.start()
    guest.device.pause()
    head = guest.queues[0].offer([b"x"], [1])
    guest.device.resume()
    loop.run()
    assert guest.queues[0].used() == [(head, 1)]


def test_only_the_queues_the_driver_enabled_have_doorbells(guest: Guest) -> None:
    guest.start(enable={1})
    assert list(guest.transport.doorbells) == [1]


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (RING_FEATURES, True),
        (feature_mask(Feature.VERSION_1), True),
        (feature_mask(Feature.VERSION_1, 0, 2), True),
        (feature_mask(Feature.VERSION_1, 2), False),
        (feature_mask(Feature.INDIRECT_DESC), False),
        (feature_mask(Feature.VERSION_1, 1), False),
        (feature_mask(Feature.VERSION_1, 63), False),
        (0, False),
    ],
)
def test_features_are_refused_unless_offered_and_modern(device: Echo, features: int, accepted: bool) -> None:
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device.write_features(0, features & 0xFFFF_FFFF)
    device.write_features(1, features >> 32)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    assert bool(device.virtio.status & Status.FEATURES_OK) is accepted


def test_features_are_fixed_once_accepted(guest: Guest) -> None:
    guest.start()
    guest.device.write_features(0, 0)
    assert guest.device.acked(0)


@pytest.mark.parametrize("word", [2, 3, 0xFFFF_FFFF])
def test_feature_words_beyond_the_second_do_not_exist(device: Echo, word: int) -> None:
    device.write_features(word, 1)
    assert device.virtio.driver_features == 0


@pytest.mark.parametrize(
    ("written", "status"),
    [
        (Status.DRIVER_OK, 0),
        (Status.FEATURES_OK | Status.DRIVER, 0),
        (Status.ACKNOWLEDGE | Status.FEATURES_OK, Status.ACKNOWLEDGE),
        (0xFF, Status.ACKNOWLEDGE | Status.DRIVER | Status.FAILED),  # no features yet
        (Status.NEEDS_RESET, 0),
        (Status.FAILED, Status.FAILED),
    ],
)
def test_status_bits_come_in_order(device: Echo, written: int, status: int) -> None:
    device.write_status(written)
    assert device.virtio.status == status


def test_a_driver_that_has_given_up_gets_no_further(device: Echo) -> None:
    device.write_features(1, 1)
    device.write_status(Status.FAILED)
    device.write_status(LIVE)
    assert device.virtio.status == Status.FAILED


def test_status_bits_stay_until_reset(guest: Guest) -> None:
    guest.start()
    guest.device.write_status(Status.ACKNOWLEDGE)
    assert guest.status() == LIVE
    guest.device.write_status(0)
    assert guest.status() == 0


def test_reset_forgets_everything_and_lets_go(guest: Guest, loop: ManualLoop) -> None:
    guest.start()
    guest.device.write_status(0)
    assert save(guest.device.state) == save(Echo("other", guest.memory, loop).state)
    assert not guest.transport.doorbells
    assert not loop.watched


def test_it_works_again_after_each_of_many_resets(guest: Guest) -> None:
    for _ in range(10):
        guest.start()
        assert echo(guest) == b"hello"


def test_paused_it_touches_nothing_and_loses_nothing(guest: Guest, loop: ManualLoop) -> None:
    guest.start()
    loop.run()
    guest.device.pause()
    head = guest.queues[0].offer([b"x"], [1])
    guest.kick(0)
    assert guest.queues[0].used() == []
    guest.device.resume()
    loop.run()
    assert guest.queues[0].used() == [(head, 1)]


def test_a_driver_that_goes_live_while_paused_is_served_from_resume_on(guest: Guest) -> None:
    guest.device.pause()
    guest.start()
    assert not guest.device.running
    guest.device.resume()
    assert echo(guest) == b"hello"


def test_serve_and_withdraw_alternate(device: Echo, guest: Guest) -> None:
    guest.start()
    device.pause()
    device.pause()
    device.resume()
    device.resume()
    device.write_status(0)
    assert device.log == ["serve", "withdraw", "serve", "withdraw"]


def test_nothing_begins_while_a_withdraw_is_under_way(device: Echo, guest: Guest) -> None:
    """One that waits for a disk lets go of the lock, and anything may happen meanwhile."""
    guest.start()
    withdraw = device.withdraw

    def slow_withdraw() -> None:
        device.resume()
        device.write_status(LIVE)
        assert not device.running
        withdraw()

    device.withdraw = slow_withdraw  # type: ignore[method-assign]
    device.pause()
    assert device.log == ["serve", "withdraw", "serve"]  # who paused it does not hold: it was resumed
    assert echo(guest) == b"hello"


# Breaking


def break_ring(guest: Guest, index: int = 0) -> None:
    guest.queues[index].put(99)
    guest.queues[index].publish()
    guest.transport.doorbells[index].signal()


def test_a_broken_ring_stops_the_device_and_says_so_once(guest: Guest, loop: ManualLoop) -> None:
    guest.start()
    break_ring(guest, 0)
    break_ring(guest, 1)
    loop.run()
    assert guest.status() == LIVE | Status.NEEDS_RESET
    assert guest.broken == ["echo echo0: descriptor 99 of 8"]
    assert guest.transport.config_interrupts == 1
    assert not loop.watched


def test_a_broken_device_stays_so_until_reset(guest: Guest, loop: ManualLoop) -> None:
    guest.start()
    break_ring(guest)
    loop.run()
    guest.device.write_status(LIVE)
    guest.device.pause()
    guest.device.resume()
    assert not guest.device.running
    guest.start()
    assert guest.device.broken is None
    assert echo(guest) == b"hello"


def test_rings_outside_ram_break_the_device_at_driver_ok(guest: Guest) -> None:
    guest.start(go=False)
    guest.device.queues[1].state.desc = RAM
    guest.go()
    assert guest.status() & Status.NEEDS_RESET
    assert guest.broken == ["echo echo1: guest memory 0x100000+0x80 is not RAM"]
    assert not any(queue.running for queue in guest.device.queues)


def test_a_host_that_has_no_doorbells_breaks_the_device_only(guest: Guest) -> None:
    guest.transport.refuses = HostError("KVM_IOEVENTFD: ENOSPC")
    guest.start()
    assert guest.broken == ["KVM_IOEVENTFD: ENOSPC"]
    assert not guest.device.running


def test_nothing_breaks_a_device_that_is_not_in_use(guest: Guest) -> None:
    guest.device.break_("too late")
    assert (guest.status(), guest.broken) == (0, [])


@pytest.mark.parametrize("error", [GuestError("guest"), HostError("host")])
@pytest.mark.parametrize("where", ["serve", "withdraw", "on_notify"])
def test_an_error_in_any_handler_breaks_the_device(
    guest: Guest, loop: ManualLoop, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(guest.device, where, fail)
        guest.start()
        guest.kick(0)
        loop.run()
        guest.device.pause()
    assert guest.broken == [str(error)]
    guest.device.resume()
    guest.device.write_status(0)
    guest.start()
    assert echo(guest) == b"hello"


def test_a_loop_that_takes_no_more_descriptors_breaks_the_device(
    guest: Guest, loop: ManualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "watch", full)
        guest.start()
    assert guest.broken == ["echo: ENOSPC: No space left on device"]
    assert not guest.device.running
    guest.device.write_status(0)
    guest.start()
    assert echo(guest) == b"hello"


@pytest.mark.parametrize("where", ["serve", "withdraw", "on_notify"])
def test_a_bug_of_ours_breaks_the_device_and_is_not_said_without_end(
    guest: Guest, loop: ManualLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    monkeypatch.setattr(guest.device, where, lambda *_: 1 // 0)
    for _ in range(2 * BUGS_LOGGED):
        guest.start()
        guest.kick(0)
        loop.run()
        guest.device.pause()
        guest.device.resume()
    assert len(guest.broken) == 2 * BUGS_LOGGED
    assert set(guest.broken) == {"echo: ZeroDivisionError('integer division or modulo by zero')"}
    assert len(caplog.records) == BUGS_LOGGED


def test_a_host_out_of_descriptors_makes_no_device_and_loses_none(
    memory: GuestMemory, loop: ManualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, before, make = iter(range(3)), open_descriptors(), os.eventfd

    def make_some(*arguments: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.EMFILE, "Too many open files")
        return make(*arguments)

    monkeypatch.setattr(os, "eventfd", make_some)
    with pytest.raises(HostError, match="eventfd: EMFILE: none can be made; raise the limit of open files"):
        Echo("echo", memory, loop, queues=8)
    assert open_descriptors() == before


# Configuration


def test_configuration_reads_as_zero_behind_its_end(device: Echo) -> None:
    assert device.config_read(4, 4) == int.from_bytes(b"echo", "little")
    assert device.config_read(6, 8) == int.from_bytes(b"ho", "little")
    assert device.config_read(4000, 4) == 0


def test_a_change_of_configuration_has_a_new_generation_and_interrupts(guest: Guest) -> None:
    guest.device.config_changed()
    assert guest.transport.config_interrupts == 0
    guest.start()
    for _ in range(256):
        guest.device.config_changed()
    assert guest.transport.config_interrupts == 256
    assert guest.device.virtio.config_generation == 0


# Moving


def moved(device: Echo, memory: GuestMemory, loop: ManualLoop, **changes: object) -> Echo:
    """The same device on another host (which has the same memory)."""
    device.pause()
    section = save(device.state)
    section["state"]["virtio"].update(changes)
    there = Echo("echo", memory, loop)
    there.state = load(EchoState, section)
    there.post_load()
    assert not there.running
    return there


def test_it_goes_on_elsewhere_and_interrupts_once_in_case_that_was_lost(
    guest: Guest, device: Echo, memory: GuestMemory, loop: ManualLoop
) -> None:
    guest.start()
    echo(guest)
    there = moved(device, memory, loop)
    after = Guest(there, memory)
    after.queues = guest.queues
    assert after.transport.take() == [0, 1]
    assert after.transport.config_interrupts == 1
    assert echo(after) == b"hello"
    there.pause()
    there.resume()
    assert after.transport.take() == [0]
    after.close()


@pytest.mark.parametrize(
    "changes", [{"queues": []}, {"driver_features": 1 << 63 | 1 << 32}, {"status": 4, "driver_features": 2**64 - 1}]
)
def test_a_state_that_cannot_be_breaks_the_device_and_not_the_process(
    guest: Guest, device: Echo, memory: GuestMemory, loop: ManualLoop, changes: dict[str, object]
) -> None:
    guest.start()
    there = moved(device, memory, loop, **changes)
    after = Guest(there, memory)
    loop.run()
    assert load(EchoState, save(there.state)) == there.state
    after.start()
    assert echo(after) == b"hello"
    after.close()


def test_queues_of_another_machine_break_the_device(guest: Guest, memory: GuestMemory, loop: ManualLoop) -> None:
    guest.start()
    guest.device.pause()
    other = Echo("echo", memory, loop, queues=3)
    other.state = load(EchoState, save(guest.device.state))
    other.post_load()
    assert other.virtio.status & Status.NEEDS_RESET
    assert other.broken == "echo: a state of 2 queues, and the device has 3"
    other.close()


def test_what_an_operator_is_shown(guest: Guest) -> None:
    guest.start(features=0, enable={1})
    assert guest.device.info() == {
        "kind": "entropy",
        "status": ["acknowledge", "driver", "driver_ok", "features_ok"],
        "broken": None,
        "features": "0x100000000",
        "queues": [{"name": "echo1", "size": 8}],
    }


# Threads


def test_no_handler_runs_once_reset_has_returned(memory: GuestMemory) -> None:
    with running() as reactor:
        device = Echo("echo", memory, reactor)
        guest = Guest(device, memory)
        late: list[str] = []
        resets = threading.Event()
        notify = device.on_notify

        def on_notify(index: int) -> None:
            if resets.is_set():
                late.append(f"queue {index} after the reset")
            notify(index)

        device.on_notify = on_notify  # type: ignore[method-assign]
        for _ in range(200):
            resets.clear()
            guest.start()
            guest.queues[0].offer([b"x"], [1])
            guest.transport.doorbells[0].signal()
            with device.lock:
                device.write_status(0)
                resets.set()
        settle(reactor)
        assert late == []
        guest.close()


def test_a_handler_under_way_is_waited_for(memory: GuestMemory) -> None:
    with running() as reactor:
        device = Echo("echo", memory, reactor)
        guest = Guest(device, memory)
        inside, go_on, order = threading.Event(), threading.Event(), list[str]()

        def on_notify(index: int) -> None:
            inside.set()
            assert go_on.wait(BOUND)
            order.append("handler")

        device.on_notify = on_notify  # type: ignore[method-assign]
        guest.start(enable={0})
        assert inside.wait(BOUND)
        pauser = threading.Thread(target=each(device.pause, lambda: order.append("paused")))
        pauser.start()
        go_on.set()
        pauser.join(BOUND)
        assert order == ["handler", "paused"]
        guest.close()


def test_a_kick_dispatched_before_is_left_to_whoever_serves_now(device: Echo, guest: Guest, loop: ManualLoop) -> None:
    guest.start()
    stale, _ = loop.watched[device.queues[0].kick.fd]
    device.unwatch_queue(0)  # as where vhost takes the queue over
    device.queues[0].kick.signal()
    assert stale is not None
    stale()
    assert device.queues[0].kick.take() == 2


def test_the_loop_of_the_machine_is_one() -> None:
    """mypy holds Reactor against the Loop protocol here."""
    memory = guest_memory(RAM)
    reactor = Reactor("io")
    device: VirtioDevice[EchoState] = Echo("echo", memory, reactor)
    device.close()
    reactor.close()
