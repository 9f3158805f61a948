"""Two kvmpy processes, as they are started by hand: `kvmpy run`, `kvmpy run --incoming`, and QMP. And one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.kvm.system import System
from kvmpy.machine.runstate import RunState
from kvmpy.migration.messages import Kind
from kvmpy.migration.source import UNKNOWN
from kvmpy.migration.status import Status
from tests.counts import count
from tests.fakes.counting_guest import COUNTS, NEEDS, gap
from tests.fakes.journey import Journey
from tests.fakes.loop import BOUND
from tests.fakes.middle import Middle
from tests.fakes.pvh_kernel import pvh_kernel

LONG = 60.0  # a process starts within


class Process:
    """`kvmpy run`, with a QMP client."""

    def __init__(self, directory: Path, number: int, *options: str) -> None:
        self.directory, self.number, self._options = directory, number, options
        self.console = directory / f"console{number}"
        file = directory / f"{number}.toml"
        file.write_text(
            f'name = "p{number}"\n[boot]\nkernel = "kernel"\n[machine]\nmemory = "{NEEDS}"\n'
            f'[console]\nserial = "file:console{number}"\n'
        )
        self._log = (directory / f"log{number}").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmpy", "run", str(file), *options],
            env={**os.environ, "KVMPY_RUNTIME_DIR": str(directory / "run")},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        self._client = self._connect()
        self._lines = self._client.makefile()
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Execute a command; returns what it returns."""
        answer = self.ask(command, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._client.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        return dict(answer)

    def send_descriptor(self, fd: int, name: str) -> None:
        message = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
        socket.send_fds(self._client, [message], [fd])
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        assert "return" in answer, answer

    @property
    def said(self) -> bytes:
        return self.console.read_bytes()

    @property
    def log(self) -> str:
        return (self.directory / f"log{self.number}").read_text()

    def wait_for_count(self) -> None:
        before, end = len(self.said), time.monotonic() + BOUND
        while len(self.said) < before + 64:
            assert time.monotonic() < end, self.log
            time.sleep(0.01)

    def wait_for(self, status: str) -> dict[str, Any]:
        end = time.monotonic() + LONG  # what is slow to load a state is given time accordingly
        while (info := self("query-migrate"))["status"] != status:
            assert time.monotonic() < end, (info, self.log)
            time.sleep(0.01)
        return dict(info)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._client.close()
        self._lines.close()
        self._log.close()

    def _connect(self) -> socket.socket:
        path, end = self.directory / "run" / f"p{self.number}" / "qmp.sock", time.monotonic() + LONG
        while True:
            client = socket.socket(socket.AF_UNIX)
            try:
                client.connect(str(path))
            except OSError:
                client.close()
                assert self.process.poll() is None, self.log
                assert time.monotonic() < end, self.log
                time.sleep(0.02)
            else:
                client.settimeout(BOUND)
                return client


class Processes:
    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        (directory / "kernel").write_bytes(pvh_kernel(COUNTS))
        self.all: list[Process] = []

    def __call__(self, *options: str) -> Process:
        process = Process(self._directory, len(self.all), *options)
        self._stack.callback(process.close)
        self.all.append(process)
        return process

    def incoming(self) -> tuple[Process, str]:
        """One that waits, and where."""
        path = self._directory / f"in{len(self.all)}"
        process, end = self("--incoming", f"unix:{path}"), time.monotonic() + LONG
        while not path.exists():  # its monitor is there before
            assert time.monotonic() < end, process.log
            time.sleep(0.02)
        return process, f"unix:{path}"


@pytest.fixture
def stack(system: System) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def processes(tmp_path: Path, stack: ExitStack) -> Processes:
    return Processes(tmp_path, stack)


def test_a_guest_goes_from_process_to_process(processes: Processes) -> None:
    here = processes()
    here("migrate-set-parameters", **{"x-checksum": True})
    for _ in range(count(2, 20)):
        here.wait_for_count()
        there, uri = processes.incoming()
        assert there("query-status") == {"running": False, "status": "inmigrate"}
        here("migrate", uri=uri)
        info = here.wait_for("completed")
        assert info["blackout-ms"] > 0
        assert here("query-status") == {"running": False, "status": "postmigrate"}
        there.wait_for("completed")
        assert there("query-status") == {"running": True, "status": "running"}
        there.wait_for_count()
        here("quit")
        assert here.process.wait(BOUND) == 0
        there("migrate-set-parameters", **{"x-checksum": True})
        here = there
    here("stop")
    assert gap(b"".join(process.said for process in processes.all)) is None


def test_a_destination_that_is_stopped_while_the_guest_stands_still_does_not_keep_it_so(
    processes: Processes, stack: ExitStack, tmp_path: Path
) -> None:
    here, (there, uri) = processes(), processes.incoming()

    def stop() -> None:
        """All of its threads, and wait: those that are at the state go on until one of them has taken the signal."""
        there.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, there.process.pid, os.WSTOPPED)

    hooks = {Kind.SECTIONS: stop}
    middle = Middle(str(tmp_path / "middle"), uri.removeprefix("unix:"), hooks=hooks)
    stack.callback(middle.close)
    here.wait_for_count()
    here("migrate-set-parameters", **{"x-timeout": 3600.0})
    here("migrate", uri=f"unix:{tmp_path / 'middle'}")
    assert "nothing more from the other side" in here.wait_for("failed")["error-desc"]
    assert here("query-status")["status"] == "running"
    here.wait_for_count()
    assert there.said == b""


