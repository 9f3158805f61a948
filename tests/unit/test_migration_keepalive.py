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
