"""What a report says of failover pairs: primaries on their way, the path that frames took, pings that were lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.migration import picture, report
from kvmpy.migration.page import page
from kvmpy.migration.pings import read
from kvmpy.migration.primaries import DESTINATION, SOURCE, Stretch, Wait
from kvmpy.migration.report import Timeline

ANSWER: Final[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fakes/migration_answer.json").read_text())
BEGIN: Final = ANSWER["stopped-ns"] - round(ANSWER["stopped-ms"] * 1e6)
STOPPED, RUNS = ANSWER["stopped-ms"], ANSWER["stopped-ms"] + ANSWER["blackout-ms"]
PRIMARY, STANDBY = "hostdev0", "net1"


def event(name: str, ns: float, **data: str) -> dict[str, Any]:
    stamp = {"seconds": int(ns) // 10**9, "microseconds": int(ns) % 10**9 // 1000}
    return {"event": name, "timestamp": stamp, "data": {key.replace("_", "-"): value for key, value in data.items()}}


def here(name: str, ms: float, **data: str) -> dict[str, Any]:
    """An event of the source's, so many milliseconds after the begin."""
    return event(name, BEGIN + ms * 1e6, **data)


def there(name: str, ms: float, **data: str) -> dict[str, Any]:
    """One of the destination's, so many milliseconds after the guest ran there."""
    return event(name, ANSWER["destination"]["first-run-ns"] + ms * 1e6, **data)


SOURCE_SAID: Final = [
    here("MIGRATION", 0, status="setup"),
    here("UNPLUG_PRIMARY", 100, device_id=PRIMARY),
    here("MIGRATION", 101, status="wait-unplug"),
    here("FAILOVER_PATH_CHANGED", 5200, device_id=STANDBY, path="standby"),
    here("FAILOVER_PRIMARY_RELEASED", 6300, device_id=PRIMARY, standby_id=STANDBY),
    here("MIGRATION", 6301, status="active"),
]
DESTINATION_SAID: Final = [
    there("RESUME", 1),
    there("FAILOVER_PATH_CHANGED", 300, device_id=STANDBY, path="primary"),
    there("FAILOVER_PRIMARY_PLUGGED", 450, device_id=PRIMARY, standby_id=STANDBY),
]


def told(
    source: list[dict[str, Any]] = SOURCE_SAID, other: list[dict[str, Any]] | None = DESTINATION_SAID, **more: Any
) -> Timeline:
    return report.timeline(ANSWER | more, machine="web1", uri="ssh://host2", here=source, there=other)


def milliseconds(*values: float) -> Any:
    return pytest.approx(values, abs=0.01)


def test_a_primary_leaves_here_before_pages_are_sent_and_comes_there_once_the_guest_runs() -> None:
    out, back = told().waits
    assert (out.side, out.device_id, out.what, out.outcome) == (SOURCE, PRIMARY, "leaves", "released")
    assert (out.start_ms, out.end_ms) == milliseconds(100, 6300)
    assert (back.side, back.device_id, back.what, back.outcome) == (DESTINATION, PRIMARY, "comes", "in use")
    assert (back.start_ms, back.end_ms) == milliseconds(RUNS, RUNS + 450)
    assert told().end_ms > RUNS + 450


def test_a_destinations_clock_that_is_wrong_moves_nothing() -> None:
    ahead = 1000  # seconds
    first = {"first-run-ns": ANSWER["destination"]["first-run-ns"] + ahead * 10**9}
    stamps = [each["timestamp"] | {"seconds": each["timestamp"]["seconds"] + ahead} for each in DESTINATION_SAID]
    said = [each | {"timestamp": stamp} for each, stamp in zip(DESTINATION_SAID, stamps, strict=True)]
    line = told(SOURCE_SAID, said, destination=ANSWER["destination"] | first)
    assert line.waits[1].end_ms == pytest.approx(RUNS + 450, abs=0.01)


def test_frames_take_the_standby_from_the_release_until_the_primary_is_back() -> None:
    first, second, third = told().paths
    assert [each.path for each in (first, second, third)] == ["primary", "standby", "primary"]
    assert (first.start_ms, first.end_ms, second.end_ms) == milliseconds(0, 5200, RUNS + 300)
    assert third.end_ms == told().end_ms


def test_nothing_is_made_up_of_a_destination_that_nobody_asked() -> None:
    line = told(other=None)
    assert [wait.side for wait in line.waits] == [SOURCE]
    assert line.paths[-1].end_ms == STOPPED


