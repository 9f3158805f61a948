"""Run on an emulated host: a VMM in a seat, driven by its monitor and the guest's serial line. Standard library.

A seat is JSON: "command", which starts a VMM there, "incoming", the words that have it wait for a guest, "uri", where
it waits, its sockets "qmp" and "serial", and "hooks": what is run at which status of the source's or event of the
destination's. Nothing is known of the VMM but QMP, which both speak.
"""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE = 240.0


class Journal:
    """Lines that come from somewhere, with the time of each, and waits for one of them."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []
        self._news = threading.Condition()

    def add(self, at: float, line: str) -> None:
        with self._news:
            self.lines.append((at, line))
            self._news.notify_all()

    def find(self, text: str, since: float = 0.0) -> float | None:
        return next((at for at, line in self.lines if at >= since and text in line), None)

    def wait(self, text: str, since: float = 0.0) -> float:
        """When the first line with ``text`` came."""
        with self._news:
            if not self._news.wait_for(lambda: self.find(text, since) is not None, PATIENCE):
                raise SystemExit(f"{text!r} never came: {self.lines[-30:]}")
        return self.find(text, since) or 0.0


class Serial(Journal):
    """A guest's serial line."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = connected(path)
        self._marks = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        left = b""
        with suppress(OSError):
            while data := self._socket.recv(4096):
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    self.add(time.time(), line.decode(errors="replace").strip())

    def type(self, command: str) -> list[str]:
        """What the guest's shell answers. What is typed is echoed, so the marks are not typed as they are printed."""
        self._marks += 1
        begun = len(self.lines)
        end = "" if command.endswith("&") else ";"
        self._socket.sendall(f"{command}{end} echo DONE$(({self._marks}))\n".encode())
        self.wait(f"DONE{self._marks}")
        return [line for _, line in self.lines[begun:]]

    def close(self) -> None:
        self._socket.close()


class Qmp(Journal):
    """A session. Its events are lines: ``STOP``, ``MIGRATION active``."""

    def __init__(self, path: str, on_event: Callable[[str], None]) -> None:
        super().__init__()
        self._socket, self._on_event = connected(path), on_event
        self._file = self._socket.makefile()
        self._answers = Journal()
        self._asked = 0
        self._file.readline()
        threading.Thread(target=self._read, daemon=True).start()
        self("qmp_capabilities")
        self("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._file:
                message = json.loads(line)
                if "event" not in message:
                    self._answers.add(0.0, json.dumps(message))
                    continue
                stamp = message["timestamp"]
                name = f"{message['event']} {message.get('data', {}).get('status', '')}".strip()
                self.add(stamp["seconds"] + stamp["microseconds"] / 1e6, name)
                self._on_event(name)

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._asked += 1
        question = {"execute": command, "arguments": arguments, "id": f"n{self._asked}."}
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        self._answers.wait(f'"n{self._asked}."')
        answer = next(json.loads(line) for _, line in self._answers.lines if f'"n{self._asked}."' in line)
        if "error" in answer:
            raise SystemExit(f"{command} {arguments}: {answer}")
        return answer["return"]


class Process:
    """A VMM in one of a contender's seats."""

    def __init__(self, seat: dict[str, Any], side: str, *, incoming: bool) -> None:
        self.seat, self._hooks, self._side = seat, dict(seat["hooks"]), side
        self.output = open(f"{seat['serial']}.log", "a")  # noqa: SIM115  it is the process's
        words = [*seat["command"], *(seat["incoming"] if incoming else ())]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)
        self.serial = Serial(seat["serial"])
        self.qmp = Qmp(seat["qmp"], self._event)

    def become(self, side: str) -> None:
        self._side = side

    def _event(self, name: str) -> None:
        for words in self._hooks.get(f"{self._side}:{name}", ()):
            subprocess.run(words, check=True)

    def end(self) -> None:
        with suppress(SystemExit, OSError):
            self.qmp("quit")
        self.process.wait(PATIENCE)
        self.serial.close()


def connected(path: str) -> socket.socket:
    """To a socket that a process is about to make."""
    deadline = time.time() + PATIENCE
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
        except OSError:
            client.close()
            if time.time() > deadline:
                raise
            time.sleep(0.05)
        else:
            return client
