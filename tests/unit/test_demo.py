"""What `make demo` tells of a migration in words, and a report that is drawn anew with somebody's pings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmpy.migration import report
from scripts.demo import story
from scripts.draw_migration import main
from tests.unit.test_migration_pairs import CANCELLED, SOURCE_SAID, pinger, told


def test_the_story_is_told_in_the_order_in_which_it_happened() -> None:
    lines = list(story(told()))
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)
    words = [line.strip().partition("  ")[2] for line in lines]
    assert words == [
        "the guest is asked to let hostdev0 go",
        "its frames take the standby",
        "it has let hostdev0 go; now its memory is sent",
        "it stands still",
        "it runs there: the blackout was 628 ms",
        "its frames take the primary",
        "it has the other host's NIC, hostdev0 there, in use",
    ]


def test_one_that_came_to_nothing_is_told_as_far_as_it_went() -> None:
    assert [line.split()[-3:] for line in story(told(SOURCE_SAID[:3], None, **CANCELLED))] == [
        ["let", "hostdev0", "go"]
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "there.json").write_bytes(report.to_json(told()))
    (tmp_path / "pings").write_text("\n".join(pinger(50, 51)))
    return tmp_path


def test_a_report_is_drawn_anew_with_pings(written: Path) -> None:
    pictures = [str(written / f"new.{kind}") for kind in ("svg", "html", "json")]
    assert main([str(written / "there.json"), "--pings", str(written / "pings"), *pictures]) == 0
    assert "2 of 200 pings lost" in (written / "new.svg").read_text()
    assert "2 of 200 pings lost" in (written / "new.html").read_text()
    assert len(json.loads((written / "new.json").read_text())["pings"]["lost-ms"]) == 2
    assert main([str(written / "there.json"), pictures[0]]) == 0
    assert "pings" not in (written / "new.svg").read_text()


def test_what_cannot_be_drawn_is_said(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(written / "new.svg")
    assert main([str(written / "nowhere.json"), new]) == 1
    assert main([str(written / "pings"), new]) == 1
    assert "no report of a migration" in capsys.readouterr().err
    (written / "there.json").write_bytes(report.to_json(told(SOURCE_SAID, None, **CANCELLED)))
    assert main([str(written / "there.json"), "--pings", str(written / "pings"), new]) == 1
    assert "no place for pings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(written / "there.json"), str(written / "new.png")])
