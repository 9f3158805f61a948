"""A migration stream as text: what is in it, whether its checksums are right, and where it breaks.

It reads what a destination would, with the same code and limits: a whole stream, as `file:` keeps it, one direction of
a main channel, or a page channel. Pages are counted, not shown, and what is compressed is not unpacked; the values of
device state are not judged, for that takes the machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import msgspec

from kvmpy.errors import StreamError
from kvmpy.migration.channel import Channel
from kvmpy.migration.main_channel import MainChannel, printable
from kvmpy.migration.messages import EndOfState, Header, Message, Round, Section, title
from kvmpy.migration.wire import (
    LENGTH_SIZE,
    MAIN,
    OURS,
    PREAMBLE_SIZE,
    RECORD_SIZE,
    PageKind,
    PageRecord,
    Preamble,
    agree,
)

WIDTH: Final = 160  # of a line, unless all is wanted
PIECE: Final = 256 << 10


def lines(channel: Channel, *, width: int | None = WIDTH) -> Iterator[str]:
    """A line for each thing in the stream, with the byte where it begins, and some for what it says.

    Raises StreamError where the stream breaks; all before that has been told.
    """
    preamble, version = _preamble(channel)
    yield (
        f"byte 0: preamble of versions {preamble.lowest} to {preamble.highest}, "
        + ("the main channel" if preamble.channel == MAIN else f"channel {preamble.channel}")
    )
    if preamble.channel == MAIN:
        yield from _messages(MainChannel(channel, version), width)
    else:
        while first := channel.next_byte():
            yield from _round(channel, first)
    yield f"byte {channel.received}: the end"


def _preamble(channel: Channel) -> tuple[Preamble, int]:
    """And the version of the stream."""
    data = channel.receive(PREAMBLE_SIZE)
    try:
        preamble = Preamble.unpack(data)
        return preamble, agree(OURS, preamble)
    except StreamError as e:
        raise StreamError(f"byte 0: {e}") from e


def _messages(main: MainChannel, width: int | None) -> Iterator[str]:
    channel = main.channel
    inline = False
    sections = 0
    while first := channel.next_byte():
        start = channel.received - 1
        message = main.next_message(first=first)
        yield f"byte {start}: {printable(title(message))}, {channel.received - start} bytes"
        yield from _fields(message, width)
        match message:
            case Header():
                inline = message.channels == 0
            case Section():
                sections += 1
            case EndOfState() if message.sections != sections:
                raise StreamError(f"byte {start}: END_OF_STATE of {message.sections} sections: there were {sections}")
            case Round() if inline:
                yield from _round(channel, b"")


def _fields(message: Message, width: int | None) -> Iterator[str]:
    text = msgspec.json.format(msgspec.json.encode(message), indent=4).decode()
    for line in text.splitlines()[1:-1]:
        shown = printable(line)
        yield shown if width is None or len(shown) <= width else f"{shown[: width - 1]}…"


def _round(channel: Channel, first: bytes) -> Iterator[str]:
    """The page records up to an END, or in a page channel to the end of the stream."""
    start = channel.received - len(first)
    records: Counter[PageKind] = Counter()
    pages: Counter[PageKind] = Counter()
    packed = 0
    buffer = bytearray(PIECE)
    while (record := _record(channel, first)).kind is not PageKind.END:
        first = b""
        records[record.kind] += 1
        pages[record.kind] += record.pages
        if record.kind is PageKind.DATA:
            _skip(channel, record.size, buffer)
        elif record.kind is PageKind.ZSTD:
            length = _length(channel, record)
            packed += length
            _skip(channel, length, buffer)
    said = [f"{pages[kind]} {kind.name} in {records[kind]} records" for kind in PageKind if records[kind]]
    if packed:
        said.append(f"{packed} bytes of zstd")
    yield f"byte {start}: pages of round {record.gpa}: {', '.join(said) or 'none'}, {channel.received - start} bytes"


def _record(channel: Channel, first: bytes) -> PageRecord:
    at = channel.received - len(first)
    data = first + channel.receive(RECORD_SIZE - len(first))
    try:
        return PageRecord.unpack(data)
    except StreamError as e:
        raise StreamError(f"byte {at}: {e}") from e


def _length(channel: Channel, record: PageRecord) -> int:
    at = channel.received
    data = channel.receive(LENGTH_SIZE)
    try:
        return record.compressed_length(data)
    except StreamError as e:
        raise StreamError(f"byte {at}: {e}") from e


def _skip(channel: Channel, size: int, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while size:
        piece = view[: min(size, len(view))]
        channel.receive_into(piece)
        size -= len(piece)
