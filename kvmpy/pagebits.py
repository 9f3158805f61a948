"""Which pages have changed: bitmaps of guest memory, a bit for each page of 4096 bytes.

`PageBits` is one thread's own. A `WriteLog` is written to by everybody at once who writes guest memory and is no vCPU
(KVM notes what those write): the devices here, and vhost in the kernel, for which it has the layout of vhost's log.

No Python loop goes over pages: a call costs the same for one page and for all, as far as the GIL is concerned.
"""

from __future__ import annotations

from typing import Any, Final

from kvmpy._native import ffi, lib

PAGE: Final = 4096
_WORD: Final = 64


def pages(size: int) -> int:
    """How many pages ``size`` bytes are, the last one perhaps not whole."""
    return -(-size // PAGE)


class PageBits:
    """A bit for each of ``size`` pages; those behind the last one are 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.words: Any = ffi.new("uint64_t[]", max(-(-size // _WORD), 1))

    @property
    def address(self) -> int:
        """Where the kernel finds it."""
        return int(ffi.cast("uintptr_t", self.words))

    def __contains__(self, page: int) -> bool:
        return 0 <= page < self.size and bool(self.words[page // _WORD] >> page % _WORD & 1)

    def set(self, first: int, count: int) -> None:
        """Set ``count`` bits, atomically; those that are not there are left out."""
        lib.kvmpy_bits_set(self.words, self.size, first, count)

    def fill(self) -> None:
        """Set all of them."""
        self.set(0, self.size)

    def clear(self) -> None:
        """Clear all of them."""
        ffi.buffer(self.words)[:] = bytes(ffi.sizeof(self.words))

    def count(self) -> int:
        """How many are set."""
        return int(lib.kvmpy_bits_count(self.words, self.size))

    def merge(self, other: PageBits) -> None:
        """Set those that are set in ``other``, which is as long."""
        assert other.size == self.size
        lib.kvmpy_bits_merge(self.words, other.words, self.size)


class WriteLog:
    """The pages of [0, ``end``) that somebody has written. Any thread.

    Who writes notes it afterwards: noted before, the page could be taken, and sent as it was, in between.
    """

    def __init__(self, end: int) -> None:
        self._bits = PageBits(pages(end))

    @property
    def address(self) -> int:
        """Where it lies: vhost sets bits in it, atomically."""
        return self._bits.address

    @property
    def size(self) -> int:
        """Pages from gpa 0 on."""
        return self._bits.size

    def mark(self, gpa: int, size: int) -> None:
        """[gpa, gpa+size) has been written."""
        first = gpa // PAGE
        lib.kvmpy_bits_set(self._bits.words, self._bits.size, first, (gpa + size + PAGE - 1) // PAGE - first)

    def take(self, gpa: int, into: PageBits) -> None:
        """Move what is known of the pages from ``gpa`` on, as many as ``into`` has; each bit is taken atomically."""
        first = gpa // PAGE
        assert first + into.size <= self._bits.size
        lib.kvmpy_bits_take(into.words, self._bits.words, first, into.size)
