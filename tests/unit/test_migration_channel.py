"""Channels of a migration: exactly the bytes that are due, or in bounded time an error that says where it broke."""

from __future__ import annotations

import itertools
import math
import os
import random
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import MigrationCancelled, MigrationError, StreamError
from kvmpy.migration import main_channel
from kvmpy.migration.channel import PIECE, Channel, FileChannel, SocketChannel
from kvmpy.migration.keepalive import keepalive
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.messages import (
    SECTIONS_MAX,
    Cancel,
    EndOfState,
    Failed,
    Go,
    Header,
    Keepalive,
    Kind,
    Message,
    Origin,
    Ready,
    Refuse,
    Refused,
    Round,
    Section,
    Started,
)
from kvmpy.migration.stop import Stop
from kvmpy.migration.wire import FRAME_SIZE, FrameHeader
from tests.fakes.loop import BOUND
from tests.fakes.migration import SHORT, Thread, main_pair, pair, soon
from tests.golden.streams.make import frame


@given(st.lists(st.binary(max_size=1 << 17), max_size=5), st.integers(1, 1 << 18))
def test_bytes_out_are_bytes_in_however_they_are_cut(sent: list[bytes], size: int) -> None:
    whole = b"".join(sent) * 3
    with pair() as (here, there):
        sending = Thread(lambda: here.send(*sent, *sent, *sent))
        received = bytearray()
        while len(received) < len(whole):
            received += there.receive(min(size, len(whole) - len(received)))
        sending.result()
        assert received == whole
        assert here.sent == there.received == len(whole)


def test_more_buffers_than_a_system_call_takes_all_go() -> None:
    sent = [random.randbytes(100) for _ in range(5000)]
    with pair() as (here, there):
        sending = Thread(lambda: here.send(*sent))
        assert there.receive(500_000) == b"".join(sent)
        sending.result()


def test_two_threads_use_a_channel_at_once_one_for_each_direction() -> None:
    data = random.randbytes(4 << 20)
    with pair() as (here, there):
        sending = [Thread(partial(channel.send, data)) for channel in (here, there)]
        receiving = [Thread(partial(channel.receive, len(data))) for channel in (here, there)]
        assert [thread.result() for thread in receiving] == [data, data]
        assert [thread.result() for thread in sending] == [None, None]


def test_stream_that_ends_too_early_is_an_error_with_its_place() -> None:
    with pair() as (here, there):
        here.send(b"12345")
        here.close()
        assert there.receive(3) == b"123"
        with pytest.raises(
            StreamError, match=r"^there: the other side has ended the stream after byte 5; 6 more were due"
        ):
            there.receive(8)


def test_peer_that_says_nothing_is_found_in_time() -> None:
    with (
        pair(timeout=SHORT) as (here, _),
        pytest.raises(StreamError, match=r"^here: nothing more from the other side after byte 0.* within 0.05 sec"),
    ):
        here.receive(1)


def test_peer_that_takes_nothing_is_found_in_time() -> None:
    with (
        pair(timeout=SHORT) as (here, _),
        pytest.raises(StreamError, match=r"^here: the other side takes no more bytes after byte [1-9].* within 0.05"),
    ):
        here.send(bytes(1 << 24))


def test_peer_that_only_dribbles_is_found_in_time() -> None:
    """A byte now and then, always long before the timeout: hundreds of them would take far longer than it."""
    with pair() as (here, there):
        here.timeout = 0.3
        receiving = Thread(lambda: here.receive(PIECE))
        assert dribble(there, receiving) < 400
        with pytest.raises(StreamError, match=r"nothing more from the other side after byte [1-9]"):
            receiving.result()


def dribble(channel: Channel, receiving: Thread[bytes]) -> int:
    """Bytes one by one, as long as they are received, but no more than 400."""
    for sent in range(400):
        if not receiving.is_alive():
            return sent
        channel.send(b"x")
        channel.stop.wait_any({}, deadline=soon(0.005))
    return 400


def test_slow_peer_that_keeps_the_pace_is_waited_for() -> None:
    """More than the timeout in all, and a third of it for each piece."""
    with pair() as (here, there):
        here.timeout = 0.6
        buffer = bytearray(4 * PIECE)
        receiving = Thread(lambda: here.receive_into(buffer))
        for _ in range(4):
            there.stop.wait_any({}, deadline=soon(0.21))
            there.send(b"x" * PIECE)
        receiving.result()
        assert buffer == b"x" * (4 * PIECE)


USES: Final[tuple[Callable[[Channel], object], ...]] = (
    lambda channel: channel.receive(1),
    lambda channel: channel.send(bytes(1 << 24)),
)


