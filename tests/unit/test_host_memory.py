"""Mapping: host memory for guest RAM, or a message with numbers and nothing left behind."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from kvmpy.errors import HostError
from kvmpy.host import memory
from kvmpy.host.memory import ALIGNMENT, MIB, Mapping, _cgroup_room, available_memory
from tests.fakes.loop import open_descriptors

HUGE = 2 * MIB


def mappings() -> int:
    """How many mappings of a mebibyte or more this process has."""
    extents = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return sum(int(end, 16) - int(start, 16) >= MIB for start, end in extents)


def smaps_of(mapping: Mapping) -> dict[str, str]:
    """What the kernel says of the mapping."""
    entries = Path("/proc/self/smaps").read_text().splitlines()
    at = next(
        n
        for n, line in enumerate(entries)
        if "-" in line.split()[0] and covers(line.split()[0], mapping.hva + mapping.size // 2)
    )
    fields = (line.split(":", 1) for line in entries[at + 1 : at + 30] if ":" in line)
    found: dict[str, str] = {}
    for key, value in fields:
        found.setdefault(key, value.strip())
    return found


def covers(extent: str, address: int) -> bool:
    start, _, end = extent.partition("-")
    return int(start, 16) <= address < int(end, 16)


@pytest.mark.parametrize("size", [4096, MIB, 2 * MIB, 4 * MIB + 4096])
def test_anonymous_memory_begins_where_a_huge_page_can_and_is_zero(size: int) -> None:
    mapping = Mapping(size)
    assert mapping.hva % ALIGNMENT == 0
    assert len(mapping.view) == size == mapping.size
    assert mapping.view == bytes(size)
    assert mapping.fd == -1
    mapping.close()


def test_what_is_written_is_read_at_both_ends() -> None:
    mapping = Mapping(4 * MIB)
    mapping.view[0], mapping.view[-1] = 1, 2
    assert (mapping.view[0], mapping.view[-1]) == (1, 2)
    mapping.close()


def test_address_is_that_of_the_first_byte() -> None:
    mapping = Mapping(MIB)
    mapping.view[:8] = b"kvmpy-hv"
    with open("/proc/self/mem", "rb") as ourselves:
        ourselves.seek(mapping.hva)
        assert ourselves.read(8) == b"kvmpy-hv"
    mapping.close()


def test_shared_memory_has_a_descriptor_that_shows_the_same_bytes() -> None:
    mapping = Mapping(MIB, shared=True)
    mapping.view[100:104] = b"seen"
    assert os.pread(mapping.fd, 4, 100) == b"seen"
    assert os.fstat(mapping.fd).st_size == MIB
    assert not os.get_inheritable(mapping.fd)
    mapping.close()


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_not_copied_into_a_child(shared: bool) -> None:
    mapping = Mapping(4 * MIB, shared=shared)
    assert "dc" in smaps_of(mapping)["VmFlags"].split()
    mapping.close()


@pytest.mark.parametrize("shared", [False, True])
def test_reserved_memory_is_there_before_it_is_touched(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "POPULATE_STEP", 2 * MIB)
    not_reserved = Mapping(5 * MIB, shared=shared)
    assert int(smaps_of(not_reserved)["Rss"].split()[0]) < 1024
    not_reserved.close()
    reserved = Mapping(5 * MIB, shared=shared, reserve=True)
    assert int(smaps_of(reserved)["Rss"].split()[0]) >= 5 * 1024
    reserved.close()


@pytest.mark.parametrize("shared", [False, True])
def test_close_gives_everything_back_and_may_come_twice(shared: bool) -> None:
    descriptors, before = open_descriptors(), mappings()
    mapping = Mapping(4 * MIB, shared=shared)
    assert mappings() > before
    mapping.close()
    mapping.close()
    assert mappings() == before
    assert open_descriptors() == descriptors


def test_close_with_a_view_out_is_refused_and_can_be_tried_again() -> None:
    before = mappings()
    mapping = Mapping(4 * MIB)
    view = mapping.view[:10]
    with pytest.raises(BufferError):
        mapping.close()
    view.release()
    mapping.close()
    assert mappings() == before


@pytest.mark.parametrize("shared", [False, True])
def test_more_memory_than_there_is_is_refused_with_both_numbers(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * MIB + 1)
    descriptors, before = open_descriptors(), mappings()
    with pytest.raises(HostError) as caught:
        Mapping(101 * MIB, shared=shared)
    assert str(caught.value) == "machine.memory: the guest wants 101 MiB and this host has 100 MiB available"
    assert (open_descriptors(), mappings()) == (descriptors, before)


def test_all_of_what_is_available_is_not_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * MIB)
    Mapping(4 * MIB).close()


@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_the_kernel_does_not_map_is_refused_by_name(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 62)
    descriptors, before = open_descriptors(), mappings()
    with pytest.raises(HostError, match=r"machine.memory: E\w+: the host does not give 1073741824 MiB"):
        Mapping(1 << 50, shared=shared)
    assert (open_descriptors(), mappings()) == (descriptors, before)


def test_huge_pages_that_are_not_free_are_counted_and_the_remedy_named() -> None:
    descriptors, before = open_descriptors(), mappings()
    pages = 1 << 24
    with pytest.raises(HostError) as caught:
        Mapping(pages * HUGE, huge_page=HUGE)
    assert f": {pages} huge pages of 2048 KiB are not free; write {pages} or more to " in str(caught.value)
    assert str(caught.value).endswith("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    assert (open_descriptors(), mappings()) == (descriptors, before)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EINVAL, "MADV_POPULATE_WRITE needs Linux 5.14; leave reserve off"),
        (errno.ENOMEM, "the host ran out of memory"),
    ],
)
def test_reserve_that_fails_says_how_far_it_came_and_leaves_nothing(
    number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(mmap.mmap):
        """Runs out at the second step."""

        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            if option == memory.MADV_POPULATE_WRITE and start:
                raise OSError(number, "")

    monkeypatch.setattr(memory, "POPULATE_STEP", 2 * MIB)
    monkeypatch.setattr(mmap, "mmap", Short)
    descriptors, before = open_descriptors(), mappings()
    with pytest.raises(HostError, match=rf"machine.reserve: {errno.errorcode[number]} after 2 of 6 MiB: {advice}"):
        Mapping(6 * MIB, shared=True, reserve=True)
    assert (open_descriptors(), mappings()) == (descriptors, before)


def make_group(directory: Path, limit: str, used: int, inactive_file: int = 0) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\nactive_file 5\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    (tmp_path / "membership").write_text("1:cpu:/other\n0::/slice/unit\n")
    (tmp_path / "root").mkdir()
    return tmp_path / "membership"


def test_cgroup_allows_its_limit_less_what_is_used_but_for_cached_files(tmp_path: Path, membership: Path) -> None:
    make_group(tmp_path / "root/slice", "max", 900)
    make_group(tmp_path / "root/slice/unit", "1000", 600, inactive_file=250)
    assert _cgroup_room(tmp_path / "root", membership) == 650


def test_limit_of_a_cgroup_above_counts_too(tmp_path: Path, membership: Path) -> None:
    make_group(tmp_path / "root/slice", "1000", 900)
    make_group(tmp_path / "root/slice/unit", "5000", 10)
    assert _cgroup_room(tmp_path / "root", membership) == 100


def test_cgroup_without_a_limit_allows_anything(tmp_path: Path, membership: Path) -> None:
    assert _cgroup_room(tmp_path / "root", membership) is None
    make_group(tmp_path / "root/slice", "max", 900)
    assert _cgroup_room(tmp_path / "root", membership) is None
    assert _cgroup_room(tmp_path / "root", tmp_path / "absent") is None


def test_what_is_available_is_the_lesser_of_host_and_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cgroup_room", lambda: 1234)
    assert available_memory() == 1234
    monkeypatch.setattr(memory, "_cgroup_room", lambda: 1 << 62)
    assert MIB < available_memory() < 1 << 62
