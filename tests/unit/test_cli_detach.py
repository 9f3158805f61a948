"""`kvmpy run --detach`: who goes on, who waits, and what is said to whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kvmpy.cli.detach import log_path

# Detaches, does what the second argument says in the child, and exits with what the parent is told.
PROGRAM: Final = """
import os, sys
from kvmpy.cli.detach import detach
ready = detach("web1", sys.argv[1])
if isinstance(ready, int):
    sys.exit(ready)
exec(sys.argv[2])
"""


def run(log: Path, child: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(log), child]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_child_has_a_session_of_its_own_no_input_and_the_log_for_its_output(tmp_path: Path) -> None:
    child = (
        "print('out', os.getsid(0) == os.getpid(), repr(sys.stdin.read()), flush=True); os.write(2, b'err'); ready()"
    )
    log = tmp_path / "new" / "web1.log"
    done = run(log, child)
    assert done.returncode == 0
    assert f"what it says goes to {log}" in done.stderr
    assert log.read_text() == "out True ''\nerr"
    assert log.stat().st_mode & 0o007 == 0


def test_one_that_ends_before_it_runs_tells_why_with_its_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "web1.log"
    log.write_text("from earlier\n")
    done = run(log, "print('kvmpy: no such bridge'); sys.exit(2)")
    assert (done.returncode, done.stderr) == (2, "kvmpy: no such bridge\n")
    assert log.read_text().startswith("from earlier\n")


def test_one_that_a_signal_ends_before_it_runs_has_the_exit_code_of_that_and_is_told_of(tmp_path: Path) -> None:
    log = tmp_path / "web1.log"
    done = run(log, "print('making memory', os.getpid(), flush=True); os.kill(os.getpid(), 9)")
    pid = log.read_text().split()[-1]
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.splitlines() == [
        f"making memory {pid}",
        f"kvmpy: process {pid} was ended by SIGKILL before its guest ran; see {log}",
    ]


def test_the_parent_waits_for_nothing_but_the_word_that_it_runs(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    done = run(tmp_path / "web1.log", f"ready(); open({str(fifo)!r}).read(); print('and goes on')")
    assert done.returncode == 0
    with fifo.open("w"):
        pass  # only now may the child end


@pytest.mark.parametrize(("make", "says"), [(Path.mkdir, "EISDIR"), (os.mkfifo, "ENXIO"), (None, "ELOOP")])
def test_a_log_is_a_file(tmp_path: Path, make: object, says: str) -> None:
    path = tmp_path / "web1.log"
    if callable(make):
        make(path)
    else:
        path.symlink_to("elsewhere")
    done = run(path, "")
    assert done.returncode == 1
    assert says in done.stderr


def test_logs_of_root_are_among_the_hosts_and_those_of_a_user_in_the_users_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert log_path("web1") == "/var/log/kvmpy/web1.log"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/u/state")
    assert log_path("web1") == "/home/u/state/kvmpy/web1.log"
