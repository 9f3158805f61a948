"""Root ports: bus numbers, windows, the link, and the slot as Linux's pciehp finds it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import Command
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.state import StateError, load, save
from tests.counts import count
from tests.fakes.pci import Accesses, Board, Card, CardState, open_windows

EXAMPLES = settings(max_examples=count(15, 2000), deadline=None)
CARD_ID = 0x1041_1AF4
MEMORY = range(0xC000_0000, 0xC100_0000)
PREFETCHABLE = range(1 << 36, (1 << 36) + (1 << 30))
IO = range(0x2000, 0x3000)
# Registers of the capability (offsets in it)
FLAGS, LINK_CAPABILITY, LINK_CONTROL, LINK_STATUS = 0x02, 0x0C, 0x10, 0x12
SLOT_CAPABILITY, SLOT_CONTROL, SLOT_STATUS, ROOT_CONTROL, ROOT_STATUS = 0x14, 0x18, 0x1A, 0x1C, 0x20
LINK_ACTIVE, PRESENT, POWER_OFF, LINK_DISABLE, BUS_RESET = 0x2000, 0x40, 0x400, 0x10, 0x40


class Rig:
    """A port with a card of all kinds of BARs behind it, on bus 5; its windows open."""

    def __init__(self) -> None:
        self.board = Board()
        self.port, self.above = self.board.add_port(device=2, slot=7, bus=5)
        self.card = Card(
            bars={0: (0x10000, BarKind.MEM64_PREFETCHABLE), 2: (0x1000, BarKind.MEM32), 3: (0x20, BarKind.IO)}
        )
        self.port.plug(self.card)
        self.config = self.board.config(5, 0)
        self.express = self.above.capability(0x10)
        open_windows(self.above, MEMORY, PREFETCHABLE, IO)
        self.place()

    def place(self) -> None:
        self.config.place(0, PREFETCHABLE.start, wide=True)
        self.config.place(2, MEMORY.start)
        self.config.place(3, IO.start)
        self.config.enable()

    def mapped(self) -> list[int | None]:
        return [bar.address for bar in self.card.bars.values()]

    def slot(self, register: int, size: int = 2) -> int:
        return self.above.read(self.express + register, size)

    def write(self, register: int, value: int) -> None:
        self.above.write(self.express + register, 2, value)


ALL = [PREFETCHABLE.start, MEMORY.start, IO.start]
NONE = [None, None, None]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.board.close()


def test_port_is_a_bridge_with_express_and_msi(rig: Rig) -> None:
    assert (rig.above.read(0x0A, 2), rig.above.read(0x0E, 1)) == (0x0604, 1)
    assert [kind for kind, _ in rig.above.capabilities()] == [0x10, 0x05]
    assert rig.slot(FLAGS) == 0x0142  # version 2, root port, slot implemented
    rig.above.write(0x10, 8, 2**64 - 1)
    rig.above.write(0x38, 4, 0xFFFF_FFFF)
    assert [rig.above.read(at, 4) for at in (0x10, 0x14, 0x38)] == [0, 0, 0]  # no BAR, no ROM


def test_card_is_found_by_the_number_of_its_bus_and_nowhere_else(rig: Rig) -> None:
    assert rig.config.read(0, 4) == CARD_ID
    for bus, device, function in ((5, 1, 0), (5, 31, 0), (5, 0, 1), (4, 0, 0), (6, 0, 0), (0, 5, 0)):
        assert rig.board.config(bus, device, function).read(0, 4) == 0xFFFF_FFFF
    rig.above.write(0x18, 4, 0x09_09_00)
    assert (rig.config.read(0, 4), rig.board.config(9, 0).read(0, 4)) == (0xFFFF_FFFF, CARD_ID)


@pytest.mark.parametrize("numbers", [0x00_00_00, 0x04_05_00, 0xFF_00_00, 0x05_06_00])
def test_port_without_sensible_numbers_leads_nowhere(rig: Rig, numbers: int) -> None:
    rig.above.write(0x18, 4, numbers)
    assert [bus for bus in range(256) if rig.board.config(bus, 0).read(0, 4) == CARD_ID] == []
    assert rig.board.config(0, 0).read(0, 4) == 0x0008_1B36


def test_of_two_ports_with_one_bus_the_lower_device_answers(rig: Rig) -> None:
    other, above = rig.board.add_port(device=3, slot=8, bus=5)
    other.plug(Card("other"))
    rig.board.root.find(5, 0)
    assert rig.board.root.find(5, 0) is rig.card
    rig.above.write(0x18, 4, 0)
    assert rig.board.root.find(5, 0) is other.behind
    assert above.read(0x19, 1) == 5


def test_bars_are_mapped_through_the_windows(rig: Rig) -> None:
    assert rig.mapped() == ALL
    assert rig.board.mmio.read(PREFETCHABLE.start + 0x1234, 2) == 0x1234
    assert rig.board.pio.read(IO.start + 4, 1) == 4


def test_windows_close_with_the_ports_command_and_open_again(rig: Rig) -> None:
    rig.above.enable(Command.MEMORY)
    assert rig.mapped() == [PREFETCHABLE.start, MEMORY.start, None]
    rig.above.enable(Command.IO)
    assert rig.mapped() == [None, None, IO.start]
    rig.above.enable()
    assert rig.mapped() == ALL


def test_bar_outside_its_window_is_mapped_once_the_window_reaches_it(rig: Rig) -> None:
    rig.config.place(2, MEMORY.stop)
    assert rig.mapped()[1] is None
    open_windows(rig.above, range(MEMORY.start, MEMORY.stop + (1 << 20)), PREFETCHABLE, IO)
    assert rig.mapped()[1] == MEMORY.stop


def test_window_whose_limit_is_below_its_base_is_closed(rig: Rig) -> None:
    rig.above.write(0x20, 4, 0x0000_FFF0)
    rig.above.write(0x24, 4, 0x0001_FFF1)
    rig.above.write(0x28, 8, 0)
    rig.above.write(0x1C, 2, 0x00F0)
    assert rig.mapped() == NONE


def test_memory_window_takes_a_prefetchable_bar_too(rig: Rig) -> None:
    rig.config.place(0, MEMORY.start + 0x10_0000, wide=True)
    assert rig.mapped()[0] == MEMORY.start + 0x10_0000


def test_window_cannot_reach_beyond_the_host_bridges(rig: Rig) -> None:
    open_windows(rig.above, range(0x4000_0000, 0x5000_0000), PREFETCHABLE)
    rig.config.place(2, 0x4000_0000)  # RAM
    assert rig.mapped()[1] is None


def test_window_registers_have_the_widths_of_the_specification(rig: Rig) -> None:
    for at in range(0x1C, 0x34, 4):
        rig.above.write(at, 4, 0xFFFF_FFFF)
    assert rig.above.read(0x1C, 2) == 0xF1F1
    assert rig.above.read(0x20, 4) == 0xFFF0_FFF0
    assert rig.above.read(0x24, 4) == 0xFFF1_FFF1
    assert (rig.above.read(0x28, 8), rig.above.read(0x30, 4)) == (2**64 - 1, 0xFFFF_FFFF)
    assert rig.mapped() == NONE


def no_io_window(above: Accesses) -> bool:
    """What pci_bridge_check_ranges concludes."""
    above.write(0x1C, 2, 0xE0F0)
    above.write(0x30, 4, 0xFFFF_FFFF)
    return (above.read(0x1C, 2), above.read(0x30, 4)) == (0, 0)


def test_port_has_an_io_window_only_while_its_card_has_ports(rig: Rig) -> None:
    board = rig.board
    port, above = board.add_port(device=3, slot=8, bus=6)
    assert no_io_window(above)
    port.plug(Card("memory-alone", bars={0: (0x1000, BarKind.MEM32)}))
    assert no_io_window(above)
    assert not port.forwards.io
    port.unplug()
    rig.port.unplug()
    assert no_io_window(rig.above)
    port.plug(rig.card)
    assert above.read(0x1C, 2) == 0x0101
    assert not no_io_window(above)


def test_state_of_a_port_with_an_io_window_fits_none_without(rig: Rig) -> None:
    there = Board()
    port, _ = there.add_port(device=2, slot=7)
    port.plug(Card())
    port.state = load(type(rig.port.state), save(rig.port.state))
    with pytest.raises(StateError, match="the register byte at 0x1c is 0x21 where this machine has 0x0"):
        port.post_load()
    there.close()


@given(st.lists(st.tuples(st.integers(4, 0x3F), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=12))
@EXAMPLES
def test_whatever_is_written_a_bar_is_mapped_only_inside_an_open_window(writes: list[tuple[int, int, int]]) -> None:
    rig = Rig()
    for offset, size, value in writes:
        rig.above.write(offset, size, value & (1 << 8 * size) - 1)
    header = rig.port.header
    windows = [header.memory, header.prefetchable] if header.command & Command.MEMORY else []
    for bar in rig.card.bars.values():
        forwarded = [header.io] if header.command & Command.IO else []
        if bar.kind is not BarKind.IO:
            forwarded = windows
        inside = bar.programmed is not None and any(
            bar.programmed in window and bar.programmed + bar.size - 1 in window for window in forwarded
        )
        assert bar.address == (bar.programmed if inside and rig.port.reachable else None)
    rig.board.close()


def test_r14_r18_slot_capability_is_what_pciehp_wants(rig: Rig) -> None:
    capability = rig.slot(SLOT_CAPABILITY, 4)
    assert capability >> 19 == 7  # the slot's number
    assert capability & 0x7F == 0x7B  # button, power, both indicators, surprise, hot-plug; no latch
    assert capability >> 18 & 1  # commands need no completion
    link = rig.slot(LINK_CAPABILITY, 4)
    assert (link >> 20 & 1, link >> 21 & 1, link >> 24) == (1, 0, 7)  # reports an active link, no bandwidth events
    assert rig.slot(LINK_STATUS) & 0x3F0
    assert not rig.slot(LINK_STATUS) & 0x800


def test_card_present_at_power_on_has_power_its_indicator_and_a_link(rig: Rig) -> None:
    assert rig.slot(SLOT_CONTROL) == 0x01C0
    assert rig.slot(SLOT_STATUS) == PRESENT
    assert rig.slot(LINK_STATUS) & LINK_ACTIVE


def test_empty_slot_has_no_power_and_no_link() -> None:
    board = Board()
    _, above = board.add_port()
    express = above.capability(0x10)
    assert above.read(express + SLOT_CONTROL, 2) == 0x07C0
    assert above.read(express + SLOT_STATUS, 2) == 0
    assert not above.read(express + LINK_STATUS, 2) & LINK_ACTIVE
    assert above.read(express + LINK_STATUS, 2) & 0x3F0
    board.close()


def test_pciehp_binds_without_an_event_or_a_command_left_over(rig: Rig) -> None:
    """What pcie_init and pcie_enable_notification do."""
    rig.write(SLOT_STATUS, 0x011F)
    assert rig.slot(SLOT_STATUS) == PRESENT
    control = rig.slot(SLOT_CONTROL) | 0x1000 | 0x20 | 0x10 | 0x01
    rig.write(SLOT_CONTROL, control)
    assert rig.slot(SLOT_CONTROL) == control & ~0x10  # no completion, so no interrupt for it
    assert rig.slot(SLOT_STATUS) == PRESENT
    assert rig.mapped() == ALL


def test_slot_and_root_registers_keep_what_they_implement(rig: Rig) -> None:
    rig.port.unplug()
    for register in (SLOT_CONTROL, SLOT_STATUS, ROOT_CONTROL, LINK_CONTROL, ROOT_STATUS):
        rig.write(register, 0xFFFF)
    assert rig.slot(SLOT_CONTROL) == 0x17EB
    assert rig.slot(SLOT_STATUS) == 0
    assert (rig.slot(ROOT_CONTROL), rig.slot(LINK_CONTROL), rig.slot(ROOT_STATUS, 4)) == (0x0F, 0xD3, 0)


def test_r14_r16_slot_events_are_cleared_by_ones_each_for_itself(rig: Rig) -> None:
    rig.port.express.slot_status |= 0x0109
    rig.write(SLOT_STATUS, 0x0008)
    assert rig.slot(SLOT_STATUS) == 0x0101 | PRESENT
    rig.write(SLOT_STATUS, 0x0006)  # those that are not set clear nothing
    assert rig.slot(SLOT_STATUS) == 0x0101 | PRESENT


LINK_SWITCHES = [(SLOT_CONTROL, 0x01C0 | POWER_OFF, 0x01C0), (LINK_CONTROL, LINK_DISABLE, 0)]


@pytest.mark.parametrize(("register", "down", "up"), LINK_SWITCHES)
def test_link_that_goes_down_resets_and_hides_the_card(rig: Rig, register: int, down: int, up: int) -> None:
    rig.config.write(0x3C, 1, 0x0B)
    rig.write(register, down)
    assert not rig.slot(LINK_STATUS) & LINK_ACTIVE
    assert (rig.config.read(0, 4), rig.mapped()) == (0xFFFF_FFFF, NONE)
    rig.write(register, up)
    assert rig.slot(LINK_STATUS) & LINK_ACTIVE
    assert (rig.config.read(0, 4), rig.config.read(0x3C, 1), rig.config.read(0x10, 8)) == (CARD_ID, 0, 0xC)
    rig.place()
    assert rig.mapped() == ALL


def test_secondary_bus_reset_resets_the_card_and_not_the_port(rig: Rig) -> None:
    rig.above.write(0x3E, 2, BUS_RESET)
    assert rig.config.read(0, 4) == 0xFFFF_FFFF
    rig.above.write(0x3E, 2, 0)
    assert (rig.config.read(0, 4), rig.config.read(4, 2)) == (CARD_ID, 0)
    assert rig.card.bus_master == [True, False]
    rig.place()
    assert rig.mapped() == ALL


def test_bridge_control_keeps_what_it_implements(rig: Rig) -> None:
    rig.above.write(0x3E, 2, 0xFFFF & ~BUS_RESET)
    assert rig.above.read(0x3E, 2) == 0x0003


def test_reset_closes_everything_and_keeps_the_card(rig: Rig) -> None:
    rig.write(SLOT_CONTROL, 0x06C0)
    for function in (rig.port, rig.card):
        with function.lock:
            function.reset()
    assert (rig.mapped(), rig.config.read(0, 4), rig.above.read(0x18, 4)) == (NONE, 0xFFFF_FFFF, 0)
    test_card_present_at_power_on_has_power_its_indicator_and_a_link(rig)
    rig.above.write(0x18, 4, 0x05_05_00)
    open_windows(rig.above, MEMORY, PREFETCHABLE, IO)
    rig.place()
    assert rig.mapped() == ALL


@pytest.mark.parametrize("port_first", [True, False])
def test_port_and_card_move_to_another_host_in_any_order(rig: Rig, port_first: bool) -> None:
    there = Rig()
    for function in (there.port, there.card):
        with function.lock:
            function.reset()
    there.port.state = load(type(rig.port.state), save(rig.port.state))
    there.card.state = load(CardState, save(rig.card.state))
    for function in (there.port, there.card) if port_first else (there.card, there.port):
        function.post_load()
    assert there.mapped() == ALL
    assert there.config.read(0, 4) == CARD_ID
    assert save(there.port.state) == save(rig.port.state)
    there.board.close()


def test_whether_a_card_is_present_is_said_by_the_machine_not_by_the_state(rig: Rig) -> None:
    rig.port.unplug()
    rig.port.plug(Card())
    there = Board()
    port, above = there.add_port(device=2, slot=7)
    port.state = load(type(rig.port.state), save(rig.port.state))
    port.post_load()
    express = above.capability(0x10)
    assert above.read(express + SLOT_STATUS, 2) == 0
    assert not above.read(express + LINK_STATUS, 2) & LINK_ACTIVE
    assert there.config(5, 0).read(0, 4) == 0xFFFF_FFFF
    there.close()


def test_slot_is_for_one_card_and_free_again_once_that_has_left(rig: Rig) -> None:
    other = Card("other")
    with pytest.raises(ValueError, match="root7: card is in the slot"):
        rig.port.plug(other)
    rig.port.unplug()
    rig.port.unplug()
    assert (rig.mapped(), rig.config.read(0, 4), rig.slot(SLOT_STATUS)) == (NONE, 0xFFFF_FFFF, 0)
    rig.port.plug(other)
    assert rig.config.read(0, 4) == CARD_ID
    assert rig.board.root.find(5, 0) is other


def test_port_in_no_machine_takes_no_card(rig: Rig) -> None:
    port = RootPort("stray", 1, rig.board.sink, rig.board.clock.timer)
    with pytest.raises(ValueError, match="stray is in no machine yet"):
        port.plug(Card())


def test_bus_below_is_seen_through_ecam_and_ports_alike(rig: Rig) -> None:
    rig.board.pio.write(0xCF8, 4, 0x8000_0000 | 5 << 16)
    assert rig.board.pio.read(0xCFC, 4) == CARD_ID


def test_info_names_the_slot_its_bus_and_its_card(rig: Rig) -> None:
    rig.above.write(rig.above.capability(0x05) + 2, 2, 1)
    assert rig.port.info() == {
        "id": "1b36:000c",
        "bars": {},
        "interrupts": "msi",
        "slot": 7,
        "bus": 5,
        "behind": "card",
    }
    rig.port.unplug()
    assert rig.port.info()["behind"] is None


def test_close_gives_the_vector_back(rig: Rig) -> None:
    rig.port.close()
    assert [vector.closed for vector in rig.board.sink.vectors] == [True]


def test_every_register_of_the_port_survives_any_write(rig: Rig) -> None:
    above: Accesses = rig.above
    for offset in range(0x100):
        for size in (1, 2, 4, 8):
            above.write(offset, size, (1 << 8 * size) - 1)
            above.write(offset, size, 0)
    assert (above.read(0, 4), above.read(0x0E, 1), above.read(0x34, 1)) == (0x000C_1B36, 1, 0x40)
    assert [kind for kind, _ in above.capabilities()] == [0x10, 0x05]
