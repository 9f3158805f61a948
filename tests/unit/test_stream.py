"""Stream and Listener: nothing lost or reordered, and nobody's slowness or absence is ours."""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.host.reactor import Reactor
from kvmpy.host.stream import BACKLOG, CHUNK, Listener, Stream
from tests.counts import count
from tests.fakes.loop import BOUND, Inbox, each, open_descriptors, read_exactly, running, settle


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with running() as reactor:
        yield reactor


def pipe_to(reactor: Reactor) -> tuple[Stream, int]:
    """A stream that writes to a pipe, and the pipe's other end."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    return Stream(reactor, -1, write_fd), read_fd


def connected(reactor: Reactor) -> tuple[Stream, socket.socket]:
    """A stream over a socket, and the client's end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(BOUND)
    fd = ours.detach()
    return Stream(reactor, fd, fd), theirs


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Within it the process can open nothing more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    spare: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        with suppress(OSError):  # EMFILE: the last free one is taken; how many there were is nobody's business
            while True:
                spare.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in spare:
            os.close(fd)


def fill(stream: Stream) -> bytes:
    """Write until the stream is full; returns what was taken."""
    taken = b""
    while not stream.full:
        piece = random.randbytes(1000)
        stream.write(piece)
        taken += piece
    return taken


def test_output_beyond_the_pipe_waits_and_arrives_in_order(reactor: Reactor) -> None:
    stream, reader = pipe_to(reactor)
    sent = fill(stream)
    assert read_exactly(reader, len(sent)) == sent
    stream.close()
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_full_stream_drops_whole_writes_and_says_when_there_is_room(reactor: Reactor) -> None:
    stream, reader = pipe_to(reactor)
    drained: Inbox[bool] = Inbox()
    stream.on_drained = lambda: drained.put(stream.full)
    sent = fill(stream)
    stream.write(b"lost")
    assert not drained.items
    assert read_exactly(reader, len(sent)) == sent
    assert drained.wait()[-1] is False
    stream.write(b"kept")
    assert read_exactly(reader, 4) == b"kept"
    stream.close()
    os.close(reader)


def test_reader_that_never_reads_bounds_what_waits_for_it(reactor: Reactor) -> None:
    stream, reader = pipe_to(reactor)
    fill(stream)
    for _ in range(100):
        stream.write(bytes(1000))
    assert len(stream._backlog) < BACKLOG + 1000
    stream.close()
    os.close(reader)


def test_reader_that_goes_away_frees_the_backlog_and_the_writer(reactor: Reactor) -> None:
    stream, reader = pipe_to(reactor)
    drained: Inbox[None] = Inbox()
    fill(stream)
    stream.on_drained = lambda: drained.put(None)
    os.close(reader)
    drained.wait()
    assert not stream.full
    stream.write(b"to nobody")
    stream.close()


@settings(max_examples=count(20, 500), deadline=None)
@given(st.integers(0, 1 << 18), st.integers(500, 3 * CHUNK), st.integers(500, 100_000))
def test_bytes_out_are_bytes_in_however_they_are_cut(size: int, written: int, read_at_once: int) -> None:
    with running() as reactor:
        stream, client = connected(reactor)
        room: Inbox[None] = Inbox()
        stream.on_drained = lambda: room.put(None)
        received = bytearray()

        def read() -> None:
            while piece := client.recv(read_at_once):
                received.extend(piece)

        reader = threading.Thread(target=read)
        reader.start()
        sent = random.randbytes(size)
        for at in range(0, size, written):
            room.wait_until(lambda _: not stream.full)
            stream.write(sent[at : at + written])
        reactor.stop()
        os.set_blocking(stream._write_fd, True)
        stream.close()
        reader.join(BOUND)
        client.close()
        assert received == sent


def test_two_threads_writing_at_once_lose_nothing_and_keep_each_write_whole(reactor: Reactor) -> None:
    stream, client = connected(reactor)
    lines = 300

    def write(letter: bytes) -> None:
        for _ in range(lines):
            stream.write(letter * 99 + b"\n")

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    received = b""
    while len(received) < 2 * lines * 100:
        received += client.recv(1 << 16)
    for thread in threads:
        thread.join()
    assert sorted(received.splitlines()) == [b"a" * 99] * lines + [b"b" * 99] * lines
    stream.close()
    client.close()


def test_input_comes_in_order_and_then_its_end(reactor: Reactor) -> None:
    stream, client = connected(reactor)
    seen: Inbox[bytes] = Inbox()
    stream.on_input = seen.put
    stream.on_end = lambda _: seen.put(b"")
    stream.listen(wanted=True)
    sent = random.randbytes(3 * CHUNK)
    client.sendall(sent)
    client.close()
    seen.wait_until(lambda pieces: b"" in pieces)
    assert b"".join(seen.items) == sent
    stream.close()


