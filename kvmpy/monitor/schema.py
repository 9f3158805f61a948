"""query-qmp-schema: commands, events and their types in QEMU's introspection format (its qapi/introspect.json).

Derived from the declarations. Types have the names of their classes, where QEMU hides its own behind numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Final, get_args, get_origin

import msgspec

from kvmpy.monitor.events import EVENTS
from kvmpy.monitor.table import Command, plain_type, struct_fields

Entry = dict[str, Any]

BUILTINS: Final = {str: ("str", "string"), int: ("int", "int"), bool: ("bool", "boolean"), float: ("number", "number")}
ANY: Final = ("any", "value")
ORDER: Final = {"command": 0, "event": 1}
EMPTY: Final = "q_empty"


class Schema:
    """Collects ``entries``: each type once, when something first names it."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._named: dict[str, object] = {}

    def command(self, command: Command) -> None:
        """Describe a command."""
        arguments = self.object_name(command.arguments)
        self._add(command.name, "command", {"arg-type": arguments, "ret-type": self.type_name(command.returns)})

    def event(self, name: str, data: type[msgspec.Struct]) -> None:
        """Describe an event."""
        self._add(name, "event", {"arg-type": self.object_name((data,))})

    def type_name(self, hint: Any) -> str:
        """The name of a type, which is described if it is new."""
        hint = plain_type(hint)
        if isinstance(hint, UnionType):
            return self.object_name(get_args(hint))
        if get_origin(hint) in (list, tuple):
            element = self.type_name(get_args(hint)[0])
            return self._once(f"[{element}]", "array", hint, lambda: {"element-type": element})
        if not isinstance(hint, type):  # a dict of anything, or Any
            return self._builtin(*ANY)
        if issubclass(hint, Enum):
            return self._enum(hint.__name__, [member.value for member in hint])
        if issubclass(hint, msgspec.Struct):
            return self.object_name((hint,))
        return self._builtin(*next((BUILTINS[kind] for kind in (bool, int, float, str) if issubclass(hint, kind)), ANY))

    def object_name(self, kinds: Sequence[type[msgspec.Struct]]) -> str:
        """The name of an object type; of several kinds, a tag says which one it is."""
        if len(kinds) > 1 or kinds[0].__struct_config__.tag_field:
            return self._tagged(kinds)
        if not struct_fields(kinds[0]):
            return self._once(EMPTY, "object", None, lambda: {"members": []})
        return self._once(kinds[0].__name__, "object", kinds[0], lambda: {"members": self._members(kinds[0])})

    def _tagged(self, kinds: Sequence[type[msgspec.Struct]]) -> str:
        base, tag = kinds[0].__bases__[0], kinds[0].__struct_config__.tag_field
        assert issubclass(base, msgspec.Struct)
        tags = {str(kind.__struct_config__.tag): kind for kind in kinds}
        common = {field.name for field in struct_fields(base)}

        def content() -> Entry:
            choice = {"name": tag, "type": self._enum(f"{base.__name__}Kind", list(tags))}
            variants = [{"case": case, "type": self._variant(kind, common)} for case, kind in tags.items()]
            return {"members": [choice, *self._members(base)], "tag": tag, "variants": variants}

        return self._once(base.__name__, "object", base, content)

    def _variant(self, kind: type[msgspec.Struct], common: Collection[str]) -> str:
        members = self._members(kind, without=common)
        return self._once(
            kind.__name__ if members else EMPTY, "object", kind if members else None, lambda: {"members": members}
        )

    def _members(self, kind: type[msgspec.Struct], without: Collection[str] = ()) -> list[Entry]:
        return [
            {"name": field.encode_name, "type": self.type_name(field.type)}
            | ({} if field.required else {"default": None})
            for field in struct_fields(kind)
            if field.name not in without
        ]

    def _enum(self, name: str, values: list[str]) -> str:
        content = {"members": [{"name": value} for value in values], "values": values}
        return self._once(name, "enum", tuple(values), lambda: content)

    def _builtin(self, name: str, json_type: str) -> str:
        return self._once(name, "builtin", json_type, lambda: {"json-type": json_type})

    def _once(self, name: str, kind: str, means: object, content: Callable[[], Entry]) -> str:
        if name not in self._named:
            self._named[name] = means  # first, as a type may contain itself
            self._add(name, kind, content())
        elif self._named[name] != means:
            raise ValueError(f"two types are called {name}")
        return name

    def _add(self, name: str, kind: str, content: Entry) -> None:
        self.entries.append({"name": name, "meta-type": kind, **content})


def entries(commands: Iterable[Command]) -> list[Entry]:
    """The whole schema: commands, events, types."""
    schema = Schema()
    for command in commands:
        schema.command(command)
    for event in EVENTS:
        schema.event(event.NAME, event)
    return sorted(schema.entries, key=lambda entry: ORDER.get(entry["meta-type"], len(ORDER)))


@cache
def encoded(commands: tuple[Command, ...]) -> bytes:
    """The same as JSON, made when it is first asked for: by then the vCPUs run, and it takes milliseconds."""
    return json.dumps(entries(commands)).encode()
