"""An operator's program for changes of a failover pair's path: run one at a time, for so long, and until the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy.errors import HostError
from kvmpy.host import hook as module
from kvmpy.host.hook import NOWHERE, Hook
from kvmpy.host.hook_runner import Runner
from tests.fakes.loop import poll

FACTS = {"MAC": "52:54:00:6f:55:cc", "TAP": "tap-web1"}
SAY = 'echo "$1 $KVMPY_EVENT $KVMPY_MACHINE $KVMPY_STANDBY $KVMPY_PATH $KVMPY_MAC $KVMPY_TAP" >>"$0.log"'
# A VMM: tells the hook of one pair, says so, and lives until it is killed.
VMM = """
import sys
from kvmpy.host.hook import Hook
Hook(sys.argv[1], "web1").run("net1", "primary", {})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """Make it, of these lines."""

    def make(lines: str) -> str:
        path = tmp_path / "hook"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return make


def said(program: str) -> list[str]:
    log = Path(f"{program}.log")
    return log.read_text().splitlines() if log.exists() else []


def test_what_runs_it_does_not_outlive_being_given_up(
    program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would take that for our end, and tell the program that a guest which runs is nowhere."""
    path = program(SAY)
    hook = Hook(path, "web1")
    monkeypatch.setattr(module, "RUN_LIMIT", 0.1)
    monkeypatch.setattr(module, "GRACE", 0.1)
    monkeypatch.setattr(module, "REAP_LIMIT", 20.0)
    hook._start()
    runner = hook._pid
    os.kill(runner, signal.SIGSTOP)
    with pytest.raises(HostError, match=r"not done in 0\.2 s"):
        hook.run("net1", "primary", FACTS)
    with pytest.raises(ProcessLookupError):
        os.kill(runner, 0)
    hook.close()
    assert said(path) == []


def test_it_is_told_all_there_is_and_at_the_end_that_the_guest_is_nowhere(program: Callable[[str], str]) -> None:
    path = program(SAY)
    hook = Hook(path, "web1")
    hook.run("net1", "primary", FACTS)
    hook.run("net1", "standby", FACTS)
    hook.run("net2", NOWHERE, FACTS)
    hook.close()
    rest = "52:54:00:6f:55:cc tap-web1"
    assert said(path) == [
        f"primary path web1 net1 primary {rest}",
        f"standby path web1 net1 standby {rest}",
        f"none path web1 net2 none {rest}",
        f"none path web1 net1 none {rest}",
    ]
    hook.close()
    hook.run("net1", "primary", FACTS)
    assert len(said(path)) == 4, "nothing after the end"


def test_one_that_fails_says_how_and_the_next_run_is_as_ever(program: Callable[[str], str]) -> None:
    path = program('[ "$1" != primary ] || exit 3')
    hook = Hook(path, "web1")
    with pytest.raises(HostError, match=rf"^failover_hook: {path}: exit code 3; .*\(path primary of net1\)$"):
        hook.run("net1", "primary", FACTS)
    hook.run("net1", "standby", FACTS)
    hook.close()


def test_parent_that_ignores_its_children_does_not_matter(program: Callable[[str], str]) -> None:
    path = program(f'{SAY}; [ "$1" != standby ] || exit 3')
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        hook = Hook(path, "web1")
        hook.run("net1", "primary", FACTS)
        with pytest.raises(HostError, match="exit code 3"):
            hook.run("net1", "standby", FACTS)
        hook.close()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert [line.split()[0] for line in said(path)] == ["primary", "standby", "none"]


def test_one_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    hook = Hook(str(tmp_path / "nothing"), "web1")
    with pytest.raises(HostError, match="ENOENT: cannot be run: it must be an executable file"):
        hook.run("net1", "primary", FACTS)
    hook.close()


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_one_that_is_killed_says_by_which_signal_though_it_has_no_name(
    program: Callable[[str], str], number: int, name: str
) -> None:
    path = program(f'[ "$1" = none ] || kill -{number} $$')
    hook = Hook(path, "web1")
    with pytest.raises(HostError, match=f"killed by {name}"):
        hook.run("net1", "primary", FACTS)
    hook.close()


def test_one_that_does_not_end_is_killed_with_all_it_started(program: Callable[[str], str], tmp_path: Path) -> None:
    path = program('sleep 1000 & echo $! >"$0.log"; wait')
    runner = Runner(path, "web1", limit=0.5)
    error = runner.run({"standby": "net1", "path": "primary", "facts": {}})
    assert error == "killed, for it had not ended in 0.5 s"
    (child,) = said(path)
    poll(lambda: not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text())


def test_it_has_no_signals_blocked_and_no_way_to_speak_for_what_runs_it(program: Callable[[str], str]) -> None:
    path = program('grep SigBlk /proc/self/status >"$0.log"; ls -l /proc/self/fd >>"$0.log"')
    hook = Hook(path, "web1")
    hook.run("net1", NOWHERE, {})
    hook.close()
    mask, *descriptors = said(path)
    assert int(mask.split()[1], 16) == 0
    assert not [line for line in descriptors if "socket:" in line]


def test_a_runner_that_has_ended_is_started_anew(program: Callable[[str], str]) -> None:
    path = program(SAY)
    hook = Hook(path, "web1")
    hook.start()
    os.kill(hook._pid, signal.SIGKILL)
    with pytest.raises(HostError, match=r"what runs it has ended|EPIPE|ECONNRESET"):
        hook.run("net1", "primary", FACTS)
    hook.run("net1", "standby", FACTS)
    hook.close()
    assert [line.split()[0] for line in said(path)] == ["standby", "none"]


def test_a_vmm_that_is_killed_leaves_nobody_thinking_that_its_guest_is_here(program: Callable[[str], str]) -> None:
    path = program(SAY)
    with subprocess.Popen(
        [sys.executable, "-c", VMM, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    poll(lambda: [line.split()[0] for line in said(path)] == ["primary", "none"])


def test_an_answer_that_is_none_is_an_error(program: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(_: str, control: int, *__: str) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, control, 3)]
        return os.posix_spawn("/bin/sh", ["sh", "-c", "read l <&3; echo garbage >&3"], {}, file_actions=actions)

    monkeypatch.setattr(module, "spawn", spawn)
    hook = Hook(program(""), "web1")
    with pytest.raises(HostError, match=r"malformed|invalid"):
        hook.run("net1", "primary", FACTS)
    hook.close()
