"""What a device must carry to another host, declared once, beside the device.

    class SerialState(State):
        NAME = "serial16550"
        VERSION = 2
        ier: u8 = 0
        rx: bytes = b""
        thr_empty_pending: Annotated[bool, since(2)] = False

If the guest could notice it, it is a field here; if not, it is a plain attribute of the device and stays on this host.
Every field has its power-on value, so a fresh State is a reset device. `save` gives plain JSON values (bytes as
base64) and changes nothing; `load` treats its input as hostile: name and version are checked, exactly the fields of
that version must be there, and every value must have the declared type and range (a bool is not an int).

To add a field: bump VERSION and mark the field ``since(new version)``. A field is never removed or reinterpreted.
"""

from __future__ import annotations

from functools import cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from kvmpy.errors import KvmpyError

u8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
u16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
u32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
# JSON integers above 63 bits would be refused by a ge/le constraint of msgspec, so the range is checked by hand.
u64 = Annotated[int, "u64"]

_U64_MAX = 2**64 - 1


class Since(NamedTuple):
    """The State version that brought a field."""

    version: int


def since(version: int) -> Since:
    """Mark a field as absent from sections older than ``version``: ``Annotated[bool, since(2)]``."""
    return Since(version)


class State(msgspec.Struct, forbid_unknown_fields=True):
    """Base of every migratable state. NAME identifies the section, VERSION its layout."""

    NAME: ClassVar[str]
    VERSION: ClassVar[int] = 1


class StateError(KvmpyError):
    """A saved section is corrupt, hostile, or from another machine. The message names the field."""


S = TypeVar("S", bound=State)


def part(kind: type[S]) -> Any:
    """The default of a nested State: ``virtio: VirtioState = part(VirtioState)``."""
    return msgspec.field(default_factory=kind)


def save(state: State) -> dict[str, Any]:
    """``{"name", "version", "state"}`` in plain JSON values. Pure: the state is not changed."""
    return {"name": state.NAME, "version": state.VERSION, "state": msgspec.to_builtins(state)}


def load(kind: type[S], section: object) -> S:
    """A ``kind`` made of what `save` gave; raises StateError naming what is refused."""
    if not isinstance(section, dict) or section.keys() != {"name", "version", "state"}:
        raise StateError(f"{kind.NAME}: a section has exactly the keys name, version and state")
    if section["name"] != kind.NAME:
        raise StateError(f"{kind.NAME}: the section is named {_shown(section['name'])}")
    version = section["version"]
    if type(version) is not int or not 1 <= version <= kind.VERSION:
        raise StateError(
            f"{kind.NAME}: version {_shown(version)} is not one of 1 to {kind.VERSION}; "
            "a newer kvmpy wrote this, use that one here too"
        )
    _check_fields(kind, section["state"], version, kind.NAME)
    try:
        return msgspec.convert(section["state"], kind, strict=True)
    except msgspec.ValidationError as e:
        raise StateError(f"{kind.NAME}: {str(e)[:200]}") from e


def _check_fields(kind: type[State], value: object, version: int, path: str) -> None:
    """Exactly the fields of ``version`` are present, in this State and those nested in it.

    A nested State's fields count in the version of the outermost one: that is the section that travels.
    """
    if not isinstance(value, dict):
        raise StateError(f"{path}: expected an object, got {type(value).__name__}")
    hints = _hints(kind)
    if unknown := value.keys() - hints.keys():
        raise StateError(f"{path}: {_shown(unknown.pop())} is no field of it")
    for name, (hint, born) in hints.items():
        if (name in value) != (born <= version):
            said = "is missing" if born <= version else f"does not belong to version {version}"
            raise StateError(f"{path}.{name}: {said}")
        if name in value:
            _check_value(hint, value[name], version, f"{path}.{name}")


@cache
def _hints(kind: type[State]) -> dict[str, tuple[Any, int]]:
    """Each field's type and the version that brought it. Kept: a section may have thousands of one kind."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: (
            hints[field.name],
            next((m.version for m in get_args(hints[field.name])[1:] if isinstance(m, Since)), 1),
        )
        for field in msgspec.structs.fields(kind)
    }


def _check_value(hint: Any, value: object, version: int, path: str) -> None:
    """What msgspec does not check: the fields of States and the range of u64s, inside list, tuple and dict too.

    A union here is X | None.
    """
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        _check_marks(marks, value, path)
    if isinstance(hint, type) and issubclass(hint, State):
        _check_fields(hint, value, version, path)
        return
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is not None:
            _check_value(next(arg for arg in inner if arg is not NoneType), value, version, path)
    elif origin in (list, tuple) and isinstance(value, list):
        hints = inner if origin is tuple and Ellipsis not in inner else repeat(inner[0])
        for index, (each, item) in enumerate(zip(hints, value, strict=False)):
            _check_value(each, item, version, f"{path}[{index}]")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            _check_value(inner[1], item, version, f"{path}[{_shown(key)}]")


def _check_marks(marks: list[Any], value: object, path: str) -> None:
    """What the type is annotated with: the range of a u64, and the length of a list before each item is looked at."""
    if "u64" in marks and (type(value) is not int or not 0 <= value <= _U64_MAX):
        raise StateError(f"{path}: expected an integer from 0 to 2**64-1")
    most = next((mark.max_length for mark in marks if isinstance(mark, msgspec.Meta)), None)
    if most is not None and isinstance(value, list) and len(value) > most:
        raise StateError(f"{path}: {len(value)} items, where there are {most} at most")


def _shown(value: object) -> str:
    """A hostile value in a message: short, and without a repr that could recurse or convert a huge int."""
    if isinstance(value, str):
        return repr(value[:40])
    return str(value) if type(value) is int and abs(value) <= _U64_MAX else f"a {type(value).__name__}"
