"""A base address register's window: what is in it, and where it is mapped.

The guest moves it by writing the register; `PciRoot` decides whether that address is one to map. Doorbells follow, and
so do its direct parts: host memory that the guest reaches with no exit. An access that found the old place just before
a move still reaches the target: that is as if it had been a moment earlier.
"""

from __future__ import annotations

import threading
from enum import Enum
from mmap import PAGESIZE
from typing import Final, Protocol

import msgspec

from kvmpy.bus import Bus, Target, Window
from kvmpy.devices.base import Closable, Shortcuts
from kvmpy.devices.pci.config import BAR0, ROM
from kvmpy.errors import HostError
from kvmpy.host.eventfd import EventFd
from kvmpy.log import Log
from kvmpy.trace import Tracepoint

log = Log(__name__)

trace_bar = Tracepoint("pci.bar", "function bar what address")
trace_doorbell = Tracepoint("pci.doorbell", "function bar offset problem")
trace_direct = Tracepoint("pci.direct", "function bar offset problem")


class BarKind(Enum):
    """The value is the register's low bits (PCI Express Base 5.0, section 7.5.1.2.1)."""

    MEM32 = 0x0
    IO = 0x1
    MEM64 = 0x4
    MEM64_PREFETCHABLE = 0xC

    @property
    def registers(self) -> int:
        """How many 32-bit registers it takes."""
        return 2 if self in (BarKind.MEM64, BarKind.MEM64_PREFETCHABLE) else 1

    @property
    def sizes(self) -> range:
        """The sizes a register of this kind can express; only powers of two are meant."""
        if self is BarKind.IO:
            return range(4, 0x101)
        return range(0x10, 0x8000_0001) if self is BarKind.MEM32 else range(0x10, (1 << 63) + 1)


class Trapped(Protocol):
    """Part of a BAR that is not the target's: an MSI-X table."""

    def read(self, offset: int, size: int) -> int:
        """The ``size`` bytes at ``offset`` of the part."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value`` at ``offset`` of the part."""


class _Part(msgspec.Struct, frozen=True):
    offset: int
    end: int
    trapped: Trapped


