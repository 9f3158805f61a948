"""MSI-X: up to 2048 vectors, in a table that is trapped (PCI Express Base 5.0, section 7.7.2).

Each vector is an eventfd with a route while the guest wants its messages: MSI-X enabled, neither the function nor the
vector masked, and the function a bus master. Otherwise what is signalled waits in the eventfd: the pending bit array
shows that, and unmasking delivers it. Nothing is routed before it is wanted, so an unused vector costs an eventfd.

The table takes aligned accesses of 4 and 8 bytes, as the specification has it; other writes are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import IntEnum
from typing import Final

from kvmpy.devices.pci.config import Capability
from kvmpy.devices.pci.msi import ADDRESS_BITS, RoutedVector
from kvmpy.devices.registers import Field, RegisterSpace
from kvmpy.irq import MsiMessage, MsiSink, MsiVector
from kvmpy.state import StateError

ENTRY_SIZE: Final = 16  # address, data, vector control
VECTORS: Final = range(1, 2049)
ENTRY_MASKED: Final = 1
# What a guest may write in an entry. The rest of vector control is reserved.
ENTRY_BITS: Final = ADDRESS_BITS | 0xFFFF_FFFF << 32 | 0xFFFF_FFFF << 64 | ENTRY_MASKED << 96
RESET_ENTRY: Final = (ENTRY_MASKED << 96).to_bytes(ENTRY_SIZE, "little")


class MsixControl(IntEnum):
    MASK = 0x4000
    ENABLE = 0x8000


class MsixCapability(Capability, size=12):
    control = Field(2, 2, writable=MsixControl.ENABLE | MsixControl.MASK)
    table = Field(4, 4)
    pba = Field(8, 4)

    ID = 0x11

    def __init__(self, space: RegisterSpace, offset: int, **resets: int) -> None:
        super().__init__(space, offset, **resets)
        self.on_change: Callable[[], object] = lambda: None

    @control.changed
    def _changed(self, old: int, new: int) -> None:
        self.on_change()


def table_size(vectors: int) -> int:
    """Bytes of the table."""
    return vectors * ENTRY_SIZE


def pba_size(vectors: int) -> int:
    """Bytes of the pending bit array: whole 64-bit words."""
    return (vectors + 63) // 64 * 8


def take(sink: MsiSink, count: int) -> list[MsiVector]:
    """``count`` vectors of ``sink``. Raises HostError, having taken none, where it has no more."""
    with ExitStack() as undo:
        vectors = []
        for _ in range(count):
            vectors.append(sink.vector())
            undo.callback(vectors[-1].close)
        undo.pop_all()
        return vectors


class Msix:
    """A function's MSI-X. Its function's lock is held, but for `vector`, which any thread may call.

    ``on_change`` is told after the guest has switched or masked anything, or changed a message; ``on_routed`` that it
    wants the messages of a vector.
    """

    def __init__(self, name: str, capability: MsixCapability, vectors: Sequence[MsiVector]) -> None:
        self._name, self._capability = name, capability
        self._routed = tuple(RoutedVector(name, index, vector) for index, vector in enumerate(vectors))
        self.bus_master = False
        self.on_change: Callable[[], object] = lambda: None
        self.on_routed: Callable[[], object] = lambda: None
        self.table = Table(self, bytearray(RESET_ENTRY * len(vectors)))
        self.pba = PendingBits(self)
        capability.on_change = self._changed

    @property
    def size(self) -> int:
        """How many vectors there are."""
        return len(self._routed)

    @property
    def enabled(self) -> bool:
        """Whether the guest has chosen MSI-X rather than INTx."""
        return bool(self._capability.control & MsixControl.ENABLE)

    @property
    def masked(self) -> bool:
        """Whether the guest has masked the function as a whole."""
        return bool(self._capability.control & MsixControl.MASK)

    def vector(self, index: int) -> MsiVector | None:
        """Vector ``index``, None where there is no such one: any int may be asked for."""
        return self._routed[index].vector if 0 <= index < len(self._routed) else None

    def is_masked(self, index: int) -> bool:
        """Whether messages of vector ``index``, one that there is, are kept."""
        return self.masked or bool(self.table.entry(index) >> 96 & ENTRY_MASKED)

    def pending(self, first: int, count: int) -> int:
        """A bit for each of ``count`` vectors from ``first`` on that has been signalled and not delivered."""
        return sum(1 << n for n, routed in enumerate(self._routed[first : first + count]) if routed.vector.pending)

    def update(self) -> None:
        """Route every vector as the registers and the table now say."""
        for index in range(self.size):
            self._route(index)

    def entry_changed(self, index: int) -> None:
        """Used by Table."""
        self._route(index)
        self.on_change()

    def reset(self) -> None:
        """Power-on: all masked, nothing pending. The capability is reset already."""
        self.table.content = bytearray(RESET_ENTRY * self.size)
        self.update()
        for routed in self._routed:
            routed.vector.discard()

    def adopt(self, table: bytearray, pending: bytes) -> None:
        """Go on with what another machine saved, with its capability loaded. Raises StateError, nothing changed."""
        Table.check(table, self.size)
        bits = int.from_bytes(pending, "little")
        if len(pending) != pba_size(self.size) or bits >> self.size:
            raise StateError(f"{self._name}: pending bits of other than {self.size} MSI-X vectors")
        self.table.content = table
        for index, routed in enumerate(self._routed):
            if bits >> index & 1:
                routed.vector.signal()
        self.update()

    def settle(self) -> bytes:
        """The pending bits now, as `adopt` takes them."""
        return self.pending(0, self.size).to_bytes(pba_size(self.size), "little")

    def close(self) -> None:
        """Give every vector back."""
        for routed in self._routed:
            routed.vector.close()

    def _changed(self) -> None:
        self.update()
        self.on_change()

    def _route(self, index: int) -> None:
        message = None
        if self.enabled and self.bus_master and not self.is_masked(index):
            entry = self.table.entry(index)
            message = MsiMessage(entry & 0xFFFF_FFFF_FFFF_FFFF, entry >> 64 & 0xFFFF_FFFF)
        self._routed[index].route(message)
        if message is not None:
            self.on_routed()


class Table:
    """The vectors' messages and masks, as the guest sees them. ``content`` is the migratable state."""

    def __init__(self, msix: Msix, content: bytearray) -> None:
        self._msix, self.content = msix, content

    def entry(self, index: int) -> int:
        """The 128 bits of entry ``index``."""
        return int.from_bytes(self.content[index * ENTRY_SIZE : (index + 1) * ENTRY_SIZE], "little")

    def read(self, offset: int, size: int) -> int:
        """A guest's read."""
        return int.from_bytes(self.content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write."""
        if size not in (4, 8) or offset % size or not 0 <= offset < len(self.content):
            return
        index, at = divmod(offset, ENTRY_SIZE)
        taken = ENTRY_BITS >> 8 * at & (1 << 8 * size) - 1
        new = (value & taken).to_bytes(size, "little")
        if self.content[offset : offset + size] != new:
            self.content[offset : offset + size] = new
            self._msix.entry_changed(index)

    @staticmethod
    def check(content: bytearray, vectors: int) -> None:
        """Raises StateError unless ``content`` is one that a guest could have written."""
        if len(content) != table_size(vectors):
            raise StateError(f"an MSI-X table of {len(content)} bytes, expected {table_size(vectors)}")
        if int.from_bytes(content, "little") & ~int.from_bytes(
            ENTRY_BITS.to_bytes(ENTRY_SIZE, "little") * vectors, "little"
        ):
            raise StateError("an MSI-X table with reserved bits set")


class PendingBits:
    """The pending bit array; writes are ignored."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        """A guest's read."""
        return self._msix.pending(8 * offset, 8 * size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignored."""
