"""A guest that resets, powers off or panics in the middle of its migration: nothing of it is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmpy.kvm.system import System
from kvmpy.machine.changes import Steps
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.migration.parameters import OnNoConvergence
from kvmpy.migration.status import Status
from tests.fakes.counting_guest import gap
from tests.fakes.journey import Journey, Stop
from tests.fakes.loop import BOUND, poll

NEVER = {"downtime_limit": 0, "x_on_no_convergence": OnNoConvergence.CONTINUE}
"""Rounds without end: no guest is gone in no time."""


@pytest.fixture
def journey(system: System, tmp_path: Path) -> Iterator[Journey]:
    with ExitStack() as stack:
        yield Journey(tmp_path, stack)


def under_way(journey: Journey) -> tuple[Stop, Stop]:
    """A migration that sends rounds until it is told how long the guest may stand still."""
    source = journey.begin(**NEVER, x_checksum=True)
    source.wait_for_count()
    there = journey.wait_at()
    source.migrations.migrate(there.uri)
    poll(lambda: source.migrations.progress.passes)
    return source, there


def restarts(said: bytes) -> int:
    """Where the count begins anew; 0 where that does not show, after a whole number of turns."""
    at = gap(said) or 0
    assert said[at] == 0, f"{len(said)} bytes, {said[:4]!r} to {said[-4:]!r}"
    return at


def test_a_reset_while_pages_are_sent_is_carried_out_and_what_it_loads_travels(journey: Journey) -> None:
    source, there = under_way(journey)
    source.machine.request_reset()
    source.migrations.set_parameters(downtime_limit=10_000)
    source.wait(Status.COMPLETED)
    there.wait_for_count()
    there.machine.close()
    said = source.said + there.said
    assert gap(said[restarts(said) :]) is None
    assert "RESET" in [name for name, _ in source.events]


def test_a_reset_at_the_very_stop_is_carried_out_first(journey: Journey) -> None:
    source, there = under_way(journey)
    halt = source.machine.halt
    halts: list[int] = []

    def halt_and_ask(seconds: float | None = None) -> Steps[None]:
        """The last instruction before the stop asked for a reset."""
        yield from halt(seconds)
        if not halts:
            source.machine.request_reset()
        halts.append(1)

    source.machine.halt = halt_and_ask  # type: ignore[method-assign]
    source.migrations.set_parameters(downtime_limit=10_000)
    source.wait(Status.COMPLETED)
    there.wait_for_count()
    there.machine.close()
    said = source.said + there.said
    assert gap(said[restarts(said) :]) is None
    assert [name for name, _ in source.events if name in ("STOP", "RESET", "RESUME")] == [
        *("STOP", "RESET", "RESUME", "STOP")
    ]


@pytest.mark.parametrize(
    ("event", "outcome", "why"),
    [
        (lambda source: source.machine.request_shutdown(), Outcome.POWER_OFF, "guest-shutdown"),
        (lambda source: source.machine.report_panic(), Outcome.GUEST_PANIC, "guest-panic"),
    ],
    ids=["power-off", "panic"],
)
def test_the_guests_end_ends_its_migration_and_its_machine(
    journey: Journey, event: Callable[[Stop], None], outcome: Outcome, why: str
) -> None:
    source, there = under_way(journey)
    event(source)
    assert source.machine.wait(BOUND) is outcome
    source.wait(Status.FAILED)
    assert source.error == f"the machine has ended ({why})"
    assert there.machine.wait(BOUND) is Outcome.HOST_ERROR
    assert there.said == b""


def test_a_machine_that_is_closed_in_the_middle_waits_for_nobody(journey: Journey) -> None:
    source, there = under_way(journey)
    source.machine.close()
    assert source.migrations.progress.status is Status.FAILED
    assert there.machine.wait(BOUND) is Outcome.HOST_ERROR


def test_a_destination_that_is_closed_while_it_waits_waits_no_longer(journey: Journey) -> None:
    there = journey.wait_at()
    there.machine.close()
    assert there.machine.state is RunState.SHUTDOWN
    assert there.migrations.wait(BOUND) is Status.FAILED
