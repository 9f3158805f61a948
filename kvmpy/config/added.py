"""A table that a monitor's client adds while the machine runs: the schema and the rules are those of the file.

The words of a refusal are QEMU's where QEMU has the case, so that tools that read them still do. As in QMP, a flag may
be "on" or "off", and a number text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os.path import abspath, dirname
from types import UnionType
from typing import Annotated, Any, Final, cast, get_args, get_origin

import msgspec

from kvmpy.config.reader import Reader, Table, struct_fields, tables
from kvmpy.config.schema import Config, Device, Netdev, validate
from kvmpy.config.toml_lines import Message, Path, did_you_mean, plain
from kvmpy.errors import CommandError

ROOT_BUS: Final = "pcie.0"
SWITCHES: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
DIGITS_MOST: Final = 20


def read_device(config: Config, table: Mapping[str, Any]) -> Device:
    """The device that ``table`` says, as one more of ``config``'s. Raises CommandError."""
    kind = _kind(tables(Device), table, "driver", "'{}' is not a valid device model name")
    driver = table["driver"]
    device = cast("Device", _read(config, kind, table, "driver", lambda key: f"Property '{driver}.{key}'"))
    if device.id in {entry.id for entry in (*config.device, *config.root_port)}:
        raise CommandError(f"Duplicate device ID '{device.id}'")
    _require_free_bus(config, device)
    for key, entries in (("netdev", config.netdev), ("drive", config.drive)):
        target = getattr(device, key, None)
        if target is not None:
            ids = [str(entry.id) for entry in entries]
            if target not in ids:
                hint = did_you_mean(target, ids)
                raise CommandError(f"Property '{driver}.{key}' can't find value '{plain(target)}'{hint}")
            for user in config.device:
                if getattr(user, key, None) == target:
                    raise CommandError(
                        f"Property '{driver}.{key}' can't take value '{target}', it's in use by '{user.id}'"
                    )
    added = msgspec.structs.replace(config, device=(*config.device, device))
    for path, message in validate(added):
        if path[:2] == ("device", len(config.device)):
            raise CommandError(f"Property '{driver}.{path[-1]}': {_text(message)}")
    return device


def read_netdev(config: Config, table: Mapping[str, Any]) -> Netdev:
    """The netdev that ``table`` says, as one more of ``config``'s. Raises CommandError."""
    kind = _kind(tables(Netdev), table, "type", "Parameter 'type' does not accept value '{}'")
    netdev = cast("Netdev", _read(config, kind, table, "type", lambda key: f"Parameter '{key}'"))
    if any(entry.id == netdev.id for entry in config.netdev):
        raise CommandError(f"Duplicate ID '{netdev.id}' for netdev")
    added = msgspec.structs.replace(config, netdev=(*config.netdev, netdev))
    for path, message in validate(added):
        if path[:2] == ("netdev", len(config.netdev)):
            raise CommandError(f"Parameter '{path[-1]}': {_text(message)}")
    return netdev


def _require_free_bus(config: Config, device: Device) -> None:
    ports = [str(port.id) for port in config.root_port]
    if device.bus in (None, ROOT_BUS):
        advice = f"; say which root port: bus={ports[0]}" if ports else "; and the machine has no root ports"
        raise CommandError(f"Bus '{ROOT_BUS}' does not support hotplugging{advice}")
    if device.bus not in ports:
        raise CommandError(f"Bus '{plain(str(device.bus))}' not found{did_you_mean(str(device.bus), ports)}")
    for other in config.device:
        if other.bus == device.bus:
            raise CommandError(f"Bus '{device.bus}' is full: '{other.id}' is plugged into it")


def _kind(kinds: Iterable[type[Table]], table: Mapping[str, Any], tag: str, unknown: str) -> type[Table]:
    if tag not in table:
        raise CommandError(f"Parameter '{tag}' is missing")
    by_tag = {str(kind.__struct_config__.tag): kind for kind in kinds}
    said = table[tag]
    if not isinstance(said, str):
        raise CommandError(f"Invalid parameter type for '{tag}', expected: string")
    if said not in by_tag:
        raise CommandError(unknown.format(plain(said)) + did_you_mean(said, by_tag))
    return by_tag[said]


def _read(config: Config, kind: type[Table], table: Mapping[str, Any], tag: str, named: Any) -> Table:
    """``table`` as a ``kind``; ``named(key)`` is how a message begins that is about a key."""
    fields = {field.encode_name: field for field in struct_fields(kind)}
    for key in table:
        if key != tag and key not in fields:
            raise CommandError(f"{named(plain(key))} not found{did_you_mean(key, fields)}")
    if "failover_pair_id" in table and "failover_pair_id" in fields and "id" not in table:
        raise CommandError("Device with failover_pair_id needs to have id")
    for key, field in fields.items():
        if field.required and key not in table:
            raise CommandError(f"Parameter '{key}' is missing")
    reader = Reader(dirname(abspath(config._origin.file)))
    values = {key: _plain_value(fields[key].type, value) if key in fields else value for key, value in table.items()}
    made = reader.table((kind,), values, ())
    for path, message in reader.mistakes.items():
        raise CommandError(f"{named(_last(path))}: {_text(message)}")
    return cast("Table", made)


def _plain_value(hint: Any, value: object) -> object:
    """``value`` with a text that QMP allows in the place of a flag or a number made into that."""
    if isinstance(value, str):
        kinds = set(_members(hint))
        if bool in kinds:
            return SWITCHES.get(value, value)
        if int in kinds and value.isascii() and value.isdigit() and len(value) <= DIGITS_MOST:
            return int(value)
    return value


def _members(hint: Any) -> Iterator[Any]:
    if isinstance(hint, UnionType):
        for member in get_args(hint):
            yield from _members(member)
    elif get_origin(hint) is Annotated:
        yield from _members(get_args(hint)[0])
    else:
        yield hint


def _last(path: Path) -> str:
    return str(path[-1]) if path else ""


def _text(message: Message) -> str:
    return message if isinstance(message, str) else message()
