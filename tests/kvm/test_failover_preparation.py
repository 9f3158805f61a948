"""The destination prepares its primaries while the guest lets its own go, and whatever may come of that (R43, R54).

Two whole machines, and a guest by hand. What takes its time at the destination is the kernel mapping the guest's
memory, or a reset.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.kvm.system import System
from kvmpy.machine.runstate import RunState
from kvmpy.migration.messages import Kind
from kvmpy.migration.parameters import Primaries
from kvmpy.migration.status import Status
from tests.fakes.failover_host import FailoverHost
from tests.fakes.failover_journey import FailoverJourney, Place, primary, standby
from tests.fakes.loop import poll
from tests.fakes.middle import Middle

BOTH = {"standby0", "primary0"}
PAIR = standby() + primary()
MAP, RESET = "VFIO_IOMMU_MAP_DMA", "VFIO_DEVICE_RESET"
BEST_EFFORT: dict[str, Any] = {"x_primaries": Primaries.BEST_EFFORT}


@pytest.fixture
def make(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FailoverJourney]]:
    with ExitStack() as stack:
        yield lambda devices=PAIR: FailoverJourney(tmp_path, stack, monkeypatch, devices)


@pytest.fixture
def journey(make: Callable[..., FailoverJourney]) -> FailoverJourney:
    return make()


def is_pinned(host: FailoverHost) -> bool:
    return bool(host.kernel.maps)


def prepared(place: Place) -> list[tuple[str, str]]:
    """The primaries that query-migrate says are prepared, each with what is wrong with it."""
    said = place.ask("query-migrate").get("prepared") or ()
    return [(each["device-id"], each["problem"]) for each in said]


def lets_go(place: Place) -> None:
    """The guest lets its primary go, and pages travel."""
    place.begins()
    place.guests[0].let_go()
    place.until(Status.ACTIVE)


def until_all_else_is_done(place: Place) -> None:
    """What is left fits, and the source waits for the destination alone; which stays so."""

    def awaits() -> bool:
        functions = [
            f.f_code.co_name for frame in sys._current_frames().values() for f, _ in traceback.walk_stack(frame)
        ]
        return "await_prepared" in functions

    poll(awaits)
    place.stays("active")


def assert_kept(source: Place) -> None:
    """The guest never lost its primary, and it is whole."""
    assert source.told("FAILOVER_PRIMARY_RELEASED", "STOP") == []
    assert (source.pair()["state"], source.visible()) == ("plugged", BOTH)


def test_r43_a_machine_that_waits_has_checked_its_primary_and_pins_nothing(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    host, nic = there.host, there.host.kernel.nics["0000:5e:00.2"]
    assert (host.taken, is_pinned(host), nic.resets) == ({"0000:5e:00.2"}, False, [])
    assert source.ask("x-migrate-check", uri=there.uri)["problems"] == []
    assert (is_pinned(host), nic.resets) == (False, []), "somebody only asked"
    source.ask("migrate", uri=there.uri)
    source.until("UNPLUG_PRIMARY")
    poll(lambda: prepared(source) == [("primary0", "")])
    assert (is_pinned(host), nic.resets) == (True, ["function"])
    assert source.visible() == BOTH, "it took none of the guest's time"
    source.guests[0].serve()
    source.wait(Status.COMPLETED)
    there.boot()
    there.ready()
    (prepare,) = [each for each in source.ask("query-migrate")["destination"]["phases"] if "prepare" in each["name"]]
    assert prepare["name"] == "prepare primary0"
    journey.check()


@pytest.mark.parametrize("slow", [MAP, RESET])
def test_r54_the_guest_runs_on_its_standby_until_the_destination_has_prepared_its_primary(
    journey: FailoverJourney, slow: str
) -> None:
    source, there = journey.begin(), journey.wait_at()
    held = there.host.hold(slow)
    source.ask("migrate", uri=there.uri)
    lets_go(source)
    assert held.begun.wait(20)
    until_all_else_is_done(source)
    assert source.ask("query-migrate")["preparing"]
    source.stop.wait_for_count()
    assert source.told("STOP") == []
    held.let_go()
    source.wait(Status.COMPLETED)
    phases = [phase["name"] for phase in source.ask("query-migrate")["phases"]]
    assert phases.index("await primaries") < phases.index("stop")
    there.boot()
    there.ready()
    journey.check()


@pytest.mark.parametrize("fails", [MAP, RESET])
def test_r38_r54_a_preparation_that_fails_is_a_second_press_and_the_guest_keeps_its_primary(
    journey: FailoverJourney, fails: str
) -> None:
    source, there = journey.begin(), journey.wait_at()
    held = there.host.hold(fails)
    source.ask("migrate", uri=there.uri)
    source.begins()
    assert held.begun.wait(20)
    held.refuse(errno.ENOMEM)
    source.begins()  # by the second press it goes back
    source.wait(Status.FAILED)
    assert_kept(source)
    assert f"device primary0: the destination cannot prepare its primary: {fails}: ENOMEM" in str(source.stop.error)
    assert "primary0 has stayed with the guest" in str(source.stop.error)
    there.wait(Status.FAILED)
    there.close()
    assert not is_pinned(there.host)
    journey.check()


def test_r54_a_preparation_that_fails_later_gives_the_guest_its_primary_back(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    held = there.host.hold()
    source.ask("migrate", uri=there.uri)
    lets_go(source)
    held.refuse(errno.ENOMEM)
    source.wait(Status.FAILED)
    source.ready()
    assert source.visible() == BOTH
    assert source.told("STOP") == []
    journey.check()


def test_r54_a_destination_that_does_not_get_on_is_waited_for_no_longer_than_said(journey: FailoverJourney) -> None:
    source, there = journey.begin(x_prepare_timeout=200), journey.wait_at()
    there.host.hold()
    source.ask("migrate", uri=there.uri)
    lets_go(source)
    source.wait(Status.FAILED)
    said = str(source.stop.error)
    assert said.startswith("the destination has not prepared its primaries within 200 ms (x-prepare-timeout)")
    source.ready()
    assert source.visible() == BOTH
    assert source.told("STOP") == []
    there.host.let_go()
    journey.check()


def test_r40_a_destination_that_dies_while_it_is_waited_for_gives_the_guest_its_primary_back(
    journey: FailoverJourney,
) -> None:
    source, there = journey.begin(), journey.wait_at()
    there.host.hold()
    middle = Middle(str(journey.nowhere), there.uri.removeprefix("unix:"))
    try:
        source.ask("migrate", uri=f"unix:{journey.nowhere}")
        lets_go(source)
        until_all_else_is_done(source)
        middle.cut()
        source.wait(Status.FAILED)
    finally:
        middle.close()
    source.ready()
    assert (source.visible(), source.told("STOP")) == (BOTH, [])
    there.wait(Status.FAILED)
    there.host.let_go()
    journey.check()


def test_r38_cancelled_during_the_preparation_the_guest_keeps_its_primary_and_nothing_stays_pinned(
    journey: FailoverJourney,
) -> None:
    source, there = journey.begin(), journey.wait_at()
    held = there.host.hold()
    source.ask("migrate", uri=there.uri)
    source.begins()
    assert held.begun.wait(20)
    source.ask("migrate_cancel")
    source.begins()
    source.wait(Status.CANCELLED)
    assert_kept(source)
    there.wait(Status.FAILED)
    there.close()
    assert not is_pinned(there.host)
    assert there.host.taken == set()
    journey.check()


def test_r43_by_best_effort_the_guest_goes_without_a_primary_that_cannot_be_prepared(journey: FailoverJourney) -> None:
    source, there = journey.begin(**BEST_EFFORT), journey.wait_at()
    there.host.hold().refuse(errno.ENOMEM)
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    assert "VFIO_IOMMU_MAP_DMA: ENOMEM" in source.ask("query-migrate")["warnings"][0]
    there.until("FAILOVER_PRIMARY_FAILED")
    assert there.visible() == {"standby0"}
    assert "VFIO_IOMMU_MAP_DMA: ENOMEM" in there.pair()["error"]
    events = [name for name, _ in there.told()]
    assert events.index("RESUME") < events.index("FAILOVER_PRIMARY_FAILED")
    journey.check()


def test_r54_by_best_effort_the_guest_goes_after_a_limit_and_the_plug_waits(journey: FailoverJourney) -> None:
    source, there = journey.begin(x_prepare_timeout=200, **BEST_EFFORT), journey.wait_at()
    held = there.host.hold()
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    there.wait(Status.COMPLETED)
    assert "within 200 ms" in source.ask("query-migrate")["warnings"][0]
    there.stop.wait_for_count()
    assert there.visible() == {"standby0"}
    held.let_go()
    there.boot()
    there.ready()
    assert there.visible() == BOTH
    assert there.told("FAILOVER_PRIMARY_FAILED") == []
    journey.check()


def test_r54_a_guest_that_knows_of_no_pairs_waits_for_the_primary_too_and_does_not_see_it(
    journey: FailoverJourney,
) -> None:
    source, there = journey.begin(ack=False), journey.wait_at()
    held = there.host.hold()
    source.ask("migrate", uri=there.uri)
    source.until(Status.ACTIVE)
    until_all_else_is_done(source)
    held.let_go()
    source.wait(Status.COMPLETED)
    assert there.visible() == {"standby0"}
    journey.check()


def test_r43_two_primaries_are_prepared_side_by_side_and_both_are_told_of(
    make: Callable[..., FailoverJourney],
) -> None:
    journey = make(PAIR + standby(1) + primary(1))
    source, there = journey.begin(), journey.wait_at()
    held = there.host.hold(RESET)
    source.ask("migrate", uri=there.uri)
    for n in range(2):
        source.begins(n)
    poll(lambda: held.waiting == 2)
    assert len(there.host.kernel.maps) == 1, "memory is mapped once"
    held.let_go()
    for n in range(2):
        source.guests[n].let_go()
    source.wait(Status.COMPLETED)
    assert sorted(prepared(source)) == [("primary0", ""), ("primary1", "")]
    journey.check()


@pytest.mark.parametrize("version", [1, 2])
def test_r43_for_a_source_that_would_not_wait_all_is_prepared_before_it_is_accepted(
    journey: FailoverJourney, version: int
) -> None:
    source, there = journey.begin(), journey.wait_at()
    told: list[bool] = []
    uri = journey.middle(there, {Kind.ACCEPT: lambda: told.append(is_pinned(there.host))}, version=version)
    source.ask("migrate", uri=uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    assert told == [True]
    assert "preparing" not in source.ask("query-migrate")
    there.boot()
    there.ready()
    journey.check()


@pytest.mark.parametrize("fails", [MAP, RESET])
def test_r43_such_a_source_is_refused_before_it_asks_its_guest(journey: FailoverJourney, fails: str) -> None:
    source, there = journey.begin(), journey.wait_at()
    there.host.hold(fails).refuse(errno.EIO)
    source.ask("migrate", uri=journey.middle(there, {}, version=2))
    source.wait(Status.FAILED)
    assert f"primary0: the destination cannot prepare its primary: {fails}: EIO" in str(source.stop.error)
    assert source.told("UNPLUG_PRIMARY") == []
    assert_kept(source)
    journey.check()


def saved(journey: FailoverJourney, tmp_path: Path, **parameters: Any) -> str:
    """A guest in a file."""
    source, uri = journey.begin(**parameters), f"file:{tmp_path / 'saved'}"
    source.ask("migrate", uri=uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    source.close()
    return uri


def test_r48_r54_a_guest_out_of_a_file_runs_when_its_primary_is_prepared(
    journey: FailoverJourney, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = saved(journey, tmp_path)
    host, hold = FailoverHost, FailoverHost.__init__
    monkeypatch.setattr(host, "__init__", lambda self, *args, **more: (hold(self, *args, **more), self.hold())[0])
    there = journey.wait_at(uri=uri)
    poll(lambda: "load state" in [phase.name for phase in there.migrations.progress.phases])
    assert there.machine.state is RunState.INMIGRATE
    there.host.let_go()
    there.wait(Status.COMPLETED)
    there.boot()
    there.ready()
    assert there.visible() == BOTH
    journey.check()
