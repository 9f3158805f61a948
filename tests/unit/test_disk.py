"""Disks in files: what is opened, locked and refused, and that bytes go where they should however they are cut."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy._native import ffi
from kvmpy.abi import block as abi
from kvmpy.errors import HostError
from kvmpy.host.disk import IOV_MAX, PIECE, Disk
from tests.counts import count
from tests.fakes.loop import BOUND, open_descriptors

SIZE = 64 * 1024
PATTERN = bytes(n * 7 & 0xFF for n in range(251)) * (SIZE // 251 + 1)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(PATTERN[:SIZE])
    return path


@contextmanager
def opened(path: Path, *, readonly: bool = False, direct: bool = False) -> Iterator[Disk]:
    disk = Disk.open(str(path), readonly=readonly, direct=direct)
    try:
        yield disk
    finally:
        disk.close()


def aligned(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size))


def refusal(path: Path, *, readonly: bool = False, direct: bool = False) -> str:
    before = open_descriptors()
    with pytest.raises(HostError) as caught:
        Disk.open(str(path), readonly=readonly, direct=direct)
    assert open_descriptors() == before
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def big_blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Direct I/O as on a disk with blocks of 4 KiB, on any filesystem: the transfers, each checked for alignment."""
    moved: list[tuple[int, int]] = []

    def checked(transfer: Callable[..., int]) -> Callable[..., int]:
        def move(fd: int, buffers: list[memoryview], offset: int) -> int:
            for buffer in buffers:
                assert int(ffi.cast("uintptr_t", ffi.from_buffer(buffer))) % 512 == 0
                assert len(buffer) % 4096 == 0
            assert offset % 4096 == 0
            moved.append((offset, sum(map(len, buffers))))
            return transfer(fd, buffers, offset)

        return move

    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr(abi, "direct_alignment", lambda fd: abi.Alignment(512, 4096))
    monkeypatch.setattr(os, "preadv", checked(os.preadv))
    monkeypatch.setattr(os, "pwritev", checked(os.pwritev))
    return moved


# What is opened


def test_disk_has_the_size_of_its_file(image: Path) -> None:
    with opened(image) as disk:
        assert disk.sectors == SIZE // 512
        assert disk.geometry.block_size == 512
        assert not disk.geometry.is_device


def test_file_that_is_not_there_is_refused_with_what_to_do(tmp_path: Path) -> None:
    said = refusal(tmp_path / "none.raw")
    assert said.startswith(
        "ENOENT: cannot be opened; attach the storage that it is on, or make a new disk, such as with "
    )


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert refusal(tmp_path / "empty") == "it is empty; give it a size, such as with `truncate -s 8G`"


def test_half_a_sector_at_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(1000))
    said = refusal(tmp_path / "odd")
    assert said == "its size of 1000 bytes is no multiple of 512; see `truncate -s %512`"


def test_size_that_direct_io_cannot_reach_is_refused(tmp_path: Path, big_blocks: object) -> None:
    (tmp_path / "odd").write_bytes(bytes(4096 + 512))
    said = refusal(tmp_path / "odd", direct=True)
    assert said.startswith('cache = "none" needs a size that is a multiple of 4096 bytes here, and it has 4608; ')
    assert said.endswith('see `truncate -s %4096`, or use cache = "writeback"')


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_what_is_no_disk_is_not_even_opened(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "it")
    assert refusal(tmp_path / "it") == "neither a file nor a block device"


def test_character_device_is_not_even_opened() -> None:
    assert refusal(Path("/dev/null")) == "neither a file nor a block device"


