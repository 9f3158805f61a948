"""Somebody between the two sides of a migration, who reads along and can do harm at any message."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final

from kvmpy.migration.messages import Kind
from kvmpy.migration.wire import FRAME_SIZE, MAIN, PREAMBLE_SIZE, FrameHeader, Preamble
from tests.fakes.loop import BOUND

PIECE: Final = 1 << 16


class Harm(Enum):
    """What is done to a message, and from then on."""

    CUT = "both directions end"
    HANG = "neither goes on, and nothing is said"
    DEAF = "this direction is swallowed, and the other goes on"
    GARBAGE = "it becomes nonsense"
    CHATTER = "this direction is swallowed, and who sends says all the time that it is at work"


class Middle:
    """Listens at ``here`` and passes on to ``there`` and back, both paths of unix sockets.

    ``at`` is the kind of message, of the main channel, that ``harm`` is done to: the first of its kind. ``hooks`` are
    called before a message of their kind is passed on, or harmed, once. Page channels share the fate of CUT and HANG.
    With ``version`` each side takes the other for one that speaks none newer.
    """

    def __init__(
        self,
        here: str,
        there: str,
        at: Kind | None = None,
        harm: Harm | None = None,
        *,
        hooks: Mapping[Kind, Callable[[], object]] | None = None,
        version: int | None = None,
    ) -> None:
        self._version = version
        self._there, self._at, self._harm, self._hooks = there, at, harm, dict(hooks or {})
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._hung = self._cut = False
        self._closing = threading.Event()
        self.seen: list[Kind] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(here)
        os.chmod(here, 0o700)
        self._listener.listen(16)
        self._start(self._accept)

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who accepts
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(BOUND)
        for each in self._sockets:
            each.close()

    def cut(self) -> None:
        """End everything, both ways."""
        self._cut = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                source, _ = self._listener.accept()
            except OSError:
                return
            destination = socket.socket(socket.AF_UNIX)
            self._sockets += [source, destination]
            with contextlib.suppress(OSError):  # it has been killed: who passes on finds out
                destination.connect(self._there)
            if self._cut:
                self.cut()
            self._start(lambda s=source, d=destination: self._pass(s, d))  # type: ignore[misc]
            self._start(lambda s=source, d=destination: self._pass(d, s))  # type: ignore[misc]

    def _pass(self, source: socket.socket, to: socket.socket) -> None:
        """One direction, to its end. Both sides begin with a preamble, which says which channel it is."""
        with contextlib.suppress(OSError, EOFError):
            first = Preamble.unpack(_exactly(source, PREAMBLE_SIZE))
            highest = min(first.highest, self._version or first.highest)
            to.sendall(first._replace(highest=highest).pack())
            if first.channel == MAIN:
                self._pass_frames(source, to)
            while data := source.recv(PIECE):
                if self._hung:
                    return
                to.sendall(data)
        if not self._hung:
            for each, way in ((to, socket.SHUT_WR), (source, socket.SHUT_RD)):  # of one who is killed both hear at once
                with contextlib.suppress(OSError):
                    each.shutdown(way)

    def _pass_frames(self, source: socket.socket, to: socket.socket) -> None:
        deaf = False
        while True:
            header = _exactly(source, FRAME_SIZE)
            frame = FrameHeader.unpack(header)
            payload = _exactly(source, frame.length)
            kind = Kind(frame.kind)
            if (hook := self._hooks.pop(kind, None)) is not None:
                hook()
            if kind is self._at and kind not in self.seen:
                match self._harm:
                    case Harm.CUT:
                        self.cut()
                    case Harm.HANG:
                        self._hung = True
                    case Harm.DEAF:
                        deaf = True
                    case Harm.CHATTER:
                        deaf = True
                        self._start(lambda: self._chatter(to))
                    case Harm.GARBAGE:
                        header, payload = os.urandom(FRAME_SIZE), os.urandom(len(payload) + 64)
            self.seen.append(kind)
            if not (self._hung or self._cut or deaf):
                to.sendall(header + payload)

    def _chatter(self, to: socket.socket) -> None:
        payload = b"{}"
        message = FrameHeader.of(Kind.KEEPALIVE, payload).pack() + payload
        with contextlib.suppress(OSError):
            while not self._closing.wait(0.01):
                to.sendall(message)

    def _start(self, call: Callable[[], object]) -> None:
        thread = threading.Thread(target=call, name="middle", daemon=True)
        self._threads.append(thread)
        thread.start()


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (piece := source.recv(size - len(data))):
            raise EOFError
        data += piece
    return data
