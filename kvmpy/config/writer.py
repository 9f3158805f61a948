"""A configuration as plain tables, and those as the text of a file: what `load` reads is what was written.

Every path is absolute by then, and every default that was taken is left as it is; what is None is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec

from kvmpy.config.reader import Table
from kvmpy.config.schema import Config


def tables(config: Config) -> dict[str, Any]:
    """The keys of a configuration, with values that JSON and TOML have."""
    plain: dict[str, Any] = _plain(config)
    return plain


def toml(keys: Mapping[str, Any]) -> str:
    """A file with those keys: single ones first, then the tables, then the arrays of tables."""
    lines = [f"{key} = {_value(value)}" for key, value in keys.items() if not isinstance(value, dict | list)]
    for key, value in keys.items():
        entries = [(f"[{key}]", value)] if isinstance(value, dict) else []
        entries += [(f"[[{key}]]", entry) for entry in value] if isinstance(value, list) else []
        for head, entry in entries:
            lines += ["", head, *(f"{name} = {_value(said)}" for name, said in entry.items())]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    match value:
        case Table():
            return _table(value)
        case tuple():
            return [_plain(entry) for entry in value]
        case Enum():
            return value.value
        case bool():
            return value
        case int():
            return int(value)
        case str():
            return str(value)
    return value


def _table(table: Table) -> dict[str, Any]:
    config = table.__struct_config__
    keys: dict[str, Any] = {config.tag_field: config.tag} if config.tag_field else {}
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        if value is not None and not field.name.startswith("_"):
            keys[field.encode_name] = _plain(value)
    return keys


def _value(value: object) -> str:
    """JSON's form is TOML's, but for one character that TOML wants escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
