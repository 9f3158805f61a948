"""A QMP client for the commands: find the machine, connect, negotiate, ask, hang up."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Self

from kvmpy.config.values import Name
from kvmpy.errors import ConfigError, HostError, errno_name
from kvmpy.host import rundir

# The longest a running machine may take to answer: a reset reloads the kernel from disk.
PATIENCE: Final = 60.0
# It greets at once, unless its process is stopped or this host is very busy.
GREETING_PATIENCE: Final = 5.0
MOST_SEEN: Final = 1000


def find(name: str) -> rundir.Running:
    """Machine ``name``. Raises ConfigError where that is no machine's name, HostError where it does not run."""
    try:
        Name(name)  # which is also why no path outside the runtime directory is ever looked at
    except ValueError as e:
        raise ConfigError(f"NAME: {e}") from e
    machine = rundir.find(name)
    if machine is None:
        others = ", ".join(found.name for found in rundir.running()) or "none"
        raise HostError(f"{name}: no such machine runs under {rundir.base()}; running: {others}")
    return machine


class HungUp(HostError):
    """The machine has closed the connection."""


class Client:
    """A session with ``machine``, which has ``patience`` seconds for each answer; with None for ever.

    ``seen`` is the last events that have come, whatever was being waited for.
    """

    def __init__(self, machine: rundir.Running, patience: float | None = PATIENCE) -> None:
        """Raises HostError where it does not answer."""
        self._machine = machine
        self.seen: deque[dict[str, Any]] = deque(maxlen=MOST_SEEN)
        path = os.path.join(machine.directory, rundir.QMP_SOCKET)
        with contextlib.ExitStack() as resources:
            self._socket = resources.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.settimeout(GREETING_PATIENCE if patience is None else min(patience, GREETING_PATIENCE))
            try:
                self._socket.connect(path)
            except OSError as e:
                raise HostError(
                    f"{path}: {errno_name(e.errno) if e.errno else 'no answer'}: the machine does not answer; "
                    f"it is starting or ending, or process {machine.pid} hangs"
                ) from e
            self._lines = resources.enter_context(self._socket.makefile("rb"))
            self._receive("greeting")
            self("qmp_capabilities")
            self._socket.settimeout(patience)
            self._resources = resources.pop_all()

    def __call__(self, command: str, /, **arguments: Any) -> Any:
        """Send a command; returns its reply. Raises HostError with the machine's words where it refuses."""
        # A machine that hangs up does so before or after it has been asked: both show in the answer.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._receive(command)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise HostError(f"{self._machine.name}: {command}: {message['error']['desc']}")

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event from now on. Raises HungUp when the machine ends."""
        while True:
            yield self._receive("events")

    def listen(self, seconds: float) -> None:
        """Wait so long, or until the machine tells of an event, which is worth a question."""
        if select.select([self._socket], [], [], seconds)[0]:
            self._receive("events")

    def quit(self) -> None:
        """Pull the plug, and wait until the machine's process is gone."""
        with contextlib.ExitStack() as resources:
            process = None
            with contextlib.suppress(OSError):  # it belongs to another container, or has just ended
                process = os.pidfd_open(self._machine.pid)
                resources.callback(os.close, process)
            with contextlib.suppress(HungUp):  # it may be gone before it can answer
                self("quit")
                self._socket.settimeout(None)
                while True:
                    self._receive("quit")
            if process is not None:
                select.select([process], [], [])

    def close(self) -> None:
        """Hang up."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, what: str) -> dict[str, Any]:
        """The next message: a reply, or an event."""
        name = self._machine.name
        try:
            line = self._lines.readline()
            message: Any = json.loads(line) if line else None
        except TimeoutError as e:
            pid = self._machine.pid
            advice = (
                f"process {pid} is stopped; in its shell, fg brings it to the foreground, or: kill -CONT {pid}"
                if _is_stopped(pid)
                else f"see what process {pid} is doing"
            )
            raise HostError(f"{name}: {what}: no answer in {self._socket.gettimeout():g} s; {advice}") from e
        except OSError as e:
            raise HungUp(f"{name}: {what}: {errno_name(e.errno or 0)}: the machine hung up") from e
        except ValueError as e:
            raise HostError(f"{name}: {what}: what answers does not speak QMP") from e
        if message is None:
            raise HungUp(f"{name}: {what}: the machine hung up; see what it said on its standard error")
        if not isinstance(message, dict):
            return {}
        if "event" in message:
            self.seen.append(message)
        return message


def _is_stopped(pid: int) -> bool:
    """Whether job control, or a debugger, has stopped a process; what cannot be seen is not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "Tt"
    return False
