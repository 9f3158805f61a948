"""QMP sessions as clients have them: negotiation, ids, errors in QEMU's words, events; and clients that mean harm."""

from __future__ import annotations

import gc
import logging
import resource
import socket
import stat
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from kvmpy import __version__, trace
from kvmpy.errors import CommandError, HostError
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.monitor import schema
from kvmpy.monitor.commands import COMMANDS
from kvmpy.monitor.server import MonitorServer
from kvmpy.monitor.session import TURN, Session
from kvmpy.monitor.trace_feed import MOST_WAITING
from kvmpy.trace import Tracepoint
from tests.counts import count
from tests.fakes.loop import BOUND, Inbox, open_descriptors, settle
from tests.fakes.monitor import Client, Connect, FakeMachine
from tests.fakes.pci import Board


def error(kind: str, text: str) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": text}}


def test_greeting_has_what_qmp_shell_prints(connect: Connect) -> None:
    assert connect(negotiate=False).greeting == {
        "QMP": {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": f"kvmpy {__version__}"},
            "capabilities": [],
        }
    }


def test_nothing_but_negotiation_is_answered_before_it(connect: Connect, machine: FakeMachine) -> None:
    client = connect(negotiate=False)
    assert client.ask({"execute": "quit"}) == error(
        "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'"
    )
    assert client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
    assert client.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}
    assert machine.asked == []


def test_negotiation_twice_is_refused(connect: Connect) -> None:
    assert connect().ask({"execute": "qmp_capabilities"}) == error(
        "CommandNotFound", "Capabilities negotiation is already complete, command ignored"
    )


def test_capability_that_was_not_offered_is_refused_and_the_session_still_negotiates(connect: Connect) -> None:
    client = connect(negotiate=False)
    assert client.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}) == error(
        "GenericError", "Capability oob not available"
    )
    assert client.ask({"execute": "qmp_capabilities", "arguments": {"enable": []}}) == {"return": {}}


@pytest.mark.parametrize("id_", ["__qmp#00000", 7, -1.5, None, True, "", "é\ud800", [1, [2]], {"a": {"b": []}}, 10**30])
def test_id_of_any_type_comes_back_with_replies_and_errors(connect: Connect, id_: Any) -> None:
    client = connect()
    assert client.ask({"execute": "query-name", "id": id_}) == {"return": {"name": "web1"}, "id": id_}
    assert client.ask({"execute": "absent", "id": id_})["id"] == id_
    assert client.ask({"execute": 1, "id": id_})["id"] == id_


def command_errors() -> int:
    return sum(isinstance(thing, CommandError) for thing in gc.get_objects())


def test_refusals_leave_no_circles(connect: Connect) -> None:
    client = connect()
    client.ask(b"{garbage}")
    client.ask({"execute": "query-name"})  # when that is answered, the refusal is over and done with
    gc.collect()
    before = command_errors()
    gc.disable()  # as a running machine has it
    try:
        for request in (b"{garbage}", b'"text"', {}, {"execute": "absent"}, {"execute": "stop", "arguments": {"x": 1}}):
            client.ask(request)
        client.ask({"execute": "query-name"})
        assert command_errors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ({"execute": "absent"}, error("CommandNotFound", "The command absent has not been found")),
        ({}, error("GenericError", "QMP input lacks member 'execute'")),
        ({"execute": 1}, error("GenericError", "QMP input member 'execute' must be a string")),
        ({"execute": "stop", "extra": 1}, error("GenericError", "QMP input member 'extra' is unexpected")),
        ({"exec-oob": "stop"}, error("GenericError", "QMP input member 'exec-oob' is unexpected")),
        (
            {"execute": "stop", "arguments": []},
            error("GenericError", "QMP input member 'arguments' must be an object"),
        ),
        ({"execute": "stop", "arguments": {"x": 1}}, error("GenericError", "Parameter 'x' is unexpected")),
        (
            {"execute": "system_powerdown", "arguments": {"limit": "5"}},
            error("GenericError", "Invalid parameter type for 'limit', expected: number"),
        ),
        (
            {"execute": "system_powerdown", "arguments": {"limit": -1}},
            error("GenericError", "Parameter 'limit' expects number >= 0.0"),
        ),
        ([], error("GenericError", "JSON parse error: expected an object")),
        (b"{garbage}", error("GenericError", "JSON parse error")),
    ],
)
def test_refusal_is_in_qemus_words_and_does_nothing(
    connect: Connect, machine: FakeMachine, request_: Any, answer: Any
) -> None:
    assert connect().ask(request_) == answer
    assert machine.asked == []


