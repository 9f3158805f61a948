"""Ratios, verdicts and the table of bench/. Nothing is measured here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import results
from bench.figures import Curves, distribution
from bench.rows import MET, MISSED, Pair, Row, alternately, quotient, spread


def test_a_ratio_is_the_median_of_the_pairs_and_has_their_spread() -> None:
    row = Pair("exits: PIO write", [1.0, 2.0, 9.0], [1.0, 4.0, 6.0], budget="exit").row()
    assert (row.kvmpy, row.peer, row.ratio) == (2.0, 4.0, 1.0)
    assert row.spread == (0.75, 1.25)
    assert row.samples == {"kvmpy": [1.0, 2.0, 9.0], "QEMU": [1.0, 4.0, 6.0]}


@pytest.mark.parametrize(
    ("budget", "ours", "verdict"),
    [
        ("exit", 1.25, "met"),
        ("exit", 1.26, "missed"),
        ("network rate", 0.95, "met"),
        ("network rate", 0.94, "missed"),
        (None, 100.0, "-"),
        ("exit", math.nan, "missed"),
        ("network rate", math.nan, "missed"),
    ],
)
def test_a_verdict_is_what_the_budget_says_of_the_ratio(budget: str | None, ours: float, verdict: str) -> None:
    assert Pair("a", [ours], [1.0], budget=budget).row().verdict == verdict


def test_a_pair_that_failed_is_not_outvoted() -> None:
    row = Pair("x", [math.nan, 1.0, 1.0], [2.0, 2.0, 2.0], budget="start").row()
    assert math.isnan(row.ratio)
    assert row.verdict == MISSED


@pytest.mark.parametrize(
    ("ours", "note"),
    [([0.5], "one pair"), ([0.5, 0.5, 1.5, 1.5], "undecided: the quartiles lie on both sides"), ([0.5, 0.6, 0.7], "")],
)
def test_a_verdict_that_another_run_might_turn_round_says_so(ours: list[float], note: str) -> None:
    assert Pair("x", ours, [1.0] * len(ours), budget="start").row().note == note
    assert Pair("x", ours, [1.0] * len(ours)).row().note == ""


def test_what_was_not_measured_is_no_row() -> None:
    with pytest.raises(ValueError, match="start: nothing was measured"):
        Pair("start", [], [1.0]).row()


def test_a_run_without_its_pair_is_no_row() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Pair("start", [1.0, 2.0], [1.0]).row()


def test_a_budget_is_not_met_where_neither_did_anything() -> None:
    row = Pair("TCP", [0.0, 0.0], [0.0, 0.0], budget="network rate").row()
    assert (row.verdict, row.note) == (MISSED, "nothing was measured")
    assert Pair("exits", [0.0], [100.0], budget="network exits").row().verdict == MET


def test_a_single_run_has_no_spread() -> None:
    assert Pair("start", [1.0], [2.0]).row().spread is None
    assert spread([3.0]) is None


def test_nothing_beside_nothing_is_the_same_and_something_beside_nothing_is_no_ratio() -> None:
    assert quotient(0.0, 0.0) == 1.0
    assert math.isnan(quotient(1.0, 0.0))


def test_ways_take_turns_and_neither_is_always_first() -> None:
    order: list[str] = []

    def way(name: str, value: float) -> dict[str, float]:
        order.append(name)
        return {"seconds": value, "bytes": 2 * value}

    found = alternately({"kvmpy": lambda: way("kvmpy", 1.0), "QEMU": lambda: way("QEMU", 2.0)}, 3)
    assert order == ["kvmpy", "QEMU", "QEMU", "kvmpy", "kvmpy", "QEMU"]
    assert found == {
        "kvmpy": {"seconds": [1.0] * 3, "bytes": [2.0] * 3},
        "QEMU": {"seconds": [2.0] * 3, "bytes": [4.0] * 3},
    }


def test_results_are_a_list_of_rows_with_their_verdicts_and_the_same_as_a_table(tmp_path: Path) -> None:
    curves = Curves("latency", "us", "%", {"kvmpy": [(1.0, 50.0)]}, log_x=True)
    rows = [
        Pair("exits: PIO write", [14e-6], [13e-6], budget="exit", figure=curves).row(),
        Pair("migration: rate", [2.0 * 2**30], [4.0 * 2**30], "B/s", "migration rate", note="1 channel").row(),
    ]
    results.write(rows, {"kernel": "Linux 6.1"}, tmp_path / "results")
    said = json.loads((tmp_path / "results" / "latest.json").read_text())
    assert [(row["name"], row["budget"], row["verdict"]) for row in said] == [
        ("exits: PIO write", 1.25, "met"),
        ("migration: rate", 1.0, "missed"),
    ]
    assert {"kvmpy", "peer", "ratio"} <= said[0].keys()
    text = (tmp_path / "results" / "latest.txt").read_text()
    assert "kernel:    Linux 6.1" in text
    assert "14 us        13 us   1.077                  <= 1.25  met" in text
    assert "2 GiB/s      4 GiB/s   0.500                     >= 1  missed  1 channel" in text
    assert json.loads((tmp_path / "results" / "figures.json").read_text()) == {
        "exits: PIO write": {
            "type": "curves",
            "title": "latency",
            "x": "us",
            "y": "%",
            "lines": {"kvmpy": [[1.0, 50.0]]},
            "log_x": True,
        }
    }


def test_what_is_no_number_is_null_in_json() -> None:
    row = Row(name="a", kvmpy=math.nan, peer=1.0, ratio=math.nan, unit="s")
    assert results.as_json(row)["ratio"] is None


def test_a_distribution_ends_with_the_longest_and_counts_all() -> None:
    points = distribution([float(n) for n in range(10_000)])
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (9999.0, 100.0)
    assert all(abs(value / 100 - share) < 0.02 for value, share in points)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.5, "s", "1.5 s"),
        (0.0123, "s", "12.3 ms"),
        (0.0, "s", "0 s"),
        (2.5 * 2**20, "B/s", "2.5 MiB/s"),
        (47.26, "MiB", "47.26 MiB"),
        (1234.0, "s", "1234 s"),
        (3.0, "", "3"),
    ],
)
def test_a_figure_is_said_in_a_unit_that_fits(value: float, unit: str, text: str) -> None:
    assert results.figure(value, unit) == text
