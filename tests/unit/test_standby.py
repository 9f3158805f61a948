"""What is around a failover standby is told of each path: in order, the last one always, and nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from kvmpy.errors import HostError
from kvmpy.machine import errands as module
from kvmpy.machine.errands import Errands
from kvmpy.machine.standby import MOST_HOOKS, Path, StandbyNetwork
from tests.fakes.loop import BOUND, Inbox, poll
from tests.fakes.migration import Thread


class Slow:
    """A port and a program in one; the program waits for ``go``."""

    ifname, mac = "tap0", "52:54:00:6f:55:cc"

    def __init__(self) -> None:
        self.steered: Inbox[str] = Inbox()
        self.ran: Inbox[str] = Inbox()
        self.go = threading.Event()
        self.fails = False

    def steer(self, *, here: bool) -> list[str]:
        self.steered.put("here" if here else "not here")
        return []

    def leave(self) -> list[str]:
        self.steered.put("nowhere")
        return []

    def close(self) -> None:
        self.leave()

    def run(self, standby: str, path: str, facts: Mapping[str, str]) -> None:
        self.ran.put(path)
        assert self.go.wait(BOUND)
        if self.fails:
            raise HostError("failover_hook: exit code 1")


@contextmanager
def blocked(errands: Errands) -> Iterator[None]:
    """Its thread is busy inside."""
    begun, go = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(BOUND)

    errands.add(wait)
    assert begun.wait(BOUND)
    yield
    go.set()


def test_calls_are_made_in_order_and_the_last_always() -> None:
    made: list[int] = []
    errands = Errands("steer-test", 3)
    with blocked(errands):
        for number in range(10):
            errands.add(lambda number=number: made.append(number))  # type: ignore[misc]
    errands.close()
    assert (made, errands.left_out) == ([0, 1, 9], 7)
    errands.add(lambda: made.append(10))
    assert made == [0, 1, 9], "nothing after the end"


def test_a_call_that_fails_is_logged_and_the_next_one_made(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    errands = Errands("steer-test", 3)
    errands.add(lambda: 1 // 0)
    errands.add(done.set)
    assert done.wait(BOUND)
    errands.close()
    assert "ZeroDivisionError" in caplog.text


def test_a_call_that_never_ends_does_not_keep_the_end_waiting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_LIMIT", 0.01)
    errands = Errands("steer-test", 3)
    with blocked(errands):
        errands.close()


def test_without_a_thread_the_next_call_brings_the_last_along(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[int] = []
    errands = Errands("steer-test", 3)

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        errands.add(lambda: made.append(1))
    assert "no thread for it" in caplog.text
    errands.add(lambda: made.append(2))
    errands.close()
    assert made == [1, 2]


def test_the_network_does_not_wait_for_a_program_that_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    network = StandbyNetwork("net1", slow, lambda: (0, 0), slow)
    paths = [Path.PRIMARY, Path.STANDBY]
    for number in range(MOST_HOOKS + 10):
        network.tell(paths[number % 2], {})
        slow.steered.wait(number + 1)
    assert slow.steered.items == ["not here", "here"] * (MOST_HOOKS // 2 + 5)
    slow.ran.wait()
    slow.go.set()
    poll(lambda: network._runs._working is None)
    network.close()
    ran = slow.ran.items
    assert ran[-2:] == ["standby", "none"], "the last, and the end"
    assert MOST_HOOKS <= len(ran) <= MOST_HOOKS + 2
    (message,) = caplog.messages
    assert "is not told of each" in message


def test_the_end_waits_for_the_program_once_whatever_the_guest_had_it_told_before() -> None:
    slow = Slow()
    network = StandbyNetwork("net1", slow, lambda: (0, 0), slow)
    for number in range(MOST_HOOKS):
        network.tell([Path.PRIMARY, Path.STANDBY][number % 2], {})
        slow.steered.wait(number + 1)
    slow.ran.wait()
    closing = Thread(network.close)
    poll(lambda: network._runs._closed)
    slow.go.set()
    closing.over()
    assert slow.ran.items == ["primary", "none"]


def test_a_program_that_fails_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    slow.go.set()
    slow.fails = True
    network = StandbyNetwork("net1", slow, lambda: (0, 0), slow)
    network.tell(Path.PRIMARY, {})
    slow.ran.wait(1)
    network.tell(Path.STANDBY, {})
    network.close()
    assert caplog.messages == ["net1: failover_hook: exit code 1"]
    assert network.problem == "failover_hook: exit code 1"


def test_frames_that_cannot_be_counted_are_none() -> None:
    def fail() -> tuple[int, int]:
        raise HostError("tap0: there is no such interface")

    counts: list[Callable[[], tuple[int, int]]] = [fail, lambda: (5, 7)]
    assert [StandbyNetwork("net1", Slow(), count).frames() for count in counts] == [None, (5, 7)]
