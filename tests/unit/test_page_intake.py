"""What comes in as pages is anybody's bytes: it changes RAM where a good record says so, and nothing else, ever.

A model in Python reads the same bytes. Guard bytes around the RAM, and under AddressSanitizer the RAM's ends, show what
reaches further than it may.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmpy._native import ffi, lib
from kvmpy.errors import MigrationCancelled, MigrationError, StreamError
from kvmpy.memory import GuestMemory, Ram
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.records import BATCH, DATA, END, MOST_BATCH, MOST_PAGES, RECORD, ZERO, ZSTD
from kvmpy.pagebits import PAGE
from tests.counts import count
from tests.fakes.frames import packed as frame_of
from tests.fakes.loop import BOUND
from tests.fakes.page_channel import channel_pairs
from tests.fakes.virtio_driver import Bytes

EXAMPLES: Final = count(40, 20_000)
HIGH_GPA: Final = 1 << 32
GUARD: Final = 2 * PAGE
LOW_PAGES: Final = 12
HIGH_PAGES: Final = 5


class Destination:
    """RAM of two blocks, each with guard bytes before and behind, and full of old bytes."""

    def __init__(self) -> None:
        self.memory, self._backings = GuestMemory(), []
        for gpa, pages in ((0, LOW_PAGES), (HIGH_GPA, HIGH_PAGES)):
            backing = Bytes(pages * PAGE + 2 * GUARD)
            backing.view[:] = b"g" * len(backing.view)
            self._backings.append(backing)
            self.memory.add(Ram(gpa, pages * PAGE, backing, GUARD))
            self.memory.write(gpa, b"o" * (pages * PAGE))

    def content(self) -> dict[int, bytes]:
        """Every page by its gpa."""
        return {
            gpa: self.memory.read(gpa, PAGE)
            for block in self.memory.blocks
            for gpa in range(block.gpa, block.end, PAGE)
        }

    def guards(self) -> set[bytes]:
        return {
            bytes(part)
            for backing in self._backings
            for part in (backing.view[:GUARD], backing.view[len(backing.view) - GUARD :])
        }


def receive(
    destination: Destination, data: bytes, *, sealed: bool = False, ahead: bool = False, compression: str = "none"
) -> int:
    """``ahead`` is whether more may be read than one round, as from a channel that is for pages alone."""
    with channel_pairs(sealed=sealed) as (ours, theirs):

        def send() -> None:
            with suppress(StreamError):
                ours[0].send(data)
            ours[0].shutdown()

        sender = threading.Thread(target=send)
        sender.start()
        try:
            receiver = PageReceiver(destination.memory, compression=compression)
            if ahead:
                receiver._inline = receiver._lane("the main channel", theirs[0])
            return receiver.receive_inline(theirs[0])
        finally:
            theirs[0].shutdown()
            sender.join()


def model(content: dict[int, bytes], data: bytes, *, within: bool = False) -> bool:
    """Do what ``data`` says to ``content`` as far as it is right; whether it is, to an END mark or a batch's end."""
    at = 0
    while not within or at < len(data):
        if len(data) - at < RECORD.size:
            return False
        gpa, pages, kind = RECORD.unpack_from(data, at)
        at += RECORD.size
        if kind in (DATA, ZERO):
            size = pages * PAGE if kind == DATA else 0
            if not model_run(content, gpa, pages, data[at : at + size] if size else None):
                return False
            at += size
        elif kind == BATCH and not within:
            right = 0 < gpa <= MOST_BATCH and gpa == pages and at + pages <= len(data)
            if not right or not model(content, data[at : at + pages], within=True):
                return False
            at += pages
        else:
            return bool(kind == END and not within and not pages and gpa < 1 << 32)
    return True


def model_run(content: dict[int, bytes], gpa: int, pages: int, data: bytes | None) -> bool:
    """One record of ``pages`` with ``data``, or of zeros; whether it is right and whole."""
    touched = [gpa + n * PAGE for n in range(min(pages, MOST_PAGES + 1))]
    in_ram = all(each in content for each in touched) and len({each >= HIGH_GPA for each in touched}) == 1
    if not 0 < pages <= MOST_PAGES or not in_ram:
        return False
    whole = data is None or len(data) == pages * PAGE
    for n, each in enumerate(touched):
        piece = bytes(PAGE) if data is None else data[n * PAGE : (n + 1) * PAGE]
        content[each] = piece if whole else b"?"  # one that is cut off may be there in part
    return whole


GPAS = st.one_of(
    st.sampled_from([0, PAGE, 11 * PAGE, 12 * PAGE, HIGH_GPA - PAGE, HIGH_GPA, HIGH_GPA + 4 * PAGE, 1, PAGE - 1]),
    st.sampled_from([(1 << 64) - PAGE, (1 << 64) - 1, 1 << 63, HIGH_GPA + 5 * PAGE]),
    st.integers(0, 20).map(lambda page: page * PAGE),
)
COUNTS = st.one_of(st.integers(0, 14), st.sampled_from([MOST_PAGES, MOST_PAGES + 1, (1 << 32) - 1, 1 << 20, 1 << 31]))


