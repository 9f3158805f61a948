"""A machine's monitor, asked by one process that stays: each `kvmpy qmp` would cost an emulated host seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from scripts.lab.host import EmulatedHost

RELAY: Final = """
import json, socket, sys, time
while True:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(sys.argv[1])
        break
    except (FileNotFoundError, ConnectionRefusedError):
        time.sleep(0.1)
stream = connection.makefile()
def ask(line):
    connection.sendall(line.encode())
    while "event" in (answer := json.loads(stream.readline())):
        pass
    return answer
stream.readline()
ask('{"execute": "qmp_capabilities"}')
for line in sys.stdin:
    print(json.dumps(ask(line)), flush=True)
"""
ANSWER: Final = re.compile(r"^(\{.*\})\n", re.MULTILINE)


class Monitor:
    """A session with the machine called ``name``, once that has a monitor."""

    def __init__(self, host: EmulatedHost, name: str) -> None:
        self._process = host.spawn(["python", "-I", "-S", "-c", RELAY, f"/run/kvmpy/{name}/qmp.sock"])

    def __call__(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """What it returns; it must not refuse."""
        self._process.send(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        answer = json.loads(self._process.expect(ANSWER)[1])
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def close(self) -> None:
        """Hang up."""
        self._process.close_stdin()
