"""An ioctl as a typed, named callable.

    KVM_GET_REGS = Get("KVM_GET_REGS", Regs)
    KVM_GET_REGS(fd).rip

A request knows its name, its number (from the compiler) and its argument's type, so `KVM_GET_REGS(fd)` is `Regs` to
mypy and a failure says KVM_GET_REGS. Tests and fakes replace `sys_ioctl` and nothing else. EINTR is not retried: to
whom it matters, it is the news.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self, TypeVar

from kvmpy._native import ffi, lib
from kvmpy.errors import IoctlError


def sys_ioctl(name: str, fd: int, request: int, argument: Any) -> int:
    """The one place an ioctl is issued (without the GIL). Raises IoctlError naming the request."""
    result: int = lib.kvmpy_ioctl(fd, request, argument)
    if result < 0:
        raise IoctlError(name, -result)
    return result


class Layout:
    """A kernel struct: to the reader a class with typed fields, at run time the cffi object of the C struct.

    Sizes and offsets are the compiler's. A test holds the annotations against it.
    """

    C: ClassVar[str]

    def __init_subclass__(cls, c: str) -> None:
        cls.C = c

    @classmethod
    def new(cls, **fields: object) -> Self:
        """A zeroed struct with ``fields`` set; a flexible array takes a list, or a length."""
        made: Self = ffi.new(f"{cls.C} *", fields)
        return made


T = TypeVar("T", bound=Layout)


class Request:
    """An ioctl request by its kernel name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number: int = getattr(lib, name)


class Call(Request):
    """_IO: no argument, or an integer."""

    def __call__(self, fd: int, value: int = 0) -> int:
        return sys_ioctl(self.name, fd, self.number, ffi.cast("void *", value))


class Get(Request, Generic[T]):
    """_IOR: a struct out."""

    def __init__(self, name: str, layout: type[T]) -> None:
        super().__init__(name)
        self.layout = layout

    def __call__(self, fd: int) -> T:
        value = self.layout.new()
        sys_ioctl(self.name, fd, self.number, value)
        return value


class Put(Request, Generic[T]):
    """_IOW, or _IOWR where the kernel fills in what it was given: a struct in."""

    def __init__(self, name: str, layout: type[T]) -> None:
        super().__init__(name)
        self.layout = layout

    def __call__(self, fd: int, value: T) -> int:
        return sys_ioctl(self.name, fd, self.number, value)


class Number(Request):
    """A request about one bare number, passed by its address: of 64 bits, or of the C type ``c``."""

    def __init__(self, name: str, c: str = "uint64_t") -> None:
        super().__init__(name)
        self.c = c


class GetNumber(Number):
    """_IOR: a number out."""

    def __call__(self, fd: int) -> int:
        value = ffi.new(f"{self.c} *")
        sys_ioctl(self.name, fd, self.number, value)
        return int(value[0])


class PutNumber(Number):
    """_IOW: a number in."""

    def __call__(self, fd: int, number: int) -> int:
        return sys_ioctl(self.name, fd, self.number, ffi.new(f"{self.c} *", number))


class Unsized(Request):
    """A request whose number does not tell the size of its argument; it is a pointer all the same."""
