"""How primaries leave for a migration and come back, where the reference has no such case, or does not get it right.

Two whole machines, and the guest's side of its slots by hand; see tests/fakes/failover_journey.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.devices.pci import slot
from kvmpy.errors import CommandError, HostError
from kvmpy.kvm.system import System
from kvmpy.machine import departure, pairing
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.migration import convergence
from kvmpy.migration.messages import Kind
from kvmpy.migration.parameters import OnNoConvergence, OnUnplugTimeout, Primaries
from kvmpy.migration.status import Status
from tests.fakes.failover_host import ADDRESSES, NicGuest
from tests.fakes.failover_journey import FailoverJourney, Place, primary, standby
from tests.fakes.loop import BOUND, open_descriptors, poll
from tests.fakes.vfio import ADDRESS, ERROR

BOTH = {"standby0", "primary0"}
NIC = {"driver": "vfio-pci", "id": "primary0", "host": ADDRESS, "bus": "root1", "failover_pair_id": "standby0"}
PAIR = standby() + primary()
ENDLESS: dict[str, Any] = {"downtime_limit": 0, "x_on_no_convergence": OnNoConvergence.CONTINUE}
COUNTED_IN: range = range(4 << 20, 12 << 20)
"""Where the guest counts in its memory."""

Make = Callable[..., FailoverJourney]


@pytest.fixture
def make(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A journey of machines with these tables; a pair, if none are given."""
    monkeypatch.setattr(slot, "PRESS_INTERVAL", 0.3)  # else who waits for an answer to a press waits five seconds
    monkeypatch.setattr(convergence, "TRIES", 1000)  # ENDLESS is, also where a guest gets no processor for three rounds
    with ExitStack() as stack:
        yield lambda devices=PAIR: FailoverJourney(tmp_path, stack, monkeypatch, devices)


@pytest.fixture
def journey(make: Make) -> FailoverJourney:
    return make()


def waiting(journey: FailoverJourney, **parameters: Any) -> tuple[Place, Place]:
    """Source and destination of a migration that waits for the guest, which has not heard of it yet."""
    source, there = journey.begin(**parameters), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    return source, there


def goes(source: Place, there: Place) -> None:
    """The guest lets its primary go, runs there, and has one there."""
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    arrives(there)


def arrives(there: Place) -> None:
    there.wait(Status.COMPLETED)
    there.boot()
    there.ready()
    assert there.visible() == BOTH


def is_whole(journey: FailoverJourney, source: Place, *, was_reset: bool = False) -> None:
    """The guest runs here with its pair, and can go elsewhere."""
    source.ready()
    assert source.machine.state is RunState.RUNNING
    assert source.visible() == BOTH
    assert source.told("DEVICE_DELETED") == []
    source.ask("migrate-set-parameters", **{"x-unplug-timeout": 30_000, "downtime-limit": 10_000})
    there = journey.wait_at()
    source.ask("migrate", uri=there.uri)
    goes(source, there)
    if not was_reset:
        journey.check()


# The source


