"""What a migration stream is made of: exactly what was sent, within its limits, or a refusal that says where."""

from __future__ import annotations

import tracemalloc
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import MigrationError, StreamError
from kvmpy.migration import messages, wire
from kvmpy.migration.messages import (
    KINDS,
    BlockChecksums,
    Checksums,
    EndOfState,
    Failed,
    Go,
    Header,
    Keepalive,
    Kind,
    Message,
    Origin,
    Refuse,
    Round,
    Section,
    decode,
    encode,
)
from kvmpy.migration.wire import FRAME_SIZE, FrameHeader, Preamble, agree
from kvmpy.state import since
from tests.counts import count
from tests.golden.streams.make import DESTINATION, SOURCE

EXAMPLES = [part for part in (*SOURCE, *DESTINATION) if isinstance(part, Message)]
ORIGIN = Origin(host="a", version="1", name="web1")


def header(description: dict[str, Any]) -> Header:
    return Header(description=description, channels=2, source=ORIGIN)


def deep(depth: int) -> dict[str, Any]:
    """An object of so many, each in the other."""
    return {"x": deep(depth - 1)} if depth > 1 else {}


def test_what_is_just_deep_enough_goes_through() -> None:
    message = header(deep(31))
    assert decode(Kind.HEADER, encode(message)) == message


def test_brackets_in_a_text_are_not_deep() -> None:
    message = header({"x": "[{" * 40, '"[' * 40: ["\\", '\\"[[', [[]] * 40]})
    assert decode(Kind.HEADER, encode(message)) == message


@given(st.lists(st.text('[]{}",x', max_size=4), max_size=40), st.integers(26, 36))
def test_no_text_hides_how_deep_something_is(texts: list[str], depth: int) -> None:
    levels: Any = []
    for _ in range(depth):
        levels = [*texts[:20], levels, *texts[20:]]
    message = header({"x": levels})
    if depth + 3 <= messages.DEPTH_MAX:
        assert decode(Kind.HEADER, encode(message)) == message
    else:
        with pytest.raises(MigrationError, match="more than 32 arrays and objects in each other"):
            encode(message)


def test_there_is_an_example_of_each_kind() -> None:
    assert {message.KIND for message in EXAMPLES} == set(Kind) == set(KINDS)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.KIND.name)
def test_message_that_was_sent_is_the_one_that_comes(message: Message) -> None:
    assert decode(message.KIND, encode(message)) == message


@pytest.mark.parametrize(
    ("kind", "payload", "said"),
    [
        (99, b"{}", "frame of kind 99, which version 4 of the stream does not have"),
        (Kind.GO, b"", "GO: "),
        (Kind.GO, b"[]", "GO: Expected `object`, got `array`"),
        (Kind.GO, b'{"x":1}', "GO: Object contains unknown field `x`"),
        (Kind.GO, b"{} {}", "GO: JSON is malformed: trailing characters"),
        (Kind.ROUND, b'{"number":true,"remaining_bytes":0}', "ROUND: Expected `int`, got `bool`"),
        (Kind.ROUND, b'{"number":-1,"remaining_bytes":0}', "ROUND: Expected `int` >= 0"),
        (Kind.ROUND, b'{"number":1e3,"remaining_bytes":0}', "ROUND: Expected `int`, got `float`"),
        (Kind.ROUND, b'{"number":"1","remaining_bytes":0}', "ROUND: Expected `int`, got `str`"),
        (Kind.ROUND, b'{"number":1%s,"remaining_bytes":0}' % (b"0" * 5000), "ROUND: "),
        (Kind.ROUND, b'{"number":1}', "ROUND: Object missing required field `remaining_bytes`"),
        (Kind.ACCEPT, b'{"token":"AAAA","version":1}', "ACCEPT: Expected `bytes` of length >= 16"),
        (Kind.FAILED, b'{"reason":"\xff"}', "FAILED: "),
        (Kind.SECTION, b'{"device":"%s","section":{}}' % (b"x" * 257), "SECTION: Expected `str` of length <= 256"),
        (Kind.SECTION, b'{"device":"x","section":{"a":%s}}' % (b"[" * 100_000), "SECTION: "),
        (
            Kind.SECTION,
            b'{"device":"x","section":{"a":%s1%s}}' % (b"[" * 32, b"]" * 32),
            "SECTION: more than 32 arrays and objects in each other",
        ),
        (
            Kind.SECTION,
            b'{"device":"x","section":%s1%s}' % (b'{"":' * 33, b"}" * 33),
            "SECTION: more than 32 arrays and objects in each other",
        ),
        (
            Kind.SECTION,
            b'{"device":"x","section":{"a":[%s1]}}' % (b"1," * 300_000),
            "SECTION: about 300004 values, more",
        ),
        (Kind.CHECKSUMS, b'{"blocks":[{"gpa":0,"chunk":4096,"values":"AAAA"}]}', "CHECKSUMS: 64-bit sums are 8 bytes"),
        (Kind.GO, b" " * 70_000, "GO: 70000 bytes, more than 65536"),
    ],
)
def test_hostile_payload_is_refused_by_what_is_wrong_with_it(kind: int, payload: bytes, said: str) -> None:
    with pytest.raises(StreamError) as caught:
        decode(kind, payload)
    assert str(caught.value).startswith(said)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["[]", "{}", "[[[[[[]]]]]]", '{"":{}}', "1e5", '""'])
