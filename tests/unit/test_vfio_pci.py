"""A function of the host in the guest: what the guest sees, what reaches the device, how it leaves."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.abi.vfio import Extent
from kvmpy.devices.pci.config import Command
from kvmpy.devices.vfio import pci, type1
from kvmpy.devices.vfio.pci import VfioPci, without
from kvmpy.errors import HostError, IoctlError
from kvmpy.irq import MsiMessage
from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.loop import Inbox, open_descriptors, poll
from tests.fakes.vfio import (
    ADDRESS,
    CONFIG,
    ERROR,
    INTX,
    MSI,
    MSIX,
    REGION_SHIFT,
    REQUEST,
    SERIAL,
    FakeNic,
    config_space,
)
from tests.fakes.vfio_rig import BAR0, BAR1, BAR2, BAR4, ON, NicRig, reset_by

ROM_REGION, READ_ONLY, ROM_AT = 6, 1, 0xC008_0000
MESSAGE = MsiMessage(0xFEE0_1000, 0x4041)


@pytest.fixture
def nic() -> FakeNic:
    return FakeNic()


@pytest.fixture
def rig(nic: FakeNic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NicRig]:
    with ExitStack() as resources:
        rig = NicRig(resources, monkeypatch, tmp_path, nic)
        rig.plug()
        yield rig


def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nic: FakeNic) -> None:
    """Try to; nothing may be left of a failure."""
    with ExitStack() as resources:
        NicRig(resources, monkeypatch, tmp_path, nic)


# Configuration space


def test_the_guest_sees_the_devices_identity_as_a_single_endpoint(rig: NicRig) -> None:
    config = rig.config
    assert (config.read(0, 4), config.read(8, 4), config.read(0x2C, 4)) == (0x10CA_8086, 0x0200_0001, 0x1100_1AF4)
    assert config.read(0x0E, 1) == 0, "neither a bridge nor one of several functions"
    assert config.read(0x3D, 1) == 1
    assert config.read(0x30, 4) == 0, "no ROM, for the device has none"


def test_only_known_capabilities_are_shown(rig: NicRig) -> None:
    assert {kind for kind, _ in rig.config.capabilities()} == {0x01, 0x05, 0x10, 0x11}
    assert rig.config.read(0x100, 4) == 0x0001_0003, "of the extended ones the serial number, alone"
    assert rig.config.read(0x104, 8) == SERIAL


def test_a_conventional_device_whose_configuration_space_ends_at_256_is_read_to_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nic, pread = FakeNic(config=config_space()[:256]), os.pread
    start = CONFIG << REGION_SHIFT

    def strict_pread(fd: int, size: int, offset: int) -> bytes:
        if start <= offset and offset + size > start + 256:
            raise OSError(errno.EFAULT, "beyond the end of the region")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", strict_pread)
    with ExitStack() as resources:
        rig = NicRig(resources, monkeypatch, tmp_path, nic)
        rig.plug()
        assert rig.config.read(0, 4) == 0x10CA_8086
        assert rig.config.read(0x100, 4) == 0, "no serial number"
        rig.enable()
        assert nic.command & ON == ON


def test_reset_by_the_guest_is_not_offered(rig: NicRig) -> None:
    assert not rig.config.read(rig.config.capability(0x10) + 4, 4) >> 28 & 1


@pytest.mark.parametrize(("written", "is_now"), [(3, 3), (1, 0), (2, 0), (0, 0), (0xFFFF, 3)])
def test_power_states_are_names(rig: NicRig, written: int, is_now: int) -> None:
    rig.enable()
    at = rig.config.capability(0x01) + 4
    rig.config.write(at, 2, written)
    assert rig.config.read(at, 2) == 0x0008 | is_now
    assert rig.nic.command & ON == ON, "and the device knows nothing of it"


def test_bars_have_the_devices_kinds_and_sizes(rig: NicRig) -> None:
    sizes = [rig.config.size_bar(0x10 + 4 * index)[1] for index in range(6)]
    assert sizes == [0xFFFF_8000, 0xFFFF_FFE1, 0xFFFF_C00C, 0xFFFF_FFFF, 0xFFFF_FF00, 0]


@given(
    st.lists(
        st.tuples(st.integers(0, 0x1FF), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1), st.booleans()),
        max_size=30,
    )
)
@settings(max_examples=count(15, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_nothing_but_three_command_bits_reaches_the_device(
    rig: NicRig, writes: list[tuple[int, int, int, bool]]
) -> None:
    before = bytes(rig.nic.peek(7, at, 1) for at in range(0x200))
    constant = [(at, rig.config.read(at, 4)) for at in (0x00, 0x08, 0x2C, 0x34)]
    for offset, size, value, read in writes:
        if read:
            rig.function.config_read(offset, size)
        else:
            rig.function.config_write(offset, size, value & (1 << 8 * size) - 1)
    after = bytes(rig.nic.peek(7, at, 1) for at in range(0x200))
    assert [at for at in range(0x200) if before[at] != after[at]] in ([], [4])
    assert rig.nic.command == rig.config.read(4, 2) & ON
    assert [(at, rig.config.read(at, 4)) for at in (0x00, 0x08, 0x2C, 0x34)] == constant
    assert set(rig.nic.triggers) & {INTX, MSI, MSIX} == ({rig.function._irqs.kind} - {None})


# BARs


def test_whole_pages_are_mapped_while_the_function_decodes_and_the_rest_exits(rig: NicRig) -> None:
    assert rig.slots == {}
    rig.enable()
    assert rig.slots == {BAR0: 0x8000, BAR2 + 0x1000: 0x1000, BAR2 + 0x3000: 0x1000}
    rig.config.enable(Command.BUS_MASTER)
    assert rig.slots == {}
    rig.enable()
    rig.config.place(0, BAR0 + 0x10_0000)
    assert rig.slots[BAR0 + 0x10_0000] == 0x8000
    assert BAR0 not in rig.slots


def test_what_is_mapped_is_the_device_itself(rig: NicRig) -> None:
    rig.enable()
    rig.nic.poke(0, 0x40, 4, 0x1234_5678)
    assert rig.board.mmio.read(BAR0 + 0x40, 4) == 0x1234_5678, "the same where it exits"
    _, hva = rig.board.doorbells.slots[BAR0]
    from kvmpy._native import ffi

    assert ffi.cast("uint32_t *", hva)[0x10] == 0x1234_5678


def test_accesses_to_ports_small_bars_and_the_rest_of_msix_pages_reach_the_device(rig: NicRig) -> None:
    rig.enable()
    rig.board.pio.write(BAR1 + 4, 4, 0xCAFE)
    rig.board.mmio.write(BAR4 + 8, 8, 0x1122_3344_5566_7788)
    rig.board.mmio.write(BAR2 + 0x800, 4, 0xBEEF)
    assert (rig.nic.peek(1, 4, 4), rig.nic.peek(4, 8, 8), rig.nic.peek(2, 0x800, 4)) == (
        0xCAFE,
        0x1122_3344_5566_7788,
        0xBEEF,
    )
    assert rig.board.pio.read(BAR1 + 4, 4) == 0xCAFE


def rom_nic() -> FakeNic:
    nic = FakeNic()
    nic.regions[ROM_REGION] = (0x1_0000, READ_ONLY)
    return nic


@pytest.mark.parametrize("nic", [rom_nic()])
def test_the_rom_is_read_while_it_is_enabled_and_never_written(rig: NicRig) -> None:
    rig.nic.poke(ROM_REGION, 0, 2, 0xAA55)
    assert rig.config.size_bar(0x30)[1] == 0xFFFF_0001
    rig.enable()
    rig.config.write(0x30, 4, ROM_AT)
    assert rig.board.mmio.read(ROM_AT, 2) == 0xFFFF, "its own enable is off"
    rig.config.write(0x30, 4, ROM_AT | 1)
    rig.board.mmio.write(ROM_AT, 2, 0)
    assert rig.board.mmio.read(ROM_AT, 2) == 0xAA55
    rig.config.enable(Command.BUS_MASTER)
    assert rig.board.mmio.read(ROM_AT, 2) == 0xFFFF


@pytest.mark.parametrize(("size", "flags"), [(0x1_8000, READ_ONLY), (0x400, READ_ONLY), (0x1_0000, 0)])
def test_a_rom_that_makes_no_sense_or_cannot_be_read_is_not_there(
    size: int, flags: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nic = FakeNic()
    nic.regions[ROM_REGION] = (size, flags)
    with ExitStack() as resources:
        rig = NicRig(resources, monkeypatch, tmp_path, nic)
        rig.plug()
        assert rig.config.size_bar(0x30)[1] == 0


def test_a_rom_can_be_kept_from_the_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with ExitStack() as resources:
        rig = NicRig(resources, monkeypatch, tmp_path, rom_nic(), rombar=False)
        rig.plug()
        assert rig.config.size_bar(0x30)[1] == 0


def test_the_msix_table_is_ours_and_the_devices_is_not_touched(rig: NicRig) -> None:
    rig.enable()
    rig.entry(1, masked=True)
    assert rig.board.mmio.read(BAR2 + 0x10, 8) == 0xFEE0_1000
    assert rig.nic.peek(2, 0x10, 8) == 0


def test_only_the_areas_that_the_kernel_allows_are_mapped(
    nic: FakeNic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nic.areas = {0: [(0x1000, 0x2000), (0x800, 0x1000), (0x7000, 0x2000), (0x4000, 0)], 2: []}
    with ExitStack() as resources:
        rig = NicRig(resources, monkeypatch, tmp_path, nic)
        rig.plug()
        rig.enable()
        assert rig.slots == {BAR0 + 0x1000: 0x2000}, "those that make sense"


def test_a_bar_that_cannot_be_mapped_or_given_a_slot_exits(rig: NicRig) -> None:
    rig.board.doorbells.refuses = IoctlError("KVM_SET_USER_MEMORY_REGION", errno.EINVAL)
    rig.enable()
    assert rig.slots == {}
    rig.nic.poke(0, 0x40, 4, 77)
    assert rig.board.mmio.read(BAR0 + 0x40, 4) == 77


def test_the_device_decodes_before_it_is_mapped_and_until_it_is_not(
    rig: NicRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    shortcuts = rig.board.doorbells
    direct = shortcuts.direct

    class Slots(dict[int, tuple[int, int]]):
        def pop(self, gpa: int, *_: object) -> tuple[int, int]:
            seen.append(("unmapped", rig.nic.command & Command.MEMORY))
            return super().pop(gpa)

    def mapping(gpa: int, size: int, hva: int) -> object:
        seen.append(("mapped", rig.nic.command & Command.MEMORY))
        return direct(gpa, size, hva)

    monkeypatch.setattr(shortcuts, "direct", mapping)
    monkeypatch.setattr(shortcuts, "slots", Slots())
    rig.enable()
    rig.config.enable(0)
    assert seen == [("mapped", 2)] * 3 + [("unmapped", 2)] * 3
    assert rig.nic.command & ON == 0


def test_a_device_that_is_gone_reads_as_all_ones(rig: NicRig) -> None:
    rig.enable()
    region = rig.function.device.bars[0]
    msgspec.structs.force_setattr(region, "offset", 1 << 40)
    assert rig.board.mmio.read(BAR0 + 0x40, 4) == 0xFFFF_FFFF
    rig.board.mmio.write(BAR0 + 0x40, 4, 1)


@pytest.mark.parametrize(
    ("areas", "trapped", "expected"),
    [
        ([(0, 0x8000)], [], [(0, 0x8000)]),
        ([(0, 0x8000)], [(0x10, 0x50)], [(0x1000, 0x7000)]),
        ([(0, 0x8000)], [(0x2010, 0x50), (0x3FF8, 0x10)], [(0, 0x2000), (0x5000, 0x3000)]),
        ([(0, 0x1000)], [(0, 0x10)], []),
        ([(0x1000, 0x1000), (0x4000, 0x1000)], [(0x4000, 8)], [(0x1000, 0x1000)]),
        ([(0x4000, 0x2000)], [(0, 0x8000)], []),
    ],
)
def test_what_is_left_of_areas_shares_no_page_with_what_is_trapped(
    areas: list[tuple[int, int]], trapped: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    found = list(without([Extent(*area) for area in areas], [Extent(*part) for part in trapped]))
    assert found == [Extent(*area) for area in expected]


# Interrupts


def test_msix_reaches_the_guest_as_the_table_says(rig: NicRig) -> None:
    rig.enable()
    assert rig.nic.triggers.keys() & {INTX, MSI, MSIX} == {INTX}
    rig.msix(0xC000)
    assert len(rig.nic.triggers[MSIX]) == 5, "all of them, before Linux has filled the table"
    rig.entry(2, masked=False)
    rig.msix(0x8000)
    rig.nic.signal(MSIX, 2)
    assert rig.board.sink.take() == [MESSAGE]


def test_r45_that_the_guest_wants_interrupts_is_told(rig: NicRig) -> None:
    told: list[bool] = []
    rig.function.on_receiving = lambda: told.append(True)
    rig.msix(0xC000)
    rig.entry(2, masked=False)
    rig.msix(0x8000)
    assert told == [], "no message of a function goes out that is no bus master"
    rig.entry(2, masked=True)
    rig.enable()
    assert told == []
    rig.entry(2, masked=False)
    assert told == [True]


def test_what_comes_while_a_vector_is_masked_is_pending_and_comes_then(rig: NicRig) -> None:
    rig.enable()
    rig.msix(0x8000)
    rig.entry(1, masked=True)
    rig.nic.signal(MSIX, 1)
    assert rig.board.mmio.read(BAR2 + 0x2000, 8) == 0b10
    assert rig.board.sink.take() == []
    rig.board.mmio.write(BAR2 + 0x1C, 4, 0)
    assert rig.board.sink.take() == [MESSAGE]
    assert rig.board.mmio.read(BAR2 + 0x2000, 8) == 0


def test_masking_asks_nothing_of_the_host(rig: NicRig) -> None:
    rig.enable()
    rig.msix(0x8000)
    rig.kernel.seen.clear()
    for masked in (False, True, False):
        rig.entry(0, masked=masked)
    rig.msix(0xC000)
    assert rig.kernel.named("VFIO_DEVICE_SET_IRQS") == []


def test_msi_reaches_the_guest(rig: NicRig) -> None:
    rig.enable()
    at = rig.config.capability(0x05)
    rig.config.write(at + 4, 8, MESSAGE.address)
    rig.config.write(at + 0xC, 2, MESSAGE.data)
    rig.config.write(at + 2, 2, 1)
    assert rig.nic.triggers.keys() & {INTX, MSI, MSIX} == {MSI}
    rig.nic.signal(MSI)
    assert rig.board.sink.take() == [MESSAGE]
    rig.config.write(at + 2, 2, 0)
    assert rig.nic.triggers.keys() & {INTX, MSI, MSIX} == {INTX}


def test_intx_drives_the_line_of_the_slot_in_the_kernel(rig: NicRig) -> None:
    rig.enable()
    attached = [line.attached for line in rig.board.lines]
    (line,) = [found for found in attached if found]
    assert [bool(found) for found in attached] == [False, True, False, False], "INTA of device 1"
    assert rig.nic.triggers[INTX] == [line[0].trigger.fd]
    assert rig.nic.unmask == line[0].resample.fd
    rig.config.enable(ON | Command.INTX_DISABLE)
    assert INTX not in rig.nic.triggers
    assert not line


def test_status_says_whether_the_device_asserts_its_line(rig: NicRig) -> None:
    rig.enable()
    assert not rig.config.read(6, 2) & 8
    rig.nic.poke(7, 6, 2, 0x0018)
    assert rig.config.read(6, 2) & 8
    assert rig.config.read(4, 4) >> 16 & 8
    rig.msix(0x8000)
    assert not rig.config.read(6, 2) & 8


def test_a_host_without_vectors_costs_the_guest_its_interrupts_and_no_more(
    rig: NicRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.enable()
    rig.kernel.most_vectors = 3
    rig.msix(0x8000)
    said = "its interrupts (MSIX) do not reach the guest: VFIO_DEVICE_SET_IRQS: ENOSPC: the host has 3"
    assert said in caplog.text
    for _ in range(100):
        rig.msix(0)
        rig.msix(0x8000)
    assert caplog.text.count(said) == 1, "a guest can do that for ever"
    rig.kernel.most_vectors = 64
    rig.msix(0)
    rig.msix(0x8000)
    assert len(rig.nic.triggers[MSIX]) == 5


# Release, reset, and the host's own wishes


def test_r26_on_release_dma_and_interrupts_stop_first_and_the_reset_comes_last(rig: NicRig) -> None:
    rig.enable()
    rig.msix(0x8000)
    rig.entry(0, masked=False)
    order: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def resetting() -> None:
        order.append("reset")
        begun.set()
        assert go_on.wait(20)

    rig.nic.resetting = resetting
    with rig.function.lock:
        rig.function.release()
        assert rig.nic.command & ON == 0, "no DMA"
        assert not rig.nic.triggers.keys() & {INTX, MSI, MSIX}
        assert rig.function.config_read(0, 4) == 0xFFFF_FFFF
        assert rig.slots == {}
        assert all(vector.message is None for vector in rig.board.sink.vectors)
    assert begun.wait(20)
    assert rig.function.config_read(0, 4) == 0xFFFF_FFFF
    go_on.set()
    rig.settle()
    assert rig.nic.command_at_reset == [rig.nic.command_at_reset[0] & ~ON]
    assert (rig.nic.resets, order) == (["function"], ["reset"])
    assert rig.function.finish_reset()
    assert rig.function.config_read(0, 4) == 0x10CA_8086, "it could be plugged in again"


def test_r26_bus_master_goes_before_interrupts_and_before_memory(rig: NicRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.enable()
    rig.msix(0x8000)
    seen: list[object] = []
    device = rig.function.device
    set_command, disable = device.set_command, device.disable

    def setting(bits: int) -> bool:
        seen.append(bits)
        return set_command(bits)

    def disabling(index: int) -> None:
        seen.append("off")
        disable(index)

    monkeypatch.setattr(device, "set_command", setting)
    monkeypatch.setattr(device, "disable", disabling)
    with rig.function.lock:
        rig.function.release()
    assert seen == [ON & ~Command.BUS_MASTER, "off", 0]
    rig.settle()


def test_close_waits_for_the_reset(rig: NicRig) -> None:
    rig.enable()
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def resetting() -> None:
        begun.set()
        assert go_on.wait(20)

    def closing() -> None:
        rig.function.close()
        closed.set()

    rig.nic.resetting = resetting
    rig.port.unplug()
    with rig.function.lock:
        rig.function.release()
    thread = threading.Thread(target=closing)
    thread.start()
    assert begun.wait(20)
    assert not closed.wait(0.05)
    assert rig.kernel.maps, "nor is memory unmapped"
    go_on.set()
    assert closed.wait(20)
    thread.join()
    assert rig.kernel.maps == {}


def test_a_device_that_the_guest_has_not_reached_since_its_reset_is_not_reset_again(rig: NicRig) -> None:
    for _ in range(2):
        with rig.function.lock:
            rig.function.release()
        assert rig.function.finish_reset()
    rig.function.close()
    assert rig.nic.resets == []


def test_a_device_in_use_is_stopped_and_reset_before_the_host_has_it_back(rig: NicRig) -> None:
    rig.enable()
    rig.nic.poke(0, 0x40, 4, 0x55)
    rig.function.close()
    rig.function.close()
    assert rig.nic.resets == ["function"]
    assert rig.nic.command & ON == 0
    assert rig.nic.peek(0, 0x40, 4) == 0
    assert rig.slots == {}


def test_fifty_come_and_go_and_leave_nothing(rig: NicRig) -> None:
    rig.port.unplug()
    rig.function.close()
    rig.nic.close()
    before, threads = open_descriptors(), threading.active_count()
    for _ in range(50):
        rig.function = rig.make()
        rig.plug()
        rig.enable()
        assert len(rig.kernel.maps) == 1
        with rig.function.lock:
            rig.function.release()
        rig.port.unplug()
        rig.function.close()
        assert rig.kernel.maps == {}
    rig.nic.close()
    assert threading.active_count() == threads
    assert open_descriptors() == before


# One that is only checked


@pytest.fixture
def checked(rig: NicRig) -> VfioPci:
    """In place of the rig's own: open, and no more."""
    rig.port.unplug()
    rig.function.close()
    rig.function = rig.make(prepared=False)
    return rig.function