def test_r28_events_and_their_order(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    goes(source, there)

    def told(*events: str) -> list[tuple[str, str]]:
        found = source.told("MIGRATION", *events)
        return found[found.index(("MIGRATION", "setup")) :]

    poll(lambda: ("FAILOVER_PATH_CHANGED", "standby0") in told("FAILOVER_PATH_CHANGED"))  # when the network has it
    assert told("UNPLUG_PRIMARY", "FAILOVER_PRIMARY_RELEASED", "STOP", "RESUME") == [
        ("MIGRATION", "setup"),
        ("UNPLUG_PRIMARY", "primary0"),
        ("MIGRATION", "wait-unplug"),
        ("FAILOVER_PRIMARY_RELEASED", "primary0"),
        ("MIGRATION", "active"),
        ("MIGRATION", "device"),
        ("STOP", ""),
        ("MIGRATION", "completed"),
    ]
    journey.check()


def test_r29_no_page_is_sent_before_the_primary_is_released(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    source.stays("wait-unplug")
    ram = source.ask("query-migrate")["ram"]
    assert (ram["transferred"], ram["dirty-sync-count"], ram["normal"], ram["duplicate"]) == (0, 0, 0, 0)
    assert not any(there.machine.board.memory.read(COUNTED_IN.start, len(COUNTED_IN)))
    assert source.machine.board.memory.log is None, "nor is anything looked for that could be sent"
    goes(source, there)
    assert any(there.machine.board.memory.read(COUNTED_IN.start, len(COUNTED_IN)))


def test_r29_r48_a_file_has_no_page_before_and_the_guest_goes_on_from_it(
    journey: FailoverJourney, tmp_path: Path
) -> None:
    source, saved = journey.begin(), tmp_path / "saved"
    source.ask("migrate", uri=f"file:{saved}")
    source.until(Status.WAIT_UNPLUG)
    (part,) = tmp_path.glob("saved*")
    size = part.stat().st_size
    source.stays("wait-unplug")
    assert part.stat().st_size == size < 1 << 16
    source.guests[0].serve()
    source.wait(Status.COMPLETED)
    there = journey.wait_at(uri=f"file:{saved}")
    arrives(there)
    assert there.told("FAILOVER_NEGOTIATED") == [("FAILOVER_NEGOTIATED", "standby0")]
    journey.check()


def test_r30_whoever_waits_for_a_release_is_woken_by_it(
    journey: FailoverJourney, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[list[str]] = []
    staying = departure.Departure.staying

    def look(self: departure.Departure) -> list[str]:
        looked.append(staying(self))
        return looked[-1]

    monkeypatch.setattr(departure.Departure, "staying", look)
    source, there = waiting(journey)
    poll(lambda: len(looked) == 2)  # at first, and when the destination says that it is prepared
    source.stays("wait-unplug")
    assert looked == [["primary0"]] * 2, "nobody polls"
    goes(source, there)
    assert looked[-1] == []
    assert len(looked) < 10


def test_r36_who_has_only_one_channel_waits_as_long_as_the_guest_takes(
    journey: FailoverJourney, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    source = journey.begin()
    there = journey.wait_at(uri=f"exec:cat {tmp_path / 'fifo'}", x_timeout=0.5)
    source.ask("migrate", uri=f"exec:cat > {tmp_path / 'fifo'}")
    source.until(Status.WAIT_UNPLUG)
    end = time.monotonic() + 1.0
    poll(lambda: source.status != "wait-unplug" or time.monotonic() > end, interval=0.02)
    source.stays("wait-unplug")
    goes(source, there)


@pytest.mark.parametrize("bound", ["before the press", "after it"])
def test_r33_a_guest_that_is_busy_at_the_slot_is_asked_when_it_is_done(
    journey: FailoverJourney, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(slot, "PRESS_INTERVAL", 0.2)
    source, there = journey.begin(), journey.wait_at()
    guest = source.guests[0]
    if bound == "before the press":
        guest.blink(on=True)
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    if bound == "after it":
        source.begins()
    source.stays("wait-unplug")
    assert not guest.answer(), "not while it blinks"
    guest.blink(on=False)
    goes(source, there)
    refused = source.told("DEVICE_UNPLUG_GUEST_ERROR")
    assert refused == ([("DEVICE_UNPLUG_GUEST_ERROR", "primary0")] if bound == "after it" else [])


def test_r35_a_destination_that_is_not_there(journey: FailoverJourney, tmp_path: Path) -> None:
    source = journey.begin()
    source.ask("migrate", uri=f"unix:{tmp_path / 'nobody'}")
    source.wait(Status.FAILED)
    assert "ENOENT" in str(source.stop.error)
    assert source.told("UNPLUG_PRIMARY") == []
    assert not source.guests[0].answer()
    is_whole(journey, source)


def test_r36_a_guest_that_does_not_let_it_go_keeps_it(journey: FailoverJourney) -> None:
    source, _ = waiting(journey, x_unplug_timeout=200)
    source.wait(Status.FAILED)
    error = str(source.stop.error)
    assert error.startswith("primary0: the guest has not let it go within 200 ms")
    assert error.endswith(
        "primary0 is still in its slot: the guest has not answered; should it let it go yet, it is plugged in again"
    )
    assert source.statuses() == ["setup", "wait-unplug", "failed"]
    is_whole(journey, source)


def test_r36_or_loses_it_by_surprise(journey: FailoverJourney) -> None:
    source, there = waiting(journey, x_unplug_timeout=200, x_on_unplug_timeout=OnUnplugTimeout.SURPRISE)
    source.wait(Status.COMPLETED)
    assert source.statuses() == ["setup", "wait-unplug", "active", "device", "completed"]
    assert source.told("FAILOVER_PRIMARY_RELEASED") == [("FAILOVER_PRIMARY_RELEASED", "primary0")]
    assert source.told("DEVICE_DELETED") == []
    there.wait(Status.COMPLETED)
    there.until("RESUME")


def test_r36_a_guest_that_is_paused_is_not_asked(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    source.ask("stop")
    source.ask("migrate", uri=there.uri)
    source.wait(Status.FAILED)
    assert "primary0: a guest that is stopped does not let it go; cont first" in str(source.stop.error)
    assert source.told("UNPLUG_PRIMARY") == []
    assert source.machine.state is RunState.PAUSED
    source.ask("cont")
    is_whole(journey, source)


# Cancelled, or failed


def test_r38_one_that_is_asked_no_more_in_time_stays_with_the_guest(journey: FailoverJourney) -> None:
    source, _ = waiting(journey)
    source.begins()
    source.ask("migrate_cancel")
    source.stays("cancelling")
    source.begins()
    on = time.monotonic()
    source.wait(Status.CANCELLED)
    assert time.monotonic() - on >= departure.STEADY
    assert source.told("FAILOVER_PRIMARY_RELEASED") == []
    assert source.told("FAILOVER_PATH_CHANGED") == [("FAILOVER_PATH_CHANGED", "standby0")], "as it began to use it"
    assert source.host.kernel.nics[ADDRESS].resets == ["function"], "and nobody has reset it since the start"
    assert "primary0 has stayed with the guest" in str(source.stop.error)
    is_whole(journey, source)


def test_r38_an_indicator_that_is_on_is_no_proof(journey: FailoverJourney) -> None:
    source, _ = waiting(journey)
    source.begins()
    source.ask("migrate_cancel")
    source.begins()
    source.guests[0].let_go()  # it had begun before it heard of the second press
    source.wait(Status.CANCELLED)
    assert source.told("FAILOVER_PRIMARY_RELEASED") == [("FAILOVER_PRIMARY_RELEASED", "primary0")]
    assert "primary0 is plugged in again" in str(source.stop.error)
    is_whole(journey, source)


def test_r38_a_press_that_comes_too_late_is_not_made(journey: FailoverJourney, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "CANCEL_WITHIN", 0)
    source, _ = waiting(journey)
    source.begins()
    source.ask("migrate_cancel")
    source.stays("cancelling")
    assert not source.guests[0].answer()
    source.guests[0].let_go()
    source.wait(Status.CANCELLED)
    is_whole(journey, source)


def test_r38_what_is_let_go_soon_after_a_cancel_comes_back(journey: FailoverJourney) -> None:
    source, _ = waiting(journey)
    source.begins()
    source.ask("migrate_cancel")
    source.begins()
    source.wait(Status.CANCELLED)
    source.guests[0].let_go()
    source.until("FAILOVER_PRIMARY_RELEASED")
    is_whole(journey, source)


def test_r38_what_is_let_go_long_after_is_deleted(journey: FailoverJourney, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "LATE", 0)
    source, _ = waiting(journey)
    source.begins()
    source.ask("migrate_cancel")
    source.begins()
    source.wait(Status.CANCELLED)
    source.guests[0].let_go()
    source.until("DEVICE_DELETED")
    assert source.host.taken == set()


@pytest.mark.parametrize("answer", [NicGuest.serve, NicGuest.answer], ids=["lets it go", "begins, and goes back"])
def test_r39_a_guest_that_answers_after_all_has_its_primary(
    journey: FailoverJourney, answer: Callable[[NicGuest], object]
) -> None:
    source, _ = waiting(journey, x_unplug_timeout=200)
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    answer(source.guests[0])
    if answer is NicGuest.answer:
        source.begins()
    is_whole(journey, source)


def test_r40_a_destination_that_dies(journey: FailoverJourney) -> None:
    source, there = waiting(journey, **ENDLESS)
    seen: list[str] = []

    def note(event: str, data: dict[str, Any], at_ns: int) -> None:
        if data.get("status") == "failed":
            (pair,) = source.machine.pairs
            seen.append(pair.state.value)

    source.machine.listeners.append(note)
    source.begins()
    source.guests[0].let_go()
    source.until(Status.ACTIVE)
    there.machine.close()
    source.wait(Status.FAILED)
    source.until(Status.FAILED)
    assert seen == ["plugging"]
    plugged = len(source.told("FAILOVER_PRIMARY_PLUGGED"))
    source.ready()
    source.until("FAILOVER_PRIMARY_PLUGGED")
    poll(lambda: len(source.told("FAILOVER_PRIMARY_PLUGGED")) == plugged + 1)
    is_whole(journey, source)


def test_r41_a_source_that_goes_on_by_force_has_its_primary_again(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    goes(source, there)
    assert source.visible() == {"standby0"}
    with pytest.raises(CommandError, match="runs at the destination"):
        source.ask("cont")
    there.machine.close()
    source.ask("cont", force=True)
    source.ready()
    assert source.visible() == BOTH
    assert source.machine.state is RunState.RUNNING


def test_r41_also_where_nobody_knows_what_became_of_it(journey: FailoverJourney) -> None:
    source, there = journey.begin(x_timeout=3.0), journey.wait_at()
    source.ask("migrate", uri=journey.middle(there, {}, cuts=Kind.GO))
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.FAILED)
    assert source.machine.state is RunState.PAUSED
    assert "outcome unknown" in str(source.stop.error)
    assert source.visible() == {"standby0"}
    source.ask("cont", force=True)
    is_whole(journey, source)


def test_r40_a_destination_that_ends_at_the_last_moment_says_so(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    source.ask("migrate", uri=journey.middle(there, {Kind.GO: there.machine.close}))
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.FAILED)
    assert "could not run the guest: the machine has ended" in str(source.stop.error)
    is_whole(journey, source)


def test_r40_a_destination_that_dies_while_the_guest_is_waited_for(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    source.begins()
    there.machine.close()
    source.begins()  # by the second press it goes back
    source.wait(Status.FAILED)
    assert source.told("FAILOVER_PRIMARY_RELEASED") == []
    assert "primary0 has stayed with the guest" in str(source.stop.error)
    is_whole(journey, source)


def test_r40_a_destination_that_cannot_run_the_guest(journey: FailoverJourney, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*, running: bool) -> int:
        raise HostError("not on this host")

    source, there = waiting(journey)
    monkeypatch.setattr(there.machine.handoff, "arrive", fails)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.FAILED)
    assert "could not run the guest: not on this host" in str(source.stop.error)
    assert source.told("STOP", "RESUME") == [("STOP", ""), ("RESUME", "")]
    is_whole(journey, source)


def test_r40_one_that_was_torn_out_comes_back_when_the_guest_is_done_with_it(journey: FailoverJourney) -> None:
    source, there = waiting(journey, x_unplug_timeout=200, x_on_unplug_timeout=OnUnplugTimeout.SURPRISE, **ENDLESS)
    source.until(Status.ACTIVE)
    there.machine.close()
    source.wait(Status.FAILED)
    source.guests[0].serve()
    assert source.pair()["state"] == "plugging"
    source.guests[0].let_go()  # as pciehp does for a card that has gone
    is_whole(journey, source)


def test_r40_one_whose_reset_takes_its_time_comes_back_after_that(journey: FailoverJourney) -> None:
    was_reset = threading.Event()
    source, _ = waiting(journey)
    source.host.kernel.nics[ADDRESS].resetting = lambda: was_reset.wait(BOUND)
    source.begins()
    source.ask("migrate_cancel")
    source.guests[0].let_go()
    source.wait(Status.CANCELLED)
    assert (source.pair()["state"], source.visible()) == ("plugging", {"standby0"})
    again = journey.wait_at()
    source.ask("migrate", uri=again.uri)  # before it is there: it is not waited for
    source.wait(Status.COMPLETED)
    assert source.statuses()[-4:] == ["setup", "active", "device", "completed"]
    was_reset.set()
    arrives(again)
    assert source.visible() == {"standby0"}


def test_r37_of_two_one_that_was_asked_and_one_that_has_gone_are_both_back(make: Make) -> None:
    journey = make(PAIR + standby(1) + primary(1))
    source, there = journey.begin(), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.begins(0)
    source.begins(1)
    source.guests[1].let_go()
    source.until("FAILOVER_PRIMARY_RELEASED")
    source.ask("migrate_cancel")
    source.stays("cancelling")
    assert source.visible() == {"standby0", "primary0", "standby1", "primary1"}, "one comes back at once"
    source.begins(0)
    source.wait(Status.CANCELLED)
    source.ready(1)
    assert [pair["state"] for pair in source.ask("query-failover")] == ["plugged", "plugged"]
    assert source.told("FAILOVER_PRIMARY_RELEASED") == [("FAILOVER_PRIMARY_RELEASED", "primary1")]
    assert "primary0 has stayed with the guest; primary1 is plugged in again" in str(source.stop.error)


def test_r39_a_guest_that_has_not_answered_yet_can_be_asked_again(journey: FailoverJourney) -> None:
    source, _ = waiting(journey, x_unplug_timeout=200)
    source.wait(Status.FAILED)
    source.ask("migrate-set-parameters", **{"x-unplug-timeout": 30_000})
    there = journey.wait_at()
    source.ask("migrate", uri=there.uri)
    poll(lambda: len(source.told("UNPLUG_PRIMARY")) == 2)
    goes(source, there)
    assert source.told("DEVICE_DELETED") == []


@pytest.mark.parametrize("status", [Status.WAIT_UNPLUG, Status.CANCELLING])
def test_a_guest_that_powers_off_ends_the_wait(journey: FailoverJourney, status: Status) -> None:
    source, there = waiting(journey)
    if status is Status.CANCELLING:
        source.ask("migrate_cancel")
        source.until(status)
    source.machine.board.pio.write(0x604, 2, 0x3400)
    source.wait(Status.CANCELLED if status is Status.CANCELLING else Status.FAILED)
    assert source.machine.wait() is Outcome.POWER_OFF
    assert there.machine.wait() is Outcome.HOST_ERROR


def test_nothing_is_left_open_by_one_that_was_cancelled(journey: FailoverJourney) -> None:
    source = journey.begin()

    def cancels() -> None:
        there = journey.wait_at()
        source.ask("migrate", uri=there.uri)
        source.begins()
        source.ask("migrate_cancel")
        source.guests[0].let_go()
        source.wait(Status.CANCELLED)
        source.ready()
        there.close()

    cancels()
    before = open_descriptors()
    cancels()
    assert len(open_descriptors()) == len(before)


# The destination


def breaks(place: Place) -> None:
    """Its NIC says that it has failed."""
    place.host.kernel.nics[ADDRESS].signal(ERROR)
    device: Any = place.machine.board.inventory.plugged["primary0"].function
    poll(lambda: device.broken)


@pytest.mark.parametrize("what", ["none", "broken", "not to be had"])
def test_r43_a_destination_without_a_primary_that_works_is_no_destination(journey: FailoverJourney, what: str) -> None:
    source = journey.begin()
    there = journey.wait_at(devices=standby() + ROOM if what == "none" else None, lacking=what == "not to be had")
    if what == "broken":
        breaks(there)
    (problem,) = source.ask("x-migrate-check", uri=there.uri)["problems"]
    assert problem.startswith("device primary0: ")
    source.ask("migrate", uri=there.uri)
    source.wait(Status.FAILED)
    assert problem in str(source.stop.error)
    assert source.told("UNPLUG_PRIMARY") == []
    assert not source.guests[0].answer()
    assert source.pair()["path"] == "primary"


@pytest.mark.parametrize("what", ["none", "broken", "not to be had"])
def test_r43_unless_that_will_do(journey: FailoverJourney, what: str) -> None:
    source = journey.begin(x_primaries=Primaries.BEST_EFFORT)
    there = journey.wait_at(devices=standby() + ROOM if what == "none" else None, lacking=what == "not to be had")
    if what == "broken":
        breaks(there)
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    (warning,) = source.ask("query-migrate")["warnings"]
    assert warning.startswith("device primary0: ")
    there.wait(Status.COMPLETED)
    there.stop.wait_for_count()
    if what == "broken":
        there.until("FAILOVER_PRIMARY_FAILED")
    assert there.visible() == {"standby0"}
    journey.check()


ROOM = '[[root_port]]\nid = "root1"\npower_controller = false\n'
"""The port of a primary that is not there."""


def test_r43_the_guest_is_asked_once_the_destination_has_checked_its_primary(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    told: list[list[tuple[str, str]]] = []

    def accepted() -> None:
        assert there.host.taken == {ADDRESS}
        told.append(source.told("UNPLUG_PRIMARY"))

    source.ask("migrate", uri=journey.middle(there, {Kind.ACCEPT: accepted}))
    goes(source, there)
    assert told == [[]]


def test_r42_a_guest_that_had_none_gets_one_when_it_runs(journey: FailoverJourney) -> None:
    source = journey.begin(ack=False)
    source.ack()
    source.ask("device_del", id="primary0", force=True)
    source.until("DEVICE_DELETED")
    source.ask("stop")
    there = journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.wait(Status.COMPLETED)
    there.wait(Status.COMPLETED)
    assert there.machine.state is RunState.PAUSED
    assert there.told("FAILOVER_NEGOTIATED") == [("FAILOVER_NEGOTIATED", "standby0")]
    assert there.visible() == {"standby0"}
    there.ask("cont")
    arrives(there)
    journey.check()


# What may come in between


def test_r50_a_source_that_is_to_free_its_primaries(make: Make) -> None:
    journey = make(standby() + primary() + standby(1) + primary(1))
    source, there = journey.begin(ack=False, x_release_primaries=True), journey.wait_at()
    source.ack()
    source.ready()  # and the driver of the other standby knows nothing of pairs
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    poll(lambda: len(source.told("DEVICE_DELETED")) == 2)
    told = source.told("MIGRATION", "DEVICE_DELETED")
    deleted = {("DEVICE_DELETED", "primary0"), ("DEVICE_DELETED", "primary1")}
    assert told.index(("MIGRATION", "completed")) < min(map(told.index, deleted))
    assert source.host.taken == set()
    assert there.host.taken == set(ADDRESSES)
    there.wait(Status.COMPLETED)
    there.machine.close()
    source.ask("cont", force=True)
    assert source.visible() == {"standby0", "standby1"}
    source.stop.wait_for_count()


def test_r53_a_driver_that_comes_meanwhile_finds_no_primary_until_it_is_over(journey: FailoverJourney) -> None:
    source, there = journey.begin(ack=False, **ENDLESS), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.until(Status.ACTIVE)
    source.ack()
    source.until("FAILOVER_NEGOTIATED")
    source.stays("active")
    assert source.visible() == {"standby0"}
    source.ask("migrate-set-parameters", **{"downtime-limit": 10_000})
    source.wait(Status.COMPLETED)
    assert source.visible() == {"standby0"}
    arrives(there)


def test_r53_or_has_it_here_when_it_has_come_to_nothing(journey: FailoverJourney) -> None:
    source, there = journey.begin(ack=False, **ENDLESS), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.until(Status.ACTIVE)
    source.ack()
    source.until("FAILOVER_NEGOTIATED")
    assert source.visible() == {"standby0"}
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    is_whole(journey, source)


def test_r53_none_is_added_meanwhile(make: Make) -> None:
    journey = make()
    source, _ = waiting(journey)
    with pytest.raises(CommandError, match="is being migrated"):
        source.ask("device_add", **NIC | {"id": "primary9"})
    source.ask("migrate_cancel")
    source.begins()
    source.begins()
    source.wait(Status.CANCELLED)


def test_r53_a_driver_that_comes_again_while_it_is_asked_changes_nothing(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    source.ack()
    source.stays("wait-unplug")
    assert source.pair()["state"] == "unplug-requested"
    goes(source, there)


def test_r34_a_driver_that_has_left_gets_it_there_nevertheless(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    net: Any = source.machine.board.by_id["standby0"]
    with net.lock:
        net.write_status(0)
    poll(lambda: not source.pair()["negotiated"])
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    source.stays("wait-unplug")
    goes(source, there)
    assert there.told("FAILOVER_NEGOTIATED") == []


def resets(place: Place) -> None:
    """The guest resets its machine, and comes up again as far as binding pciehp."""
    place.machine.board.pio.write(0xCF9, 1, 0x06)
    place.until("RESET")
    place.boot()


def test_r53_a_reset_while_it_is_asked_is_a_release(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    source.begins()
    resets(source)
    source.wait(Status.COMPLETED)
    assert source.told("FAILOVER_PRIMARY_RELEASED") == [("FAILOVER_PRIMARY_RELEASED", "primary0")]
    there.wait(Status.COMPLETED)
    assert there.visible() == {"standby0"}, "nobody asks for it yet"
    there.boot()
    there.ack()
    there.ready()
    assert there.visible() == BOTH


@pytest.mark.parametrize("heard", [True, False])
def test_r53_r12_a_reset_while_it_is_taken_back_hides_it(journey: FailoverJourney, heard: bool) -> None:
    source, _ = waiting(journey)
    if heard:
        source.begins()
    source.ask("migrate_cancel")
    source.stays("cancelling")
    resets(source)
    source.wait(Status.CANCELLED)
    assert source.visible() == {"standby0"}
    assert source.pair()["state"] == "hidden"
    source.ack()
    is_whole(journey, source, was_reset=True)


def test_device_del_of_one_that_is_waited_for_gives_it_up(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    source.ask("device_del", id="primary0")
    source.stays("wait-unplug")
    goes(source, there)
    source.until("DEVICE_DELETED")
    assert source.host.taken == set()
    assert source.visible() == {"standby0"}


def test_device_del_by_force_ends_the_wait(journey: FailoverJourney) -> None:
    source, there = waiting(journey)
    source.ask("device_del", id="primary0", force=True)
    source.wait(Status.COMPLETED)
    source.until("DEVICE_DELETED")
    there.wait(Status.COMPLETED)


def test_device_del_outlives_a_cancel(journey: FailoverJourney) -> None:
    source, _ = waiting(journey)
    source.ask("device_del", id="primary0")
    source.begins()
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    assert not source.guests[0].answer(), "it is asked for still"
    source.guests[0].let_go()
    source.until("DEVICE_DELETED")
    assert source.host.taken == set()
    source.ask("device_add", **NIC)
    source.ready()
    assert source.visible() == BOTH
