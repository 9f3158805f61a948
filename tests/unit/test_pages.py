"""The page pump, over socket pairs: what arrives is what was there, on whatever channel; it ends when told to."""

from __future__ import annotations

import os
import random
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.errors import IoctlError, MigrationCancelled, MigrationError
from kvmpy.host.memory import Mapping
from kvmpy.kvm.dirty import ToClear
from kvmpy.memory import GuestMemory, Ram
from kvmpy.migration.checksum import CHUNK, checksums, compare
from kvmpy.migration.dirty import BlockPages, DirtyPages
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.pages import PageSender, RoundStats
from kvmpy.migration.records import BATCH, DATA, END, MOST_BATCH, MOST_PAGES, RECORD, ZERO, ZSTD
from kvmpy.pagebits import PAGE
from tests.counts import count
from tests.fakes.page_channel import FakeChannel, channel_pairs
from tests.fakes.virtio_driver import Bytes

EXAMPLES = count(15, 2000)
LOW, HIGH = 5 << 20, 3 << 20  # odd numbers of 2 MiB blocks
HIGH_GPA = 1 << 32
BOUND = 30.0

KINDS = [
    (1, False, "none"),
    (3, False, "none"),
    (1, True, "none"),
    (3, True, "none"),
    (1, False, "zstd"),
    (2, True, "zstd"),
]
each_kind = pytest.mark.parametrize(("channels", "sealed", "compression"), KINDS)


def make_memory() -> GuestMemory:
    memory = GuestMemory()
    memory.add(Ram(0, LOW, Bytes(LOW)))
    memory.add(Ram(HIGH_GPA, HIGH, Bytes(HIGH)))
    return memory


def content(memory: GuestMemory) -> list[bytes]:
    return [bytes(block.view) for block in memory.blocks]


def scatter(memory: GuestMemory, seed: int, writes: int = 60) -> None:
    """Runs of pages with something in them, in both blocks."""
    chance = random.Random(seed)
    for _ in range(writes):
        block = chance.choice(memory.blocks)
        length = chance.choice([1, 2, 7, 200]) * PAGE
        at = chance.randrange(0, block.size - length, PAGE)
        memory.write(block.gpa + at, chance.randbytes(length))


class Link:
    """A source and a destination, each with memory, and channels between them."""

    def __init__(self, stack: ExitStack, channels: int, *, sealed: bool, compression: str) -> None:
        self.source, self.destination = make_memory(), make_memory()
        ours, theirs = stack.enter_context(channel_pairs(channels, sealed=sealed))
        self.ours, self.theirs = ours, theirs
        self.sender = PageSender(ours, compression=compression)
        self.receiver = PageReceiver(self.destination, theirs, compression=compression)
        stack.callback(self.receiver.close)
        for channel in ours:  # first, or each of the other side notices only a tenth of a second later
            stack.callback(channel.shutdown)
        self.receiver.start()
        self.dirty = DirtyPages(self.source)

    def round(self, number: int) -> RoundStats:
        stats = self.sender.send_round(self.dirty, number)
        self.receiver.wait_round(number, BOUND)
        return stats


@contextmanager
def link(channels: int = 1, *, sealed: bool = False, compression: str = "none") -> Iterator[Link]:
    with ExitStack() as stack:
        yield Link(stack, channels, sealed=sealed, compression=compression)


@each_kind
def test_all_of_memory_arrives_and_then_what_has_changed(channels: int, sealed: bool, compression: str) -> None:
    with link(channels, sealed=sealed, compression=compression) as it:
        scatter(it.source, 1)
        it.dirty.fill()
        stats = it.round(1)
        assert content(it.destination) == content(it.source)
        assert stats.pages == (LOW + HIGH) // PAGE
        assert it.dirty.count() == 0

        it.source.write(HIGH_GPA + 7 * PAGE, b"changed")
        it.source.write(3 * PAGE, bytes(PAGE))
        it.dirty.blocks[0].bits.set(3, 1)
        it.dirty.blocks[1].bits.set(7, 1)
        stats = it.round(2)
        assert content(it.destination) == content(it.source)
        assert (stats.number, stats.pages, stats.zero_pages) == (2, 2, 1)


