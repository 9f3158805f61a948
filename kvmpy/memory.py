"""Guest RAM and who must know where it is.

`Ram` is one contiguous block of host memory; `GuestMemory` puts blocks at guest-physical addresses and is how
everything of ours reads and writes the guest's memory. KVM's slots, and later vhost's tables and VFIO's maps, are
MemoryListeners: each is told of every block, in order, once.

Every gpa and size may come from the guest, so each access goes through one check: [gpa, gpa+size) lies in one block, or
GuestError. There is no route from here to a device's registers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvmpy.errors import GuestError


class Backing(Protocol):
    """Host memory that a block lends to the guest; `kvmpy.host.memory.Mapping` is one."""

    @property
    def hva(self) -> int:
        """Host-virtual address of the first byte."""

    @property
    def view(self) -> memoryview:
        """All of it, writable, one byte an item."""


@dataclass(frozen=True, slots=True)
class Ram:
    """[gpa, gpa+size) of the guest is ``size`` bytes of ``backing`` from ``offset`` on."""

    gpa: int
    size: int
    backing: Backing
    offset: int = 0

    @property
    def end(self) -> int:
        """The first guest-physical address behind the block."""
        return self.gpa + self.size

    @property
    def hva(self) -> int:
        """Host-virtual address of the block's first byte."""
        return self.backing.hva + self.offset

    @property
    def view(self) -> memoryview:
        """The block's bytes, writable."""
        return self.backing.view[self.offset : self.offset + self.size]


class MemoryListener(Protocol):
    """Somebody who maps guest RAM for a reader of his own: KVM, vhost, VFIO."""

    def ram_added(self, block: Ram) -> None:
        """``block`` is part of the guest now. Raises HostError if it cannot be mapped."""

    def ram_removed(self, block: Ram) -> None:
        """``block`` is about to leave; must not be touched after this returns."""


class GuestMemory:
    """The guest's RAM: blocks at guest-physical addresses. Any thread may read and write."""

    def __init__(self) -> None:
        self.blocks: tuple[Ram, ...] = ()
        self._views: tuple[tuple[int, int, memoryview], ...] = ()
        self._listeners: list[MemoryListener] = []

    @property
    def size(self) -> int:
        """Bytes of RAM in all blocks."""
        return sum(block.size for block in self.blocks)

    def add(self, block: Ram) -> None:
        """Make ``block`` part of the guest; every listener is told, and if one refuses, the others forget it."""
        for other in self.blocks:
            if block.gpa < other.end and other.gpa < block.end:
                raise ValueError(f"RAM at {block.gpa:#x}+{block.size:#x} overlaps the block at {other.gpa:#x}")
        told: list[MemoryListener] = []
        try:
            for listener in self._listeners:
                listener.ram_added(block)
                told.append(listener)
        except BaseException:
            for listener in reversed(told):
                listener.ram_removed(block)
            raise
        self._set((*self.blocks, block))

    def close(self) -> None:
        """Forget every block, telling the listeners, so that the backing can be unmapped."""
        for block in reversed(self.blocks):
            for listener in reversed(self._listeners):
                listener.ram_removed(block)
        self._listeners.clear()
        for _, _, view in self._views:
            view.release()
        self._set(())

    def listen(self, listener: MemoryListener) -> None:
        """Tell ``listener`` of every block there is and of each that comes or goes; of none if it refuses one."""
        told: list[Ram] = []
        try:
            for block in self.blocks:
                listener.ram_added(block)
                told.append(block)
        except BaseException:
            for block in reversed(told):
                listener.ram_removed(block)
            raise
        self._listeners.append(listener)

    def unlisten(self, listener: MemoryListener) -> None:
        """Tell ``listener`` that every block goes, and of nothing more. Nothing happens where it does not listen."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            for block in reversed(self.blocks):
                listener.ram_removed(block)

    def overlaps(self, gpa: int, size: int) -> bool:
        """Whether any of [gpa, gpa+size) is RAM."""
        return any(start < gpa + size and gpa < end for start, end, _ in self._views)

    def view(self, gpa: int, size: int) -> memoryview:
        """[gpa, gpa+size) as writable bytes of the guest itself. Raises GuestError unless one block holds it all.

        What it shows changes while vCPUs run: copy what is checked before it is used (`read`).
        """
        if gpa >= 0 and size >= 0:
            for start, end, view in self._views:
                if start <= gpa and gpa + size <= end:
                    return view[gpa - start : gpa - start + size]
        raise GuestError(f"guest memory {gpa:#x}+{size:#x} is not RAM")

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of [gpa, gpa+size). Raises GuestError unless one block holds it all."""
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``. Raises GuestError, having written nothing, unless one block takes it all."""
        self.view(gpa, len(data))[:] = data

    def _set(self, blocks: Iterable[Ram]) -> None:
        self.blocks = tuple(sorted(blocks, key=lambda block: block.gpa))
        self._views = tuple((block.gpa, block.end, block.view) for block in self.blocks)