@pytest.mark.parametrize("use", USES, ids=["receive", "send"])
def test_shutdown_wakes_whoever_waits_here(use: Callable[[Channel], object]) -> None:
    with pair() as (here, _):
        waiting = Thread(lambda: use(here))
        here.stop.wait_any({}, deadline=soon())
        here.shutdown("enough")
        with pytest.raises(MigrationCancelled, match=r"^here: enough$"):
            waiting.result()
        with pytest.raises(MigrationCancelled, match=r"^here: enough$"):
            use(here)


def test_shutdown_wakes_whoever_waits_on_the_other_side() -> None:
    with pair() as (here, there):
        waiting = Thread(lambda: there.receive(1))
        here.shutdown()
        with pytest.raises(StreamError, match="the other side has ended the stream"):
            waiting.result()


@pytest.mark.parametrize("use", USES, ids=["receive", "send"])
def test_stop_wakes_whoever_waits(use: Callable[[Channel], object]) -> None:
    with pair() as (here, _):
        waiting = Thread(lambda: use(here))
        here.stop.wait_any({}, deadline=soon())
        here.stop.set("by hand")
        with pytest.raises(MigrationCancelled, match=r"^by hand$"):
            waiting.result()


def test_pipe_that_nobody_writes_to_ends_when_it_is_shut_down() -> None:
    read_fd, write_fd = os.pipe()
    with Stop() as stop, closing(FileChannel("pipe", stop, read_fd)) as channel:
        waiting = Thread(lambda: channel.receive(1))
        channel.shutdown("enough")
        with pytest.raises(MigrationCancelled, match="enough"):
            waiting.result()
    os.close(write_fd)


def test_peer_that_resets_the_connection_is_told_by_its_errno() -> None:
    with Stop() as stop, socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with closing(SocketChannel("tcp", stop, client)) as channel:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            with pytest.raises(StreamError, match=r"^tcp: ECONNRESET: the other side has gone; 0 bytes were received$"):
                channel.receive(1)
            with pytest.raises(StreamError, match=r"^tcp: EPIPE: the other side has gone; 0 bytes were sent$"):
                channel.send(b"x")


@pytest.mark.parametrize(("path", "said"), [("/dev/full", "ENOSPC: no more can be sent after byte 0; make room on")])
def test_full_disk_is_told_with_what_to_do(path: str, said: str) -> None:
    with Stop() as stop, closing(FileChannel("file", stop, os.open(path, os.O_WRONLY))) as channel:
        with pytest.raises(StreamError) as caught:
            channel.send(b"x")
        assert str(caught.value).startswith(f"file: {said}")


def test_room_is_made_as_bytes_come_and_not_as_they_are_announced() -> None:
    with main_pair(timeout=SHORT) as (here, there):
        there.channel.send(FrameHeader(Kind.SECTION, 16 << 20, 0).pack(), bytes(1000))
        tracemalloc.start()
        try:
            with pytest.raises(StreamError):
                here.receive_message(Section)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 4 * PIECE


def test_messages_come_in_order_and_bytes_between_them_are_left_alone() -> None:
    with main_pair() as (here, there):
        here.send_message(Round(number=1, remaining_bytes=0))
        here.channel.send(b"pages")
        here.send_message(Go())
        assert there.receive_message(Ready, Round) == Round(number=1, remaining_bytes=0)
        assert there.channel.receive(5) == b"pages"
        assert there.receive_message(Go) == Go()


def test_many_threads_send_whole_messages() -> None:
    with main_pair() as (here, there):

        def send() -> None:
            for number in range(200):
                here.send_message(Round(number=number, remaining_bytes=number))

        threads = [Thread(send) for _ in range(4)]
        received = [there.receive_message(Round) for _ in range(800)]
        for thread in threads:
            thread.result()
        assert sorted(message.number for message in received) == sorted([*range(200)] * 4)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (Failed(reason="ENOMEM: no memory"), "the other side says: ENOMEM: no memory"),
        (Cancel(reason="by hand"), "the other side says: by hand"),
        (Refused(reason="no vCPU ran"), "the other side says: no vCPU ran"),
        (Refuse(problems=("cpus", "memory")), "the other side says: cpus; memory"),
        (Failed(reason=""), "the other side says: nothing of why"),
        (Failed(reason="\x1b]0;owned\x07"), "the other side says: \\x1b]0;owned\\x07"),
        (Go(), "there: byte 0: GO where READY or STARTED was due"),
        (Section(device="x", section={}), "there: byte 0: SECTION where READY or STARTED was due"),
    ],
)
def test_message_that_was_not_waited_for_is_an_error_that_says_what_it_is(sent: Message, said: str) -> None:
    with main_pair() as (here, there):
        here.send_message(sent)
        with pytest.raises(MigrationError) as caught:
            there.receive_message(Ready, Started)
        assert str(caught.value) == said
        assert isinstance(caught.value, StreamError) == said.startswith("there")


