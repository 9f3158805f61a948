"""A running reactor under a test's control, and a box that other threads put things into and a test waits on."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from kvmpy.host.reactor import Reactor

T = TypeVar("T")
# Far more than anything here takes, far less than a hang.
BOUND = 20.0


class Inbox(Generic[T]):
    """What was put into it, in order. Any thread."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        with self._changed:
            self.items.append(item)
            self._changed.notify_all()

    def wait(self, count: int = 1) -> list[T]:
        """Wait until ``count`` items are there; returns all."""
        self.wait_until(lambda items: len(items) >= count)
        return list(self.items)

    def wait_until(self, enough: Callable[[list[T]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: enough(self.items), BOUND), f"never enough: {self.items!r:.200}"


def each(*calls: Callable[[], object]) -> Callable[[], None]:
    """One callback that makes all of ``calls``."""

    def make() -> None:
        for call in calls:
            call()

    return make


@contextmanager
def running(name: str = "test") -> Iterator[Reactor]:
    """A reactor in a thread of its own, closed at the end."""
    reactor = Reactor(name)
    reactor.start()
    try:
        yield reactor
    finally:
        reactor.close()


@contextmanager
def switching_often(seconds: float = 0.0002) -> Iterator[None]:
    """Python goes from thread to thread ever so soon: races in a second rather than in a day."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def poll(
    condition: Callable[[], object],
    else_say: Callable[[], str] = lambda: "it never came",
    *,
    bound: float = BOUND,
    interval: float = 0.001,
) -> None:
    """Wait until ``condition`` holds, for what nobody tells of."""
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline, else_say()
        time.sleep(interval)


def settle(reactor: Reactor, rounds: int = 3) -> None:
    """Wait until ``reactor`` has been round its loop: what it could do, it has done."""
    for _ in range(rounds):
        passed = threading.Event()
        reactor.post(passed.set)
        assert passed.wait(BOUND)


def open_descriptors() -> list[str]:
    """What this process has open, for a comparison before and after."""
    gc.collect()  # or what an earlier test left behind may close in between
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the descriptor that lists the directory
            continue
    return sorted(found)


def read_exactly(fd: int, size: int) -> bytes:
    """``size`` bytes from a blocking descriptor; fewer where it ends."""
    data = b""
    while len(data) < size and (piece := os.read(fd, size - len(data))):
        data += piece
    return data