def test_a_destination_that_was_deferred_is_told_where_to_wait(processes: Processes, tmp_path: Path) -> None:
    here, there = processes(), processes("--incoming", "defer")
    for wrong, said in (
        ("fd:99", "no such descriptor"),
        (f"file:{tmp_path}/none", "give the file that kvmpy save has"),
    ):
        assert said in there.ask("migrate-incoming", uri=wrong)["error"]["desc"]
    there("migrate-incoming", uri=f"unix:{tmp_path / 'in'}")
    assert "already been started" in there.ask("migrate-incoming", uri=f"unix:{tmp_path / 'in2'}")["error"]["desc"]
    assert here("x-migrate-check", uri=f"unix:{tmp_path / 'in'}") == {"problems": [], "warnings": []}
    here("migrate", uri=f"unix:{tmp_path / 'in'}")
    here.wait_for("completed")
    there.wait_for_count()


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "defer"])
def test_insecure_is_for_the_guest_that_comes_and_not_for_where_it_goes_next(processes: Processes, uri: str) -> None:
    there = processes("--incoming", uri, "--insecure")
    if uri == "defer":
        there("migrate-incoming", uri="tcp:127.0.0.1:0")
    assert there("query-status")["status"] == "inmigrate", "it waits, without certificates"
    assert not there("query-migrate-parameters")["x-insecure"]