def test_nothing_is_read_of_a_message_that_is_not_due() -> None:
    with main_pair() as (here, there):
        there.channel.send(FrameHeader(Kind.SECTION, 16 << 20, 0).pack())
        with pytest.raises(StreamError, match="SECTION where READY was due"):
            here.receive_message(Ready)
        assert here.channel.received == FRAME_SIZE


def test_message_that_was_waited_for_is_none() -> None:
    with main_pair() as (here, there):
        here.send_message(Refused(reason="x"))
        assert there.receive_message(Started, Refused) == Refused(reason="x")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (frame(99, b"{}"), "byte 14: frame of kind 99, which"),
        (frame(Kind.GO, b'{"x":1}'), "byte 14: GO: Object contains unknown field `x`"),
        (FrameHeader(Kind.GO, 70_000, 0).pack(), "byte 14: GO: 70000 bytes, more than 65536"),
        (FrameHeader(Kind.SECTION, 2**32 - 1, 0).pack(), "byte 14: SECTION: 4294967295 bytes, more than 16777216"),
        (FrameHeader(Kind.GO, 2, 1).pack() + b"{}", "byte 14: frame of kind 9: its checksum is 0x"),
        (b"\x09\0\x01\0\x02\0\0\0\0\0\0\0{}", "byte 14: frame of kind 9: flags 0x1, where there are none yet"),
        (frame(Kind.GO, b"{}")[:-1], "the other side has ended the stream after byte 27; 1 more were due"),
        (b"", "the other side has ended the stream after byte 14; 12 more were due"),
        (b"GET / HTTP/1.1\r\n\r\n", "byte 14: frame of kind 17735: flags 0x2054"),
    ],
)
def test_garbage_is_refused_with_its_place(sent: bytes, said: str) -> None:
    with main_pair() as (here, there):
        here.send_message(Keepalive())
        here.channel.send(sent)
        here.close()
        with pytest.raises(StreamError) as caught:
            there.receive_message(Go)
        assert str(caught.value).startswith(f"there: {said}")


def test_a_kind_that_comes_once_does_not_come_twice() -> None:
    header = Header(description={}, channels=0, source=Origin(host="", version="", name=""))
    with main_pair() as (here, there):
        here.send_message(header)
        here.send_message(header)
        assert there.receive_message(Header) == header
        with pytest.raises(StreamError, match="HEADER: one more than 1 of its kind"):
            there.receive_message(Header)


def send_sections(main: MainChannel, count: int) -> None:
    for _ in range(count):
        main.send_message(Section(device="x", section={}))


def test_sections_are_bounded_in_number_and_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with main_pair() as (here, there):
        sending = Thread(partial(send_sections, here, SECTIONS_MAX + 1))
        for _ in range(SECTIONS_MAX):
            there.receive_message(Section)
        with pytest.raises(StreamError, match="SECTION of x: one more than 4096 of its kind"):
            there.receive_message(Section)
        sending.result()
    monkeypatch.setattr("kvmpy.migration.main_channel.STATE_MAX", 200)
    with main_pair() as (here, there):
        for _ in range(2):
            here.send_message(Section(device="x", section={"x": "y" * 80}))
        there.receive_message(Section)
        with pytest.raises(StreamError, match="SECTION of x: all sections are more than 200 bytes"):
            there.receive_message(Section)


def test_keepalives_keep_a_wait_alive_and_never_for_longer_than_its_limit() -> None:
    with main_pair() as (here, there):
        for _ in range(3):
            here.send_message(Keepalive())
        here.send_message(Go())
        assert there.receive_message(Go, timeout=1) == Go()
        stop = Stop()

        def chatter() -> None:
            while not stop.reason:
                here.send_message(Keepalive())
                here.channel.stop.wait_any({}, deadline=soon(0.01))

        chatting = Thread(chatter)
        with pytest.raises(StreamError, match="nothing more from the other side"):
            there.receive_message(Go, timeout=BOUND, limit=0.2)
        stop.set()
        chatting.result()
        stop.close()


