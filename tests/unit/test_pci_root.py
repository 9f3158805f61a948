"""Finding functions by number: ECAM, the ports 0xCF8 and 0xCFC, and the reset register among them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.host import Clock
from tests.fakes.interrupts import FakeSink
from tests.fakes.loop import BOUND, Inbox, switching_often
from tests.fakes.pci import CONFIG_ADDRESS, CONFIG_DATA, ECAM, WINDOWS, Board, Card

EXAMPLES = settings(max_examples=count(15, 2000), deadline=None)
CARD_ID = 0x1041_1AF4
ENABLE = 0x8000_0000
RESET_PORT = 0xCF9


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def select(board: Board, bus: int, device: int, function: int, register: int) -> None:
    board.pio.write(CONFIG_ADDRESS, 4, ENABLE | bus << 16 | device << 11 | function << 8 | register)


def test_host_bridge_is_the_first_function(board: Board) -> None:
    config = board.config(0, 0)
    assert (config.read(0, 4), config.read(0x0A, 2), config.read(0x0E, 1)) == (0x0008_1B36, 0x0600, 0)


def test_where_there_is_nothing_reads_give_all_ones_and_writes_vanish(board: Board) -> None:
    for bus, device, function in ((0, 1, 0), (0, 0, 1), (1, 0, 0), (255, 31, 7)):
        config = board.config(bus, device, function)
        config.write(4, 4, 0)
        assert [config.read(0, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFF_FFFF, 2**64 - 1]


def test_ports_and_ecam_show_the_same_function(board: Board) -> None:
    board.add(Card(), 3)
    select(board, 0, 3, 0, 0)
    assert board.pio.read(CONFIG_DATA, 4) == CARD_ID
    select(board, 0, 3, 0, 0x3C)
    board.pio.write(CONFIG_DATA, 1, 0x0B)
    assert board.config(0, 3).read(0x3C, 1) == 0x0B


@given(st.integers(0, 0xFF), st.integers(0, 3), st.sampled_from([1, 2, 3, 4]))
@EXAMPLES
def test_every_width_and_offset_of_the_data_port_is_that_part_of_the_register(
    register: int, offset: int, size: int
) -> None:
    board = Board()
    board.add(Card(bars={0: (0x1000, BarKind.MEM32)}), 3)
    select(board, 0, 3, 0, register)
    expected = board.config(0, 3).read((register & 0xFC) + offset, size)
    if offset + size <= 4:
        assert board.pio.read(CONFIG_DATA + offset, size) == expected
    else:  # beyond the ports there is nobody
        assert board.pio.read(CONFIG_DATA + offset, size) == (1 << 8 * size) - 1


def test_data_port_without_the_enable_bit_is_nobodys(board: Board) -> None:
    card = Card()
    board.add(card, 3)
    board.pio.write(CONFIG_ADDRESS, 4, 3 << 11 | 4)
    board.pio.write(CONFIG_DATA, 2, 7)
    assert board.pio.read(CONFIG_DATA, 4) == 0xFFFF_FFFF
    assert card.header.command == 0


def test_address_register_keeps_its_bits_and_takes_aligned_dwords_only(board: Board) -> None:
    board.pio.write(CONFIG_ADDRESS, 4, 0xFFFF_FFFF)
    assert board.pio.read(CONFIG_ADDRESS, 4) == 0x80FF_FFFC
    for port, size in ((0xCF8, 1), (0xCF8, 2), (0xCFA, 1), (0xCFA, 2), (0xCFB, 1), (0xCFA, 4), (0xCF9, 2), (0xCFB, 4)):
        board.pio.write(port, size, 0)
        assert board.pio.read(port, size) == (1 << 8 * size) - 1
    assert board.pio.read(CONFIG_ADDRESS, 4) == 0x80FF_FFFC


def test_linux_finds_the_ports_by_its_own_probe(board: Board) -> None:
    """pci_check_type1 in arch/x86/pci/direct.c."""
    board.pio.write(0xCFB, 1, 0x01)
    was = board.pio.read(CONFIG_ADDRESS, 4)
    board.pio.write(CONFIG_ADDRESS, 4, ENABLE)
    assert board.pio.read(CONFIG_ADDRESS, 4) == ENABLE
    board.pio.write(CONFIG_ADDRESS, 4, was)
    assert board.pio.read(CONFIG_ADDRESS, 4) == 0


def test_byte_in_the_middle_of_the_address_is_the_reset_register(board: Board) -> None:
    select(board, 0, 3, 0, 0x10)
    board.pio.write(RESET_PORT, 1, 0x02)
    assert board.pio.read(RESET_PORT, 1) == 0x02
    assert board.power.requests == []
    board.pio.write(RESET_PORT, 1, 0x06)
    assert board.power.requests == ["reset"]
    assert board.pio.read(CONFIG_ADDRESS, 4) == ENABLE | 3 << 11 | 0x10


def test_dword_with_the_reset_bits_is_an_address_and_resets_nothing(board: Board) -> None:
    board.pio.write(CONFIG_ADDRESS, 4, 0x0000_0600)
    assert board.power.requests == []


def test_address_moves_to_another_host_and_reset_clears_it(board: Board) -> None:
    ports = board.root.ports
    select(board, 0, 3, 0, 0x10)
    ports.pause()
    section = save(ports.state)
    ports.reset()
    assert board.pio.read(CONFIG_ADDRESS, 4) == 0
    section["state"]["address"] |= 0x7F00_0003  # bits that a guest cannot set
    ports.state = load(type(ports.state), section)
    ports.post_load()
    assert board.pio.read(CONFIG_ADDRESS, 4) == ENABLE | 3 << 11 | 0x10


def test_access_across_the_end_of_a_function_is_nobodys(board: Board) -> None:
    board.add(Card(), 3)
    board.add(Card("next"), 4)
    config = board.config(0, 3)
    assert (config.read(0xFFE, 4), config.read(0xFFC, 4), config.read(0xFFD, 8)) == (0xFFFF_FFFF, 0, 2**64 - 1)


@given(st.lists(st.tuples(st.integers(0, (256 << 20) - 1), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1))))
@EXAMPLES
def test_no_ecam_access_is_too_odd(accesses: list[tuple[int, int, int]]) -> None:
    board = Board()
    port, _ = board.add_port(bus=1)
    port.plug(Card())
    for offset, size, value in accesses:
        for at in (offset, offset & 0x10_FFFF):  # the whole window, and where somebody is
            board.mmio.write(ECAM + at, size, value & (1 << 8 * size) - 1)
            assert 0 <= board.mmio.read(ECAM + at, size) < 1 << 8 * size
    board.close()


def test_places_are_given_once(board: Board) -> None:
    board.add(Card("first"), 3)
    with pytest.raises(ValueError, match=r"second: first is at 03\.0"):
        board.add(Card("second"), 3)
    for device, function in ((32, 0), (-1, 0), (3, 8), (3, -1)):
        with pytest.raises(ValueError, match="no place"):
            board.root.add(Card("third"), device, function)


def test_functions_of_one_device_say_that_they_are_many(board: Board) -> None:
    board.root.add(Card("first"), 3, 0)
    assert board.config(0, 3).read(0x0E, 1) == 0
    board.root.add(Card("second"), 3, 5)
    assert [board.config(0, 3, n).read(0x0E, 1) for n in (0, 5)] == [0x80, 0x80]
    assert [place[:3] for place in board.root.functions()] == [(0, 0, 0), (0, 3, 0), (0, 3, 5)]


def test_functions_are_listed_by_the_numbers_they_have_now(board: Board) -> None:
    port, config = board.add_port(device=2)
    card = Card()
    port.plug(card)
    assert [f.name for _, _, _, f in board.root.functions()] == ["host-bridge", "root1"]
    config.write(0x18, 4, 0x07_07_00)
    assert [(bus, device, f.name) for bus, device, _, f in board.root.functions()] == [
        (0, 0, "host-bridge"),
        (0, 2, "root1"),
        (7, 0, "card"),
    ]
    assert board.root.find(7, 0) is card
    assert board.root.find(7, 8) is None


def test_interrupt_lines_are_four(board: Board) -> None:
    with pytest.raises(ValueError, match="PCI has 4 interrupt lines, not 3"):
        PciRoot(
            board.mmio,
            board.pio,
            board.doorbells,
            board.lines[:3],
            WINDOWS,
            lambda gpa, size: False,
            board.reset_register,
        )


def test_configuration_bars_and_resets_from_many_threads_never_stand_still() -> None:
    """Every pair of locks is taken in one order: a config access, a BAR access, an interrupt, a reset, a listing."""
    board = Board()
    port, above = board.add_port(bus=1)
    card = Card(bars={0: (0x1000, BarKind.MEM32)})
    port.plug(card)
    config, base, stop, failed = board.config(1, 0), 0xC000_0000, threading.Event(), list[Exception]()
    above.write(0x20, 4, 0xC000_C000)
    above.enable()

    def reset(function: Card | RootPort) -> None:
        with function.lock:
            function.reset()

    def move() -> None:
        config.place(0, base)
        config.enable()
        above.write(0x3E, 1, 0x40)
        above.write(0x3E, 1, 0)

    jobs = [
        move,
        lambda: board.mmio.read(base, 4),
        lambda: card.intx.set(level=not card.header.status & 8),
        lambda: reset(card),
        lambda: reset(port),
        lambda: list(board.root.functions()),
        lambda: above.write(0x18, 4, 0x01_01_00),
        lambda: card.info(),
    ]

    def repeat(job: object) -> None:
        assert callable(job)
        try:
            while not stop.is_set():
                job()
        except Exception as e:  # noqa: BLE001 a test that collects what must not happen
            failed.append(e)

    threads = [threading.Thread(target=repeat, args=(job,), daemon=True) for job in jobs]
    with switching_often():
        for thread in threads:
            thread.start()
        for _ in range(count(15, 20000)):
            move()
        stop.set()
        for thread in threads:
            thread.join(BOUND)
    assert not any(thread.is_alive() for thread in threads)
    assert failed == []
    board.close()


def test_who_is_there_can_be_asked_while_a_configuration_access_waits(board: Board) -> None:
    card, answers = Card(), Inbox[list[str]]()
    board.add(card, 3)
    with board.root.lock:
        threading.Thread(target=lambda: answers.put([f.name for *_, f in board.root.functions()])).start()
        (names,) = answers.wait()
    assert card.name in names


def test_root_port_slots_have_possible_numbers() -> None:
    for slot in (0, -1, 1 << 13):
        with pytest.raises(ValueError, match="no slot can have the number"):
            RootPort("root", slot, FakeSink(), Clock().timer)
