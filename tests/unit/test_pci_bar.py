"""BARs: sizing, where they are mapped, moving under the feet of vCPUs, doorbells."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import trace
from kvmpy.devices.pci.bar import BarKind, Rom
from kvmpy.devices.pci.config import Command
from kvmpy.errors import HostError
from kvmpy.host.eventfd import EventFd
from tests.counts import count
from tests.fakes.interrupts import FakeDoorbell
from tests.fakes.loop import BOUND
from tests.fakes.pci import ECAM, WINDOWS, Accesses, Board, Card

EXAMPLES = settings(max_examples=count(15, 2000), deadline=None)
SIZES = {BarKind.MEM32: (4, 31), BarKind.MEM64: (4, 40), BarKind.MEM64_PREFETCHABLE: (4, 40), BarKind.IO: (2, 8)}
LOW, OTHER = 0xC000_0000, 0xD000_0000
HIGH = 1 << 36


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


@st.composite
def kinds_and_sizes(draw: st.DrawFn) -> tuple[BarKind, int]:
    kind = draw(st.sampled_from(BarKind))
    return kind, 1 << draw(st.integers(*SIZES[kind]))


def card_at(board: Board, device: int, place: int, *, size: int = 0x1000, name: str = "card") -> tuple[Card, Accesses]:
    """A card with a 32-bit BAR programmed to ``place``, decoding."""
    card = Card(name, bars={0: (size, BarKind.MEM32)})
    config = board.add(card, device)
    config.place(0, place)
    config.enable()
    return card, config


def address(card: Card, index: int = 0) -> int | None:
    """Where a BAR is, as a call: mypy believes that an attribute stays what an assert said."""
    return card.bars[index].address


@given(kinds_and_sizes())
@EXAMPLES
def test_sizing_as_linux_does_it_finds_kind_and_size_and_leaves_no_trace(what: tuple[BarKind, int]) -> None:
    kind, size = what
    board = Board()
    config = board.add(Card(bars={0: (size, kind)}), 1)
    config.write(0x10, 4, 0x5555_5555)
    before = config.read(0x10, 8)
    low, mask = config.size_bar(0x10)
    if kind.registers == 2:
        _, high = config.size_bar(0x14)
        mask |= high << 32
    else:
        mask |= 0xFFFF_FFFF_0000_0000
    assert low & (0x3 if kind is BarKind.IO else 0xF) == kind.value
    assert ~(mask & ~(0x3 if kind is BarKind.IO else 0xF)) & 0xFFFF_FFFF_FFFF_FFFF == size - 1
    assert config.read(0x10, 8) == before


@given(
    kinds_and_sizes(),
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 8), st.integers(0, 2**64 - 1)), max_size=8),
    st.integers(0, 7),
)
@EXAMPLES
def test_whatever_is_written_a_bar_is_mapped_where_its_register_says_or_nowhere(
    what: tuple[BarKind, int], writes: list[tuple[int, int, int]], command: int
) -> None:
    kind, size = what
    board = Board()
    card = Card(bars={0: (size, kind)})
    config = board.add(card, 1)
    config.write(4, 2, command)
    for offset, size_written, value in writes:
        card.config_write(0x10 + offset, size_written, value)
    register = config.read(0x10, 4 * kind.registers)
    said = register & -size
    is_io = kind is BarKind.IO
    windows = [WINDOWS.io] if is_io else [WINDOWS.mem32, WINDOWS.mem64]
    decodes = bool(command & (Command.IO if is_io else Command.MEMORY))
    inside = any(said in window and said + size - 1 in window for window in windows)
    assert register & (size - 1) == kind.value
    assert address(card) == (said if decodes and inside else None)
    bus = board.pio if is_io else board.mmio
    assert [w.base for w in bus.windows if w.target is card.bars[0]] == [said] * (decodes and inside)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (0, BarKind.MEM32),
        (0x3000, BarKind.MEM64),
        (8, BarKind.MEM32),
        (1 << 32, BarKind.MEM32),
        (512, BarKind.IO),
        (2, BarKind.IO),
    ],
)
def test_a_size_that_no_register_can_express_is_refused(size: int, kind: BarKind) -> None:
    with pytest.raises(ValueError, match=f"card: a {kind.name} BAR cannot have {size:#x} bytes"):
        Card(bars={0: (size, kind)})


@pytest.mark.parametrize(
    ("index", "kind"),
    [(-1, BarKind.MEM32), (6, BarKind.MEM32), (5, BarKind.MEM64), (1, BarKind.IO), (2, BarKind.MEM64)],
)
def test_a_register_that_is_taken_or_none_is_refused(index: int, kind: BarKind) -> None:
    card = Card(bars={0: (0x1000, BarKind.MEM64), 3: (0x1000, BarKind.MEM32)})
    with pytest.raises(ValueError, match=f"BAR {index} is not free"):
        card.add_bar(index, 0x100, kind, card)


def test_accesses_reach_the_target_with_offsets(board: Board) -> None:
    card, _ = card_at(board, 1, LOW)
    assert board.mmio.read(LOW + 0x123, 2) == 0x123
    board.mmio.write(LOW + 0xFF8, 8, 0x1122_3344_5566_7788)
    assert card.written == [(0xFF8, 8, 0x1122_3344_5566_7788)]


def test_wide_accesses_are_split_for_a_target_that_cannot(board: Board) -> None:
    card = Card()
    card.add_bar(0, 0x1000, BarKind.MEM32, card, widest=4)
    config = board.add(card, 1)
    config.place(0, LOW)
    config.enable()
    board.mmio.write(LOW, 8, 0x1_0000_0002)
    assert card.written == [(0, 4, 2), (4, 4, 1)]


def test_io_bars_are_on_the_port_bus_and_obey_their_own_enable(board: Board) -> None:
    card = Card(bars={0: (0x20, BarKind.IO), 1: (0x1000, BarKind.MEM32)})
    config = board.add(card, 1)
    config.place(0, 0x2000)
    config.place(1, LOW)
    config.enable(Command.IO)
    assert (address(card), address(card, 1)) == (0x2000, None)
    assert board.pio.read(0x2011, 1) == 0x11
    config.enable(Command.MEMORY)
    assert (address(card), address(card, 1)) == (None, LOW)
    assert board.pio.read(0x2011, 1) == 0xFF


def test_the_rom_is_sized_as_any_bar_and_decodes_when_both_enables_are_set(board: Board) -> None:
    card = Card(bars={0: (0x1000, BarKind.MEM32)})
    card.add_rom(0x800, card)
    config = board.add(card, 1)
    assert config.size_bar(0x30) == (0, 0xFFFF_F801)
    config.write(0x30, 4, LOW | 0x7FF)
    assert config.read(0x30, 4) == LOW | 1
    assert address(card, Rom.INDEX) is None
    config.enable(Command.MEMORY)
    assert address(card, Rom.INDEX) == LOW
    assert board.mmio.read(LOW + 0x11, 1) == 0x11
    board.mmio.write(LOW, 4, 1)
    assert card.written == []
    config.write(0x30, 4, LOW)
    assert address(card, Rom.INDEX) is None


@pytest.mark.parametrize("size", [0x400, 0x1800, 0x200_0000])
def test_a_rom_that_its_register_cannot_express_is_refused(size: int) -> None:
    card = Card()
    with pytest.raises(ValueError, match="cannot have"):
        card.add_rom(size, card)


def test_there_is_one_rom_and_none_of_a_bridge(board: Board) -> None:
    card = Card()
    card.add_rom(0x800, card)
    port, _ = board.add_port(bus=1)
    for function in (card, port):
        with pytest.raises(ValueError, match="no place"):
            function.add_rom(0x800, card)


def test_bar_follows_its_register_while_decoding(board: Board) -> None:
    card, config = card_at(board, 1, LOW)
    config.place(0, OTHER)
    assert board.mmio.read(LOW + 4, 4) == 0xFFFF_FFFF
    assert board.mmio.read(OTHER + 4, 4) == 4
    config.enable(0)
    assert (address(card), board.mmio.read(OTHER + 4, 4)) == (None, 0xFFFF_FFFF)


@pytest.mark.parametrize(
    "place", [0, 0x1000, 0x7FFF_F000, ECAM, 0xBFFF_F000, 0xFEC0_0000, 0xFEE0_0000, 0xFFFF_F000], ids=hex
)
def test_bar_over_ram_ecam_or_the_interrupt_controllers_is_not_mapped(board: Board, place: int) -> None:
    lines: list[str] = []
    sink = lines.append
    trace.enable("pci.bar", sink)
    card, config = card_at(board, 1, place)
    trace.disable(sink)
    assert address(card) is None
    assert any(f"function=card bar=0x0 what=outside address={place:#x}" in line for line in lines)
    assert config.read(0, 4) == 0x1041_1AF4  # configuration space is where it was
    config.place(0, LOW)
    assert address(card) == LOW


def test_64_bit_bar_must_lie_in_a_window_whole(board: Board) -> None:
    card = Card(bars={0: (1 << 30, BarKind.MEM64)})
    config = board.add(card, 1)
    config.enable()
    for place, expected in (
        (HIGH - (1 << 30), None),
        (HIGH, HIGH),
        (LOW, None),  # 1 GiB from there on is more than the window
        ((1 << 40) - (1 << 30), (1 << 40) - (1 << 30)),
        (1 << 40, None),
        ((1 << 64) - (1 << 30), None),
    ):
        config.place(0, place, wide=True)
        assert address(card) == expected


def test_bar_over_another_waits_until_that_one_moves_away(board: Board) -> None:
    lines: list[str] = []
    sink = lines.append
    trace.enable("pci.bar", sink)
    first, first_config = card_at(board, 1, LOW, name="first")
    second, _ = card_at(board, 2, LOW, size=0x2000, name="second")
    trace.disable(sink)
    assert (address(first), address(second)) == (LOW, None)
    assert any("function=second bar=0x0 what=overlaps address=0xc0000000" in line for line in lines)
    first_config.place(0, OTHER)
    assert (address(first), address(second)) == (OTHER, LOW)


def test_bar_over_another_that_stays_disturbs_neither_it_nor_later_changes(board: Board) -> None:
    first, first_config = card_at(board, 1, LOW, name="first")
    second, second_config = card_at(board, 2, LOW, name="second")
    second_config.write(0x3C, 1, 7)
    first_config.enable(Command.MEMORY)
    assert (address(first), address(second)) == (LOW, None)
    first_config.enable(0)
    assert (address(first), address(second)) == (None, LOW)


def test_two_bars_that_change_places_are_both_mapped_in_the_end(board: Board) -> None:
    card = Card(bars={0: (0x1000, BarKind.MEM32), 1: (0x1000, BarKind.MEM32)})
    config = board.add(card, 1)
    config.place(0, LOW)
    config.place(1, OTHER)
    config.enable()
    config.place(0, OTHER)
    config.place(1, LOW)
    assert (address(card), address(card, 1)) == (OTHER, LOW)


def test_reset_unmaps_and_a_loaded_state_maps_again(board: Board) -> None:
    card, _ = card_at(board, 1, LOW)
    config_bytes = bytearray(card.config.content)
    with card.lock:
        card.reset()
    assert address(card) is None
    card.state.pci.config = config_bytes
    card.post_load()
    assert address(card) == LOW
    card.close()
    assert address(card) is None


def test_bar_moves_while_other_threads_use_it(board: Board) -> None:
    """Every access sees the target or nobody; nothing is lost, raised or left behind."""
    card, config = card_at(board, 1, LOW)
    stop, wrong, seen = threading.Event(), list[object](), [0, 0]

    def use(index: int) -> None:
        while not stop.is_set():
            for base in (LOW, OTHER):
                try:
                    if (value := board.mmio.read(base + 0x18, 4)) not in (0x18, 0xFFFF_FFFF):
                        wrong.append(value)
                    seen[index] += value == 0x18
                except Exception as e:  # noqa: BLE001 a test that collects what must not happen
                    wrong.append(e)

    threads = [threading.Thread(target=use, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    moves = 0
    while moves < 300 or not all(seen):
        config.place(0, (OTHER, LOW)[moves % 2])
        moves += 1
        assert moves < 1_000_000
    stop.set()
    for thread in threads:
        thread.join(BOUND)
    assert wrong == []
    assert [w for w in board.mmio.windows if w.target is card.bars[0]] == [board.mmio.windows[-1]]


def test_doorbells_follow_the_bar_and_leave_with_it(board: Board) -> None:
    card, config = card_at(board, 1, LOW)
    with EventFd() as first, EventFd() as second:
        bell = card.bars[0].add_doorbell(0x10, first)
        assert board.doorbells.events == {LOW + 0x10: first}
        config.place(0, OTHER)
        card.bars[0].add_doorbell(0x14, second)
        assert board.doorbells.events == {OTHER + 0x10: first, OTHER + 0x14: second}
        config.enable(0)
        assert board.doorbells.events == {}
        bell.close()
        bell.close()
        config.enable()
        assert board.doorbells.events == {OTHER + 0x14: second}


def test_doorbell_rung_before_or_during_a_move_is_never_lost(board: Board) -> None:
    """Between the doorbell's going and the window's, a kick reaches the target instead."""
    card, config = card_at(board, 1, LOW)

    class Watching(FakeDoorbell):
        def close(self) -> None:
            super().close()
            board.mmio.write(LOW + 0x10, 2, 1)  # a vCPU, at the worst moment

    with EventFd() as event:
        board.doorbells.doorbell = lambda gpa, event: Watching(board.doorbells, gpa)  # type: ignore[method-assign]
        card.bars[0].add_doorbell(0x10, event)
        config.place(0, OTHER)
    assert card.written == [(0x10, 2, 1)]


def test_where_the_host_has_no_more_doorbells_the_write_reaches_the_target(board: Board) -> None:
    def refuse(gpa: int, event: EventFd) -> FakeDoorbell:
        raise HostError("no more")

    lines: list[str] = []
    sink = lines.append
    trace.enable("pci.doorbell", sink)
    card, config = card_at(board, 1, LOW)
    board.doorbells.doorbell = refuse  # type: ignore[method-assign]
    with EventFd() as event:
        bell = card.bars[0].add_doorbell(0x10, event)
        config.place(0, OTHER)
        board.mmio.write(OTHER + 0x10, 2, 7)
        bell.close()
    trace.disable(sink)
    assert card.written == [(0x10, 2, 7)]
    assert [line.split("offset=")[1] for line in lines] == ["0x10 problem=no more"] * 2


@pytest.mark.parametrize("offset", [-1, 0x1000, 1 << 40])
def test_doorbell_outside_the_bar_is_refused(board: Board, offset: int) -> None:
    card, _ = card_at(board, 1, LOW)
    with EventFd() as event, pytest.raises(ValueError, match="no doorbell"):
        card.bars[0].add_doorbell(offset, event)


def test_parts_that_overlap_or_stick_out_are_refused() -> None:
    card = Card(bars={0: (0x1000, BarKind.MEM32)})
    bar = card.bars[0]
    bar.trap(0x100, 0x100, card)
    for offset, size in ((0x1FF, 1), (0x80, 0x100), (0xFF0, 0x20), (-1, 1)):
        with pytest.raises(ValueError, match="is not free in BAR 0"):
            bar.trap(offset, size, card)


def direct_card(board: Board, size: int = 0x4000) -> tuple[Card, Accesses]:
    card = Card(bars={0: (size, BarKind.MEM32)})
    card.bars[0].add_direct(0x1000, 0x2000, 0x7F00_0000_1000)
    config = board.add(card, 1)
    config.place(0, LOW)
    return card, config


def test_a_direct_part_is_mapped_while_its_bar_is_and_where_it_is(board: Board) -> None:
    card, config = direct_card(board)
    assert board.doorbells.slots == {}
    config.enable()
    assert board.doorbells.slots == {LOW + 0x1000: (0x2000, 0x7F00_0000_1000)}
    config.place(0, OTHER)
    assert board.doorbells.slots == {OTHER + 0x1000: (0x2000, 0x7F00_0000_1000)}
    config.place(0, 0x1000)  # over RAM
    assert board.doorbells.slots == {}
    config.place(0, LOW)
    card.close()
    assert board.doorbells.slots == {}


def test_a_direct_part_that_the_host_refuses_exits(board: Board) -> None:
    board.doorbells.refuses = HostError("KVM_SET_USER_MEMORY_REGION: EINVAL")
    _, config = direct_card(board)
    config.enable()
    assert board.doorbells.slots == {}
    assert board.mmio.read(LOW + 0x1004, 4) == 0x1004


@pytest.mark.parametrize(
    ("offset", "size", "hva"),
    [
        (0x800, 0x1000, 0x1000),
        (0x1000, 0x800, 0x1000),
        (0x1000, 0x1000, 0x800),
        (0, 0, 0x1000),
        (-0x1000, 0x1000, 0x1000),
        (0x3000, 0x2000, 0x1000),
        (0, 0x2000, 0x1000),
        (0x2000, 0x1000, 0x1000),
    ],
)
def test_a_direct_part_is_whole_free_pages_of_its_bar(offset: int, size: int, hva: int) -> None:
    card = Card(bars={0: (0x4000, BarKind.MEM32), 1: (0x100, BarKind.IO)})
    card.bars[0].trap(0x1800, 8, card)
    card.bars[0].add_direct(0x2000, 0x1000, 0x1000)
    with pytest.raises(ValueError, match="cannot be direct"):
        card.bars[0].add_direct(offset, size, hva)
    with pytest.raises(ValueError, match="cannot be direct"):
        card.bars[1].add_direct(0, 0x1000, 0x1000)
