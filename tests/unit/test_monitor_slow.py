"""Commands that wait for the host: their session waits with them, and nothing else does."""

from __future__ import annotations

import gc
import socket
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from kvmpy.errors import CommandError, HostError
from kvmpy.machine.machine import Machine
from kvmpy.monitor.lazy import LazyMigrations
from kvmpy.monitor.server import MonitorServer
from kvmpy.monitor.session import Session
from tests.fakes.loop import BOUND, open_descriptors, settle
from tests.fakes.monitor import Client, Connect, FakeMachine

ADD = {"execute": "device_add", "arguments": {"driver": "virtio-rng-pci", "id": "rng1", "bus": "root1"}}
ADDED = 'device_add {"driver": "virtio-rng-pci", "id": "rng1", "bus": "root1"}'


@pytest.fixture
def held(machine: FakeMachine) -> FakeMachine:
    """The machine, with a host that does not get on until ``go`` is set."""
    machine.go.clear()
    return machine


@pytest.mark.parametrize(
    ("command", "arguments", "asked"),
    [
        ("device_add", ADD["arguments"], ADDED),
        ("device_add", {"no": ["check", {"here": None}]}, 'device_add {"no": ["check", {"here": null}]}'),
        ("device_del", {"id": "rng1"}, "device_del rng1 False"),
        ("device_del", {"id": "rng1", "force": True}, "device_del rng1 True"),
        ("netdev_add", {"type": "tap", "id": "n"}, 'netdev_add {"type": "tap", "id": "n"}'),
        ("netdev_del", {"id": "n"}, "netdev_del n"),
    ],
)
def test_a_slow_command_reaches_the_machine_and_returns_nothing(
    connect: Connect, machine: FakeMachine, command: str, arguments: dict[str, Any], asked: str
) -> None:
    answer = connect().ask({"execute": command, "arguments": arguments, "id": 7})
    assert (answer, machine.asked) == ({"return": {}, "id": 7}, [asked])


def test_other_sessions_and_the_machine_go_on_meanwhile(connect: Connect, held: FakeMachine) -> None:
    slow, other = connect(), connect()
    slow.send(ADD)
    held.begun.wait()
    assert other.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}
    other.send({"execute": "stop"})
    assert [other.receive() for _ in range(2)][1] == {"return": {}}
    assert slow.receive()["event"] == "STOP"
    held.go.set()
    assert slow.receive() == {"return": {}}
    assert held.asked == ["pause", ADDED]


def test_its_session_answers_nothing_more_until_it_is_done(connect: Connect, held: FakeMachine) -> None:
    client = connect()
    client.send({**ADD, "id": 1}, {"execute": "stop", "id": 2}, {**ADD, "id": 3})
    held.begun.wait()
    client.send({"execute": "query-name", "id": 4})
    settle(held.control)
    assert held.asked == []
    held.go.set()
    answers = [message for message in (client.receive() for _ in range(5)) if "id" in message]
    assert [answer["id"] for answer in answers] == [1, 2, 3, 4]
    assert held.asked == [ADDED, "pause", ADDED]


def test_several_sessions_wait_side_by_side(connect: Connect, held: FakeMachine) -> None:
    clients = [connect() for _ in range(8)]
    for client in clients:
        client.send(ADD)
    held.begun.wait(8)
    held.go.set()
    assert [client.receive() for client in clients] == [{"return": {}}] * 8


@pytest.mark.parametrize(
    ("refusal", "kind", "text"),
    [
        (CommandError("Bus 'root1' not found"), "GenericError", "Bus 'root1' not found"),
        (CommandError("Device 'x' not found", "DeviceNotFound"), "DeviceNotFound", "Device 'x' not found"),
        (HostError("tap7: EPERM: run as root"), "GenericError", "tap7: EPERM: run as root"),
        (OSError(5, "bad"), "GenericError", "kvmpy's own mistake: OSError(5, 'bad')"),
    ],
)
def test_a_refusal_of_the_host_is_an_error_reply(
    connect: Connect, machine: FakeMachine, refusal: Exception, kind: str, text: str
) -> None:
    machine.refuses = refusal
    assert connect().ask({**ADD, "id": 1}) == {"error": {"class": kind, "desc": text}, "id": 1}


def test_a_client_that_leaves_meanwhile_is_forgotten_when_it_is_done(
    connect: Connect, server: MonitorServer, held: FakeMachine
) -> None:
    client = connect()
    client.send(ADD, {"execute": "stop"})
    held.begun.wait()
    client.socket.shutdown(socket.SHUT_RDWR)
    client.close()
    held.go.set()
    server._workers.close()
    settle(held.control, 10)
    assert server._sessions == []
    assert held.asked[0] == ADDED


def test_a_client_that_does_not_read_events_meanwhile_is_cut_off(
    connect: Connect, server: MonitorServer, held: FakeMachine
) -> None:
    deaf = connect()
    deaf.send(ADD)
    held.begun.wait()
    for _ in range(40):
        held.emit("POWERDOWN", reason="x" * 20_000)
    assert server._sessions == []
    held.go.set()
    server._workers.close()
    settle(held.control)
    assert held.asked == [ADDED]


def test_close_waits_for_what_is_under_way(machine: FakeMachine, tmp_path: Path) -> None:
    server = MonitorServer(cast(Machine, machine), str(tmp_path / "qmp.sock"))
    client = Client(str(tmp_path / "qmp.sock"))
    machine.go.clear()
    client.send(ADD)
    machine.begun.wait()
    closer = threading.Thread(target=server.close)
    closer.start()
    assert client.rest() == b""  # hung up at once
    client.close()
    assert closer.is_alive()
    machine.go.set()
    closer.join(BOUND)
    assert not closer.is_alive()
    assert machine.asked == [ADDED]


def test_close_does_not_wait_for_a_destination_that_says_nothing(
    connect: Connect, server: MonitorServer, tmp_path: Path
) -> None:
    client = connect()
    client.ask({"execute": "migrate-set-parameters", "arguments": {"x-timeout": 60}})
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(BOUND)
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        client.send({"execute": "x-migrate-check", "arguments": {"uri": f"unix:{tmp_path}/silent"}})
        with silent.accept()[0]:
            closer = threading.Thread(target=server.close, daemon=True)
            closer.start()
            closer.join(BOUND)
            assert not closer.is_alive()


def test_a_check_that_comes_after_the_end_is_refused(machine: FakeMachine, tmp_path: Path) -> None:
    before = open_descriptors()
    lazy = LazyMigrations(cast(Machine, machine))
    made = lazy.make()
    lazy.end_checks()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        with pytest.raises(CommandError, match="the machine has ended"):
            made.check(f"unix:{tmp_path}/silent")
    with pytest.raises(CommandError, match="the machine has ended"):
        lazy.make()
    assert open_descriptors() == before


def test_no_thread_to_be_had_is_an_error_reply_and_the_session_goes_on(
    connect: Connect, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        answer = client.ask({**ADD, "id": 1})
    assert answer["error"]["desc"].startswith("device_add: EAGAIN: no thread for it")
    assert client.ask({**ADD, "id": 2}) == {"return": {}, "id": 2}


def test_a_session_that_had_a_slow_command_is_gone_without_the_garbage_collector(
    connect: Connect, machine: FakeMachine
) -> None:
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, Session) for thing in gc.get_objects())
        client = connect()
        client.ask(ADD)
        client.close()
        watcher = connect()
        watcher.ask({"execute": "query-status"})
        settle(machine.control)
        assert sum(isinstance(thing, Session) for thing in gc.get_objects()) == before + 1
    finally:
        gc.enable()
