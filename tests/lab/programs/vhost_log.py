"""What the kernel's vhost-net writes while there is a log, on a real tap. Run by pytest in an emulated host.

The driver model of vhost_traffic is the guest; where it writes itself, memory notes that, so the tests that ask for
vhost's marks compare memory while the driver does nothing.
"""

from __future__ import annotations

import itertools
import random

import pytest

from kvmpy.pagebits import PAGE
from tests.counts import count
from tests.fakes.loop import settle
from tests.fakes.watch import Mirror, Watch
from tests.lab.programs.vhost_traffic import WINDOW, Rig, frame, rig

FRAMES = 16
ROUNDS = count(40, 1000)
fresh = itertools.count()  # frames that no buffer has held before: each changes its page


def used(it: Rig, index: int) -> int:
    """The used index of a ring of the first pair, as the guest sees it."""
    driver = it.pairs[0].drivers[index]
    return driver.load(driver.device + 2)


def receive_and_check(it: Rig, watch: Watch) -> None:
    """Frames come in, and every page that this changes is in the log, the used ring's among them."""
    before = used(it, 0)
    numbers = [next(fresh) for _ in range(FRAMES)]
    watch.begin()
    for number in numbers:
        it.wire.send(frame(number))
    while (used(it, 0) - before) % 65536 < FRAMES:
        settle(it.io)
    changed = watch.check()
    assert it.pairs[0].rx.device // PAGE * PAGE in changed
    assert len(changed) > FRAMES // 4
    assert it.pairs[0].received() == [frame(number) for number in numbers]


def send_and_check(it: Rig, watch: Watch) -> None:
    """Frames go out: of memory, that writes the used ring."""
    pair, before = it.pairs[0], used(it, 1)
    for number in range(FRAMES):
        pair.send(frame(number, tag=1))
    watch.begin()
    pair.queues[1].kick.signal()
    while (used(it, 1) - before) % 65536 < FRAMES:
        settle(it.io)
    assert pair.tx.device // PAGE * PAGE in watch.check()
    pair.tx.used()
    list(it.heard())


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_that_come_in_mark_their_pages(event_idx: bool) -> None:
    with rig(event_idx=event_idx) as it:
        it.take()
        watch = Watch(it.memory)
        receive_and_check(it, watch)
        send_and_check(it, watch)
        assert it.vhost.lent(0)


def test_frames_in_many_small_buffers_mark_all_of_them() -> None:
    with rig(buffer=256) as it:
        it.take()
        watch = Watch(it.memory)
        receive_and_check(it, watch)


def test_pair_that_is_lent_while_there_is_a_log_marks_too_each_time() -> None:
    with rig() as it:
        watch = Watch(it.memory)
        for _ in range(3):
            it.take()
            receive_and_check(it, watch)
            send_and_check(it, watch)
            it.give_back()


def test_log_that_is_over_is_not_written_to_and_the_next_one_is() -> None:
    with rig() as it:
        it.take()
        watch = Watch(it.memory)
        for _ in range(3):
            receive_and_check(it, watch)
            it.memory.stop_log()
            watch.logged()
            it.exchange(FRAMES)
            assert watch.logged() == set()
        assert it.vhost.lent(0)
        assert it.device.broken.items == []


def test_logging_may_begin_and_end_under_traffic() -> None:
    chance = random.Random(5)
    changes = 0

    with rig() as it:

        def change() -> None:
            nonlocal changes
            if chance.random() < 0.7:
                changes += 1
                if it.memory.log is None:
                    it.memory.start_log()
                else:
                    it.memory.stop_log()

        it.take()
        while changes < ROUNDS:
            it.exchange(WINDOW * 2, change)
        assert it.device.broken.items == []


@pytest.mark.parametrize("event_idx", [False, True])
def test_copy_of_the_pages_in_the_log_is_all_of_memory_in_the_end(event_idx: bool) -> None:
    chance = random.Random(6)
    rounds = copied = 0

    with rig(event_idx=event_idx) as it:
        mirror = Mirror(it.memory)

        def follow() -> None:
            nonlocal rounds, copied
            rounds += 1
            copied += mirror.follow()
            if chance.random() < 0.2:
                it.give_back()
                it.serve_here(chance.randint(0, 4))
                it.take()

        it.take()
        while rounds < ROUNDS:
            it.exchange(WINDOW * 2, follow)
        it.give_back()
        mirror.follow()
        assert mirror.differences() == set()
        assert copied > ROUNDS