def test_input_that_is_not_wanted_waits_with_its_sender(reactor: Reactor) -> None:
    stream, client = connected(reactor)
    seen: Inbox[bytes] = Inbox()

    def take_one(data: bytes) -> None:
        seen.put(data)
        stream.listen(wanted=False)

    stream.on_input = take_one
    stream.listen(wanted=True)
    client.sendall(b"first")
    seen.wait()
    client.sendall(b"second")
    settle(reactor)
    assert seen.items == [b"first"]
    stream.listen(wanted=True)
    assert seen.wait(2) == [b"first", b"second"]
    stream.close()
    client.close()


def test_stream_closed_by_its_reader_is_silent_from_then_on(reactor: Reactor) -> None:
    stream, client = connected(reactor)
    seen: Inbox[object] = Inbox()

    def take_and_close(data: bytes) -> None:
        stream.close()
        seen.put(data)

    stream.on_input, stream.on_end = take_and_close, seen.put
    stream.listen(wanted=True)
    client.sendall(bytes(2 * CHUNK))
    seen.wait()
    stream.write(b"to nobody")
    stream.listen(wanted=True)
    stream.close()
    settle(reactor)
    assert seen.items == [bytes(CHUNK)]
    client.close()


def test_file_closed_while_its_turn_is_due_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"unread")
    reactor = Reactor("test")
    stream = Stream(reactor, os.open(tmp_path / "input", os.O_RDONLY), -1)
    seen: Inbox[object] = Inbox()
    stream.on_input, stream.on_end = seen.put, seen.put
    stream.listen(wanted=True)
    stream.close()
    reactor.start()
    settle(reactor)
    assert seen.items == []
    reactor.close()


def test_nothing_stays_open_after_close(reactor: Reactor) -> None:
    before = open_descriptors()
    stream, client = connected(reactor)
    stream.listen(wanted=True)
    stream.close()
    client.close()
    assert open_descriptors() == before


def test_regular_file_is_read_to_its_end_in_order(reactor: Reactor, tmp_path: Path) -> None:
    content = random.randbytes(10 * CHUNK + 1)
    (tmp_path / "input").write_bytes(content)
    stream = Stream(reactor, os.open(tmp_path / "input", os.O_RDONLY), -1)
    seen: Inbox[bytes] = Inbox()
    stream.on_input = seen.put
    stream.on_end = lambda _: seen.put(b"")
    stream.listen(wanted=True)
    seen.wait_until(lambda pieces: b"" in pieces)
    assert b"".join(seen.items) == content
    stream.close()


def test_regular_file_takes_one_turn_a_round_however_often_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(20 * CHUNK))
    reactor = Reactor("test")
    stream = Stream(reactor, os.open(tmp_path / "input", os.O_RDONLY), -1)
    for _ in range(5):
        stream.listen(wanted=False)
        stream.listen(wanted=True)
    assert len(reactor._posted) == 1
    stream.close()
    reactor.close()


def test_dev_null_as_input_ends_at_once_and_only_once(reactor: Reactor) -> None:
    stream = Stream(reactor, os.open(os.devnull, os.O_RDONLY), -1)
    ends: Inbox[Stream] = Inbox()
    stream.on_end = ends.put
    stream.listen(wanted=True)
    ends.wait()
    stream.listen(wanted=True)
    settle(reactor)
    assert ends.items == [stream]
    stream.close()


