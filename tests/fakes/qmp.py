"""A machine as the commands see it: a runtime directory with a monitor that answers as it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from kvmpy.host.rundir import PID, QMP_SOCKET, RuntimeDirectory

Handler = Callable[[dict[str, Any]], Any]


class Refusal(Exception):
    """What a handler raises for an error reply."""


class FakeMonitor:
    """Serves any number of clients. ``handlers`` has each command; ``asked`` notes what came, in order."""

    def __init__(self, name: str, handlers: dict[str, Handler]) -> None:
        self.handlers = handlers
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.quit = threading.Event()
        self.pid = 0  # what the pid file says
        self._resources = ExitStack()
        self._name = name
        self._clients: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def commands(self) -> list[str]:
        """The names of what came."""
        return [command for command, _ in self.asked]

    def emit(self, event: str, **data: Any) -> None:
        """Tell the clients that are connected."""
        self.emit_at(0, event, **{name.replace("_", "-"): value for name, value in data.items()})

    def emit_at(self, ns: int, event: str, /, **data: Any) -> None:
        """The same, with the stamp of another time."""
        stamp = {"seconds": ns // 10**9, "microseconds": ns % 10**9 // 1000}
        for client in self._clients:
            with contextlib.suppress(OSError):  # it has left
                self._send(client, {"event": event, "data": data, "timestamp": stamp})

    def __enter__(self) -> Self:
        directory = RuntimeDirectory(self._name)
        self._resources.callback(directory.close)
        with open(directory.file(PID), "r+") as file:  # ours would be waited for
            file.write(f"{self.pid}\n")
            file.truncate()
        listener = self._resources.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(directory.file(QMP_SOCKET))
        listener.listen()
        thread = threading.Thread(target=self._serve, args=(listener,), name="fake-monitor")
        thread.start()
        self._resources.callback(self._end)
        self._resources.callback(thread.join)
        self._resources.callback(listener.shutdown, socket.SHUT_RDWR)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # shut down
                return
            self._threads.append(threading.Thread(target=self._talk, args=(client,), name="fake-monitor-client"))
            self._threads[-1].start()

    def _talk(self, client: socket.socket) -> None:
        with client:
            self._send(client, {"QMP": {"version": {}, "capabilities": []}})
            self._clients.append(client)
            decoder, text = json.JSONDecoder(), ""
            with contextlib.suppress(ConnectionError):
                while not self.quit.is_set() and (piece := client.recv(1 << 16)):
                    text += piece.decode()
                    while text:
                        message, end = decoder.raw_decode(text)
                        text = text[end:].lstrip()
                        self._answer(client, message)
            self._clients.remove(client)

    def hang_up(self) -> None:
        """On all that are still there."""
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        self.hang_up()
        for thread in self._threads:
            thread.join()

    def _answer(self, client: socket.socket, message: dict[str, Any]) -> None:
        command, arguments = message["execute"], message.get("arguments", {})
        if command == "qmp_capabilities":
            self._send(client, {"return": {}})
            return
        self.asked.append((command, arguments))
        if command == "quit":
            self.quit.set()
        try:
            handler = self.handlers.get(command)
            returned = handler(arguments) if handler else {}
        except Refusal as e:
            self._send(client, {"error": {"class": "GenericError", "desc": str(e)}})
        else:
            self._send(client, {"return": returned})

    @staticmethod
    def _send(client: socket.socket, message: Any) -> None:
        client.sendall(json.dumps(message).encode() + b"\r\n")
