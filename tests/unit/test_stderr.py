"""Standard error while a machine runs: whole lines or none, a count of those that were lost, and never a wait."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvmpy.cli.main import tell
from kvmpy.host.stderr import LossyText, lossy_stderr
from tests.fakes.loop import open_descriptors

PIPE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A small pipe: what reads, and what writes without blocking."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE)
    os.set_blocking(writer, False)
    yield reader, writer
    os.close(reader)


@contextmanager
def stderr_is(fd: int) -> Iterator[logging.Handler]:
    """Make ``fd`` standard error, in place of the one that pytest captures; the logging that goes there."""
    captured, saved = sys.stderr, os.dup(2)
    os.dup2(fd, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    sys.stderr = captured
    os.dup2(saved, 2)
    os.close(saved)


def line(number: int) -> str:
    return f"{number:099}\n"


def fill(text: LossyText, count: int) -> None:
    for number in range(count):
        text.write(line(number))


def test_what_fits_is_written_at_once(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with LossyText(writer) as text:
        text.write("one\n\udcff\n")
        assert os.read(reader, PIPE) == b"one\n\\udcff\n"


def test_lines_that_do_not_fit_are_lost_and_counted_before_the_next(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with LossyText(writer) as text:
        fill(text, 100)
        held = os.read(reader, 2 * PIPE).decode()
        assert held == "".join(line(number) for number in range(PIPE // 100))
        text.write("next\n")
        lost = 100 - PIPE // 100
        assert (
            os.read(reader, PIPE).decode()
            == f"kvmpy: {lost} lines lost here: standard error was not being read\nnext\n"
        )
        text.write("and on\n")
        assert os.read(reader, PIPE) == b"and on\n"


def test_a_line_that_has_been_begun_is_finished_before_another(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    long = "x" * (PIPE + 10) + "\n"
    with LossyText(writer) as text:
        text.write(long)
        text.write("lost\n")
        received = os.read(reader, 2 * PIPE)
        text.write("next\n")
        received += os.read(reader, 2 * PIPE)
    assert received.decode() == f"{long}kvmpy: 1 line lost here: standard error was not being read\nnext\n"


def test_what_was_lost_is_said_at_the_latest_at_the_end(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    with LossyText(writer) as text:
        fill(text, 100)
        os.read(reader, 2 * PIPE)
    assert os.read(reader, PIPE).endswith(b" lines lost here: standard error was not being read\n")
    text.close()
    assert text.closed


def test_a_reader_that_has_gone_is_not_an_error(pipe: tuple[int, int]) -> None:
    with LossyText(pipe[1]) as text:
        fill(text, 50)
        other = os.dup(pipe[0])
        os.dup2(os.open(os.devnull, os.O_RDONLY), pipe[0])
        os.close(other)
        fill(text, 2)


def test_a_write_after_the_end_goes_nowhere(pipe: tuple[int, int]) -> None:
    text = LossyText(pipe[1])
    text.close()
    text.write("too late\n")
    text.flush()


def test_threads_that_write_at_once_do_not_mix_their_lines(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    with LossyText(writer) as text:
        threads = [threading.Thread(target=fill, args=(text, 500)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(os.read(reader, 1 << 20).decode().splitlines(keepends=True)) == sorted(
        line(number) for number in range(500) for _ in range(4)
    )


def test_neither_log_nor_trace_waits_for_a_reader_of_standard_error(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, True)
    with stderr_is(writer) as handler:
        ordinary, before = sys.stderr, open_descriptors()
        with lossy_stderr():
            for number in range(100):
                logging.getLogger("kvmpy").error("%s", line(number).rstrip())
                tell(line(number).rstrip())
            assert os.get_blocking(2)
        assert sys.stderr is ordinary
        assert isinstance(handler, logging.StreamHandler)
        assert handler.stream is ordinary
        assert open_descriptors() == before
    os.close(writer)
    received = os.read(reader, PIPE).decode()
    assert received.startswith("".join(line(number // 2) for number in range(PIPE // 100)))
    assert received.endswith("kvmpy: 160 lines lost here: standard error was not being read\n")


def test_a_socket_that_others_write_to_blocks_them_again_afterwards() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, stderr_is(ours.fileno()):
        with lossy_stderr():
            assert not os.get_blocking(2)
            tell("said")
        assert os.get_blocking(2)
        assert theirs.recv(PIPE) == b"said\n"