def test_r43_one_that_is_checked_pins_nothing_and_answers_nothing_until_it_is_prepared(
    rig: NicRig, checked: VfioPci
) -> None:
    assert (rig.kernel.maps, rig.nic.resets, checked.is_ready, checked.problem) == ({}, [], False, None)
    assert {index: bar.size for index, bar in checked.bars.items()}[0] == 0x8000, "what a window is made for"
    assert checked.config_read(0, 4) == 0xFFFF_FFFF
    done: Inbox[bool] = Inbox()
    checked.prepare(lambda: done.put(checked.is_ready))
    assert done.wait() == [True]
    assert (len(rig.kernel.maps), rig.nic.resets) == (1, ["function"])
    checked.prepare(lambda: done.put(checked.is_ready))
    assert done.wait(2) == [True, True]
    assert rig.nic.resets == ["function"], "once"
    rig.plug()
    rig.enable()
    assert rig.config.read(0, 4) == 0x10CA_8086
    assert rig.nic.command & ON == ON


@pytest.mark.parametrize(("fails", "number"), [("VFIO_IOMMU_MAP_DMA", errno.ENOMEM), ("VFIO_DEVICE_RESET", errno.EIO)])
def test_one_that_cannot_be_prepared_says_why_and_a_system_reset_tries_again(
    rig: NicRig, checked: VfioPci, fails: str, number: int
) -> None:
    rig.kernel.fail(fails, number)
    done: Inbox[str | None] = Inbox()
    checked.prepare(lambda: done.put(checked.problem))
    (problem,) = done.wait()
    assert problem is not None
    assert problem.startswith(f"{fails}: {errno.errorcode[number]}")
    assert not checked.is_ready
    assert not checked.finish_reset()
    rig.kernel.recover(fails)
    with checked.lock:
        checked.reset()
    assert (checked.is_ready, len(rig.kernel.maps), checked.problem) == (True, 1, None)


