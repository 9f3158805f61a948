"""Disks on real block devices: loop devices over a file, with blocks of 512 bytes and of 4 KiB, through O_DIRECT."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from kvmpy.devices.virtio.blk_request import Answer, Kind
from kvmpy.errors import HostError
from kvmpy.host.disk import Disk
from tests.conftest import skip_or_fail
from tests.fakes.blk_rig import BlkRig, header

SIZE = 8 << 20
BLOCK = 4096
TEXT = os.urandom(SIZE)

MakeDevice = Callable[..., str]


@pytest.fixture(autouse=True)
def tun() -> None:
    """Not needed here."""


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def make_device(backing: Path) -> Iterator[MakeDevice]:
    """A loop device over ``backing``, given back in the end."""
    with ExitStack() as made:

        def make(*options: str) -> str:
            command = ["losetup", "--find", "--show", *options, str(backing)]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            if said.returncode:
                skip_or_fail("loop", f"no loop device can be made here: {said.stderr.strip()}")
            device = said.stdout.strip()
            made.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield make


@pytest.fixture
def device(make_device: MakeDevice) -> str:
    """Blocks of 4 KiB."""
    return make_device("--sector-size", str(BLOCK))


def opened(path: str, *, readonly: bool = False) -> closing[Disk]:
    return closing(Disk.open(path, readonly=readonly, direct=True))


def aligned(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


def all_of(disk: Disk) -> bytes:
    memory = aligned(bytes(SIZE))
    disk.read(0, [memory])
    return bytes(memory)


def test_device_is_examined(device: str) -> None:
    with opened(device) as disk:
        geometry = disk.geometry
        assert geometry.is_device
        assert disk.sectors == SIZE // 512
        assert geometry.block_size == geometry.physical_block_size == BLOCK
        assert geometry.alignment.offset == BLOCK
        assert geometry.discard_granularity >= BLOCK


def test_small_blocks_are_known_too(make_device: MakeDevice) -> None:
    with opened(make_device()) as disk:
        assert disk.geometry.block_size == 512


def test_whole_blocks_and_parts_of_them_are_read_and_written(device: str) -> None:
    wanted = bytearray(TEXT)
    with opened(device) as disk:
        for offset, size in ((0, BLOCK), (BLOCK * 3, BLOCK * 5), (512, 512), (BLOCK - 512, 1024), (SIZE - 512, 512)):
            data = os.urandom(size)
            disk.write(offset, [aligned(data)])
            wanted[offset : offset + size] = data
        odd = memoryview(b"?" + os.urandom(2 * BLOCK))[1:]
        disk.write(20 * BLOCK, [odd[:100], odd[100:]])
        wanted[20 * BLOCK : 22 * BLOCK] = odd
        disk.flush()
        assert all_of(disk) == bytes(wanted)
        cells = [memoryview(bytearray(n)) for n in (1, 1000, 23)]
        disk.read(SIZE - 1024, cells)
        assert b"".join(cells) == bytes(wanted[-1024:])


def test_zeroes_are_written_to_whole_blocks_and_parts_of_them(device: str) -> None:
    wanted = bytearray(TEXT)
    with opened(device) as disk:
        for offset, size, unmap in ((0, BLOCK, False), (BLOCK + 512, 4 * BLOCK, False), (1 << 20, 1 << 20, True)):
            disk.write_zeroes(offset, size, unmap=unmap)
            wanted[offset : offset + size] = bytes(size)
        disk.write_zeroes(SIZE - 1024, 512, unmap=True)
        wanted[-1024:-512] = bytes(512)
        assert all_of(disk) == bytes(wanted)


def test_discard_reaches_what_is_under_the_device(device: str, backing: Path) -> None:
    with opened(device) as disk:
        if not disk.geometry.can_unmap:
            skip_or_fail("loop", "the filesystem under the loop device takes no space back")
        before = os.stat(backing).st_blocks
        disk.discard(512, SIZE // 2)
        disk.flush()
        assert all_of(disk)[SIZE // 2 + BLOCK :] == TEXT[SIZE // 2 + BLOCK :]
    assert os.stat(backing).st_blocks < before


def test_device_that_takes_no_writes_is_refused_unless_none_are_meant(make_device: MakeDevice) -> None:
    device = make_device("--read-only")
    with pytest.raises(HostError, match=r"set readonly = true$"):
        Disk.open(device, readonly=False, direct=True)
    with opened(device, readonly=True) as disk:
        assert all_of(disk) == TEXT


def test_device_that_the_host_uses_is_refused(device: str) -> None:
    claim = os.open(device, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(
        HostError, match=r": EBUSY: the host itself uses it: mounted, or part of LVM, RAID or the like$"
    ):
        Disk.open(device, readonly=False, direct=True)
    os.close(claim)
    with opened(device):
        pass


def test_device_is_locked(device: str) -> None:
    with opened(device), pytest.raises(HostError, match="locked by this process itself"):
        Disk.open(device, readonly=True, direct=True)


def test_guest_that_thinks_in_sectors_gets_on_with_large_blocks(device: str) -> None:
    wanted = bytearray(TEXT)
    with opened(device) as disk:
        rig = BlkRig(disk)
        assert rig.device.config_read(20, 4) == BLOCK
        for sector, count in ((1, 1), (7, 2), (8, 8), (16383, 1)):
            data = os.urandom(count * 512)
            assert rig.ask(Kind.OUT, sector, data)[0] is Answer.OK
            wanted[sector * 512 : sector * 512 + len(data)] = data
        ranges = struct.pack("<QII", 33, 5, 0)
        assert rig.ask(Kind.WRITE_ZEROES, 0, ranges)[0] is Answer.OK
        wanted[33 * 512 : 38 * 512] = bytes(5 * 512)
        heads = [rig.offer([header(Kind.OUT, 40 + n), bytes([n]) * 512], [1]) for n in range(16)]
        rig.wait(len(heads))
        wanted[40 * 512 : 56 * 512] = b"".join(bytes([n]) * 512 for n in range(16))
        assert rig.ask(Kind.FLUSH)[0] is Answer.OK
        assert rig.ask(Kind.IN, 3, into=1536) == (Answer.OK, bytes(wanted[3 * 512 : 6 * 512]))
        rig.close()
        assert all_of(disk) == bytes(wanted)
