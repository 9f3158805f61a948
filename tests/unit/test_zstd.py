"""zstd by the host's library, beside Python's own: either reads the other's frames, and what is wrong is refused."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.errors import HostError, StreamError
from kvmpy.migration import zstd
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.pages import PageSender
from kvmpy.migration.records import MOST_BATCH
from kvmpy.migration.zstd import MAGIC, Packer, Unpacker
from tests.counts import count
from tests.fakes.frames import packed
from tests.fakes.page_channel import channel_pairs
from tests.unit.test_page_intake import Destination

try:
    from compression import zstd as oracle  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from backports import zstd as oracle

EXAMPLES = count(60, 10_000)
DATA = st.one_of(
    st.binary(max_size=400),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=60), st.integers(0, 20_000)),
).filter(lambda data: len(data) <= MOST_BATCH)
SUMMED = oracle.compress(b"sixteen bytes...", options={oracle.CompressionParameter.checksum_flag: 1})
SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"skip"


def unpacked(frame: bytes, size: int) -> bytes:
    room = bytearray(size)
    Unpacker().unpack(frame, room)
    return bytes(room)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(DATA, min_size=1, max_size=4))
def test_pythons_own_reads_what_is_packed(batches: list[bytes]) -> None:
    packer, room = Packer(), bytearray(MOST_BATCH + 4096)
    for data in batches:
        size = packer.pack(data, room)
        assert oracle.decompress(bytes(room[:size])) == data


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(DATA, min_size=1, max_size=4), st.sampled_from([-5, 1, 3, 19]), st.booleans(), st.booleans())
def test_what_pythons_own_packs_is_read(batches: list[bytes], level: int, checksum: bool, sized: bool) -> None:
    parameter = oracle.CompressionParameter
    options: dict[Any, int] = {
        parameter.compression_level: level,
        parameter.checksum_flag: checksum,
        parameter.content_size_flag: sized,
    }
    unpacker = Unpacker()
    for data in batches:
        room = bytearray(len(data))
        unpacker.unpack(oracle.compress(data, options=options), room)
        assert bytes(room) == data


def test_what_does_not_fit_is_not_packed() -> None:
    packer, data = Packer(), b"again and again " * 100
    size = len(packed(data))
    assert packer.pack(data, bytearray(size - 1)) == 0
    room = bytearray(size + 16)
    assert packer.pack(data, room) == size  # and what failed has left nothing behind
    assert unpacked(bytes(room[:size]), len(data)) == data


@pytest.mark.parametrize(
    ("frame", "size", "why"),
    [
        (packed(b"sixteen bytes...") + SKIPPED, 16, "12 bytes behind the frame"),
        (packed(b"half a b") * 2, 16, "17 bytes behind the frame"),
        (SKIPPED + packed(b"sixteen bytes..."), 16, "no frame begins there"),
        (b"\x27\xb5\x2f\xfd" + packed(b"sixteen bytes...")[4:], 16, "no frame begins there"),
        (b"", 16, "no frame begins there"),
        (packed(b"fifteen bytes.."), 16, "a frame of 15 bytes, not of the 16 it should be"),
        (packed(b"seventeen bytes.."), 16, "Destination buffer is too small"),
        (packed(b"sixteen bytes...")[:-1], 16, "Src size is incorrect"),
        (
            oracle.compress(b"x" * 16, options={oracle.CompressionParameter.checksum_flag: 1})[:-1] + b"?",
            16,
            "checksum",
        ),
    ],
    ids=["skip behind", "two halves", "skip before", "format 0.7", "nothing", "less", "more", "cut", "checksum"],
)
def test_what_is_not_the_one_frame_that_it_should_be_is_refused(frame: bytes, size: int, why: str) -> None:
    with pytest.raises(StreamError, match=f"^zstd: .*{why}"):
        unpacked(frame, size)


def test_frame_with_a_large_window_gets_no_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # RFC 8878, 3.1.1.1: no content size, a window of 2^31 bytes; then the last block, of 16 bytes that are not packed.
    frame = MAGIC + struct.pack("<BB", 0, (31 - 10) << 3) + (16 << 3 | 1).to_bytes(3, "little") + b"sixteen bytes..."
    monkeypatch.setitem(zstd.FUNCTIONS, "ZSTD_sizeof_DCtx", "size_t(*)(const void *)")
    zstd.library.cache_clear()
    unpacker, size_of = Unpacker(), zstd.library()["ZSTD_sizeof_DCtx"]
    room, before = bytearray(16), size_of(unpacker._context)
    unpacker.unpack(frame, room)
    assert room == b"sixteen bytes..."
    assert size_of(unpacker._context) == before < 1 << 20


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A host whose library is not there, or too old."""
    if request.param == "the library":
        monkeypatch.setattr(zstd, "LIBRARY", b"libzstd.so.404")
    else:
        monkeypatch.setattr(zstd, "FUNCTIONS", {"ZSTD_of_tomorrow": "int(*)(void)", **zstd.FUNCTIONS})
    zstd.library.cache_clear()
    yield
    zstd.library.cache_clear()


@pytest.mark.parametrize("missing", ["the library", "a function"], indirect=True)
def test_host_without_it_is_told_what_to_install_before_anything_is_sent(missing: None) -> None:
    said = r"^compression zstd: .*(libzstd\.so\.404|ZSTD_of_tomorrow).*; apt install libzstd1, or choose none$"
    with channel_pairs() as (ours, theirs):
        with pytest.raises(HostError, match=said):
            PageSender(ours, compression="zstd")
        with pytest.raises(HostError, match=said):
            PageReceiver(Destination().memory, theirs, compression="zstd")
        PageSender(ours)