def test_filesystem_without_direct_io_is_named_with_the_way_out(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def no_direct(path: str, flags: int, *rest: Any) -> int:
        if flags & 0o40000:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(path, flags, *rest)

    monkeypatch.setattr(os, "O_DIRECT", 0o40000)
    monkeypatch.setattr(os, "open", no_direct)
    assert refusal(image, direct=True) == (
        "EINVAL: its filesystem has no direct I/O; "
        'use cache = "writeback" (which blocks migration to another host), or another filesystem'
    )


def test_file_whose_direct_io_would_be_buffered_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr(abi, "direct_alignment", lambda fd: abi.Alignment(0, 0))
    assert refusal(image, direct=True).startswith("EINVAL: its filesystem has no direct I/O; ")


def test_alignment_that_the_kernel_does_not_tell_is_tried(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.preadv

    def blocks_of_2048(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset % 2048 or len(buffers[0]) % 2048:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(fd, buffers, offset)

    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr(abi, "direct_alignment", lambda fd: None)
    monkeypatch.setattr(os, "preadv", blocks_of_2048)
    with opened(image, direct=True) as disk:
        assert disk.geometry.alignment == (2048, 2048)


# Locks


def test_second_writer_is_refused_and_told_who_has_it(image: Path) -> None:
    with opened(image):
        said = refusal(image)
    assert said == (
        f"locked by this process itself (pid {os.getpid()}); stop that first, or open it readonly everywhere"
    )


def test_reader_is_refused_beside_a_writer_and_a_writer_beside_a_reader(image: Path) -> None:
    with opened(image):
        assert "locked by" in refusal(image, readonly=True)
    with opened(image, readonly=True):
        assert "locked by" in refusal(image)


def test_readers_share(image: Path) -> None:
    with opened(image, readonly=True), opened(image, readonly=True):
        pass


def test_other_process_is_named(image: Path) -> None:
    code = (
        "import sys; from kvmpy.host.disk import Disk; disk = Disk.open(sys.argv[1], readonly=False, direct=False); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        said = refusal(image)
        assert other.stdin is not None
        other.stdin.close()
    assert f"(pid {other.pid}); " in said


def test_image_of_another_is_refused_before_anything_is_tried_on_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(image):
        asked = kernel_that_lacks(monkeypatch)
        assert "locked by" in refusal(image)
    assert asked == []


def test_lock_can_be_handed_over(image: Path) -> None:
    with opened(image) as ours:
        theirs = Disk(str(image), readonly=False, direct=False)
        with pytest.raises(HostError):
            theirs.lock()
        ours.unlock()
        theirs.lock()
        with pytest.raises(HostError):
            ours.lock()
        theirs.close()
        ours.lock()


def test_filesystem_that_cannot_lock_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", no_locks)
    assert refusal(image) == "ENOLCK: its filesystem cannot lock it"


# Bytes


def test_read_fills_the_buffers_in_order(image: Path) -> None:
    buffers = [memoryview(bytearray(n)) for n in (512, 1, 0, 1535)]
    with opened(image, readonly=True) as disk:
        disk.read(1024, buffers)
    assert b"".join(buffers) == PATTERN[1024 : 1024 + 2048]


def test_write_stores_the_buffers_in_order_and_nothing_else(image: Path) -> None:
    with opened(image) as disk:
        disk.write(512, [memoryview(b"x" * 500), memoryview(b"y" * 12)])
        disk.flush()
    assert image.read_bytes() == PATTERN[:512] + b"x" * 500 + b"y" * 12 + PATTERN[1024:SIZE]


def test_more_buffers_than_one_call_takes_are_all_moved(image: Path) -> None:
    cells = [memoryview(bytearray(16)) for _ in range(IOV_MAX * 2 + 5)]
    with opened(image) as disk:
        disk.read(0, cells)
        assert b"".join(cells) == PATTERN[: 16 * len(cells)]
        disk.write(512, cells)
    assert image.read_bytes()[512 : 512 + 16 * len(cells)] == PATTERN[: 16 * len(cells)]


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_transfer_that_the_kernel_cuts_short_is_completed(
    call: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = getattr(os, call)

    def at_most_700(fd: int, buffers: list[memoryview], offset: int) -> int:
        result: int = really(fd, [buffers[0][:700]], offset)
        return result

    monkeypatch.setattr(os, call, at_most_700)
    buffers = [memoryview(bytearray(b"z" * n)) for n in (1000, 24, 1024)]
    with opened(image) as disk:
        disk.write(512, buffers)
        back = [memoryview(bytearray(2048))]
        disk.read(512, back)
    assert bytes(back[0]) == b"z" * 2048


def test_file_that_has_become_shorter_is_an_error(image: Path) -> None:
    with opened(image) as disk:
        os.truncate(image, 512)
        with pytest.raises(OSError, match="has become shorter") as caught:
            disk.read(0, [memoryview(bytearray(1024))])
    assert caught.value.errno == errno.EIO


def test_kernels_error_is_passed_on(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with opened(image) as disk, pytest.raises(OSError, match="No space left") as caught:
        disk.write(0, [memoryview(bytes(512))])
    assert caught.value.errno == errno.ENOSPC


# Alignment


def test_whole_blocks_in_aligned_memory_go_as_they_are(image: Path, big_blocks: list[tuple[int, int]]) -> None:
    with opened(image, direct=True) as disk:
        disk.read(4096, [aligned(4096), aligned(8192)])
    assert big_blocks == [(4096, 12288)]


def test_whole_blocks_in_odd_memory_are_moved_without_reading_what_is_overwritten(
    image: Path, big_blocks: list[tuple[int, int]]
) -> None:
    data = memoryview(b"?" + b"q" * 8192)[1:]
    with opened(image, direct=True) as disk:
        disk.write(8192, [data[:5000], data[5000:]])
    assert big_blocks == [(8192, 8192)]
    assert image.read_bytes() == PATTERN[:8192] + b"q" * 8192 + PATTERN[16384:SIZE]


def test_part_of_a_block_is_written_without_harm_to_the_rest(image: Path, big_blocks: list[tuple[int, int]]) -> None:
    with opened(image, direct=True) as disk:
        disk.write(4096 - 512, [memoryview(b"q" * 1024)])
    assert big_blocks == [(0, 8192), (0, 8192)]
    assert image.read_bytes() == PATTERN[: 4096 - 512] + b"q" * 1024 + PATTERN[4096 + 512 : SIZE]


def test_part_of_a_block_is_read(image: Path, big_blocks: list[tuple[int, int]]) -> None:
    buffers = [memoryview(bytearray(700)), memoryview(bytearray(324))]
    with opened(image, direct=True) as disk:
        disk.read(3584, buffers)
    assert b"".join(buffers) == PATTERN[3584 : 3584 + 1024]
    assert big_blocks == [(0, 8192)]


def test_long_transfer_bounces_in_pieces(tmp_path: Path, big_blocks: list[tuple[int, int]]) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(PIECE * 4))
    data = memoryview(os.urandom(PIECE * 3))
    with opened(path, direct=True) as disk:
        disk.write(512, [data[:777], data[777:]])
        back = memoryview(bytearray(len(data)))
        disk.read(512, [back])
    assert bytes(back) == bytes(data)
    assert path.read_bytes() == bytes(512) + bytes(data) + bytes(PIECE - 512)
    assert max(size for _, size in big_blocks) <= PIECE + 2 * 4096


def test_part_of_a_block_waits_for_the_part_beside_it(
    image: Path, big_blocks: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned_read = os.preadv

    def read_then_let_the_other_try(fd: int, buffers: list[memoryview], offset: int) -> int:
        done = aligned_read(fd, buffers, offset)
        if other.ident is None:
            other.start()
            other.join(0.1)  # it must not get on: nothing can be waited for but time
        return done

    monkeypatch.setattr(os, "preadv", read_then_let_the_other_try)
    with opened(image, direct=True) as disk:
        other = threading.Thread(target=lambda: disk.write(512, [memoryview(b"b" * 512)]))
        disk.write(0, [memoryview(b"a" * 512)])
        other.join(BOUND)
    assert image.read_bytes()[:1536] == b"a" * 512 + b"b" * 512 + PATTERN[1024:1536]


@pytest.mark.parametrize("call", ["write", "zero"])
def test_part_of_a_block_waits_for_the_whole(
    call: str, image: Path, big_blocks: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned_read = os.preadv

    def whole() -> None:
        if call == "write":
            disk.write(0, [aligned(4096)])
        else:
            disk.write_zeroes(0, 4096, unmap=False)

    def read_then_let_the_other_try(fd: int, buffers: list[memoryview], offset: int) -> int:
        done = aligned_read(fd, buffers, offset)
        other.start()
        other.join(0.1)
        return done

    monkeypatch.setattr(os, "preadv", read_then_let_the_other_try)
    with opened(image, direct=True) as disk:
        other = threading.Thread(target=whole)
        disk.write(512, [memoryview(b"a" * 512)])
        other.join(BOUND)
    assert image.read_bytes()[:4096] == bytes(4096)


def test_sectors_of_one_block_written_at_once_all_survive(image: Path, big_blocks: object) -> None:
    with opened(image, direct=True) as disk:
        threads = [
            threading.Thread(target=lambda n=n: disk.write(n * 512, [memoryview(bytes([65 + n]) * 512)]))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
    assert image.read_bytes() == b"".join(bytes([65 + n]) * 512 for n in range(8)) + PATTERN[4096:SIZE]


Writes = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8), st.lists(st.integers(0, 4096), max_size=6)))


@given(writes=Writes, block=st.sampled_from([None, 512, 4096]))
@settings(max_examples=count(20, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_writes_are_cut_the_disk_is_the_same(
    writes: list[tuple[int, int, list[int]]], block: int | None, tmp_path: Path
) -> None:
    path, model = tmp_path / "disk", bytearray(SIZE)
    path.write_bytes(bytes(SIZE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "O_DIRECT", 0)
        patch.setattr(abi, "direct_alignment", lambda fd: abi.Alignment(8, block or 512))
        with opened(path, direct=block is not None) as disk:
            for number, (sector, count, cuts) in enumerate(writes):
                data = bytes([number + 1 & 0xFF]) * (count * 512)
                places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
                parts = [memoryview(data)[a:b] for a, b in itertools.pairwise(places)]
                sector = min(sector, disk.sectors - count)
                disk.write(sector * 512, parts)
                model[sector * 512 : sector * 512 + len(data)] = data
            back = [memoryview(bytearray(n)) for n in (1, 511, SIZE - 512)]
            disk.read(0, back)
    assert b"".join(back) == bytes(model)
    assert path.read_bytes() == bytes(model)


# Durability


def test_flush_that_failed_is_not_forgotten(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(image) as disk:
        monkeypatch.setattr(os, "fdatasync", fails_once(errno.EIO))
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error") as caught:
                disk.flush()
            assert caught.value.errno == errno.EIO


def test_flush_without_a_page_cache_can_be_tried_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    monkeypatch.setattr(abi, "direct_alignment", lambda fd: None)
    with opened(image, direct=True) as disk:
        monkeypatch.setattr(os, "fdatasync", fails_once(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            disk.flush()
        disk.flush()


def fails_once(number: int) -> Callable[[int], None]:
    left = [OSError(number, os.strerror(number))]

    def sync(_: int) -> None:
        if left:
            raise left.pop()

    return sync


# Ranges


def kernel_that_lacks(monkeypatch: pytest.MonkeyPatch, *modes: int) -> list[int]:
    """What was asked of fallocate, with ``modes`` not supported."""
    asked: list[int] = []
    really = abi.fallocate

    def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
        asked.append(mode)
        if mode & sum(modes):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        really(fd, mode, offset, size)

    monkeypatch.setattr(abi, "fallocate", fallocate)
    return asked


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize(
    "lacking", [(), (abi.PUNCH_HOLE,), (abi.ZERO_RANGE,), (abi.PUNCH_HOLE, abi.ZERO_RANGE)], ids=str
)
def test_zeroes_are_written_whatever_the_host_lacks(
    lacking: tuple[int, ...], unmap: bool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_that_lacks(monkeypatch, *lacking)
    with opened(image) as disk:
        assert disk.geometry.can_unmap is (abi.PUNCH_HOLE not in lacking)
        disk.write_zeroes(512, 5 * 512, unmap=unmap)
        disk.write_zeroes(SIZE - 8192, 8192, unmap=unmap)
    wanted = bytearray(PATTERN[:SIZE])
    wanted[512:3072] = bytes(2560)
    wanted[SIZE - 8192 :] = bytes(8192)
    assert image.read_bytes() == bytes(wanted)


def test_space_is_kept_unless_it_may_be_given_back(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(image) as disk:
        asked = kernel_that_lacks(monkeypatch)
        disk.write_zeroes(0, 8192, unmap=False)
    assert asked == [abi.ZERO_RANGE | abi.KEEP_SIZE]


def test_what_the_host_lacks_is_not_asked_for_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(image) as disk:
        asked = kernel_that_lacks(monkeypatch, abi.ZERO_RANGE)
        disk.write_zeroes(0, 4096, unmap=False)
        disk.write_zeroes(0, 4096, unmap=False)
    assert len(asked) == 1


def test_failure_to_zero_is_no_reason_to_try_another_way(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with opened(image) as disk:
        monkeypatch.setattr(abi, "fallocate", broken)
        with pytest.raises(OSError, match="Input/output error"):
            disk.write_zeroes(0, 4096, unmap=True)
    assert image.read_bytes() == PATTERN[:SIZE]


def test_discard_gives_the_whole_clusters_in_it_back(image: Path) -> None:
    with opened(image) as disk:
        if not disk.geometry.can_unmap:
            pytest.skip("this filesystem takes no space back")
        before = os.stat(image).st_blocks
        disk.discard(512, SIZE - 1024)
        disk.flush()
    assert os.stat(image).st_blocks < before
    left = image.read_bytes()
    assert (left[:4096], left[-4096:]) == (PATTERN[:4096], PATTERN[SIZE - 4096 : SIZE])
    assert left[8192 : SIZE - 8192] == bytes(SIZE - 16384)


def test_discard_of_less_than_a_cluster_is_nothing(image: Path) -> None:
    with opened(image) as disk:
        disk.discard(512, 2048)
    assert image.read_bytes() == PATTERN[:SIZE]


def test_readonly_disk_gives_nothing_back(image: Path) -> None:
    with opened(image, readonly=True) as disk:
        assert not disk.geometry.can_unmap


def test_closing_twice_is_allowed_and_leaves_nothing_open(image: Path) -> None:
    before = open_descriptors()
    disk = Disk.open(str(image), readonly=False, direct=False)
    disk.close()
    disk.close()
    assert open_descriptors() == before