def test_a_system_reset_does_not_wait_for_one_that_is_prepared_and_does_not_break_it(
    rig: NicRig, checked: VfioPci, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pci, "RESET_SECONDS", 0.01)
    mapping, go_on = threading.Event(), threading.Event()
    done: Inbox[bool] = Inbox()
    answer = rig.kernel._vfio_iommu_map_dma

    def slow(argument: Any) -> int:
        mapping.set()
        assert go_on.wait(20)
        answer(argument)
        return 0

    rig.kernel.answers["VFIO_IOMMU_MAP_DMA"] = slow
    checked.prepare(lambda: done.put(checked.is_ready))
    assert mapping.wait(20)
    assert checked.begin_reset()
    with checked.lock:
        checked.reset()
    assert checked.broken is None
    go_on.set()
    assert done.wait() == [True]


def test_r43_one_that_the_host_takes_back_while_it_is_prepared_cannot_be_used(rig: NicRig, checked: VfioPci) -> None:
    wanted: list[bool] = []
    checked.on_wanted_back = lambda: wanted.append(True)
    rig.nic.signal(REQUEST)
    rig.kernel.fail("VFIO_DEVICE_RESET", errno.EAGAIN)
    rig.io.start()
    poll(lambda: wanted)
    rig.io.stop()
    done: Inbox[tuple[bool, str | None]] = Inbox()
    checked.prepare(lambda: done.put((checked.is_ready, checked.problem)))
    assert done.wait() == [(False, "the host takes it back")]


