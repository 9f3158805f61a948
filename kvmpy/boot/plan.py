"""Everything a guest finds in its RAM when it starts: planned without it, then written.

`plan` reads headers and sizes only and finds every mistake, so that `kvmpy check` needs neither RAM nor /dev/kvm.
`BootPlan.load` writes kernel, initrd, command line, the kernel's information page, CPU tables and ACPI tables, at the
start and again at every reboot, and says what to set the boot vCPU's registers to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, assert_never

import msgspec

from kvmpy.boot import boot_params, cmdline, cpu_tables, pvh
from kvmpy.boot.e820 import memory_map
from kvmpy.boot.examine import examine
from kvmpy.boot.kernel import BootInfo, EntryMode, Kernel, Segment
from kvmpy.boot.placement import LowMemory, Room
from kvmpy.boot.source import CHUNK, Reader, Source
from kvmpy.errors import ConfigError
from kvmpy.host.memory import StrPath
from kvmpy.memory import GuestMemory

P = ParamSpec("P")
T = TypeVar("T")


class Entry(msgspec.Struct, frozen=True):
    """What the boot vCPU's registers are set to; the selectors are those of `kvmpy.boot.cpu_tables`.

    ``info`` is the zero page (RSI) in LINUX64 mode, and the start info (EBX) in PVH32 mode, where ``page_tables`` holds
    nothing.
    """

    mode: EntryMode
    ip: int
    info: int
    gdt: int
    page_tables: int


class BootPlan(msgspec.Struct, frozen=True):
    """A boot that was checked: ``image`` is the kernel as it was then, ``initrd_extent`` the initrd's place."""

    kernel: Source
    initrd: Source | None
    command_line: str
    room: Room
    acpi: bytes
    image: Kernel
    initrd_extent: range | None

    @property
    def description(self) -> str:
        """What will be started, for people."""
        return self.image.description

    def load(self, memory: GuestMemory) -> Entry:
        """Write everything. Raises ConfigError if a file cannot be used any more.

        The files are examined anew: at a reboot the same path may hold another kernel.
        """
        return _plan(self.kernel, self.initrd, self.command_line, self.room, self.acpi)._write(memory)

    def _write(self, memory: GuestMemory) -> Entry:
        low, image = self.room.low, self.image
        with self.kernel.open() as reader:
            for segment in image.segments:
                _load_segment(memory, reader, segment)
        if self.initrd and self.initrd_extent:
            extent = self.initrd_extent
            with self.initrd.open() as reader:
                reader.read_into(0, memory.view(extent.start, len(extent)))
            memory.mark(extent.start, len(extent))
        memory.write(low.command_line, cmdline.encode(self.command_line))
        memory.write(low.acpi.start, self.acpi.ljust(len(low.acpi), b"\0"))
        memory.write(low.gdt, cpu_tables.gdt(image.mode))
        info = BootInfo(
            low.command_line, self.initrd_extent, low.acpi.start, memory_map(self.room.ram, self.room.reserved)
        )
        match image.mode:
            case EntryMode.LINUX64:
                told_at = low.boot_params
                memory.write(told_at, boot_params.zero_page(image.setup_header, info))
                memory.write(low.page_tables, cpu_tables.page_tables(low.page_tables))
            case EntryMode.PVH32:
                told_at = low.start_info
                memory.write(told_at, pvh.start_info(told_at, info))
            case other:
                assert_never(other)
        return Entry(image.mode, image.ip, told_at, low.gdt, low.page_tables)


def plan(
    kernel: StrPath,
    initrd: StrPath | None,
    command_line: str,
    *,
    ram: Sequence[tuple[int, int]],
    reserved: Sequence[tuple[int, int]],
    low: LowMemory,
    acpi: bytes,
) -> BootPlan:
    """Check that a guest can be started so; ``ram`` and ``reserved`` are (gpa, size), ``acpi`` goes to ``low.acpi``.

    Raises ConfigError with every mistake that can be seen at once.
    """
    if len(acpi) > len(low.acpi):
        raise ValueError(f"{len(acpi):#x} bytes of ACPI tables do not fit the {len(low.acpi):#x} there are")
    return _plan(
        Source("boot.kernel", kernel),
        Source("boot.initrd", initrd) if initrd else None,
        command_line,
        Room(tuple(ram), tuple(reserved), low),
        acpi,
    )


def _plan(kernel: Source, initrd: Source | None, command_line: str, room: Room, acpi: bytes) -> BootPlan:
    problems = _Problems()
    image = problems.of(_examine, kernel)
    initrd_size = problems.of(_size, initrd) if initrd else None
    line = problems.of(cmdline.encode, command_line)
    if line:
        problems.of(cmdline.check_length, line, image.command_line_max if image else cmdline.SIZE)
    fits = initrd and initrd_size and problems.of(room.check_size, initrd, initrd_size)
    initrd_extent = None
    if image:
        placed = problems.of(room.place_kernel, kernel, image)
        if placed and initrd and fits:
            initrd_extent = problems.of(room.place_initrd, initrd, fits, image)
    if problems or not image:
        raise ConfigError(*problems)
    return BootPlan(kernel, initrd, command_line, room, acpi, image, initrd_extent)


class _Problems(list[str]):
    """The mistakes found so far."""

    def of(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What ``step`` returns; a ConfigError is noted instead of raised."""
        try:
            return step(*args, **kwargs)
        except ConfigError as error:
            self.extend(error.problems)
            return None


def _examine(source: Source) -> Kernel:
    with source.open() as reader:
        return examine(reader)


def _size(source: Source) -> int:
    with source.open() as reader:
        return reader.size


def _load_segment(memory: GuestMemory, reader: Reader, segment: Segment) -> None:
    view = memory.view(segment.gpa, segment.size)
    reader.read_into(segment.offset, view[: segment.file_size])
    for start in range(segment.file_size, segment.size, CHUNK):
        rest = view[start : start + CHUNK]
        rest[:] = bytes(len(rest))
    memory.mark(segment.gpa, segment.size)
