"""The guest's RAM mapped for DMA: all of it and nothing else, once, for as long as a device needs it."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from kvmpy.abi import ioctl
from kvmpy.devices.vfio import type1
from kvmpy.devices.vfio.container import Container
from kvmpy.devices.vfio.type1 import check_locked_memory
from kvmpy.errors import HostError
from kvmpy.host.memory import Mapping
from kvmpy.memory import GuestMemory, Ram
from tests.fakes.loop import open_descriptors
from tests.fakes.vfio import ADDRESS, GROUP, VfioKernel

PAGE: Final = 4096
MIB: Final = 1 << 20
LOW, HIGH = 3 * MIB, 1 << 32


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> VfioKernel:
    kernel = VfioKernel(tmp_path)
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)
    return kernel


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ExitStack() as resources:
        mapping = Mapping(5 * MIB)
        resources.callback(mapping.close)
        memory = GuestMemory()
        resources.callback(memory.close)
        memory.add(Ram(0, LOW, mapping))
        memory.add(Ram(HIGH, 2 * MIB, mapping, LOW))
        yield memory


@pytest.fixture
def container(memory: GuestMemory, kernel: VfioKernel) -> Container:
    return Container(memory, kernel, str(kernel.directory))


def open_mapped(container: Container, group: int = GROUP) -> int:
    """A device whose DMA reaches RAM."""
    device = container.open(ADDRESS, group)
    try:
        container.map_memory(lambda: True)
    except BaseException:
        container.close(device, group)
        raise
    return device


def test_all_ram_is_mapped_once_when_a_device_needs_it_and_the_last_device_unmaps_it(
    container: Container, memory: GuestMemory, kernel: VfioKernel
) -> None:
    first = open_mapped(container)
    assert kernel.maps == {block.gpa: (block.size, block.hva) for block in memory.blocks}
    second, third = open_mapped(container), open_mapped(container, GROUP + 1)
    assert len(kernel.named("VFIO_IOMMU_MAP_DMA")) == 2, "once"
    for device, group in ((first, GROUP), (third, GROUP + 1)):
        container.close(device, group)
        assert len(kernel.maps) == 2
    container.close(second, GROUP)
    assert kernel.maps == {}
    assert kernel.told == ["added", "added", "removed", "removed"]


def test_a_container_that_the_host_has_emptied_has_nothing_to_unmap(
    container: Container, kernel: VfioKernel, caplog: pytest.LogCaptureFixture
) -> None:
    device = open_mapped(container)
    kernel.fail("VFIO_IOMMU_UNMAP_DMA", errno.EINVAL)
    kernel.fail("VFIO_IOMMU_GET_INFO", errno.EINVAL)
    container.close(device, GROUP)
    assert caplog.messages == []


def test_memory_that_stays_mapped_in_a_container_that_works_is_an_error(
    container: Container, kernel: VfioKernel, caplog: pytest.LogCaptureFixture
) -> None:
    device = open_mapped(container)
    kernel.fail("VFIO_IOMMU_UNMAP_DMA", errno.EINVAL)
    container.close(device, GROUP)
    assert "VFIO_IOMMU_UNMAP_DMA: EINVAL: the guest's memory" in caplog.text


def test_a_device_comes_and_goes_fifty_times_and_leaves_nothing(container: Container, kernel: VfioKernel) -> None:
    container.close(container.open(ADDRESS, GROUP), GROUP)
    kernel.nic.close()
    before = open_descriptors()
    for _ in range(50):
        device = open_mapped(container)
        assert len(kernel.maps) == 2
        container.close(device, GROUP)
        assert kernel.maps == {}
        kernel.nic.close()
    assert open_descriptors() == before
    assert kernel.available == 65535


def test_memory_is_mapped_in_chunks_and_unmapped_in_one_go(
    container: Container, kernel: VfioKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type1, "CHUNK", MIB)
    device = open_mapped(container)
    assert {iova: size for iova, (size, _) in kernel.maps.items()} == {
        **{n * MIB: MIB for n in range(3)},
        **{HIGH + n * MIB: MIB for n in range(2)},
    }
    container.close(device, GROUP)
    assert kernel.maps == {}


def test_chunks_are_larger_where_the_kernel_takes_few_maps(
    container: Container, kernel: VfioKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type1, "CHUNK", PAGE)
    monkeypatch.setattr(type1, "HUGE_PAGE", MIB)
    kernel.available = 4
    open_mapped(container)
    assert {iova: size for iova, (size, _) in kernel.maps.items()} == {0: 2 * MIB, 2 * MIB: MIB, HIGH: 2 * MIB}


def test_a_kernel_that_takes_no_more_maps_is_refused(container: Container, kernel: VfioKernel) -> None:
    kernel.available = 0
    with pytest.raises(HostError, match="raise dma_entry_limit"):
        container.open(ADDRESS, GROUP)


@pytest.mark.parametrize("ranges", [((0, LOW - 1), (LOW, HIGH), (HIGH + PAGE, 1 << 40)), ()])
def test_memory_outside_of_what_the_iommu_maps_is_refused_by_name(
    container: Container, kernel: VfioKernel, ranges: tuple[tuple[int, int], ...]
) -> None:
    kernel.ranges = ranges
    with pytest.raises(HostError, match=r"memory at .* is not within what this host's IOMMU can map"):
        container.open(ADDRESS, GROUP)
    assert kernel.maps == {}


def test_a_failed_map_leaves_nothing_mapped_or_open(
    container: Container, kernel: VfioKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type1, "CHUNK", MIB)
    kernel.available = None
    before = open_descriptors()
    kernel.maps[HIGH + MIB] = PAGE, 0
    with pytest.raises(HostError, match=r"VFIO_IOMMU_MAP_DMA: EEXIST: .* at 0x100100000 .*ulimit -l"):
        open_mapped(container)
    assert kernel.maps == {HIGH + MIB: (PAGE, 0)}
    assert kernel.told == ["added", "removed"]
    kernel.nic.close()
    assert open_descriptors() == before
    kernel.maps.clear()
    open_mapped(container)
    assert len(kernel.maps) == 5


@pytest.mark.parametrize(
    ("request_name", "number", "problem"),
    [
        ("VFIO_GROUP_SET_CONTAINER", errno.EPERM, "no interrupt remapping"),
        ("VFIO_SET_IOMMU", errno.EINVAL, "does not take this group"),
        ("VFIO_GROUP_GET_DEVICE_FD", errno.ENODEV, "not bound to vfio-pci"),
        ("VFIO_GROUP_GET_STATUS", errno.EIO, "EIO"),
        ("VFIO_IOMMU_GET_INFO", errno.EIO, "EIO"),
    ],
)
def test_what_the_kernel_refuses_is_said_and_undone(
    container: Container, kernel: VfioKernel, request_name: str, number: int, problem: str
) -> None:
    before = open_descriptors()
    kernel.fail(request_name, number)
    with pytest.raises(HostError, match=problem):
        container.open(ADDRESS, GROUP)
    assert (kernel.maps, open_descriptors()) == ({}, before)
    assert kernel.told in ([], ["added", "removed"])
    kernel.recover(request_name)
    open_mapped(container)
    assert len(kernel.maps) == 2


def test_r43_a_device_that_is_only_open_pins_nothing_and_the_limit_of_locked_memory_was_looked_at(
    container: Container, memory: GuestMemory, kernel: VfioKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    monkeypatch.setattr("kvmpy.devices.vfio.container.check_locked_memory", looked.append)
    device = container.open(ADDRESS, GROUP)
    assert (kernel.maps, looked) == ({}, [memory.size])
    container.close(device, GROUP)
    assert kernel.named("VFIO_IOMMU_UNMAP_DMA") == [], "there was nothing"
    device = open_mapped(container)
    assert len(kernel.maps) == 2
    container.close(device, GROUP)


def test_mapping_ends_at_the_next_chunk_once_nobody_wants_it_and_leaves_nothing_mapped(
    container: Container, memory: GuestMemory, kernel: VfioKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type1, "CHUNK", MIB)
    device = container.open(ADDRESS, GROUP)
    with pytest.raises(HostError, match="given up"):
        container.map_memory(lambda: len(kernel.maps) < 4)
    assert len(kernel.named("VFIO_IOMMU_MAP_DMA")) == 4
    assert (kernel.maps, kernel.available) == ({}, 65535)
    container.map_memory(lambda: len(kernel.maps) < 5)
    assert len(kernel.maps) == 5, "another device's wish is its own"
    mapping = Mapping(MIB)
    memory.add(Ram(2 * HIGH, MIB, mapping))
    assert len(kernel.maps) == 6, "nor is RAM that comes later any device's alone"
    container.close(device, GROUP)
    memory.close()
    mapping.close()


def test_a_group_that_is_not_there_says_what_to_load(container: Container) -> None:
    with pytest.raises(HostError, match=r"/99: ENOENT: load vfio_pci"):
        container.open(ADDRESS, 99)


def test_a_group_of_which_the_host_uses_a_part_is_refused(container: Container, kernel: VfioKernel) -> None:
    kernel.viable = False
    with pytest.raises(HostError, match=r"one of them still has a driver.*iommu_groups/7/devices"):
        container.open(ADDRESS, GROUP)


def test_a_kernel_without_a_type_1_iommu_is_refused(container: Container, kernel: VfioKernel) -> None:
    kernel.extension = 0
    with pytest.raises(HostError, match="load vfio_iommu_type1"):
        container.open(ADDRESS, GROUP)


def test_ram_that_comes_later_is_mapped_and_unmapped_too(
    container: Container, memory: GuestMemory, kernel: VfioKernel
) -> None:
    open_mapped(container)
    mapping = Mapping(MIB)
    memory.add(Ram(2 * HIGH, MIB, mapping))
    assert kernel.maps[2 * HIGH] == (MIB, mapping.hva)
    memory.close()
    assert kernel.maps == {}
    mapping.close()


@pytest.mark.parametrize(
    ("limit", "capabilities", "locked", "refused"),
    [
        (resource.RLIM_INFINITY, "0", 0, False),
        (8 * MIB, "0", 0, False),
        (8 * MIB, "0", 4096, True),
        (MIB, "0", 0, True),
        (MIB, "4000", 0, False),
    ],
    ids=["no limit", "enough", "enough but for what is locked", "too little", "privileged"],
)
def test_locked_memory_is_looked_at_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, capabilities: str, locked: int, refused: bool
) -> None:
    (tmp_path / "status").write_text(f"Name:\tx\nVmLck:\t{locked} kB\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    if refused:
        with pytest.raises(HostError, match=r"needs all of the guest's memory locked, 5 MiB, .* may lock \d MiB more"):
            check_locked_memory(5 * MIB, tmp_path / "status")
    else:
        check_locked_memory(5 * MIB, tmp_path / "status")
