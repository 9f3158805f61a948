"""`kvmpy qmp`: one monitor command, or without one, a list of what there is; and what a machine tells of itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Final

from kvmpy.cli.client import Client, HungUp, find
from kvmpy.config.toml_lines import did_you_mean
from kvmpy.errors import ConfigError, HostError

# The longest a command may take: a device that is plugged in may have all of the guest's memory mapped for it first.
COMMAND_PATIENCE: Final = 600.0


def qmp(args: argparse.Namespace) -> int:
    """Send one monitor command and print what it returns, as JSON; without one, list those there are.

    With --events, print every event from then on.
    """
    arguments = parse_arguments(args.arguments)
    with Client(find(args.name), None if args.events else COMMAND_PATIENCE) as client:
        if args.events:
            return _watch(client, args.command, arguments)
        if args.command is None:
            print("\n".join(usages(client("query-qmp-schema"))))
        else:
            print(json.dumps(_run(client, args.command, arguments), indent=2))
    return 0


def _watch(client: Client, command: str | None, arguments: dict[str, Any]) -> int:
    """What the ``command`` returns, if there is one; then each event, as JSON on a line of its own."""
    try:
        if command is not None:
            print(json.dumps(_run(client, command, arguments)))
        for event in chain(tuple(client.seen), client.events()):
            print(json.dumps(event), flush=True)
    except (HungUp, KeyboardInterrupt):  # the machine has ended, or whoever watches has seen enough
        pass
    return 0


def _run(client: Client, command: str, arguments: dict[str, Any]) -> Any:
    """Send a command. Raises HostError, which for a name with a slip in it has the right one."""
    try:
        return client(command, **arguments)
    except HostError as e:
        if f"The command {command} has not been found" not in str(e):
            raise
        names = [usage.split()[0] for usage in usages(client("query-qmp-schema"))]
        raise HostError(f"{e}{did_you_mean(command, names)}") from e


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """What KEY=VALUE ... says, as qmp-shell reads it: a.b=c is an object in an object."""
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        names = key.split(".")
        if not (equals and all(names)):
            raise ConfigError(f"{text}: expected KEY=VALUE, where VALUE is JSON or else a string")
        inner = arguments
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{text}: {name} has been given a value that is no object")
        if names[-1] in inner:
            raise ConfigError(f"{text}: {key} has been given a value before")
        inner[names[-1]] = _value(value)
    return arguments


def usages(schema: list[dict[str, Any]]) -> Iterator[str]:
    """Each command with its arguments, as one would type them; those in brackets can be left out."""
    types = {entry["name"]: entry for entry in schema}
    for entry in sorted(schema, key=lambda entry: str(entry["name"])):
        if entry["meta-type"] == "command":
            arguments = types[entry["arg-type"]]
            words = [_usage(member, types) for member in arguments["members"]]
            yield " ".join([entry["name"], *words, *(["..."] if "tag" in arguments else [])])


def _usage(member: dict[str, Any], types: dict[str, Any]) -> str:
    kind = types[member["type"]]
    if kind["meta-type"] == "enum":
        value = "|".join(kind["values"])
    else:
        value = kind.get("json-type", kind["meta-type"]).upper()
    text = f"{member['name']}={value}"
    return f"[{text}]" if "default" in member else text


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=int)  # which refuses them: NaN is not JSON
    except (ValueError, RecursionError):
        return text