def test_who_keeps_the_other_side_waiting_does_not_take_its_last_words_from_who_waits_for_them() -> None:
    with main_pair() as (here, there):
        there.send_message(Started(first_run_ns=7))
        there.close()
        with keepalive(here, BOUND):
            while any(thread.name == "keepalive" for thread in threading.enumerate()):
                here.channel.stop.wait_any({}, deadline=soon(0.01))
        assert here.receive_message(Started, Refused) == Started(first_run_ns=7)


def test_a_patient_side_keeps_an_impatient_one_waiting() -> None:
    with main_pair() as (here, there), keepalive(here, 3600):
        assert there.next_message(Keepalive) == Keepalive()


def test_silence_ends_a_wait_before_its_limit() -> None:
    with main_pair() as (_, there), pytest.raises(StreamError, match=r"within 0.05 seconds"):
        there.receive_message(Go, timeout=SHORT, limit=BOUND)


def test_what_the_other_side_said_before_it_hung_up_is_the_error_of_sending() -> None:
    with main_pair() as (here, there):
        there.fail(Failed(reason="ENOMEM: no memory"))
        there.close()
        with pytest.raises(MigrationError, match=r"^the other side says: ENOMEM: no memory$"):
            here.send_message(Go())


def test_error_of_a_page_channel_is_explained_by_the_main_channel() -> None:
    error = MigrationError("page channel 2: EPIPE: the other side has closed it")
    with main_pair() as (here, there):
        there.send_message(Keepalive())
        there.fail(Failed(reason="ENOMEM: no memory"))
        with pytest.raises(MigrationError, match=r"^the other side says: ENOMEM: no memory$") as raised:
            here.explain(error)
        assert raised.value.__cause__ is error
        there.close()
        here.explain(error)
        here.explain(MigrationCancelled("by hand"))


@pytest.fixture
def short_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_channel, "LAST_WORDS", SHORT)


def test_who_says_everything_but_why_it_is_over_is_not_listened_to_for_ever(
    short_last_words: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatter = itertools.cycle(frame(Kind.KEEPALIVE, b"{}"))

    def read_some(view: memoryview) -> int:
        view[:] = bytes(itertools.islice(chatter, len(view)))
        return len(view)

    with main_pair() as (here, _):
        monkeypatch.setattr(here.channel, "read_some", read_some)
        explaining = Thread(lambda: here.explain(StreamError("it has hung up")))
        try:
            explaining.over()
        finally:
            here.shutdown("the test is over")


def test_telling_why_it_is_over_neither_fails_nor_lasts(short_last_words: None) -> None:
    with main_pair() as (here, there):
        there.close()
        here.fail(Cancel(reason="x"))
    with main_pair() as (here, _):
        with pytest.raises(StreamError):
            here.channel.send(bytes(1 << 24), timeout=SHORT)
        here.fail(Cancel(reason="nobody reads it"))


def test_telling_why_it_is_over_does_not_wait_for_a_message_that_is_stuck(short_last_words: None) -> None:
    with main_pair() as (here, _):
        stuck = Thread(lambda: here.send_message(Section(device="x", section={"x": "y" * (1 << 23)})))
        while stuck.is_alive() and not here.channel.sent:
            here.channel.stop.wait_any({}, soon())
        here.fail(Cancel(reason="nobody reads it"))
        assert stuck.is_alive()
        here.shutdown("over")
        with pytest.raises(MigrationCancelled):
            stuck.result()


def test_who_was_told_to_stop_tells_why_and_waits_for_nobody() -> None:
    with main_pair() as (here, there):
        here.channel.stop.set("cancelled")
        here.fail(Cancel(reason="cancelled"))
        with pytest.raises(MigrationError, match=r"^the other side says: cancelled$"):
            there.receive_message(Go)
    with main_pair() as (here, _):
        with pytest.raises(StreamError):
            here.channel.send(bytes(1 << 24), timeout=SHORT)
        here.channel.stop.set("cancelled")
        here.fail(Cancel(reason="nobody reads it"))
    with main_pair() as (here, there):
        there.close()
        here.channel.stop.set("cancelled")
        here.fail(Cancel(reason="nobody is there"))


def test_wait_may_be_for_ever_and_ends_when_it_is_over() -> None:
    with pair(timeout=math.inf) as (here, there):
        waiting = Thread(lambda: here.receive(1))
        there.send(b"x")
        assert waiting.result() == b"x"


def test_message_too_large_to_send_leaves_the_channel_as_it_was() -> None:
    with main_pair() as (here, there):
        with pytest.raises(MigrationError, match="SECTION of x: cannot be sent"):
            here.send_message(Section(device="x", section={"x": "y" * (17 << 20)}))
        here.send_message(EndOfState(sections=0, stopped_ns=1))
        assert there.receive_message(EndOfState).stopped_ns == 1
