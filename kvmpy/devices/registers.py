"""Registers declared as data: for devices whose specification is a table of them.

    class Slot(RegisterBank, size=8):
        capability = Field(0, 4, reset=0x0001_0040)
        control    = Field(4, 2, reset=0x07C0, writable=0x17E0)
        status     = Field(6, 2, clear=0x010B, hardware=0x0040)

        @control.written
        def _control_written(self, old: int, new: int) -> None: ...

A `RegisterSpace` is the bytes a guest sees, with masks for each byte, so an access of any width and alignment needs
no code of its own: BAR sizing, write-one-to-clear, a byte-wide write to a word. A `RegisterBank` is a group of Fields
placed somewhere in a space; `bank.control` is an int in our code, and setting it there knows no masks. Hooks hang on
the Field object, so a misspelt name fails at import; they run after the whole access is stored, in the order of the
declaration, and must not raise.

The content of the space is one bytearray: it is the migratable state. `adopt` takes a foreign one only if the bits that
neither guest nor hardware can change are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, overload

import msgspec

from kvmpy.state import StateError

Change = Callable[[int, int], object]
BankHook = TypeVar("BankHook", bound=Callable[..., object])


class _Watch(msgspec.Struct, frozen=True):
    """Who wants to know of guest accesses to [offset, offset+size), which ends at ``end``."""

    offset: int
    size: int
    end: int
    changed: Change | None
    written: Change | None


class _Reading(NamedTuple):
    """Who wants to know of guest reads of [offset, end)."""

    offset: int
    end: int
    reading: Callable[[], object]


class RegisterSpace:
    """``size`` bytes of registers, and what a guest may do to each bit. The device's lock serializes all of it."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self._reset = bytearray(size)
        self._writable = bytearray(size)
        self._clear = bytearray(size)
        self._hardware = bytearray(size)
        self._watches: dict[tuple[int, int], _Watch] = {}  # by offset and size, in the order of their declaration
        self._by_dword: dict[int, list[_Watch]] = {}  # those of _watches that touch it
        self._readings: dict[tuple[int, int], _Reading] = {}

    def define(
        self,
        offset: int,
        size: int,
        *,
        reset: int = 0,
        writable: int = 0,
        clear: int = 0,
        hardware: int = 0,
        changed: Change | None = None,
        written: Change | None = None,
        reading: Callable[[], object] | None = None,
    ) -> None:
        """Declare [offset, offset+size), replacing an earlier declaration of the same range.

        ``writable`` bits take what the guest writes, ``clear`` bits go to 0 where it writes 1, ``hardware`` bits are
        changed by the device alone; every other bit is constant. ``changed(old, new)`` runs when a guest's write has
        changed the value, ``written(old, new)`` after each write that touched it, ``reading()`` before a read does.
        """
        if not 0 <= offset <= len(self.content) - size:
            raise ValueError(f"registers at {offset:#x}+{size:#x} are not in a space of {len(self.content):#x} bytes")
        key, end = (offset, size), offset + size
        self.content[offset:end] = self._reset[offset:end] = reset.to_bytes(size, "little")
        self._writable[offset:end] = writable.to_bytes(size, "little")
        self._clear[offset:end] = clear.to_bytes(size, "little")
        self._hardware[offset:end] = hardware.to_bytes(size, "little")
        self._readings.pop(key, None)
        if reading:
            self._readings[key] = _Reading(offset, end, reading)
        earlier = self._watches.pop(key, None)
        if changed or written:
            self._watches[key] = _Watch(offset, size, end, changed, written)
        if changed or written or earlier:
            for dword in range(offset >> 2, (end + 3) >> 2):
                here = [w for w in self._watches.values() if w.offset < 4 * dword + 4 and 4 * dword < w.end]
                self._by_dword[dword] = here

    def get(self, offset: int, size: int) -> int:
        """What is at ``offset`` now, for our code."""
        return int.from_bytes(self.content[offset : offset + size], "little")

    def set(self, offset: int, size: int, value: int) -> None:
        """Store ``value`` as the hardware does: no mask, no hook."""
        self.content[offset : offset + size] = value.to_bytes(size, "little")

    def preset(self, offset: int, size: int, value: int) -> None:
        """Make ``value`` what is there now and after each reset."""
        self._reset[offset : offset + size] = value.to_bytes(size, "little")
        self.set(offset, size, value)

    def read(self, offset: int, size: int) -> int:
        """A guest's read of any width and alignment; all ones unless all of it is in the space."""
        end = offset + size
        if not 0 <= offset <= end <= len(self.content):
            return (1 << 8 * size) - 1
        for first, last, reading in self._readings.values():
            if offset < last and first < end:
                reading()
        return int.from_bytes(self.content[offset:end], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write of any width and alignment; ignored unless all of it is in the space."""
        end = offset + size
        if not 0 <= offset <= end <= len(self.content):
            return
        dword = offset >> 2
        near = self._by_dword.get(dword, ()) if end <= 4 * dword + 4 else self._watches.values()
        touched = [(w, self.get(w.offset, w.size)) for w in near if offset < w.end and w.offset < end] if near else ()
        old = int.from_bytes(self.content[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        clear = int.from_bytes(self._clear[offset:end], "little")
        new = (old & ~writable | value & writable) & ~(value & clear)
        self.content[offset:end] = new.to_bytes(size, "little")
        for watch, before in touched:
            after = self.get(watch.offset, watch.size)
            if watch.written is not None:
                watch.written(before, after)
            if watch.changed is not None and after != before:
                watch.changed(before, after)

    def reset(self) -> None:
        """Power-on values, in a new ``content``; no hook runs."""
        self.content = bytearray(self._reset)

    def adopt(self, content: bytearray) -> None:
        """Go on with ``content``, saved elsewhere; no hook runs. Raises StateError, having changed nothing."""
        if len(content) != len(self.content):
            raise StateError(f"{len(content)} bytes of registers, expected {len(self.content)}")
        free = int.from_bytes(self._writable, "little") | int.from_bytes(self._clear, "little")
        free |= int.from_bytes(self._hardware, "little")
        if wrong := (int.from_bytes(content, "little") ^ int.from_bytes(self._reset, "little")) & ~free:
            at = ((wrong & -wrong).bit_length() - 1) // 8
            raise StateError(
                f"the register byte at {at:#x} is {content[at]:#x} where this machine has {self._reset[at]:#x}"
            )
        self.content = content


class Field:
    """One register of a RegisterBank, at ``offset`` of it. The masks are those of `RegisterSpace.define`."""

    def __init__(
        self, offset: int, size: int, *, reset: int = 0, writable: int = 0, clear: int = 0, hardware: int = 0
    ) -> None:
        self.offset, self.size, self.reset = offset, size, reset
        self.masks = {"writable": writable, "clear": clear, "hardware": hardware}
        self.hooks: dict[str, str] = {}  # kind to the method's name, so that a subclass may override the method

    def changed(self, hook: BankHook) -> BankHook:
        """Decorates a method (old, new) that runs when a guest's write has changed the value."""
        return self._hook("changed", hook)

    def written(self, hook: BankHook) -> BankHook:
        """Decorates a method (old, new) that runs after each guest write that touched the register."""
        return self._hook("written", hook)

    def reading(self, hook: BankHook) -> BankHook:
        """Decorates a method () that runs before a guest's read of the register, to bring it up to date."""
        return self._hook("reading", hook)

    def _hook(self, kind: str, hook: BankHook) -> BankHook:
        if kind in self.hooks:
            raise TypeError(f"two {kind} hooks on the register at {self.offset:#x}")
        self.hooks[kind] = hook.__name__
        return hook

    @overload
    def __get__(self, bank: None, owner: type) -> Self: ...
    @overload
    def __get__(self, bank: RegisterBank, owner: type) -> int: ...
    def __get__(self, bank: RegisterBank | None, owner: type) -> Self | int:
        if bank is None:
            return self
        at = bank.offset + self.offset
        return int.from_bytes(bank.space.content[at : at + self.size], "little")

    def __set__(self, bank: RegisterBank, value: int) -> None:
        bank.space.set(bank.offset + self.offset, self.size, value)


class RegisterBank:
    """A group of registers at ``offset`` of a space. ``resets`` are this instance's power-on values, by field name."""

    SIZE: ClassVar[int]
    FIELDS: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls, *, size: int | None = None) -> None:
        if size is not None:
            cls.SIZE = size
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        cls.FIELDS = {**cls.FIELDS, **own}
        end, last = 0, ""
        for name, field in sorted(cls.FIELDS.items(), key=lambda item: item[1].offset):
            if field.offset < end or field.offset + field.size > cls.SIZE:
                raise TypeError(f"{cls.__name__}.{name} overlaps {last or 'what is before'} or exceeds the bank")
            end, last = field.offset + field.size, name

    def __init__(self, space: RegisterSpace, offset: int = 0, **resets: int) -> None:
        self.space, self.offset = space, offset
        if unknown := resets.keys() - self.FIELDS.keys():
            raise TypeError(f"{type(self).__name__} has no register {unknown.pop()}")
        for name, field in self.FIELDS.items():
            self._define(name, reset=resets.get(name, field.reset))

    def implement(self, *names: str) -> None:
        """Have these registers, at their power-on values, after `leave_out`."""
        for name in names:
            self._define(name)

    def leave_out(self, *names: str) -> None:
        """Do not have these registers: they are constant 0."""
        for field in map(self.FIELDS.__getitem__, names):
            self.space.define(self.offset + field.offset, field.size)

    def preset(self, **values: int) -> None:
        """Make ``values`` what the registers hold now and after each reset."""
        for name, value in values.items():
            field = self.FIELDS[name]
            self.space.preset(self.offset + field.offset, field.size, value)

    def _define(self, name: str, **changes: int) -> None:
        field = self.FIELDS[name]
        said: dict[str, Any] = {"reset": field.reset, **field.masks, **changes}
        for kind, method in field.hooks.items():
            said[kind] = getattr(self, method)
        self.space.define(self.offset + field.offset, field.size, **said)
