"""The reference's own cases of a failover pair that migrates, by its names: two whole machines, and a guest by hand.

Its primaries are virtio-net devices, ours are NICs of the host; it looks for the primary before RESUME, we do after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.abi.virtio import feature_mask
from kvmpy.devices.virtio.net_state import NetFeature
from kvmpy.kvm.system import System
from kvmpy.migration.parameters import OnNoConvergence
from kvmpy.migration.status import Status
from tests.fakes.failover_journey import FailoverJourney, Place, primary, standby
from tests.fakes.loop import poll

BOTH = {"standby0", "primary0"}
PAIR = standby() + primary()
ORDINARY = standby(1, failover=False).replace("standby1", "primary0")
"""A network device where the reference has a primary that is none."""
ALL_FOUR = {"standby0", "primary0", "standby1", "primary1"}
ENDLESS: dict[str, Any] = {"downtime_limit": 0, "x_on_no_convergence": OnNoConvergence.CONTINUE}
GOES = ["setup", "active", "device", "completed"]
GOES_UNPLUGGED = ["setup", "wait-unplug", "active", "device", "completed"]

Make = Callable[..., FailoverJourney]


@pytest.fixture
def make(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A journey of machines with these tables; a pair, if none are given."""
    with ExitStack() as stack:
        yield lambda devices=PAIR: FailoverJourney(tmp_path, stack, monkeypatch, devices)


@pytest.fixture
def journey(make: Make) -> FailoverJourney:
    return make()


def without_standby(offered: int) -> int:
    """What a driver takes that does not know of pairs."""
    return offered & ~feature_mask(NetFeature.STANDBY)


