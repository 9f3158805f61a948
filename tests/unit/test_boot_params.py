"""The zero page's offsets against the installed kernel headers, and its limits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpy.boot import boot_params
from kvmpy.boot.e820 import MapEntry, MemoryType
from kvmpy.boot.kernel import BootInfo
from tests.conftest import skip_or_fail

FIELDS = {
    "acpi_rsdp_addr": boot_params.ACPI_RSDP_ADDR,
    "e820_entries": boot_params.E820_ENTRIES,
    "hdr.setup_sects": boot_params.SETUP_SECTS,
    "hdr.syssize": boot_params.SYSSIZE,
    "hdr.boot_flag": boot_params.BOOT_FLAG,
    "hdr.header": boot_params.HEADER,
    "hdr.version": boot_params.VERSION,
    "hdr.kernel_version": boot_params.KERNEL_VERSION,
    "hdr.type_of_loader": boot_params.TYPE_OF_LOADER,
    "hdr.loadflags": boot_params.LOADFLAGS,
    "hdr.ramdisk_image": boot_params.RAMDISK_IMAGE,
    "hdr.ramdisk_size": boot_params.RAMDISK_SIZE,
    "hdr.cmd_line_ptr": boot_params.CMD_LINE_PTR,
    "hdr.initrd_addr_max": boot_params.INITRD_ADDR_MAX,
    "hdr.xloadflags": boot_params.XLOADFLAGS,
    "hdr.cmdline_size": boot_params.CMDLINE_SIZE,
    "hdr.pref_address": boot_params.PREF_ADDRESS,
    "hdr.init_size": boot_params.INIT_SIZE,
}
PLACES = {
    "hdr": boot_params.SETUP_HEADER_START,
    "e820_table": boot_params.E820_TABLE,
    "edd_mbr_sig_buffer": boot_params.SETUP_HEADER_LIMIT,
}
WIDTHS = {"B": 1, "H": 2, "I": 4, "Q": 8}


def test_fields_are_where_the_header_says(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        skip_or_fail("cc", "needs a C compiler and the kernel's headers: install gcc and linux-libc-dev")
    facts = [
        f"offsetof(struct boot_params, {name}) == {field.offset}"
        f" && sizeof(((struct boot_params *)0)->{name}) == {WIDTHS[field.format]}"
        for name, field in FIELDS.items()
    ]
    facts += [f"offsetof(struct boot_params, {name}) == {offset}" for name, offset in PLACES.items()]
    asserts = "".join(f'_Static_assert({fact}, "");\n' for fact in facts)
    source = tmp_path / "offsets.c"
    source.write_text(f"#include <stddef.h>\n#include <asm/bootparam.h>\n{asserts}")
    subprocess.run(["gcc", "-fsyntax-only", source], check=True)


def test_a_memory_map_beyond_the_table_is_a_programming_error() -> None:
    entries = tuple(MapEntry(index * 2, 1, MemoryType.RAM) for index in range(129))
    with pytest.raises(ValueError, match="129 entries"):
        boot_params.zero_page(b"", BootInfo(0, None, 0, entries))
