"""Changes of a machine's run state: in turn, waiting in threads of their own, and cut in on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvmpy.errors import CommandError
from kvmpy.host.reactor import Reactor
from kvmpy.machine.changes import Change, Changes, Steps, Waiting
from tests.fakes.loop import BOUND, Inbox, running, settle


class Rig:
    """Changes, with notes in ``log`` of what they do."""

    def __init__(self, control: Reactor) -> None:
        self.control, self.changes = control, Changes(control)
        self.log: Inbox[str] = Inbox()
        self.go = threading.Event()

    def slow(self, name: str, *, seconds: float | None = None) -> Steps[str]:
        self.log.put(f"{name} begins")
        yield Waiting([lambda: self.go.wait(BOUND)], seconds)
        self.log.put(f"{name} ends")
        return name

    def fast(self, name: str) -> Steps[str]:
        yield from ()
        self.log.put(name)
        return name

    def begin(self, change: Change[str]) -> Change[str]:
        self.control.post(lambda: self.changes.begin(change))
        return change


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running("control") as control:
        rig = Rig(control)
        yield rig
        rig.go.set()


def test_what_waits_for_nothing_is_made_there_and_then(rig: Rig) -> None:
    made = Change(rig.fast("a"))
    rig.changes.begin(made)
    assert made.is_over
    assert made.result() == "a"


def test_one_that_waits_holds_up_those_behind_it_and_nobody_else(rig: Rig) -> None:
    slow, fast = rig.begin(Change(rig.slow("slow"))), rig.begin(Change(rig.fast("fast")))
    settle(rig.control)  # the control thread answers
    assert rig.log.items == ["slow begins"]
    assert not slow.is_over
    rig.go.set()
    assert fast.result() == "fast"
    assert rig.log.items == ["slow begins", "slow ends", "fast"]


def test_a_call_can_be_made_whatever_waits(rig: Rig) -> None:
    rig.begin(Change(rig.slow("slow")))
    between = Change(rig.fast("between"))
    rig.control.post(lambda: rig.changes.make(between))
    assert between.result() == "between"
    rig.go.set()


def test_one_whose_time_is_up_goes_on_and_does_so_once(rig: Rig) -> None:
    assert rig.begin(Change(rig.slow("slow", seconds=0.01))).result() == "slow"
    rig.go.set()
    settle(rig.control, 10)
    assert rig.log.items == ["slow begins", "slow ends"]


def test_the_end_does_not_queue_behind_what_waits(rig: Rig) -> None:
    slow, queued = rig.begin(Change(rig.slow("slow"))), rig.begin(Change(rig.fast("queued")))
    last = Change(rig.fast("last"), last=True)
    rig.control.post(lambda: rig.changes.cut_in(last))
    assert last.result() == "last"
    with pytest.raises(CommandError, match="the machine has been stopped meanwhile"):
        slow.result()
    rig.go.set()
    assert queued.result() == "queued"
    assert rig.log.items == ["slow begins", "last", "queued"]


def test_nothing_cuts_in_on_a_last_one(rig: Rig) -> None:
    last = rig.begin(Change(rig.slow("last"), last=True))
    again = Change(rig.fast("again"), last=True)
    rig.control.post(lambda: rig.changes.cut_in(again))
    settle(rig.control)
    rig.go.set()
    assert (last.result(), again.result()) == ("last", "again")


def test_one_that_fails_is_heard_by_who_waits_and_holds_up_nobody(rig: Rig) -> None:
    def fails() -> Steps[str]:
        yield Waiting([lambda: rig.go.wait(BOUND)])
        raise CommandError("no")

    failing, behind = rig.begin(Change(fails())), rig.begin(Change(rig.fast("behind")))
    rig.go.set()
    with pytest.raises(CommandError, match="no"):
        failing.result()
    assert behind.result() == "behind"


def test_one_that_fails_unheard_is_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Steps[str]:
        yield Waiting([lambda: rig.go.wait(BOUND)])
        raise CommandError("no one hears")

    change = rig.begin(Change(fails()))
    rig.control.post(change.forget)
    rig.go.set()
    with pytest.raises(CommandError):
        change.result()
    assert "no one hears" in caplog.text


def test_a_wait_that_fails_is_logged_and_the_change_goes_on(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def waits() -> Steps[str]:
        yield Waiting([lambda: 1 // 0])
        return "went on"

    assert rig.begin(Change(waits())).result() == "went on"
    assert "ZeroDivisionError" in caplog.text


def test_without_a_thread_the_control_thread_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rig.go.set()
    monkeypatch.setattr(threading.Thread, "start", no_threads)
    assert rig.begin(Change(rig.slow("slow"))).result() == "slow"