def test_r43_one_that_is_closed_while_it_is_prepared_gives_it_up_and_leaves_nothing_pinned(
    rig: NicRig, checked: VfioPci, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type1, "CHUNK", 1 << 20)
    done: Inbox[bool] = Inbox()
    mapping, go_on = threading.Event(), threading.Event()
    broken: list[str] = []
    checked.on_broken = broken.append
    answer = rig.kernel._vfio_iommu_map_dma

    def slow(argument: Any) -> int:
        answer(argument)
        mapping.set()
        assert go_on.wait(20)
        return 0

    rig.kernel.answers["VFIO_IOMMU_MAP_DMA"] = slow
    rig.kernel.seen.clear()
    checked.prepare(lambda: done.put(checked.is_ready))
    assert mapping.wait(20)
    closing = threading.Thread(target=checked.close)
    closing.start()
    poll(lambda: checked.is_closing)
    go_on.set()
    closing.join(20)
    assert done.wait() == [False]
    assert (rig.kernel.maps, rig.nic.resets, broken) == ({}, [], [])
    assert len(rig.kernel.named("VFIO_IOMMU_MAP_DMA")) == 1


def test_a_system_reset_resets_the_device_and_it_answers_at_once(rig: NicRig) -> None:
    rig.enable()
    rig.msix(0x8000)
    rig.nic.poke(0, 0x40, 4, 0x55)
    with rig.function.lock:
        rig.function.reset()
    assert rig.nic.resets == ["function"]
    assert rig.nic.peek(0, 0x40, 4) == 0
    assert rig.config.read(0, 4) == 0x10CA_8086
    assert rig.config.read(4, 2) == 0
    rig.enable()
    assert rig.slots[BAR0] == 0x8000
    assert rig.nic.command & ON == ON


