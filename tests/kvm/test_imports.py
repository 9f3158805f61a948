"""Nothing is imported while vCPUs run: an import holds the GIL and stalls a guest's exit for milliseconds.

But what a client of the monitor will need: right after they were started, while the guest has few exits.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.pvh_kernel import pvh_kernel

SPIN = b"\xeb\xfe"

# Runs `kvmpy run` as the command line does, with a client that asks for everything; prints what came in meanwhile.
PROGRAM = """
import json, socket, sys, threading
from kvmpy.machine.machine import Machine
from kvmpy.monitor.server import MonitorServer
started, ready = set(), set()
start, get_ready = Machine.start, MonitorServer.get_ready
def note_then_start(machine):
    started.update(sys.modules)
    start(machine)
def get_ready_then_note(server):
    get_ready(server)
    ready.update(sys.modules)
    threading.Thread(target=ask, args=("m",)).start()
Machine.start, MonitorServer.get_ready = note_then_start, get_ready_then_note
def ask(name):
    from kvmpy.host import rundir
    client = socket.socket(socket.AF_UNIX)
    client.connect(rundir.find(name).directory + "/qmp.sock")
    lines = client.makefile()
    lines.readline()
    for command in sys.argv[2:]:
        name, _, arguments = command.partition(" ")
        client.sendall(json.dumps({"execute": name, "arguments": json.loads(arguments or "{}")}).encode())
        while "timestamp" in (answer := json.loads(lines.readline())):
            pass
        assert "return" in answer, answer
from kvmpy.cli.main import main
code = main(["run", sys.argv[1]])
print(sorted(started))
print(sorted(ready - started))
print(sorted(set(sys.modules) - ready))
sys.exit(code)
"""
COMMANDS = (
    *("qmp_capabilities", "query-version", "query-commands", "query-name", "query-status", "query-cpus-fast"),
    *("query-machine", "query-config", "query-kvm", "query-pci", "query-root-ports"),
    *("query-qmp-schema", "query-fdsets"),
    *("query-migrate", "query-migrate-parameters", "query-migrate-capabilities", "migrate_cancel"),
    'announce-self {"initial": 1, "max": 1, "rounds": 2, "step": 0}',
    'human-monitor-command {"command-line": "info status"}',
    'trace {"name": "bus.unclaimed"}',
    *("stop", "cont", "system_reset", "system_powerdown", "quit"),
)


MACHINE = '[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n[console]\nserial = "null"\n'
PORTS = """
[[root_port]]
id = "root1"
[[root_port]]
id = "root2"
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
cache = "writeback"
"""
PLUGGING = (
    'device_add {"driver": "virtio-rng-pci", "id": "rng0", "bus": "root1"}',
    'device_add {"driver": "virtio-blk-pci", "id": "vd0", "bus": "root2", "drive": "disk0"}',
    'device_del {"id": "rng0"}',
    'netdev_add {"type": "tap", "id": "hostnet0", "ifname": "tap0"}',
    'netdev_del {"id": "hostnet0"}',
)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize(
    ("ports", "commands"), [("", COMMANDS), (PORTS, (*COMMANDS[:-1], *PLUGGING, "quit"))], ids=["plain", "plugging"]
)
def test_a_running_machine_imports_nothing(tmp_path: Path, ports: str, commands: tuple[str, ...]) -> None:
    (tmp_path / "kernel").write_bytes(pvh_kernel(SPIN))
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "m.toml").write_text(MACHINE + ports)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "m.toml"), *commands],
        env={**os.environ, "KVMPY_RUNTIME_DIR": str(tmp_path / "run")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, for_clients, later = map(ast.literal_eval, done.stdout.splitlines())
    assert later == []
    if not ports:  # what takes long, and is not needed for a machine to run
        assert not {"dataclasses", "hashlib", "logging", "shutil"} & set(before)
    assert "kvmpy.monitor.commands" in for_clients
    # None of it is for a device, or a thread that a guest waits for.
    ours = {name for name in for_clients if name.startswith("kvmpy.")} - {"kvmpy.devices.failover"}  # names of states
    assert {name.split(".")[1] for name in ours} <= {"monitor", "migration", "config"}
