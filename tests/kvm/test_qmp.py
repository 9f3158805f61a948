"""A running machine under the clients that people have: the library qemu.qmp and its qmp-shell, unmodified.

And under those that mean harm: whatever they send, or do not read, the guest keeps running.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from kvmpy import __version__
from kvmpy.config.schema import load
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.monitor.commands import COMMANDS
from kvmpy.monitor.server import MonitorServer
from tests.conftest import skip_or_fail
from tests.counts import count
from tests.fakes.loop import BOUND, open_descriptors, settle
from tests.fakes.monitor import Client
from tests.fakes.pvh_kernel import SMALL_MACHINE, pvh_kernel

# Writes to a port that nobody has, for ever: each write is an exit, so that one sees it run.
BUSY: Final = b"\xe6\xed\xeb\xfc"  # out 0xed, al; jmp back
CONFIG: Final = f"""
{SMALL_MACHINE}[[root_port]]
id = "root1"
[[root_port]]
id = "root2"
[[device]]
driver = "virtio-rng-pci"
id = "rng1"
bus = "root1"
"""


@pytest.fixture
def machine(system: System, tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "kernel").write_bytes(pvh_kernel(BUSY))
    (tmp_path / "m.toml").write_text(CONFIG)
    with Machine(load(tmp_path / "m.toml")) as machine:
        machine.start()
        yield machine


@pytest.fixture
def server(machine: Machine, path: str) -> Iterator[MonitorServer]:
    with closing(MonitorServer(machine, path)) as server:
        yield server


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "qmp.sock")


def exits(machine: Machine) -> int:
    return sum(thread.vcpu.pio_exits for thread in machine.threads)


def wait_for_exits(machine: Machine) -> None:
    """The guest runs: it gets on from here."""
    before = exits(machine)
    while exits(machine) < before + 10:
        os.sched_yield()


# The library


async def session(path: str) -> dict[str, Any]:
    """What an operator's script does in the life of a machine; returns what it saw."""
    seen: dict[str, Any] = {}
    client = QMPClient("test")
    await client.connect(path)
    with client.listener() as events:
        seen["version"] = await client.execute("query-version")
        seen["status"] = await client.execute("query-status")
        await client.execute("stop")
        seen["stop"] = await events.get()
        seen["paused"] = await client.execute("query-status")
        await client.execute("cont")
        seen["resume"] = await events.get()
        await client.execute("system_reset")
        seen["reset"] = await events.get()
        seen["schema"] = await client.execute("query-qmp-schema")
        seen["pci"] = await client.execute("query-pci")
        seen["refused"] = await refusal(client, "device_del", {"id": "no-such", "x": 1})
        seen["unknown"] = await refusal(client, "no-such")
        await client.execute("system_powerdown", {"limit": 0.05})
        seen["end"] = [(await events.get())["event"] for _ in range(2)]
    await client.disconnect()
    return seen


async def refusal(client: QMPClient, command: str, arguments: dict[str, object] | None = None) -> tuple[str, str]:
    with pytest.raises(ExecuteError) as refused:
        await client.execute(command, arguments)
    return refused.value.error_class, str(refused.value)