def test_a_link_that_went_down_comes_back_with_a_device_that_is_reset(rig: NicRig) -> None:
    rig.enable()
    go_on = threading.Event()
    rig.nic.resetting = lambda: go_on.wait(20)
    rig.port_config.write(0x3E, 2, 0x40)
    rig.port_config.write(0x3E, 2, 0)
    assert rig.config.read(0, 4) == 0xFFFF_FFFF, "not yet, which Linux waits for"
    go_on.set()
    rig.settle()
    assert rig.config.read(0, 4) == 0x10CA_8086
    assert rig.nic.resets == ["function"]
    rig.enable()
    assert rig.slots[BAR0] == 0x8000


def test_a_reset_that_fails_breaks_the_device_and_a_later_one_mends_it(
    rig: NicRig, caplog: pytest.LogCaptureFixture
) -> None:
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.enable()
    rig.kernel.fail("VFIO_DEVICE_RESET", errno.EIO)
    with rig.function.lock:
        rig.function.reset()
    assert broken == ["VFIO_DEVICE_RESET: EIO: it has not been reset"]
    assert caplog.messages == [f"host0: {ADDRESS}: {broken[0]}"]
    assert rig.function.info()["broken"] == broken[0]
    assert rig.config.read(0, 4) == 0xFFFF_FFFF
    rig.kernel.recover("VFIO_DEVICE_RESET")
    with rig.function.lock:
        rig.function.reset()
    assert rig.function.info()["broken"] is None
    assert rig.config.read(0, 4) == 0x10CA_8086