def body(gpa: int, pages: int, cut: int) -> bytes:
    return RECORD.pack(gpa, pages, DATA) + (bytes([65 + pages % 26]) * (min(pages, 14) * PAGE - cut if pages else 0))


RECORDS = st.one_of(
    st.builds(lambda gpa, pages: RECORD.pack(gpa, pages, ZERO), GPAS, COUNTS),
    st.builds(body, GPAS, COUNTS, st.sampled_from([0, 0, 0, 1, PAGE])),
    st.builds(RECORD.pack, GPAS, COUNTS, st.sampled_from([0, END, BATCH, 6, 0xFFFF_FFFF])),
    st.binary(max_size=40),
)
BATCHES = st.lists(RECORDS, min_size=1, max_size=4).map(b"".join)
STREAMS = st.lists(
    st.one_of(RECORDS, BATCHES.map(lambda batch: RECORD.pack(len(batch), len(batch), BATCH) + batch)), max_size=6
).map(lambda parts: b"".join(parts) + RECORD.pack(1, 0, END))


@settings(max_examples=EXAMPLES, deadline=None)
@given(STREAMS, st.booleans(), st.booleans())
@example(RECORD.pack((1 << 64) - PAGE, 2, DATA) + bytes(2 * PAGE), False, False)
@example(RECORD.pack(11 * PAGE, 2, ZERO), True, False)
def test_stream_changes_what_a_model_says_and_nothing_else(data: bytes, sealed: bool, ahead: bool) -> None:
    destination, content = Destination(), Destination().content()
    good = model(content, data)
    try:
        receive(destination, data, sealed=sealed, ahead=ahead)
    except MigrationError:
        assert not good
    else:
        assert good
    found = destination.content()
    assert {gpa for gpa, page in content.items() if page != b"?" and page != found[gpa]} == set()
    assert destination.guards() == {b"g" * GUARD}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.one_of(st.binary(max_size=300), BATCHES), st.integers(0, 2000), st.booleans(), st.booleans(), st.booleans())
def test_packed_batch_of_any_bytes_is_refused_or_done(
    data: bytes, size: int, right: bool, good: bool, sealed: bool
) -> None:
    destination, content = Destination(), Destination().content()
    size = len(data) if right else size
    packed = frame_of(data) if good else data
    fits = good and len(data) == size <= MOST_BATCH and model(content, data, within=True)
    stream = RECORD.pack(size, len(packed), ZSTD) + packed + RECORD.pack(1, 0, END)
    try:
        receive(destination, stream, compression="zstd", sealed=sealed, ahead=True)
    except StreamError:
        assert not fits or not size
    else:
        assert fits
        assert destination.content() == content
    assert destination.guards() == {b"g" * GUARD}


def one(gpa: int, pages: int, kind: int) -> bytes:
    return RECORD.pack(gpa, pages, kind)


