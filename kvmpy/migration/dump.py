"""A migration stream as text: what is in it, whether its checksums are right, and where it breaks.

It reads what a destination would, with the same code and limits: a whole stream, as `file:` keeps it, one direction of
a main channel, or a page channel. Pages are counted, not shown, and what zstd has packed is not unpacked; the values of
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
from kvmpy.migration.messages import EndOfState, Header, Message, Round, Section, Sections, title
from kvmpy.migration.records import BATCH, DATA, END, MOST_BATCH, MOST_PAGES, RECORD, ZERO, ZSTD
from kvmpy.migration.wire import MAIN, OURS, PREAMBLE_SIZE, Preamble, agree

WIDTH: Final = 160  # of a line, unless all is wanted
PIECE: Final = 256 << 10
PAGE: Final = 4096
KINDS: Final = {DATA: "DATA", ZERO: "ZERO", END: "END", ZSTD: "ZSTD", BATCH: "BATCH"}


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
            case Sections():
                sections += len(message.sections)
            case EndOfState() if message.sections != sections:
                raise StreamError(f"byte {start}: END_OF_STATE of {message.sections} sections: there were {sections}")
            case Round() if inline:
                yield from _round(channel, b"")


def _fields(message: Message, width: int | None) -> Iterator[str]:
    text = msgspec.json.format(msgspec.json.encode(message), indent=4).decode()
    for line in text.splitlines()[1:-1]:
        shown = printable(line)
        yield shown if width is None or len(shown) <= width else f"{shown[: width - 1]}…"


class _Round:
    """What the page records of a round say, those in batches too."""

    def __init__(self) -> None:
        self.records: Counter[int] = Counter()
        self.pages: Counter[int] = Counter()
        self.packed = self.unpacked = 0

    def __str__(self) -> str:
        said = [f"{self.pages[kind]} {KINDS[kind]} in {self.records[kind]} records" for kind in (DATA, ZERO)]
        said = [text for kind, text in zip((DATA, ZERO), said, strict=True) if self.records[kind]]
        if self.records[BATCH]:
            said.append(f"{self.records[BATCH]} batches")
        if self.records[ZSTD]:
            said.append(f"{self.records[ZSTD]} batches of zstd ({self.packed} bytes for {self.unpacked})")
        return ", ".join(said) or "none"

    def take(self, channel: Channel, buffer: bytearray, first: bytes) -> int | None:
        """One record and what belongs to it; the round's number where it is its end."""
        at = channel.received - len(first)
        gpa, pages, kind = _record(first + channel.receive(RECORD.size - len(first)), f"byte {at}")
        self.records[kind] += 1
        match kind:
            case _ if kind == DATA:
                _skip(channel, pages * PAGE, buffer)
                self.pages[kind] += pages
            case _ if kind == ZERO:
                self.pages[kind] += pages
            case _ if kind == ZSTD:
                _skip(channel, pages, buffer)
                self.packed += pages
                self.unpacked += gpa
            case _ if kind == BATCH:
                self._unpack(channel.receive(pages), at + RECORD.size)
        return gpa if kind == END else None

    def _unpack(self, batch: bytes, start: int) -> None:
        at = 0
        while at < len(batch):
            place = f"byte {start + at}"
            if len(batch) - at < RECORD.size:
                raise StreamError(f"{place}: a record that its batch cuts off")
            _, pages, kind = _record(batch[at : at + RECORD.size], place)
            if kind not in (DATA, ZERO):
                raise StreamError(f"{place}: a record of kind {kind} in a batch")
            at += RECORD.size + (pages * PAGE if kind == DATA else 0)
            if at > len(batch):
                raise StreamError(f"{place}: pages that their batch cuts off")
            self.records[kind] += 1
            self.pages[kind] += pages


def _round(channel: Channel, first: bytes) -> Iterator[str]:
    """The page records up to an END, or in a page channel to the end of the stream."""
    start = channel.received - len(first)
    told = _Round()
    buffer = bytearray(PIECE)
    while (number := told.take(channel, buffer, first)) is None:
        first = b""
    yield f"byte {start}: pages of round {number}: {told}, {channel.received - start} bytes"


def _record(data: bytes, place: str) -> tuple[int, int, int]:
    """gpa, pages and kind. Raises StreamError where no memory there is could have such pages."""
    gpa, pages, kind = RECORD.unpack(data)
    if kind not in KINDS:
        raise StreamError(f"{place}: a page record of kind {kind}, which is none")
    if kind in (DATA, ZERO):
        right = 0 < pages <= MOST_PAGES and gpa % PAGE == 0 and gpa + pages * PAGE <= 1 << 64
    elif kind == END:
        right = pages == 0 and gpa < 1 << 32
    else:
        right = 0 < gpa <= MOST_BATCH and 0 < pages <= MOST_BATCH and (kind == ZSTD or gpa == pages)
    if not right:
        raise StreamError(f"{place}: a page record of kind {KINDS[kind]} with {gpa:#x} and {pages}")
    return gpa, pages, kind


def _skip(channel: Channel, size: int, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while size:
        piece = view[: min(size, len(view))]
        channel.receive_into(piece)
        size -= len(piece)
