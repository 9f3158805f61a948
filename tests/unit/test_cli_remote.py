"""`kvmpy migrate NAME ssh://HOST`, with a stand-in for ssh that runs the far end here."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.cli.main import main
from kvmpy.cli.move import BLOCKED, UNKNOWN
from kvmpy.cli.remote import Remote, parse
from kvmpy.errors import ConfigError, HostError
from tests.fakes.qmp import FakeMonitor

CONFIG: Final = {"name": "web1", "boot": {"kernel": "/vmlinuz"}}

# In place of ssh: notes its arguments, then answers each question with the next line of the file "answers".
SSH: Final = """
import json, pathlib, sys
here = pathlib.Path(sys.argv[1])
here.joinpath("arguments").write_text(json.dumps(sys.argv[2:]))
answers = here.joinpath("answers").read_text().splitlines()
with here.joinpath("asked").open("a") as asked:
    for question, answer in zip(sys.stdin, answers):
        asked.write(question)
        asked.flush()
        print(answer, flush=True)
    print("end", file=asked)
sys.exit(7)
"""


class Session:
    """The stand-in's side."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program = directory / "ssh.py"
        program.write_text(SSH)
        (directory / "asked").write_text("")
        self.command = shlex.join([sys.executable, str(program), str(directory)])

    def answer(self, *answers: dict[str, Any]) -> None:
        """What is answered to one question after the other; to one too many the session ends."""
        (self.directory / "answers").write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))

    def asked(self) -> list[Any]:
        lines = (self.directory / "asked").read_text().splitlines()
        return [line if line == "end" else json.loads(line) for line in lines]

    def arguments(self) -> list[str]:
        arguments: list[str] = json.loads((self.directory / "arguments").read_text())
        return arguments


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


STARTED: Final = {"pid": 7, "said": "kvmpy: web1: process 7"}
UNHEARD: Final = {"status": "failed", "error-desc": "outcome unknown: destination may be running"}


