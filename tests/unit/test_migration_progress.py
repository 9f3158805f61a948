"""What query-migrate says: statuses in their order, and a blackout that two clocks which differ cannot distort."""

from __future__ import annotations

import pytest

from kvmpy.migration.progress import MOST_ROUNDS, Progress, Round, Said
from kvmpy.migration.status import LEGAL, OVER, Status

MS = 1_000_000


def at(status: Status) -> Progress:
    progress = Progress(1 << 20)
    progress.status = status
    return progress


def test_a_status_changes_only_as_the_table_says() -> None:
    for status, following in LEGAL.items():
        for new in set(Status) - following - ({*Status} - OVER if status is Status.CANCELLING else set()):
            with pytest.raises(AssertionError):
                at(status).become(new)


def test_one_that_is_being_cancelled_stays_so_whatever_its_thread_comes_to_meanwhile() -> None:
    seen: list[Status] = []
    progress = Progress(1 << 20, seen.append)
    progress.become(Status.SETUP)
    progress.cancelling()
    progress.become(Status.ACTIVE)
    progress.cancelling()
    progress.fail(Status.CANCELLED, "cancelled")
    progress.cancelling()
    assert seen == [Status.SETUP, Status.CANCELLING, Status.CANCELLED]


def handed_over(*, ahead: int) -> Progress:
    """Stopped at 100 ms, GO at 120, running at 130 by its clock, which is so many ms ahead, answered at 140."""
    progress = at(Status.DEVICE)
    progress.stopped, progress.went, progress.heard = 100 * MS, 120 * MS, 140 * MS
    progress.stopped_ns = 10**18
    progress.first_run_ns = 10**18 + (30 + ahead) * MS
    return progress


@pytest.mark.parametrize(("ahead", "blackout"), [(0, 30), (1000, 40), (-1000, 20), (5, 35)])
def test_the_blackout_is_within_what_the_source_saw(ahead: int, blackout: int) -> None:
    assert handed_over(ahead=ahead).blackout == blackout


def test_there_is_none_before_the_guest_runs() -> None:
    progress = handed_over(ahead=0)
    progress.first_run_ns = 0
    assert progress.blackout is None
    assert "downtime" not in progress.info()


def test_nothing_is_said_where_there_was_nothing() -> None:
    assert Progress(1 << 20).info() == {}


def test_rounds_add_up_and_the_last_are_kept() -> None:
    progress = at(Status.ACTIVE)
    for number in range(1, MOST_ROUNDS + 10):
        progress.add(Round(number, progress.began, 10, 4, 100, 0.5, 8.0))
    info = progress.info()
    count = MOST_ROUNDS + 9
    assert info["ram"]["normal"] == 6 * count
    assert info["ram"]["duplicate"] == 4 * count
    assert info["ram"]["transferred"] == info["ram"]["precopy-bytes"] == 100 * count
    assert info["ram"]["pages-per-second"] == 20
    assert [info["rounds"][0]["number"], info["rounds"][-1]["number"]] == [10, count]


def test_what_is_sent_while_the_guest_stands_still_is_told_apart() -> None:
    progress = at(Status.DEVICE)
    progress.add(Round(1, 0, 1, 0, 1000, 0.1, 0.0))
    progress.stopped = progress.began
    progress.add(Round(2, 0, 1, 0, 10, 0.1, 0.0))
    ram = progress.info()["ram"]
    assert (ram["precopy-bytes"], ram["downtime-bytes"]) == (1000, 10)


def test_the_other_sides_phases_are_told_in_our_time() -> None:
    progress = handed_over(ahead=0)
    progress.said = [Said("load state", progress.began_ns + 5 * MS, 7 * MS)]
    assert progress.info()["destination"]["phases"] == [{"name": "load state", "start-ms": 5.0, "ms": 7.0}]


def test_a_phase_is_stamped_also_where_it_fails() -> None:
    progress = at(Status.ACTIVE)
    with pytest.raises(ValueError, match="x"), progress.phase("connect"):
        raise ValueError("x")
    assert [phase["name"] for phase in progress.info()["phases"]] == ["connect"]
