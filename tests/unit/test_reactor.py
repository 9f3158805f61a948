"""Reactor: descriptors, timers and posted calls, from its own thread and from others."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvmpy.host.eventfd import EventFd
from kvmpy.host.reactor import Reactor
from tests.fakes.loop import BOUND, Inbox, each, open_descriptors, running, settle


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with running() as reactor:
        yield reactor


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def fill(fd: int) -> None:
    while True:
        os.write(fd, bytes(1 << 16))


Pair = tuple[socket.socket, socket.socket]


def test_posted_calls_run_in_the_loops_thread(reactor: Reactor) -> None:
    seen: Inbox[threading.Thread] = Inbox()
    reactor.post(lambda: seen.put(threading.current_thread()))
    assert seen.wait() == [reactor.thread]


def test_calls_posted_by_many_threads_all_run_and_keep_each_threads_order(reactor: Reactor) -> None:
    seen: Inbox[tuple[int, int]] = Inbox()

    def post(thread: int) -> None:
        for n in range(200):
            reactor.post(partial(seen.put, (thread, n)))

    threads = [threading.Thread(target=post, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen.wait(1600)) == [(thread, n) for thread in range(8) for n in range(200)]
    assert [[n for thread, n in seen.items if thread == number] for number in range(8)] == [list(range(200))] * 8


def test_call_posted_by_a_call_comes_after_those_posted_before() -> None:
    seen: Inbox[str] = Inbox()
    reactor = Reactor("test")
    reactor.post(each(lambda: reactor.post(lambda: seen.put("third")), lambda: seen.put("first")))
    reactor.post(lambda: seen.put("second"))
    reactor.start()
    assert seen.wait(3) == ["first", "second", "third"]
    reactor.close()


def test_callback_that_raises_is_logged_and_the_loop_goes_on(
    reactor: Reactor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        reactor.post(lambda: 1 / 0)
        settle(reactor)
    assert "test thread: a callback failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_readable_descriptor_is_called_back_until_it_is_read(reactor: Reactor, pair: Pair) -> None:
    ours, theirs = pair
    seen: Inbox[bytes] = Inbox()
    reactor.watch(ours.fileno(), readable=lambda: seen.put(ours.recv(1)))
    theirs.send(b"abc")
    assert seen.wait(3) == [b"a", b"b", b"c"]


def test_hang_up_counts_as_readable(reactor: Reactor, pair: Pair) -> None:
    ours, theirs = pair
    seen: Inbox[bytes] = Inbox()

    def read() -> None:
        seen.put(ours.recv(1))
        reactor.unwatch(ours.fileno())

    reactor.watch(ours.fileno(), readable=read)
    theirs.close()
    assert seen.wait() == [b""]


def test_error_counts_as_writable(reactor: Reactor) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        fill(write_fd)
    seen: Inbox[str] = Inbox()
    reactor.watch(write_fd, writable=each(lambda: seen.put("writable"), lambda: reactor.unwatch(write_fd)))
    os.close(read_fd)
    assert seen.wait() == ["writable"]
    os.close(write_fd)


def test_watching_again_replaces_what_was_watched(reactor: Reactor, pair: Pair) -> None:
    ours, theirs = pair
    seen: Inbox[str] = Inbox()
    reactor.watch(ours.fileno(), readable=lambda: seen.put("old"))
    reactor.watch(ours.fileno(), readable=each(lambda: seen.put("new"), lambda: ours.recv(1)))
    theirs.send(b"x")
    settle(reactor)
    assert seen.wait() == ["new"]


def test_unwatching_in_the_readable_callback_spares_the_writable_one(reactor: Reactor, pair: Pair) -> None:
    ours, theirs = pair
    seen: Inbox[str] = Inbox()
    theirs.send(b"x")
    reactor.watch(
        ours.fileno(),
        readable=each(lambda: seen.put("readable"), lambda: reactor.unwatch(ours.fileno())),
        writable=lambda: seen.put("writable"),
    )
    seen.wait()
    settle(reactor)
    assert seen.items == ["readable"]


def test_unwatching_twice_or_what_never_was_is_allowed(reactor: Reactor, pair: Pair) -> None:
    reactor.watch(pair[0].fileno(), readable=lambda: None)
    reactor.unwatch(pair[0].fileno())
    reactor.unwatch(pair[0].fileno())
    reactor.unwatch(1 << 20)


def test_regular_file_cannot_be_watched(reactor: Reactor, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(PermissionError):
        reactor.watch(file.fileno(), readable=lambda: None)


def test_timers_ring_in_the_order_in_which_they_are_due(reactor: Reactor) -> None:
    seen: Inbox[str] = Inbox()
    late, early = reactor.timer(lambda: seen.put("late")), reactor.timer(lambda: seen.put("early"))
    late.arm(0.03)
    early.arm(0.01)
    assert seen.wait(2) == ["early", "late"]


def test_timers_due_at_once_ring_in_the_order_in_which_they_were_armed() -> None:
    reactor = Reactor("test")
    seen: Inbox[int] = Inbox()
    timers = [reactor.timer(partial(seen.put, n)) for n in range(5)]
    for timer in reversed(timers):
        reactor.arm(timer, 0.0)
    reactor.start()
    assert seen.wait(5) == [4, 3, 2, 1, 0]
    reactor.close()


def test_arming_again_replaces_the_earlier_arming(reactor: Reactor) -> None:
    seen: Inbox[str] = Inbox()
    timer, after = reactor.timer(lambda: seen.put("timer")), reactor.timer(lambda: seen.put("after"))
    timer.arm(3600)
    timer.arm(0)
    after.arm(0.02)
    assert seen.wait(2) == ["timer", "after"]


def test_cancelled_timer_does_not_ring_and_can_be_armed_again(reactor: Reactor) -> None:
    seen: Inbox[str] = Inbox()
    timer, after = reactor.timer(lambda: seen.put("timer")), reactor.timer(lambda: seen.put("after"))
    timer.arm(0.01)
    timer.cancel()
    after.arm(0.03)
    assert seen.wait() == ["after"]
    timer.arm(0)
    assert seen.wait(2) == ["after", "timer"]


def test_timer_armed_by_its_own_callback_rings_again(reactor: Reactor) -> None:
    seen: Inbox[int] = Inbox()
    timer = reactor.timer(each(lambda: seen.put(1), lambda: timer.arm(0)))
    timer.arm(0)
    seen.wait(5)
    timer.cancel()


def test_callback_cancels_another_timer_that_is_due_too() -> None:
    reactor = Reactor("test")
    seen: Inbox[str] = Inbox()
    first = reactor.timer(each(lambda: seen.put("first"), lambda: second.cancel()))
    second = reactor.timer(lambda: seen.put("second"))
    reactor.arm(first, 0.0)
    reactor.arm(second, 0.0)
    reactor.start()
    seen.wait()
    settle(reactor)
    assert seen.items == ["first"]
    reactor.close()


def test_arming_from_many_threads_always_rings_in_the_end(reactor: Reactor) -> None:
    seen: Inbox[int] = Inbox()
    timer = reactor.timer(lambda: seen.put(1))

    def arm_often() -> None:
        for _ in range(300):
            timer.arm(0)

    threads = [threading.Thread(target=arm_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(reactor)
    rung = len(seen.wait())
    timer.arm(0)
    assert len(seen.wait(rung + 1)) > rung


def test_timer_that_another_puts_off_rings_once_and_later() -> None:
    reactor = Reactor("test")
    seen: Inbox[str] = Inbox()
    first = reactor.timer(each(lambda: seen.put("first"), lambda: second.arm(0.01)))
    second = reactor.timer(lambda: seen.put("second"))
    reactor.arm(first, 0.0)
    reactor.arm(second, 0.0)
    reactor.start()
    assert seen.wait(2) == ["first", "second"]
    settle(reactor)
    assert seen.items == ["first", "second"]
    reactor.close()


def test_guest_that_rearms_a_far_alarm_for_ever_does_not_grow_us() -> None:
    reactor = Reactor("test")
    timer = reactor.timer(lambda: None)
    for _ in range(1000):
        timer.arm(3600)
    assert len(reactor._armed) == 1
    timer.cancel()
    assert len(reactor._armed) == 0
    reactor.close()


def test_stop_from_a_callback_ends_the_loop() -> None:
    reactor = Reactor("test")
    reactor.post(reactor.stop)
    reactor.start()
    assert reactor.thread is not None
    reactor.thread.join(BOUND)
    assert not reactor.thread.is_alive()
    reactor.close()


def test_stop_waits_for_the_callback_under_way() -> None:
    entered, leave = threading.Event(), threading.Event()
    with running() as reactor:
        reactor.post(each(entered.set, lambda: leave.wait(BOUND)))
        assert entered.wait(BOUND)
        threading.Timer(0.02, leave.set).start()
        reactor.stop()
        assert leave.is_set()


def test_reactor_that_never_ran_can_be_closed_twice() -> None:
    reactor = Reactor("test")
    reactor.close()
    reactor.close()


def test_call_taken_before_the_end_is_run_and_one_after_it_is_refused() -> None:
    seen: Inbox[str] = Inbox()
    reactor = Reactor("test")
    reactor.post(each(lambda: reactor.post(lambda: seen.put("taken")), reactor.stop))
    reactor.start()
    assert reactor.thread is not None
    reactor.thread.join(BOUND)
    assert seen.items == ["taken"]
    with pytest.raises(RuntimeError, match="the test thread has ended"):
        reactor.post(lambda: None)
    reactor.close()


def test_closed_reactor_ignores_what_others_still_ask_of_it(pair: Pair) -> None:
    reactor = Reactor("test")
    reactor.watch(pair[0].fileno(), readable=lambda: None)
    timer = reactor.timer(lambda: None)
    reactor.close()
    timer.arm(1)
    timer.cancel()
    reactor.unwatch(pair[0].fileno())


def test_nothing_stays_open_after_close() -> None:
    before = open_descriptors()
    with running() as reactor:
        settle(reactor)
        assert open_descriptors() != before
    assert open_descriptors() == before


def test_eventfd_counts_signals_and_forgets_them_when_taken() -> None:
    with EventFd() as event:
        event.signal()
        event.signal()
        assert [event.take(), event.take()] == [2, 0]


def test_eventfd_whose_counter_is_full_is_signalled_without_blocking() -> None:
    with EventFd() as event:
        os.eventfd_write(event.fd, 2**64 - 2)
        event.signal()
        assert event.take() == 2**64 - 2


def test_eventfd_is_not_inherited_and_closes_twice() -> None:
    event = EventFd()
    assert not os.get_inheritable(event.fileno())
    event.close()
    event.close()
    assert event.fd == -1
