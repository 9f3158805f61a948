"""QMP on the wire: what is found in a byte stream never depends on how it came in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmpy.errors import CommandError
from kvmpy.monitor import protocol
from kvmpy.monitor.protocol import DEEPEST_REQUEST, LONGEST_REQUEST, Parser
from tests.counts import count

EXAMPLES = count(20, 5000)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=3)
# What a byte stream can turn on, more often than chance has it
hostile = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\xff", b"\xc3", b"\n", b" ", b":", b"1", b"x", b'{"a":1}'])
    | st.binary(max_size=3)
).map(b"".join)


def found(*pieces: bytes) -> list[Any]:
    """What a parser finds in ``pieces``; errors as their text."""
    parser = Parser()
    items = [item for piece in pieces for item in parser.feed(piece)]
    return [str(item) if isinstance(item, CommandError) else item for item in items]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@settings(max_examples=EXAMPLES)
@given(st.lists(objects, max_size=4), st.booleans(), st.sampled_from([b"", b"\n", b"\r\n", b" \t "]))
def test_objects_come_back_as_they_were_sent_whatever_is_between_them(
    sent: list[Any], ascii_only: bool, between: bytes
) -> None:
    assert found(between.join(json.dumps(value, ensure_ascii=ascii_only).encode() for value in sent)) == sent


@settings(max_examples=EXAMPLES)
@given(hostile)
@example(b'{"a":"\\\xff{"b":1}')
@example(b'{"a\\')
@example(b"}{}")
def test_any_chunking_finds_the_same(data: bytes) -> None:
    assert found(*single_bytes(data)) == found(data)


@settings(max_examples=EXAMPLES)
@given(hostile, st.integers(0, 100))
def test_any_one_cut_finds_the_same(data: bytes, at: int) -> None:
    assert found(data[:at], data[at:]) == found(data)


@settings(max_examples=EXAMPLES)
@given(hostile)
def test_resync_byte_and_the_next_command_always_get_through(data: bytes) -> None:
    assert found(data + b'\xff{"execute":"stop"}')[-1] == {"execute": "stop"}


REQUEST = '{"execute":"é\\"{}[]\\\\","id":{"a":[1,"}"]}}'.encode()


@pytest.mark.parametrize("at", range(len(REQUEST)))
def test_request_split_at_any_byte_is_found_when_it_is_complete_and_not_before(at: int) -> None:
    parser = Parser()
    assert parser.feed(REQUEST[:at]) == []
    assert parser.feed(REQUEST[at:]) == [json.loads(REQUEST)]


def test_several_requests_in_one_piece_and_a_half_are_found_in_order() -> None:
    parser = Parser()
    assert parser.feed(b'{"a":1}{"b":2}\r\n{"c"') == [{"a": 1}, {"b": 2}]
    assert parser.feed(b":3}") == [{"c": 3}]


GARBAGE = [
    *(b"garbage", b"[1]", b"1", b'"execute"', b"}", b"nul", b"\x00", b"\xc3\xa9"),
    *(b"{garbage}", b'{"a":xyz}', b"{'a':1}", b'{"a":1,}', b"{]", b'{"a" 1}', b"{1:1}"),
    *(b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":' + b"1" * 5000 + b"}"),
    *(b'{"a":"\xc3"}', b'{"a":"\n'),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_answered_once_and_at_once_and_costs_nothing_around_it(garbage: bytes) -> None:
    parser = Parser()
    before, error = parser.feed(b'{"first":1}' + garbage)
    assert before == {"first": 1}
    assert isinstance(error, CommandError)
    assert str(error).startswith("JSON parse error")
    assert parser.feed(b' {"next":2}') == [{"next": 2}]


def test_resync_byte_drops_what_was_unfinished_in_silence() -> None:
    assert found(b'{"execute":"st\xff{"execute":"stop"}\xff\xff') == [{"execute": "stop"}]


def test_longest_request_is_found_and_a_longer_one_ends_the_stream() -> None:
    frame = len(b'{"a":""}')
    longest = b'{"a":"' + b"x" * (LONGEST_REQUEST - frame) + b'"}'
    assert len(found(longest)[0]["a"]) == LONGEST_REQUEST - frame
    longer = longest[:-2] + b'x"}{"execute":"quit"}'
    assert found(longer) == found(*single_bytes(longer)) == [f"JSON parse error: longer than {LONGEST_REQUEST} bytes"]


def test_what_an_unfinished_request_holds_is_bounded() -> None:
    parser = Parser()
    answers = [answer for _ in range(100) for answer in parser.feed(b'{"a":"' + b"x" * 4090)]
    assert len(answers) == 1
    assert parser.broken
    assert len(parser._pending) == 0


@pytest.mark.parametrize("opening", [b'{"a":', b"["])
def test_deepest_request_is_found_and_a_deeper_one_ends_the_stream(opening: bytes) -> None:
    closing = b"}" if opening[:1] == b"{" else b"]"
    inner = DEEPEST_REQUEST - 1
    deepest = b'{"a":' + opening * inner + b"1" + closing * inner + b"}"
    assert found(deepest) == [json.loads(deepest)]
    deeper = b'{"a":' + opening * 40_000
    assert found(deeper) == [f"JSON parse error: nested more than {DEEPEST_REQUEST} deep"]


def test_what_is_found_can_always_be_sent_back() -> None:
    inner = DEEPEST_REQUEST - 1
    (request,) = found(b'{"id":' + b"[" * inner + b'"\\ud800", 1e308, -0.0' + b"]" * inner + b"}")
    assert json.loads(protocol.encode(request)) == request


@settings(max_examples=EXAMPLES)
@given(objects)
def test_what_is_sent_is_one_line_of_ascii(message: dict[str, Any]) -> None:
    data = protocol.reply(message, {"id": message})
    assert data.isascii()
    assert data.endswith(b"\r\n")
    assert data.count(b"\n") == 1
    assert json.loads(data) == {"return": message, "id": message}


def test_event_has_the_time_when_it_happened_and_data_only_where_there_is_some() -> None:
    at_ns = 1_700_000_000_123_456_789
    stop, reset = (json.loads(protocol.event(*said, at_ns)) for said in (("STOP", {}), ("RESET", {"guest": True})))
    assert stop["timestamp"] == {"seconds": 1_700_000_000, "microseconds": 123_456}
    assert stop.keys() == {"event", "timestamp"}
    assert reset["data"] == {"guest": True}