def test_a_system_reset_does_not_wait_for_ever(rig: NicRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pci, "RESET_SECONDS", 0.01)
    go_on = threading.Event()
    rig.nic.resetting = lambda: go_on.wait(20)
    with rig.function.lock:
        rig.function.reset()
    assert "has not come out of its reset" in rig.function.info()["broken"]
    go_on.set()
    rig.settle()


def test_a_write_that_meets_with_an_error_of_the_device_does_not_drive_it(rig: NicRig) -> None:
    driven: list[bool] = []
    rig.function.on_driven = driven.append
    with rig.function.lock:
        writing = threading.Thread(target=rig.function.config_write, args=(4, 2, 6))
        writing.start()
        poll(lambda: sys._current_frames()[writing.ident or 0].f_code.co_name == "config_write")
        rig.function._break("a test")
        driven.clear()
    writing.join(20)
    assert driven == []


def test_an_error_of_the_device_stops_it_and_is_told(rig: NicRig) -> None:
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.enable()
    rig.nic.signal(ERROR)
    rig.io.start()
    rig.io.stop()
    assert broken == ["the host reports an error that the device cannot recover from (AER)"]
    assert rig.nic.command & ON == 0
    assert rig.config.read(0, 4) == 0xFFFF_FFFF


def test_an_error_during_a_reset_leaves_the_device_broken(rig: NicRig) -> None:
    rig.enable()
    go_on = threading.Event()
    rig.nic.resetting = lambda: go_on.wait(20)
    rig.port_config.write(0x3E, 2, 0x40)
    rig.port_config.write(0x3E, 2, 0)
    rig.nic.signal(ERROR)
    rig.io.start()
    rig.io.stop()
    go_on.set()
    rig.settle()
    assert "AER" in rig.function.info()["broken"]
    assert rig.config.read(0, 4) == 0xFFFF_FFFF
    with rig.function.lock:
        rig.function.reset()
    assert (rig.function.info()["broken"], rig.config.read(0, 4)) == (None, 0x10CA_8086)