def test_a_change_that_lasted_no_time_is_none() -> None:
    flash = [here("FAILOVER_PATH_CHANGED", 5200, device_id=STANDBY, path=path) for path in ("primary", "standby")]
    early = [there("FAILOVER_PATH_CHANGED", 5000 - RUNS, device_id=STANDBY, path="primary"), *DESTINATION_SAID]
    for source, other in ((SOURCE_SAID + flash, DESTINATION_SAID), (SOURCE_SAID, early)):
        stretches = told(source, other).paths
        assert all(each.start_ms < each.end_ms for each in stretches)
        assert [each.end_ms for each in stretches[:-1]] == [each.start_ms for each in stretches[1:]]


def test_a_primary_came_when_it_was_first_in_use() -> None:
    again = there("FAILOVER_PRIMARY_PLUGGED", 9000, device_id=PRIMARY, standby_id=STANDBY)
    assert told(other=[*DESTINATION_SAID, again]).waits == told().waits


def test_a_primary_that_the_destination_does_not_tell_of_has_not_come() -> None:
    line = told(other=[])
    assert line.waits[1] == Wait(side=DESTINATION, device_id=PRIMARY, what="comes", start_ms=line.waits[1].start_ms)
    assert "hostdev0: not yet in use after" in picture.draw(line)


def test_one_that_failed_there_says_why() -> None:
    failed = [there("FAILOVER_PRIMARY_FAILED", 2000, device_id=PRIMARY, standby_id=STANDBY, reason="no power")]
    assert "hostdev0: failed (no power) after 2.00 s" in picture.draw(told(other=failed))


CANCELLED: Final = {"status": "cancelled", "blackout-ms": None, "stopped-ms": None, "stopped-ns": None}
"""The source's events alone say when it began."""


def test_cancelled_in_time_the_guest_keeps_it() -> None:
    source = [
        *SOURCE_SAID[:3],
        here("MIGRATION", 1000, status="cancelling"),
        here("MIGRATION", 1600, status="cancelled"),
    ]
    kept = here("FAILOVER_PRIMARY_PLUGGED", 1200, device_id=PRIMARY, standby_id=STANDBY)
    (wait,) = told([*source, kept], None, **CANCELLED).waits
    assert wait.outcome == "kept"
    assert (wait.start_ms, wait.end_ms) == milliseconds(100, 1200)


def test_one_that_the_guest_neither_keeps_nor_lets_go_is_still_there() -> None:
    source = [*SOURCE_SAID[:3], here("MIGRATION", 30000, status="failed")]
    (wait,) = told(source, None, **CANCELLED).waits
    assert (wait.what, wait.end_ms, wait.outcome) == ("leaves", None, "")


def test_cancelled_later_it_comes_back_here() -> None:
    source = [
        *SOURCE_SAID,
        here("MIGRATION", 7000, status="cancelling"),
        here("MIGRATION", 7100, status="cancelled"),
        here("FAILOVER_PRIMARY_PLUGGED", 7400, device_id=PRIMARY, standby_id=STANDBY),
    ]
    out, back = told(source, None, **CANCELLED).waits
    assert (out.outcome, back.side, back.outcome) == ("released", SOURCE, "in use")
    assert (back.start_ms, back.end_ms) == milliseconds(7100, 7400)


def test_two_primaries_have_a_bar_each() -> None:
    second = [
        here("UNPLUG_PRIMARY", 100, device_id="hostdev1"),
        here("FAILOVER_PRIMARY_RELEASED", 7000, device_id="hostdev1"),
    ]
    drawn = picture.draw(told(SOURCE_SAID + second, None))
    assert "hostdev0: asked, let go after 6.20 s" in drawn
    assert "hostdev1: asked, let go after 6.90 s" in drawn


def test_the_picture_and_the_page_tell_of_all_of_it() -> None:
    drawn, whole = picture.draw(told()), page(told())
    for words in (
        "Failover pairs",
        "hostdev0: asked, let go after 6.20 s",
        "hostdev0: plugged in, in use after 450.0 ms",
    ):
        assert words in drawn
        assert words in whole
    assert "frames of net1" in drawn
    assert "net1: standby" in whole


def test_no_frames_are_drawn_where_the_guest_stands_still() -> None:
    drawn = picture.draw(told())
    assert drawn.count("net1: standby from") == 2, "one on either side of the blackout"
    assert drawn.count("net1: primary from") == 2, "before that, and after"


def gap(event: dict[str, Any], ms: object) -> dict[str, Any]:
    return event | {"data": event["data"] | {"rx-gap-ms": ms}}


RECEIVES: Final = there("FAILOVER_PRIMARY_RECEIVES", 800, device_id=PRIMARY, standby_id=STANDBY)


