"""Hostile migration streams: whatever comes, a reader takes it or refuses it with a place, in bounded time and room.

Two ways to make them: bytes of good streams changed at random, of which the checksums stop most; and messages whose
checksums are right and whose contents are not. Streams that have broken something once are kept in `streams`.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmpy.errors import StreamError
from kvmpy.migration.channel import Channel
from kvmpy.migration.dump import KINDS as PAGE_KINDS
from kvmpy.migration.dump import lines
from kvmpy.migration.messages import KINDS, Message, encode
from kvmpy.migration.records import BATCH, DATA, MOST_PAGES, RECORD, ZERO
from kvmpy.migration.stop import Stop
from kvmpy.migration.wire import FrameHeader, Preamble
from tests.counts import count
from tests.golden.streams.make import SOURCE, STREAMS, frame, written

CORPUS: Final = Path(__file__).parent / "streams"
EXAMPLES: Final = count(200, 50_000)
# What a reader may take at once for a stream of a few kilobytes: its buffers, and what it says of it.
ROOM: Final = 4 << 20
GOOD: Final = [written(parts) for parts in STREAMS.values()]
PREAMBLE: Final = Preamble(1, 1).pack()
MESSAGES: Final = [part for parts in STREAMS.values() for part in parts if isinstance(part, Message)]


class Bytes(Channel):
    """A stream that is all there, and comes in pieces of ``most`` bytes."""

    def __init__(self, stop: Stop, data: bytes, most: int = 1 << 20) -> None:
        super().__init__("stream", stop, can_answer=False)
        self._left = memoryview(data)
        self._most = most

    def read_some(self, view: memoryview) -> int:
        piece = self._left[: min(len(view), self._most)]
        view[: len(piece)] = piece
        self._left = self._left[len(piece) :]
        return len(piece)

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture(scope="module")
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


def read(stop: Stop, data: bytes, most: int = 1 << 20) -> str:
    """What a reader says of it; anything it raises but StreamError escapes."""
    said = ""
    with closing(Bytes(stop, data, most)) as channel:
        try:
            for line in lines(channel):
                assert line.isprintable()
        except StreamError as e:
            said = str(e) or "nothing"
        assert said or channel.received == len(data), "it has read all there is, or says why not"
    assert len(said) < 1000
    return said


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good stream with some bytes changed, taken out, put in or repeated."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("change", "cut", "insert", "repeat", "end"))):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del data[at : at + draw(st.integers(1, 5000))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=64))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case _:
                del data[at:]
    return bytes(data)


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """A frame with the right checksum: the payload of a good message with some of its values replaced, or any JSON."""
    message = draw(st.sampled_from(MESSAGES))
    value: Any = msgspec.json.decode(encode(message))
    for _ in range(draw(st.integers(0, 3))):
        value = _replaced(draw, value)
    kind = draw(st.just(int(message.KIND)) | st.sampled_from(sorted(KINDS)) | st.integers(0, 0xFFFF))
    payload = msgspec.json.encode(value)
    if draw(st.integers(0, 9)) == 0:
        payload = draw(st.binary(max_size=200))
    return frame(kind, payload)


def _replaced(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with something in it that is something else."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        changed = {**value, key: _replaced(draw, value[key])}
        if draw(st.integers(0, 9)) == 0:
            del changed[key]
        return changed
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _replaced(draw, value[at]), *value[at + 1 :]]
    return draw(JSON)


RECORDS: Final = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.builds(
        RECORD.pack,
        st.integers(0, 1 << 40).map(lambda page: page * 4096) | st.integers(0, 2**64 - 1) | st.integers(0, 64),
        st.integers(0, MOST_PAGES + 1) | st.integers(0, 2**32 - 1) | st.integers(0, 64),
        st.sampled_from(sorted(PAGE_KINDS)),
    ),
    st.lists(st.builds(RECORD.pack, st.just(0), st.integers(0, 3), st.sampled_from((DATA, ZERO))), max_size=3)
    .map(b"".join)
    .map(lambda batch: RECORD.pack(len(batch), len(batch), BATCH) + batch),
)


@settings(max_examples=EXAMPLES)
@given(data=spoilt(), most=st.integers(1, 5000))
def test_spoilt_stream_is_read_or_refused(stop: Stop, data: bytes, most: int) -> None:
    read(stop, data, most)


@settings(max_examples=EXAMPLES)
@given(data=st.binary(max_size=500))
def test_garbage_is_refused(stop: Stop, data: bytes) -> None:
    assert read(stop, data)


@settings(max_examples=EXAMPLES)
@given(frames=st.lists(contents(), max_size=6))
@example(frames=[frame(13, b'{"reason":"' + b"\\u0000" * 5000 + b'"}')])
def test_hostile_messages_with_the_right_checksum_are_read_or_refused(stop: Stop, frames: list[bytes]) -> None:
    read(stop, PREAMBLE + b"".join(frames))


@settings(max_examples=EXAMPLES)
@given(records=st.lists(RECORDS, max_size=6), inline=st.booleans(), rest=st.binary(max_size=100))
def test_hostile_page_records_are_read_or_refused(stop: Stop, records: list[bytes], inline: bool, rest: bytes) -> None:
    start = written(SOURCE[:3]) if inline else Preamble(1, 1, 1, bytes(range(16))).pack()
    read(stop, start + b"".join(records) + rest)


@settings(max_examples=count(50, 5000))
@given(kind=st.sampled_from(sorted(KINDS)), length=st.integers(0, 2**32 - 1), sent=st.binary(max_size=2000))
def test_no_announced_length_makes_room_for_itself(stop: Stop, kind: int, length: int, sent: bytes) -> None:
    data = PREAMBLE + FrameHeader(kind, length, 0).pack() + sent
    tracemalloc.start()
    try:
        assert read(stop, data)
        assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.stream")), ids=lambda path: path.stem)
def test_stream_of_the_corpus_is_refused_for_what_is_wrong_with_it(stop: Stop, path: Path) -> None:
    """What is said of it begins with what is beside it, in a file of the same name."""
    tracemalloc.start()
    try:
        assert read(stop, path.read_bytes()).startswith(path.with_suffix(".txt").read_text().strip())
        assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()


def test_corpus_has_what_it_should() -> None:
    names = {os.path.splitext(name)[0] for name in os.listdir(CORPUS) if name.endswith(".stream")}
    assert names == {path.stem for path in CORPUS.glob("*.txt")}
    assert len(names) >= 10
