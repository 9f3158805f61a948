"""Bus: who answers an access, at what offset, in what pieces."""

from __future__ import annotations

import threading

import pytest

from kvmpy import trace
from kvmpy.bus import Bus


class Recorder:
    """A target that keeps what it is told and answers with the offset in each byte."""

    def __init__(self, name: str = "recorder") -> None:
        self.name, self.lock = name, threading.RLock()
        self.seen: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        value = sum((offset + at) << 8 * at for at in range(size))
        self.seen.append(("read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


class Watched(Recorder):
    """A target that notes whether its lock is held by the thread that calls it."""

    def read(self, offset: int, size: int) -> int:
        self.held = not self._free()
        return 0

    def _free(self) -> bool:
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(self.lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        return taken[0]


def test_target_is_told_an_offset_and_not_an_address() -> None:
    bus, target = Bus("pio"), Recorder()
    bus.map(0x3F8, 8, target)
    bus.write(0x3FA, 1, 0x55)
    assert target.seen == [("write", 2, 1, 0x55)]


def test_unclaimed_reads_are_all_ones_and_writes_vanish() -> None:
    bus = Bus("pio")
    bus.write(0x10, 4, 1)
    assert [bus.read(0x10, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF]


@pytest.mark.parametrize("address", [0x0F, 0x0D, 0x16, 0x18])
def test_access_outside_or_across_the_edge_reaches_nobody(address: int) -> None:
    bus, target = Bus("pio"), Recorder()
    bus.map(0x10, 8, target)
    bus.write(address, 4, 0)
    assert bus.read(address, 4) == 0xFFFF_FFFF
    assert target.seen == []


def test_access_across_two_adjacent_windows_reaches_neither() -> None:
    bus, low, high = Bus("pio"), Recorder(), Recorder()
    bus.map(0, 2, low)
    bus.map(2, 2, high)
    assert bus.read(1, 2) == 0xFFFF
    assert low.seen == high.seen == []


def test_first_and_last_byte_belong_to_the_window() -> None:
    bus, target = Bus("pio"), Recorder()
    bus.map(0x10, 8, target)
    assert [bus.read(0x10, 1), bus.read(0x17, 1)] == [0, 7]


def test_wide_read_is_split_to_the_targets_width() -> None:
    bus, target = Bus("pio"), Recorder()
    bus.map(0, 8, target, widest=2)
    assert bus.read(4, 4) == 0x07060504
    assert [entry[:3] for entry in target.seen] == [("read", 4, 2), ("read", 6, 2)]


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_what_is_split_is_neither_longer_nor_shorter_than_the_access(size: int) -> None:
    bus, target = Bus("mmio"), Recorder()
    bus.map(0, 8, target, widest=4)
    value = 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
    bus.write(8 - size, size, value)
    assert bus.read(8 - size, size) == sum((8 - size + at) << 8 * at for at in range(size))
    first = min(4, size)
    rest = [("write", 8 - size + 4, size - 4, value >> 32)] if size > 4 else []
    assert target.seen[: 1 + len(rest)] == [("write", 8 - size, first, value & (1 << 8 * first) - 1), *rest]


def test_wide_write_is_split_from_the_low_end() -> None:
    bus, target = Bus("pio"), Recorder()
    bus.map(0, 8, target, widest=1)
    bus.write(2, 4, 0x44332211)
    assert target.seen == [("write", 2 + at, 1, 0x11 * (at + 1)) for at in range(4)]


def test_overlap_is_refused_and_names_both() -> None:
    bus = Bus("pio")
    bus.map(0x10, 8, Recorder("first"))
    with pytest.raises(ValueError, match=r"pio: second at 0x17\+0x2 overlaps first"):
        bus.map(0x17, 2, Recorder("second"))
    assert len(bus.windows) == 1


def test_unmapped_window_is_unclaimed_and_its_place_is_free() -> None:
    bus, target = Bus("mmio"), Recorder()
    window = bus.map(0x10, 8, target)
    bus.unmap(window)
    assert bus.read(0x10, 1) == 0xFF
    assert bus.map(0x10, 8, target) in bus.windows


def test_unmapping_twice_is_refused() -> None:
    bus = Bus("mmio")
    window = bus.map(0x10, 8, Recorder())
    bus.unmap(window)
    with pytest.raises(ValueError, match="x not in list"):
        bus.unmap(window)


def test_windows_are_listed_by_rising_address() -> None:
    bus = Bus("mmio")
    bus.map(0x30, 1, Recorder())
    bus.map(0x10, 1, Recorder())
    bus.map(0x20, 1, Recorder())
    assert [window.base for window in bus.windows] == [0x10, 0x20, 0x30]


def test_target_is_called_with_its_lock_held() -> None:
    bus, target = Bus("pio"), Watched()
    bus.map(0, 1, target)
    bus.read(0, 1)
    assert target.held


def test_accesses_are_traced_with_bus_device_and_offset() -> None:
    lines: list[str] = []
    bus = Bus("pio")
    bus.map(0x80, 1, Recorder("debug"))
    trace.enable("bus.*", lines.append)
    bus.write(0x80, 1, 0x4B)
    bus.read(0x81, 2)
    trace.disable(lines.append)
    assert [line.split(" ", 2)[2] for line in lines] == [
        "bus.write bus=pio device=debug offset=0x0 size=0x1 value=0x4b",
        "bus.unclaimed bus=pio kind=read addr=0x81 size=0x2",
    ]
