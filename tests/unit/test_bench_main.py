"""A run says what it is: what was measured, what was left out, and what has failed. Nothing is measured here."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import exits, hotplug, linux_memory, results
from bench.rows import Pair, Row


def fails(quick: bool) -> list[Row]:
    raise RuntimeError("broken")


def warns(quick: bool) -> list[Row]:
    logging.getLogger("bench.exits").warning("exits: instructions are left out: no perf")
    return [Pair("exits: PIO write", [1.0], [2.0], budget="exit").row()]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the results go, of programs that are not run."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "without_kvm", lambda programs: {})
    monkeypatch.setattr(exits, "measure", warns)
    monkeypatch.setattr(hotplug, "measure", fails)
    monkeypatch.setattr(linux_memory, "measure", lambda quick: [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return tmp_path


def test_a_program_that_fails_is_told_of_and_the_others_rows_are_kept(directory: Path) -> None:
    assert bench.main(["--only", "hotplug", "--only", "exits"]) == 1
    assert [row["name"] for row in json.loads((directory / "part/latest.json").read_text())] == ["exits: PIO write"]
    known = json.loads((directory / "part/facts.json").read_text())
    assert (known["run"], known["FAILED"]) == ("hotplug, exits", "hotplug")
    assert "FAILED" in (directory / "part/index.html").read_text()


def test_what_a_program_has_left_out_is_in_the_results(directory: Path) -> None:
    assert bench.main(["--only", "exits"]) == 0
    known = json.loads((directory / "part/facts.json").read_text())
    assert known["left out"] == "exits: instructions are left out: no perf"
    assert "no perf" in (directory / "part/latest.txt").read_text()


def test_a_quick_run_says_what_it_leaves_out_and_replaces_nothing(directory: Path) -> None:
    assert bench.main(["--quick", "--only", "linux_memory"]) == 0
    known = json.loads((directory / "quick/facts.json").read_text())
    assert (known["run"], known["left out"]) == ("linux_memory (quick)", "memory beside Linux guests")
    assert not (directory / "latest.json").exists()


def test_what_needs_kvm_is_told_of_where_there_is_none(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "without_kvm", lambda programs: {"exits": "/dev/kvm: ENOENT"})
    assert bench.main(["--only", "exits", "--only", "linux_memory"]) == 1
    assert json.loads((directory / "part/facts.json").read_text())["FAILED"] == "exits"