@pytest.mark.parametrize(
    ("command", "arguments", "asked"),
    [
        ("stop", {}, "pause"),
        ("cont", {}, "resume"),
        ("system_reset", {}, "reset"),
        ("system_powerdown", {}, "powerdown None"),
        ("system_powerdown", {"limit": 30}, "powerdown 30.0"),
        ("quit", {}, "stop"),
    ],
)
def test_command_reaches_the_machine_and_returns_nothing(
    connect: Connect, machine: FakeMachine, command: str, arguments: dict[str, Any], asked: str
) -> None:
    client = connect()
    client.send({"execute": command, "arguments": arguments})
    messages = [client.receive()]
    while "event" in messages[-1]:
        messages.append(client.receive())
    assert messages[-1] == {"return": {}}
    assert machine.asked == [asked]


def test_queries_say_what_the_machine_is(connect: Connect, machine: FakeMachine) -> None:
    client = connect()
    assert client.ask({"execute": "query-status"}) == {"return": {"status": "running", "running": True}}
    assert client.ask({"execute": "query-version"})["return"] == client.greeting["QMP"]["version"]
    assert client.ask({"execute": "query-commands"}) == {"return": [{"name": name} for name in sorted(COMMANDS)]}
    assert client.ask({"execute": "query-cpus-fast"})["return"][1] == {
        "cpu-index": 1,
        "qom-path": "/machine/cpu[1]",
        "thread-id": 101,
        "target": "x86_64",
    }
    summary = client.ask({"execute": "query-machine"})["return"]
    assert (summary["name"], summary["cpus"], summary["memory"], summary["kernel"]) == (
        "web1",
        2,
        512 << 20,
        "Linux 6.1",
    )
    assert summary["exits"] == {"pio": 2, "mmio": 4, "other": 6}
    assert (summary["serial"], summary["device-faults"], summary["power-button-enabled"]) == ("stdio", 1, True)


def test_events_come_after_negotiation_only_and_to_everybody(connect: Connect, machine: FakeMachine) -> None:
    one, other, silent = connect(), connect(), connect(negotiate=False)
    one.send({"execute": "stop"})
    assert other.receive()["event"] == "STOP"
    assert one.receive()["event"] == "STOP"
    assert one.receive() == {"return": {}}
    assert silent.ask({"execute": "qmp_capabilities"}) == {"return": {}}


def test_shutdown_is_announced_before_quit_returns(connect: Connect) -> None:
    client = connect()
    client.send({"execute": "quit"})
    event = client.receive()
    assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    assert client.receive() == {"return": {}}


def test_refusal_by_the_machine_is_an_error_reply(connect: Connect, machine: FakeMachine) -> None:
    client = connect()
    client.send({"execute": "quit"}, {"execute": "quit"})
    assert [client.receive() for _ in range(3)][2] == error(
        "GenericError", "the machine is not running: its state is shutdown"
    )


def test_command_that_fails_in_us_is_answered_and_logged(
    connect: Connect, machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    machine.threads = cast(Any, None)
    with caplog.at_level(logging.ERROR):
        answer = client.ask({"execute": "query-cpus-fast", "id": 1})
    assert answer["error"]["desc"].startswith("kvmpy's own mistake: TypeError")
    assert answer["id"] == 1
    assert "Traceback" in caplog.text
    assert client.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}


def test_requests_in_one_piece_are_answered_in_order(connect: Connect) -> None:
    client = connect()
    client.send(*({"execute": "query-name", "id": n} for n in range(50)))
    assert [client.receive()["id"] for _ in range(50)] == list(range(50))