class Bar:
    """One BAR of a function (a `kvmpy.bus.Target`, with the lock of its ``target``).

    ``register`` is where its register is in configuration space, ``enable`` the bit there without which it does not
    decode, 0 for none. ``programmed`` is where the guest wants it, None while it does not decode; ``address`` where it
    is mapped. A BAR that is wanted where it cannot be has an address of None.
    """

    enable = 0

    def __init__(self, name: str, index: int, size: int, kind: BarKind, target: Target, widest: int) -> None:
        if size & size - 1 or size not in kind.sizes:
            raise ValueError(f"{name}: a {kind.name} BAR cannot have {size:#x} bytes")
        self.name, self.index, self.size, self.kind = name, index, size, kind
        self.lock = target.lock
        self.register = BAR0 + 4 * index
        self.programmed: int | None = None
        self._target, self._widest = target, widest
        self._parts: list[_Part] = []
        self._mapping = threading.Lock()
        self._doorbells: Final[list[Doorbell]] = []
        self._direct: Final[list[DirectPart]] = []
        self._placed: tuple[Bus, Window, Shortcuts] | None = None

    @property
    def address(self) -> int | None:
        """Where the guest finds it now."""
        placed = self._placed
        return None if placed is None else placed[1].base

    def trap(self, offset: int, size: int, trapped: Trapped) -> None:
        """Let accesses that begin in [offset, offset+size) go to ``trapped``. Before the BAR is mapped."""
        if not 0 <= offset <= self.size - size or any(offset < p.end and p.offset < offset + size for p in self._parts):
            raise ValueError(f"{self.name}: [{offset:#x}, {offset + size:#x}) is not free in BAR {self.index}")
        self._parts.append(_Part(offset, offset + size, trapped))

    def read(self, offset: int, size: int) -> int:
        """A guest's read."""
        for part in self._parts:
            if part.offset <= offset < part.end:
                return part.trapped.read(offset - part.offset, size)
        return self._target.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write."""
        for part in self._parts:
            if part.offset <= offset < part.end:
                part.trapped.write(offset - part.offset, size, value)
                return
        self._target.write(offset, size, value)

    def map(self, bus: Bus, shortcuts: Shortcuts, address: int) -> bool:
        """Appear at ``address``; False where something else is there. Used by PciRoot."""
        with self._mapping:
            try:
                window = bus.map(address, self.size, self, self._widest)
            except ValueError:
                self._trace("overlaps", address)
                return False
            self._placed = bus, window, shortcuts
            for shortcut in self._shortcuts():
                shortcut.register(shortcuts, address)
        self._trace("mapped", address)
        return True

    def unmap(self) -> None:
        """Disappear; nothing happens if it was not mapped. Used by PciRoot."""
        with self._mapping:
            if self._placed is None:
                return
            bus, window, _ = self._placed
            for shortcut in self._shortcuts():
                shortcut.withdraw()  # from here on an access exits, and finds the window
            bus.unmap(window)
            self._placed = None
        self._trace("unmapped", window.base)

    def add_doorbell(self, offset: int, event: EventFd) -> Doorbell:
        """Let a guest's write at ``offset`` only signal ``event``, wherever and whenever the BAR is mapped.

        Where the host refuses, the write exits and the target gets it. Any thread.
        """
        if not 0 <= offset < self.size or self.kind is BarKind.IO:
            raise ValueError(f"{self.name}: no doorbell at {offset:#x} of BAR {self.index}")
        doorbell = Doorbell(self, offset, event)
        with self._mapping:
            self._doorbells.append(doorbell)
            if self._placed is not None:
                doorbell.register(self._placed[2], self._placed[1].base)
        return doorbell

    def add_direct(self, offset: int, size: int, hva: int) -> None:
        """Let [offset, offset+size), in whole pages, be host memory at ``hva`` to the guest, wherever and whenever the
        BAR is mapped; the memory must be there until the BAR is unmapped for good. Before it is mapped.

        Where the host refuses, accesses exit and the target gets them.
        """
        inside = 0 <= offset <= self.size - size and self.kind is not BarKind.IO and size > 0
        parts: list[_Part | DirectPart] = [*self._parts, *self._direct]
        free = all(offset + size <= part.offset or part.end <= offset for part in parts)
        if not inside or not free or (offset | size | hva) % PAGESIZE:
            raise ValueError(f"{self.name}: [{offset:#x}, {offset + size:#x}) of BAR {self.index} cannot be direct")
        self._direct.append(DirectPart(self, offset, size, hva))

    def remove_doorbell(self, doorbell: Doorbell) -> None:
        """Used by Doorbell."""
        with self._mapping:
            if doorbell in self._doorbells:
                self._doorbells.remove(doorbell)
                doorbell.withdraw()

    def _shortcuts(self) -> list[Doorbell | DirectPart]:
        return [*self._doorbells, *self._direct]

    def _trace(self, what: str, address: int) -> None:
        if trace_bar:
            trace_bar(self.name, self.index, what, address)


class Rom(Bar):
    """The window of the expansion ROM, which has a register and an enable bit of its own (section 7.5.1.2.4)."""

    INDEX: Final = 6  # the one behind the BARs, as Linux and VFIO count
    SIZES: Final = range(0x800, 0x100_0001)
    enable = 1

    def __init__(self, name: str, size: int, target: Target, widest: int) -> None:
        if size not in self.SIZES:
            raise ValueError(f"{name}: an expansion ROM cannot have {size:#x} bytes")
        super().__init__(name, self.INDEX, size, BarKind.MEM32, target, widest)
        self.register = ROM

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write, which has no effect."""


class Doorbell:
    """One doorbell in a BAR (a `kvmpy.devices.base.Closable`)."""

    def __init__(self, bar: Bar, offset: int, event: EventFd) -> None:
        self._bar, self._offset, self._event = bar, offset, event
        self._registered: Closable | None = None

    def close(self) -> None:
        """Let writes there reach the target again. Any thread; closing twice is allowed."""
        self._bar.remove_doorbell(self)

    def register(self, shortcuts: Shortcuts, address: int) -> None:
        """Used by Bar: it is mapped at ``address``."""
        try:
            self._registered = shortcuts.doorbell(address + self._offset, self._event)
        except HostError as e:
            if trace_doorbell:
                trace_doorbell(self._bar.name, self._bar.index, self._offset, e)

    def withdraw(self) -> None:
        """Used by Bar: it is about to leave."""
        if self._registered is not None:
            self._registered.close()
            self._registered = None


class DirectPart:
    """[offset, end) of a BAR is host memory."""

    def __init__(self, bar: Bar, offset: int, size: int, hva: int) -> None:
        self.offset, self.end = offset, offset + size
        self._bar, self._size, self._hva = bar, size, hva
        self._registered: Closable | None = None

    def register(self, shortcuts: Shortcuts, address: int) -> None:
        """Used by Bar: it is mapped at ``address``."""
        try:
            self._registered = shortcuts.direct(address + self.offset, self._size, self._hva)
        except HostError as e:
            if trace_direct:
                trace_direct(self._bar.name, self._bar.index, self.offset, e)

    def withdraw(self) -> None:
        """Used by Bar: it is about to leave."""
        registered, self._registered = self._registered, None
        if registered is not None:
            try:
                registered.close()
            except HostError as e:  # the guest goes on reaching what it must not: not for long, its memory goes too
                log.error("%s: BAR %d is still where it was: %s", self._bar.name, self._bar.index, e)
