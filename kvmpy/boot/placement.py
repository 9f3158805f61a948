"""Where in the guest's RAM the parts of a boot lie, and whether there is room."""

from __future__ import annotations

from itertools import combinations
from typing import Final

import msgspec

from kvmpy.boot import boot_params, cmdline, cpu_tables, pvh
from kvmpy.boot.kernel import Kernel
from kvmpy.boot.source import Source
from kvmpy.errors import ConfigError

PAGE: Final = 4096


class LowMemory(msgspec.Struct, frozen=True):
    """Where kvmpy's own structures lie: guest-physical, in the RAM block that starts at 0, without overlaps.

    ``acpi`` is where the tables go, RSDP first; it is part of a reserved range.
    """

    gdt: int
    boot_params: int
    start_info: int
    command_line: int
    page_tables: int
    acpi: range

    def __post_init__(self) -> None:
        for one, other in combinations(self.extents(), 2):
            if _overlap(one, other):
                raise ValueError(f"low memory: {_shown(one)} and {_shown(other)} overlap")

    def extents(self) -> tuple[range, ...]:
        """All of it, in no particular order."""
        return (
            _extent(self.gdt, cpu_tables.GDT_SIZE),
            _extent(self.boot_params, boot_params.SIZE),
            _extent(self.start_info, pvh.SIZE),
            _extent(self.command_line, cmdline.SIZE),
            _extent(self.page_tables, cpu_tables.PAGE_TABLES_SIZE),
            self.acpi,
        )


class Room(msgspec.Struct, frozen=True):
    """The guest's ``ram`` and what of it is ``reserved``, both (gpa, size), and kvmpy's own structures in it."""

    ram: tuple[tuple[int, int], ...]
    reserved: tuple[tuple[int, int], ...]
    low: LowMemory

    @property
    def end(self) -> int:
        """Where the RAM block at 0 ends: all of a boot lies below."""
        return next((size for gpa, size in self.ram if gpa == 0), 0)

    @property
    def taken(self) -> tuple[range, ...]:
        """What neither the kernel nor the initrd may use."""
        return (*self.low.extents(), *(_extent(gpa, size) for gpa, size in self.reserved))

    def place_kernel(self, source: Source, kernel: Kernel) -> range:
        """The RAM that ``kernel`` needs. Raises ConfigError unless it is there and free."""
        needed = max(extent.stop for extent in (*self.low.extents(), kernel.footprint))
        if needed > self.end:
            raise ConfigError(
                f"machine.memory: the kernel {source.path} needs RAM up to {needed:#x} ({_mib(needed)}), "
                f"and the guest's low RAM ends at {self.end:#x} ({_mib(self.end)})"
            )
        for other in self.taken:
            if _overlap(kernel.footprint, other):
                raise source.error(f"loads at {_shown(kernel.footprint)}, and {_shown(other)} is not free")
        return kernel.footprint

    def check_size(self, source: Source, size: int) -> int:
        """``size``. Raises ConfigError if the guest has not so much memory, whatever else has to be in it."""
        total = sum(size for _, size in self.ram)
        if size > total:
            raise source.error(f"is {_mib(size)}, more than the guest's memory of {_mib(total)}")
        return size

    def place_initrd(self, source: Source, size: int, kernel: Kernel) -> range:
        """The highest free pages for ``size`` bytes. Raises ConfigError if there are none."""
        limit = min(kernel.initrd_max + 1, self.end)
        top = limit
        # Going down, each obstacle is passed once: what lies above ``top`` cannot be met again.
        for other in sorted((*self.taken, kernel.footprint), key=lambda extent: extent.stop, reverse=True):
            if other.stop <= (top - size) // PAGE * PAGE:
                break
            top = min(top, other.start)
        start = (top - size) // PAGE * PAGE
        if start < max(extent.stop for extent in self.low.extents()):
            raise source.error(f"is {_mib(size)}, and that much is not free in one piece below {limit:#x}")
        return _extent(start, size)


def _extent(gpa: int, size: int) -> range:
    return range(gpa, gpa + size)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _shown(extent: range) -> str:
    return f"[{extent.start:#x}, {extent.stop:#x})"


def _mib(size: int) -> str:
    return f"{-(-size >> 20)} MiB"
