"""Saying that we are at work, from a thread of its own: often enough, and without taking anybody's answer."""

from __future__ import annotations

import os
import threading
import time

from kvmpy.migration.keepalive import keepalive, silence
from kvmpy.migration.messages import Keepalive, Ready, Started
from tests.fakes.loop import BOUND
from tests.fakes.migration import main_pair


def test_the_other_side_waits_on_while_we_are_at_work() -> None:
    with main_pair() as (here, there):
        with keepalive(here, 0.05):
            assert isinstance(there.receive_message(Keepalive, timeout=BOUND), Keepalive)
            assert isinstance(there.receive_message(Keepalive, timeout=BOUND), Keepalive)
        here.send_message(Ready())
        assert isinstance(there.receive_message(Ready, timeout=BOUND), Ready)
        assert "keepalive" not in [thread.name for thread in threading.enumerate()]


def test_nothing_is_said_while_we_are_not_at_work() -> None:
    """A guest that stands still is not kept so by a message that nobody needs."""
    busy = threading.Event()
    asked = threading.Semaphore(0)

    def is_busy() -> bool:
        asked.release()
        return busy.is_set()

    with main_pair() as (here, there), keepalive(here, 0.01, is_busy):
        for _ in range(3):
            assert asked.acquire(timeout=BOUND)
        assert not there.channel.received
        here.send_message(Ready())
        assert isinstance(there.receive_message(Ready, timeout=BOUND), Ready)
        busy.set()
        assert isinstance(there.receive_message(Keepalive, timeout=BOUND), Keepalive)


def test_who_has_just_said_something_else_need_not_say_more() -> None:
    asked = threading.Event()

    def is_busy() -> bool:
        asked.set()
        return True

    with main_pair() as (here, _):
        here.said = time.monotonic() + BOUND
        with keepalive(here, 0.01, is_busy):
            assert not asked.wait(0.1)


def test_an_answer_that_was_sent_before_the_other_side_left_is_not_taken_by_it() -> None:
    """A destination that runs the guest says so and hangs up; the source must hear it."""
    with main_pair() as (here, there):
        there.send_message(Started(first_run_ns=7))
        there.close()
        with keepalive(here, 0.01):
            end = time.monotonic() + BOUND
            while "keepalive" in [thread.name for thread in threading.enumerate()]:  # until it has met with the end
                assert time.monotonic() < end
                os.sched_yield()
            answer = here.receive_message(Started, timeout=BOUND)
            assert answer.first_run_ns == 7


def test_a_guest_that_stands_still_is_given_less_time_but_for_what_is_on_its_way() -> None:
    assert silence(10.0) < 1
    assert silence(10.0, 3.0) == silence(10.0) + 3
    assert silence(0.5) == 0.5


def test_a_slow_host_is_waited_for_longer() -> None:
    assert silence(10.0, loading=0.004) == silence(10.0)
    assert 1.5 < silence(10.0, loading=0.1) < 3
    assert silence(10.0, loading=100.0) == 10.0
