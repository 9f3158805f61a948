"""What C answers beside KVM_RUN is what the device would have: Bus, Latch and native.c, without a KVM."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import trace
from kvmpy._native import ffi, lib
from kvmpy.bus import Bus
from kvmpy.kvm.vcpu import MMIO_READ, MMIO_WRITE, PIO_READ, PIO_WRITE, RARE
from kvmpy.latch import Latch
from tests.counts import count

SIZES = (1, 2, 4, 8)


class Memory:
    """A device of plain registers, of which `latch` is one; it keeps what it hears."""

    def __init__(self, offset: int = 0, size: int = 1, mask: int | None = None) -> None:
        self.name, self.lock = "memory", threading.RLock()
        self.latch = Latch(offset, size, mask)
        self.heard: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.heard.append(("read", offset, size))
        return self.latch.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.heard.append(("write", offset, size))


class Exits:
    """KVM_RUN's exits as C finds them, for buses of its own."""

    def __init__(self) -> None:
        self.pio, self.mmio = Bus("pio"), Bus("mmio")
        self._last: Any = ffi.new("struct kvmpy_vcpu *", {"pio": self.pio.native, "mmio": self.mmio.native})

    def answered(self, kind: int, addr: int, size: int, value: int = 0) -> int | None:
        """What C says of this access: None where the device has to hear of it."""
        self._last.kind, self._last.addr, self._last.size, self._last.value = kind, addr, size, value
        if not lib.kvmpy_answered(self._last):
            return None
        answer: int = self._last.value
        return answer


@pytest.fixture
def exits() -> Exits:
    return Exits()


@contextmanager
def traced(name: str) -> Iterator[list[str]]:
    lines: list[str] = []
    trace.enable(name, lines.append)
    try:
        yield lines
    finally:
        trace.disable(lines.append)


@pytest.mark.parametrize("read", [PIO_READ, MMIO_READ])
def test_nobody_is_asked_about_an_address_that_nobody_has(exits: Exits, read: int) -> None:
    assert exits.answered(read, 0x500, 4) == (1 << 64) - 1
    assert exits.answered(read, (1 << 64) - 1, 8) == (1 << 64) - 1


def test_each_bus_answers_for_its_own_addresses(exits: Exits) -> None:
    exits.pio.map(0x10, 8, Memory())
    assert exits.answered(PIO_WRITE, 0x10, 1) is None
    assert exits.answered(MMIO_WRITE, 0x10, 1) is not None


def test_a_device_without_a_latch_hears_of_each_access(exits: Exits) -> None:
    exits.pio.map(0x10, 8, Memory())
    assert [exits.answered(kind, 0x10 + at, 1) for kind in (PIO_READ, PIO_WRITE) for at in range(8)] == [None] * 16


def test_an_exit_that_is_no_access_is_answered_by_nobody(exits: Exits) -> None:
    assert exits.answered(RARE, 0x500, 4) is None


@pytest.mark.parametrize("point", ["bus.read", "bus.write", "bus.unclaimed"])
def test_while_a_bus_is_traced_everybody_hears_of_everything(exits: Exits, point: str) -> None:
    with traced(point):
        assert exits.answered(PIO_READ, 0x500, 1) is None
    assert exits.answered(PIO_READ, 0x500, 1) is not None


def test_other_tracepoints_do_not_make_it_slower(exits: Exits) -> None:
    with traced("serial.*"):
        assert exits.answered(PIO_READ, 0x500, 1) is not None


def test_a_latch_answers_reads_with_its_value_while_it_may(exits: Exits) -> None:
    device = Memory(2, 2)
    exits.mmio.map(0x1000, 8, device, latches=[device.latch])
    device.latch.set(0xABCD, reads=True)
    assert exits.answered(MMIO_READ, 0x1002, 2) == 0xABCD
    device.latch.set(0xABCE)
    assert exits.answered(MMIO_READ, 0x1002, 2) is None


@pytest.mark.parametrize(("offset", "size"), [(2, 1), (3, 1), (0, 4), (2, 4), (1, 2), (4, 2)])
def test_only_an_access_of_exactly_the_latch_is_answered(exits: Exits, offset: int, size: int) -> None:
    device = Memory(2, 2)
    exits.pio.map(0x1000, 8, device, latches=[device.latch])
    device.latch.set(1, reads=True, stores=True)
    assert [exits.answered(kind, 0x1000 + offset, size) for kind in (PIO_READ, PIO_WRITE)] == [None, None]


