"""Makes Structs of TOML data, and finds every mistake on the way rather than the first.

msgspec converts the single values; tables, arrays of tables and unions told apart by a tag are walked here, over the
fields that msgspec reports. There is no code for any one key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache, partial
from types import UnionType
from typing import Any, Final, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from kvmpy.config.toml_lines import Message, Path, did_you_mean, plain
from kvmpy.config.values import Backend, HostPath, got, shown

ITEMS_MAX: Final = 4096  # of an array of tables; no machine has room for so many


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file: each field is a key, and there are no others."""


class Reader:
    """Makes Structs of TOML tables and collects the ``mistakes``.

    What is wrong or missing is read as its default, or as "" where it has none, so that all the rest is still checked.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.mistakes: dict[Path, Message] = {}

    def refuse(self, path: Path, message: Message) -> None:
        """Note a mistake, unless there is one at ``path`` or around it: this one then only follows from it."""
        if not any(path[:end] in self.mistakes for end in range(1, len(path) + 1)):
            self.mistakes[path] = message

    def table(self, kinds: Sequence[type[Table]], value: object, path: Path) -> Any:
        if not isinstance(value, dict):
            self.refuse(path, f"expected a table, got {got(value)}")
            value = {}
        kind = self.kind(kinds, value, path)
        keys = [field for field in struct_fields(kind) if not field.name.startswith("_")]
        if kind in kinds:
            names = [field.encode_name for field in keys] + [kind.__struct_config__.tag_field or ""]
            for key in [key for key in value if key not in names]:
                self.refuse((*path, key), partial(_unknown_key, key, names))
        return kind(**{field.name: self.field(field, value, (*path, field.encode_name)) for field in keys})

    def kind(self, kinds: Sequence[type[Table]], table: dict[str, Any], path: Path) -> type[Table]:
        """Which of the ``kinds`` a table says it is; if none, what they have in common."""
        tag_field = kinds[0].__struct_config__.tag_field
        if tag_field is None:
            return kinds[0]
        tags = {str(kind.__struct_config__.tag): kind for kind in kinds}
        said = table.get(tag_field)
        if isinstance(said, str) and said in tags:
            return tags[said]
        missing = f"missing, expected {_choice(tags)}"
        self.refuse((*path, tag_field), partial(_not_one_of, tags, said) if tag_field in table else missing)
        return kinds[0] if len(kinds) == 1 else kinds[0].__bases__[0]

    def field(self, field: FieldInfo, table: dict[str, Any], path: Path) -> Any:
        if get_origin(field.type) is tuple:
            return self.array(tables(get_args(field.type)[0]), table.get(field.encode_name, []), path)
        if kinds := tables(field.type):
            return self.table(kinds, table.get(field.encode_name, {}), path)
        default = "" if field.required else field.default
        if field.encode_name not in table:
            if field.required:
                self.refuse(path, "missing")
            return default
        value = table[field.encode_name]
        try:
            return msgspec.convert(value, field.type, dec_hook=self.parse)
        except msgspec.ValidationError as e:
            self.refuse(path, _reason(e, field.type, value))
            return default
        except UnicodeEncodeError:  # a monitor's client can send half a surrogate pair, and no file can have one
            self.refuse(path, "half a surrogate pair is no text")
            return default

    def array(self, kinds: Sequence[type[Table]], value: object, path: Path) -> tuple[Any, ...]:
        if not isinstance(value, list):
            self.refuse(path, f"expected an array of tables, [[{path[-1]}]], got {got(value)}")
            return ()
        if len(value) > ITEMS_MAX:
            self.mistakes[path] = f"expected {ITEMS_MAX} tables at most, got {len(value)}"
        return tuple(self.table(kinds, item, (*path, index)) for index, item in enumerate(value[:ITEMS_MAX]))

    def parse(self, kind: type[Any], value: object) -> object:
        """msgspec calls this for the types that are ours; it wraps the ValueError they raise."""
        parsed = kind(value)
        return parsed.within(self.directory) if isinstance(parsed, HostPath | Backend) else parsed


# Each look at a class leaves a circle of closures behind (msgspec's own), and nobody collects those while vCPUs run.
struct_fields = cache(msgspec.structs.fields)


def tables(hint: Any) -> tuple[type[Table], ...]:
    """The kinds of table that a type stands for; none where it is a value's."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return members if all(isinstance(member, type) and issubclass(member, Table) for member in members) else ()


def _reason(error: msgspec.ValidationError, kind: Any, value: object) -> Message:
    """What is wrong with a value: said by its own type, or made of msgspec's "Expected `int | null`, got `str`"."""
    if error.__cause__:
        return str(error.__cause__)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return partial(_not_one_of, [member.value for member in kind], value)
    wanted, wrong_type, _ = str(error).removeprefix("Expected ").partition(", got")
    words = {"int": "an integer", "bool": "true or false", "str": "a string"}
    wanted = re.sub(r"`(\w+)( \| null)?`", lambda match: words[match[1]], wanted)
    return f"expected {wanted}, got {got(value) if wrong_type else shown(value)}"


def _unknown_key(key: str, names: Iterable[str]) -> str:
    return f"unknown key '{plain(key)}'{did_you_mean(key, names)}"


def _not_one_of(names: Iterable[str], value: object) -> str:
    if not isinstance(value, str):
        return f"expected {_choice(names)}, got {got(value)}"
    return f"expected {_choice(names)}, got {shown(value)}{did_you_mean(value, names)}"


def _choice(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