def test_message_of_nothing_but_tiny_values_takes_little_more_room_than_it_has(value: str) -> None:
    part = count(8, 1)  # of what may come
    most = Section.VALUES // part // (value.count("[") + value.count("{") + 1) - 8
    payload = b'{"device":"x","section":{"a":[%s]}}' % ",".join([value] * most).encode()
    tracemalloc.start()
    try:
        decode(Kind.SECTION, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (64 << 20) // part


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            Section(device="vd0", section={"x": "y" * (16 << 20)}),
            "SECTION of vd0: cannot be sent: 16777251 bytes, more",
        ),
        (Section(device="vd0", section={"x": [0] * 300_000}), "SECTION of vd0: cannot be sent: about 300003 values"),
        (header({"path": "\udcff"}), "HEADER: cannot be sent: "),
        (header({"x": object()}), "HEADER: cannot be sent: "),
        (header(deep(32)), "HEADER: cannot be sent: more than 32 arrays and objects in each other"),
    ],
)
def test_what_would_be_refused_is_not_sent(message: Message, said: str) -> None:
    with pytest.raises(MigrationError) as caught:
        encode(message)
    assert str(caught.value).startswith(said)


def test_reasons_are_cut_to_what_can_be_sent_and_every_byte_of_a_path_can() -> None:
    assert decode(Kind.FAILED, encode(Failed(reason="\0" * 10**6))) == Failed(reason="\0" * 1997 + "...")
    assert Failed(reason="/\udcff").reason == "/\\udcff"
    refuse = Refuse(problems=tuple("\0" * 1000 for _ in range(2000)))
    assert decode(Kind.REFUSE, encode(refuse)) == refuse
    assert refuse.problems[-1] == "and 1001 more"


def test_checksums_come_back_as_they_went() -> None:
    sums = (0, 1, 2**64 - 1)
    sent = Checksums(blocks=(BlockChecksums.of(1 << 32, 2 << 20, sums),))
    received = decode(Kind.CHECKSUMS, encode(sent))
    assert isinstance(received, Checksums)
    assert received.blocks[0].sums == sums


class GrownRound(Message, frozen=True, kw_only=True):
    """ROUND as a second version could have it."""

    KIND = Kind.ROUND
    number: int
    zero_pages: Annotated[int, since(2)] = 7


class NewKind(Message, frozen=True, kw_only=True):
    """A kind that a second version could have, in the place of GO."""

    KIND = Kind.GO
    SINCE = 2


@pytest.fixture
def second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, Kind.ROUND, GrownRound)
    monkeypatch.setitem(KINDS, Kind.GO, NewKind)


@pytest.mark.usefixtures("second_version")
def test_a_new_field_goes_and_comes_in_streams_of_its_version_alone() -> None:
    message = GrownRound(number=1, zero_pages=5)
    old, new = encode(message, 1), encode(message, 2)
    assert (old, new) == (b'{"number":1}', b'{"number":1,"zero_pages":5}')
    assert decode(Kind.ROUND, old, 1) == GrownRound(number=1, zero_pages=7)
    assert decode(Kind.ROUND, new, 2) == message
    with pytest.raises(StreamError, match=r"^ROUND: version 1 of the stream does not have 'zero_pages'$"):
        decode(Kind.ROUND, new, 1)
    with pytest.raises(StreamError, match="unknown field `other`"):
        decode(Kind.ROUND, b'{"number":1,"other":2}', 2)
    with pytest.raises(StreamError, match="does not have 'other'"):
        decode(Kind.ROUND, b'{"number":1,"other":2}', 1)


