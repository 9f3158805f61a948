"""A host that gives no more threads is said so, and nobody is left half begun."""

from __future__ import annotations

import threading

import pytest

from kvmpy.errors import HostError
from kvmpy.host.threads import begin
from kvmpy.machine.throttle import Throttle
from kvmpy.migration.keepalive import keepalive
from tests.fakes.loop import BOUND
from tests.fakes.migration import main_pair


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_thread_does_its_work() -> None:
    done = threading.Event()
    begin("work", done.set).join(BOUND)
    assert done.is_set()


@pytest.mark.usefixtures("no_thread")
def test_a_thread_that_is_refused_is_the_hosts_fault_and_says_what_to_do() -> None:
    with pytest.raises(HostError, match="EAGAIN: no thread for work; raise the limit of processes"):
        begin("work", lambda: None)


@pytest.mark.usefixtures("no_thread")
def test_a_throttle_without_a_thread_does_not_throttle() -> None:
    throttle = Throttle(())
    with pytest.raises(HostError, match="no thread for throttle"):
        throttle.set(20)
    assert throttle.percentage == 0
    throttle.stop()


def test_a_migration_that_cannot_keep_the_other_side_waiting_fails_for_that_reason(
    request: pytest.FixtureRequest,
) -> None:
    with main_pair() as (here, _):
        request.getfixturevalue("no_thread")
        with pytest.raises(HostError, match="no thread for keepalive"), keepalive(here, 1.0):
            pass