def test_request_in_single_bytes_is_answered(connect: Connect) -> None:
    client = connect()
    for byte in b'{"execute":"query-name"}':
        client.send(bytes([byte]))
    assert client.receive() == {"return": {"name": "web1"}}


def test_request_beyond_the_limit_is_answered_and_ends_the_session(connect: Connect, machine: FakeMachine) -> None:
    client = connect()
    client.send(b'{"execute":"' + b"x" * 70_000)
    assert b"JSON parse error: longer than" in client.rest()


@settings(max_examples=count(20, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(st.sampled_from([b"{", b"}", b'"', b"\\", b"\xff", b'{"id":', b"[" * 70]) | st.binary()).map(b"".join)
)
def test_hostile_bytes_never_raise_and_the_next_client_is_served(
    connect: Connect, server: MonitorServer, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    with closing(connect()) as client:
        client.send(data)
        client.socket.shutdown(socket.SHUT_WR)
        client.rest()
    with closing(connect()) as client:
        assert client.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}
    assert caplog.records == []


def test_client_that_does_not_read_is_cut_off_and_the_machine_goes_on(
    connect: Connect, server: MonitorServer, machine: FakeMachine
) -> None:
    deaf, listening = connect(), connect()
    for _ in range(40):
        machine.emit("POWERDOWN", reason="x" * 20_000)
        assert listening.receive()["event"] == "POWERDOWN"
    assert len(server._sessions) == 1
    assert len(deaf.rest()) < 1 << 20


def test_command_behind_the_one_that_cut_a_client_off_is_not_executed(
    connect: Connect, server: MonitorServer, machine: FakeMachine
) -> None:
    client = connect()
    stream = server._sessions[0]._stream
    while not stream.full:
        machine.emit("POWERDOWN", reason="x" * 20_000)
    client.send({"execute": "query-name"}, {"execute": "stop"})
    settle(machine.control)
    assert server._sessions == []
    assert machine.asked == []


def test_client_that_hangs_up_is_forgotten(connect: Connect, server: MonitorServer, machine: FakeMachine) -> None:
    before = open_descriptors()
    connect().close()
    settle(machine.control)
    assert server._sessions == []
    assert open_descriptors() == before


def test_sessions_are_bounded_by_the_limit_of_open_files_and_those_beyond_are_told_once(
    machine: FakeMachine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "qmp.sock")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (8 * 40, hard))
    try:
        server = MonitorServer(cast(Machine, machine), path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with closing(server), ExitStack() as stack:
        clients = [stack.enter_context(closing(Client(path))) for _ in range(40)]
        assert all(client.ask({"execute": "query-name"}) == {"return": {"name": "web1"}} for client in clients)
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as another:
                another.settimeout(BOUND)
                another.connect(path)
                assert another.recv(1) == b""
        assert [record.getMessage() for record in caplog.records] == [
            "monitor: 40 clients are connected: others are turned away"
        ]
        clients[0].close()
        settle(machine.control)
        stack.enter_context(closing(Client(path)))


def test_the_socket_is_the_owners_alone(server: MonitorServer, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "qmp.sock").stat().st_mode) == 0o600


def test_a_client_that_asks_without_end_leaves_others_their_turn(connect: Connect, machine: FakeMachine) -> None:
    greedy, modest = connect(), connect()

    def ask_at_once() -> None:
        """In one callback of the control thread: both have said all before either is served."""
        greedy.send(*[{"execute": "system_reset"} for _ in range(4 * TURN)])
        modest.send({"execute": "set_link", "arguments": {"name": "net1", "up": True}})

    machine.control.post(ask_at_once)
    assert modest.receive() == {"return": {}}
    assert [greedy.receive() for _ in range(4 * TURN)] == [{"return": {}}] * 4 * TURN
    assert machine.asked.index("set_link net1 True") <= TURN
    assert len(machine.asked) == 4 * TURN + 1


def test_a_stream_of_garbage_without_end_is_answered_once_and_others_are_served(
    connect: Connect, machine: FakeMachine
) -> None:
    endless, other = connect(), connect()
    for _ in range(64):
        endless.send(b"x" * (1 << 20))
        assert other.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}
    assert endless.receive() == error("GenericError", "JSON parse error: expected an object")
    endless.send(b" ")
    assert endless.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}


