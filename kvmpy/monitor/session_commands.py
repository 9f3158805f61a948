"""Commands that concern the client's own session, or the monitor itself."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvmpy.monitor import schema
from kvmpy.monitor.table import Arguments, Caller, NoArguments, Nothing, command


class Negotiation(Arguments, frozen=True, kw_only=True):
    """Which of the greeting's capabilities the client wants."""

    enable: Annotated[list[str], Meta(max_length=16)] = []  # there are none to enable


class TraceGlob(Arguments, frozen=True, kw_only=True):
    """Which tracepoints."""

    name: Annotated[str, Meta(max_length=200)]  # a glob over their names, such as "virtio.*"


@command("qmp_capabilities", Negotiation, Nothing)
def qmp_capabilities(caller: Caller, arguments: Negotiation) -> Nothing:
    """Begin: every session's first command. From here on all others are answered, and events are sent."""
    caller.negotiate(arguments.enable)
    return Nothing()


@command("query-qmp-schema", NoArguments, list[dict[str, Any]], slow=True)
def query_qmp_schema(caller: Caller, _: NoArguments) -> Any:
    """Say what commands and events there are and what is in them, in QEMU's introspection format."""
    return msgspec.Raw(schema.encoded(tuple(caller.commands.values())))


@command("trace", TraceGlob, list[str], ours=True)
def trace(caller: Caller, arguments: TraceGlob) -> list[str]:
    """Send this session, from now on, what the tracepoints see whose names match, as TRACE events.

    Returns the names that match.
    """
    return caller.trace(arguments.name)