def test_r52_migrate_on_out(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    source.stays("wait-unplug")
    assert source.told("UNPLUG_PRIMARY") == [("UNPLUG_PRIMARY", "primary0")]
    assert source.visible() == BOTH
    source.guests[0].serve()
    source.wait(Status.COMPLETED)
    assert source.statuses() == GOES_UNPLUGGED
    assert source.told("STOP") == [("STOP", "")]
    assert source.visible() == {"standby0"}


def test_r42_r52_migrate_on_in(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    assert there.visible() == {"standby0"}
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    there.wait(Status.COMPLETED)
    there.boot()
    there.ready()
    assert there.visible() == BOTH
    there.until("FAILOVER_PRIMARY_PLUGGED")
    events = [name for name, _ in there.told() if name != "MIGRATION"]
    assert events.index("FAILOVER_NEGOTIATED") < events.index("RESUME") < events.index("FAILOVER_PRIMARY_PLUGGED")
    assert there.told("FAILOVER_NEGOTIATED") == [("FAILOVER_NEGOTIATED", "standby0")]
    assert there.statuses()[-1] == "completed"


OFF = standby(failover=False)
"""The reference's primary is an ordinary device then, which can migrate; a NIC of the host cannot."""


def test_r32_r52_migrate_off_out(make: Make) -> None:
    journey = make(OFF + ORDINARY)
    source, there = journey.begin(ack=False), journey.wait_at()
    source.ack()
    source.ask("migrate", uri=there.uri)
    source.wait(Status.COMPLETED)
    assert source.statuses() == GOES
    assert source.told("UNPLUG_PRIMARY", "STOP") == [("STOP", "")]


def test_r52_migrate_off_in(make: Make) -> None:
    journey = make(OFF + ORDINARY)
    source, there = journey.begin(ack=False), journey.wait_at()
    source.ack()
    assert there.visible() == BOTH
    source.ask("migrate", uri=there.uri)
    there.wait(Status.COMPLETED)
    assert there.visible() == BOTH
    assert there.told("FAILOVER_NEGOTIATED") == []


def test_r52_migrate_off_abort(make: Make) -> None:
    journey = make(OFF + ORDINARY)
    source, there = journey.begin(ack=False, **ENDLESS), journey.wait_at()
    source.ack()
    source.ask("migrate", uri=there.uri)
    source.until(Status.ACTIVE)
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    assert source.statuses() == ["setup", "active", "cancelling", "cancelled"]
    assert source.visible() == BOTH


def test_r52_migrate_off_with_a_nic_of_the_host_is_refused_before_anything_is_asked(make: Make) -> None:
    journey = make(OFF + primary())
    source, there = journey.begin(ack=False), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.wait(Status.FAILED)
    assert "device primary0: " in str(source.stop.error)
    assert source.told("UNPLUG_PRIMARY") == []
    assert source.visible() == BOTH


def test_r32_r52_migrate_guest_off_out(journey: FailoverJourney) -> None:
    source, there = journey.begin(ack=False), journey.wait_at()
    source.ack(takes=without_standby)
    assert source.visible() == {"standby0"}
    source.ask("migrate", uri=there.uri)
    source.wait(Status.COMPLETED)
    assert source.statuses() == GOES
    assert source.visible() == {"standby0"}
    assert source.told("UNPLUG_PRIMARY") == []


def test_r52_migrate_guest_off_in(journey: FailoverJourney) -> None:
    source, there = journey.begin(ack=False), journey.wait_at()
    source.ack(takes=without_standby)
    assert there.visible() == {"standby0"}
    source.ask("migrate", uri=there.uri)
    there.wait(Status.COMPLETED)
    assert there.visible() == {"standby0"}
    assert there.told("FAILOVER_NEGOTIATED") == []
    assert there.pair()["state"] == "hidden"


def test_r52_migrate_guest_off_abort(journey: FailoverJourney) -> None:
    source, there = journey.begin(ack=False, **ENDLESS), journey.wait_at()
    source.ack(takes=without_standby)
    source.ask("migrate", uri=there.uri)
    source.until(Status.ACTIVE)
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    assert source.statuses() == ["setup", "active", "cancelling", "cancelled"]
    assert source.visible() == {"standby0"}


@pytest.mark.parametrize("keeps", [False, True], ids=["it ejects", "it goes back"])
def test_r52_r37_migrate_abort_wait_unplug(journey: FailoverJourney, keeps: bool) -> None:
    source, there = journey.begin(), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    source.ask("migrate_cancel")
    source.stays("cancelling")
    if keeps:
        source.begins()
        source.begins()  # by the second press it goes back
    else:
        source.guests[0].serve()
    source.wait(Status.CANCELLED)
    source.ready()
    assert source.visible() == BOTH
    assert source.statuses() == ["setup", "wait-unplug", "cancelling", "cancelled"]
    assert source.told("DEVICE_DELETED") == []
    assert ("FAILOVER_PRIMARY_RELEASED", "primary0") in source.told() or keeps


def test_r52_migrate_abort_active(journey: FailoverJourney) -> None:
    source, there = journey.begin(**ENDLESS), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    source.until(Status.ACTIVE)
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    source.ready()
    assert source.visible() == BOTH
    assert source.statuses() == ["setup", "wait-unplug", "active", "cancelling", "cancelled"]


def test_r52_migrate_abort_timeout(journey: FailoverJourney) -> None:
    source, there = journey.begin(x_unplug_timeout=300), journey.wait_at()
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    source.ask("migrate_cancel")
    source.wait(Status.CANCELLED)
    assert source.statuses() == ["setup", "wait-unplug", "cancelling", "cancelled"]
    assert source.ask("query-migrate")["total-time"] >= 300
    assert source.visible() == BOTH
    assert "has not answered" in source.pair()["error"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_r52_r31_migrate_multi_out(make: Make, order: tuple[int, int]) -> None:
    journey = make(PAIR + standby(1) + primary(1))
    source, there = journey.begin(), journey.wait_at()
    assert source.visible() == ALL_FOUR
    source.ask("migrate", uri=there.uri)
    source.until(Status.WAIT_UNPLUG)
    assert {device for _, device in source.told("UNPLUG_PRIMARY")} == {"primary0", "primary1"}
    first, second = order
    source.guests[first].serve()
    source.until("FAILOVER_PRIMARY_RELEASED")
    source.stays("wait-unplug")
    source.guests[second].serve()
    source.wait(Status.COMPLETED)
    assert source.statuses() == GOES_UNPLUGGED
    assert source.told("STOP") == [("STOP", "")]


def test_r52_migrate_multi_in(make: Make) -> None:
    journey = make(PAIR + standby(1) + primary(1))
    source, there = journey.begin(), journey.wait_at()
    assert there.visible() == {"standby0", "standby1"}
    source.ask("migrate", uri=there.uri)
    for n in range(2):
        source.begins(n)
        source.guests[n].let_go()
    there.wait(Status.COMPLETED)
    there.boot()
    there.ready(0)
    there.ready(1)
    assert there.visible() == ALL_FOUR
    assert there.told("FAILOVER_NEGOTIATED", "RESUME") == [
        *(("FAILOVER_NEGOTIATED", "standby0"), ("FAILOVER_NEGOTIATED", "standby1"), ("RESUME", "")),
    ]
    assert there.statuses()[-1] == "completed"


# What the reference's suite has no case for


def test_r35_where_nobody_listens_the_primary_is_not_touched(journey: FailoverJourney) -> None:
    source = journey.begin()
    source.ask("migrate", uri=f"unix:{journey.nowhere}")
    source.wait(Status.FAILED)
    assert source.statuses() == ["setup", "failed"]
    assert "ENOENT" in source.ask("query-migrate")["error-desc"]
    assert source.told("UNPLUG_PRIMARY", "STOP", "FAILOVER_PRIMARY_RELEASED") == []
    assert (source.pair()["state"], source.visible()) == ("plugged", BOTH)


def path_told(place: Place) -> str:
    """What the network around the standby was told last."""
    around = place.machine.board.inventory.plugged["standby0"].around
    assert around is not None
    return around.path.value


def test_r46_the_network_has_the_guest_where_it_runs_alone(journey: FailoverJourney) -> None:
    source, there = journey.begin(), journey.wait_at()
    poll(lambda: (path_told(source), path_told(there)) == ("primary", "none"))
    source.ask("migrate", uri=there.uri)
    source.begins()
    source.guests[0].let_go()
    source.wait(Status.COMPLETED)
    there.wait(Status.COMPLETED)
    poll(lambda: (path_told(source), path_told(there)) == ("none", "standby"))
    there.boot()
    there.ready()
    poll(lambda: path_told(there) == "primary")
    there.machine.stop()
    source.machine.resume(force=True)
    poll(lambda: path_told(source) in ("standby", "primary"))
