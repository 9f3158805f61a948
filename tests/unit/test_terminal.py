"""The operator's terminal: raw while we have it, as before after; the escape key; descriptors that never block."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.host.terminal import EscapeFilter, RawTerminal, blocking_as_before, reopen
from tests.counts import count
from tests.fakes.loop import Inbox

EXAMPLES = count(20, 5000)

LOCAL = 3  # the index of c_lflag in what tcgetattr returns
OUTPUT = 1


@pytest.fixture
def terminal() -> Iterator[int]:
    """The terminal side of a pty."""
    ours, theirs = os.openpty()
    yield theirs
    os.close(theirs)
    os.close(ours)


def attributes(fd: int) -> list[Any]:
    return termios.tcgetattr(fd)


def is_raw(fd: int) -> bool:
    return not attributes(fd)[LOCAL] & (termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)


def test_terminal_is_raw_within_and_exactly_as_before_after(terminal: int) -> None:
    before = attributes(terminal)
    with RawTerminal(terminal):
        assert is_raw(terminal)
    assert attributes(terminal) == before


def test_keys_arrive_at_once_unchanged_and_without_an_echo() -> None:
    ours, theirs = os.openpty()
    with RawTerminal(theirs):
        os.write(ours, b"\x03\x04\x11\x13\x1a\x1c\r\n\xff\x7f")
        assert os.read(theirs, 100) == b"\x03\x04\x11\x13\x1a\x1c\r\n\xff\x7f"
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    os.close(theirs)
    os.close(ours)


def test_output_processing_stays_on_so_that_messages_do_not_staircase(terminal: int) -> None:
    before = attributes(terminal)[OUTPUT]
    with RawTerminal(terminal):
        assert attributes(terminal)[OUTPUT] == before
        assert before & termios.OPOST


def test_terminal_is_as_before_after_an_exception(terminal: int) -> None:
    before = attributes(terminal)
    with pytest.raises(ZeroDivisionError), RawTerminal(terminal):
        _ = 1 // 0
    assert attributes(terminal) == before


def test_odd_settings_of_the_operators_come_back_too(terminal: int) -> None:
    odd = attributes(terminal)
    odd[0] |= termios.PARMRK | termios.ISTRIP | termios.IGNCR
    odd[LOCAL] &= ~termios.ECHO
    odd[6][termios.VINTR] = b"\x07"
    termios.tcsetattr(terminal, termios.TCSANOW, odd)
    before = attributes(terminal)
    with RawTerminal(terminal):
        assert attributes(terminal)[0] & (termios.PARMRK | termios.ISTRIP | termios.IGNCR) == 0
    assert attributes(terminal) == before


def test_restoring_twice_does_not_undo_what_the_operator_did_since(terminal: int) -> None:
    raw = RawTerminal(terminal)
    with raw:
        pass
    since = attributes(terminal)
    since[LOCAL] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, since)
    raw.restore()
    assert attributes(terminal) == since


def test_being_continued_makes_the_terminal_raw_again(terminal: int) -> None:
    before = attributes(terminal)
    with RawTerminal(terminal):
        termios.tcsetattr(terminal, termios.TCSANOW, before)  # as a shell does when it takes the terminal
        signal.raise_signal(signal.SIGCONT)
        assert is_raw(terminal)
    assert attributes(terminal) == before


def test_being_continued_without_the_terminal_is_survived() -> None:
    ours, theirs = os.openpty()
    with RawTerminal(theirs):
        os.close(ours)
        signal.raise_signal(signal.SIGCONT)
    os.close(theirs)


def test_handler_of_sigcont_is_put_back(terminal: int) -> None:
    seen: Inbox[int] = Inbox()
    before = signal.signal(signal.SIGCONT, lambda number, _: seen.put(number))
    try:
        with RawTerminal(terminal):
            signal.raise_signal(signal.SIGCONT)
        assert seen.items == []
        signal.raise_signal(signal.SIGCONT)
        assert seen.items == [signal.SIGCONT]
    finally:
        signal.signal(signal.SIGCONT, before)


def test_what_is_no_terminal_is_refused_and_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGCONT)
    with pytest.raises(termios.error), open(os.devnull) as file, RawTerminal(file.fileno()):
        pass
    assert signal.getsignal(signal.SIGCONT) == before


class Keys:
    """An escape filter, what its commands were told, and what it showed."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.shown: list[bytes] = []
        self.filter = EscapeFilter(
            {
                "x": (lambda: self.done.append("x"), "stop the guest"),
                "p": (lambda: self.done.append("p"), "power button"),
            },
            self.shown.append,
        )


