"""A function's configuration space: header, capability chain, and accesses of every kind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.config import Capability, Command, ConfigSpace, EndpointHeader, VendorCapability
from kvmpy.devices.pci.express import ExpressCapability
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.registers import Field
from kvmpy.state import StateError, load, save
from tests.counts import count
from tests.fakes.interrupts import FakeSink
from tests.fakes.pci import IDS, Board, Card, CardState

EXAMPLES = settings(max_examples=count(15, 2000), deadline=None)
CONSTANT = [*range(0x04), *range(0x08, 0x0C), 0x0E, *range(0x2C, 0x30), 0x34, 0x3D]


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def full_card(sink: FakeSink | None = None) -> Card:
    """One with everything a function can have, but for MSI-X where there is no sink."""
    card = Card(bars={0: (0x4000, BarKind.MEM64_PREFETCHABLE), 2: (0x1000, BarKind.MEM32), 3: (0x20, BarKind.IO)})
    card.config.add_capability(VendorCapability)
    if sink is not None:
        card.add_msi(sink)
        card.add_msix(5, sink, card.bars[0], 0x1000, 0x2000)
    return card


def test_header_says_who_the_function_is(board: Board) -> None:
    config = board.add(Card(), 3)
    assert config.read(0x00, 4) == IDS.device << 16 | IDS.vendor
    assert config.read(0x08, 4) == IDS.class_code << 8 | IDS.revision
    assert config.read(0x2C, 4) == IDS.subsystem << 16 | IDS.subsystem_vendor
    assert (config.read(0x0E, 1), config.read(0x3D, 1), config.read(0x30, 4)) == (0, 1, 0)


def test_command_keeps_what_pci_express_implements() -> None:
    card = Card()
    card.config_write(4, 2, 0xFFFF)
    assert card.config_read(4, 2) == 0x0547
    card.config_write(5, 1, 0)
    assert card.config_read(4, 2) == 0x0047


def test_errors_in_the_status_register_are_cleared_by_writing_ones() -> None:
    card = Card()
    card.header.status |= 0xF900
    card.config_write(4, 4, 0x0900_0000)
    assert card.config_read(6, 2) == 0xF010
    card.config_write(7, 1, 0xFF)
    assert card.config_read(6, 2) == 0x0010


def test_capabilities_are_a_chain_that_ends(board: Board) -> None:
    config = board.add(full_card(board.sink), 3)
    chain = list(config.capabilities())
    assert [kind for kind, _ in chain] == [0x10, 0x09, 0x05, 0x11]
    assert [at for _, at in chain] == [0x40, 0x7C, 0x80, 0x98]
    assert config.read(6, 2) & 0x10


def test_function_without_capabilities_has_no_list(board: Board) -> None:
    config = board.config(0, 0)
    assert (config.read(0x34, 1), config.read(6, 2)) == (0, 0)
    assert list(config.capabilities()) == []


def test_there_are_no_extended_capabilities(board: Board) -> None:
    config = board.add(full_card(board.sink), 3)
    config.write(0x100, 4, 0xFFFF_FFFF)
    assert {config.read(at, 8) for at in range(0x100, 0x1000, 8)} == {0}


def test_a_chain_that_is_full_takes_no_more() -> None:
    class Big(Capability, size=0x60):
        ID = 0x09

    config = ConfigSpace(EndpointHeader, IDS, 0)
    config.add_capability(Big)
    config.add_capability(Big)
    with pytest.raises(ValueError, match="no room for Big"):
        config.add_capability(Big)


def test_vendor_capability_knows_its_length_and_an_instance_its_constants() -> None:
    class Where(VendorCapability, size=0x10):
        bar = Field(4, 1)
        place = Field(8, 4)

    config = ConfigSpace(EndpointHeader, IDS, 0)
    first, second = config.add_capability(Where, bar=4, place=0x1000), config.add_capability(Where, bar=5)
    assert (first.id, first.next, first.length, first.bar, first.place) == (9, second.offset, 0x10, 4, 0x1000)
    assert (second.next, second.bar, second.place) == (0, 5, 0)


def test_endpoint_on_bus_0_is_integrated_and_has_no_link(board: Board) -> None:
    config = board.add(Card(), 3)
    express = config.capability(0x10)
    assert config.read(express + 2, 2) == 0x0092
    config.write(express + 0x10, 4, 0xFFFF_FFFF)
    assert [config.read(express + at, 4) for at in (0x0C, 0x10, 0x2C, 0x30)] == [0, 0, 0, 0]


def test_endpoint_behind_a_port_reports_the_link_of_its_port(board: Board) -> None:
    port, above = board.add_port(bus=1)
    port.plug(Card())
    config = board.config(1, 0)
    express, port_express = config.capability(0x10), above.capability(0x10)
    assert config.read(express + 2, 2) == 0x0002
    assert config.read(express + 0x12, 2) & 0x3FF == above.read(port_express + 0x12, 2) & 0x3FF == 0x104
    assert config.read(express + 0x0C, 4) & 0x3FF == 0x104
    assert config.read(express + 4, 4) & 7 == above.read(port_express + 4, 4) & 7 == 1  # payloads up to 256 bytes
    assert config.read(express + 8, 2) >> 5 & 7 == 0  # and 128 until somebody asks for more


@given(st.integers(-8, 4100), st.integers(1, 9), st.integers(0, 2**72 - 1))
@EXAMPLES
def test_no_access_is_too_odd_and_constants_stay(offset: int, size: int, value: int) -> None:
    card = full_card()
    before = bytes(card.config.content)
    card.config_write(offset, size, value)
    read = card.config_read(offset, size)
    assert 0 <= read < 1 << 8 * size
    if offset < 0 or offset + size > 4096:
        assert read == (1 << 8 * size) - 1
        assert card.config.content == before
    assert all(card.config.content[at] == before[at] for at in CONSTANT)


@given(st.lists(st.tuples(st.integers(0, 0xFF), st.integers(1, 8), st.integers(0, 2**64 - 1)), max_size=10))
@EXAMPLES
def test_configuration_moves_to_another_host_and_reset_brings_power_on_back(writes: list[tuple[int, int, int]]) -> None:
    here, there = full_card(), full_card()
    fresh = save(here.state)
    for offset, size, value in writes:
        here.config_write(offset, size, value)
    there.state = load(CardState, save(here.state))
    there.post_load()
    assert save(there.state) == save(here.state)
    assert there.config.content == here.config.content
    there.reset()
    assert save(there.state) == fresh


@pytest.mark.parametrize("at", [0, 0x08, 0x2C, 0x34, 0x42, 0x44, 0x10, 0x20, 0x100, 0xFFF])
def test_state_of_another_function_is_refused(at: int) -> None:
    card = full_card()
    state = load(CardState, save(card.state))
    state.pci.config[at] ^= 0x04
    card.state = state
    with pytest.raises(StateError, match=f"card: the register byte at {at:#x} is"):
        card.post_load()


def test_state_without_configuration_or_with_a_table_nobody_has_is_refused() -> None:
    card = Card()
    card.state = CardState()
    with pytest.raises(StateError, match="card: 0 bytes of registers"):
        card.post_load()
    card = Card()
    card.state.pci.msix_table = bytearray(16)
    with pytest.raises(StateError, match="an MSI-X table, and the function has none"):
        card.post_load()


def test_bus_master_hook_hears_of_changes_whatever_causes_them() -> None:
    card = Card()
    card.config_write(4, 2, Command.BUS_MASTER | Command.MEMORY)
    card.config_write(4, 2, Command.BUS_MASTER)
    card.config_write(4, 1, 0)
    card.config_write(4, 1, Command.BUS_MASTER)
    card.reset()
    assert card.bus_master == [True, False, True, False]


def test_bus_master_hook_hears_of_a_loaded_state() -> None:
    there, here = Card(), Card()
    there.config_write(4, 2, Command.BUS_MASTER)
    here.state = load(CardState, save(there.state))
    here.post_load()
    assert here.bus_master == [True]
    here.state = load(CardState, save(Card().state))
    here.post_load()
    assert here.bus_master == [True, False]


def test_info_names_what_the_guest_uses(board: Board) -> None:
    card = full_card(board.sink)
    config = board.add(card, 3)
    config.place(2, 0xC000_0000)
    config.enable()
    assert card.info() == {"id": "1af4:1041", "bars": {"0": None, "2": 0xC000_0000, "3": None}, "interrupts": "intx"}
    config.write(config.capability(0x11) + 2, 2, 0x8000)
    assert card.info()["interrupts"] == "msix"


def test_express_capability_is_version_2_of_full_length() -> None:
    card = Card()
    assert isinstance(card.express, ExpressCapability)
    assert (card.express.flags & 0xF, card.express.SIZE) == (2, 0x3C)


def test_function_can_have_the_lock_of_a_part_of_its_device() -> None:
    lock = threading.RLock()

    class Shared(PciFunction[CardState]):
        def __init__(self) -> None:
            super().__init__("shared", CardState(), IDS, lock=lock)

    function = Shared()
    assert function.lock is function.add_bar(0, 0x1000, BarKind.MEM32, function).lock is lock