@each_kind
def test_both_sides_count_the_same(channels: int, sealed: bool, compression: str) -> None:
    with link(channels, sealed=sealed, compression=compression) as it:
        scatter(it.source, 2)
        it.dirty.fill()
        stats = it.round(1)
        assert it.receiver.received == it.sender.sent == (stats.pages, stats.zero_pages, stats.bytes)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, LOW // PAGE), st.sampled_from([1, 3, 64, 600, 1030]), st.booleans()), max_size=20
    ),
    st.integers(1, 5),
    st.booleans(),
)
def test_exactly_the_dirty_pages_arrive(runs: list[tuple[int, int, bool]], channels: int, sealed: bool) -> None:
    with link(channels, sealed=sealed) as it:
        for block in it.destination.blocks:
            block.view[:] = b"o" * block.size
        sent = set()
        for first, length, zero in runs:
            end = min(first + length, LOW // PAGE)
            it.source.blocks[0].view[first * PAGE : end * PAGE] = bytes([0 if zero else 1 + first % 255]) * (
                (end - first) * PAGE
            )
            it.dirty.blocks[0].bits.set(first, length)
            sent |= set(range(first, end))
        stats = it.round(1)
        source, destination = it.source.blocks[0].view, it.destination.blocks[0].view
        old = b"o" * PAGE
        for page in range(LOW // PAGE):
            at = slice(page * PAGE, (page + 1) * PAGE)
            assert destination[at] == (source[at] if page in sent else old)
        assert stats.pages == len(sent)


def test_block_that_begins_anywhere_is_split_among_channels_all_the_same() -> None:
    source, destination = GuestMemory(), GuestMemory()
    gpa, size = 0x1_0000 + 77 * PAGE, 1500 * PAGE
    for memory in (source, destination):
        memory.add(Ram(gpa, size, Bytes(size)))
    source.write(gpa, random.Random(3).randbytes(size))
    dirty = DirtyPages(source)
    dirty.fill()
    with channel_pairs(3) as (ours, theirs):
        receiver = PageReceiver(destination, theirs)
        receiver.start()
        assert PageSender(ours).send_round(dirty, 1).pages == 1500
        receiver.wait_round(1, BOUND)
        receiver.close()
    assert content(destination) == content(source)


def records_of(channel: FakeChannel, until: int = END) -> list[tuple[int, int, int]]:
    """Each record's (gpa, pages, kind) as they lie on a channel, up to one of the kind ``until``."""
    found: list[tuple[int, int, int]] = []
    while not found or found[-1][2] != until:
        record = RECORD.unpack(channel.receive(RECORD.size))
        found.append(record)
        channel.receive(record[1] * PAGE if record[2] == DATA else record[1] if record[2] in (BATCH, ZSTD) else 0)
    return found


def collect_while(channels: Sequence[FakeChannel], call: Callable[[], object]) -> list[list[tuple[int, int, int]]]:
    """The records on each channel until the END mark, while ``call`` is made."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in channels]

    def read(index: int) -> None:
        found[index] = records_of(channels[index])

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(channels))]
    for thread in threads:
        thread.start()
    call()
    for thread in threads:
        thread.join(BOUND)
    return found


def test_page_travels_on_the_channel_of_its_address_in_every_round() -> None:
    memory = make_memory()
    where: dict[int, int] = {}
    with channel_pairs(3) as (ours, theirs):
        sender, dirty = PageSender(ours), DirtyPages(memory)
        for number in (1, 2):
            scatter(memory, number)
            dirty.fill()
            found = collect_while(theirs, lambda number=number: sender.send_round(dirty, number))  # type: ignore[misc]
            for channel, records in enumerate(found):
                for gpa, length, kind in records:
                    for page in range(gpa // PAGE, gpa // PAGE + (length if kind != END else 0)):
                        assert where.setdefault(page, channel) == channel
    assert len(where) == (LOW + HIGH) // PAGE
    assert set(where.values()) == {0, 1, 2}


def test_runs_are_one_record_each_and_none_has_more_pages_than_allowed() -> None:
    memory = make_memory()
    memory.write(0, b"x" * (1100 * PAGE))
    with channel_pairs() as (ours, theirs):
        dirty = DirtyPages(memory)
        dirty.blocks[0].bits.set(0, 1200)
        dirty.blocks[1].bits.set(5, 1)
        (found,) = collect_while(theirs, lambda: PageSender(ours).send_round(dirty, 9))
    assert found == [
        (0, MOST_PAGES, DATA),
        (MOST_PAGES * PAGE, 1100 - MOST_PAGES, DATA),
        (1100 * PAGE, 100, ZERO),
        (HIGH_GPA + 5 * PAGE, 1, ZERO),
        (9, 0, END),
    ]


def test_work_of_python_does_not_grow_with_the_pages() -> None:
    memory = make_memory()
    memory.write(0, b"x" * LOW)
    counts = []
    with link() as it:
        for number, every in enumerate((4, 2)):
            dirty = DirtyPages(memory)
            for page in range(0, LOW // PAGE, every):
                dirty.blocks[0].bits.set(page, 1)
            events: list[str] = []

            def note(frame: FrameType, event: str, _: object, events: list[str] = events) -> None:
                if frame.f_globals["__name__"].startswith("kvmpy."):  # not what dies meanwhile of another test's
                    events.append(event)

            sys.setprofile(note)
            try:
                it.sender.send_round(dirty, number)
            finally:
                sys.setprofile(None)
            counts.append(len(events))
            it.receiver.wait_round(number, BOUND)
    assert 0 < counts[0] == counts[1] < 300


def test_sealed_channel_gets_large_batches_and_nothing_else() -> None:
    memory = make_memory()
    for at in range(0, LOW, 2 * PAGE):
        memory.write(at, b"every other page")
    with channel_pairs(sealed=True) as (ours, theirs):
        dirty = DirtyPages(memory)
        dirty.fill()
        (found,) = collect_while(theirs, lambda: PageSender(ours).send_round(dirty, 1))
    assert {kind for _, _, kind in found} == {BATCH, END}
    assert all(size == length <= MOST_BATCH for size, length, kind in found if kind == BATCH)
    assert all(size > 256 << 10 for size, _, kind in found[:-2])


@pytest.mark.parametrize("sealed", [False, True])
def test_what_does_not_shrink_is_sent_as_it_is_though_compression_was_asked_for(sealed: bool) -> None:
    memory = make_memory()
    memory.write(0, os.urandom(400 * PAGE))
    memory.write(1 << 20, b"again and again " * (1 << 14))
    with channel_pairs(sealed=sealed) as (ours, theirs):
        dirty = DirtyPages(memory)
        for part in (0, 256):
            dirty.blocks[0].bits.set(part, 16)
            (found,) = collect_while(theirs, lambda: PageSender(ours, compression="zstd").send_round(dirty, 1))
            assert [kind for _, _, kind in found] == [ZSTD if part else BATCH, END]


def resident() -> int:
    """Bytes of this process's memory that are really there."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def test_memory_that_was_never_touched_stays_so_on_both_sides() -> None:
    size = 256 << 20
    with ExitStack() as stack:
        memories = []
        for _ in range(2):
            mapping = Mapping(size)
            stack.callback(mapping.close)
            memories.append(memory := GuestMemory())
            stack.callback(memory.close)
            memory.add(Ram(0, size, mapping))
        source, destination = memories
        destination.write(77 * PAGE, b"to be wiped")
        dirty = DirtyPages(source)
        dirty.fill()
        ours, theirs = stack.enter_context(channel_pairs())
        before = resident()
        stats = PageSender(ours).send_round(dirty, 1)
        assert PageReceiver(destination).receive_inline(theirs[0]) == 1
        assert resident() - before < size // 4
        assert stats.zero_pages == stats.pages == size // PAGE
        assert destination.read(77 * PAGE, PAGE) == bytes(PAGE)


def test_single_channel_brings_one_round_inline_and_what_follows_is_untouched() -> None:
    source, destination = make_memory(), make_memory()
    scatter(source, 5)
    dirty = DirtyPages(source)
    dirty.fill()
    with channel_pairs() as (ours, theirs):
        receiver = PageReceiver(destination)
        for number in (4, 5):

            def send(number: int = number) -> None:
                PageSender(ours).send_round(dirty, number)
                ours[0].send(b"and frames go on")

            thread = threading.Thread(target=send)
            thread.start()
            assert receiver.receive_inline(theirs[0]) == number
            assert theirs[0].receive(16) == b"and frames go on"
            thread.join(BOUND)
    assert content(destination) == content(source)


def test_pipe_is_as_good_as_a_socket_and_blocks_afterwards_as_before() -> None:
    source, destination = make_memory(), make_memory()
    scatter(source, 6)
    dirty = DirtyPages(source)
    dirty.fill()
    reading, writing = os.pipe()
    thread = threading.Thread(target=lambda: PageSender([Descriptor(writing)]).send_round(dirty, 1))
    try:
        thread.start()
        assert PageReceiver(destination).receive_inline(Descriptor(reading)) == 1
        thread.join(BOUND)
        assert os.get_blocking(reading)
        assert os.get_blocking(writing)
    finally:
        os.close(reading)
        os.close(writing)
    assert content(destination) == content(source)


def test_file_is_as_good_as_a_socket(tmp_path: Path) -> None:
    source, destination = make_memory(), make_memory()
    scatter(source, 7)
    dirty = DirtyPages(source)
    dirty.fill()
    with (tmp_path / "stream").open("w+b", buffering=0) as file:
        stats = PageSender([Descriptor(file.fileno())]).send_round(dirty, 1)
        assert file.tell() == stats.bytes
        file.seek(0)
        PageReceiver(destination).receive_inline(Descriptor(file.fileno()))
    assert content(destination) == content(source)


class Descriptor(FakeChannel):
    """A channel that is no socket."""

    def __init__(self, fd: int) -> None:
        self._fd, self.timeout = fd, BOUND

    @property
    def raw_fd(self) -> int:
        return self._fd


# Ending


def started(call: Callable[[], object]) -> tuple[threading.Thread, list[Exception]]:
    """``call`` in a thread, and what it raised."""
    raised: list[Exception] = []

    def make() -> None:
        try:
            call()
        except Exception as e:  # noqa: BLE001  the test looks at it
            raised.append(e)

    thread = threading.Thread(target=make)
    thread.start()
    return thread, raised


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(("channels", "sealed"), [(1, False), (3, False), (2, True)])
def test_round_that_nobody_reads_ends_when_it_is_cancelled(channels: int, sealed: bool) -> None:
    memory = make_memory()
    memory.write(0, b"x" * LOW)
    dirty = DirtyPages(memory)
    dirty.fill()
    with channel_pairs(channels, sealed=sealed) as (ours, theirs):
        for channel in ours:
            channel.timeout = 1000.0
        sender = PageSender(ours)
        thread, raised = started(lambda: sender.send_round(dirty, 1))
        for channel in theirs:
            assert select.select([channel.socket], [], [], BOUND)[0]
        sender.cancel()
        thread.join(BOUND)
        assert [type(e) for e in raised] == [MigrationCancelled]
        with pytest.raises(MigrationCancelled):
            sender.send_round(dirty, 1)


@pytest.mark.parametrize("sealed", [False, True])
def test_receiver_that_gets_nothing_ends_when_it_is_closed(sealed: bool) -> None:
    with channel_pairs(2, sealed=sealed) as (_, theirs):
        receiver = PageReceiver(make_memory(), theirs)
        receiver.start()
        thread, raised = started(lambda: receiver.wait_round(1, 1000.0))
        receiver.close()
        thread.join(BOUND)
        assert [type(e) for e in raised] == [MigrationCancelled]


def test_other_side_that_reads_nothing_is_found_by_its_silence() -> None:
    memory = make_memory()
    memory.write(0, b"x" * LOW)
    dirty = DirtyPages(memory)
    dirty.fill()
    with channel_pairs() as (ours, _):
        ours[0].timeout = 0.05
        with pytest.raises(MigrationError, match=r"^page channel 0: nothing passed for 0.05 s: the other side hangs"):
            PageSender(ours).send_round(dirty, 1)


def test_other_side_that_goes_away_ends_the_round_on_every_channel() -> None:
    memory = make_memory()
    memory.write(0, b"x" * LOW)
    dirty = DirtyPages(memory)
    dirty.fill()
    with channel_pairs(3) as (ours, theirs):
        theirs[1].close()
        for channel in ours:
            channel.timeout = 1000.0
        with pytest.raises(MigrationError, match=r"^page channel 1: (EPIPE|ECONNRESET): the other side has closed it$"):
            PageSender(ours).send_round(dirty, 1)


def test_waiting_thread_hears_at_once_that_a_channel_has_failed() -> None:
    with channel_pairs(2) as (ours, theirs):
        receiver = PageReceiver(make_memory(), theirs)
        receiver.start()
        thread, raised = started(lambda: receiver.wait_round(1, 1000.0))
        ours[1].send(RECORD.pack(0, 0, 99))
        thread.join(BOUND)
        assert [str(e) for e in raised] == ["page channel 1: at byte 0x0: no record of kind 99 belongs there"]
        receiver.close()


def test_round_that_does_not_come_names_the_channels_that_lack_it() -> None:
    with channel_pairs(2) as (ours, theirs):
        receiver = PageReceiver(make_memory(), theirs)
        receiver.start()
        ours[0].send(RECORD.pack(1, 0, END))
        wait_until(lambda: receiver.received[2] == RECORD.size)
        said = r"^round 1 of the pages does not arrive; nothing in 0.01 s: page channel 1$"
        with pytest.raises(MigrationError, match=said):
            receiver.wait_round(1, 0.01)
        receiver.close()


def test_round_that_takes_long_to_come_is_waited_for_as_long_as_something_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with channel_pairs(1) as (ours, theirs):
        receiver = PageReceiver(make_memory(), theirs)
        receiver.start()
        coming = iter([RECORD.pack(0, 1, ZERO), RECORD.pack(PAGE, 1, ZERO), RECORD.pack(1, 0, END)])

        def wait_for(ready: Callable[[], bool], timeout: float) -> bool:
            """Time is over with each record."""
            before = receiver.received[2]
            ours[0].send(next(coming))
            wait_until(lambda: receiver.received[2] > before)
            if receiver.received[2] == 3 * RECORD.size:
                wait_until(ready)
            return ready()

        monkeypatch.setattr(receiver._changed, "wait_for", wait_for)
        receiver.wait_round(1, 1.0)
        receiver.close()


def test_round_that_has_come_counts_though_the_channels_are_closed_behind_it() -> None:
    with link(2) as it:
        it.sender.send_round(it.dirty, 1)
        for channel in it.ours:
            channel.close()
        it.receiver.wait_round(1, BOUND)
        with pytest.raises(MigrationError, match="the other side has closed it"):
            it.receiver.wait_round(2, BOUND)


def test_limit_holds_for_all_channels_together() -> None:
    rate = 16 << 20
    with link(3) as it:
        it.source.write(0, random.Random(4).randbytes(LOW))
        it.dirty.fill()
        it.sender.max_bandwidth = rate
        stats = it.round(1)
        # What may be made good, and the last batch of each channel, are not waited for.
        assert stats.seconds >= (stats.bytes - 3 * (rate // 50)) / rate - 0.05
        assert content(it.destination) == content(it.source)


def test_limit_may_be_lifted_while_a_round_waits_for_it() -> None:
    with link() as it:
        it.source.write(0, random.Random(4).randbytes(LOW))
        it.dirty.fill()
        it.sender.max_bandwidth = 1000
        thread, raised = started(lambda: it.round(1))
        wait_until(lambda: it.sender.sent[2] > 0)
        it.sender.max_bandwidth = 0
        thread.join(BOUND)
        assert raised == []
        assert content(it.destination) == content(it.source)


def test_cancelling_does_not_wait_for_the_limit() -> None:
    with link() as it:
        it.source.write(0, random.Random(4).randbytes(LOW))
        it.dirty.fill()
        it.sender.max_bandwidth = 1000
        thread, raised = started(lambda: it.round(1))
        wait_until(lambda: it.sender.sent[2] > 0)
        it.sender.cancel()
        thread.join(BOUND)
        assert [type(e) for e in raised] == [MigrationCancelled]


def test_kvm_that_does_not_clear_its_log_is_named_and_not_the_network() -> None:
    memory = make_memory()
    dirty = DirtyPages(memory)
    dirty.fill()
    with channel_pairs() as (ours, _), open(os.devnull) as no_vm:
        dirty.blocks[0] = BlockPages(memory.blocks[0], dirty.blocks[0].bits, ToClear(no_vm.fileno(), 0))
        with pytest.raises(IoctlError, match=r"^KVM_CLEAR_DIRTY_LOG: ENOTTY$"):
            PageSender(ours).send_round(dirty, 1)
        assert dirty.count() == (LOW + HIGH) // PAGE


# Checksums


def test_checksums_of_equal_memory_are_equal_and_a_difference_has_its_place() -> None:
    size = CHUNK + 3 * PAGE
    ours, theirs = (GuestMemory() for _ in range(2))
    for memory in (ours, theirs):
        memory.add(Ram(1 << 20, size, Bytes(size)))
        memory.add(Ram(HIGH_GPA, PAGE, Bytes(PAGE)))
        memory.write(1 << 20, b"same")
    compare(ours, checksums(theirs))
    theirs.write((1 << 20) + CHUNK, b"!")
    theirs.write(HIGH_GPA + PAGE - 1, b"!")
    with pytest.raises(
        MigrationError, match=r"^RAM differs .* in 2 chunks of 0x1000000, at gpa 0x1100000, 0x100000000$"
    ):
        compare(ours, checksums(theirs))
    with pytest.raises(MigrationError, match="not as many"):
        compare(ours, checksums(theirs)[:1])
