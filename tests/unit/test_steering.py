"""Whose the pair's address is: told to the PF by a thread of its own, the last word counts, and no vCPU runs ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvmpy.errors import HostError
from kvmpy.machine import steering as module
from kvmpy.machine.steering import Steering
from tests.fakes.loop import BOUND, Inbox

MAC = "52:54:00:6f:55:cc"


class Switch:
    """A PF that takes as long as a test wants."""

    def __init__(self) -> None:
        self.asked: Inbox[str | None] = Inbox()
        self.go = threading.Event()
        self.go.set()
        self.refuses: Exception | None = None

    def carry(self, mac: str | None) -> None:
        self.asked.put(mac)
        assert self.go.wait(BOUND)
        if self.refuses is not None:
            raise self.refuses


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def steering(switch: Switch) -> Iterator[Steering]:
    steering = Steering("hostdev0", switch.carry)
    steering.mac = MAC
    yield steering
    switch.go.set()
    steering.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each vCPU that was held back whether it may go on."""
    held: list[bool] = []

    def hold_back(seconds: float) -> Callable[[], object]:
        assert seconds == module.PATIENCE
        number = len(held)
        held.append(False)
        return lambda: held.__setitem__(number, True)

    monkeypatch.setattr(module, "hold_back", hold_back)
    return held


def test_r49_the_vcpu_goes_on_when_the_address_is_there(switch: Switch, steering: Steering, held: list[bool]) -> None:
    changed: Inbox[tuple[bool, bool]] = Inbox()
    steering.on_change = lambda driven, problem: changed.put((driven, held[0]))
    switch.go.clear()
    steering.drive(True)
    switch.asked.wait(1)
    assert held == [False]
    switch.go.set()
    assert changed.wait(1) == [(True, True)]
    steering.drive(False)
    changed.wait(2)
    assert (switch.asked.items, len(held)) == ([MAC, None], 1), "nobody waits for it to be gone"


def test_r49_of_many_changes_the_last_counts(switch: Switch, steering: Steering, held: list[bool]) -> None:
    switch.go.clear()
    steering.drive(True)
    switch.asked.wait(1)
    for driven in (False, True, False, True, False):
        steering.drive(driven)
    switch.go.set()
    assert switch.asked.wait(2) == [MAC, None]
    steering.close()
    assert len(switch.asked.items) == 2
    assert all(held)


def test_r49_a_guest_that_drives_it_already_asks_for_nothing(switch: Switch, steering: Steering) -> None:
    steering.drive(False)
    steering.drive(True)
    steering.drive(True)
    switch.asked.wait(1)
    steering.close()
    assert switch.asked.items == [MAC]


@pytest.mark.parametrize("error", [HostError("EBUSY"), KeyError("a mistake")], ids=["host", "own"])
def test_r49_a_failure_is_told_and_holds_up_no_vcpu(
    switch: Switch, steering: Steering, held: list[bool], error: Exception
) -> None:
    problems: Inbox[object] = Inbox()
    steering.on_change = lambda driven, problem: problems.put(problem)
    switch.refuses = error
    steering.drive(True)
    assert isinstance(problems.wait(1)[0], HostError)
    assert held == [True]


def test_r49_an_address_that_cannot_be_taken_away_is_tried_again_and_told_once(
    switch: Switch, steering: Steering, held: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN", (0.0, 0.0, 0.0))
    told: Inbox[tuple[bool, str | None]] = Inbox()
    steering.on_change = lambda driven, problem: told.put((driven, None if problem is None else str(problem)))
    steering.drive(True)
    told.wait(1)
    busy = [HostError("EBUSY"), HostError("EBUSY")]
    refused = switch.carry

    def carry(mac: str | None) -> None:
        refused(mac)
        if busy:
            raise busy.pop()

    steering._carry = carry
    steering.drive(False)
    assert told.wait(3) == [(True, None), (False, "EBUSY"), (False, None)]
    assert switch.asked.items == [MAC, None, None, None]


def test_r49_a_guest_that_drives_it_again_does_not_wait_for_the_next_try(
    switch: Switch, steering: Steering, held: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN", (1000.0,))
    steering.drive(True)
    switch.asked.wait(1)
    switch.refuses = HostError("EBUSY")
    steering.drive(False)
    switch.asked.wait(2)
    switch.refuses = None
    steering.drive(True)
    assert switch.asked.wait(3) == [MAC, None, MAC]
    switch.refuses = HostError("EBUSY")
    steering.drive(False)
    switch.asked.wait(4)
    steering.close()  # which does not wait for it either


def test_nothing_is_done_after_it_is_closed(switch: Switch, steering: Steering) -> None:
    steering.close()
    steering.drive(True)
    assert switch.asked.items == []


def test_r45_that_the_guest_can_receive_is_told_once_for_each_time_it_drives(
    switch: Switch, steering: Steering, held: list[bool]
) -> None:
    told: Inbox[float] = Inbox()
    changed: Inbox[bool] = Inbox()
    steering.on_receiving = told.put
    steering.on_change = lambda driven, problem: changed.put(driven)
    steering.receives()
    for count in (1, 2):
        steering.drive(True)
        changed.wait(2 * count - 1)
        for _ in range(2):
            steering.receives()
        assert len(told.items) == count
        assert steering.since <= steering.carried <= told.items[-1]
        steering.drive(False)
        changed.wait(2 * count)
        steering.receives()
    assert len(told.items) == 2


def test_r45_a_nic_that_is_all_the_guests_has_its_address_at_once() -> None:
    steering = Steering("hostdev0", None, fixed=MAC)
    steering.drive(True)
    assert 0 < steering.since <= steering.carried
