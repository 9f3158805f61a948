"""The PVH start info: what a kernel entered at its PVH entry is told.

hvm_start_info version 1, of Xen's public/arch-x86/hvm/start_info.h. The module list and the memory map follow the
structure itself, so that one write places all three.
"""

from __future__ import annotations

import struct
from typing import Final

from kvmpy.boot.kernel import BootInfo

SIZE: Final = 4096  # room for the structure, one module and more entries of memory map than there ever are
MAGIC: Final = 0x336EC578
VERSION: Final = 1

# magic, version, flags, modules, module list, command line, RSDP, memory map, entries of it, reserved
START_INFO: Final = struct.Struct("<IIIIQQQQII")
MODULE: Final = struct.Struct("<QQQQ")  # address, size, command line, reserved
MEMORY_MAP_ENTRY: Final = struct.Struct("<QQII")  # address, size, type, reserved


def start_info(gpa: int, info: BootInfo) -> bytes:
    """The start info for ``gpa``, where it is written."""
    modules = MODULE.pack(info.initrd.start, len(info.initrd), 0, 0) if info.initrd else b""
    module_list = gpa + START_INFO.size
    data = START_INFO.pack(
        MAGIC,
        VERSION,
        0,
        len(modules) // MODULE.size,
        module_list if modules else 0,
        info.command_line,
        info.rsdp,
        module_list + len(modules),
        len(info.memory_map),
        0,
    )
    data += modules
    data += b"".join(MEMORY_MAP_ENTRY.pack(entry.gpa, entry.size, entry.type, 0) for entry in info.memory_map)
    if len(data) > SIZE:
        raise ValueError(f"a memory map of {len(info.memory_map)} entries makes the start info longer than {SIZE:#x}")
    return data
