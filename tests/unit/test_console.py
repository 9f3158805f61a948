"""Console: what the guest says reaches everybody; what anybody types reaches the guest, in order, when it has room."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmpy.devices.serial import Reg, Serial16550
from kvmpy.errors import HostError
from kvmpy.host import console as console_module
from kvmpy.host.console import MOST_CLIENTS, MOST_TYPED, Console
from kvmpy.host.reactor import Reactor
from kvmpy.host.terminal import reopen
from tests.fakes.host import Line
from tests.fakes.loop import BOUND, Inbox, each, open_descriptors, read_exactly, running, settle


class Guest:
    """The far side of the console: takes input up to its room, and notes what it took."""

    def __init__(self, console: Console, room: int = 1 << 30) -> None:
        self.room = room
        self.typed: Inbox[bytes] = Inbox()
        self.drained: Inbox[None] = Inbox()
        console.connect(self.receive, lambda: self.drained.put(None))

    def receive(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        if taken:
            self.typed.put(taken)
        return len(taken)

    def wait_typed(self, size: int) -> bytes:
        self.typed.wait_until(lambda pieces: sum(map(len, pieces)) >= size)
        return b"".join(self.typed.items)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with running("io") as reactor:
        yield reactor


@pytest.fixture
def console(reactor: Reactor) -> Iterator[Console]:
    console = Console(reactor)
    yield console
    console.close()


class Client:
    """Somebody attached to the console's socket; returns once the console has noticed."""

    def __init__(self, reactor: Reactor, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(BOUND)
        self.socket.connect(path)
        settle(reactor)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.socket.recv(size - len(data))
        return data


Attach = Callable[[], Client]


@pytest.fixture
def attach(reactor: Reactor, console: Console, tmp_path: Path) -> Iterator[Attach]:
    """``attach()``: a new client of a socket that the console listens at; hung up at the end."""
    path = str(tmp_path / "console.sock")
    console.listen(path)
    with ExitStack() as stack:

        def make() -> Client:
            client = Client(reactor, path)
            stack.enter_context(client.socket)
            return client

        yield make


def attach_pipe(console: Console) -> int:
    """Make a pipe the backend that sets the pace; returns its reader's end."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    console.attach(-1, write_fd)
    return read_fd


def test_output_reaches_the_backend_and_every_client(console: Console, reactor: Reactor, attach: Attach) -> None:
    backend = attach_pipe(console)
    clients = [attach() for _ in range(2)]
    console.write(b"login: ")
    assert read_exactly(backend, 7) == b"login: "
    assert [client.read(7) for client in clients] == [b"login: "] * 2
    os.close(backend)


def test_nobody_attached_is_allowed(console: Console) -> None:
    console.write(b"to nobody")
    assert console.room()


def test_backend_that_does_not_read_takes_the_guests_room_until_it_does(console: Console) -> None:
    guest = Guest(console)
    backend = attach_pipe(console)
    sent = b""
    while console.room():
        sent += (piece := random.randbytes(1000))
        console.write(piece)
    assert not guest.drained.items
    assert read_exactly(backend, len(sent)) == sent
    guest.drained.wait()
    assert console.room()
    os.close(backend)


def test_serial_port_behind_a_slow_backend_loses_nothing_that_its_driver_waits_for(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpy.host.stream.BACKLOG", 1000)
    com1 = Serial16550("com1", Line(), console.write, room=console.room)
    com1.resume()
    drained: Inbox[None] = Inbox()
    console.connect(com1.receive, each(com1.drained, lambda: drained.put(None)))
    backend = attach_pipe(console)
    fcntl.fcntl(backend, fcntl.F_SETPIPE_SZ, 4096)
    sent = b""
    while com1.read(Reg.LSR, 1) & 0x20:  # the transmitter holding register is empty
        com1.write(Reg.DATA, 1, len(sent) & 0x7F)
        sent += bytes([len(sent) & 0x7F])
    assert not console.room()
    assert read_exactly(backend, len(sent)) == sent
    drained.wait()
    assert com1.read(Reg.LSR, 1) & 0x60 == 0x60
    os.close(backend)


def test_client_that_never_reads_neither_stalls_the_guest_nor_the_others(
    console: Console, reactor: Reactor, attach: Attach
) -> None:
    backend = attach_pipe(console)
    attach()
    sent = random.randbytes(1 << 20)
    for at in range(0, len(sent), 1 << 14):
        console.write(sent[at : at + (1 << 14)])
        assert read_exactly(backend, 1 << 14) == sent[at : at + (1 << 14)]
        assert console.room()
    os.close(backend)


def test_client_that_goes_away_is_forgotten(console: Console, reactor: Reactor, attach: Attach) -> None:
    before = open_descriptors()
    client = attach()
    assert len(console._streams) == 1
    client.socket.close()
    settle(reactor)
    assert console._streams == []
    assert open_descriptors() == before


def test_input_reaches_the_guest_from_anybody(console: Console, reactor: Reactor, attach: Attach) -> None:
    guest = Guest(console)
    attach().socket.sendall(b"root\r")
    assert guest.wait_typed(5) == b"root\r"


def test_input_waits_with_its_sender_until_the_guest_has_room_and_then_comes_in_order(
    console: Console, reactor: Reactor, attach: Attach
) -> None:
    guest = Guest(console, room=16)
    client = attach()
    sent = random.randbytes(20_000)
    client.socket.sendall(sent)
    assert guest.wait_typed(16) == sent[:16]
    settle(reactor)
    assert len(console._waiting) < 4096
    guest.room = 10_000
    console.offer()
    guest.wait_typed(10_016)
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(len(sent)) == sent


def test_newcomers_input_waits_behind_what_waits_already(console: Console, reactor: Reactor, attach: Attach) -> None:
    guest = Guest(console, room=0)
    attach().socket.sendall(b"first")
    settle(reactor)
    attach().socket.sendall(b"second")
    settle(reactor)
    assert console._waiting == b"first"
    guest.room = 100
    console.offer()
    assert guest.wait_typed(11) == b"firstsecond"


def test_two_clients_typing_at_once_lose_nothing(console: Console, reactor: Reactor, attach: Attach) -> None:
    guest = Guest(console)
    one, other = attach(), attach()
    for _ in range(100):
        one.socket.sendall(b"a")
        other.socket.sendall(b"b")
    assert sorted(guest.wait_typed(200)) == sorted(b"a" * 100 + b"b" * 100)


def test_input_of_a_client_that_left_still_reaches_the_guest(
    console: Console, reactor: Reactor, attach: Attach
) -> None:
    guest = Guest(console, room=1)
    client = attach()
    sent = random.randbytes(10_000)
    client.socket.sendall(sent)
    client.socket.close()
    guest.wait_typed(1)
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(len(sent)) == sent


def test_clients_that_left_while_the_guest_takes_no_input_make_room_for_new_ones(
    console: Console, reactor: Reactor, attach: Attach
) -> None:
    guest = Guest(console, room=0)
    attach().socket.sendall(b"waiting")
    settle(reactor)
    for _ in range(2 * MOST_CLIENTS):
        attach().socket.close()
    last = attach()
    console.write(b"still here")
    assert last.read(10) == b"still here"
    assert len(console._streams) <= MOST_CLIENTS
    guest.room = 100
    console.offer()
    assert guest.wait_typed(7) == b"waiting"


def test_more_clients_than_the_limit_are_turned_away(console: Console, reactor: Reactor, attach: Attach) -> None:
    clients = [attach() for _ in range(MOST_CLIENTS + 1)]
    assert clients[-1].socket.recv(1) == b""
    console.write(b"x")
    assert clients[0].read(1) == b"x"


def test_filter_sees_the_backends_input_and_not_the_clients(console: Console, reactor: Reactor, attach: Attach) -> None:
    guest = Guest(console)
    console.filter = bytes.upper
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    console.attach(read_fd, -1)
    os.write(write_fd, b"typed")
    assert guest.wait_typed(5) == b"TYPED"
    attach().socket.sendall(b"sent")
    assert guest.wait_typed(9) == b"TYPEDsent"
    os.close(write_fd)


@pytest.fixture
def keyboard(console: Console) -> Iterator[int]:
    """The operator's side of a terminal that is the backend."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    console.attach(reopen(theirs, os.O_RDONLY), -1)
    yield ours
    os.close(ours)
    os.close(theirs)


def note_keys(console: Console) -> Inbox[bytes]:
    """What the filter will have seen."""
    seen: Inbox[bytes] = Inbox()

    def note(keys: bytes) -> bytes:
        seen.put(keys)
        return keys

    console.filter = note
    return seen


def test_filter_sees_every_key_however_many_a_guest_that_hangs_has_not_read(
    console: Console, keyboard: int, caplog: pytest.LogCaptureFixture
) -> None:
    guest = Guest(console, room=0)
    seen = note_keys(console)
    sent = random.randbytes(MOST_TYPED + 10_000)
    for at in range(0, len(sent), 1000):
        os.write(keyboard, sent[at : at + 1000])  # waits until there is room
    seen.wait_until(lambda pieces: sum(map(len, pieces)) == len(sent))
    assert b"".join(seen.items) == sent
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(MOST_TYPED) == sent[:MOST_TYPED]
    os.write(keyboard, b"and on")
    assert guest.wait_typed(MOST_TYPED + 6) == sent[:MOST_TYPED] + b"and on"
    assert caplog.messages == ["the guest does not read its serial line: what is typed now is lost"]


def test_terminal_in_the_background_is_not_read_and_is_taken_again_in_the_foreground(
    console: Console, reactor: Reactor, keyboard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, retaken = Guest(console), Inbox[None]()
    console.retake = lambda: retaken.put(None)
    monkeypatch.setattr(console_module, "LOOK_AGAIN", 0.01)
    looks: Inbox[None] = Inbox()
    away = [True]

    def in_background(_: int) -> bool:
        looks.put(None)
        return away[0]

    monkeypatch.setattr(console_module, "in_background", in_background)
    os.write(keyboard, b"typed")
    looks.wait(5)
    assert guest.typed.items == []
    away[0] = False
    retaken.wait()
    assert guest.wait_typed(5) == b"typed"


def test_terminal_that_is_taken_while_it_is_read_has_not_ended(
    console: Console, reactor: Reactor, keyboard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(console)
    monkeypatch.setattr(console_module, "LOOK_AGAIN", 0.01)
    asked: Inbox[None] = Inbox()

    def in_background(_: int) -> bool:
        asked.put(None)
        return len(asked.items) == 2

    def refused(*_: int) -> bytes:
        monkeypatch.setattr(os, "read", read)
        raise OSError(errno.EIO, "Input/output error")

    read = os.read
    monkeypatch.setattr(console_module, "in_background", in_background)
    monkeypatch.setattr(os, "read", refused)
    os.write(keyboard, b"typed")
    assert guest.wait_typed(5) == b"typed"


def test_what_the_operator_types_comes_before_what_a_client_sent(
    console: Console, reactor: Reactor, attach: Attach, keyboard: int
) -> None:
    guest = Guest(console, room=4)
    attach().socket.sendall(b"s" * 1000)
    guest.wait_typed(4)
    seen = note_keys(console)
    os.write(keyboard, b"typed")
    seen.wait()
    settle(reactor)
    guest.room = 3
    console.offer()
    assert guest.wait_typed(7) == b"sssstyp"
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(1005) == b"sssstyped" + b"s" * 996


def test_client_is_held_back_while_what_the_operator_typed_waits(
    console: Console, reactor: Reactor, attach: Attach, keyboard: int
) -> None:
    guest = Guest(console, room=1)
    os.write(keyboard, b"typed")
    guest.wait_typed(1)
    attach().socket.sendall(b"sent")
    settle(reactor)
    assert not console._waiting
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(9) == b"typedsent"


def test_pipe_as_standard_input_loses_nothing_of_what_a_slow_guest_reads(console: Console, reactor: Reactor) -> None:
    guest = Guest(console, room=100)
    input_fd, typist = os.pipe()
    os.set_blocking(input_fd, False)
    console.attach(input_fd, -1)
    sent = random.randbytes(1 << 20)
    thread = threading.Thread(target=each(lambda: write_all(typist, sent), lambda: os.close(typist)))
    thread.start()
    for size in range(100, 100_000, 10_000):
        assert guest.wait_typed(size) == sent[:size]
        guest.room = 10_000
        console.offer()
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(len(sent)) == sent
    thread.join()


def write_all(fd: int, data: bytes) -> None:
    """Write ``data`` to a descriptor that blocks."""
    while data:
        data = data[os.write(fd, data) :]


def test_what_is_shown_goes_to_the_backend_alone(console: Console, reactor: Reactor, attach: Attach) -> None:
    console.show(b"to nobody")
    backend, client = attach_pipe(console), attach()
    console.show(b"help")
    console.write(b"output")
    assert read_exactly(backend, 10) == b"helpoutput"
    assert client.read(6) == b"output"
    os.close(backend)


def test_end_of_standard_input_is_not_the_end_of_the_output(console: Console, reactor: Reactor) -> None:
    guest = Guest(console)
    input_fd, typist = os.pipe()
    reader, output_fd = os.pipe()
    os.set_blocking(input_fd, False)
    os.set_blocking(output_fd, False)
    console.attach(input_fd, output_fd)
    os.write(typist, b"last")
    os.close(typist)
    assert guest.wait_typed(4) == b"last"
    settle(reactor)
    console.offer()
    settle(reactor)
    console.write(b"goes on")
    assert read_exactly(reader, 7) == b"goes on"
    os.close(reader)


def test_dev_null_as_standard_input_leaves_the_console_to_others(
    console: Console, reactor: Reactor, attach: Attach
) -> None:
    guest = Guest(console)
    console.attach(os.open(os.devnull, os.O_RDONLY), -1)
    attach().socket.sendall(b"hi")
    assert guest.wait_typed(2) == b"hi"


def test_file_as_standard_input_is_typed_to_its_end_as_the_guest_has_room(
    console: Console, reactor: Reactor, tmp_path: Path
) -> None:
    content = random.randbytes(30_000)
    (tmp_path / "script").write_bytes(content)
    guest = Guest(console, room=100)
    console.attach(os.open(tmp_path / "script", os.O_RDONLY), -1)
    assert guest.wait_typed(100) == content[:100]
    guest.room = 1 << 30
    console.offer()
    assert guest.wait_typed(len(content)) == content


def test_pty_carries_both_directions_and_survives_that_nobody_has_it_open(console: Console, reactor: Reactor) -> None:
    guest = Guest(console)
    terminal = console.open_pty()
    console.write(b"nobody sees this yet\n")
    first = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    assert read_exactly(first, 21) == b"nobody sees this yet\n"
    os.write(first, b"\x03\x04\r")
    assert guest.wait_typed(3) == b"\x03\x04\r"
    os.close(first)
    settle(reactor)
    second = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    console.write(b"again")
    assert read_exactly(second, 5) == b"again"
    os.close(second)


def test_pty_that_nobody_reads_does_not_take_the_guests_room(console: Console) -> None:
    console.open_pty()
    for _ in range(100):
        console.write(bytes(4096))
    assert console.room()


def test_file_backend_appends_for_its_owner_only(console: Console, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"earlier\n")
    console.open_file(str(tmp_path / "log"))
    console.open_file(str(tmp_path / "new"))
    console.write(b"now\n")
    assert (tmp_path / "log").read_bytes() == b"earlier\nnow\n"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_file_backend_that_cannot_be_opened_is_named(console: Console, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=rf"^{tmp_path}/no/log: ENOENT: cannot be written"):
        console.open_file(f"{tmp_path}/no/log")


def test_file_backend_follows_a_link_to_what_is_there_and_makes_nothing_through_one(
    console: Console, tmp_path: Path
) -> None:
    (tmp_path / "log").touch()
    (tmp_path / "link").symlink_to("log")
    console.open_file(str(tmp_path / "link"))
    console.write(b"now\n")
    assert (tmp_path / "log").read_bytes() == b"now\n"
    (tmp_path / "trap").symlink_to("victim")
    with pytest.raises(HostError, match=r"trap: ELOOP: cannot be written; it is a symbolic link to what is not there"):
        console.open_file(str(tmp_path / "trap"))
    assert not (tmp_path / "victim").exists()


def test_named_pipe_that_nobody_reads_is_refused_and_not_waited_for(console: Console, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HostError, match="fifo: ENXIO: cannot be written"):
        console.open_file(str(tmp_path / "fifo"))


def test_socket_that_cannot_be_made_is_named(console: Console, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=rf"^{tmp_path}/no/sock: ENOENT: cannot listen there"):
        console.listen(f"{tmp_path}/no/sock")


def test_nothing_stays_open_after_close(reactor: Reactor, tmp_path: Path) -> None:
    before = open_descriptors()
    console = Console(reactor)
    backend = attach_pipe(console)
    console.open_pty()
    console.open_file(str(tmp_path / "log"))
    console.listen(str(tmp_path / "sock"))
    client = Client(reactor, str(tmp_path / "sock"))
    console.close()
    console.close()
    client.socket.close()
    os.close(backend)
    assert open_descriptors() == before
