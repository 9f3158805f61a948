"""A kernel at `kvmpy.abi.ioctl.sys_ioctl`: notes each request by name, and answers or fails as a test says."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from kvmpy._native import ffi
from kvmpy.errors import IoctlError

Answer = Callable[[Any], int]


class Kernel:
    """Answers 0 unless told otherwise. ``seen`` has each request's name and a copy of its argument's fields."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.answers: dict[str, Answer] = {
            "KVM_GET_API_VERSION": lambda _: 12,
            "KVM_CHECK_EXTENSION": lambda _: 1,
        }

    def __call__(self, name: str, fd: int, request: int, argument: Any) -> int:
        self.seen.append((name, copied(argument)))
        return self.answers.get(name, lambda _: 0)(argument)

    def named(self, name: str) -> list[Any]:
        """The arguments of every request of that name."""
        return [argument for seen, argument in self.seen if seen == name]

    def fail(self, name: str, number: int = errno.EINVAL) -> None:
        """Have ``name`` fail from now on."""

        def refuse(_: Any) -> int:
            raise IoctlError(name, number)

        self.answers[name] = refuse

    def recover(self, name: str) -> None:
        del self.answers[name]


def copied(argument: Any) -> Any:
    """An argument as plain values: an integer passed as `void *`, a dict for a struct, a list of one for a number's
    address."""
    kind = ffi.typeof(argument)
    if kind.item.kind == "void":
        return int(ffi.cast("uintptr_t", argument))
    if kind.item.kind != "struct":
        return [argument[0]]
    return plain(argument[0])


def plain(value: Any) -> Any:
    """A cffi struct or array as dicts and lists; a flexible array as long as its ``nr`` says, or as it was made."""
    if not isinstance(value, ffi.CData):
        return value
    kind = ffi.typeof(value)
    if kind.kind == "array":
        return [plain(value[n]) for n in range(kind.length if kind.length is not None else len(value))]
    fields = {name: getattr(value, name) for name, _ in kind.fields}
    if isinstance(nr := fields.get("nr"), int):
        fields = {name: each[0:nr] if _is_flexible(each) else each for name, each in fields.items()}
    return {name: plain(each) for name, each in fields.items()}


def _is_flexible(value: Any) -> bool:
    return isinstance(value, ffi.CData) and ffi.typeof(value).kind == "array" and ffi.typeof(value).length is None
