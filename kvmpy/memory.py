"""Guest RAM and who must know where it is.

`Ram` is one contiguous block of host memory; `GuestMemory` puts blocks at guest-physical addresses and is how
everything of ours reads and writes the guest's memory. KVM's slots, and later vhost's tables and VFIO's maps, are
MemoryListeners: each is told of every block, in order, once.

Every gpa and size may come from the guest, so each access goes through one check: [gpa, gpa+size) lies in one block, or
GuestError. There is no route from here to a device's registers.

While a migration runs there is a log of what we write (`GuestMemory.log`). `write` notes it there by itself; whoever
writes through a view does so too, afterwards (`GuestMemory.mark`). Who has others write for him, past us, is a
LogFollower.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Protocol

import msgspec

from kvmpy.errors import GuestError
from kvmpy.pagebits import WriteLog


class Backing(Protocol):
    """Host memory that a block lends to the guest; `kvmpy.host.memory.Mapping` is one."""

    @property
    def hva(self) -> int:
        """Host-virtual address of the first byte."""

    @property
    def view(self) -> memoryview:
        """All of it, writable, one byte an item."""


class Ram(msgspec.Struct, frozen=True):
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


class LogFollower(Protocol):
    """Somebody whose writes to guest memory do not pass here: vhost."""

    def log_started(self, log: WriteLog) -> None:
        """Have them noted in ``log`` from now on. Raises HostError, noting none."""

    def log_stopped(self) -> None:
        """Once this returns nothing is noted there any more; nothing happens where nothing was."""


class GuestMemory:
    """The guest's RAM: blocks at guest-physical addresses. Any thread may read and write.

    ``log`` is where writes are noted, None while nobody wants to know.
    """

    def __init__(self) -> None:
        self.blocks: tuple[Ram, ...] = ()
        self.log: WriteLog | None = None
        self._log_lock = threading.Lock()
        self._followers: list[LogFollower] = []
        self._views: tuple[tuple[int, int, memoryview], ...] = ()
        self._listeners: list[MemoryListener] = []

    @property
    def size(self) -> int:
        """Bytes of RAM in all blocks."""
        return sum(block.size for block in self.blocks)

    def add(self, block: Ram) -> None:
        """Make ``block`` part of the guest; every listener is told, and if one refuses, the others forget it.

        Not while there is a log: it is as long as it is.
        """
        if self.log is not None:
            raise ValueError("RAM is added while writes to RAM are logged")
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
        self.stop_log()
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
        if self.log is not None:
            self.mark(gpa, len(data))

    def mark(self, gpa: int, size: int) -> None:
        """[gpa, gpa+size) has been written through a view: note it, if anybody wants to know. Any thread."""
        log = self.log
        if log is not None:
            log.mark(gpa, size)

    def start_log(self) -> WriteLog:
        """Note every write in a new log from now on. Raises HostError where a follower cannot: then none is noted."""
        with self._log_lock:
            self._stop_log()
            log = WriteLog(max((block.end for block in self.blocks), default=0))
            self.log = log
            try:
                for follower in self._followers:
                    follower.log_started(log)
            except BaseException:
                self._stop_log()
                raise
            return log

    def stop_log(self) -> None:
        """Note nothing any more; nothing happens where nothing is noted."""
        with self._log_lock:
            self._stop_log()

    def follow_log(self, follower: LogFollower) -> None:
        """Tell ``follower`` of every log, the one there is included. Raises HostError, and then of none."""
        with self._log_lock:
            if self.log is not None:
                follower.log_started(self.log)
            self._followers.append(follower)

    def unfollow_log(self, follower: LogFollower) -> None:
        """Do not, any more. Nothing happens where it does not follow."""
        with self._log_lock:
            if follower in self._followers:
                self._followers.remove(follower)
                if self.log is not None:
                    follower.log_stopped()

    def _stop_log(self) -> None:
        if (log := self.log) is not None:
            self.log = None
            for follower in self._followers:
                follower.log_stopped()
            del log  # not before: the kernel wrote there

    def _set(self, blocks: Iterable[Ram]) -> None:
        self.blocks = tuple(sorted(blocks, key=lambda block: block.gpa))
        self._views = tuple((block.gpa, block.end, block.view) for block in self.blocks)