class Source(FakeMonitor):
    """A machine whose migration ends as ``answer`` says."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        super().__init__(
            "web1",
            {
                "query-name": lambda _: {"name": "web1"},
                "query-config": lambda _: {"config": CONFIG},
                "query-status": lambda _: {"status": self._status()},
                "query-migrate": lambda _: self.answer,
                "x-migrate-check": lambda _: {"problems": ["cpu: no avx2"], "warnings": []},
            },
        )

    def _status(self) -> str:
        unheard = self.answer is UNHEARD and "migrate" in self.commands() and "cont" not in self.commands()
        return "paused" if unheard else "running"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    with Source({"status": "completed", "total-time": 1000, "blackout-ms": 50}) as source:
        yield source


def migrate(session: Session, *options: str) -> int:
    return main(["migrate", "web1", "ssh://root@host2:2222", "--ssh", session.command, *options])


def test_the_destination_is_started_with_the_machines_configuration_and_the_stream_forwarded(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answer(STARTED, {"status": "running"})
    assert migrate(session, "--set", "machine.reserve=true") == 0
    start, outcome, end = session.asked()
    directory = start["start"].pop("directory")
    assert start == {"start": {"name": "web1", "config": CONFIG, "file": None, "overrides": ["machine.reserve=true"]}}
    assert "outcome" in outcome
    assert end == "end"
    arguments = session.arguments()
    assert arguments[-6:] == ["-p", "2222", "-l", "root", "host2", "kvmpy receive"]
    here, _, there = arguments[arguments.index("-L") + 1].partition(":")
    assert there == f"{directory}/stream.sock"
    assert dict(source.asked)["migrate"] == {"uri": f"unix:{here}"}
    assert not Path(here).parent.exists()
    assert "ssh://root@host2:2222: the guest is running there" in capsys.readouterr().err
    assert "quit" in source.commands()


UNPLUG: Final = {"device-id": "hostdev0"}
BACK: Final = {
    "standby-id": "net1",
    "primary-id": "hostdev0",
    "state": "plugged",
    "path": "primary",
    "negotiated": True,
}
PLUGGED: Final = {
    "event": "FAILOVER_PRIMARY_PLUGGED",
    "timestamp": {"seconds": 1002, "microseconds": 300000},
    "data": {"device-id": "hostdev0", "standby-id": "net1"},
}


def with_a_primary(source: Source) -> None:
    """Its guest is asked for one."""

    def migration(_: object) -> dict[str, Any]:
        if source.commands().count("query-migrate") == 1:
            source.emit_at(990 * 10**9, "UNPLUG_PRIMARY", **UNPLUG)
        return source.answer

    source.handlers["query-migrate"] = migration
    there = {"phases": [], "first-run-ns": 1000 * 10**9, "first-run-ms": 9000}
    source.answer = source.answer | {"stopped-ms": 950, "stopped-ns": 1000 * 10**9 - 50 * 10**6, "destination": there}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (BACK, "the guest has hostdev0 in use, 2.3 s after it ran; its frames take it"),
        (BACK | {"path": "standby"}, "in use, 2.3 s after it ran; its frames still take net1"),
        (BACK | {"state": "failed", "error": "no power"}, "hostdev0 is failed: no power; the guest goes on over net1"),
        (BACK | {"primary-id": None, "state": "no-primary"}, "there is no primary for net1"),
    ],
)
def test_the_guests_primary_is_waited_for_over_there_and_what_became_of_it_is_said(
    source: Source, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: Any, words: str
) -> None:
    with_a_primary(source)
    session.answer(STARTED, {"pairs": [pair], "events": [PLUGGED]}, {"status": "running"})
    report = tmp_path / "report.json"
    assert migrate(session, "--report", str(report)) == 0
    _, primaries, _, _ = session.asked()
    assert primaries == {"primaries": 60.0}
    said = capsys.readouterr().err
    assert "the guest runs there; waiting for it to take hostdev0 into use" in said
    assert words in said
    out, back = json.loads(report.read_text())["waits"]
    assert (out["side"], back["side"], back["outcome"]) == ("source", "destination", "in use")
    assert back["end-ms"] - back["start-ms"] == pytest.approx(2300)


def test_a_far_end_that_knows_nothing_of_primaries_costs_no_more_than_the_knowledge(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_primary(source)
    session.answer(STARTED, {"error": "this version does not know what was asked"}, {"status": "running"})
    assert migrate(session) == 0
    assert "query-failover there says what became of hostdev0" in capsys.readouterr().err


def test_a_configuration_of_the_other_host_is_used_where_one_is_named(source: Source, session: Session) -> None:
    session.answer(STARTED, {"status": "running"})
    assert migrate(session, "--remote-config", "/etc/web1.toml", "--remote-kvmpy", "sudo kvmpy") == 0
    start = session.asked()[0]["start"]
    assert (start["file"], start["config"]) == ("/etc/web1.toml", None)
    assert session.arguments()[-1] == "sudo kvmpy receive"


def test_after_a_failure_the_destination_is_ended(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    source.answer = {"status": "failed", "error-desc": "the link was cut"}
    session.answer(STARTED, {"status": "ended"})
    assert migrate(session) == 1
    assert session.asked()[1:] == [{"end": True}, "end"]
    assert "migration failed: the link was cut; the guest is here, and running" in capsys.readouterr().err
    assert "quit" not in source.commands()


def test_who_is_ended_by_a_second_signal_leaves_the_end_of_the_destination_to_the_far_end(
    source: Source, session: Session
) -> None:
    """Which waits for what becomes of the guest: it may be about to run there."""

    def interrupt(_: object) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"status": "active"}

    source.handlers["query-migrate"] = interrupt
    session.answer(STARTED, {"status": "ended"})
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        migrate(session)
    assert session.asked()[1:] == ["end"]


def test_a_destination_that_cannot_start_is_an_error_and_nothing_moves(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.answer({"error": "kvmpy: /vmlinuz: ENOENT\nkvmpy: br0: not a bridge"})
    assert migrate(session) == 1
    said = capsys.readouterr().err
    assert "ssh://root@host2:2222: kvmpy: /vmlinuz: ENOENT" in said
    assert "ssh://root@host2:2222: kvmpy: br0: not a bridge" in said
    assert "migrate" not in source.commands()


def test_a_dry_run_lists_all_that_is_in_the_way_of_both_though_no_destination_can_be_made(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = ["kvmpy: drive.disk0.path: ENOENT", "kvmpy: netdev.n.ifname: EPERM"]
    session.answer({"error": "\n".join(problems), "problems": problems})
    assert migrate(session, "--dry-run") == BLOCKED
    said = capsys.readouterr()
    assert said.out.splitlines() == ["cpu: no avx2", *(f"ssh://root@host2:2222: {problem}" for problem in problems)]
    assert "web1 cannot migrate to ssh://root@host2:2222" in said.err
    assert dict(source.asked)["x-migrate-check"] == {}


def test_a_dry_run_without_an_answer_is_an_error(source: Source, session: Session) -> None:
    session.answer()
    assert migrate(session, "--dry-run") == 1


def test_a_dry_run_starts_a_destination_asks_it_and_ends_it(source: Source, session: Session) -> None:
    session.answer(STARTED, {"status": "ended"})
    assert migrate(session, "--dry-run") == BLOCKED
    assert session.asked()[1:] == [{"end": True}, "end"]
    assert "migrate" not in source.commands()


def test_the_end_of_the_destinations_process_is_proof_and_the_guest_goes_on_here(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    source.answer = UNHEARD
    session.answer(STARTED, {"status": "ended"}, {"status": "ended"})
    assert migrate(session) == 1
    assert dict(source.asked)["cont"] == {"force": True}
    assert "the destination's process has ended, so the guest is here" in capsys.readouterr().err


def test_a_paused_guest_whose_destination_has_ended_is_said_how_to_let_go_on(
    source: Source, session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source.answer = UNHEARD
    monkeypatch.setattr(source, "_status", lambda: "paused")
    session.answer(STARTED, {"status": "ended"}, {"status": "ended"})
    assert migrate(session) == 1
    assert "cont" not in source.commands()
    assert "kvmpy resume --force web1 lets it go on" in capsys.readouterr().err


def test_a_destination_that_runs_the_guest_after_all_has_it(source: Source, session: Session) -> None:
    source.answer = UNHEARD
    session.answer(STARTED, {"status": "running"}, {"status": "running"})
    assert migrate(session) == 0
    assert "cont" not in source.commands()
    assert source.commands()[-1] == "quit"


@pytest.mark.parametrize("heard", [({"status": "inmigrate"},), ()], ids=["still waiting", "the session has ended"])
def test_what_nobody_can_say_stays_as_it_is(
    source: Source, session: Session, heard: tuple[dict[str, Any], ...]
) -> None:
    source.answer = UNHEARD
    session.answer(STARTED, *heard)
    assert migrate(session) == UNKNOWN
    assert {"cont", "quit"} & set(source.commands()) == set()
    assert {"end": True} not in session.asked()


def test_a_session_that_ends_is_an_error_with_sshs_exit_code(session: Session) -> None:
    session.answer()
    with Remote("ssh://host2", ssh=session.command) as remote, pytest.raises(HostError, match="ssh with 7"):
        remote.start(name="web1")


@pytest.mark.parametrize("said", ["Welcome to host2", "7", '"error"', "[1]"])
def test_a_far_end_whose_shell_prints_is_an_error_that_shows_what(session: Session, said: str) -> None:
    (session.directory / "answers").write_text(f"{said}\n")
    with (
        Remote("ssh://host2", ssh=session.command) as remote,
        pytest.raises(HostError, match=rf"^ssh://host2: {re.escape(repr(said))} is no answer of kvmpy receive's"),
    ):
        remote.start(name="web1")


@pytest.mark.parametrize("ssh", ["", " ", "ssh -o 'x"])
def test_what_is_no_command_for_ssh_is_told(ssh: str) -> None:
    with pytest.raises(ConfigError, match=r"^--ssh: "):
        Remote("ssh://host2", ssh=ssh)


def test_a_program_for_ssh_that_is_not_there_is_an_error() -> None:
    with pytest.raises(HostError, match="no-such-ssh: ENOENT"):
        Remote("ssh://host2", ssh="/no-such-ssh").__enter__()


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("ssh://host2", (None, "host2", None)),
        ("ssh://root@host2.example:2222/", ("root", "host2.example", "2222")),
        ("ssh://[fe80::1%eth0]:22", (None, "fe80::1%eth0", "22")),
    ],
)
def test_a_uri_says_whom_to_call(uri: str, target: tuple[str | None, ...]) -> None:
    assert parse(uri) == target


@pytest.mark.parametrize(
    "uri",
    [
        "ssh://",
        "ssh:host2",
        "ssh://-oProxyCommand=x",
        "ssh://a@-l",
        "ssh://-x@host2",
        "ssh://h:99999",
        "ssh://h/path",
        "ssh://h h",
    ],
)
def test_what_ssh_could_take_for_an_option_is_no_host(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected ssh://"):
        parse(uri)