@pytest.mark.usefixtures("server")
def test_the_library_holds_a_session_from_greeting_to_shutdown(machine: Machine, path: str) -> None:
    seen = asyncio.run(session(path))
    assert seen["version"]["package"] == f"kvmpy {__version__}"
    assert seen["status"] == {"status": "running", "running": True}
    assert seen["paused"] == {"status": "paused", "running": False}
    assert [seen[name]["event"] for name in ("stop", "resume", "reset")] == ["STOP", "RESUME", "RESET"]
    assert seen["reset"]["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
    assert {entry["name"] for entry in seen["schema"] if entry["meta-type"] == "command"} == set(COMMANDS)
    assert seen["refused"] == ("GenericError", "Parameter 'x' is unexpected")
    assert seen["unknown"] == ("CommandNotFound", "The command no-such has not been found")
    assert seen["end"] == ["POWERDOWN", "SHUTDOWN"]
    assert machine.wait(BOUND) is Outcome.POWER_OFF
    (port,) = [device for device in seen["pci"][0]["devices"] if device["qdev_id"] == "root1"]
    assert port["pci_bridge"]["bus"]["secondary"] == 1
    assert [behind["qdev_id"] for behind in port["pci_bridge"]["devices"]] == ["rng1"]
    (rng,) = port["pci_bridge"]["devices"]
    window = port["pci_bridge"]["bus"]["prefetchable_range"]
    assert all(window["base"] <= bar["address"] < window["limit"] for bar in rng["regions"] if bar["prefetch"])


@pytest.mark.usefixtures("server")
def test_the_library_sends_descriptors(machine: Machine, path: str) -> None:
    async def give(fd: int) -> Any:
        client = QMPClient("test")
        await client.connect(path)
        client.send_fd_scm(fd)
        await client.execute("getfd", {"fdname": "migration"})
        client.send_fd_scm(fd)
        added = await client.execute("add-fd", {"fdset-id": 4, "opaque": "rdwr:disk"})
        listed = await client.execute("query-fdsets")
        await client.execute("closefd", {"fdname": "migration"})
        await client.execute("remove-fd", {"fdset-id": 4})
        await client.disconnect()
        return added, listed

    before = open_descriptors()
    reader, writer = os.pipe()
    added, listed = asyncio.run(give(writer))
    assert listed == [{"fdset-id": 4, "fds": [{"fd": added["fd"], "opaque": "rdwr:disk"}]}]
    os.close(writer)
    assert os.read(reader, 1) == b""  # ours was the last
    os.close(reader)
    settle(machine.control)
    assert open_descriptors() == before


@pytest.mark.usefixtures("server")
def test_many_clients_of_the_library_at_once_each_get_their_own_answers_and_all_events(path: str) -> None:
    async def one(number: int, ready: asyncio.Barrier) -> list[str]:
        client, events = QMPClient(f"test{number}"), EventListener(("STOP", "RESUME"))
        client.register_listener(events)
        await client.connect(path)
        await ready.wait()
        for _ in range(20):
            assert (await client.execute("query-name")) == {"name": "m"}
        await ready.wait()
        if number == 0:
            await client.execute("stop")
            await client.execute("cont")
        heard = [str((await events.get())["event"]) for _ in range(2)]
        await client.disconnect()
        return heard

    async def all_of_them() -> list[list[str]]:
        ready = asyncio.Barrier(30)
        return await asyncio.gather(*(one(number, ready) for number in range(30)))

    assert asyncio.run(all_of_them()) == [["STOP", "RESUME"]] * 30


# The shell


def shell(path: str, typed: str, *options: str, home: Path) -> str:
    """What `qmp-shell` shows of a session in which ``typed`` is typed."""
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "qmp-shell"), *options, path],
        input=typed,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "HOME": str(home)},  # it keeps its history there
    )
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.usefixtures("server")
def test_qmp_shell_holds_a_session(machine: Machine, path: str, tmp_path: Path) -> None:
    typed = "query-status\nstop\nquery-status\n\nsystem_powerdown limit=-1\nset_link name=x up=true\nnope\nquit\n"
    said = shell(path, typed, home=tmp_path)
    assert said.startswith("Welcome to the QMP low-level shell!\nConnected to QEMU 10.0.0\n")
    answers = [json.loads(line.removeprefix("(QEMU) ")) for line in said.splitlines() if line.startswith('(QEMU) {"')]
    assert answers == [
        {"return": {"running": True, "status": "running"}},
        {"return": {}},
        {"return": {"running": False, "status": "paused"}},
        {"error": {"class": "GenericError", "desc": "Parameter 'limit' expects number >= 0.0"}},
        {"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}},
        {"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}},
        {"return": {}},
    ]
    assert "'event': 'STOP'" in said
    assert machine.wait(BOUND) is Outcome.POWER_OFF


@pytest.mark.usefixtures("server")
def test_qmp_shell_holds_a_session_in_the_human_monitors_words(machine: Machine, path: str, tmp_path: Path) -> None:
    said = shell(path, "info status\nstop\ninfo status\nnope\ncpu 0\nhelp stop\nquit\n", "-H", home=tmp_path)
    assert said.startswith("Welcome to the HMP shell!")
    for words in ("VM status: running", "VM status: paused", "unknown command: 'nope'", "stop|s  -- stop the vCPUs"):
        assert words in said
    assert machine.wait(BOUND) is Outcome.POWER_OFF


# Clients that mean harm


def send_until_cut_off(client: socket.socket, data: bytes, limit: int) -> int:
    """How many bytes of ``data``, sent again and again, went before the machine hung up; at most ``limit``."""
    sent = 0
    try:
        while sent < limit:
            sent += client.send(data)
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def test_a_request_of_a_gigabyte_is_cut_off_early_and_the_guest_runs_on(
    machine: Machine, server: MonitorServer, path: str
) -> None:
    before = open_descriptors()
    with closing(Client(path)) as endless:
        endless.send(b'{"execute": "')
        assert send_until_cut_off(endless.socket, b"x" * (1 << 16), 1 << 30) < 1 << 23
        wait_for_exits(machine)
    settle(machine.control)
    assert server._sessions == []
    assert open_descriptors() == before


def test_garbage_without_end_is_swallowed_and_the_guest_and_others_get_on(
    machine: Machine, server: MonitorServer, path: str
) -> None:
    before = exits(machine)
    with closing(Client(path)) as endless, closing(Client(path)) as other:
        for _ in range(count(16, soak=1024)):
            assert send_until_cut_off(endless.socket, b"x" * (1 << 16), 1 << 20) == 1 << 20
            assert other.ask({"execute": "query-name"}) == {"return": {"name": "m"}}
        assert endless.receive()["error"]["desc"] == "JSON parse error: expected an object"
    assert exits(machine) > before
    wait_for_exits(machine)


def test_a_client_that_never_reads_is_cut_off_and_the_guest_and_others_get_on(
    machine: Machine, server: MonitorServer, path: str
) -> None:
    with closing(Client(path)) as deaf, closing(Client(path)) as other:
        flood = b'{"execute": "query-machine"}' * 1000
        assert send_until_cut_off(deaf.socket, flood, 1 << 30) < 1 << 26
        assert other.ask({"execute": "query-name"}) == {"return": {"name": "m"}}
        assert len(server._sessions) == 1
        wait_for_exits(machine)


@pytest.mark.parametrize(
    "half", [b"{", b'{"execute": "quit', b'{"execute": "quit"', b"\xff\xfe", b'{"execute": "st\x00']
)
def test_half_a_message_does_nothing_and_its_client_can_leave(
    machine: Machine, server: MonitorServer, path: str, half: bytes
) -> None:
    before = open_descriptors()
    with closing(Client(path)) as client:
        client.send(half)
        settle(machine.control)
    settle(machine.control)
    assert server._sessions == []
    assert open_descriptors() == before
    assert machine.state is RunState.RUNNING


# Another user

STRANGER: Final = 65534
ASK: Final = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
try:
    client.connect(sys.argv[2])
    print(client.recv(1000))
except OSError as e:
    print(type(e).__name__)
"""


def ask_as(uid: int, path: str) -> str:
    done = subprocess.run([sys.executable, "-I", "-c", ASK, str(uid), path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_another_user_is_kept_out_by_the_sockets_mode_and_where_that_is_opened_by_his_uid(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        skip_or_fail("host", "only root can be somebody else")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = os.path.join(directory, "qmp.sock")
        with closing(MonitorServer(machine, path)):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert ask_as(STRANGER, path) == "PermissionError"
            os.chmod(path, 0o777)
            before = open_descriptors()
            assert [ask_as(STRANGER, path) for _ in range(3)] == ["b''"] * 3
            assert ask_as(0, path).startswith('b\'{"QMP"')
            settle(machine.control)
            assert open_descriptors() == before
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: turned away a client of uid {STRANGER}: only root and our own are let in"
    ]
    wait_for_exits(machine)


# Hot-plug


@pytest.mark.usefixtures("server")
def test_devices_and_netdevs_come_and_go_by_the_library(machine: Machine, path: str) -> None:
    rng: dict[str, object] = {"driver": "virtio-rng-pci", "id": "rng2", "bus": "root2"}

    async def plug() -> dict[str, Any]:
        seen: dict[str, Any] = {}
        client = QMPClient("test")
        await client.connect(path)
        with client.listener(("DEVICE_DELETED",)) as events:
            await client.execute("device_add", rng)
            seen["machine"] = await client.execute("query-machine")
            seen["again"] = await refusal(client, "device_add", rng)
            seen["bus"] = await refusal(client, "device_add", {**rng, "id": "rng3", "bus": "root9"})
            seen["driver"] = await refusal(client, "device_add", {"driver": "nope", "id": "x"})
            seen["netdev"] = await refusal(client, "netdev_del", {"id": "no-such"})
            await client.execute("device_del", {"id": "rng2", "force": True})
            seen["deleted"] = (await events.get())["data"]
            seen["gone"] = await refusal(client, "device_del", {"id": "rng2"})
            await client.execute("device_add", rng)
        await client.disconnect()
        return seen

    seen = asyncio.run(plug())
    assert [(device["id"], device["driver"]) for device in seen["machine"]["devices"]] == [
        ("rng1", "virtio-rng-pci"),
        ("rng2", "virtio-rng-pci"),
    ]
    assert seen["deleted"] == {"device": "rng2", "path": "/machine/peripheral/rng2"}
    assert seen["gone"] == ("DeviceNotFound", "Device 'rng2' not found")
    assert seen["netdev"] == ("DeviceNotFound", "Device 'no-such' not found")
    assert seen["again"] == ("GenericError", "Duplicate device ID 'rng2'")
    assert seen["bus"][1].startswith("Bus 'root9' not found")
    assert seen["driver"] == ("GenericError", "'nope' is not a valid device model name")
    wait_for_exits(machine)