def test_a_latch_that_stores_takes_what_the_mask_lets_it(exits: Exits) -> None:
    device = Memory(0, 4, mask=0x80FF_FFFC)
    exits.pio.map(0xCF8, 8, device, latches=[device.latch])
    device.latch.set(0, stores=True)
    assert exits.answered(PIO_WRITE, 0xCF8, 4, 0xFFFF_FFFF) is not None
    assert device.latch.value == 0x80FF_FFFC
    assert exits.answered(PIO_READ, 0xCF8, 4) is None
    assert exits.answered(PIO_WRITE, 0xCF8, 4, 4) is not None
    assert device.latch.value == 4


def test_a_value_that_was_heard_is_stored_and_another_heard_of(exits: Exits) -> None:
    device = Memory(mask=0xBF)
    exits.pio.map(0x80, 1, device, latches=[device.latch])
    device.latch.set(0x05)
    for value in (0x00, 0x3F, 0xBF):
        device.latch.heard(value)
    assert [n for n in range(256) if exits.answered(PIO_WRITE, 0x80, 1, n) is not None] == [
        0x00, 0x3F, 0x40, 0x7F, 0xBF, 0xFF
    ]  # fmt: skip
    assert device.latch.value == 0xBF


def test_a_window_that_has_gone_is_not_answered_for(exits: Exits) -> None:
    device = Memory()
    device.latch.set(7, reads=True)
    window = exits.pio.map(0x80, 1, device, latches=[device.latch])
    assert exits.answered(PIO_READ, 0x80, 1) == 7
    exits.pio.unmap(window)
    assert exits.answered(PIO_READ, 0x80, 1) == (1 << 64) - 1


def test_a_window_that_cannot_be_is_refused_and_changes_nothing(exits: Exits) -> None:
    device = Memory()
    device.latch.set(7, reads=True)
    window = exits.pio.map(0x80, 1, device, latches=[device.latch])
    with pytest.raises(OverflowError):
        exits.pio.map((1 << 64) - 16, 16, Memory())
    assert exits.pio.windows == (window,)
    exits.pio.unmap(window)
    assert exits.answered(PIO_READ, 0x80, 1) == (1 << 64) - 1


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_latch_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"a latch of {size} bytes"):
        Latch(0, size)


windows = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(0, 8), st.sampled_from([1, 2, 4])), max_size=6
)
accesses = st.lists(
    st.tuples(st.integers(0, 70), st.sampled_from(SIZES), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30
)


@given(windows, st.integers(0, 7), accesses)
@settings(max_examples=count(100, 5000), deadline=None)
def test_c_and_the_bus_say_the_same(
    places: list[tuple[int, int, int, int]], says: int, made: list[tuple[int, int, bool, int]]
) -> None:
    """C leaves an access alone, or says what the bus would, and then no device would have heard but of its latch."""
    exits = Exits()
    for base, size, offset, latch_size in places:
        device = Memory(offset, latch_size)
        device.latch.set(1, reads=bool(says & 1), stores=bool(says & 2))
        if says & 4:
            device.latch.heard(2)
        try:
            exits.mmio.map(base, size, device, latches=[device.latch])
        except ValueError:  # there is one already
            continue
    for addr, size, is_write, value in made:
        here = [w for w in exits.mmio.windows if w.base <= addr and addr + size <= w.end]
        latches = [latch for w in here for latch in w.latches]
        before = [latch.value for latch in latches]
        answer = exits.answered(MMIO_WRITE if is_write else MMIO_READ, addr, size, value)
        if not here:
            assert answer == (value if is_write else (1 << 64) - 1)
            continue
        exact = (latches[0].native.offset, latches[0].native.size) == (addr - here[0].base, size)
        heard = says & 4 and size == 1 and value == 2
        may = says & 2 or heard if is_write else says & 1
        assert (answer is not None) == bool(exact and may)
        if answer is not None:
            assert answer == (value if is_write else before[0])
        stored = is_write and exact and may
        assert latches[0].value == (value if stored else before[0])


def test_windows_may_come_and_go_while_vcpus_look_them_up() -> None:
    """A vCPU never follows a table that has been given back: under the sanitizer, or by a crash, this would show."""
    exits, over = Exits(), threading.Event()
    others = [Exits() for _ in range(2)]
    for other in others:
        other._last.pio = exits.pio.native

    def look(mine: Exits) -> None:
        while not over.is_set():
            for _ in range(200):
                assert mine.answered(PIO_READ, 0x80, 1) in (5, (1 << 64) - 1)

    threads = [threading.Thread(target=look, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for _ in range(count(1000, 50_000)):
        device = Memory()
        device.latch.set(5, reads=True)
        exits.pio.unmap(exits.pio.map(0x80, 1, device, latches=[device.latch]))
    over.set()
    for thread in threads:
        thread.join()
