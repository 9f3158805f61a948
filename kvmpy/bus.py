"""Who answers an access, and at what offset: the second of the three hops of a guest's write.

A Bus maps address windows to targets. The window list is an immutable tuple swapped whole, so vCPU threads look up
without a lock while another one maps or unmaps. An access that nobody claims, or that straddles a window's end, reads
as all ones and writes vanish, as on real hardware; both are traced. A wider access than the target implements is split.

C has the same map, and answers there what no device has to hear of: what nobody claims, and a `Latch` that says so. It
is a short cut and no other way: what it leaves, or all while a bus is traced, comes through here.

Ints inside, bytes at the edge: ``value`` is an unsigned little-endian int of ``size`` bytes.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from kvmpy import trace
from kvmpy._native import ffi, lib
from kvmpy.latch import Latch
from kvmpy.trace import Tracepoint

trace_write = Tracepoint("bus.write", "bus device offset size value")
trace_read = Tracepoint("bus.read", "bus device offset size value")
trace_unclaimed = Tracepoint("bus.unclaimed", "bus kind addr size")


def _follow_tracing() -> None:
    """Who traces a bus wants to hear of each access."""
    lib.kvmpy_answering = not (trace_write or trace_read or trace_unclaimed)


trace.watch(_follow_tracing)


class Target(Protocol):
    """What a Bus needs of a device. The bus holds ``lock`` around read and write."""

    name: str
    lock: threading.RLock

    def read(self, offset: int, size: int) -> int:
        """The ``size`` bytes at ``offset`` of the window, as an int."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value``, ``size`` bytes wide, at ``offset`` of the window."""


class Window(msgspec.Struct, frozen=True):
    """[base, base+size) belongs to ``target``; accesses wider than ``widest`` bytes reach it in pieces.

    Its ``latches`` are answered without it.
    """

    base: int
    size: int
    target: Target
    widest: int
    latches: tuple[Latch, ...] = ()

    @property
    def end(self) -> int:
        """The first address behind the window."""
        return self.base + self.size


class Bus:
    """An address space of devices: port I/O or MMIO. Any thread may read, write, map and unmap."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._windows: tuple[tuple[int, ...], tuple[int, ...], tuple[Window, ...]] = ((), (), ())
        self._changing = threading.Lock()
        self.native: Any = ffi.new("struct kvmpy_bus *")
        lib.kvmpy_bus_open(self.native)
        self._map: object = None  # what `native` points at

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows, by rising address."""
        return self._windows[2]

    def map(self, base: int, size: int, target: Target, widest: int = 8, latches: Sequence[Latch] = ()) -> Window:
        """Give [base, base+size) to ``target``. Raises ValueError where a window is there already."""
        window = Window(base, size, target, widest, tuple(latches))
        with self._changing:
            for other in self.windows:
                if base < other.end and other.base < window.end:
                    raise ValueError(f"{self.name}: {target.name} at {base:#x}+{size:#x} overlaps {other.target.name}")
            self._swap((*self.windows, window))
        return window

    def unmap(self, window: Window) -> None:
        """Take a window away. Raises ValueError if it is not mapped."""
        with self._changing:
            rest = list(self.windows)
            rest.remove(window)
            self._swap(tuple(rest))

    def read(self, addr: int, size: int) -> int:
        """What the guest reads at ``addr``: ``size`` is 1 to 8 bytes, the odd ones of an access across a page."""
        if (window := self._find(addr, size)) is None:
            if trace_unclaimed:
                trace_unclaimed(self.name, "read", addr, size)
            return (1 << 8 * size) - 1
        offset, target = addr - window.base, window.target
        with target.lock:
            if size <= window.widest:
                value = target.read(offset, size)
            else:
                step = window.widest
                value = sum(target.read(offset + at, min(step, size - at)) << 8 * at for at in range(0, size, step))
        if trace_read:
            trace_read(self.name, target.name, offset, size, value)
        return value

    def write(self, addr: int, size: int, value: int) -> None:
        """What the guest writes at ``addr``, ``size`` bytes as in `read`."""
        if (window := self._find(addr, size)) is None:
            if trace_unclaimed:
                trace_unclaimed(self.name, "write", addr, size)
            return
        offset, target = addr - window.base, window.target
        if trace_write:
            trace_write(self.name, target.name, offset, size, value)
        with target.lock:
            if size <= window.widest:
                target.write(offset, size, value)
            else:
                step = window.widest
                for at in range(0, size, step):
                    width = min(step, size - at)
                    target.write(offset + at, width, value >> 8 * at & (1 << 8 * width) - 1)

    def _swap(self, windows: tuple[Window, ...]) -> None:
        ordered = tuple(sorted(windows, key=lambda window: window.base))
        bases, ends = tuple(window.base for window in ordered), tuple(window.end for window in ordered)
        natives, latches = ffi.new("struct kvmpy_window[]", len(ordered)), []
        for native, window in zip(natives, ordered, strict=True):
            native.base, native.end, native.count = window.base, window.end, len(window.latches)
            if window.latches:
                latches.append(ffi.new("struct kvmpy_latch *[]", [latch.native for latch in window.latches]))
                native.latches = latches[-1]
        kept = natives, latches, ordered
        self._map = self._map, kept  # until the swap is done a vCPU may be looking at the ones before
        lib.kvmpy_bus_swap(self.native, natives, len(ordered))
        self._windows = (bases, ends, ordered)
        self._map = kept

    def _find(self, addr: int, size: int) -> Window | None:
        bases, ends, windows = self._windows
        index = bisect_right(bases, addr) - 1
        return windows[index] if index >= 0 and addr + size <= ends[index] else None