def test_a_file_that_is_broken_is_found_out_before_the_machine_is_said_to_be_there(
    processes: Processes, tmp_path: Path
) -> None:
    here, saved, log = processes(), tmp_path / "saved", tmp_path / "log"
    here("migrate", uri=f"file:{saved}")
    here.wait_for("completed")
    here("quit")
    assert here.process.wait(BOUND) == 0
    whole = saved.read_bytes()
    command = [sys.executable, "-m", "kvmpy", "run", str(tmp_path / "0.toml"), "--detach", "--log", str(log)]
    environment = {**os.environ, "KVMPY_RUNTIME_DIR": str(tmp_path / "run")}
    for content, code, said in ((whole[:-20], 1, "the file ends after byte"), (whole, 0, "what it says goes to")):
        saved.write_bytes(content)
        done = subprocess.run(
            [*command, "--incoming", f"file:{saved}"], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    stop = [sys.executable, "-m", "kvmpy", "stop", "p0"]
    assert subprocess.run(stop, env=environment, check=False).returncode == 0


def test_a_descriptor_that_came_over_qmp_is_a_way_to_go(processes: Processes, tmp_path: Path) -> None:
    here, (there, uri) = processes(), processes.incoming()
    assert "has not been found" in here.ask("migrate", uri="fd:way")["error"]["desc"]
    with socket.socket(socket.AF_UNIX) as way:
        way.connect(uri.removeprefix("unix:"))
        here.send_descriptor(way.fileno(), "way")
    here("migrate-set-parameters", **{"x-checksum": True})
    here("migrate", uri="fd:way")
    here.wait_for("completed")
    there.wait_for_count()
    here("quit")
    assert here.process.wait(BOUND) == 0
    there("stop")
    assert gap(here.said + there.said) is None


def test_a_destination_whose_source_leaves_ends_with_a_message(processes: Processes) -> None:
    here, (there, uri) = processes(), processes.incoming()
    here("migrate-set-parameters", **{"downtime-limit": 0, "x-on-no-convergence": "continue"})
    here("migrate", uri=uri)
    here.wait_for("active")
    here("migrate_cancel")
    here.wait_for("cancelled")
    assert there.process.wait(BOUND) == 1
    assert "incoming migration" in there.log
    here.wait_for_count()


def test_a_signal_ends_a_destination_that_waits(processes: Processes) -> None:
    there, _ = processes.incoming()
    there.process.send_signal(signal.SIGTERM)
    assert there.process.wait(BOUND) == 0


def beside(directory: Path, stack: ExitStack) -> Journey:
    """Machines in this process, with a directory of their own."""
    (directory / "journey").mkdir()
    return Journey(directory / "journey", stack)


BEFORE_READY = (Kind.ACCEPT, Kind.ROUND, Kind.SECTIONS, Kind.END_OF_STATE)


@pytest.mark.parametrize("at", BEFORE_READY)
def test_the_guest_stays_when_its_destination_is_killed(
    processes: Processes, tmp_path: Path, stack: ExitStack, at: Kind
) -> None:
    journey = beside(tmp_path, stack)
    source = journey.begin()
    there, uri = processes.incoming()
    middle = Middle(journey.socket("middle"), uri.removeprefix("unix:"), hooks={at: there.process.kill})
    stack.callback(middle.close)
    source.migrations.migrate(f"unix:{journey.socket('middle')}")
    source.wait(Status.FAILED)
    assert source.machine.state is RunState.RUNNING
    source.wait_for_count()
    journey.move(source)


@pytest.mark.parametrize("at", [Kind.READY, Kind.GO, Kind.STARTED])
def test_nobody_knows_when_the_destination_is_killed_once_it_is_ready(
    processes: Processes, tmp_path: Path, stack: ExitStack, at: Kind
) -> None:
    journey = beside(tmp_path, stack)
    source = journey.begin()
    there, uri = processes.incoming()
    middle = Middle(journey.socket("middle"), uri.removeprefix("unix:"), hooks={at: there.process.kill})
    stack.callback(middle.close)
    source.migrations.migrate(f"unix:{journey.socket('middle')}")
    status = source.migrations.wait(BOUND)
    if status is Status.COMPLETED:  # STARTED was on its way
        assert source.machine.state is RunState.POSTMIGRATE
    else:
        assert str(source.error).startswith(UNKNOWN)
        assert source.machine.state is RunState.PAUSED
    assert there.process.wait(BOUND) == -signal.SIGKILL
    source.machine.resume(force=True)  # we know that it is dead
    source.wait_for_count()
    journey.move(source)


@pytest.mark.parametrize("at", [*BEFORE_READY, Kind.READY])
def test_the_destination_never_runs_when_the_source_is_killed_before_go(
    processes: Processes, tmp_path: Path, stack: ExitStack, at: Kind
) -> None:
    here = processes()
    here.wait_for_count()
    journey = beside(tmp_path, stack)
    there = journey.wait_at(x_timeout=1.0)  # for page channels, which nobody opens
    middle = Middle(journey.socket("middle"), there.uri.removeprefix("unix:"), hooks={at: here.process.kill})
    stack.callback(middle.close)
    here("migrate", uri=f"unix:{journey.socket('middle')}")
    assert there.machine.wait(BOUND) is not None
    assert there.said == b""
