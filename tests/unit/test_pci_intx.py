"""INTx: levels on shared wires, disabled and swizzled."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.pci.config import Command
from kvmpy.devices.pci.intx import SharedLine, swizzle
from kvmpy.host.eventfd import EventFd
from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.host import Line
from tests.fakes.pci import Board, Card, CardState

INTERRUPT = 0x0008


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
@settings(max_examples=count(15, 1000), deadline=None)
def test_a_shared_line_is_high_while_any_source_is(changes: list[tuple[int, bool]]) -> None:
    line = Line()
    shared = SharedLine(line)
    sources = [shared.source() for _ in range(4)]
    levels = [False] * 4
    for index, level in changes:
        sources[index].set(level=level)
        levels[index] = level
        assert line.level == any(levels)
    assert all(before != after for before, after in pairwise(line.changes))


def test_every_pin_of_a_bus_reaches_the_line_the_specification_gives() -> None:
    assert [swizzle(pin, device) for device in (0, 1, 5) for pin in (1, 2, 3, 4)] == [
        1,
        2,
        3,
        4,
        2,
        3,
        4,
        1,
        2,
        3,
        4,
        1,
    ]


@pytest.mark.parametrize(("device", "pin", "line"), [(1, 1, 1), (2, 1, 2), (3, 2, 0), (4, 4, 3), (31, 1, 3)])
def test_function_on_bus_0_pulls_its_line(device: int, pin: int, line: int) -> None:
    board = Board()
    card = Card(pin=pin)
    board.add(card, device)
    card.intx.set(level=True)
    assert [wire.level for wire in board.lines] == [n == line for n in range(4)]


def test_function_behind_a_port_pulls_the_line_of_the_port() -> None:
    board = Board()
    port, _ = board.add_port(device=6)
    card = Card(pin=3)
    port.plug(card)
    card.intx.set(level=True)
    assert [wire.level for wire in board.lines] == [True, False, False, False]  # 3 + 6, modulo 4
    port.unplug()
    assert not board.lines[0].high()
    card.intx.set(level=True)  # in nobody's machine
    assert not board.lines[0].high()


def test_level_shows_in_the_status_register_also_while_disabled() -> None:
    board = Board()
    card = Card()
    config = board.add(card, 1)
    card.intx.set(level=True)
    config.enable(Command.INTX_DISABLE)
    assert (config.read(6, 2) & INTERRUPT, board.lines[1].high()) == (INTERRUPT, False)
    config.write(6, 2, 0xFFFF)
    config.enable(0)
    assert (config.read(6, 2) & INTERRUPT, board.lines[1].high()) == (INTERRUPT, True)
    card.intx.set(level=False)
    assert (config.read(6, 2) & INTERRUPT, board.lines[1].high()) == (0, False)


def test_reset_lowers_the_line_and_a_loaded_state_raises_it_again() -> None:
    board, there = Board(), Board()
    card, other = Card(), Card()
    board.add(card, 1)
    there.add(other, 1)
    card.intx.set(level=True)
    other.state = load(CardState, save(card.state))
    other.post_load()
    assert there.lines[1].high()
    with card.lock:
        card.reset()
    assert not board.lines[1].high()
    other.close()
    assert not there.lines[1].high()


def test_function_without_a_pin_pulls_nothing() -> None:
    board = Board()
    card = Card(pin=0)
    config = board.add(card, 1)
    card.intx.set(level=True)
    assert config.read(0x3D, 1) == 0
    assert [line.level for line in board.lines] == [False] * 4


def test_the_kernel_drives_the_line_of_a_functions_slot_beside_the_others() -> None:
    board = Board()
    card = Card()
    board.add(card, 2)
    with EventFd() as trigger, EventFd() as resample:
        attachment = card.intx.wire.attach(trigger, resample)
        (attached,) = board.lines[2].attached
        assert (attached.trigger, attached.resample) == (trigger, resample)
        attachment.close()
        assert board.lines[2].attached == []
        Card().intx.wire.attach(trigger, resample).close()  # in no machine: nobody listens
