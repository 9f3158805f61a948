"""Streams as files: those of every version load for ever, and stream-dump says what is in any of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path

import pytest
from msgspec.structs import replace

from kvmpy.errors import StreamError
from kvmpy.memory import GuestMemory, Ram
from kvmpy.migration.arrival import Incoming
from kvmpy.migration.channel import FileChannel
from kvmpy.migration.dump import lines
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.messages import EndOfState, Message, Round, Section, Sections, decode, encode
from kvmpy.migration.records import DATA, END, RECORD
from kvmpy.migration.stop import Stop
from kvmpy.migration.wire import FRAME_SIZE, NEWEST, OLDEST, PREAMBLE_SIZE, FrameHeader, Preamble
from tests.fakes.virtio_driver import Bytes
from tests.golden.streams.make import CONTENT, DESTINATION, SOURCE, STREAMS, frame, path, written

VERSIONS = range(OLDEST, NEWEST + 1)
SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "stream-dump"


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


def dump(data: bytes, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "stream").write_bytes(data)
    with Stop() as stop, closing(FileChannel("stream", stop, os.open(tmp_path / "stream", os.O_RDONLY))) as channel:
        yield from lines(channel)


def messages_of(parts: tuple[Message | bytes, ...], version: int) -> list[Message]:
    """Without those, and those fields, that the version does not have."""
    messages = [part for part in parts if isinstance(part, Message) and version >= part.SINCE]
    come = [decode(message.KIND, encode(message, version), version) for message in messages]
    states = sum(isinstance(each, Section) for each in come)
    states += sum(len(each.sections) for each in come if isinstance(each, Sections))
    return [replace(each, sections=states) if isinstance(each, EndOfState) else each for each in come]


@pytest.mark.parametrize("name", STREAMS)
def test_layout_has_not_changed_without_a_new_version(name: str) -> None:
    assert written(STREAMS[name]) == path(name, NEWEST).read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", STREAMS)
def test_each_version_that_is_read_has_a_golden_stream(name: str, version: int) -> None:
    assert path(name, version).exists()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", STREAMS)
def test_golden_stream_is_whole_and_all_of_it_is_told(name: str, version: int, tmp_path: Path) -> None:
    data = path(name, version).read_bytes()
    told = list(dump(data, tmp_path))
    assert told[0] == f"byte 0: preamble of versions {version} to {version}, the main channel"
    assert told[-1] == f"byte {len(data)}: the end"
    said = " ".join(told)
    assert all(part.KIND.name in said for part in messages_of(STREAMS[name], version))


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_stream_is_taken_in_by_a_destination(version: int, stop: Stop) -> None:
    memory = GuestMemory()
    memory.add(Ram(0, 6 << 20, Bytes(6 << 20)))
    memory.write(0, b"o" * (6 << 20))
    wanted = bytearray(memory.read(0, 6 << 20))
    for gpa, content in CONTENT.items():
        wanted[gpa : gpa + len(content)] = content
    messages = []
    with Incoming(f"file:{path('source', version)}", stop=stop).accept() as arrival:
        with closing(PageReceiver(memory, compression="zstd")) as pages:
            for _ in messages_of(SOURCE, version):
                messages.append(arrival.main.next_message())
                if isinstance(messages[-1], Round):
                    assert pages.receive_inline(arrival.main.channel) == messages[-1].number
        arrival.main.finish()
    assert messages == messages_of(SOURCE, version)
    assert memory.read(0, 6 << 20) == wanted


def test_pages_are_counted_by_round_and_values_are_shown(tmp_path: Path) -> None:
    told = list(dump(written(SOURCE), tmp_path))
    assert (
        "byte 352: pages of round 1: 4 DATA in 2 records, 1027 ZERO in 2 records, 1 batches, "
        "1 batches of zstd (25 bytes for 16), 16521 bytes" in told
    )
    assert any(line.endswith("pages of round 2: none, 16 bytes") for line in told)
    assert '    "number": 1,' in told
    assert '            "ier": 5,' in told


def test_page_channel_is_told_round_by_round(tmp_path: Path) -> None:
    page = RECORD.pack(0x1000, 1, DATA) + bytes(4096)
    data = Preamble(1, 1, 3, bytes(range(16))).pack()
    for number in (1, 2):
        data += page * number + RECORD.pack(number, 0, END)
    assert list(dump(data, tmp_path)) == [
        "byte 0: preamble of versions 1 to 1, channel 3",
        "byte 36: pages of round 1: 1 DATA in 1 records, 4128 bytes",
        "byte 4164: pages of round 2: 2 DATA in 2 records, 8240 bytes",
        "byte 12404: the end",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (written(SOURCE)[:-1], "stream: the other side has ended the stream after byte"),
        (written(SOURCE)[: PREAMBLE_SIZE + 5], "after byte 41; 7 more were due"),
        (written(()) + frame(99, b"{}"), "stream: byte 36: frame of kind 99"),
        (written(SOURCE[:3]) + RECORD.pack(1, 2, END), "byte 352: a page record of kind END with 0x1 and 2"),
        (written(SOURCE[-4:-2]), "END_OF_STATE of 4 sections: there were 2"),
        (written(DESTINATION)[:114] + b"\0" + written(DESTINATION)[115:], "stream: byte 36: frame of kind"),
        (Preamble(9, 9).pack(), "the other side speaks versions 9 to 9"),
        (b"QEVM".ljust(40, b"\0"), "it is QEMU's migration stream"),
    ],
)
def test_where_a_stream_breaks_is_told_after_all_before_it(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(StreamError) as caught:
        list(dump(data, tmp_path))
    assert said in str(caught.value)


def test_no_value_makes_the_terminal_do_anything(tmp_path: Path) -> None:
    told = list(dump(written(()) + frame(13, b'{"reason":"\\u001b[2J\xc2\x9b"}'), tmp_path))
    assert all(line.isprintable() for line in told)


def test_long_values_are_cut_to_a_line(tmp_path: Path) -> None:
    told = list(dump(written(()) + frame(13, b'{"reason":"%s"}' % (b"x" * 1000)), tmp_path))
    assert max(len(line) for line in told) == 160


def test_every_prefix_of_a_stream_breaks_where_it_ends_or_is_whole(tmp_path: Path) -> None:
    data = written(DESTINATION)
    ends = [PREAMBLE_SIZE]
    stream = BytesIO(data[PREAMBLE_SIZE:])
    while header := stream.read(FRAME_SIZE):
        stream.seek(FrameHeader.unpack(header).length, os.SEEK_CUR)
        ends.append(PREAMBLE_SIZE + stream.tell())
    whole = [size for size in range(len(data) + 1) if is_whole(data[:size], tmp_path)]
    assert whole == ends


def is_whole(data: bytes, tmp_path: Path) -> bool:
    try:
        list(dump(data, tmp_path))
    except StreamError as e:
        if f"after byte {len(data)}; " not in str(e):
            raise
        return False
    return True


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([SCRIPT, *arguments], input=stdin, capture_output=True, timeout=60, check=False)


def test_script_reads_files_standard_input_and_behind_an_offset(tmp_path: Path) -> None:
    golden = path("source", NEWEST)
    (tmp_path / "behind").write_bytes(bytes(100) + golden.read_bytes())
    done = [
        run(str(golden)),
        run("-", stdin=golden.read_bytes()),
        run("--offset", "100", str(tmp_path / "behind")),
    ]
    assert [each.returncode for each in done] == [0, 0, 0]
    assert done[0].stdout == done[1].stdout == done[2].stdout
    assert done[0].stdout.splitlines()[-1] == f"byte {golden.stat().st_size}: the end".encode()


def test_script_fails_where_a_stream_breaks_or_is_not_there(tmp_path: Path) -> None:
    broken, absent = run(stdin=written(SOURCE)[:-1]), run(str(tmp_path / "none"))
    assert (broken.returncode, absent.returncode) == (1, 2)
    assert broken.stdout.splitlines()[-1].startswith(b"byte ")
    assert b"stream-dump: the stream breaks: standard input: the other side has ended the stream" in broken.stderr
    assert b"none: No such file or directory" in absent.stderr