def test_close_hangs_up_on_everybody_and_takes_the_socket_away(machine: FakeMachine, tmp_path: Path) -> None:
    before = open_descriptors()
    server = MonitorServer(cast(Machine, machine), str(tmp_path / "qmp.sock"))
    client = Client(str(tmp_path / "qmp.sock"))
    server.close()
    assert client.rest() == b""
    client.close()
    machine.emit("STOP")
    assert open_descriptors() == before
    assert not (tmp_path / "qmp.sock").exists()


def test_socket_that_cannot_be_bound_is_named(machine: FakeMachine, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=rf"monitor.qmp: {tmp_path}/no/qmp.sock: ENOENT: cannot listen there"):
        MonitorServer(cast(Machine, machine), f"{tmp_path}/no/qmp.sock")
    assert machine.listeners == []


def test_a_session_that_is_over_is_gone_without_the_garbage_collector(connect: Connect) -> None:
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, Session) for thing in gc.get_objects())
        for _ in range(5):
            client = connect()
            client.ask({"execute": "query-status"})
            client.close()
        watcher = connect()  # once it is answered, the hang-ups before it have been seen
        watcher.ask({"execute": "query-status"})
        assert sum(isinstance(thing, Session) for thing in gc.get_objects()) == before + 1
    finally:
        gc.enable()


def test_a_session_hears_the_tracepoints_it_asked_for_and_no_other_does(connect: Connect, machine: FakeMachine) -> None:
    point = Tracepoint("test.monitor", "device")
    curious, other = connect(), connect()
    assert curious.ask({"execute": "trace", "arguments": {"name": "test.mon*"}}) == {"return": ["test.monitor"]}
    point("net1")
    event = curious.receive()
    assert event["event"] == "TRACE"
    assert event["data"]["lines"][0].endswith("test.monitor device=net1")
    assert other.ask({"execute": "query-name"}) == {"return": {"name": "web1"}}
    refused = other.ask({"execute": "trace", "arguments": {"name": "nothing.*"}})
    assert refused["error"]["desc"].startswith("nothing.*: matches no tracepoint of ")
    curious.close()
    settle(machine.control)
    assert not point


