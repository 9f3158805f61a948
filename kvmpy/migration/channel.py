"""One connection of a migration, over any descriptor: exactly the bytes that are wanted, or an error that says where.

Nothing waits for ever. What is sent or received goes in pieces of at most PIECE bytes, each of which must be through
within `Channel.timeout`: so a peer that has stopped is found within one timeout, as is one that only dribbles. A wait
ends at once when somebody calls `shutdown`, or sets the Stop that the channel shares with the rest of its migration.

A thread that sends and one that receives may use a channel at once, but not two of either.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Final, TypeVar

from kvmpy.errors import MigrationCancelled, StreamError, errno_name, refusal
from kvmpy.migration.stop import TIMEOUT, Deadline, Stop

PIECE: Final = 256 << 10  # at 10 seconds a link of 25 kB/s will do, and one of which less comes is no link
IOV_MAX: Final = 64  # buffers a system call; the kernel would take 1024
T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

GONE: Final = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ESHUTDOWN)
READ: Final = select.POLLIN
WRITE: Final = select.POLLOUT


class Channel:
    """A descriptor that does not block, and bytes both ways or one way.

    ``raw_fd`` is for whoever moves bytes without us, such as the page pump: it must cope with EAGAIN, and poll
    ``stop.fd`` beside. It is None where the bytes on the descriptor are not those of the stream (TLS). ``is_kept``:
    nobody reads yet what is sent, nor waits for it.
    """

    def __init__(self, name: str, stop: Stop, *, can_answer: bool) -> None:
        self.name = name
        self.stop = stop
        self.can_answer = can_answer
        self.hears_first = self.is_kept = False
        self.timeout = TIMEOUT
        self.sent = 0
        self.received = 0
        self._down: str | None = None

    @property
    def fd(self) -> int:
        """What is polled; -1 once closed."""
        raise NotImplementedError

    @property
    def raw_fd(self) -> int | None:
        return self.fd

    def send(self, *buffers: Buffer, timeout: float | None = None) -> None:
        """All of the buffers, one after the other. Raises StreamError."""
        left = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view]
        pace = _Pace(self.timeout if timeout is None else timeout)
        while left:
            taken = self._step(self.write_some, left[:IOV_MAX], WRITE, pace.deadline)
            pace.progress(taken)
            self._went(taken, left)

    def send_last(self, *buffers: Buffer) -> None:
        """What goes of the buffers at once, also after `stop` was set, by whom it may have been. Raises nothing."""
        left = [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view]
        with suppress(OSError):  # there is no room, or nobody
            while left and (taken := self.write_some(left[:IOV_MAX])):
                self._went(taken, left)

    def receive(self, size: int, timeout: float | None = None) -> bytes:
        """Exactly ``size`` bytes, which the caller has compared with a cap; room is made as they come.

        Raises StreamError where they do not come. ``timeout`` is for this once.
        """
        data = bytearray()
        while len(data) < size:
            piece = bytearray(min(PIECE, size - len(data)))
            self.receive_into(piece, timeout)
            data += piece
        return bytes(data)

    def receive_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> None:
        """Fill ``buffer``. Raises StreamError where the stream ends before that, or stalls."""
        left = memoryview(buffer).cast("B")
        pace = _Pace(self.timeout if timeout is None else timeout)
        while left:
            taken = self._step(self.read_some, left, READ, pace.deadline)
            if not taken:
                raise StreamError(self.ended(len(left)))
            self.received += taken
            pace.progress(taken)
            left = left[taken:]

    def next_byte(self) -> bytes:
        """Wait for one more byte, nothing at the end of the stream."""
        byte = bytearray(1)
        taken = self._step(self.read_some, memoryview(byte), READ, Deadline(self.timeout))
        self.received += taken
        return bytes(byte[:taken])

    def greet(self) -> Generator[int, None, None]:
        """What must be done before the first byte: yields the events to wait for on ``fd``."""
        yield from ()

    def read_some(self, view: memoryview) -> int | None:
        """Some bytes, 0 at the end of the stream, None where there are none yet. Raises OSError."""
        return os.readv(self.fd, [view])

    def write_some(self, views: list[memoryview]) -> int | None:
        """How many bytes went, None where there is no room yet. Raises OSError."""
        return os.writev(self.fd, views)

    def wanted(self, events: int) -> int:
        """What to wait for, after a None of the call that these events are for."""
        return events

    def settle(self) -> None:
        """What was sent stays, whatever happens to this host: before the last message, so it can be called off.

        May take long, and ends when the Stop is set. Raises MigrationError, HostError.
        """

    def finish(self) -> None:
        """After the last byte: see to it that it has got where it can stay. Raises StreamError where it has not."""

    def withdraw(self) -> bool:
        """Whether all that was sent is gone for certain, with nobody who could have read it."""
        return False

    def shutdown(self, reason: str = "the channel was shut down") -> None:
        """Wake whoever waits for this channel, here and, where it is a connection, on the other side. Any thread.

        From here on every use of it raises MigrationCancelled.
        """
        self._down = self._down or reason
        self._cut()

    def close(self) -> None:
        """Give the descriptor up. Only when nobody uses the channel any more; twice is allowed."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises MigrationCancelled after `shutdown`."""
        self.stop.check()
        if self._down is not None:
            raise MigrationCancelled(f"{self.name}: {self._down}")

    def ended(self, missing: int) -> str:
        """What to say where the stream ends too early."""
        return f"{self.name}: the other side has ended the stream after byte {self.received}; {missing} more were due"

    def _went(self, taken: int, left: list[memoryview]) -> None:
        """So many bytes of what is left to be sent have gone."""
        self.sent += taken
        while left and taken >= len(left[0]):
            taken -= len(left.pop(0))
        if taken:
            left[0] = left[0][taken:]

    def _cut(self) -> None:
        self.stop.set(self._down or "")

    def attempt(self, call: Callable[[T], int | None], what: T, events: int) -> int | None:
        """One call of `read_some` or `write_some`: how many bytes it moved, None where it must wait.

        Raises StreamError, or MigrationCancelled.
        """
        self.check()
        try:
            moved = call(what)
        except BlockingIOError:
            moved = None
        except OSError as e:
            self.check()
            raise StreamError(self._broken(e, events)) from e
        self.check()
        return moved

    def _step(self, call: Callable[[T], int | None], what: T, events: int, deadline: Deadline) -> int:
        """One call that moves bytes, when it can."""
        while (moved := self.attempt(call, what, events)) is None:
            self.stop.wait(self.fd, self.wanted(events), deadline, self._stalled(events))
        return moved

    def _stalled(self, events: int) -> str:
        if events == WRITE:
            return f"{self.name}: the other side takes no more bytes after byte {self.sent}: not {PIECE >> 10} KiB"
        return f"{self.name}: nothing more from the other side after byte {self.received}: not what was due"

    def _broken(self, e: OSError, events: int) -> str:
        verb, at = ("sent", self.sent) if events == WRITE else ("received", self.received)
        if e.errno in GONE:
            return f"{self.name}: {errno_name(e.errno)}: the other side has gone; {at} bytes were {verb}"
        return f"{self.name}: {refusal(e.errno, f'no more can be {verb} after byte {at}')}"


class _Pace:
    """Each PIECE has its own deadline."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._moved = 0
        self.deadline = Deadline(timeout)

    def progress(self, count: int) -> None:
        self._moved += count
        if self._moved >= PIECE:
            self._moved = 0
            self.deadline = Deadline(self._timeout)


class SocketChannel(Channel):
    """A connected stream socket, which it owns."""

    def __init__(self, name: str, stop: Stop, connection: socket.socket) -> None:
        super().__init__(name, stop, can_answer=True)
        connection.setblocking(False)
        self._socket = connection
        self._closing = threading.Lock()

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        with self._closing:
            self._socket.close()

    def _cut(self) -> None:
        with self._closing, suppress(OSError):  # it may be closed, or never have been connected
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class FileChannel(Channel):
    """One end of a pipe, or a file, which it owns: bytes go one way, so it shares no Stop with another channel."""

    def __init__(self, name: str, stop: Stop, fd: int) -> None:
        super().__init__(name, stop, can_answer=False)
        os.set_blocking(fd, False)
        self._fd = fd

    @property
    def fd(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
