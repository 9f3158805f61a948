"""`kvmpy migrate`, against a monitor that answers as it is told: what it asks, shows, writes and returns."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.cli.main import main
from kvmpy.cli.move import BLOCKED, CANCELLED, UNKNOWN
from kvmpy.cli.primaries import awaited
from kvmpy.cli.progress import Lines, figures, progress, share_done
from tests.fakes.loop import BOUND
from tests.fakes.qmp import FakeMonitor, Refusal

ANSWER: Final[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fakes" / "migration_answer.json").read_text())
SOME: Final = {"remaining": 64 << 20, "dirty-sync-count": 2, "dirty-pages-rate": 8900, "mbps": 980.5}
ACTIVE: Final[dict[str, Any]] = ANSWER | {"status": "active", "ram": ANSWER["ram"] | SOME, "expected-downtime": 110}
URI: Final = "tcp:192.0.2.2:4444"

BEFORE = {
    "max-bandwidth": 0,
    "downtime-limit": 300,
    "multifd-channels": 2,
    "multifd-compression": "none",
    "tls-creds": "",
    "x-timeout": 10.0,
    "x-insecure": False,
    "x-on-no-convergence": "continue",
}


class Source(FakeMonitor):
    """A machine whose migration goes as ``answers`` say, the last for ever, and that is ``after`` then."""

    def __init__(self) -> None:
        super().__init__("web1", {"query-migrate": self._migration, "query-status": self._status})
        self.answers: list[dict[str, Any]] = [ANSWER]
        self.after = "running"
        self.cancelled = False
        self.handlers["migrate_cancel"] = self._cancel
        self.handlers["query-migrate-parameters"] = lambda _: BEFORE
        self.handlers["query-migrate-capabilities"] = lambda _: [{"capability": "multifd", "state": False}]

    def _migration(self, _: object) -> dict[str, Any]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def _status(self, _: object) -> dict[str, Any]:
        return {"status": self.after if self.is_asked("migrate") else "running", "running": True}

    def _cancel(self, _: object) -> dict[str, Any]:
        self.answers = [{"status": "cancelling"}, {"status": "cancelled"}]
        return {}

    def is_asked(self, command: str) -> bool:
        return command in self.commands()

    def arguments(self, command: str) -> dict[str, Any]:
        return next(arguments for asked, arguments in self.asked if asked == command)

    def last_arguments(self, command: str) -> dict[str, Any]:
        return [arguments for asked, arguments in self.asked if asked == command][-1]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("kvmpy.cli.move.POLL_SECONDS", 0.01)
    with Source() as source:
        yield source


def test_a_migration_is_followed_to_its_end_and_the_source_ended(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source.answers = [{"status": "setup"}, ACTIVE, ANSWER]
    assert main(["migrate", "web1", URI]) == 0
    assert source.arguments("migrate") == {"uri": URI}
    assert source.commands()[-1] == "quit"
    shown = capsys.readouterr().err
    assert "web1: active: round 2, 64.0 MiB to go, 116.9 MiB/s, dirtied 34.8 MiB/s, downtime would be 110 ms" in shown
    assert "web1: migrated in 20.8 s; the guest stood still for 628.3 ms" in shown


def test_the_source_is_kept_where_that_is_wanted(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "web1", URI, "--keep"]) == 0
    assert not source.is_asked("quit")
    assert "kvmpy stop web1 ends it" in capsys.readouterr().err


def test_options_become_parameters_and_what_is_not_said_is_left_alone(source: Source) -> None:
    options = ["--max-bandwidth", "100MiB", "--downtime-limit", "50", "--channels", "4", "--compression", "zstd"]
    more = ["--tls-creds", "/etc/kvmpy", "--insecure", "--on-no-convergence", "cancel", "--timeout", "5"]
    assert main(["migrate", "web1", URI, *options, *more]) == 0
    assert source.arguments("migrate-set-parameters") == {
        "max-bandwidth": 100 << 20,
        "downtime-limit": 50,
        "multifd-channels": 4,
        "multifd-compression": "zstd",
        "tls-creds": "/etc/kvmpy",
        "x-timeout": 5.0,
        "x-insecure": True,
        "x-on-no-convergence": "cancel",
    }
    assert source.arguments("migrate-set-capabilities") == {"capabilities": [{"capability": "multifd", "state": True}]}


def test_options_are_for_one_migration(source: Source) -> None:
    source.answers = [{"status": "failed", "error-desc": "cut off"}]
    assert main(["migrate", "web1", URI, "--insecure", "--channels", "4"]) == 1
    assert source.arguments("migrate-set-parameters") == {"multifd-channels": 4, "x-insecure": True}
    assert source.last_arguments("migrate-set-parameters") == {"multifd-channels": 2, "x-insecure": False}
    multifd = {"capability": "multifd", "state": False}
    assert source.last_arguments("migrate-set-capabilities") == {"capabilities": [multifd]}


def test_without_options_no_parameter_is_touched(source: Source) -> None:
    assert main(["migrate", "web1", URI]) == 0
    assert not source.is_asked("migrate-set-parameters")


def test_one_that_failed_says_why_and_that_the_guest_is_back(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source.answers = [ACTIVE, {"status": "failed", "error-desc": "cut off", "problems": ["cpu: no avx2", "disk vd1"]}]
    assert main(["migrate", "web1", URI]) == 1
    said = capsys.readouterr().err
    assert "web1: migration failed: cut off; the guest is here, and running" in said
    assert "web1: cpu: no avx2\n" in said
    assert not source.is_asked("quit")


def test_one_that_failed_and_left_the_guest_paused_says_why(
    source: Source, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpy.cli.move.RETURN_SECONDS", 0.05)
    source.after = "paused"
    source.answers = [{"status": "failed", "error-desc": "cut off; and the guest stays paused here: disk0: EAGAIN"}]
    assert main(["migrate", "web1", URI]) == 1
    said = capsys.readouterr().err
    assert "web1: migration failed: cut off; and the guest stays paused here: disk0: EAGAIN; web1: is paused" in said


def test_a_reason_that_is_the_only_problem_is_said_once(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    why = "device hostdev0: a passed-through device cannot be migrated"
    source.answers = [{"status": "failed", "error-desc": why, "problems": [why]}]
    assert main(["migrate", "web1", URI]) == 1
    assert capsys.readouterr().err.count(why) == 1


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("cancelled", CANCELLED)])
def test_one_that_came_to_nothing_says_what_became_of_each_primary(
    source: Source, capsys: pytest.CaptureFixture[str], status: str, code: int
) -> None:
    source.answers = [ACTIVE, {"status": status, "primaries": ["hostdev0 is plugged in again", "hostdev1 is no more"]}]
    assert main(["migrate", "web1", URI]) == code
    said = capsys.readouterr().err
    assert "web1: hostdev0 is plugged in again\nkvmpy: web1: hostdev1 is no more\n" in said


def test_a_refusal_is_the_machines_own_words(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: object) -> None:
        raise Refusal("a migration is under way")

    source.handlers["migrate"] = refuse
    assert main(["migrate", "web1", URI]) == 1
    assert "web1: migrate: a migration is under way" in capsys.readouterr().err


def test_an_outcome_that_nobody_knows_is_an_exit_code_of_its_own_and_resumes_nothing(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source.answers, source.after = [{"status": "failed", "error-desc": "outcome unknown: it may run there"}], "paused"
    assert main(["migrate", "web1", URI]) == UNKNOWN
    assert "kvmpy resume --force web1" in capsys.readouterr().err
    assert not source.is_asked("cont")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_waits_until_the_guest_runs_here_again(
    source: Source, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    states = ["running", "finish-migrate", "finish-migrate", "running"]
    before = signal.signal(number, signal.default_int_handler)  # one that is ignored stays so, as in the background

    def migration(arguments: dict[str, Any]) -> dict[str, Any]:
        if not source.is_asked("migrate_cancel"):
            os.kill(os.getpid(), number)
            source.handlers["query-migrate"] = source._migration
            return ACTIVE
        return source._migration(arguments)

    source.answers = [ACTIVE]
    source.handlers["query-migrate"] = migration
    source.handlers["query-status"] = lambda _: {"status": states.pop(0)}
    try:
        assert main(["migrate", "web1", URI]) == CANCELLED
    finally:
        signal.signal(number, before)
    assert states == []
    assert source.commands().count("migrate_cancel") == 1
    assert "cancelled; the guest is here, and running" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_and_leaves_parameters_and_terminal_as_they_were(
    source: Source, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the machine answers nothing any more in that session."""
    ended = threading.Event()

    def migration(_: object) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        return ACTIVE

    def cancel(_: object) -> None:
        os.kill(os.getpid(), number)
        assert ended.wait(BOUND)
        raise Refusal("it is too late")

    source.handlers |= {"query-migrate": migration, "migrate_cancel": cancel}
    before = [signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)]
    ours, theirs = os.openpty()
    try:
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr("sys.stderr", terminal)
            with pytest.raises(SystemExit) as exit_:
                main(["migrate", "web1", URI, "--insecure"])
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
        ended.set()
    assert exit_.value.code == 128 + number
    assert source.last_arguments("migrate-set-parameters") == {"x-insecure": False}
    drawn = everything(ours)
    hidden, shown = (drawn.rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert 0 <= hidden < shown, "the cursor"


def test_cancelling_from_elsewhere_waits_for_the_end(source: Source) -> None:
    source.answers = [ACTIVE]
    assert main(["migrate", "web1", "--cancel"]) == 0
    assert source.is_asked("migrate_cancel")
    assert source.answers == [{"status": "cancelled"}]


def test_nothing_can_be_cancelled_where_nothing_is_under_way(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", "web1", "--cancel"]) == 1
    assert "no migration is under way" in capsys.readouterr().err
    assert not source.is_asked("migrate_cancel")


def test_a_dry_run_lists_everything_in_the_way_of_both_sides(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = ["drive[0]: cache = writeback", "cpu: the destination has no avx2"]
    source.handlers["x-migrate-check"] = lambda _: {"problems": problems, "warnings": []}
    assert main(["migrate", "web1", URI, "--dry-run"]) == BLOCKED
    assert capsys.readouterr().out.splitlines() == problems
    assert not source.is_asked("migrate")


def test_a_dry_run_with_nothing_in_the_way_is_a_success(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.handlers["x-migrate-check"] = lambda _: {"problems": [], "warnings": ["boot.kernel: not the same"]}
    assert main(["migrate", "web1", URI, "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "warning: boot.kernel: not the same" in told
    assert f"web1 can migrate to {URI}" in told


def test_after_a_dry_run_the_machines_parameters_are_as_before(source: Source) -> None:
    before = {"downtime-limit": 300, "multifd-channels": 2, "max-bandwidth": 0}
    multifd = {"capability": "multifd", "state": True}
    source.handlers["query-migrate-parameters"] = lambda _: before
    source.handlers["query-migrate-capabilities"] = lambda _: [multifd, {"capability": "events", "state": True}]
    source.handlers["x-migrate-check"] = lambda _: {"problems": ["no"], "warnings": []}
    assert main(["migrate", "web1", URI, "--dry-run", "--downtime-limit", "50", "--channels", "4"]) == BLOCKED
    said = [arguments for command, arguments in source.asked if command.startswith("migrate-set")]
    assert said == [
        {"downtime-limit": 50, "multifd-channels": 4},
        {"capabilities": [multifd]},
        {"downtime-limit": 300, "multifd-channels": 2},
        {"capabilities": [multifd]},
    ]


def test_after_a_dry_run_that_is_refused_halfway_the_machines_parameters_are_as_before(source: Source) -> None:
    def refuse(_: object) -> None:
        raise Refusal("There's a migration process in progress")

    source.handlers["query-migrate-parameters"] = lambda _: {"downtime-limit": 300, "multifd-channels": 2}
    source.handlers["query-migrate-capabilities"] = lambda _: [{"capability": "multifd", "state": True}]
    source.handlers["migrate-set-capabilities"] = refuse
    assert main(["migrate", "web1", URI, "--dry-run", "--downtime-limit", "50", "--channels", "4"]) == 1
    said = [arguments for command, arguments in source.asked if command == "migrate-set-parameters"]
    assert said[-1] == {"downtime-limit": 300, "multifd-channels": 2}


def test_reports_are_written_in_the_forms_of_their_names_also_of_one_that_failed(
    source: Source, tmp_path: Path
) -> None:
    source.answers = [{"status": "failed", "error-desc": "cut off"}]
    files = [tmp_path / name for name in ("a.html", "a.svg", "a.json")]
    assert main(["migrate", "web1", URI, *(word for file in files for word in ("--report", str(file)))]) == 1
    html, svg, told = (file.read_text() for file in files)
    assert html.startswith("<!DOCTYPE html>")
    assert svg.startswith("<svg ")
    assert json.loads(told)["error"] == "cut off"


@pytest.mark.parametrize("kind", ["html", "svg", "json"])
@pytest.mark.parametrize("error", ["", "unix:/\udcff: ECONNREFUSED"])
def test_a_path_that_is_no_text_is_in_the_reports_as_it_is_shown(
    source: Source, tmp_path: Path, kind: str, error: str
) -> None:
    report = tmp_path / f"report.{kind}"
    source.answers = [ANSWER | ({"status": "failed", "error-desc": error} if error else {})]
    assert main(["migrate", "web1", "unix:/\udcff", "--report", str(report)]) == bool(error)
    assert "unix:/" in report.read_text()


@pytest.mark.parametrize(
    ("report", "code", "says"),
    [("report.txt", 2, "expected a name that ends in .html"), ("nowhere/report.html", 1, "ENOENT")],
)
def test_a_report_that_cannot_be_written_is_found_out_before_anything_moves(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str, code: int, says: str
) -> None:
    assert main(["migrate", "web1", URI, "--report", str(tmp_path / report)]) == code
    assert says in capsys.readouterr().err
    assert not source.is_asked("migrate")


@pytest.mark.parametrize("words", [["web1"], ["web1", URI, "--cancel"]])
def test_it_takes_a_uri_or_cancels(source: Source, words: list[str]) -> None:
    assert main(["migrate", *words]) == 2
    assert source.asked == []


def test_a_path_is_meant_from_where_the_command_is_typed(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["migrate", "web1", "unix:there.sock"]) == 0
    assert source.arguments("migrate") == {"uri": f"unix:{tmp_path}/there.sock"}


def test_a_machine_is_saved_into_a_new_file_and_ended(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["save", "web1", str(tmp_path / "web1.state")]) == 0
    assert f"to go on from there: kvmpy run CONFIG --incoming file:{tmp_path}/web1.state" in capsys.readouterr().err
    assert source.arguments("migrate") == {"uri": f"file:{tmp_path}/web1.state"}
    assert source.is_asked("quit")


def test_no_file_is_overwritten(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "web1.state").write_text("dear")
    assert main(["save", "web1", str(tmp_path / "web1.state")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert source.asked == []


def test_a_name_that_the_machine_would_take_for_a_place_in_a_file_is_none(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web1.state").write_text("dear")
    assert main(["save", "web1", "web1.state,offset=1"]) == 2
    assert "web1.state,offset=1: ,offset= is" in capsys.readouterr().err
    assert source.asked == []


def test_lines_come_for_each_round_and_not_for_each_answer(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("web1")
    for remaining in (300, 200, 100):
        lines.show({"status": "active", "ram": {"dirty-sync-count": 1, "remaining": remaining << 20}})
    lines.show({"status": "active", "ram": {"dirty-sync-count": 2, "remaining": 100 << 20}})
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["kvmpy: web1: active: round 1, 300.0 MiB to go", "kvmpy: web1: active: round 2, 100.0 MiB to go"]


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ({"status": "setup"}, 0.0),
        (ACTIVE, 0.75),
        ({"status": "active", "ram": {"total": 100, "remaining": 200}}, 0.0),
        (ANSWER, 1.0),
    ],
)
def test_a_bar_is_as_long_as_what_is_there_already(answer: dict[str, Any], share: float) -> None:
    assert share_done(answer) == share


def test_a_guest_that_writes_too_fast_is_said_to() -> None:
    assert figures({"cpu-throttle-percentage": 30, "not-converging": "it writes 90 MiB/s"}).endswith(
        "vCPUs slowed down by 30 %, it writes 90 MiB/s"
    )


def test_r54_that_the_destination_is_not_done_with_its_primaries_is_said() -> None:
    words = "the destination is still preparing its primaries"
    assert words in figures(ACTIVE | {"preparing": True})
    assert words not in figures(ACTIVE)


def test_what_slows_it_down_is_said_once() -> None:
    said = "it writes 90 MiB/s; its vCPUs sleep 30 % of the time"
    assert figures({"status": "active", "cpu-throttle-percentage": 30, "not-converging": said}) == said


SECOND: Final = 10**9


def asked(seconds: float, event: str, name: str) -> dict[str, Any]:
    stamp = {"seconds": int(seconds), "microseconds": round(seconds % 1 * 1e6)}
    return {"event": event, "timestamp": stamp, "data": {"device-id": name}}


def test_who_is_waited_for_and_how_long_follows_from_what_the_machine_told() -> None:
    told = [asked(10, "UNPLUG_PRIMARY", "hostdev0"), asked(10.5, "UNPLUG_PRIMARY", "hostdev1")]
    assert awaited(told, 13 * SECOND) == {"hostdev0": 3.0, "hostdev1": 2.5}
    told.append(asked(16, "FAILOVER_PRIMARY_RELEASED", "hostdev0"))
    assert awaited(told, 17 * SECOND) == {"hostdev1": 6.5}
    assert awaited([{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 0}}], 0) == {}


@pytest.mark.parametrize(
    ("status", "ids", "words"),
    [
        ("wait-unplug", {"hostdev0": 3.2}, "waiting for the guest to let hostdev0 go, 3 s"),
        ("wait-unplug", {"a": 3.2, "b": 2, "c": 1}, "waiting for the guest to let a, b and c go, 3 s"),
        ("cancelling", {"hostdev0": 3.2}, "the guest is to keep hostdev0"),
        ("wait-unplug", {}, ""),
        ("active", {"hostdev0": 3.2}, "64.0 MiB to go"),
    ],
)
def test_a_person_is_told_what_is_waited_for(status: str, ids: dict[str, float], words: str) -> None:
    assert figures({"status": status, "awaited": ids, "ram": {"remaining": 64 << 20}}) == words


def test_the_wait_for_a_primary_is_shown_while_it_lasts(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    def migration(arguments: dict[str, Any]) -> dict[str, Any]:
        if source.commands().count("query-migrate") == 1:
            source.emit_at(time.time_ns() - 3 * SECOND, "UNPLUG_PRIMARY", **{"device-id": "hostdev0"})
        if source.commands().count("query-migrate") == 3:
            source.emit("FAILOVER_PRIMARY_RELEASED", device_id="hostdev0", standby_id="net1")
        return source._migration(arguments)

    source.handlers["query-migrate"] = migration
    source.answers = [{"status": "setup"}, {"status": "wait-unplug"}, {"status": "wait-unplug"}, ACTIVE, ANSWER]
    assert main(["migrate", "web1", URI]) == 0
    shown = capsys.readouterr().err
    assert "web1: wait-unplug: waiting for the guest to let hostdev0 go, 3 s\n" in shown
    assert "web1: active: round 2" in shown


def test_where_nobody_looks_there_are_lines_and_no_bar() -> None:
    assert isinstance(progress("web1", plain=False), Lines)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        shown = progress("web1", plain=False)
        shown.show(ACTIVE)
        shown.close()
    drawn = everything(ours)
    assert "web1 active" in drawn
    assert "━" in drawn


def everything(terminal: int) -> str:
    """What was written on it before its other end was closed."""
    drawn = b""
    with suppress(OSError):  # EIO, at the end
        while piece := os.read(terminal, 1 << 16):
            drawn += piece
    os.close(terminal)
    return drawn.decode()


def test_without_rich_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setitem(sys.modules, "rich.progress", None)
        assert isinstance(progress("web1", plain=False), Lines)
    os.close(ours)