def test_output_to_a_file_that_cannot_grow_is_dropped_and_does_not_stall(reactor: Reactor, tmp_path: Path) -> None:
    stream = Stream(reactor, -1, os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for _ in range(200):
            stream.write(bytes(990))
        settle(reactor)
        assert not stream.full
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stream.write(b"grows again")
    settle(reactor)
    stream.close()
    assert (tmp_path / "output").read_bytes()[-11:] == b"grows again"


def test_output_that_a_file_does_not_take_is_told_of_once_and_again_after_it_has(
    reactor: Reactor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "console.log"
    stream = Stream(reactor, -1, os.open(path, os.O_WRONLY | os.O_CREAT))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = f"{path}: ENOSPC: output is lost; make room on that file system"
    for times in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for _ in range(3):
                stream.write(b"lost")
        stream.write(b"kept")
        assert caplog.messages == [said] * times
    stream.close()
    assert path.read_bytes() == b"keptkept"


def test_reader_that_goes_away_is_nothing_to_tell_of(reactor: Reactor, caplog: pytest.LogCaptureFixture) -> None:
    stream, reader = pipe_to(reactor)
    os.close(reader)
    stream.write(b"for nobody")
    assert not stream.unsent
    stream.close()
    assert caplog.messages == []


def test_close_sends_all_that_waits_where_the_descriptor_blocks(reactor: Reactor) -> None:
    stream, reader = pipe_to(reactor)
    sent = fill(stream)
    received: Inbox[bytes] = Inbox()
    slow = threading.Thread(target=lambda: received.put(read_exactly(reader, len(sent))))
    reactor.stop()
    os.set_blocking(stream._write_fd, True)
    slow.start()
    stream.close()
    assert received.wait() == [sent]
    slow.join()
    os.close(reader)


def test_close_does_not_wait_for_a_reader_that_does_not_read(reactor: Reactor) -> None:
    stream, reader = pipe_to(reactor)
    fill(stream)
    stream.close()
    os.close(reader)


def test_far_side_that_closed_has_hung_up(reactor: Reactor) -> None:
    stream, client = connected(reactor)
    client.sendall(b"unread")
    client.close()
    assert stream.hung_up
    stream.close()


def test_far_side_that_only_ended_its_sending_has_not_hung_up(reactor: Reactor) -> None:
    stream, client = connected(reactor)
    client.shutdown(socket.SHUT_WR)
    assert not stream.hung_up
    stream.close()
    client.close()


def test_listener_hands_over_each_client_and_only_its_owner_may_connect(reactor: Reactor, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    clients: Inbox[Stream] = Inbox()
    listener = Listener(reactor, path, clients.put)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(path)
        second.connect(path)
        clients.wait(2)[0].write(b"hello")
        assert first.recv(10) == b"hello"
        for stream in clients.items:
            stream.close()
    listener.close()
    assert not os.path.lexists(path)


def test_listener_takes_its_name_away_while_it_still_listens(
    reactor: Reactor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another could take over the name in between, and lose it."""
    path = str(tmp_path / "socket")
    listener = Listener(reactor, path, lambda stream: stream.close())
    unlink, listened = os.unlink, []

    def noted(name: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            listened.append((name, client.connect_ex(path)))
        unlink(name)

    monkeypatch.setattr(os, "unlink", noted)
    listener.close()
    assert listened == [(path, 0)]
    assert not os.path.lexists(path)


def test_listener_whose_name_cannot_be_taken_away_closes_nevertheless(reactor: Reactor, tmp_path: Path) -> None:
    before = open_descriptors()
    gone, replaced = Listener(reactor, f"{tmp_path}/1", print), Listener(reactor, f"{tmp_path}/2", print)
    os.unlink(tmp_path / "1")
    os.unlink(tmp_path / "2")
    (tmp_path / "2").mkdir()
    gone.close()
    replaced.close()
    assert open_descriptors() == before


def test_listener_whose_path_is_taken_leaves_nothing_open(reactor: Reactor, tmp_path: Path) -> None:
    before = open_descriptors()
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="Address already in use"):
        Listener(reactor, str(tmp_path / "taken"), lambda _: None)
    assert open_descriptors() == before
    assert (tmp_path / "taken").exists()


def test_client_for_whom_there_is_no_descriptor_is_turned_away_and_told_of_once(
    reactor: Reactor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clients: Inbox[Stream] = Inbox()
    path = str(tmp_path / "socket")
    before = open_descriptors()
    listener = Listener(reactor, path, clients.put)
    for _ in range(2):
        callers = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        caplog.clear()
        with no_descriptors_left():
            for caller in callers:
                caller.settimeout(BOUND)
                caller.connect(path)
                assert caller.recv(1) == b""  # hung up
        assert caplog.messages == [
            f"{path}: EMFILE: clients are turned away; raise the limit of open files (ulimit -n)"
        ]
        assert not clients.items
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            clients.wait()[0].close()
            clients.items.clear()
        for caller in callers:
            caller.close()
    listener.close()
    assert open_descriptors() == before


def test_client_that_cannot_even_be_turned_away_waits_and_is_served_later(
    reactor: Reactor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpy.host.stream.ACCEPT_AGAIN", 0.001)
    clients: Inbox[Stream] = Inbox()
    tries: Inbox[None] = Inbox()
    path = str(tmp_path / "socket")
    listener = Listener(reactor, path, clients.put)
    again = listener._accept
    monkeypatch.setattr(listener, "_accept", lambda: each(again, lambda: tries.put(None))())
    reactor.post(listener._watch)
    settle(reactor)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            client.connect(path)
            tries.wait(5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        clients.wait()[0].close()
    assert caplog.messages == [f"{path}: EMFILE: clients have to wait; raise the limit of open files (ulimit -n)"]
    listener.close()


def test_a_socket_that_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    reactor = Reactor("io")
    Listener(reactor, path, lambda _: None).close()
    reactor.close()
    assert not Path(path).exists()


def test_a_socket_that_somebody_listens_at_is_not_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen()
        reactor = Reactor("io")
        with pytest.raises(OSError, match="Address already in use"):
            Listener(reactor, path, lambda _: None)
        reactor.close()


def test_a_file_in_the_way_of_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    path.write_text("precious")
    reactor = Reactor("io")
    with pytest.raises(OSError, match="Address already in use"):
        Listener(reactor, str(path), lambda _: None)
    reactor.close()
    assert path.read_text() == "precious"
