"""The primaries of a machine that has accepted a guest: each is prepared by itself, and all are told of once.

Whole migrations that wait for it are in tests/kvm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.errors import IncompatibleError, MigrationCancelled, StreamError
from kvmpy.migration.messages import Outcome
from kvmpy.migration.preparation import Preparation, failures
from kvmpy.migration.progress import Progress
from kvmpy.migration.stop import Stop

LONG, SHORT = 20.0, 0.05


class Function:
    """A primary that is ready when a test says so."""

    def __init__(self) -> None:
        self.is_ready = False
        self.problem: str | None = None
        self.then: Callable[[], object] = lambda: None

    def prepare(self, then: Callable[[], object]) -> None:
        self.then = then

    def end(self, problem: str | None = None) -> None:
        self.is_ready, self.problem = problem is None, problem
        self.then()


def machine(**functions: object) -> Any:
    """One with these primaries, and a device that is none."""
    plugged = {name: SimpleNamespace(function=each, standby="net0") for name, each in functions.items()}
    plugged["disk0"] = SimpleNamespace(function=None, standby=None)
    return SimpleNamespace(board=SimpleNamespace(inventory=SimpleNamespace(plugged=plugged)))


class Rig:
    """``told`` is what was told of their primaries, each time."""

    def __init__(self, **functions: object) -> None:
        self.progress = Progress(0)
        self.told: list[dict[str, str]] = []
        self.preparation = Preparation(machine(**functions), self.progress, self._hear)

    def _hear(self, outcomes: tuple[Outcome, ...]) -> None:
        self.told.append({each.device: each.problem for each in outcomes})


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


def test_r54_what_became_of_all_is_told_when_the_last_is_done() -> None:
    first, second = Function(), Function()
    rig = Rig(nic0=first, nic1=second)
    rig.preparation.begin()
    second.end()
    assert (rig.told, rig.progress.preparing) == ([], True)
    first.end("ENOMEM: no memory")
    assert (rig.told, rig.progress.preparing) == ([{"nic1": "", "nic0": "ENOMEM: no memory"}], False)
    assert [phase.name for phase in rig.progress.phases] == ["prepare nic1", "prepare nic0"]
    assert failures(rig.progress.prepared) == [
        "device nic0: the destination cannot prepare its primary: ENOMEM: no memory"
    ]


def test_r54_a_machine_without_primaries_has_them_all_at_once() -> None:
    rig = Rig()
    rig.preparation.begin()
    assert (rig.told, rig.progress.preparing) == ([{}], False)


def test_r43_one_that_cannot_be_used_anyway_is_not_told_of_again() -> None:
    first, second = Function(), Function()
    first.problem = "it is broken"
    rig = Rig(nic0=first, nic1=second)
    rig.preparation.begin()
    second.end()
    assert rig.told == [{"nic1": ""}]


def test_nobody_is_told_any_more_once_that_is_said() -> None:
    function = Function()
    rig = Rig(nic0=function)
    rig.preparation.begin()
    rig.preparation.hush()
    function.end()
    assert (rig.told, len(rig.progress.prepared)) == ([], 1)


def test_r54_whoever_cannot_be_told_later_waits(stop: Stop) -> None:
    function = Function()
    rig = Rig(nic0=function)
    rig.preparation.begin()
    with pytest.raises(StreamError, match=r"a failover primary of the destination is not prepared within 0.05 seconds"):
        rig.preparation.wait(stop, SHORT, require=True)
    function.end()
    rig.preparation.wait(stop, LONG, require=True)


def test_r43_what_fails_is_a_reason_to_stay_where_primaries_are_required(stop: Stop) -> None:
    function = Function()
    rig = Rig(nic0=function)
    rig.preparation.begin()
    function.end("EIO")
    with pytest.raises(IncompatibleError, match="device nic0: the destination cannot prepare its primary: EIO"):
        rig.preparation.wait(stop, LONG, require=True)
    rig.preparation.wait(stop, LONG, require=False)


def test_r54_by_best_effort_what_takes_too_long_is_warned_of(stop: Stop, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(nic0=Function())
    rig.preparation.begin()
    rig.preparation.wait(stop, SHORT, require=False)
    assert "is not prepared within 0.05 seconds: the guest goes on without" in caplog.text


def test_whoever_waits_ends_with_the_migration(stop: Stop) -> None:
    rig = Rig(nic0=Function())
    rig.preparation.begin()
    stop.set("cancelled")
    with pytest.raises(MigrationCancelled):
        rig.preparation.wait(stop, LONG, require=False)
