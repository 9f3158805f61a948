"""What every kernel image comes down to (bytes to put at addresses, room to keep free, where to start) and is told.

`kvmpy.boot.bzimage` and `kvmpy.boot.elf` read one format each into a Kernel.
"""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from kvmpy.boot.e820 import MapEntry


class EntryMode(Enum):
    """How the boot vCPU enters the kernel."""

    LINUX64 = auto()  # long mode, zero page in RSI: Documentation/arch/x86/boot.rst, "64-bit boot protocol"
    PVH32 = auto()  # 32-bit protected mode without paging, start info in EBX: Xen's docs/misc/pvh.pandoc


class Segment(msgspec.Struct, frozen=True):
    """``file_size`` bytes of the file from ``offset`` on go to ``gpa``; zeros follow up to ``size``."""

    gpa: int
    size: int
    offset: int
    file_size: int


class Kernel(msgspec.Struct, frozen=True):
    """A kernel image that was read and can be started; whether the guest's RAM has room is not known yet."""

    description: str
    mode: EntryMode
    ip: int
    segments: tuple[Segment, ...]
    footprint: range  # RAM it needs before it reads the memory map
    command_line_max: int  # bytes, without the NUL
    initrd_max: int  # the last address the initrd may use
    setup_header: bytes = b""  # a bzImage's, from SETUP_HEADER_START on


class BootInfo(msgspec.Struct, frozen=True):
    """What every kernel is told, whatever the protocol; addresses are guest-physical."""

    command_line: int
    initrd: range | None
    rsdp: int
    memory_map: tuple[MapEntry, ...]
