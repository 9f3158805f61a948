"""virtio-pci: a driver finds the device, sets it up, hears from it; and what it must not do has no effect."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmpy.abi.virtio import NO_VECTOR, Feature, Status
from kvmpy.devices.pci.config import Command
from kvmpy.devices.virtio.pci import VirtioPci, VirtioPciState
from kvmpy.memory import GuestMemory
from kvmpy.state import load, save
from tests.fakes.loop import open_descriptors
from tests.fakes.pci import WINDOWS, Board
from tests.fakes.virtio_driver import guest_memory, unmap
from tests.fakes.virtio_echo import Echo, EchoState
from tests.fakes.virtio_pci_driver import BAR, MSIX, PciGuest, Reg
from tests.fakes.virtio_rig import ManualLoop

RAM = 1 << 20
LIVE = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = guest_memory(RAM)
    yield memory
    unmap(memory)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def device(memory: GuestMemory, loop: ManualLoop) -> Echo:
    return Echo("echo0/virtio-echo", memory, loop)


@pytest.fixture
def guest(board: Board, device: Echo, memory: GuestMemory) -> Iterator[PciGuest]:
    guest = PciGuest(board, VirtioPci("echo0", device, board.sink), memory)
    yield guest
    guest.close()


def echo(guest: PciGuest, index: int = 0) -> bytes:
    ring = guest.queues[index]
    head = ring.offer([b"hello"], [5])
    guest.kick(index)
    assert ring.used() == [(head, 5)]
    return ring.content(head)


# Finding it


def test_it_is_a_modern_device_and_nothing_else(guest: PciGuest) -> None:
    assert guest.config.read(0, 4) == 0x1044_1AF4
    assert guest.config.read(8, 1) == 1
    assert guest.config.read(0x2C, 4) == 0x1044_1AF4


def test_its_capabilities_say_where_everything_is(guest: PciGuest) -> None:
    assert guest.regions == {
        1: (0, 0x38),
        2: (0x3000, 8),
        3: (0x1000, 1),
        4: (0x2000, 0x1000),
        5: (0, 0),
    }
    assert guest.multiplier == 4


def test_every_capability_says_its_length(guest: PciGuest) -> None:
    lengths = [guest.config.read(at + 2, 1) for kind, at in guest.config.capabilities() if kind == 0x09]
    assert lengths == [16, 16, 16, 20, 20]


def test_its_bar_is_32_kib_prefetchable_of_64_bits(guest: PciGuest) -> None:
    assert guest.config.size_bar(0x10) == (BAR & 0xFFFF_FFFF | 0xC, 0xFFFF_8000 | 0xC)


# Setting it up


@pytest.mark.parametrize("msix", [True, False])
def test_a_driver_sets_it_up_and_is_served(guest: PciGuest, msix: bool) -> None:
    guest.start(msix=msix)
    assert guest.get(Reg.STATUS) == LIVE
    assert (echo(guest, 0), echo(guest, 1)) == (b"hello", b"hello")


def test_features_come_in_two_words_and_no_more(guest: PciGuest) -> None:
    assert guest.offered() == 0b101 | 3 << 28 | 1 << 32
    guest.put(Reg.DEVICE_FEATURE_SELECT, 2)
    assert guest.get(Reg.DEVICE_FEATURE) == 0
    guest.put(Reg.DEVICE_FEATURE_SELECT, 0xFFFF_FFFF)
    assert guest.get(Reg.DEVICE_FEATURE) == 0


@pytest.mark.parametrize("features", [0, 0b101, 1 << 32 | 0b10, 1 << 32 | 0b100, 1 << 63 | 1 << 32])
def test_features_that_cannot_be_are_not_ok(guest: PciGuest, features: int) -> None:
    guest.negotiate(features)
    assert guest.get(Reg.STATUS) == Status.ACKNOWLEDGE | Status.DRIVER


def test_what_the_driver_accepted_reads_back(guest: PciGuest) -> None:
    guest.negotiate(1 << 32 | 1)
    assert guest.get(Reg.DRIVER_FEATURE) == 1
    guest.put(Reg.DRIVER_FEATURE_SELECT, 0)
    assert guest.get(Reg.DRIVER_FEATURE) == 1
    guest.put(Reg.DRIVER_FEATURE_SELECT, 9)
    assert guest.get(Reg.DRIVER_FEATURE) == 0


def test_a_queue_can_be_made_smaller(guest: PciGuest) -> None:
    guest.size = 4
    guest.start()
    assert echo(guest) == b"hello"


@pytest.mark.parametrize("size", [0, 3, 6, 16, 0xFFFF])
def test_a_queue_size_that_cannot_be_is_ignored(guest: PciGuest, size: int) -> None:
    guest.put(Reg.QUEUE_SIZE, size)
    assert guest.get(Reg.QUEUE_SIZE) == 8


@pytest.mark.parametrize("index", [2, 3, 0x7FFF, 0xFFFF])
def test_a_queue_that_does_not_exist_has_no_size_and_takes_nothing(guest: PciGuest, device: Echo, index: int) -> None:
    before = save(device.state)
    guest.select(index)
    assert (guest.get(Reg.QUEUE_SIZE), guest.get(Reg.QUEUE_ENABLE)) == (0, 0)
    assert guest.get(Reg.QUEUE_VECTOR) == NO_VECTOR
    for reg in (Reg.QUEUE_SIZE, Reg.QUEUE_VECTOR, Reg.QUEUE_DESC, Reg.QUEUE_DRIVER_LOW, Reg.QUEUE_ENABLE):
        guest.put(reg, 1)
    assert save(device.state) == before


FROZEN = [
    (Reg.QUEUE_SIZE, 4),
    (Reg.QUEUE_DESC, 0x5000),
    (Reg.QUEUE_DRIVER_LOW, 0x5000),
    (Reg.QUEUE_DEVICE_HIGH, 1),
    (Reg.QUEUE_ENABLE, 0),
]


@pytest.mark.parametrize(("reg", "value"), FROZEN)
def test_an_enabled_queue_stays_as_it_is(guest: PciGuest, reg: Reg, value: int) -> None:
    guest.start(go=False)
    guest.select(0)
    before = guest.get(reg)
    guest.put(reg, value)
    assert guest.get(reg) == before


@pytest.mark.parametrize(("reg", "value"), [*FROZEN, (Reg.QUEUE_ENABLE, 1)])
def test_no_queue_is_set_up_once_the_driver_is_live(guest: PciGuest, reg: Reg, value: int) -> None:
    guest.start(enable={0})
    guest.select(1)
    before = guest.get(reg)
    guest.put(reg, value)
    assert guest.get(reg) == before


def test_addresses_are_whole_or_in_halves(guest: PciGuest) -> None:
    guest.put(Reg.QUEUE_DESC_LOW, 0x1234_5670)
    guest.put(Reg.QUEUE_DESC_HIGH, 0x9)
    assert guest.get(Reg.QUEUE_DESC) == 0x9_1234_5670
    guest.put(Reg.QUEUE_DEVICE, 0xA_0000_0004)
    assert (guest.get(Reg.QUEUE_DEVICE_LOW), guest.get(Reg.QUEUE_DEVICE_HIGH)) == (4, 0xA)


@pytest.mark.parametrize(
    ("offset", "size"), [(0x14, 2), (0x14, 4), (0x00, 2), (0x02, 2), (0x10, 4), (0x21, 1), (0x1C, 8), (0x38, 2), (1, 4)]
)
def test_a_register_has_one_width(guest: PciGuest, board: Board, offset: int, size: int) -> None:
    before = save(guest.function.state), save(guest.device.state)
    board.mmio.write(guest.common + offset, size, 1)
    assert board.mmio.read(guest.common + offset, size) == (1 << 8 * size) - 1
    assert (save(guest.function.state), save(guest.device.state)) == before


def test_reset_reads_back_as_zero_and_forgets_the_queues(guest: PciGuest) -> None:
    guest.start()
    guest.select(1)
    guest.put(Reg.STATUS, 0)
    assert guest.get(Reg.STATUS) == 0
    assert (guest.get(Reg.QUEUE_SELECT), guest.get(Reg.CONFIG_VECTOR)) == (0, NO_VECTOR)
    assert (guest.get(Reg.QUEUE_ENABLE), guest.get(Reg.QUEUE_DESC)) == (0, 0)


def test_it_works_again_after_each_of_many_resets(guest: PciGuest) -> None:
    for turn in range(6):
        guest.start(msix=bool(turn % 2))
        assert echo(guest) == b"hello"


def test_the_configuration_is_the_devices_own(guest: PciGuest, board: Board) -> None:
    board.mmio.write(guest.device_config, 4, 0xCAFE)
    assert board.mmio.read(guest.device_config, 2) == 0xCAFE
    assert board.mmio.read(guest.device_config + 4, 4) == int.from_bytes(b"echo", "little")
    assert board.mmio.read(guest.device_config + 0xFF8, 8) == 0


# Doorbells


def test_each_enabled_queue_has_a_doorbell_while_the_driver_is_live(guest: PciGuest, board: Board) -> None:
    guest.start(enable={1}, go=False)
    assert not board.doorbells.events
    guest.go()
    assert list(board.doorbells.events) == [guest.doorbell_address(1)]
    guest.put(Reg.STATUS, 0)
    assert not board.doorbells.events


def test_doorbells_follow_the_bar(guest: PciGuest, board: Board) -> None:
    guest.start()
    guest.config.place(0, WINDOWS.mem64.start + 0x10_0000, wide=True)
    assert sorted(board.doorbells.events) == [WINDOWS.mem64.start + 0x10_3000 + 4 * index for index in range(2)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_kick_that_exits_works_too(guest: PciGuest, board: Board, size: int) -> None:
    guest.start()
    head = guest.queues[1].offer([b"x"], [1])
    board.mmio.write(guest.doorbell_address(1), size, 1)
    guest.settle()
    assert guest.queues[1].used() == [(head, 1)]


@pytest.mark.parametrize("offset", [8, 0x2, 0x3, 0xFFC])
def test_a_kick_for_no_queue_is_ignored(guest: PciGuest, board: Board, offset: int) -> None:
    guest.start()
    guest.settle()
    board.mmio.write(guest.notify + offset, 2, 0)
    assert not any(queue.kick.take() for queue in guest.device.queues)
    assert echo(guest) == b"hello"


def test_nothing_happens_before_the_driver_is_live(guest: PciGuest) -> None:
    guest.start(go=False)
    guest.queues[0].offer([b"x"], [1])
    guest.kick(0)
    assert guest.queues[0].used() == []
    guest.go()
    guest.settle()
    assert len(guest.queues[0].used()) == 1


# Interrupts


def test_each_queue_has_its_vector(guest: PciGuest) -> None:
    guest.start()
    echo(guest, 1)
    echo(guest, 0)
    assert guest.interrupts() == [2, 1]


def test_queues_may_share_a_vector(guest: PciGuest) -> None:
    guest.start()
    guest.select(0)
    guest.put(Reg.QUEUE_VECTOR, 2)
    echo(guest, 0)
    echo(guest, 1)
    assert guest.interrupts() == [2, 2]


def test_a_vector_that_is_not_there_reads_back_as_none(guest: PciGuest, device: Echo) -> None:
    guest.start()
    for index, reg in ((0, Reg.QUEUE_VECTOR), (0, Reg.CONFIG_VECTOR)):
        guest.select(index)
        guest.put(reg, 3)
        assert guest.get(reg) == NO_VECTOR
    echo(guest, 0)
    device.config_changed()
    assert guest.interrupts() == []


def test_a_masked_vector_waits(guest: PciGuest) -> None:
    guest.start()
    msix = guest.config.capability(MSIX)
    guest.config.write(msix + 2, 2, 0xC000)
    echo(guest, 0)
    assert guest.interrupts() == []
    guest.config.write(msix + 2, 2, 0x8000)
    assert guest.interrupts() == [1]


def test_without_msix_the_isr_says_why_and_reading_acknowledges(guest: PciGuest, device: Echo) -> None:
    guest.start(msix=False)
    echo(guest)
    assert guest.intx()
    device.config_changed()
    assert (guest.read_isr(), guest.read_isr()) == (3, 0)
    assert not guest.intx()
    assert guest.interrupts() == []


def test_a_change_of_configuration_has_its_vector_and_its_isr_bit(guest: PciGuest, device: Echo) -> None:
    guest.start()
    generation = guest.get(Reg.GENERATION)
    device.config_changed()
    assert guest.get(Reg.GENERATION) == generation + 1
    assert guest.interrupts() == [0]
    assert not guest.intx()
    assert guest.read_isr() == 2


def test_only_a_byte_wide_read_acknowledges(guest: PciGuest, board: Board) -> None:
    guest.start(msix=False)
    echo(guest)
    assert board.mmio.read(guest.isr, 4) == 0xFFFF_FFFF
    assert guest.read_isr() == 1


def test_switching_to_msix_takes_the_wire_down(guest: PciGuest) -> None:
    guest.start(msix=False)
    echo(guest)
    guest.enable_msix()
    assert not guest.intx()
    guest.enable_msix(enabled=False)
    assert guest.intx()


def test_reset_takes_the_wire_down(guest: PciGuest) -> None:
    guest.start(msix=False)
    echo(guest)
    guest.put(Reg.STATUS, 0)
    assert not guest.intx()


# Eventfds that others signal


def test_what_vhost_signals_is_the_queues_vector(guest: PciGuest, board: Board) -> None:
    guest.start()
    assert guest.function.call_event(1) == board.sink.vectors[2].fd
    guest.select(1)
    guest.put(Reg.QUEUE_VECTOR, 3)
    assert guest.function.call_event(1) == -1


def test_without_msix_what_vhost_signals_becomes_intx(guest: PciGuest, loop: ManualLoop) -> None:
    guest.start(msix=False)
    fd = guest.function.call_event(0)
    assert fd == guest.function.call_event(1)
    os.eventfd_write(fd, 1)
    loop.run()
    assert guest.intx()
    assert guest.read_isr() == 1


def test_an_eventfd_that_cannot_be_watched_is_not_kept(
    guest: PciGuest, loop: ManualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, **_: object) -> None:
        raise OSError(errno.ENOSPC, "no room for one more")

    guest.start(msix=False)
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "watch", refuse)
        with pytest.raises(OSError, match="no room"):
            guest.function.call_event(0)
    assert open_descriptors() == before
    os.eventfd_write(guest.function.call_event(0), 1)
    loop.run()
    assert guest.intx()


def test_the_device_hears_when_its_eventfds_change(guest: PciGuest, device: Echo) -> None:
    guest.start()
    device.log.clear()
    guest.enable_msix(enabled=False)
    guest.enable_msix()
    guest.select(0)
    guest.put(Reg.QUEUE_VECTOR, 2)
    guest.put(Reg.QUEUE_VECTOR, 2)
    assert device.log == ["calls"] * 3


# Breaking


def test_a_broken_ring_asks_for_a_reset_which_helps(guest: PciGuest) -> None:
    guest.start()
    guest.queues[0].put(99)
    guest.queues[0].publish()
    guest.ring(0)
    guest.settle()
    assert guest.get(Reg.STATUS) == LIVE | Status.NEEDS_RESET
    assert guest.interrupts() == [0]
    assert len(guest.broken) == 1
    guest.start()
    assert echo(guest) == b"hello"


# The bus


def test_it_leaves_memory_alone_unless_it_is_a_bus_master(guest: PciGuest) -> None:
    guest.start()
    guest.config.enable(Command.MEMORY)
    head = guest.queues[0].offer([b"x"], [1])
    guest.kick(0)
    assert guest.queues[0].used() == []
    guest.config.enable()
    guest.settle()
    assert guest.queues[0].used() == [(head, 1)]


def test_it_starts_anew_with_its_bus(guest: PciGuest) -> None:
    guest.start()
    with guest.function.lock:
        guest.function.bus_reset()
    assert guest.device.virtio.status == 0
    guest.config.place(0, BAR, wide=True)
    guest.config.enable()
    guest.start()
    assert echo(guest) == b"hello"


# The window in configuration space


def through_window(guest: PciGuest, offset: int, size: int, bar: int = 0) -> int:
    at = guest.window
    guest.config.write(at + 4, 1, bar)
    guest.config.write(at + 8, 4, offset)
    guest.config.write(at + 12, 4, size)
    return at + 16


def test_every_register_can_be_reached_through_the_window(guest: PciGuest) -> None:
    guest.config.enable(0)  # without the BAR
    data = through_window(guest, 0x14, 1)
    guest.config.write(data, 1, Status.ACKNOWLEDGE)
    assert guest.config.read(data, 1) == Status.ACKNOWLEDGE
    assert guest.config.read(through_window(guest, 0x12, 2), 2) == 2
    assert guest.config.read(through_window(guest, 0x2004, 4), 4) == int.from_bytes(b"echo", "little")


def test_a_doorbell_can_be_rung_through_the_window(guest: PciGuest) -> None:
    guest.start()
    head = guest.queues[1].offer([b"x"], [1])
    guest.config.write(through_window(guest, 0x3004, 2), 2, 1)
    guest.settle()
    assert guest.queues[1].used() == [(head, 1)]


@pytest.mark.parametrize(
    ("bar", "offset", "size"),
    [(1, 0x14, 1), (0, 0x14, 8), (0, 0x14, 3), (0, 0x15, 2), (0, 0x4000, 4), (0, 2**32 - 4, 4)],
)
def test_the_window_shows_nothing_but_our_registers(guest: PciGuest, bar: int, offset: int, size: int) -> None:
    before = save(guest.device.state)
    data = through_window(guest, offset, size, bar)
    guest.config.write(data, 4, 0x5A)
    assert guest.config.read(data, 4) == 0x5A
    assert save(guest.device.state) == before


# Moving


def test_it_goes_on_in_another_machine(guest: PciGuest, memory: GuestMemory) -> None:
    guest.start()
    echo(guest)
    guest.device.pause()
    guest.function.pause()
    board, loop = Board(), ManualLoop()
    device = Echo("echo0/virtio-echo", memory, loop)
    function = VirtioPci("echo0", device, board.sink)
    board.add(function, 2)
    device.state = load(EchoState, save(guest.device.state))
    device.post_load()
    function.state = load(VirtioPciState, save(guest.function.state))
    function.post_load()
    assert not loop.watched
    device.resume()
    function.resume()
    loop.run()
    assert sorted(message.data for message in board.sink.take()) == [0, 1, 2]
    ring = guest.queues[0]
    head = ring.offer([b"there"], [5])
    assert ring.needs_kick()
    board.doorbells.ring(BAR + 0x3000)
    loop.run()
    assert ring.used() == [(head, 5)]
    assert save(function.state)["state"]["common"] == save(guest.function.state)["state"]["common"]
    function.close()
    device.close()
    board.close()


def test_an_event_index_that_was_not_offered_is_not_used(guest: PciGuest) -> None:
    guest.start(features=0)
    assert not guest.device.acked(Feature.EVENT_IDX)
    assert echo(guest) == b"hello"