def test_a_device_whose_command_register_cannot_be_set_is_broken_and_not_mapped(rig: NicRig) -> None:
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.nic.poke(CONFIG, 4, 2, 0xFFFF)  # as of a device that is gone
    rig.enable()
    assert rig.slots == {}
    assert rig.config.read(0, 4) == 0xFFFF_FFFF
    (why,) = broken
    assert "command register" in why
    rig.nic.poke(CONFIG, 4, 2, 0)
    with rig.function.lock:
        rig.function.reset()
    rig.enable()
    assert rig.slots[BAR0] == 0x8000
    assert rig.nic.command & ON == ON


def test_a_device_that_cannot_be_stopped_is_told_of_once_and_stopped_after_its_reset(rig: NicRig) -> None:
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.enable()
    rig.nic.poke(CONFIG, 4, 2, 0xFFFF)
    rig.config.enable(0)
    assert (len(broken), rig.slots) == (1, {})
    rig.nic.poke(CONFIG, 4, 2, ON)
    with rig.function.lock:
        rig.function.reset()
    assert rig.nic.command & ON == 0
    rig.enable()
    assert rig.nic.command & ON == ON


def test_the_host_that_wants_it_back_is_heard(rig: NicRig) -> None:
    wanted: list[bool] = []
    rig.function.on_wanted_back = lambda: wanted.append(True)
    rig.enable()
    rig.nic.signal(REQUEST)
    rig.io.start()
    rig.io.stop()
    assert wanted == [True]
    assert rig.nic.command & ON == ON, "and decides nothing"


