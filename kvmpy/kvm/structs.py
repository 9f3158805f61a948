"""A kernel struct as a State with fields of the same names, and back.

A State of this kind lists the fields of its struct that carry something; padding and what is not the guest's are left
out, and zero again when the struct is made. cffi keeps a struct only as long as somebody holds it, and not for a part
of it: whoever reads a part holds the whole.

A module of such States does without `from __future__ import annotations`: evaluating them costs each start 3 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec

from kvmpy._native import ffi
from kvmpy.state import State

S = TypeVar("S", bound=State)


def read(kind: type[S], struct: object) -> S:
    """The fields of ``struct`` that ``kind`` has."""
    return kind(**{name: convert(getattr(struct, name)) for name, convert in _plan(kind)})


def fields(state: State) -> dict[str, Any]:
    """What `Layout.new` takes to make the struct again."""
    made: dict[str, Any] = msgspec.to_builtins(state, builtin_types=(bytes,))
    return made


@cache
def _plan(kind: type[State]) -> list[tuple[str, Callable[[Any], Any]]]:
    return [(name, _converter(kind.__annotations__[name])) for name in kind.__struct_fields__]


def _converter(hint: Any) -> Callable[[Any], Any]:
    """From the C value of a field to that of a State's."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, State):
        return partial(read, hint)
    if get_origin(hint) is tuple:
        inner = _converter(get_args(hint)[0])
        return lambda array: tuple(inner(item) for item in array)
    return _bytes if hint is bytes else int


def _bytes(array: Any) -> bytes:
    return bytes(ffi.buffer(array))
