"""A register that C answers, beside KVM_RUN, where the device need not hear of it (docs/adr/0020).

A Latch is where the value lives; the device reads and sets it as its own. What a guest may do to it without the
device's code is said with each value that is set:

- ``reads``: a read has no effect, and gives the value.
- ``stores``: a write does nothing but change the value, of which ``mask`` says which bits. In a register of one byte
  that can also be so of single values, those that were ``heard``.

Every other access reaches the device as ever; so does each one while a bus is traced. A device without a Latch, or
whose Latch says nothing, behaves the same and takes longer. Only an access of exactly its offset and size counts.
"""

from __future__ import annotations

from typing import Any, Final

from kvmpy._native import ffi, lib

READS: Final[int] = lib.KVMPY_READS
STORES: Final[int] = lib.KVMPY_STORES
VALUE: Final = (1 << 32) - 1


class Latch:
    """``size`` bytes (1, 2 or 4) at ``offset`` of a window, at first 0 and answered by the device."""

    def __init__(self, offset: int, size: int, mask: int | None = None) -> None:
        if size not in (1, 2, 4):
            raise ValueError(f"a latch of {size} bytes")
        ones = (1 << 8 * size) - 1
        self._mask = ones if mask is None else mask & ones
        self.native: Any = ffi.new("struct kvmpy_latch *", {"offset": offset, "size": size, "mask": self._mask})

    @property
    def value(self) -> int:
        """What is in it now, by whom ever it came. Any thread."""
        word: int = self.native.word
        return word & VALUE

    def set(self, value: int, *, reads: bool = False, stores: bool = False) -> None:
        """Have ``value`` in it, answered so from now on. With the device's lock."""
        # One store of both: a value is never answered by what was said of another.
        self.native.word = value & self._mask | (reads * READS | stores * STORES) << 32

    def heard(self, value: int) -> None:
        """A write of ``value`` into the one byte only stores from now on. With the device's lock."""
        self.native.heard[value >> 6] |= 1 << (value & 63)
