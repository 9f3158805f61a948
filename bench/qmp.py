"""A monitor's client for measuring: either VMM speaks QMP, and stamps its events by the host's clock."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any, Final

PATIENCE: Final = 300.0
POLL: Final = 0.02


class Qmp:
    """One session. Commands by name; events are kept, with their times."""

    def __init__(self, path: Path) -> None:
        """Waits for whoever is to listen at ``path``."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        _connect(self._socket, path)
        self._lines = self._socket.makefile()
        self._events: list[tuple[str, float]] = []
        self._lines.readline()
        self("qmp_capabilities")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __call__(self, command: str, **arguments: Any) -> Any:
        """What it returns. Raises RuntimeError with the error that it answers."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": names}).encode() + b"\n")
        while "return" not in (answer := self._read()):
            if "error" in answer:
                raise RuntimeError(f"{command} {names}: {answer['error']}")
        return answer["return"]

    def wait(self, event: str) -> float:
        """When it came, or comes, last, in seconds."""
        while True:
            if found := [at for name, at in self._events if name == event]:
                return found[-1]
            self._read()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the monitor has hung up")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            stamp = message["timestamp"]
            self._events.append((message["event"], stamp["seconds"] + stamp["microseconds"] / 1e6))
        return message


def _connect(client: socket.socket, path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(POLL)
