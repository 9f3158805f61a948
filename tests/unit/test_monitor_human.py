"""A few lines of QEMU's human monitor: what `qmp-shell -H` and its users type."""

from __future__ import annotations

from typing import Any

import pytest

from kvmpy import __version__
from kvmpy.machine.runstate import RunState
from tests.fakes.monitor import Client, Connect, FakeMachine


def say(client: Client, line: str, **arguments: Any) -> Any:
    """What the line returns, past the events it causes."""
    client.send({"execute": "human-monitor-command", "arguments": {"command-line": line, **arguments}})
    while "event" in (answer := client.receive()):
        pass
    return answer.get("return", answer)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", ""),
        ("   ", ""),
        ("info status", "VM status: running\r\n"),
        ("  info   status ", "VM status: running\r\n"),
        ("info name", "web1\r\n"),
        ("info version", f"kvmpy {__version__}\r\n"),
        ("info kvm", "kvm support: enabled\r\n"),
        ("info cpus", "  CPU #0: thread_id=100\r\n  CPU #1: thread_id=101\r\n"),
        ("nope", "unknown command: 'nope'\r\n"),
        ("info nope", "unknown command: 'info nope'\r\n"),
        ("stop now", 'stop: expected nothing more\r\nTry "help stop" for more information\r\n'),
        ("set_link net1", 'set_link: expected name on|off\r\nTry "help set_link" for more information\r\n'),
        ("set_link net1 yes", "Error: Parameter 'up' expects 'on' or 'off'\r\n"),
        ("help stop", "stop|s  -- stop the vCPUs\r\n"),
        ("help nope", ""),
    ],
)
def test_a_line_is_answered_as_qemu_does(connect: Connect, machine: FakeMachine, line: str, said: str) -> None:
    assert say(connect(), line) == said
    assert machine.asked == []


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("stop", "pause"),
        ("s", "pause"),
        ("cont", "resume"),
        ("c", "resume"),
        ("system_reset", "reset"),
        ("system_powerdown", "powerdown None"),
        ("set_link net1 off", "set_link net1 False"),
        ("quit", "stop"),
    ],
)
def test_a_line_that_changes_something_says_nothing(
    connect: Connect, machine: FakeMachine, line: str, asked: str
) -> None:
    assert say(connect(), line) == ""
    assert machine.asked == [asked]


def test_a_refusal_is_an_error_in_words(connect: Connect, machine: FakeMachine) -> None:
    client = connect()
    say(client, "quit")
    assert say(client, "quit") == "Error: the machine is not running: its state is shutdown\r\n"


def test_the_state_of_a_machine_that_does_not_run_is_said(connect: Connect, machine: FakeMachine) -> None:
    client = connect()
    machine.state = RunState.PAUSED
    assert say(client, "info status") == "VM status: paused\r\n"
    machine.state = RunState.GUEST_PANICKED
    assert say(client, "info status") == "VM status: paused (guest-panicked)\r\n"


def test_help_and_info_list_what_qmp_shell_completes(connect: Connect) -> None:
    client = connect()
    listed = say(client, "help").split("\r\n")
    assert [line.split()[0] for line in listed if line] == [
        *("cont|c", "help|?", "info", "quit|q", "set_link", "stop|s", "system_powerdown", "system_reset")
    ]
    assert [line.split()[:2] for line in say(client, "info").split("\r\n") if line][:2] == [
        ["info", "cpus"],
        ["info", "kvm"],
    ]
    assert say(client, "help info") == say(client, "info")


@pytest.mark.parametrize("index", [-1, 2, 10**12])
def test_a_vcpu_that_is_not_there_is_refused(connect: Connect, index: int) -> None:
    client = connect()
    assert say(client, "info version", **{"cpu-index": 1}).startswith("kvmpy")
    refused = say(client, "info version", **{"cpu-index": index})
    assert refused["error"]["desc"] == "Parameter 'cpu-index' expects a CPU number"
