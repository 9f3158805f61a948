"""The report on a migration: its sums, and a picture that a person can read and nothing can hide in."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.migration import canvas, picture, report
from kvmpy.migration.page import page as whole_page
from kvmpy.migration.report import Timeline

FAKES: Final = Path(__file__).parents[1] / "fakes"
ANSWER: Final[dict[str, Any]] = json.loads((FAKES / "migration_answer.json").read_text())
SVG: Final = "{http://www.w3.org/2000/svg}"


def line(**changes: Any) -> Timeline:
    return report.timeline(ANSWER | changes, machine="web1", uri="tcp:192.0.2.2:4444", hosts=("host1", "host2"))


def drawn(timeline: Timeline) -> ElementTree.Element:
    return ElementTree.fromstring(picture.draw(timeline))


def test_the_blackout_is_the_sum_of_its_parts_on_each_side_and_of_what_is_in_none() -> None:
    told = json.loads(report.to_json(line()))
    source = [part for part in told["blackout"] if part["side"] == "source"]
    assert [part["name"] for part in source][:3] == ["stop", "save state", "last pages"]
    assert source[0]["ms"] == pytest.approx(9.095), "the rest of it was before the last vCPU stopped"
    assert sum(part["ms"] for part in source) == pytest.approx(told["blackout-ms"], abs=32)
    assert told["unaccounted-ms"] == 0, "where the source was between two phases, the destination was in one"


def test_what_no_phase_explains_is_said() -> None:
    told = line(phases=[{"name": "save state", "start-ms": 20000, "ms": 100}], destination=None)
    assert told.unaccounted_ms() == pytest.approx(560.946)
    assert "of which 560.9 ms are in no phase" in picture.draw(told)


def test_the_destinations_clock_is_placed_by_its_first_guest_instruction() -> None:
    there = line().destination
    assert there
    assert there.phases[-1].name == "run"
    assert there.phases[-1].start_ms < (line().runs_ms or 0) < there.phases[-1].end_ms
    ahead = {"first-run-ms": ANSWER["destination"]["first-run-ms"] + 10000, "phases": later(10000)}
    moved = line(destination=ANSWER["destination"] | ahead).destination
    assert moved
    assert [phase.start_ms for phase in moved.phases] == pytest.approx([phase.start_ms for phase in there.phases])


def later(ms: float) -> list[dict[str, Any]]:
    return [phase | {"start-ms": phase["start-ms"] + ms} for phase in ANSWER["destination"]["phases"]]


def test_rounds_follow_one_another_where_they_do_not_say_when_they_began() -> None:
    bare = [{key: value for key, value in each.items() if key != "start-ms"} for each in ANSWER["rounds"]]
    rounds = line(rounds=bare).rounds
    starts = [each.start_ms for each in rounds]
    assert starts[0] == ANSWER["setup-time"]
    assert starts[1] == pytest.approx(ANSWER["setup-time"] + rounds[0].ms)


def test_the_picture_names_every_phase_round_and_stamp() -> None:
    texts = " ".join(drawn(line()).itertext())
    for phase in (*ANSWER["phases"], *ANSWER["destination"]["phases"]):
        assert phase["name"] in texts
    assert "1: 79.3 MiB" in texts
    assert "stopped 2026-11-26 04:54:22.785495 UTC on host1" in texts
    assert "runs 2026-11-26 04:54:23.413749 UTC on host2" in texts


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = whole_page(line())
    assert re.findall(r"""<(?:script|link|img|iframe|object)|\b(?:src|href|on\w+)=|url\(|@import""", page) == []
    assert set(re.findall(r"\w+://[^'\"\s]+", page)) == {"http://www.w3.org/2000/svg"}


def test_a_name_is_text_and_never_markup() -> None:
    hostile = "<script>alert(1)</script>&'\""
    answer = ANSWER | {
        "error-desc": hostile,
        "phases": [{"name": hostile, "start-ms": 0, "ms": 5}],
        "destination": {"phases": [{"name": hostile, "start-ms": 0, "ms": 5}]},
    }
    page = whole_page(report.timeline(answer, machine=hostile, uri=hostile, hosts=(hostile, hostile)))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "failed", "error-desc": "tcp:192.0.2.2:4444: ECONNREFUSED: nobody listens there"},
        {"status": "cancelled", "total-time": 1200, "setup-time": 30, "rounds": ANSWER["rounds"][:1]},
        {"status": "completed", "total-time": 0, "blackout-ms": 0, "phases": [{"name": "x", "start-ms": 0, "ms": 0}]},
    ],
    ids=["failed at once", "cancelled in the first round", "all zero"],
)
def test_one_that_came_to_nothing_is_drawn_as_far_as_it_went(answer: dict[str, Any]) -> None:
    told = report.timeline(answer, machine="web1", uri="tcp:192.0.2.2:4444")
    assert answer["status"] in " ".join(drawn(told).itertext())
    assert answer.get("error-desc", "") in whole_page(told)


def test_an_answer_that_makes_no_sense_is_refused_with_its_field() -> None:
    with pytest.raises(ValueError, match=r"query-migrate: .*rounds"):
        line(rounds=[{"number": "first"}])


TIMES: Final = st.floats(min_value=0, max_value=1e7)
PHASES: Final = st.lists(
    st.fixed_dictionaries({"name": st.text(max_size=12), "start-ms": TIMES, "ms": TIMES}), max_size=12
)


@given(PHASES, PHASES, TIMES, TIMES)
def test_bars_and_names_of_one_row_never_lie_on_each_other(
    here: list[Any], there: list[Any], stopped: float, blackout: float
) -> None:
    answer = {"phases": here, "destination": {"phases": there}, "stopped-ms": stopped, "blackout-ms": blackout}
    root = drawn(report.timeline(answer, machine="web1", uri="x"))
    bars = [element for element in root.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None]
    rows: dict[str, list[tuple[float, float]]] = {}
    for bar in bars:
        begin = float(bar.get("x", ""))
        rows.setdefault(bar.get("y", ""), []).append((begin, begin + float(bar.get("width", ""))))
    for extents in rows.values():
        ordered = sorted(extents)
        assert all(last <= first for (_, last), (first, _) in pairwise(ordered))
    assert all(canvas.LEFT - 1 <= begin <= end <= canvas.WIDTH for row in rows.values() for begin, end in row)


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_an_axis_has_a_handful_of_round_ticks(length: float) -> None:
    found = canvas.ticks(length)
    assert 4 <= len(found) <= canvas.TICKS + 1
    assert found[0] == 0
    assert found[-1] <= length * (1 + 1e-9)
