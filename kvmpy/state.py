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

import struct
from collections.abc import Callable, Sequence
from functools import cache, partial
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


class Since(msgspec.Struct, frozen=True):
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
    try:
        _check_fields(kind, section["state"], version)
    except _Refused as e:
        raise StateError(f"{kind.NAME}{e.place}: {e.said}") from None
    try:
        return msgspec.convert(section["state"], kind, strict=True)
    except msgspec.ValidationError as e:
        raise StateError(f"{kind.NAME}: {str(e)[:200]}") from e


class _Refused(Exception):
    """``said`` of what is at ``place``, which whoever looks into something puts together on the way out."""

    def __init__(self, said: str, place: str = "") -> None:
        super().__init__(said)
        self.said, self.place = said, place


_Check = Callable[[Any, int], None]
"""Looks at a value of a section of that version. Raises _Refused."""


class _Field(NamedTuple):
    """The version that brought it, and what there is to check of its value."""

    born: int
    check: _Check | None


def _check_fields(kind: type[State], value: object, version: int) -> None:
    """Exactly the fields of ``version`` are present, in this State and those nested in it.

    A nested State's fields count in the version of the outermost one: that is the section that travels.
    """
    if not isinstance(value, dict):
        raise _Refused(f"expected an object, got {type(value).__name__}")
    names, checks = _plan(kind, version)
    if value.keys() != names:
        _refuse_names(kind, value, version)
    name = ""
    try:
        for name, check in checks:
            check(value[name], version)
    except _Refused as e:
        e.place = f".{name}{e.place}"
        raise


def _refuse_names(kind: type[State], value: dict[str, Any], version: int) -> None:
    fields = _fields(kind)
    if unknown := value.keys() - fields.keys():
        raise _Refused(f"{_shown(unknown.pop())} is no field of it")
    for name, (born, _) in fields.items():
        if (name in value) != (born <= version):
            said = "is missing" if born <= version else f"does not belong to version {version}"
            raise _Refused(said, f".{name}")


@cache
def _plan(kind: type[State], version: int) -> tuple[frozenset[str], tuple[tuple[str, _Check], ...]]:
    """The fields of that version, and of which of them there is something to check."""
    fields = {name: check for name, (born, check) in _fields(kind).items() if born <= version}
    return frozenset(fields), tuple((name, check) for name, check in fields.items() if check is not None)


@cache
def _fields(kind: type[State]) -> dict[str, _Field]:
    """Kept: a section may have thousands of one kind, and a guest stands still while it is loaded."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: _Field(
            next((m.version for m in get_args(hints[field.name])[1:] if isinstance(m, Since)), 1),
            _check_of(hints[field.name]),
        )
        for field in msgspec.structs.fields(kind)
    }


def _check_of(hint: Any) -> _Check | None:
    """What msgspec does not check: the fields of States and the range of u64s, inside list, tuple and dict too.

    None where there is nothing of it in such a value. A union here is X | None.
    """
    marks: Sequence[Any] = ()
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
    if isinstance(hint, type) and issubclass(hint, State):
        return partial(_check_fields, hint)
    if "u64" in marks:
        return _check_u64
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        some = _check_of(next(arg for arg in inner if arg is not NoneType))
        return None if some is None else partial(_check_some, some)
    if origin in (list, tuple):
        most = next((mark.max_length for mark in marks if isinstance(mark, msgspec.Meta)), None)
        if origin is tuple and Ellipsis not in inner:
            checks = [(index, check) for index, each in enumerate(inner) if (check := _check_of(each)) is not None]
            return partial(_check_places, checks) if checks else None
        every = _check_of(inner[0])
        return None if every is None and most is None else partial(_check_all, most, every, _places(inner[0]))
    if origin is dict and (every := _check_of(inner[1])) is not None:
        return partial(_check_values, every)
    return None


def _places(hint: Any) -> Sequence[int]:
    """Where the u64s of a tuple are, if there is nothing else to check in it."""
    parts = get_args(hint) if get_origin(hint) is tuple else ()
    checks = [] if Ellipsis in parts else [_check_of(each) for each in parts]
    found = [place for place, check in enumerate(checks) if check is _check_u64]
    return found if len(found) == len(checks) - checks.count(None) else ()


def _check_u64(value: object, version: int) -> None:
    if type(value) is not int or not 0 <= value <= _U64_MAX:
        raise _Refused("expected an integer from 0 to 2**64-1")


def _check_some(check: _Check, value: object, version: int) -> None:
    if value is not None:
        check(value, version)


def _check_all(most: int | None, check: _Check | None, places: Sequence[int], value: object, version: int) -> None:
    """Of a list or tuple of one kind; its length before each item is looked at.

    ``places`` are the u64s of an item, where there is nothing else to check: hundreds at once then, for there are.
    """
    if not isinstance(value, list):
        return
    if most is not None and len(value) > most:
        raise _Refused(f"{len(value)} items, where there are {most} at most")
    if check is None or (places and _are_u64(value, places)):
        return
    index = 0
    try:
        for index, item in enumerate(value):  # noqa: B007  for what is raised
            check(item, version)
    except _Refused as e:
        e.place = f"[{index}]{e.place}"
        raise


def _are_u64(items: Sequence[Any], places: Sequence[int]) -> bool:
    """Whether there are numbers at these places of each item, all in the range; what they are else is not said."""
    try:
        for place in places:
            struct.pack(f"{len(items)}Q", *[item[place] for item in items])
    except (struct.error, TypeError, LookupError):
        return False
    return True


def _check_places(checks: Sequence[tuple[int, _Check]], value: object, version: int) -> None:
    """Of a tuple of several kinds: those of its items of which there is something to check."""
    if not isinstance(value, list):
        return
    for index, check in checks:
        if index < len(value):
            try:
                check(value[index], version)
            except _Refused as e:
                e.place = f"[{index}]{e.place}"
                raise


def _check_values(check: _Check, value: object, version: int) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            try:
                check(item, version)
            except _Refused as e:
                e.place = f"[{_shown(key)}]{e.place}"
                raise


def _shown(value: object) -> str:
    """A hostile value in a message: short, and without a repr that could recurse or convert a huge int."""
    if isinstance(value, str):
        return repr(value[:40])
    return str(value) if type(value) is int and abs(value) <= _U64_MAX else f"a {type(value).__name__}"