@pytest.mark.parametrize(
    ("typed", "kept", "done"),
    [
        (b"ls -l\r", b"ls -l\r", []),
        (b"a\x01xb", b"ab", ["x"]),
        (b"\x01p\x01x", b"", ["p", "x"]),
        (b"\x01a", b"\x01", []),
        (b"\x01\x01", b"\x01", []),
        (b"\x01\x01x", b"\x01x", []),
        (b"\x01Z\x01\xff.", b".", []),
        (b"\x01X", b"", []),
    ],
)
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_escape_key_takes_its_commands_out_however_they_arrive(
    typed: bytes, kept: bytes, done: list[str], at_once: int
) -> None:
    keys = Keys()
    assert b"".join(keys.filter(typed[at : at + at_once]) for at in range(0, len(typed), at_once)) == kept
    assert keys.done == done


@pytest.mark.parametrize("key", [b"h", b"?"])
def test_help_lists_every_key_and_is_not_typed_to_the_guest(key: bytes) -> None:
    keys = Keys()
    assert keys.filter(b"\x01" + key) == b""
    assert keys.shown == [
        b"\r\nCtrl-A h  this help\r\nCtrl-A x  stop the guest\r\nCtrl-A p  power button\r\nCtrl-A a  send Ctrl-A\r\n"
    ]


@settings(max_examples=EXAMPLES)
@given(st.binary().filter(lambda data: 1 not in data))
def test_everything_else_passes_unchanged(data: bytes) -> None:
    assert Keys().filter(data) == data


@settings(max_examples=EXAMPLES)
@given(st.binary())
def test_doubled_escape_is_how_any_byte_gets_through(data: bytes) -> None:
    keys = Keys()
    assert keys.filter(data.replace(b"\x01", b"\x01\x01")) == data
    assert (keys.done, keys.shown) == ([], [])


def is_nonblocking(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)


def test_terminal_opened_afresh_does_not_block_and_leaves_the_shells_alone(terminal: int) -> None:
    ours = reopen(terminal, os.O_RDONLY)
    assert is_nonblocking(ours)
    assert not is_nonblocking(terminal)
    assert not os.get_inheritable(ours)
    os.close(ours)


def test_pipe_opened_afresh_carries_the_same_bytes() -> None:
    read_fd, write_fd = os.pipe()
    ours = reopen(read_fd, os.O_RDONLY)
    os.write(write_fd, b"typed")
    assert os.read(ours, 10) == b"typed"
    assert [is_nonblocking(ours), is_nonblocking(read_fd)] == [True, False]
    for fd in (ours, read_fd, write_fd):
        os.close(fd)


def test_regular_file_goes_on_from_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "script").write_bytes(b"firstsecond")
    with (tmp_path / "script").open("rb", buffering=0) as file:
        file.read(5)
        ours = reopen(file.fileno(), os.O_RDONLY)
        assert os.read(ours, 10) == b"second"
        os.close(ours)


def test_socket_cannot_be_opened_afresh_and_is_made_not_to_block() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        copy = reopen(ours.fileno(), os.O_RDWR)
        assert is_nonblocking(copy)
        os.close(copy)


def test_socket_blocks_its_other_users_afterwards_if_it_did_before() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with blocking_as_before(ours.fileno(), theirs.fileno()):
            for end in (ours, theirs):
                os.close(reopen(end.fileno(), os.O_RDWR))
            assert [is_nonblocking(end.fileno()) for end in (ours, theirs)] == [True, True]
        assert [is_nonblocking(end.fileno()) for end in (ours, theirs)] == [False, True]


def test_closed_descriptor_is_dev_null() -> None:
    free = os.dup(0)
    os.close(free)
    with blocking_as_before(free):
        ours = reopen(free, os.O_RDONLY)
    assert os.read(ours, 1) == b""
    os.close(ours)
