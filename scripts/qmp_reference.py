"""Writes docs/qmp.md from the monitor's declarations; with --check, only says whether it is up to date."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec

from kvmpy.config.reader import Table
from kvmpy.monitor.commands import COMMANDS
from kvmpy.monitor.events import EVENTS, Event
from kvmpy.monitor.table import Command, plain_type, struct_fields

PAGE = Path(__file__).parent.parent / "docs" / "qmp.md"

HEAD = """\
# The monitor

A running machine is controlled over a unix socket, `qmp.sock` in its runtime directory, in QMP, the protocol of QEMU's
monitor: `kvmpy qmp`, all other commands, and any QMP client speak it. [Operating a machine](operating.md) shows how.
This page is written by `scripts/qmp_reference.py`; the machine itself says the same to `query-qmp-schema`.

Names, arguments, errors and events are QEMU's wherever QEMU has them; what is marked *ours* it has not. A message is a
JSON object. The server greets; the client's first command is `qmp_capabilities` (there are no capabilities to enable);
from then on commands are answered one after the other, each with the `id` it came with, and events come in between. A
*slow* command runs in a thread of its own: its session waits with it, the machine and other sessions do not.

- The socket has mode 0600, and only root and the user whose process it is are let in, whoever has opened it for them.
- Each client has a session of its own. An eighth of the limit of open files (`ulimit -n`) is for sessions, half as many
  descriptors are kept for them; clients beyond are hung up on.
- A request has at most 64 KiB and 64 levels; one beyond ends its session. So does not reading: what waits for a client
  is bounded to 64 KiB and the message that goes beyond it.
- A descriptor comes along with a command's first byte (SCM_RIGHTS). Of several only the first is taken. It waits for
  `getfd` or `add-fd`; another, or the session's end, closes it.

## Commands
"""


def page() -> str:
    """The whole page."""
    types = Types()
    commands = [text for command in COMMANDS.values() for text in command_section(command, types)]
    events = ["## Events", *(text for event in EVENTS for text in event_section(event, types))]
    return HEAD + "\n" + "\n\n".join([*commands, *events, *types.sections()]) + "\n"


class Types:
    """The types that fields have, which get a section each when a field names them."""

    def __init__(self) -> None:
        self._named: dict[str, type[Any]] = {}

    def text(self, hint: Any) -> str:
        hint = plain_type(hint)
        if isinstance(hint, UnionType) or (not isinstance(hint, type) and get_origin(hint) not in (list, tuple)):
            return "any"
        if get_origin(hint) in (list, tuple):
            inner = self.text(get_args(hint)[0])
            return "array" if inner == "any" else f"array of {inner}"
        if issubclass(hint, Enum | msgspec.Struct):
            self._named.setdefault(hint.__name__, hint)
            return f"[{hint.__name__}](#{hint.__name__.lower()})"
        names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
        return next((name for kind, name in names.items() if issubclass(hint, kind)), "any")

    def sections(self) -> Iterator[str]:
        yield "## Types"
        done: set[str] = set()
        while todo := sorted(self._named.keys() - done):
            for name in todo:
                done.add(name)
                yield f"### {name}"
                yield from self._section(self._named[name])

    def _section(self, kind: type[Any]) -> Iterator[str]:
        yield inspect.getdoc(kind) or ""
        if issubclass(kind, Enum):
            yield ", ".join(f'"{member.value}"' for member in kind)
        else:
            yield rows(kind, self)


def command_section(command: Command, types: Types) -> Iterator[str]:
    marks = [mark for mark, wanted in (("ours", command.ours), ("slow", command.slow)) if wanted]
    yield f"### {command.name}" + (f" ({', '.join(marks)})" if marks else "")
    yield inspect.getdoc(command.handler) or ""
    if issubclass(command.arguments[0], Table):
        yield from table_arguments(command)
    elif struct_fields(command.arguments[0]):
        yield rows(command.arguments[0], types)
    returned = command.returns
    if not isinstance(returned, type) or not issubclass(returned, msgspec.Struct) or struct_fields(returned):
        yield f"Returns: {types.text(returned)}."


def table_arguments(command: Command) -> Iterator[str]:
    """They are in the configuration's reference."""
    tag = command.arguments[0].__struct_config__.tag_field
    kinds = ", ".join(f"`{kind.__struct_config__.tag}`" for kind in command.arguments)
    yield f"Arguments: `{tag}`, one of {kinds}, and the keys of that table in [Configuration](configuration.md)."


def event_section(event: type[Event], types: Types) -> Iterator[str]:
    yield f"### {event.NAME}" + (" (ours)" if event.OURS else "")
    yield inspect.getdoc(event) or ""
    if struct_fields(event):
        yield rows(event, types)


def rows(kind: type[msgspec.Struct], types: Types) -> str:
    """The fields of a Struct. A comment may say what happens without one: "what it is; default: what happens"."""
    said = comments(kind)
    lines = ["| field | type | | meaning |", "|---|---|---|---|"]
    for field in struct_fields(kind):
        meaning, _, default = said[field.name].partition("; default: ")
        needed = "" if field.required else f"optional: {default}" if default else "optional"
        lines.append(f"| `{field.encode_name}` | {types.text(field.type)} | {needed} | {meaning} |")
    return "\n".join(lines)


def comments(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The comment behind each field."""
    return dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(kind), re.MULTILINE))


def main() -> int:
    """0 where the page is as declared, or was made so; 1 where --check finds a difference."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE.name} is not what kvmpy/monitor says: run scripts/qmp_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
