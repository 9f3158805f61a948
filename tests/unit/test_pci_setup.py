"""kvmpy as PCI firmware: what a tree of functions looks like once it was set up."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.boot.pci_scan import Space
from kvmpy.boot.pci_setup import Behind, Sizes, require_room, set_up
from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.decode import PciWindows
from kvmpy.errors import HostError
from kvmpy.machine import layout
from kvmpy.machine.check import ROOT_BUS_SLOTS
from tests.fakes.config_space import (
    DOWNSTREAM,
    IO,
    MEM32,
    MEM64,
    MEM64_PREFETCHABLE,
    ROM,
    UPSTREAM,
    FakeConfigSpace,
    FakeFunction,
    bridge,
)
from tests.fakes.pci import WINDOWS as WINDOWS_OF_BOARD
from tests.fakes.pci import Board, Card

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
IRQS = (16, 17, 18, 19)
DECODE_IO, DECODE_MEMORY, MASTER = 1, 2, 4


WINDOWS = PciWindows(io=range(0x1000, 0x1_0000), mem32=range(0xC000_0000, 0xFEC0_0000), mem64=range(8 * GIB, 16 * GIB))


def booted(*devices: FakeFunction, windows: PciWindows = WINDOWS) -> FakeConfigSpace:
    """``devices`` on bus 0, set up."""
    config = FakeConfigSpace({device << 3: function for device, function in enumerate(devices)})
    set_up(config, windows, IRQS)
    return config


# Finding what is there


def test_a_bus_without_functions_is_left_alone() -> None:
    assert booted().written == []


def test_a_function_that_is_absent_is_never_written_to() -> None:
    config = booted(FakeFunction({0: (MEM32, 4 * KIB)}), bridge())
    assert set(config.written) == {(0, 0 << 3), (0, 1 << 3)}


def test_buses_are_numbered_depth_first() -> None:
    ports = bridge([FakeFunction()], port_type=DOWNSTREAM), bridge(port_type=DOWNSTREAM)
    switch = bridge(ports, port_type=UPSTREAM)
    first, second = bridge([switch]), bridge([FakeFunction()])
    booted(FakeFunction(), first, second)
    assert (first.buses, switch.buses) == ((0, 1, 4), (1, 2, 4))
    assert [port.buses for port in ports] == [(2, 3, 3), (2, 4, 4)]
    assert second.buses == (0, 5, 5)


def test_all_devices_behind_a_conventional_bridge_are_found_but_only_the_first_behind_a_root_port() -> None:
    config = booted(bridge([FakeFunction()], port_type=None))
    behind_any_bridge = config.accesses
    config = booted(bridge([FakeFunction()]))
    assert behind_any_bridge - config.accesses > 20
    conventional = bridge([FakeFunction({0: (MEM32, 16)}) for _ in range(32)], port_type=None)
    booted(conventional)
    assert all(function.bar(0) for function in conventional.below.values())


def test_the_other_functions_of_a_device_are_there_if_the_first_says_so() -> None:
    def at_functions(header_type: int) -> list[int]:
        first = FakeFunction({0: (MEM32, 16)}, header_type=header_type)
        functions = {0: first, 3: FakeFunction({0: (MEM32, 16)}), 7: FakeFunction({0: (MEM32, 16)})}
        set_up(FakeConfigSpace(functions), WINDOWS, IRQS)
        return [devfn for devfn, function in functions.items() if function.bar(0)]

    assert at_functions(0x80) == [0, 3, 7]
    assert at_functions(0x00) == [0]


def test_numbers_from_before_do_not_confuse_the_numbering() -> None:
    first, second = bridge([FakeFunction()]), bridge([bridge([FakeFunction()], port_type=UPSTREAM)])
    first.write(0x18, 4, 0x00_02_02_00)
    second.write(0x18, 4, 0x00_01_01_00)
    booted(first, second)
    assert (first.buses, second.buses) == ((0, 1, 1), (0, 2, 3))


def test_a_second_run_changes_nothing() -> None:
    config = booted(bridge([FakeFunction({0: (MEM64_PREFETCHABLE, 32 * KIB)})], hot_plug=True), FakeFunction(pin=1))
    before = [bytes(function.data) for function in config.functions()]
    set_up(config, WINDOWS, IRQS)
    assert [bytes(function.data) for function in config.functions()] == before


def test_more_bridges_than_buses_are_refused() -> None:
    ports = {devfn: bridge(multi_function=True) for devfn in range(256)}
    with pytest.raises(HostError, match=r"PCI 00:1f\.7: no bus number is left"):
        set_up(FakeConfigSpace(ports), WINDOWS, IRQS)


# BARs


def test_each_bar_goes_to_the_window_of_its_kind() -> None:
    function = FakeFunction({0: (IO, 32), 1: (MEM32, 4 * KIB), 2: (MEM64, 8 * KIB), 4: (MEM64_PREFETCHABLE, MIB)})
    booted(function)
    assert [function.bar(index) for index in function.bars] == [0x1000, 0xC000_2000, 0xC000_0000, 8 * GIB]
    assert function.command == DECODE_IO | DECODE_MEMORY


def test_bars_are_placed_biggest_first_and_so_without_gaps() -> None:
    small, big = FakeFunction({0: (MEM32, 4 * KIB)}), FakeFunction({0: (MEM32, 16 * KIB), 1: (MEM32, 8 * KIB)})
    booted(small, big)
    assert [big.bar(0), big.bar(1), small.bar(0)] == [0xC000_0000, 0xC000_4000, 0xC000_6000]


def test_a_bar_of_4_gib_and_more_is_sized() -> None:
    function = FakeFunction({2: (MEM64_PREFETCHABLE, 8 * GIB)})
    booted(function)
    assert function.bar(2) == 8 * GIB


def test_a_rom_has_a_place_and_stays_disabled() -> None:
    function = FakeFunction(rom=64 * KIB)
    booted(FakeFunction({0: (MEM32, 128 * KIB)}), function)
    assert function.read(ROM[0], 4) == 0xC002_0000


def test_bars_are_sized_while_nothing_decodes() -> None:
    function = FakeFunction({0: (MEM32, 4 * KIB), 1: (IO, 16)})
    function.write(0x04, 2, DECODE_IO | DECODE_MEMORY | MASTER)
    booted(function)
    assert not function.sized_while_decoding
    assert function.command == DECODE_IO | DECODE_MEMORY | MASTER


def test_a_function_answers_only_where_it_has_a_bar() -> None:
    functions = FakeFunction(), FakeFunction({0: (IO, 16)}), FakeFunction({0: (MEM64_PREFETCHABLE, 16)})
    booted(*functions)
    assert [function.command for function in functions] == [0, DECODE_IO, DECODE_MEMORY]


# Bridges


def test_a_window_is_as_large_as_what_is_behind_the_bridge() -> None:
    endpoint = FakeFunction({0: (MEM32, MIB), 1: (MEM32, 4 * KIB), 2: (MEM64_PREFETCHABLE, 2 * MIB)})
    port = bridge([endpoint])
    booted(port)
    assert port.mem32 == range(0xC000_0000, 0xC020_0000)
    assert port.mem64 == range(8 * GIB, 8 * GIB + 2 * MIB)
    assert port.command == DECODE_MEMORY | MASTER


def test_a_window_is_aligned_as_what_is_in_it() -> None:
    endpoint, other = FakeFunction({0: (MEM32, 4 * MIB)}), FakeFunction({0: (MEM32, 8 * MIB), 1: (MEM32, MIB)})
    ports = bridge([endpoint]), bridge([other])
    booted(*ports)
    assert [port.mem32 for port in ports] == [range(0xC0C0_0000, 0xC100_0000), range(0xC000_0000, 0xC090_0000)]
    assert endpoint.bar(0) == 0xC0C0_0000


def test_windows_that_are_not_needed_are_closed() -> None:
    port = bridge([FakeFunction({0: (MEM32, 16)})])
    booted(port)
    assert (len(port.io), len(port.mem64)) == (0, 0)
    assert port.mem32


def test_an_empty_port_that_takes_nothing_later_forwards_nothing() -> None:
    port = bridge()
    booted(port)
    assert [len(window) for window in (port.io, port.mem32, port.mem64)] == [0, 0, 0]
    assert port.command == MASTER


def test_a_hot_pluggable_port_has_room_for_what_may_come() -> None:
    empty, taken = bridge(hot_plug=True), bridge([FakeFunction({0: (MEM64_PREFETCHABLE, 32 * KIB)})], hot_plug=True)
    booted(empty, taken)
    for port in (empty, taken):
        assert (len(port.io), len(port.mem32), len(port.mem64)) == (0, 16 * MIB, GIB)
        assert (port.mem32.start % (16 * MIB), port.mem64.start % GIB) == (0, 0)
        assert port.command == DECODE_MEMORY | MASTER


def test_a_hot_pluggable_port_with_more_behind_it_has_a_larger_window() -> None:
    port = bridge([FakeFunction({0: (MEM32, 32 * MIB), 2: (MEM64_PREFETCHABLE, 2 * GIB)})], hot_plug=True)
    booted(port)
    assert (len(port.mem32), len(port.mem64)) == (32 * MIB, 2 * GIB)


def test_ports_are_forwarded_where_an_io_bar_is_below() -> None:
    endpoint = FakeFunction({0: (IO, 32)})
    below = bridge([endpoint], port_type=DOWNSTREAM)
    above = bridge([bridge([below], port_type=UPSTREAM)])
    booted(FakeFunction({0: (IO, 64)}), above, bridge([FakeFunction()]))
    assert above.io == below.io == range(0x1000, 0x2000)
    assert endpoint.bar(0) == 0x1000
    assert above.command == below.command == DECODE_IO | MASTER


def test_an_io_bar_behind_a_bridge_that_forwards_no_ports_stays_off() -> None:
    endpoint = FakeFunction({0: (IO, 32), 1: (MEM32, 32)})
    port = bridge([endpoint], ports=False)
    booted(port)
    assert (endpoint.bar(0), endpoint.command) == (0, DECODE_MEMORY)
    assert (endpoint.bar(1), port.command) == (0xC000_0000, DECODE_MEMORY | MASTER)


def test_io_windows_above_64_kib_have_their_upper_halves() -> None:
    port = bridge([FakeFunction({0: (IO, 32)})])
    booted(port, windows=WINDOWS._replace(io=range(0x12_3000, 0x13_0000)))
    assert port.io == range(0x12_3000, 0x12_4000)


# Interrupts


def test_interrupt_lines_are_swizzled_device_by_device_and_bridge_by_bridge() -> None:
    on_root = [FakeFunction(pin=pin) for pin in (0, 1, 2, 4)]
    endpoint = FakeFunction(pin=1)
    behind_switch = bridge([FakeFunction(), bridge([endpoint], port_type=None)], port_type=None)
    below_port = FakeFunction(pin=3)
    booted(*on_root, bridge([behind_switch]), bridge([below_port], pin=1))
    assert [function.data[0x3C] for function in on_root] == [0, 17, 19, 18]
    assert endpoint.data[0x3C] == 16 + (4 + 0 + 1 + 0 + 0) % 4
    assert below_port.data[0x3C] == 16 + (5 + 0 + 2) % 4


# What does not fit


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (
            {0: (MEM32, 512 * MIB), 1: (MEM32, 512 * MIB)},
            "PCI 00:01.0: the BAR at 0x14, 0x20000000 bytes, does not fit the 32-bit MMIO window",
        ),
        (
            {2: (MEM64_PREFETCHABLE, 8 * GIB), 4: (MEM64_PREFETCHABLE, GIB)},
            "the BAR at 0x20, 0x40000000 bytes, does not fit the 64-bit",
        ),
        (
            {4: (IO, 0x8000), 5: (IO, 0x8000)},
            "the BAR at 0x24, 0x8000 bytes, does not fit the I/O window, 0x1000 to 0xffff",
        ),
    ],
)
def test_a_bar_larger_than_the_window_is_refused(bars: dict[int, tuple[int, int]], message: str) -> None:
    with pytest.raises(HostError, match=message):
        booted(FakeFunction(), FakeFunction(bars))


@pytest.mark.parametrize(
    ("bar", "said"),
    [
        (
            (MEM32, GIB),
            "0x40000000 bytes, and all of the 32-bit MMIO window 0x3ec00000: this machine cannot be given such a "
            "device",
        ),
        (
            (MEM64_PREFETCHABLE, 16 * GIB),
            "0x400000000 bytes, and all of the 64-bit MMIO window 0x200000000: this machine cannot be given such a "
            "device; only more root ports make that larger (docs/passthrough.md)",
        ),
    ],
)
def test_a_bar_larger_than_all_of_the_window_is_not_blamed_on_other_devices(bar: tuple[int, int], said: str) -> None:
    with pytest.raises(HostError, match=f"^PCI 01:00.0: the BAR at 0x10 has {re.escape(said)}$"):
        booted(FakeFunction(), bridge([FakeFunction({0: bar})], hot_plug=True), bridge(hot_plug=True))


@pytest.mark.parametrize(("gib", "fits"), [(4, True), (8, True), (16, True), (32, False)])
def test_as_many_root_ports_as_a_bar_has_gib_make_room_for_it_up_to_16(gib: int, fits: bool) -> None:
    """docs/passthrough.md says so."""
    ports = min(gib, ROOT_BUS_SLOTS)
    base, size = layout.mmio64(GIB, ports)
    windows = PciWindows(WINDOWS.io, WINDOWS.mem32, range(base, base + size))
    card = FakeFunction({0: (MEM64_PREFETCHABLE, gib * GIB)})
    with nullcontext() if fits else pytest.raises(HostError):
        booted(bridge([card], hot_plug=True), *(bridge(hot_plug=True) for _ in range(ports - 1)), windows=windows)


def test_a_port_whose_window_does_not_fit_is_refused() -> None:
    booted(*(bridge(hot_plug=True) for _ in range(8)))
    with pytest.raises(HostError, match=r"PCI 00:08\.0: the window for what is behind it, 0x40000000 bytes,"):
        booted(*(bridge(hot_plug=True) for _ in range(9)))


# All of it, of any tree

sizes = st.integers(4, 22).map(lambda bits: 1 << bits)
kinds = st.sampled_from([MEM32, MEM64, MEM64_PREFETCHABLE])


@st.composite
def endpoints(draw: st.DrawFn) -> FakeFunction:
    bars = {index: (draw(kinds), draw(sizes)) for index in draw(st.sets(st.sampled_from([0, 2, 4])))}
    if draw(st.booleans()):
        bars[5 if 4 not in bars else 1] = (IO, 1 << draw(st.integers(2, 8)))
        bars = {index: bar for index, bar in bars.items() if index - 1 not in bars or not bars[index - 1][0] & 0b100}
    return FakeFunction(bars, rom=draw(st.sampled_from([0, 0, 2 * KIB, 64 * KIB])), pin=draw(st.integers(0, 4)))


def bridges(below: st.SearchStrategy[FakeFunction]) -> st.SearchStrategy[FakeFunction]:
    return st.builds(
        lambda below, hot_plug, express: bridge(below, hot_plug=hot_plug, port_type=DOWNSTREAM if express else None),
        st.lists(below, max_size=1),
        st.booleans(),
        st.booleans(),
    )


trees = st.lists(st.recursive(endpoints(), bridges, max_leaves=4), max_size=5)


def bars(function: FakeFunction, space: str) -> list[range]:
    """Where ``function`` itself answers in ``space``."""
    found = [
        range(function.bar(index), function.bar(index) + size)
        for index, (kind, size) in function.bars.items()
        if {IO: "io", MEM64_PREFETCHABLE: "mem64"}.get(kind, "mem32") == space
    ]
    if function.rom and space == "mem32":
        at = function.read(ROM[function.header_type], 4)
        found.append(range(at, at + function.rom))
    return found


def check(functions: Sequence[FakeFunction], space: str, window: range) -> None:
    own = [bar for function in functions for bar in bars(function, space)]
    forwarded = [getattr(function, space) for function in functions if function.header_type == 1]
    here = sorted([*own, *filter(None, forwarded)], key=lambda extent: extent.start)
    assert all(bar.start % len(bar) == 0 for bar in own)
    assert all(window.start <= extent.start and extent.stop <= window.stop for extent in here)
    assert all(one.stop <= other.start for one, other in pairwise(here))
    for function in functions:
        if function.header_type == 1:
            check(list(function.below.values()), space, getattr(function, space))


@given(trees)
def test_everything_is_in_a_window_of_its_own_at_every_level(devices: list[FakeFunction]) -> None:
    booted(*devices)
    for space in ("io", "mem32", "mem64"):
        check(devices, space, getattr(WINDOWS, space))


def test_setting_up_a_large_machine_takes_few_accesses() -> None:
    ports = [bridge([FakeFunction({0: (MEM64_PREFETCHABLE, 32 * KIB)}, pin=1)], hot_plug=True) for _ in range(30)]
    config = booted(*ports, windows=WINDOWS._replace(mem64=range(32 * GIB, 64 * GIB)))
    assert config.accesses < 30 * 120


# The devices' own PCI bus


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


def test_the_cards_of_a_machine_answer_where_they_were_placed(board: Board) -> None:
    empty, _ = board.add_port(1, 1)
    port, _ = board.add_port(2, 2)
    behind = Card("behind", bars={0: (0x8000, BarKind.MEM64_PREFETCHABLE), 2: (0x1000, BarKind.MEM32)})
    port.plug(behind)
    on_root = Card("on-root", bars={0: (0x100, BarKind.IO), 1: (0x2000, BarKind.MEM32)}, pin=2)
    config = board.add(on_root, 3)
    for _ in range(2):  # at the start and at a reset
        set_up(board.root, WINDOWS_OF_BOARD, IRQS)
        assert [behind.bars[0].address, behind.bars[2].address] == [(1 << 36) + GIB, 0xC100_0000]
        assert [on_root.bars[0].address, on_root.bars[1].address] == [0x1000, 0xC200_0000]
        assert (len(empty.header.memory), len(empty.header.prefetchable)) == (16 * MIB, GIB)
        assert config.read(0x3C, 1) == IRQS[0]
        assert board.config(2, 0).read(0x00, 4) == 0x1041_1AF4
        for function in (empty, port, behind, on_root):
            function.reset()
        assert behind.bars[0].address is None


def test_a_machine_of_ports_alone_is_set_up(board: Board) -> None:
    ports = [board.add_port(device, device)[0] for device in range(1, 31)]
    set_up(board.root, WINDOWS_OF_BOARD, IRQS)
    assert [port.header.secondary for port in ports] == list(range(1, 31))
    assert len({port.header.memory for port in ports}) == 30


# What is to come


def test_r27_a_port_has_room_for_the_bars_of_what_is_hidden_there() -> None:
    expected = {1 << 3: [(Space.MEM64, 4 * GIB), (Space.MEM64, 32 * MIB), (Space.MEM32, 32 * MIB)]}
    port, other = bridge(hot_plug=True), bridge(hot_plug=True)
    windows = PciWindows(io=WINDOWS.io, mem32=WINDOWS.mem32, mem64=range(32 * GIB, 64 * GIB))
    config = FakeConfigSpace({0: FakeFunction(), 1 << 3: port, 2 << 3: other})
    set_up(config, windows, IRQS, expected)
    assert len(port.mem64) == 8 * GIB
    assert port.mem64.start % (4 * GIB) == 0
    assert len(port.mem32) == 32 * MIB
    assert (len(other.mem64), len(other.mem32)) == (GIB, 16 * MIB)


def test_r27_one_that_does_not_fit_is_a_problem_of_the_start() -> None:
    config = FakeConfigSpace({0: FakeFunction(), 1 << 3: bridge(hot_plug=True)})
    with pytest.raises(HostError, match=r"PCI 00:01\.0: a BAR of what is to come behind it has 0x400000000 bytes"):
        set_up(config, WINDOWS, IRQS, {1 << 3: [(Space.MEM64, 16 * GIB)]})


KINDS = {Space.IO: IO, Space.MEM32: MEM32, Space.MEM64: MEM64_PREFETCHABLE}
SIZES = st.lists(
    st.one_of(
        st.tuples(st.just(Space.IO), st.sampled_from([32, 16 * KIB])),
        st.tuples(st.just(Space.MEM32), st.sampled_from([4 * KIB, 16 * MIB, 256 * MIB])),
        st.tuples(st.just(Space.MEM64), st.sampled_from([16 * KIB, GIB, 2 * GIB, 8 * GIB])),
    ),
    max_size=3,
)


def with_bars(sizes: Sizes) -> FakeFunction:
    places = itertools.count(0, 2)
    return FakeFunction({next(places): (KINDS[space], size) for space, size in sizes})


@given(SIZES, st.lists(st.tuples(SIZES, st.booleans()), max_size=4))
def test_whether_there_is_room_is_known_before(on_root: Sizes, behind: list[tuple[Sizes, bool]]) -> None:
    ports = {
        number << 3: bridge([] if is_expected else [with_bars(sizes)], hot_plug=True, ports=not is_expected)
        for number, (sizes, is_expected) in enumerate(behind, 2)
    }
    expected = {number << 3: sizes for number, (sizes, is_expected) in enumerate(behind, 2) if is_expected}
    config = FakeConfigSpace({0: FakeFunction(), 1 << 3: with_bars(on_root), **ports})
    asked = [Behind("root1", () if late else sizes, sizes if late else ()) for sizes, late in behind]
    assert problem(lambda: set_up(config, WINDOWS, IRQS, expected)) == problem(
        lambda: require_room(WINDOWS, on_root, asked)
    )


def problem(attempt: Callable[[], None]) -> str:
    """What does not fit where; whose it is they say differently."""
    try:
        attempt()
    except HostError as e:
        return str(e).partition(", ")[2]
    return ""


def test_what_has_no_room_is_told_by_its_port() -> None:
    behind = [Behind("root1", [(Space.MEM64, 2 * GIB)], ()), Behind("root2", (), ())]
    require_room(WINDOWS, [(Space.MEM64, 16 * KIB)], behind)
    wider = [*behind, Behind("root3", (), [(Space.MEM64, 16 * GIB)])]
    with pytest.raises(HostError, match=r"^root3: a BAR of what is to come behind it has 0x400000000 bytes, and all"):
        require_room(WINDOWS, [(Space.MEM64, 16 * KIB)], wider)
    more = [*behind, Behind("root3", [(Space.MEM64, 4 * GIB)], ()), Behind("root4", (), ())]
    with pytest.raises(HostError, match=r"^a BAR on the root bus, 0x4000 bytes, does not fit"):
        require_room(WINDOWS, [(Space.MEM64, 16 * KIB)], more)