def test_a_device_that_the_host_waits_for_leaves_without_the_reset_that_the_kernel_refuses(
    rig: NicRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.enable()
    rig.nic.signal(REQUEST)
    rig.io.start()
    rig.io.stop()
    rig.kernel.fail("VFIO_DEVICE_RESET", errno.EAGAIN)
    with rig.function.lock:
        rig.function.release()
    assert not rig.function.finish_reset(), "it cannot be plugged in again"
    assert rig.nic.command & ON == 0, "and it is stopped"
    rig.function.close()
    assert (broken, rig.function.info()["broken"]) == ([], None)
    assert "not reset" in caplog.messages[-1]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_reset_refused_to_a_device_that_nobody_waits_for_breaks_it(rig: NicRig) -> None:
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.enable()
    rig.kernel.fail("VFIO_DEVICE_RESET", errno.EAGAIN)
    with rig.function.lock:
        rig.function.release()
    rig.settle()
    assert broken == [
        "VFIO_DEVICE_RESET: EAGAIN: it has not been reset: the host is about to take it back, or busy with it otherwise"
    ]


def test_a_device_that_the_host_waits_for_is_broken_by_a_reset_that_fails_for_another_reason(rig: NicRig) -> None:
    broken: list[str] = []
    rig.function.on_broken = broken.append
    rig.enable()
    rig.nic.signal(REQUEST)
    rig.io.start()
    rig.io.stop()
    rig.kernel.fail("VFIO_DEVICE_RESET", errno.EIO)
    with rig.function.lock:
        rig.function.release()
    rig.settle()
    assert broken == ["VFIO_DEVICE_RESET: EIO: it has not been reset"]


def test_it_blocks_migration_and_its_state_is_what_the_guest_sees(rig: NicRig) -> None:
    assert "unplug it" in (rig.function.blocks_migration or "")
    rig.enable()
    rig.msix(0x8000)
    rig.entry(1, masked=False)
    rig.function.pause()
    section = save(rig.function.state)
    with rig.function.lock:
        rig.function.reset()
        rig.function.state = load(type(rig.function.state), section)
        rig.function.post_load()
    assert save(rig.function.state) == section
    assert rig.nic.command & ON == ON
    rig.nic.signal(MSIX, 1)
    assert rig.board.sink.take() == [MESSAGE]


def test_an_operator_sees_where_it_is_and_how_it_is_reset(rig: NicRig) -> None:
    facts = rig.function.info()
    assert (facts["host"], facts["reset"], facts["broken"]) == (ADDRESS, "flr", None)


# What is refused


def no_dependents(nic: FakeNic) -> None:
    nic.dependents = ()


def shared_bus(nic: FakeNic) -> None:
    nic.dependents = (ADDRESS, "0000:5e:00.3")


def bridge(nic: FakeNic) -> None:
    nic.config = config_space(header_type=1)


def gone(nic: FakeNic) -> None:
    nic.config = bytearray(b"\xff" * 4096)


def no_pci(nic: FakeNic) -> None:
    nic.flags = 0


def odd_size(nic: FakeNic) -> None:
    nic.regions[0] = (0x3000, 7)


def region_in_the_upper_half(nic: FakeNic) -> None:
    nic.regions[3] = (0x1000, 7)


def io_too_large(nic: FakeNic) -> None:
    nic.regions[1] = (0x1000, 3)


def table_outside(nic: FakeNic) -> None:
    nic.config[0xA4:0xA8] = (0x4000 | 2).to_bytes(4, "little")


def table_in_no_bar(nic: FakeNic) -> None:
    nic.config[0xA4:0xA8] = (5).to_bytes(4, "little")


def table_in_ports(nic: FakeNic) -> None:
    nic.config[0xA4:0xA8] = (1).to_bytes(4, "little")


def table_over_pending_bits(nic: FakeNic) -> None:
    nic.config[0xA8:0xAC] = (0x20 | 2).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("spoil", "method", "problem"),
    [
        (no_dependents, "bus", "cannot be reset, neither by itself nor by its bus"),
        (shared_bus, "bus", r"only with its whole bus, where 0000:5e:00\.3 would be reset too"),
        (bridge, "flr", "is a bridge"),
        (gone, "flr", "configuration space cannot be read"),
        (no_pci, "flr", "is no PCI device to VFIO"),
        (odd_size, "flr", r"BAR 0, 0x3000 bytes, makes no sense"),
        (region_in_the_upper_half, "flr", "BAR 3, 0x1000 bytes, makes no sense"),
        (io_too_large, "flr", "BAR 1 cannot have 0x1000 bytes"),
        (table_outside, "flr", "its MSI-X makes no sense"),
        (table_in_no_bar, "flr", "its MSI-X makes no sense"),
        (table_in_ports, "flr", "its MSI-X makes no sense"),
        (table_over_pending_bits, "flr", "its MSI-X makes no sense"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nic: FakeNic, spoil: object, method: str, problem: str
) -> None:
    assert callable(spoil)
    spoil(nic)
    before = open_descriptors()
    monkeypatch.setattr("tests.fakes.vfio_rig.reset_by", lambda _: reset_by(method))
    with pytest.raises(HostError, match=problem):
        make(monkeypatch, tmp_path, nic)
    nic.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("interrupts", [{}, {INTX: 1}, {MSIX: 5}, {MSI: 1}])
def test_interrupts_that_the_kernel_cannot_deliver_are_not_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupts: dict[int, int]
) -> None:
    nic = FakeNic(counts=interrupts)
    with ExitStack() as resources:
        rig = NicRig(resources, monkeypatch, tmp_path, nic)
        rig.plug()
        rig.enable()
        kinds = {kind for kind, _ in rig.config.capabilities()}
        assert (0x11 in kinds, 0x05 in kinds) == (MSIX in interrupts, MSI in interrupts)
        assert rig.config.read(0x3D, 1) == (INTX in interrupts)
        assert set(nic.triggers) == set(interrupts) & {INTX}


def test_nothing_is_logged_as_an_error_in_a_quiet_life(rig: NicRig, caplog: pytest.LogCaptureFixture) -> None:
    rig.enable()
    rig.msix(0x8000)
    rig.config.enable(0)
    with rig.function.lock:
        rig.function.release()
    rig.settle()
    rig.port.unplug()
    rig.function.close()
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