def test_how_long_frames_went_nowhere_is_shown_where_they_did() -> None:
    source = [gap(each, 12.5) if each["event"] == "FAILOVER_PATH_CHANGED" else each for each in SOURCE_SAID]
    line = told(source, [*DESTINATION_SAID, gap(RECEIVES, 500.0)])
    assert [(each.standby_id, each.path) for each in line.gaps] == [(STANDBY, "standby"), (STANDBY, "primary")]
    assert (line.gaps[0].start_ms, line.gaps[0].end_ms) == milliseconds(5187.5, 5200)
    assert (line.gaps[1].start_ms, line.gaps[1].end_ms) == milliseconds(RUNS + 300, RUNS + 800)
    assert "net1: frames go nowhere for 12.5 ms, on the way to the standby" in picture.draw(line)
    assert "net1: frames go nowhere, on the way to the primary" in page(line)


@pytest.mark.parametrize("ms", [None, "long", -1, 0, 1e300])
def test_a_gap_that_makes_no_sense_is_none(ms: object) -> None:
    assert told(SOURCE_SAID, [gap(RECEIVES, ms)]).gaps == ()


def test_a_migration_without_a_pair_has_nothing_of_it() -> None:
    line = told([], [])
    assert (line.waits, line.paths) == ((), ())
    assert "Failover" not in picture.draw(line) + page(line)


def pinger(*lost: int, count: int = 200) -> list[str]:
    sent = [BEGIN / 1e9 + number / 10 for number in range(count)]
    return ["answered", *(json.dumps({"sent": at, "answered": None if n in lost else at}) for n, at in enumerate(sent))]


def test_pings_are_on_the_axis_and_what_was_lost_is_counted() -> None:
    line = told()
    assert line.begin_ns == pytest.approx(BEGIN, abs=1000)
    pings = read(pinger(50, 51, 52), line.begin_ns or 0, line.end_ms)
    assert pings.lost_ms == milliseconds(5000, 5100, 5200)
    assert pings.summary() == "3 of 200 pings lost; at most 0.4 s between two answered"
    assert read(pinger(), BEGIN, 1e9).summary() == "none of 200 pings lost"
    drawn = picture.draw(msgspec.structs.replace(line, pings=pings))
    assert (drawn.count("v9.0"), drawn.count("v17.0")) == (197, 3)
    assert pings.summary() in drawn


def test_pings_of_another_time_do_not_count() -> None:
    line = told()
    early = [json.dumps({"sent": BEGIN / 1e9 - 1, "answered": None})]
    late = [json.dumps({"sent": BEGIN / 1e9 + 3600, "answered": None})]
    assert read(early + pinger() + late, BEGIN, line.end_ms).summary() == "none of 200 pings lost"


def test_a_log_that_makes_no_sense_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match="line 2: "):
        read(["answered", '{"sent": "now"}'], 0, 1e9)


def test_a_report_can_be_read_again_and_drawn_with_pings() -> None:
    line = told()
    again = report.from_json(report.to_json(line))
    assert [wait.outcome for wait in again.waits] == ["released", "in use"]
    assert again.paths[0] == Stretch(standby_id=STANDBY, path="primary", start_ms=0.0, end_ms=again.paths[0].end_ms)
    with pytest.raises(ValueError, match="no report of a migration"):
        report.from_json(b"{}")


ANY: Final = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=8), st.sampled_from([PRIMARY, "MIGRATION", "UNPLUG_PRIMARY"])),
    lambda inner: st.dictionaries(st.sampled_from(["event", "timestamp", "data", "device-id", "seconds"]), inner),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.sampled_from(["event", "timestamp", "data"]), ANY), max_size=8))
def test_whatever_a_monitor_says_a_picture_is_drawn(said: list[dict[str, Any]]) -> None:
    picture.draw(told(said, said))


KINDS: Final = st.sampled_from([each["event"] for each in SOURCE_SAID + DESTINATION_SAID])
MOMENTS: Final = st.lists(
    st.tuples(
        KINDS, st.floats(min_value=0, max_value=40000), st.sampled_from(["primary", "standby", "cancelled", "x"])
    ),
    max_size=12,
)


@given(MOMENTS, MOMENTS)
def test_in_whatever_order_things_happen_stretches_do_not_overlap(ours: list[Any], theirs: list[Any]) -> None:
    source = [here(kind, ms, device_id="a", path=word, status=word) for kind, ms, word in ours]
    destination = [there(kind, ms, device_id="a", path=word) for kind, ms, word in theirs]
    line = told(source, destination)
    ends = [0.0, *(each.end_ms for each in line.paths)]
    assert all(each.start_ms >= before for each, before in zip(line.paths, ends, strict=False))
    assert all(wait.end_ms is None or wait.end_ms >= wait.start_ms for wait in line.waits)
    picture.draw(report.from_json(report.to_json(line)))
