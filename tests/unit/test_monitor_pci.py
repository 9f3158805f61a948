"""query-pci: what QEMU's says of the same buses."""

from __future__ import annotations

from typing import Any, Final

import pytest

from kvmpy.devices.pci.bar import BarKind
from tests.fakes.monitor import Connect, FakeMachine
from tests.fakes.pci import Board, Card, open_windows

MIB: Final = 1 << 20


@pytest.fixture
def board(machine: FakeMachine) -> Board:
    board = Board()
    machine.board.pci = board.root
    return board


def query(connect: Connect) -> list[dict[str, Any]]:
    (bus,) = connect().ask({"execute": "query-pci"})["return"]
    assert bus.keys() == {"bus", "devices"}
    devices: list[dict[str, Any]] = bus["devices"]
    return devices


def test_the_host_bridge_has_no_id_and_no_interrupt(connect: Connect, board: Board) -> None:
    assert query(connect) == [
        {
            "bus": 0,
            "slot": 0,
            "function": 0,
            "class_info": {"class": 0x0600, "desc": "Host bridge"},
            "id": {"vendor": 0x1B36, "device": 0x0008, "subsystem-vendor": 0x1AF4, "subsystem": 0x1100},
            "irq_pin": 0,
            "qdev_id": "",
            "regions": [],
        }
    ]


def test_a_function_is_shown_with_its_bars_as_the_guest_programmed_them(connect: Connect, board: Board) -> None:
    bars = {0: (0x4000, BarKind.MEM64_PREFETCHABLE), 2: (0x1000, BarKind.MEM32), 3: (0x20, BarKind.IO)}
    config = board.add(Card("net1", bars=bars), 5)
    config.write(0x10, 4, 0x0000_4000)
    config.write(0x14, 4, 0x10)
    config.write(0x18, 4, 0xC000_0000)
    config.write(0x3C, 1, 11)
    config.enable(command=2)
    assert query(connect)[1] == {
        "bus": 0,
        "slot": 5,
        "function": 0,
        "class_info": {"class": 0x0200, "desc": "Ethernet controller"},
        "id": {"vendor": 0x1AF4, "device": 0x1041, "subsystem-vendor": 0x1AF4, "subsystem": 0x0040},
        "irq": 11,
        "irq_pin": 1,
        "qdev_id": "net1",
        "regions": [
            {"bar": 0, "type": "memory", "address": 0x10_0000_4000, "size": 0x4000}
            | {"prefetch": True, "mem_type_64": True},
            {"bar": 2, "type": "memory", "address": 0xC000_0000, "size": 0x1000}
            | {"prefetch": False, "mem_type_64": False},
            {"bar": 3, "type": "io", "address": -1, "size": 0x20},
        ],
    }


def test_what_is_behind_a_port_is_shown_within_it(connect: Connect, board: Board) -> None:
    port, config = board.add_port(slot=1, bus=3)
    port.plug(Card("net1"))
    open_windows(config, range(0xC000_0000, 0xC000_0000 + 2 * MIB), range(1 << 36, (1 << 36) + MIB))
    shown = query(connect)[1]
    assert (shown["qdev_id"], shown["class_info"]["desc"]) == ("root1", "PCI bridge")
    assert shown["id"].keys() == {"vendor", "device"}
    bridge = shown["pci_bridge"]
    assert bridge["bus"] == {
        "number": 0,
        "secondary": 3,
        "subordinate": 3,
        "io_range": {"base": 0, "limit": -1},
        "memory_range": {"base": 0xC000_0000, "limit": 0xC000_0000 + 2 * MIB - 1},
        "prefetchable_range": {"base": 1 << 36, "limit": (1 << 36) + MIB - 1},
    }
    assert [(behind["qdev_id"], behind["bus"], behind["slot"]) for behind in bridge["devices"]] == [("net1", 3, 0)]


def test_an_empty_port_has_nothing_behind_it_and_one_without_a_bus_does_not_say(connect: Connect, board: Board) -> None:
    board.add_port(1, slot=1, bus=3)
    board.add_port(2, slot=2)
    empty, unnumbered = (shown["pci_bridge"] for shown in query(connect)[1:])
    assert empty["devices"] == []
    assert "devices" not in unnumbered


def test_a_guest_that_gives_two_ports_one_bus_is_answered_all_the_same(connect: Connect, board: Board) -> None:
    for number in (1, 2):
        port, _ = board.add_port(number, slot=number, bus=3)
        port.plug(Card(f"net{number}"))
    shown = [[behind["qdev_id"] for behind in port["pci_bridge"]["devices"]] for port in query(connect)[1:]]
    assert shown == [["net1"], ["net1"]]
