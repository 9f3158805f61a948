"""One client of the monitor: it negotiates, then commands, and hears every event. Served in the control thread.

Requests are answered one after the other. While a slow one is under way in its thread, and while there is more than
one turn's worth of them, nothing more is read: what a client sends waits in its socket, not here.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from kvmpy import trace
from kvmpy.errors import CommandError, KvmpyError
from kvmpy.host.descriptors import Allowance, Descriptors, DescriptorSets
from kvmpy.host.stream import SocketStream
from kvmpy.log import Log
from kvmpy.machine.machine import Machine
from kvmpy.monitor import protocol
from kvmpy.monitor.commands import COMMANDS
from kvmpy.monitor.lazy import LazyMigrations
from kvmpy.monitor.queries import version
from kvmpy.monitor.table import Command
from kvmpy.monitor.trace_feed import TraceFeed
from kvmpy.monitor.worker import Workers

if TYPE_CHECKING:
    from kvmpy.migration.control import Migrations

log = Log(__name__)

MEMBERS: Final = frozenset({"execute", "arguments", "id"})
# Requests of one session that are answered before others have their turn: a few milliseconds.
TURN: Final = 16


class Session:
    """A `kvmpy.monitor.table.Caller`. ``forget`` is told when it is over."""

    commands: Mapping[str, Command] = COMMANDS

    def __init__(
        self,
        machine: Machine,
        stream: SocketStream,
        workers: Workers,
        sets: DescriptorSets,
        allowance: Allowance,
        forget: Callable[[Session], object],
        migrations: LazyMigrations,
    ) -> None:
        self.machine, self.descriptor_sets, self.descriptors = machine, sets, Descriptors(allowance)
        self._stream, self._workers, self._forget = stream, workers, forget
        self._migrations = migrations
        self._parser = protocol.Parser()
        self._requests: deque[Any] = deque()
        self._negotiated = False
        self._busy = False
        self._closed = False
        self._feed: TraceFeed | None = None
        stream.takes_descriptors = True
        stream.on_input = self._on_input
        stream.on_end = lambda _: self.close()
        self._send(protocol.greeting(version()))
        stream.listen(wanted=True)

    def close(self) -> None:
        """Hang up; closing twice is allowed."""
        self._closed = True
        try:
            self._requests.clear()
            self._stream.close()
            self.descriptors.close()
            if self._feed is not None:
                self._feed.close()
        finally:
            with contextlib.suppress(ValueError):
                self._forget(self)

    def send_event(self, message: bytes) -> None:
        """Tell the client, once it has negotiated."""
        if self._negotiated:
            self._send(message)

    # For commands

    def migrations(self) -> Migrations:
        return self._migrations.make()

    def migrations_if_any(self) -> Migrations | None:
        return self._migrations.made

    def take_descriptor(self) -> int | None:
        return self._stream.take_descriptor()

    def negotiate(self, capabilities: list[str]) -> None:
        if capabilities:
            raise CommandError(f"Capability {capabilities[0]} not available")
        self._negotiated = True

    def trace(self, glob: str) -> list[str]:
        if self._feed is None:
            self._feed = TraceFeed(self.machine.control, self._send_traced)
        matched = self._feed.enable(glob)
        if not matched:
            raise CommandError(f"{glob}: matches no tracepoint of {', '.join(trace.names())}")
        return matched

    # Requests

    def _on_input(self, data: bytes) -> None:
        self._requests.extend(self._parser.feed(data))
        self._serve()

    def _serve(self) -> None:
        """Answer a turn's worth of requests."""
        for _ in range(TURN):
            if self._busy or not self._requests:
                break
            self._begin(self._requests.popleft())
        if self._closed:
            return
        if self._parser.broken and not self._requests and not self._busy:
            self.close()
            return
        self._stream.listen(wanted=not self._busy and not self._requests)
        if self._requests and not self._busy:
            with contextlib.suppress(RuntimeError):  # the machine is being closed, and we are with it
                self.machine.control.post(self._serve)

    def _begin(self, request: Any) -> None:
        """Answer ``request``, or have a thread do it."""
        if isinstance(request, CommandError):  # not to be raised: with its traceback it would hold itself for ever
            self._send(protocol.error(request, None))
            return
        try:
            command, arguments = self._understand(request)
            if command.slow:
                self._workers.start(command.name, lambda: self._answer(request, command, arguments), self._end)
                self._busy = True
            else:
                self._send(self._answer(request, command, arguments))
        except CommandError as e:
            self._send(protocol.error(e, request))

    def _end(self, answer: bytes) -> None:
        """The slow one is done."""
        self._busy = False
        if not self._closed:
            self._send(answer)
            self._serve()

    def _answer(self, request: Any, command: Command, arguments: Any) -> bytes:
        try:
            return protocol.reply(command.handler(self, arguments), request)
        except KvmpyError as e:
            return protocol.error(e, request)
        except Exception as e:  # a command of ours is wrong: its client hears of it too
            log.exception("monitor: %s failed", command.name)
            return protocol.error(CommandError(f"kvmpy's own mistake: {e!r}"), request)

    def _understand(self, request: Any) -> tuple[Command, Any]:
        """The command and its arguments. Raises CommandError as QEMU words it."""
        if unknown := request.keys() - MEMBERS:
            raise CommandError(f"QMP input member '{min(unknown)}' is unexpected")
        if "execute" not in request:
            raise CommandError("QMP input lacks member 'execute'")
        name, arguments = request["execute"], request.get("arguments", {})
        if not isinstance(name, str):
            raise CommandError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        self._require_mode(name)
        if name not in self.commands:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        command = self.commands[name]
        return command, command.parse(arguments)

    def _require_mode(self, name: str) -> None:
        negotiates = name == "qmp_capabilities"
        if negotiates and self._negotiated:
            raise CommandError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if not negotiates and not self._negotiated:
            raise CommandError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")

    # Messages

    def _send_traced(self, data: dict[str, Any]) -> bool:
        if self._stream.unsent:  # the backlog is for what is not lost: replies and events
            return False
        self._send(protocol.event("TRACE", data, time.time_ns()))
        return True

    def _send(self, message: bytes) -> None:
        if self._stream.full:
            self.close()
        else:
            self._stream.write(message)
