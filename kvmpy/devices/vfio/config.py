"""What a host function's configuration space says of it, read once and believed only as far as it makes sense.

PCI Express Base 5.0, section 7.5. The kernel has made this space readable for us: BARs as they should be, a VF's IDs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import BAR0, HEADER_SIZE, MULTI_FUNCTION, PciIds
from kvmpy.errors import HostError

CONVENTIONAL_SIZE: Final = 0x100
CAPABILITIES_POINTER: Final = 0x34
INTERRUPT_PIN: Final = 0x3D
STATUS: Final = 0x06
STATUS_CAPABILITIES: Final = 0x10

# IDs of capabilities, and of extended ones
MSI: Final = 0x05
EXPRESS: Final = 0x10
MSIX: Final = 0x11
ADVANCED_FEATURES: Final = 0x13
SERIAL_NUMBER: Final = 0x0003

FLR: Final = 1 << 28  # of PCI Express device capabilities
AF_FLR: Final = 1 << 1  # of advanced features' own capabilities

BAR_IO: Final = 0x1
BAR_64_BITS: Final = 0x4
BAR_PREFETCHABLE: Final = 0x8


class MsixPlace(NamedTuple):
    """How many vectors MSI-X has, and in which BARs, at what offsets, its table and its pending bits are."""

    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


class HostConfig:
    """``data`` is the configuration space of ``address``, 256 or 4096 bytes."""

    def __init__(self, address: str, data: bytes) -> None:
        """Raises HostError where it is no endpoint's."""
        self.address, self._data = address, data
        if len(data) < CONVENTIONAL_SIZE or self.get(0, 2) == 0xFFFF:
            raise HostError(f"{address}: its configuration space cannot be read; the device is gone, or hangs")
        if self.get(0x0E, 1) & ~MULTI_FUNCTION:
            raise HostError(f"{address}: is a bridge; give the guest the devices behind it")
        self.capabilities = dict(self._chain())
        self.extended = dict(self._extended_chain())

    def get(self, offset: int, size: int) -> int:
        """The ``size`` bytes at ``offset``; 0 beyond the end."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    @property
    def ids(self) -> PciIds:
        """Who made it and what it is."""
        return PciIds(
            vendor=self.get(0x00, 2),
            device=self.get(0x02, 2),
            class_code=self.get(0x09, 3),
            revision=self.get(0x08, 1),
            subsystem_vendor=self.get(0x2C, 2),
            subsystem=self.get(0x2E, 2),
        )

    @property
    def pin(self) -> int:
        """INTA to INTD as 1 to 4; 0 for none."""
        pin = self.get(INTERRUPT_PIN, 1)
        return pin if pin <= 4 else 0

    @property
    def has_flr(self) -> bool:
        """Whether it can reset itself: a function level reset, by either capability."""
        express, af = self.capabilities.get(EXPRESS), self.capabilities.get(ADVANCED_FEATURES)
        if express is not None and self.get(express + 4, 4) & FLR:
            return True
        return af is not None and bool(self.get(af + 3, 1) & AF_FLR)

    @property
    def msix(self) -> MsixPlace | None:
        """Its MSI-X, where it has some."""
        at = self.capabilities.get(MSIX)
        if at is None:
            return None
        table, pba = self.get(at + 4, 4), self.get(at + 8, 4)
        return MsixPlace((self.get(at + 2, 2) & 0x7FF) + 1, table & 7, table & ~7, pba & 7, pba & ~7)

    @property
    def serial_number(self) -> int | None:
        """Of 64 bits, where it has one."""
        at = self.extended.get(SERIAL_NUMBER)
        return None if at is None else self.get(at + 4, 8)

    def bar_kind(self, index: int) -> BarKind:
        """What the register of BAR ``index`` says it is."""
        low = self.get(BAR0 + 4 * index, 4)
        if low & BAR_IO:
            return BarKind.IO
        if not low & BAR_64_BITS:
            return BarKind.MEM32
        return BarKind.MEM64_PREFETCHABLE if low & BAR_PREFETCHABLE else BarKind.MEM64

    def _chain(self) -> Iterator[tuple[int, int]]:
        """ID and offset of each capability, the last first, so that of two alike a dict keeps the first."""
        found: list[tuple[int, int]] = []
        at = self.get(CAPABILITIES_POINTER, 1) & ~3 if self.get(STATUS, 2) & STATUS_CAPABILITIES else 0
        while at >= HEADER_SIZE and at not in (offset for _, offset in found):
            found.append((self.get(at, 1), at))
            at = self.get(at + 1, 1) & ~3
        return reversed(found)

    def _extended_chain(self) -> Iterator[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = CONVENTIONAL_SIZE
        while CONVENTIONAL_SIZE <= at <= len(self._data) - 4 and at not in (offset for _, offset in found):
            header = self.get(at, 4)
            if header in (0, 0xFFFF_FFFF):
                break
            found.append((header & 0xFFFF, at))
            at = header >> 20 & ~3
        return reversed(found)