@pytest.mark.usefixtures("second_version")
def test_a_new_kind_is_none_in_an_older_stream() -> None:
    assert decode(Kind.GO, b"{}", 2) == NewKind()
    with pytest.raises(StreamError, match="frame of kind 9, which version 1 of the stream does not have"):
        decode(Kind.GO, b"{}", 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "version"),
    [((1, 1), (1, 1), 1), ((1, 2), (1, 1), 1), ((1, 1), (1, 2), 1), ((1, 2), (2, 3), 2), ((4, 5), (5, 6), 5)],
)
def test_the_newest_version_that_both_speak_is_spoken(
    ours: tuple[int, int], theirs: tuple[int, int], version: int
) -> None:
    assert agree(Preamble(*ours), Preamble(*theirs)) == agree(Preamble(*theirs), Preamble(*ours)) == version


@pytest.mark.parametrize(("ours", "theirs", "newer"), [((2, 3), (1, 1), "this"), ((1, 1), (2, 3), "that")])
def test_sides_with_no_version_in_common_say_whose_is_too_new(
    ours: tuple[int, int], theirs: tuple[int, int], newer: str
) -> None:
    with pytest.raises(StreamError, match=f"{newer} side's kvmpy is too new"):
        agree(Preamble(*ours), Preamble(*theirs))


def test_this_version_and_the_one_before_are_read_at_least() -> None:
    assert 1 <= wire.OLDEST <= max(1, wire.NEWEST - 1)
    assert Preamble(wire.OLDEST, wire.NEWEST) == wire.OURS


@given(st.integers(1, 2**32 - 1), st.integers(0, 10), st.integers(1, 64), st.binary(min_size=16, max_size=16))
def test_preamble_that_was_sent_is_the_one_that_comes(lowest: int, more: int, channel: int, token: bytes) -> None:
    preamble = Preamble(lowest, min(lowest + more, 2**32 - 1), channel, token)
    assert Preamble.unpack(preamble.pack()) == preamble


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(36), "not a kvmpy migration stream: it begins with 00 00 00 00 00 00 00 00"),
        (b"\x16\x03\x01".ljust(36), "it speaks TLS, and this side does not"),
        (b"\x15\x03\x03".ljust(36), "it wants TLS"),
        (b"QEVM".ljust(36), "QEMU's migration stream"),
        (b"GET / HTTP/1.1".ljust(36), "a web browser's request"),
        (b"SSH-2.0-OpenSSH".ljust(36), "an SSH server"),
        (Preamble(0, 1).pack(), "versions 0 to 1 are none"),
        (Preamble(2, 1).pack(), "versions 2 to 1 are none"),
        (Preamble(1, 1, 65).pack(), "channel 65 of 64"),
        (Preamble(1, 1, 0, bytes([1] * 16)).pack(), "a main channel has no token"),
    ],
)
def test_what_is_no_preamble_is_named_where_it_can_be(data: bytes, said: str) -> None:
    with pytest.raises(StreamError) as caught:
        Preamble.unpack(data)
    assert said in str(caught.value)


@given(st.integers(0, FRAME_SIZE + 13), st.integers(0, 7))
def test_no_bit_of_a_frame_changes_unseen(byte: int, bit: int) -> None:
    payload = b'{"reason":"a"}'
    frame = bytearray(FrameHeader.of(Kind.FAILED, payload).pack() + payload)
    frame[byte] ^= 1 << bit
    with pytest.raises(StreamError):
        read(frame)


def read(frame: bytearray) -> None:
    """As a reader does; a length that has changed has it read a payload that is not this one."""
    FrameHeader.unpack(frame[:FRAME_SIZE]).check(frame[FRAME_SIZE:])


def test_all_the_sections_there_may_be_fit_into_the_count_of_them() -> None:
    assert encode(EndOfState(sections=messages.SECTIONS_MAX, stopped_ns=0))
    assert Section.MOST == messages.SECTIONS_MAX


@pytest.mark.parametrize("message", [Go(), Keepalive(), Round(number=1, remaining_bytes=2)])
def test_messages_do_not_change(message: Message) -> None:
    with pytest.raises(AttributeError):
        message.number = 2  # type: ignore[attr-defined]
    assert msgspec.structs.asdict(message) in ({}, {"number": 1, "remaining_bytes": 2})
