"""The far end of a migration by ssh: what it starts, what it says of it, and that nothing of it stays."""

from __future__ import annotations

import io
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.cli import receive
from kvmpy.cli.client import Client
from kvmpy.cli.main import main
from kvmpy.cli.receive import Incoming, Wanted
from kvmpy.config.schema import load
from kvmpy.errors import HostError, HostProblems
from kvmpy.host.rundir import Running
from tests.fakes.qmp import FakeMonitor


class Destination(FakeMonitor):
    """A machine that waits for its guest; its process is a stand-in that ends when it is told to quit."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__("web1", {"query-status": lambda _: {"status": self.status}, "quit": self._quit})
        self.status = "inmigrate"
        self.process = process
        self.pid = process.pid

    def _quit(self, _: object) -> dict[str, Any]:
        self.end()
        return {}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Destination]:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(receive, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(receive, "ORPHAN_SECONDS", 0.05)
    process = subprocess.Popen(["sleep", "1000"])
    try:
        with Destination(process) as machine:
            yield machine
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def started(destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Incoming]:
    monkeypatch.setattr(Incoming, "_command", lambda *_: ["sh", "-c", "echo waits >&2"])
    incoming = Incoming()
    answer = incoming.start(Wanted(name="web1", directory=str(tmp_path / "stream")))
    assert answer == {"pid": destination.pid, "said": "waits"}
    yield incoming
    incoming._clean_up()


def test_the_machine_is_run_with_the_configuration_that_came(tmp_path: Path) -> None:
    (tmp_path / "stream").mkdir()
    tables = {"name": "web1", "boot": {"kernel": "/boot/vmlinuz"}, "device": [{"driver": "virtio-rng-pci", "id": "r"}]}
    wanted = Wanted(name="web1", directory=str(tmp_path / "stream"), config=tables, overrides=["machine.cpus=2"])
    command = Incoming()._command(wanted)
    path = tmp_path / "stream" / "config.toml"
    words = ["run", str(path), "--name", "web1", "--set", "machine.cpus=2"]
    assert command[3:] == [*words, "--incoming", f"unix:{tmp_path}/stream/stream.sock", "--detach"]
    assert load(path).device[0].id == "r"
    assert path.stat().st_mode & 0o777 == 0o600


def test_one_that_gets_its_guest_is_left_alone_and_its_directory_goes(
    started: Incoming, destination: Destination, tmp_path: Path
) -> None:
    destination.status = "running"
    assert started.outcome(60) == "running"
    assert started.end() == "running"
    assert destination.process.poll() is None
    assert not (tmp_path / "stream").exists()


def pair(state: str, path: str = "standby", *, negotiated: bool = True) -> dict[str, Any]:
    return {"standby-id": "net1", "primary-id": "hostdev0", "state": state, "path": path, "negotiated": negotiated}


def test_a_primary_is_waited_for_until_the_guest_has_it_in_use_and_what_was_told_is_said(
    started: Incoming, destination: Destination
) -> None:
    states = [pair("hidden"), pair("plugging"), pair("plugged"), pair("plugged", "primary")]
    destination.handlers["query-failover"] = lambda _: [states.pop(0) if len(states) > 1 else states[0]]
    destination.emit("FAILOVER_PRIMARY_PLUGGED", device_id="hostdev0")
    said = started.primaries(60)
    assert said["pairs"] == [pair("plugged", "primary")]
    assert [event["event"] for event in said["events"]] == ["FAILOVER_PRIMARY_PLUGGED"]


@pytest.mark.parametrize(
    "found",
    [pair("failed"), pair("no-primary"), pair("hidden", negotiated=False)],
    ids=["failed", "none", "for a guest that knows of none"],
)
def test_one_that_will_not_come_is_not_waited_for(
    started: Incoming, destination: Destination, found: dict[str, Any]
) -> None:
    destination.handlers["query-failover"] = lambda _: [found]
    assert started.primaries(1e6)["pairs"] == [found]


@pytest.mark.parametrize("found", [pair("plugging"), pair("plugged")])
def test_one_that_does_not_come_is_not_waited_for_for_ever(
    started: Incoming, destination: Destination, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    monkeypatch.setattr(receive, "IDLE_SECONDS", 0.05)
    destination.handlers["query-failover"] = lambda _: [found]
    assert started.primaries(1e6 if found["state"] == "plugged" else 0.05)["pairs"] == [found]


def test_one_whose_guest_will_not_come_is_ended(started: Incoming, destination: Destination, tmp_path: Path) -> None:
    assert started.end() == "ended"
    assert destination.process.returncode is not None
    assert not (tmp_path / "stream").exists()


def test_one_that_ended_by_itself_is_said_to_have(started: Incoming, destination: Destination, tmp_path: Path) -> None:
    destination.end()
    destination.hang_up()
    assert started.outcome(60) == "ended"
    assert not (tmp_path / "stream").exists()


def test_one_that_ended_once_its_guest_ran_is_not_said_to_have_never_had_it(
    started: Incoming, destination: Destination, tmp_path: Path
) -> None:
    destination.emit("RESUME")
    destination.end()
    destination.hang_up()
    assert started.outcome(60) == "shutdown"
    assert not (tmp_path / "stream").exists()


def test_one_that_is_about_to_end_is_waited_for(started: Incoming, destination: Destination, tmp_path: Path) -> None:
    (tmp_path / "run" / "web1" / "qmp.sock").unlink()  # the first thing that goes
    ending = threading.Timer(0.1, destination.end)
    ending.start()
    assert started.end() == "ended"
    ending.join()


def test_one_that_neither_has_its_guest_nor_ends_is_still_waiting(started: Incoming) -> None:
    assert started.outcome(0.05) == "inmigrate"


@pytest.mark.parametrize(("status", "left"), [("inmigrate", False), ("running", True), ("paused", True)])
def test_when_the_session_ends_only_a_machine_with_its_guest_stays(
    started: Incoming, destination: Destination, tmp_path: Path, status: str, left: bool
) -> None:
    destination.status = status
    started.abandon()
    assert (destination.process.poll() is None) is left
    assert not (tmp_path / "stream").exists()


def test_a_machine_that_does_not_start_is_an_error_in_its_own_words_and_leaves_nothing(
    destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Incoming, "_command", lambda *_: ["sh", "-c", "echo 'kvmpy: no bridge' >&2; exit 2"])
    with pytest.raises(HostError, match="kvmpy: no bridge"):
        Incoming().start(Wanted(name="web1", directory=str(tmp_path / "stream")))
    assert not (tmp_path / "stream").exists()


def test_each_thing_that_a_machine_lacks_is_told_without_what_it_was_only_warned_of(
    destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "printf 'kvmpy: warning: odd\\nkvmpy: no disk\\nkvmpy: no tap\\n' >&2; exit 1"
    monkeypatch.setattr(Incoming, "_command", lambda *_: ["sh", "-c", script])
    with pytest.raises(HostProblems) as caught:
        Incoming().start(Wanted(name="web1", directory=str(tmp_path / "stream")))
    assert caught.value.problems == ("kvmpy: no disk", "kvmpy: no tap")


def test_a_machine_that_waits_and_does_not_answer_does_not_stay(
    destination: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Incoming, "_command", lambda *_: ["true"])
    asked: list[object] = []

    def client(running: Running) -> Client:
        asked.append(running)
        if len(asked) == 1:
            raise HostError("web1: greeting: no answer in 5 s")
        return Client(running)

    monkeypatch.setattr(receive, "Client", client)
    with pytest.raises(HostError, match="no answer in 5 s"):
        Incoming().start(Wanted(name="web1", directory=str(tmp_path / "stream")))
    assert destination.process.poll() is not None
    assert not (tmp_path / "stream").exists()


def test_a_directory_that_exists_is_nobodys_to_use(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="EEXIST"):
        Incoming().start(Wanted(name="web1", directory=str(tmp_path)))
    assert tmp_path.exists()


Talk = Callable[[bytes], list[Any]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    def answers(said: bytes) -> list[Any]:
        output = io.BytesIO()
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(said)))
        monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=output, flush=lambda: None))
        assert main(["receive"]) == 0
        return [json.loads(line) for line in output.getvalue().splitlines()]

    return answers


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"[]",
        b'{"start": {"name": "web1"}}',
        b'{"start": {"name": "web1", "directory": "/x", "more": 1}}',
        b'{"end": false}',
        b'{"outcome": "long"}',
        b'{"unheard": 1}',
        b"\xff",
    ],
)
def test_what_it_does_not_understand_is_an_error_and_not_its_end(talk: Talk, line: bytes) -> None:
    first, second = talk(line + b"\n" + b'{"outcome": 0}\n')
    assert "error" in first
    assert second == {"status": "ended"}
