"""Nothing is imported while vCPUs run: an import holds the GIL and stalls a guest's exit for milliseconds."""

from __future__ import annotations

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
before = set()
start = Machine.start
def note_then_start(machine):
    before.update(sys.modules)
    start(machine)
    threading.Thread(target=ask, args=(machine.name,)).start()
Machine.start = note_then_start
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
print(sorted(set(sys.modules) - before))
sys.exit(code)
"""
COMMANDS = (
    *("qmp_capabilities", "query-version", "query-commands", "query-name", "query-status", "query-cpus-fast"),
    *("query-machine", "query-kvm", "query-pci", "query-qmp-schema", "query-fdsets"),
    'announce-self {"initial": 1, "max": 1, "rounds": 2, "step": 0}',
    'human-monitor-command {"command-line": "info status"}',
    'trace {"name": "bus.unclaimed"}',
    *("stop", "cont", "system_reset", "system_powerdown", "quit"),
)


@pytest.mark.usefixtures("system")
def test_a_running_machine_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(pvh_kernel(SPIN))
    (tmp_path / "m.toml").write_text(
        '[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n[console]\nserial = "null"\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "m.toml"), *COMMANDS],
        env={**os.environ, "KVMPY_RUNTIME_DIR": str(tmp_path / "run")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