REFUSED: Final[dict[str, tuple[bytes, str]]] = {
    "kind": (one(0, 1, 77), "at byte 0x10: no record of kind 77 belongs there"),
    "no pages": (one(0, 0, DATA), "at byte 0x10: a record of kind 1 must not count 0 (of 0x0)"),
    "too many": (one(0, 1025, ZERO), "at byte 0x10: a record of kind 2 must not count 1025 (of 0x0)"),
    "misaligned": (one(0x1800, 1, DATA), "at byte 0x10: 0x1800 is not the beginning of a page"),
    "no RAM": (one(1 << 31, 1, ZERO), "at byte 0x10: 0x80000000+0x1000 is not RAM of this machine"),
    "over the end": (one(11 * PAGE, 2, ZERO), "at byte 0x10: 0xb000+0x2000 is not RAM of this machine"),
    "wraps": (one((1 << 64) - PAGE, 2, ZERO), "at byte 0x10: 0xfffffffffffff000+0x2000 is not RAM of this machine"),
    "end with pages": (one(1, 1, END), "at byte 0x10: a record of kind 3 must not count 1 (of 0x1)"),
    "round": (one(1 << 40, 0, END), "at byte 0x10: the end of round 1099511627776, after round -1"),
    "batch that lies": (one(32, 16, BATCH), "at byte 0x10: a record of kind 5 must not count 16 (of 0x20)"),
    "large batch": (
        one(1 << 20 | 1, 1 << 20 | 1, BATCH),
        "at byte 0x10: a record of kind 5 must not count 1048577 (of 0x100001)",
    ),
    "end in a batch": (
        one(32, 32, BATCH) + one(0, 1, ZERO) + one(1, 0, END),
        "at byte 0x10 and 0x10 of its batch: no record of kind 3 belongs there",
    ),
    "batch in a batch": (one(16, 16, BATCH) + one(16, 16, BATCH), "at byte 0x10: no record of kind 5 belongs there"),
    "cut batch": (one(20, 20, BATCH) + one(0, 1, DATA) + b"only", "at byte 0x10: the stream is cut off"),
    "cut record in a batch": (
        one(24, 24, BATCH) + one(0, 1, ZERO) + bytes(8),
        "at byte 0x10 and 0x10 of its batch: the stream is cut off",
    ),
    "packed without leave": (one(16, 16, ZSTD), "at byte 0x10: a packed batch, where none was agreed"),
    "cut off": (one(0, 1, DATA) + b"only", "at byte 0x10: the stream is cut off"),
    "cut off in a record": (b"only", "at byte 0x10: the stream is cut off"),
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_what_and_where(name: str, ahead: bool) -> None:
    data, why = REFUSED[name]
    with pytest.raises(StreamError) as caught:
        receive(Destination(), one(PAGE, 1, ZERO) + data, ahead=ahead)
    assert str(caught.value) == f"the main channel: {why}"


def test_stream_that_ends_between_records_is_a_closed_connection() -> None:
    with pytest.raises(MigrationError, match=r"^the main channel: the other side has closed it$"):
        receive(Destination(), one(PAGE, 1, ZERO))


@pytest.mark.parametrize(
    ("packed", "size"),
    [
        (lambda: frame_of(one(0, 1, ZERO)), 17),
        (lambda: frame_of(one(0, 1, ZERO) * 2), 16),
        (lambda: frame_of(bytes(64 << 20)), 1 << 20),
        (lambda: frame_of(one(0, 1, ZERO)) * 2, 16),
        (lambda: frame_of(one(0, 1, ZERO))[:-1], 16),
        (lambda: b"not zstd", 16),
    ],
    ids=["shorter", "longer", "a bomb", "two frames", "cut", "garbage"],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_packed_batch_that_is_not_what_it_says_is_refused(packed: Callable[[], bytes], size: int, sealed: bool) -> None:
    frame = packed()
    with pytest.raises(StreamError, match=r"^the main channel: at byte 0x0: zstd: "):
        receive(Destination(), one(size, len(frame), ZSTD) + frame, compression="zstd", sealed=sealed)


def test_rounds_must_follow_one_another() -> None:
    with channel_pairs() as (ours, theirs):
        receiver = PageReceiver(Destination().memory)
        ours[0].send(one(4, 0, END) + one(6, 0, END))
        assert receiver.receive_inline(theirs[0]) == 4
        with pytest.raises(StreamError, match=r"the end of round 6, after round 4$"):
            receiver.receive_inline(theirs[0])


def test_bytes_that_come_one_by_one_are_as_good() -> None:
    destination = Destination()
    page = random.Random(1).randbytes(PAGE)
    data = one(PAGE, 1, DATA) + page + one(2 * PAGE, 1, ZERO) + one(0, 0, END)
    with channel_pairs() as (ours, theirs):
        receiver = PageReceiver(destination.memory, theirs)
        receiver.start()
        for byte in data:
            ours[0].send(bytes([byte]))
        receiver.wait_round(0, 30.0)
        receiver.close()
    content = destination.content()
    assert (content[0][:1], content[PAGE], content[2 * PAGE]) == (b"o", page, bytes(PAGE))


def test_a_batch_that_takes_long_is_given_up_with_the_migration() -> None:
    """In one of a MiB pages may be zeroed for half a minute."""
    destination, zeros = Destination(), one(0, LOW_PAGES, ZERO) * 100
    with channel_pairs() as (_, theirs):
        receiver = PageReceiver(destination.memory, theirs)
        intake, flow = receiver._lanes[0]._intake, receiver._flow.c
        assert lib.kvmpy_intake_apply(intake, flow, ffi.from_buffer(zeros), len(zeros)) == 0
        done = intake.zero_pages
        receiver.close()
        assert lib.kvmpy_intake_apply(intake, flow, ffi.from_buffer(zeros), len(zeros)) == -errno.ECANCELED
        assert intake.zero_pages == done == 100 * LOW_PAGES


@pytest.mark.parametrize("sealed", [False, True])
def test_once_all_has_come_nothing_more_is_taken_in(sealed: bool) -> None:
    destination = Destination()
    with channel_pairs(sealed=sealed) as (ours, theirs):
        receiver = PageReceiver(destination.memory, theirs)
        receiver.start()
        ours[0].send(one(0, 1, DATA) + b"n" * PAGE + one(1, 0, END))
        receiver.wait_round(1, BOUND)
        before = destination.content()
        receiver.finish()
        ours[0].send(one(0, 2, ZERO))
        with pytest.raises(MigrationCancelled):
            receiver.wait_round(2, BOUND)
        receiver.close()
        assert destination.content() == before
