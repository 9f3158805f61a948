"""How a command of the monitor is declared, once: name, arguments, what it returns, and the function that does it.

    class SetLink(Arguments, frozen=True, kw_only=True):
        "The id of a network device or of its netdev, and whether its cable is plugged in."

        name: str  # the device's id, or its netdev's
        up: bool  # whether the cable is plugged in

    @command("set_link", SetLink, Nothing)
    def set_link(caller: Caller, arguments: SetLink) -> Nothing:
        "Plug a network device's cable in, or pull it."

From the declarations follow the check of a client's arguments, query-commands, query-qmp-schema and docs/qmp.md; the
comment behind a field is its entry there. `kvmpy.monitor.commands` lists the commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, fields

from kvmpy.config.reader import Table
from kvmpy.errors import CommandError
from kvmpy.host.descriptors import Descriptors, DescriptorSets
from kvmpy.machine.machine import Machine

if TYPE_CHECKING:
    from kvmpy.migration.control import Migrations

# What QEMU calls the type of a JSON value
JSON_NAMES: Final = {str: "string", int: "integer", bool: "boolean", float: "number"}


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """What a client says beside a command's name. A field with a default may be left out."""


class Reply(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What a client is told. A field that has its default is left out."""


class NoArguments(Arguments, frozen=True, kw_only=True):
    """A command that takes none."""


class Nothing(Reply, frozen=True, kw_only=True):
    """An empty object: it is done."""


class Caller(Protocol):
    """The session that a command came from."""

    @property
    def machine(self) -> Machine:
        """What is commanded."""

    @property
    def commands(self) -> Mapping[str, Command]:
        """Every command there is."""

    @property
    def descriptors(self) -> Descriptors:
        """Those that the session was sent; they end with it."""

    @property
    def descriptor_sets(self) -> DescriptorSets:
        """Those that all sessions share."""

    def migrations(self) -> Migrations:
        """What migrates the machine; imported the first time, which takes a moment. Only for slow commands."""

    def migrations_if_any(self) -> Migrations | None:
        """The same, if it has been asked for before."""

    def take_descriptor(self) -> int | None:
        """The one that came last with a message, the caller's from now on."""

    def negotiate(self, capabilities: list[str]) -> None:
        """Enter command mode. Raises CommandError."""

    def trace(self, glob: str) -> list[str]:
        """Send the session the tracepoints that match from now on; returns their names. Raises CommandError."""


A = TypeVar("A", bound=Arguments)
Handler = Callable[[Caller, Any], Any]


class Command(msgspec.Struct, frozen=True):
    """One command. ``arguments`` has more than one kind where they are a table of the configuration."""

    name: str
    arguments: tuple[type[msgspec.Struct], ...]
    returns: Any
    handler: Handler
    ours: bool
    """QEMU has no such command."""
    slow: bool
    """It may wait for the host, so it runs in a thread of its own; its session waits with it, and nobody else."""

    def parse(self, arguments: dict[str, Any]) -> Any:
        """What the handler is given of a client's ``arguments``. Raises CommandError as QEMU words it."""
        if issubclass(self.arguments[0], Table):
            return arguments  # the machine checks it, as it does the configuration's
        return parse_arguments(self.arguments[0], arguments)


R = TypeVar("R")


def command(
    name: str, arguments: type[A], returns: type[R], *, ours: bool = False, slow: bool = False
) -> Callable[[Callable[[Caller, A], R]], Command]:
    """Declare the decorated function as a command."""
    return lambda handler: Command(name, (arguments,), returns, handler, ours, slow)


def table_command(name: str, *kinds: type[Table]) -> Callable[[Callable[[Caller, dict[str, Any]], Nothing]], Command]:
    """Declare a slow command whose arguments are a table of the configuration, of one of these kinds."""
    return lambda handler: Command(name, kinds, Nothing, handler, ours=False, slow=True)


def parse_arguments(kind: type[msgspec.Struct], arguments: dict[str, Any]) -> Any:
    """``arguments`` as ``kind``. Raises CommandError as QEMU words it, in its order: key by key, then what is left."""
    values = {}
    for field in struct_fields(kind):
        if field.encode_name in arguments:
            values[field.name] = _value(field, arguments[field.encode_name])
        elif field.required:
            raise CommandError(f"Parameter '{field.encode_name}' is missing")
    for key in arguments.keys() - {field.encode_name for field in struct_fields(kind)}:
        raise CommandError(f"Parameter '{key}' is unexpected")
    return kind(**values)


struct_fields = cache(fields)


def plain_type(hint: Any) -> Any:
    """A field's type without what it says of None and of its range."""
    if hasattr(hint, "__metadata__"):
        return plain_type(get_args(hint)[0])
    members = [member for member in get_args(hint) if member is not NoneType]
    return plain_type(members[0]) if NoneType in get_args(hint) and len(members) == 1 else hint


def _value(field: FieldInfo, value: Any) -> Any:
    name, kind = field.encode_name, plain_type(field.type)
    try:
        if value is None:  # absent is left out, null is no value
            raise msgspec.ValidationError("Expected a value, got `null`")
        return msgspec.convert(value, field.type, strict=True)
    except UnicodeEncodeError as e:  # half a surrogate pair, where there should be no string, or one of a few
        if isinstance(kind, type) and issubclass(kind, Enum):
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'") from e
        raise CommandError(f"Invalid parameter type for '{name}', expected: {_json_name(kind)}") from e
    except msgspec.ValidationError as e:
        said = str(e)
        expected, wrong_type, _ = said.partition(", got `")
        inner = re.search(r" - at `\$(\[\d+\])`$", said)
        if wrong_type and inner:
            kind = plain_type(get_args(kind)[0])
            name += inner[1]
        if wrong_type:
            raise CommandError(f"Invalid parameter type for '{name}', expected: {_json_name(kind)}") from e
        if isinstance(kind, type) and issubclass(kind, Enum):
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'") from e
        limits = re.sub(r"`\w+( \| null)?`", lambda _: f"{_json_name(kind)}", expected.removeprefix("Expected "))
        raise CommandError(f"Parameter '{name}' expects {limits}") from e


def _json_name(kind: Any) -> str:
    if get_origin(kind) is not None:
        return "array"
    return JSON_NAMES.get(kind, "string" if issubclass(kind, str | Enum) else "object")