def test_a_session_whose_end_goes_wrong_is_forgotten_all_the_same(
    connect: Connect, server: MonitorServer, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Tracepoint("test.end", "")
    client = connect()
    client.ask({"execute": "trace", "arguments": {"name": "test.end"}})

    def fail(_: object) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    with monkeypatch.context() as patch:
        patch.setattr(trace, "disable", fail)
        client.close()
        settle(machine.control)
    point.clear()
    assert server._sessions == []


def test_a_client_that_traces_more_slowly_than_the_machine_loses_lines_and_not_its_session(
    connect: Connect, server: MonitorServer, machine: FakeMachine
) -> None:
    point = Tracepoint("test.flood", "device")
    slow = connect()
    slow.ask({"execute": "trace", "arguments": {"name": "test.flood"}})
    (session,) = server._sessions
    feed, refused = session._feed, Inbox[None]()
    assert feed is not None
    send = feed._send

    def note(data: dict[str, Any]) -> bool:
        sent = send(data)
        if not sent:
            refused.put(None)
        return sent

    feed._send = note
    for _ in range(3000):
        point("x" * 150)
    refused.wait()
    for _ in range(MOST_WAITING + 1):
        point("more")
    machine.emit("STOP")
    events = [slow.receive()]
    while not events[-1].get("data", {}).get("dropped"):
        events.append(slow.receive())
    assert [event["event"] for event in events if event["event"] != "TRACE"] == ["STOP"]
    slow.close()
    settle(machine.control)


def test_each_device_is_shown_with_its_driver_and_its_place(connect: Connect) -> None:
    (shown,) = connect().ask({"execute": "query-machine"})["return"]["devices"]
    assert shown == {"id": "net1", "driver": "virtio-net-pci", "address": "01:00.0", "link": "up"}


def test_a_cable_is_pulled_by_the_devices_name(connect: Connect, machine: FakeMachine) -> None:
    assert connect().ask({"execute": "set_link", "arguments": {"name": "net1", "up": False}}) == {"return": {}}
    assert machine.asked == ["set_link net1 False"]


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("set_link", {}, "Parameter 'name' is missing"),
        ("set_link", {"name": 1}, "Invalid parameter type for 'name', expected: string"),
        ("set_link", {"name": "x", "up": "y"}, "Invalid parameter type for 'up', expected: boolean"),
        ("set_link", {"name": "x", "up": 1}, "Invalid parameter type for 'up', expected: boolean"),
        ("set_link", {"name": "x", "up": None}, "Invalid parameter type for 'up', expected: boolean"),
        ("set_link", {"name": "x", "up": True, "z": 1}, "Parameter 'z' is unexpected"),
        ("set_link", {"name": 1, "z": 1}, "Invalid parameter type for 'name', expected: string"),
        ("announce-self", {"initial": 1.5}, "Invalid parameter type for 'initial', expected: integer"),
        ("announce-self", {"initial": True}, "Invalid parameter type for 'initial', expected: integer"),
        ("announce-self", {"initial": -1}, "Parameter 'initial' expects integer >= 0"),
        ("announce-self", {"initial": 10**30}, "Parameter 'initial' expects integer <= 100000"),
        (
            "announce-self",
            {"initial": 1, "max": 2, "rounds": 3, "step": 1, "interfaces": "a"},
            "Invalid parameter type for 'interfaces', expected: array",
        ),
        (
            "announce-self",
            {"initial": 1, "max": 2, "rounds": 3, "step": 1, "interfaces": ["a", 1]},
            "Invalid parameter type for 'interfaces[1]', expected: string",
        ),
        ("set_link", {"name": "x", "up": "\udc80"}, "Invalid parameter type for 'up', expected: boolean"),
        (
            "migrate-set-parameters",
            {"multifd-compression": "\udc80"},
            "Parameter 'multifd-compression' does not accept value '\udc80'",
        ),
        ("qmp_capabilities", {"enable": [None]}, "Invalid parameter type for 'enable[0]', expected: string"),
        ("trace", {"name": "x" * 201}, "Parameter 'name' expects string of length <= 200"),
    ],
)
def test_wrong_arguments_are_refused_in_qemus_words(
    connect: Connect, command: str, arguments: dict[str, Any], text: str
) -> None:
    client = connect(negotiate=command != "qmp_capabilities")
    assert client.ask({"execute": command, "arguments": arguments}) == error("GenericError", text)


def test_an_announcement_is_the_machines(connect: Connect, machine: FakeMachine) -> None:
    arguments = {"initial": 50, "max": 550, "rounds": 5, "step": 100, "interfaces": ["net1"], "id": "a"}
    assert connect().ask({"execute": "announce-self", "arguments": arguments}) == {"return": {}}
    assert machine.asked == ["announce (50, 550, 5, 100) ['net1'] a"]


def test_kvm_is_there_and_enabled(connect: Connect) -> None:
    assert connect().ask({"execute": "query-kvm"}) == {"return": {"enabled": True, "present": True}}


def test_the_schema_is_sent_whole_and_the_same_each_time(connect: Connect) -> None:
    client = connect()
    first, second = (client.ask({"execute": "query-qmp-schema", "id": n}) for n in (1, 10**40))
    assert (first["id"], second["id"]) == (1, 10**40)
    assert first["return"] == second["return"] == schema.entries(COMMANDS.values())


KEYS: Final = sorted({field.encode_name for c in COMMANDS.values() for kind in c.arguments for field in fields(kind)})
VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=count(20, 2000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(COMMANDS)))
def test_no_arguments_make_a_command_fail_in_us(
    connect: Connect, machine: FakeMachine, data: st.DataObject, name: str
) -> None:
    machine.board.pci = Board().root
    machine.state = RunState.RUNNING
    arguments = data.draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
    with closing(connect()) as client:
        client.send({"execute": name, "arguments": arguments, "id": "asked"})
        while "id" not in (answer := client.receive()):
            pass
    assert "return" in answer or not answer["error"]["desc"].startswith("kvmpy's own mistake"), answer
