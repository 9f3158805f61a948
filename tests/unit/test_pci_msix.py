"""MSI-X and MSI: what reaches the guest, what waits, and what a hostile guest can write."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import Command
from kvmpy.devices.pci.msix import Msix
from kvmpy.errors import HostError
from kvmpy.irq import MsiMessage, MsiVector
from kvmpy.state import StateError, load, save
from tests.counts import count
from tests.fakes.interrupts import FakeSink, FakeVector
from tests.fakes.pci import Accesses, Board, Card, CardState

EXAMPLES = settings(max_examples=count(15, 2000), deadline=None)
VECTORS = 5
BASE = 0xC000_0000
TABLE, PBA = BASE + 0x1000, BASE + 0x2000
ENABLE, MASK = 0x8000, 0x4000
MESSAGES = [MsiMessage(0xFEE0_1000 + 0x10000 * n, 0x40 + n) for n in range(VECTORS)]


class Rig:
    """A card with five vectors, its table mapped; ``control`` switches MSI-X through configuration space."""

    def __init__(self) -> None:
        self.board = Board()
        self.sink = self.board.sink
        self.card = Card(bars={0: (0x4000, BarKind.MEM32)})
        self.msix: Msix = self.card.add_msix(VECTORS, self.sink, self.card.bars[0], 0x1000, 0x2000)
        self.config: Accesses = self.board.add(self.card, 1)
        self.config.place(0, BASE)
        self.config.enable()
        self.capability = self.config.capability(0x11)

    def control(self, value: int) -> None:
        self.config.write(self.capability + 2, 2, value)

    def program(self, index: int, message: MsiMessage, *, masked: bool = False) -> None:
        """As Linux does it: masked while it changes."""
        entry = TABLE + 16 * index
        self.board.mmio.write(entry + 12, 4, 1)
        self.board.mmio.write(entry, 4, message.address & 0xFFFF_FFFF)
        self.board.mmio.write(entry + 4, 4, message.address >> 32)
        self.board.mmio.write(entry + 8, 4, message.data)
        self.mask(index, masked=masked)

    def mask(self, index: int, *, masked: bool) -> None:
        self.board.mmio.write(TABLE + 16 * index + 12, 4, int(masked))

    def vector(self, index: int) -> MsiVector:
        vector = self.msix.vector(index)
        assert vector is not None
        return vector

    def pending(self) -> int:
        return self.board.mmio.read(PBA, 8)

    def took(self) -> list[int]:
        """The data of the messages that arrived since the last call."""
        return [message.data for message in self.sink.take()]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    for index, message in enumerate(MESSAGES):
        rig.program(index, message)
    rig.control(ENABLE)
    yield rig
    rig.board.close()


def test_capability_names_the_table_and_its_size(rig: Rig) -> None:
    assert rig.config.read(rig.capability + 2, 2) == ENABLE | VECTORS - 1
    assert rig.config.read(rig.capability + 4, 4) == 0x1000
    assert rig.config.read(rig.capability + 8, 4) == 0x2000


def test_signal_is_delivered_as_the_table_says(rig: Rig) -> None:
    rig.vector(3).signal()
    os.eventfd_write(rig.vector(0).fd, 1)  # vhost does it like this
    assert sorted(rig.sink.take(), key=lambda message: message.data) == [MESSAGES[0], MESSAGES[3]]


def test_masked_vector_waits_with_its_pending_bit_and_is_delivered_once(rig: Rig) -> None:
    rig.mask(2, masked=True)
    rig.vector(2).signal()
    rig.vector(2).signal()
    assert (rig.took(), rig.pending()) == ([], 1 << 2)
    assert rig.pending() == 1 << 2  # looking does not take it
    rig.mask(2, masked=False)
    assert (rig.took(), rig.pending()) == ([0x42], 0)


def test_function_mask_holds_all_and_leaves_the_vectors_own_masks(rig: Rig) -> None:
    rig.mask(1, masked=True)
    rig.control(ENABLE | MASK)
    for index in range(VECTORS):
        rig.vector(index).signal()
    assert (rig.took(), rig.pending()) == ([], 0b11111)
    rig.control(ENABLE)
    assert (sorted(rig.took()), rig.pending()) == ([0x40, 0x42, 0x43, 0x44], 0b00010)


def test_disabled_msix_delivers_nothing_and_enabling_delivers_what_waited(rig: Rig) -> None:
    rig.control(0)
    rig.vector(0).signal()
    assert (rig.took(), rig.msix.enabled) == ([], False)
    rig.control(ENABLE)
    assert rig.took() == [0x40]


def test_function_that_is_no_bus_master_sends_no_message(rig: Rig) -> None:
    rig.config.enable(Command.MEMORY)
    rig.vector(0).signal()
    assert rig.took() == []
    rig.config.enable()
    assert rig.took() == [0x40]


def test_message_can_be_changed_while_in_use(rig: Rig) -> None:
    rig.board.mmio.write(TABLE, 8, 0xFEE0_2004)
    rig.board.mmio.write(TABLE + 8, 8, 0x99)
    rig.vector(0).signal()
    assert rig.sink.take() == [MsiMessage(0xFEE0_2004, 0x99)]


def test_nothing_is_routed_before_the_guest_wants_it() -> None:
    rig = Rig()
    for index, message in enumerate(MESSAGES):
        rig.program(index, message, masked=index != 1)
    assert [vector.message for vector in rig.sink.vectors] == [None] * VECTORS
    rig.control(ENABLE)
    assert [vector.message for vector in rig.sink.vectors] == [None, MESSAGES[1], None, None, None]
    rig.board.close()


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (12, 1), (13, 1), (2, 4), (4, 8), (6, 2)])
def test_table_ignores_writes_that_are_no_aligned_dwords_or_qwords(rig: Rig, offset: int, size: int) -> None:
    before = bytes(rig.msix.table.content)
    rig.board.mmio.write(TABLE + offset, size, (1 << 8 * size) - 1)
    assert rig.msix.table.content == before


def test_table_reads_right_at_any_width(rig: Rig) -> None:
    assert rig.board.mmio.read(TABLE + 16, 8) == MESSAGES[1].address
    assert [rig.board.mmio.read(TABLE + 16 + at, 1) for at in range(3)] == [0x00, 0x10, 0xE1]
    assert rig.board.mmio.read(TABLE + 16 + 1, 2) == 0xE110


def test_reserved_bits_of_an_entry_read_as_zero(rig: Rig) -> None:
    for at in range(0, 16, 8):
        rig.board.mmio.write(TABLE + at, 8, 2**64 - 1)
    assert rig.board.mmio.read(TABLE, 8) == 0xFFFF_FFFF_FFFF_FFFC
    assert rig.board.mmio.read(TABLE + 8, 8) == 0x1_FFFF_FFFF


def test_behind_the_table_and_the_pending_bits_the_bar_is_the_cards(rig: Rig) -> None:
    for address in (BASE, TABLE - 4, TABLE + 16 * VECTORS, TABLE + 16 * 2048, PBA + 8, BASE + 0x3FFC):
        rig.board.mmio.write(address, 4, 5)
    assert [offset for offset, _, _ in rig.card.written] == [0, 0xFFC, 0x1050, 0x2008, 0x3FFC]  # one was no BAR at all
    assert rig.took() == []


def test_pending_bits_cannot_be_written(rig: Rig) -> None:
    rig.board.mmio.write(PBA, 8, 0xFF)
    assert rig.pending() == 0


@pytest.mark.parametrize("index", [-1, -5, VECTORS, 0xFFFF, 1 << 40])
def test_there_is_no_vector_beyond_the_table(rig: Rig, index: int) -> None:
    assert rig.msix.vector(index) is None


def test_pending_bits_of_many_vectors_are_read_where_they_are() -> None:
    board = Board()
    card = Card(bars={0: (0x10000, BarKind.MEM64)})
    msix = card.add_msix(130, board.sink, card.bars[0], 0x8000, 0)
    for index in (0, 63, 64, 129):
        vector = msix.vector(index)
        assert vector is not None
        vector.signal()
    assert [card.bars[0].read(at, 8) for at in (0, 8, 16)] == [1 | 1 << 63, 1, 2]
    assert (card.bars[0].read(16, 1), card.bars[0].read(7, 1), card.bars[0].read(7, 2)) == (2, 0x80, 0x180)
    board.close()


def test_transport_hears_of_every_change_that_matters(rig: Rig) -> None:
    heard: list[bool] = []
    rig.msix.on_change = lambda: heard.append(rig.msix.enabled)
    rig.control(0)
    rig.control(0)
    rig.mask(0, masked=True)
    rig.mask(0, masked=True)
    assert heard == [False, False]


def test_reset_forgets_what_waits_and_masks_all(rig: Rig) -> None:
    rig.mask(0, masked=True)
    rig.vector(0).signal()
    with rig.card.lock:
        rig.card.reset()
    assert (rig.msix.enabled, rig.msix.pending(0, VECTORS)) == (False, 0)
    rig.config.place(0, BASE)
    rig.config.enable()
    assert [rig.board.mmio.read(TABLE + 16 * n + 12, 4) for n in range(VECTORS)] == [1] * VECTORS
    rig.control(ENABLE)
    rig.mask(0, masked=False)
    assert rig.took() == []


def test_pending_bits_table_and_routes_move_to_another_host(rig: Rig) -> None:
    rig.mask(4, masked=True)
    rig.vector(4).signal()
    rig.card.pause()
    there = Rig()
    there.card.state = load(CardState, save(rig.card.state))
    there.card.post_load()
    assert there.pending() == 1 << 4
    there.vector(1).signal()
    there.mask(4, masked=False)
    assert there.took() == [0x41, 0x44]
    rig.card.pause()
    assert rig.card.state.pci.msix_pending == bytes([1 << 4, *bytes(7)])  # the source lost nothing
    there.board.close()


@pytest.mark.parametrize(
    ("table", "pending"),
    [
        (bytearray(79), bytes(8)),
        (bytearray(96), bytes(8)),
        (bytearray([1] + [0] * 79), bytes(8)),
        (bytearray([0] * 12 + [2] + [0] * 67), bytes(8)),
        (bytearray(80), bytes(7)),
        (bytearray(80), bytes(16)),
        (bytearray(80), bytes([32, *bytes(7)])),
    ],
)
def test_table_that_no_guest_could_have_written_is_refused(rig: Rig, table: bytearray, pending: bytes) -> None:
    rig.card.state.pci.msix_table, rig.card.state.pci.msix_pending = table, pending
    with pytest.raises(StateError, match="card: "):
        rig.card.post_load()


def test_route_the_host_refuses_is_logged_once_and_tried_again(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.control(0)
    rig.sink.refuses = HostError("no more routes")
    with caplog.at_level(logging.ERROR):
        rig.control(ENABLE)
        rig.control(ENABLE | MASK)
        rig.control(ENABLE)
    assert len(caplog.messages) == VECTORS
    assert "card: interrupt 0 does not reach the guest: no more routes" in caplog.messages
    rig.sink.refuses = None
    rig.vector(0).signal()
    rig.control(ENABLE | MASK)
    rig.control(ENABLE)
    assert rig.took() == [0x40]


def test_close_gives_every_vector_back(rig: Rig) -> None:
    rig.card.close()
    assert all(vector.closed for vector in rig.sink.vectors)


def test_host_that_has_not_enough_vectors_keeps_those_it_gave() -> None:
    class Small(FakeSink):
        def vector(self) -> FakeVector:
            if len(self.vectors) == 3:
                raise HostError("no more eventfds")
            return super().vector()

    sink, card = Small(), Card(bars={0: (0x4000, BarKind.MEM32)})
    with pytest.raises(HostError, match="no more eventfds"):
        card.add_msix(4, sink, card.bars[0], 0, 0x1000)
    assert [vector.closed for vector in sink.vectors] == [True] * 3


@pytest.mark.parametrize(
    ("vectors", "table", "pba"), [(0, 0, 0x1000), (2049, 0, 0x9000), (2, 4, 0x1000), (2, 0, 0x1004)]
)
def test_impossible_msix_is_refused(vectors: int, table: int, pba: int) -> None:
    card, sink = Card(bars={0: (0x10000, BarKind.MEM64)}), FakeSink()
    with pytest.raises(ValueError, match="no MSI-X with"):
        card.add_msix(vectors, sink, card.bars[0], table, pba)
    assert sink.vectors == []


OPERATIONS = st.one_of(
    st.tuples(st.just("signal"), st.integers(0, VECTORS - 1), st.just(0)),
    st.tuples(st.just("mask"), st.integers(0, VECTORS - 1), st.integers(0, 1)),
    st.tuples(st.just("control"), st.sampled_from([0, ENABLE, MASK, ENABLE | MASK]), st.just(0)),
    st.tuples(st.just("command"), st.sampled_from([Command.MEMORY, Command.MEMORY | Command.BUS_MASTER]), st.just(0)),
    st.tuples(st.just("discard"), st.integers(0, VECTORS - 1), st.just(0)),
)


@given(st.lists(OPERATIONS, max_size=40))
@EXAMPLES
def test_every_signal_is_delivered_or_pending_and_no_message_comes_from_nowhere(
    what: list[tuple[str, int, int]],
) -> None:
    rig = Rig()
    for index, message in enumerate(MESSAGES):
        rig.program(index, message)
    masked, control, master, waiting = [False] * VECTORS, 0, True, [False] * VECTORS
    for kind, first, second in what:
        match kind:
            case "signal":
                rig.vector(first).signal()
                waiting[first] = True
            case "discard":
                rig.vector(first).discard()
                waiting[first] = False
            case "mask":
                rig.mask(first, masked=bool(second))
                masked[first] = bool(second)
            case "control":
                rig.control(first)
                control = first
            case _:
                rig.config.enable(first)
                master = bool(first & Command.BUS_MASTER)
        open_ = [control == ENABLE and master and not mask for mask in masked]
        assert sorted(rig.took()) == [0x40 + n for n in range(VECTORS) if open_[n] and waiting[n]]
        waiting = [wait and not opened for wait, opened in zip(waiting, open_, strict=True)]
        assert rig.pending() == sum(1 << n for n in range(VECTORS) if waiting[n])
    rig.board.close()


@given(
    st.lists(st.tuples(st.integers(0, 0x3FFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=30)
)
@EXAMPLES
def test_any_writes_to_the_bar_leave_a_state_that_loads(writes: list[tuple[int, int, int]]) -> None:
    rig = Rig()
    rig.control(ENABLE)
    for offset, size, value in writes:
        rig.board.mmio.write(BASE + offset, size, value & (1 << 8 * size) - 1)
    for index in range(VECTORS):
        rig.vector(index).signal()
    rig.card.pause()
    state = load(CardState, save(rig.card.state))
    rig.card.state = state
    rig.card.post_load()
    rig.board.close()


class MsiRig:
    """A root port, which has MSI."""

    def __init__(self) -> None:
        self.board = Board()
        self.port, self.config = self.board.add_port()
        self.msi = self.config.capability(0x05)
        self.config.enable()

    def program(self, message: MsiMessage, *, enabled: bool = True) -> None:
        self.config.write(self.msi + 4, 4, message.address & 0xFFFF_FFFF)
        self.config.write(self.msi + 8, 4, message.address >> 32)
        self.config.write(self.msi + 12, 2, message.data)
        self.config.write(self.msi + 2, 2, int(enabled))


def test_msi_is_sent_kept_while_masked_and_delivered_on_unmasking() -> None:
    rig = MsiRig()
    message = MsiMessage(0x1_FEE0_1000, 0x4041)
    rig.program(message)
    rig.port.msi.signal()
    assert rig.board.sink.take() == [message]
    rig.config.write(rig.msi + 0x10, 4, 0xFFFF_FFFF)
    rig.port.msi.signal()
    assert (rig.board.sink.take(), rig.config.read(rig.msi + 0x14, 4)) == ([], 1)
    rig.config.write(rig.msi + 0x10, 4, 0)
    assert (rig.board.sink.take(), rig.config.read(rig.msi + 0x14, 4)) == ([message], 0)
    rig.board.close()


def test_msi_has_one_vector_of_64_bits_with_a_mask() -> None:
    rig = MsiRig()
    rig.config.write(rig.msi + 2, 2, 0xFFFF)
    assert rig.config.read(rig.msi + 2, 2) == 0x0181
    rig.config.write(rig.msi + 4, 4, 0xFFFF_FFFF)
    rig.config.write(rig.msi + 12, 4, 0xFFFF_FFFF)
    rig.config.write(rig.msi + 0x14, 4, 0xFFFF_FFFF)
    assert [rig.config.read(rig.msi + at, 4) for at in (4, 12, 0x14)] == [0xFFFF_FFFC, 0xFFFF, 0]
    rig.board.close()


def test_pending_msi_moves_to_another_host_and_reset_forgets_it() -> None:
    rig, there = MsiRig(), MsiRig()
    message = MsiMessage(0xFEE0_1000, 0x41)
    rig.program(message)
    rig.config.write(rig.msi + 0x10, 4, 1)
    rig.port.msi.signal()
    rig.port.pause()
    there.port.state = load(type(rig.port.state), save(rig.port.state))
    there.port.post_load()
    there.config.write(there.msi + 0x10, 4, 0)
    assert there.board.sink.take() == [message]
    with rig.port.lock:
        rig.port.reset()
    rig.config.enable()
    rig.program(message)
    assert (rig.board.sink.take(), rig.config.read(rig.msi + 0x14, 4)) == ([], 0)
    rig.board.close()
    there.board.close()
