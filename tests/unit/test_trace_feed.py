"""Traced lines on their way to a client: in order, in batches, and never anybody's wait."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy import trace
from kvmpy.host.reactor import Reactor
from kvmpy.monitor import trace_feed
from kvmpy.monitor.trace_feed import TraceFeed
from kvmpy.trace import Tracepoint
from tests.fakes.loop import Inbox, running

point = Tracepoint("test.feed", "number")


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with running() as reactor:
        yield reactor


class Client:
    """Takes batches, or refuses them while it is ``full``."""

    def __init__(self) -> None:
        self.batches: Inbox[dict[str, Any]] = Inbox()
        self.full = False
        self.refused: Inbox[None] = Inbox()

    def send(self, batch: dict[str, Any]) -> bool:
        if self.full:
            self.refused.put(None)
            return False
        self.batches.put(batch)
        return True


def numbers(client: Client) -> list[int]:
    return [int(line.rpartition("=")[2], 16) for batch in client.batches.items for line in batch["lines"]]


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def feed(reactor: Reactor, client: Client) -> Iterator[TraceFeed]:
    feed = TraceFeed(reactor, client.send)
    yield feed
    feed.close()


def test_lines_arrive_in_order_and_together(feed: TraceFeed, client: Client) -> None:
    assert feed.enable("test.fe*") == ["test.feed"]
    for number in range(1000):
        point(number)
    while len(numbers(client)) < 1000:
        client.batches.wait(len(client.batches.items) + 1)
    assert numbers(client) == list(range(1000))
    assert len(client.batches.items) < 100


def test_a_client_that_does_not_read_loses_lines_and_hears_how_many(
    feed: TraceFeed, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_feed, "MOST_WAITING", 10)
    feed.enable("test.feed")
    client.full = True
    for number in range(25):
        point(number)
    client.refused.wait()
    client.full = False
    (batch,) = client.batches.wait()
    assert (numbers(client), batch["dropped"]) == (list(range(10)), 15)


def test_a_closed_feed_costs_nothing_and_sends_nothing(feed: TraceFeed, client: Client) -> None:
    feed.enable("test.feed")
    feed.close()
    assert not point
    assert "test.feed" in trace.names()
    assert not client.batches.items


def test_a_closed_feed_is_in_no_circle(reactor: Reactor, client: Client) -> None:
    feed = TraceFeed(reactor, client.send)
    feed.enable("test.feed")
    gone = weakref.ref(feed)
    gc.collect()
    gc.disable()  # as a running machine has it
    try:
        feed.close()
        del feed
        assert gone() is None
    finally:
        gc.enable()
