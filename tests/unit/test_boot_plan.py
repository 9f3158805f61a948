"""Planning and loading a boot: bytes at their places, again at a reboot, and every mistake reported."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.boot.kernel import EntryMode
from kvmpy.boot.placement import LowMemory
from kvmpy.boot.plan import BootPlan, Entry, plan
from kvmpy.errors import ConfigError
from kvmpy.memory import GuestMemory, Ram
from tests.counts import count
from tests.fakes.watch import Watch
from tests.unit.test_boot_bzimage import CODE, bzimage
from tests.unit.test_boot_elf import BSS, DATA, ENTRY, LOAD_AT, TEXT, vmlinux

MIB = 1 << 20
RAM_SIZE = 4 * MIB
HOLE = (0xA_0000, 0x6_0000)
LOW = LowMemory(
    gdt=0x500,
    boot_params=0x7000,
    start_info=0x6000,
    command_line=0x2_0000,
    page_tables=0x9000,
    acpi=range(0xE_0000, 0x10_0000),
)
ACPI = b"RSD PTR tables"
INITRD = b"initrd!" * 1000
INITRD_AT = RAM_SIZE - 2 * 4096  # 7000 bytes are two pages


class Bytes:
    """Host memory for guest RAM that is not mapped anywhere."""

    hva = 0

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))


def guest_memory() -> GuestMemory:
    memory = GuestMemory()
    memory.add(Ram(0, RAM_SIZE, Bytes(RAM_SIZE)))
    return memory


class Files:
    """A directory with a kernel and an initrd, and a plan made of them."""

    def __init__(self, directory: Path) -> None:
        self.kernel = directory / "vmlinuz"
        self.initrd = directory / "initrd.img"
        self.kernel.write_bytes(bzimage())
        self.initrd.write_bytes(INITRD)

    def plan(
        self, cmdline: str = "console=ttyS0", *, ram: int = RAM_SIZE, reserved: tuple[tuple[int, int], ...] = (HOLE,)
    ) -> BootPlan:
        return plan(self.kernel, self.initrd, cmdline, ram=[(0, ram)], reserved=reserved, low=LOW, acpi=ACPI)

    def refusal(self, cmdline: str = "", ram: int = RAM_SIZE, reserved: tuple[int, int] = HOLE) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as caught:
            self.plan(cmdline, ram=ram, reserved=(HOLE, reserved))
        return caught.value.problems


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_bzimage_and_its_initrd_are_loaded(files: Files) -> None:
    memory = guest_memory()
    assert files.plan().load(memory) == Entry(EntryMode.LINUX64, 0x10_0200, 0x7000, 0x500, 0x9000)
    assert memory.read(0x10_0000, len(CODE)) == CODE
    assert memory.read(INITRD_AT, len(INITRD)) == INITRD
    assert memory.read(LOW.command_line, 14) == b"console=ttyS0\0"
    assert memory.read(LOW.acpi.start, len(ACPI) + 2) == ACPI + bytes(2)


@pytest.mark.parametrize(("image", "at"), [(bzimage, 0x10_0000), (vmlinux, LOAD_AT)])
def test_a_reboot_during_a_migration_is_in_the_log(files: Files, image: Callable[[], bytes], at: int) -> None:
    files.kernel.write_bytes(image())
    memory = guest_memory()
    memory.write(0, b"\xa5" * RAM_SIZE)
    planned, watch = files.plan(), Watch(memory)
    planned.load(memory)
    assert watch.check() >= {at // 4096 * 4096, INITRD_AT, INITRD_AT + 4096}


def test_the_zero_page_tells_the_kernel_what_it_needs(files: Files) -> None:
    memory = guest_memory()
    files.plan().load(memory)
    page = memory.read(LOW.boot_params, 4096)
    assert struct.unpack_from("<B", page, 0x210) == (0xFF,)
    assert struct.unpack_from("<II", page, 0x218) == (INITRD_AT, len(INITRD))
    assert struct.unpack_from("<I", page, 0x228) == (LOW.command_line,)
    assert struct.unpack_from("<Q", page, 0x070) == (LOW.acpi.start,)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x1E8] == 3
    assert list(struct.iter_unpack("<QQI", page[0x2D0 : 0x2D0 + 60])) == [
        (0, 0xA_0000, 1),
        (0xA_0000, 0x6_0000, 2),
        (0x10_0000, RAM_SIZE - MIB, 1),
    ]


def test_a_kernel_older_than_the_rsdp_field_finds_it_zero(files: Files) -> None:
    files.kernel.write_bytes(bzimage(protocol=0x020D))
    memory = guest_memory()
    files.plan().load(memory)
    assert memory.read(LOW.boot_params + 0x70, 8) == bytes(8)


def test_paging_and_segments_are_ready_for_64_bit_mode(files: Files) -> None:
    memory = guest_memory()
    entry = files.plan().load(memory)
    assert struct.unpack("<QQQQ", memory.read(entry.gdt, 32)) == (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    last = walk(memory, entry.page_tables, 0xFFFF_F000)
    assert last == 0xFFE0_0083
    assert walk(memory, entry.page_tables, 0x1_0000_0000) == 0


def walk(memory: GuestMemory, table: int, gpa: int) -> int:
    """The page directory entry that maps ``gpa``, or the first entry on the way that is not present."""
    word = table
    for shift in (39, 30, 21):
        (word,) = struct.unpack("<Q", memory.read((word & ~0xFFF) + (gpa >> shift & 511) * 8, 8))
        if not word & 1:
            break
    return word


def test_a_vmlinux_is_loaded_with_its_start_info(files: Files) -> None:
    files.kernel.write_bytes(vmlinux())
    memory = guest_memory()
    assert files.plan().load(memory) == Entry(EntryMode.PVH32, ENTRY, 0x6000, 0x500, 0x9000)
    assert memory.read(LOAD_AT, len(TEXT)) == TEXT
    assert memory.read(LOAD_AT + 0x1000, len(DATA)) == DATA
    module_list, map_at = LOW.start_info + 56, LOW.start_info + 56 + 32
    assert struct.unpack("<IIIIQQQQII", memory.read(LOW.start_info, 56)) == (
        *(0x336EC578, 1, 0, 1, module_list, LOW.command_line, LOW.acpi.start, map_at, 3, 0),
    )
    assert struct.unpack("<QQQQ", memory.read(module_list, 32)) == (INITRD_AT, len(INITRD), 0, 0)
    assert struct.unpack("<QQII", memory.read(map_at + 48, 24)) == (0x10_0000, RAM_SIZE - MIB, 1, 0)


def test_without_an_initrd_none_is_mentioned(files: Files) -> None:
    files.kernel.write_bytes(vmlinux())
    memory = guest_memory()
    plan(files.kernel, None, "", ram=[(0, RAM_SIZE)], reserved=[HOLE], low=LOW, acpi=ACPI).load(memory)
    assert struct.unpack("<IQ", memory.read(LOW.start_info + 12, 12)) == (0, 0)


WRITTEN = {
    "bzImage": (bzimage(), [LOW.boot_params, LOW.page_tables, LOW.gdt, LOW.command_line, LOW.acpi.start, 0x10_0000]),
    "vmlinux": (vmlinux(), [LOW.start_info, LOW.gdt, LOW.command_line, LOW.acpi.start, LOAD_AT, LOAD_AT + 0x1000]),
}
SIZES = {
    LOW.boot_params: 4096,
    LOW.page_tables: 6 * 4096,
    LOW.gdt: 32,
    LOW.command_line: 14,
    LOW.acpi.start: len(LOW.acpi),
    0x10_0000: len(CODE),
    LOW.start_info: 56 + 32 + 3 * 24,
    LOAD_AT: len(TEXT),
    LOAD_AT + 0x1000: len(DATA) + BSS,
}


@pytest.mark.parametrize("image", WRITTEN)
def test_a_reboot_restores_whatever_the_guest_overwrote(files: Files, image: str) -> None:
    data, places = WRITTEN[image]
    files.kernel.write_bytes(data)
    boot, fresh, used = files.plan(), guest_memory(), guest_memory()
    boot.load(fresh)
    boot.load(used)
    used.write(0, b"\xcc" * RAM_SIZE)
    boot.load(used)
    extents = [(place, SIZES[place]) for place in places] + [(INITRD_AT, len(INITRD))]
    assert [used.read(*extent) for extent in extents] == [fresh.read(*extent) for extent in extents]


def test_a_reboot_takes_the_kernel_that_is_there_now(files: Files) -> None:
    boot = files.plan()
    files.kernel.write_bytes(vmlinux())
    assert boot.load(guest_memory()).mode is EntryMode.PVH32


def test_a_kernel_that_went_away_is_reported_at_the_reboot(files: Files) -> None:
    boot = files.plan()
    files.kernel.unlink()
    with pytest.raises(ConfigError, match=r"boot.kernel: .*ENOENT"):
        boot.load(guest_memory())


def test_the_plan_says_what_will_start(files: Files) -> None:
    assert files.plan().description == "bzImage, 64-bit boot protocol 2.15, Linux 6.1.0-test"


def test_every_mistake_is_reported_at_once(files: Files) -> None:
    files.kernel.unlink()
    files.initrd.write_bytes(b"")
    kernel, initrd, cmdline = files.refusal("a\nb")
    assert kernel == f"boot.kernel: {files.kernel}: cannot be opened: No such file or directory (ENOENT)"
    assert initrd == f"boot.initrd: {files.initrd}: is empty"
    assert cmdline == r"boot.cmdline: character 2 is '\n'; only ASCII on one line is possible"


def test_without_a_kernel_sizes_are_checked_all_the_same(files: Files) -> None:
    files.kernel.unlink()
    os.truncate(files.initrd, RAM_SIZE + 1)
    kernel, cmdline, initrd = files.refusal("x" * 2048)
    assert kernel.startswith(f"boot.kernel: {files.kernel}: cannot be opened")
    assert cmdline == "boot.cmdline: 2048 characters, and the kernel takes at most 2047"
    assert initrd == f"boot.initrd: {files.initrd}: is 5 MiB, more than the guest's memory of 4 MiB"


def test_a_kernel_and_an_initrd_that_do_not_fit_are_both_reported(files: Files) -> None:
    files.kernel.write_bytes(bzimage(init_size=4 * MIB))
    os.truncate(files.initrd, RAM_SIZE + 1)
    kernel, initrd = sorted(files.refusal(), reverse=True)
    assert kernel.startswith(f"machine.memory: the kernel {files.kernel} needs RAM")
    assert initrd.startswith(f"boot.initrd: {files.initrd}: is 5 MiB")


@pytest.mark.parametrize("character", ["é", "\0", "\r", "\udc80"])
def test_a_command_line_is_one_line_of_ascii(files: Files, character: str) -> None:
    (problem,) = files.refusal(f"root={character}")
    assert problem.startswith("boot.cmdline: character 6 is ")


def test_a_command_line_as_long_as_the_kernel_takes_is_loaded(files: Files) -> None:
    memory = guest_memory()
    files.plan("x" * 255).load(memory)
    assert memory.read(LOW.command_line, 256) == b"x" * 255 + b"\0"


def test_a_longer_command_line_is_refused_with_both_numbers(files: Files) -> None:
    assert files.refusal("x" * 256) == ("boot.cmdline: 256 characters, and the kernel takes at most 255",)


def test_a_command_line_never_exceeds_the_room_kept_for_it(files: Files) -> None:
    files.kernel.write_bytes(bzimage(cmdline_size=0xFFFF_FFFF))
    assert files.refusal("x" * 2048) == ("boot.cmdline: 2048 characters, and the kernel takes at most 2047",)


def test_a_directory_is_no_kernel(files: Files) -> None:
    files.kernel.unlink()
    files.kernel.mkdir()
    assert files.refusal() == (f"boot.kernel: {files.kernel}: is a directory",)


def test_a_fifo_is_refused_without_waiting_for_its_writer(files: Files) -> None:
    files.initrd.unlink()
    os.mkfifo(files.initrd)
    assert files.refusal() == (f"boot.initrd: {files.initrd}: is not a regular file",)


def test_a_kernel_that_may_not_be_read_is_refused(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:  # root may read every file, so a mode would not do
        raise PermissionError(errno.EACCES, "")

    files.initrd = files.kernel
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        problem, _ = files.refusal()
    assert problem.endswith("cannot be opened: Permission denied (EACCES)")


def test_a_name_that_cannot_be_a_file_is_refused(files: Files) -> None:
    files.kernel = Path("vm\0linuz")
    assert files.refusal() == ("boot.kernel: vm\0linuz: not a file name",)


def test_a_kernel_larger_than_the_memory_names_both(files: Files) -> None:
    files.kernel.write_bytes(bzimage(init_size=4 * MIB))
    (problem,) = files.refusal()
    assert problem == (
        f"machine.memory: the kernel {files.kernel} needs RAM up to 0x500000 (5 MiB), "
        "and the guest's low RAM ends at 0x400000 (4 MiB)"
    )


def test_memory_smaller_than_kvmpys_own_tables_is_refused(files: Files) -> None:
    assert files.refusal(ram=0x1_0000)[0].startswith("machine.memory: ")


def test_a_kernel_over_a_reserved_range_is_refused(files: Files) -> None:
    (problem,) = files.refusal(reserved=(0x10_1000, 0x1000))
    assert problem == (
        f"boot.kernel: {files.kernel}: loads at [0x100000, 0x140000), and [0x101000, 0x102000) is not free"
    )


def test_an_initrd_larger_than_the_memory_is_refused(files: Files) -> None:
    with files.initrd.open("wb") as file:
        file.truncate(RAM_SIZE + 1)
    assert files.refusal() == (f"boot.initrd: {files.initrd}: is 5 MiB, more than the guest's memory of 4 MiB",)


def test_an_initrd_stays_below_the_kernels_limit(files: Files) -> None:
    files.kernel.write_bytes(bzimage(initrd_max=0x1F_FFFF))
    assert files.plan().initrd_extent == range(0x1F_E000, 0x1F_E000 + len(INITRD))


def test_an_initrd_goes_below_what_is_reserved_at_the_top(files: Files) -> None:
    boot = files.plan(reserved=(HOLE, (RAM_SIZE - 4096, 4096)))
    assert boot.initrd_extent == range(RAM_SIZE - 3 * 4096, RAM_SIZE - 3 * 4096 + len(INITRD))


def test_an_initrd_without_room_beside_the_kernel_is_refused(files: Files) -> None:
    with files.initrd.open("wb") as file:
        file.truncate(RAM_SIZE - MIB - 0x4_0000 + 1)
    assert files.refusal() == (
        f"boot.initrd: {files.initrd}: is 3 MiB, and that much is not free in one piece below 0x400000",
    )


def test_low_memory_that_overlaps_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="overlap"):
        LowMemory(0x500, 0x500, 0x6000, 0x2_0000, 0x9000, range(0xE_0000, 0x10_0000))


fuzz = settings(
    max_examples=count(25, 2000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(data=st.binary(max_size=8192))
def test_arbitrary_bytes_are_never_more_than_a_config_error(files: Files, data: bytes) -> None:
    files.kernel.write_bytes(data)
    with pytest.raises(ConfigError):
        files.plan()


@fuzz
@given(
    image=st.sampled_from([bzimage(), vmlinux()]),
    patches=st.lists(st.tuples(st.integers(0, 0x280), st.binary(min_size=1, max_size=8)), max_size=4),
    size=st.integers(0, 0x2000),
)
def test_a_damaged_kernel_is_loaded_or_a_config_error(
    files: Files, image: bytes, patches: list[tuple[int, bytes]], size: int
) -> None:
    damaged = bytearray(image)
    for offset, patch in patches:
        damaged[offset : offset + len(patch)] = patch
    files.kernel.write_bytes(damaged[: max(size, 0x280)])
    with suppress(ConfigError):
        files.plan().load(guest_memory())
