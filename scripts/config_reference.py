"""Writes docs/configuration.md from the schema; with --check, only says whether it is up to date."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from msgspec import Meta
from msgspec.structs import FieldInfo, fields

from kvmpy.config.reader import Table, tables
from kvmpy.config.schema import Config
from kvmpy.config.values import Size, Text, size_text

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

One TOML file describes one machine. Paths in it are relative to its directory; `~` is not expanded. A file has at
most 1 MiB, 16 levels of nesting and 4096 tables in an array. This page is written by `scripts/config_reference.py`.

`kvmpy check FILE` reads it without root and without /dev/kvm and reports the mistakes, each with its line, in two
steps:

1. all that is wrong in the file itself and in `--set`: keys, types, ranges such as that of `machine.memory`, ids and
   references (of many mistakes the first 50 are shown);
2. once there are none, all that is wrong with what it asks for: the kernel and initrd files, whether they and the
   command line fit, what this version does not build, places on the root bus.

It does not look at the host beyond these files: not at disk images, interfaces, free memory, or what KVM can do.
`run` finds that out, and `kvmpy doctor` says what this host has.

`--set KEY=VALUE` changes a key for one run, and may be repeated: `--set machine.memory=1GiB`, and in an array by
number or id, `--set netdev.hostnet1.ifname=tap7`; it adds no table to an array, but can replace a whole one. VALUE is
read as TOML, so `2` is an integer and `true` a boolean; what is not TOML is a string, so most need no quotes. A
string that would be something else has quotes of its own, kept from the shell: `--set 'drive.disk0.id="42"'`. A path
is relative to the file's directory here too.

**In this version** `machine.dirty_ring` is checked, and then refused by `check` and `run`: dirty pages are logged in
the bitmap only. [Failover](failover.md) says what a pair does, and what it does not do yet.

## An example

```toml
name = "web1"

[machine]
memory = "512MiB"
cpus = 2

[boot]
kernel = "vmlinuz"
initrd = "initrd.img"

[[root_port]]
id = "root1"

[[root_port]]
id = "root2"

[[netdev]]
id = "hostnet1"
type = "tap"
ifname = "tap-web1"
bridge = "br0"

[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"

[[device]]
driver = "virtio-net-pci"
id = "net1"
netdev = "hostnet1"
mac = "52:54:00:6f:55:cc"
bus = "root2"
failover = true

[[device]]
driver = "vfio-pci"
id = "hostdev0"
host = "0000:5e:00.2"
bus = "root1"
failover_pair_id = "net1"

[[device]]
driver = "virtio-blk-pci"
id = "vd0"
drive = "disk0"
```
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(*found) for found in sections(Config, "Keys outside of tables"))


def sections(kind: type[Table], heading: str) -> Iterator[tuple[str, type[Table]]]:
    """Each table's heading and schema, in the order of the file."""
    yield heading, kind
    for field in public_fields(kind):
        for inner in holds_tables(field):
            name = f"`[[{field.encode_name}]]`" if get_origin(field.type) is tuple else f"`[{field.encode_name}]`"
            config = inner.__struct_config__
            yield from sections(inner, f'{name} with {config.tag_field} = "{config.tag}"' if config.tag else name)


def holds_tables(field: FieldInfo) -> tuple[type[Table], ...]:
    return tables(get_args(field.type)[0] if get_origin(field.type) is tuple else field.type)


def section(heading: str, kind: type[Table]) -> str:
    said = comments(kind)
    rows = [row(field, said[field.name]) for field in public_fields(kind) if not holds_tables(field)]
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join(["", f"## {heading}", "", inspect.getdoc(kind) or "", "", *head, *rows, ""])


def row(field: FieldInfo, comment: str) -> str:
    """A comment may say what no value can: "what it is; default: what happens without it"."""
    meaning, _, default = comment.partition("; default: ")
    return f"| `{field.encode_name}` | {type_text(field.type)} | {default or default_text(field)} | {meaning} |"


def public_fields(kind: type[Table]) -> list[FieldInfo]:
    return [field for field in fields(kind) if not field.name.startswith("_")]


def comments(kind: type[Table]) -> dict[str, str]:
    """The comment behind each field, of those inherited too."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[: kind.__mro__.index(Table)]):
        found |= re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(owner), re.MULTILINE)
    return found


def type_text(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):  # with None
        return type_text(get_args(kind)[0])
    if get_origin(kind) is Annotated:
        meta = kind.__metadata__[0]
        assert isinstance(meta, Meta)
        return f"integer, {meta.ge} to {meta.le}"
    if issubclass(kind, Enum):
        return ", ".join(f'"{member.value}"' for member in kind)
    if issubclass(kind, Size | Text):
        return str(kind.FORM)
    return {bool: "true or false", str: "string"}[kind]


def default_text(field: FieldInfo) -> str:
    if field.required:
        return "required"
    match field.default:
        case bool():
            return str(field.default).lower()
        case Size():
            return f'"{size_text(field.default)}"'.replace(" ", "")
        case Enum():
            return f'"{field.default.value}"'
        case str():
            return f'"{field.default}"'
    return str(field.default)


def main() -> int:
    """0 where the page is as the schema says, or was made so; 1 where --check finds a difference."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE.name} is not what kvmpy/config/schema.py says: run scripts/config_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
