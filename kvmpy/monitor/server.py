"""The monitor's socket: sessions that speak QMP, served in the control thread.

A session negotiates, then commands; each has its own negotiation and hears every event. A client that does not read is
cut off when its backlog is full: it never stalls the machine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

from kvmpy import trace
from kvmpy.errors import CommandError, HostError, KvmpyError, refusal
from kvmpy.host.stream import Listener, Stream
from kvmpy.machine.machine import Machine
from kvmpy.monitor import protocol
from kvmpy.monitor.commands import Negotiation, Trace, execute, parse_arguments, version
from kvmpy.monitor.trace_feed import TraceFeed

log = logging.getLogger(__name__)

MEMBERS: Final = frozenset({"execute", "arguments", "id"})
# More than any operator and their tools; fewer than would use up our descriptors.
MOST_SESSIONS: Final = 32


class MonitorServer:
    """Serves ``machine`` at the unix socket ``path``."""

    def __init__(self, machine: Machine, path: str) -> None:
        """Raises HostError where ``path`` cannot be bound."""
        self._machine = machine
        self._sessions: list[Session] = []
        try:
            self._listener = Listener(machine.control, path, self._accept)
        except OSError as e:
            raise HostError(f"monitor.qmp: {path}: {refusal(e.errno, 'cannot listen there')}") from e
        machine.listeners.append(self._on_event)

    def close(self) -> None:
        """Hang up on everybody."""
        self._listener.close()
        for session in tuple(self._sessions):
            session.close()

    def _accept(self, stream: Stream) -> None:
        if len(self._sessions) < MOST_SESSIONS:
            self._sessions.append(Session(self._machine, stream, self._sessions.remove))
        else:
            stream.close()

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        for session in tuple(self._sessions):
            session.send_event(name, data)


class Session:
    """One client."""

    def __init__(self, machine: Machine, stream: Stream, forget: Callable[[Session], object]) -> None:
        self._machine, self._stream, self._forget = machine, stream, forget
        self._parser = protocol.Parser()
        self._negotiated = False
        self._closed = False
        self._feed: TraceFeed | None = None
        stream.on_input = self._on_input
        stream.on_end = lambda _: self.close()
        self._send({"QMP": {"version": version(), "capabilities": []}})
        stream.listen(wanted=True)

    def close(self) -> None:
        """Hang up; closing twice is allowed."""
        self._closed = True
        self._stream.close()
        if self._feed is not None:
            self._feed.close()
        with contextlib.suppress(ValueError):
            self._forget(self)

    def send_event(self, name: str, data: dict[str, Any]) -> None:
        """Tell the client, once it has negotiated."""
        if self._negotiated:
            self._send(protocol.event(name, data))

    def _on_input(self, data: bytes) -> None:
        for request in self._parser.feed(data):
            if self._closed:
                return
            self._send(self._answer(request))
        if self._parser.broken:
            self.close()

    def _answer(self, request: Any) -> dict[str, Any]:
        reply: dict[str, Any] = {}
        if isinstance(request, dict) and "id" in request:
            reply["id"] = request["id"]
        try:
            return {"return": self._execute(request), **reply}
        except KvmpyError as e:
            return {**_error(e), **reply}
        except Exception as e:  # a command of ours is wrong: its client hears of it too
            log.exception("monitor: a command failed")
            return {**_error(CommandError(f"kvmpy's own mistake: {e!r}")), **reply}

    def _execute(self, request: Any) -> Any:
        if isinstance(request, CommandError):
            raise request
        if unknown := request.keys() - MEMBERS:
            raise CommandError(f"QMP input member '{min(unknown)}' is unexpected")
        if "execute" not in request:
            raise CommandError("QMP input lacks member 'execute'")
        name, arguments = request["execute"], request.get("arguments", {})
        if not isinstance(name, str):
            raise CommandError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            return self._negotiate(arguments)
        if not self._negotiated:
            raise CommandError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        if name == "trace":
            return self._trace(parse_arguments(Trace, arguments))
        return execute(self._machine, name, arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._negotiated:
            raise CommandError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        wanted = parse_arguments(Negotiation, arguments).enable
        if wanted:
            raise CommandError(f"Capability {wanted[0]} not available")
        self._negotiated = True
        return {}

    def _trace(self, wanted: Trace) -> list[str]:
        """Ours: every tracepoint that matches goes to this session from now on, as TRACE events."""
        if self._feed is None:
            self._feed = TraceFeed(self._machine.control, self._send_traced)
        matched = self._feed.enable(wanted.name)
        if not matched:
            raise CommandError(f"{wanted.name}: matches no tracepoint of {', '.join(trace.names())}")
        return matched

    def _send_traced(self, data: dict[str, Any]) -> bool:
        if self._stream.full:
            return False
        self._send(protocol.event("TRACE", data))
        return True

    def _send(self, message: dict[str, Any]) -> None:
        if self._stream.full:
            self.close()
        else:
            self._stream.write(protocol.encode(message))


def _error(e: KvmpyError) -> dict[str, Any]:
    kind = e.kind if isinstance(e, CommandError) else "GenericError"
    return {"error": {"class": kind, "desc": str(e)}}
