"""Channels for pages over a socket pair: plain ones, which the native side uses by itself, and sealed ones."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kvmpy.errors import StreamError


class FakeChannel:
    """A `kvmpy.migration.records.PageChannel`. ``sealed`` ones show no descriptor, as those with TLS do."""

    def __init__(self, end: socket.socket, *, sealed: bool = False, timeout: float = 10.0) -> None:
        self.socket, self._sealed, self.timeout = end, sealed, timeout

    @property
    def raw_fd(self) -> int | None:
        return None if self._sealed else self.socket.fileno()

    def send(self, *buffers: Any) -> None:
        self.socket.settimeout(self.timeout)
        try:
            for buffer in buffers:
                self.socket.sendall(buffer)
        except OSError as e:
            raise StreamError(f"send: {e}") from e

    def receive(self, size: int) -> bytes:
        data = bytearray(size)
        self.receive_into(data)
        return bytes(data)

    def receive_into(self, buffer: Any) -> None:
        view = memoryview(buffer)
        self.socket.settimeout(self.timeout)
        while view:
            try:
                got = self.socket.recv_into(view)
            except OSError as e:
                raise StreamError(f"receive: {e}") from e
            if not got:
                raise StreamError("receive: closed")
            view = view[got:]

    def shutdown(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


@contextmanager
def channel_pairs(count: int = 1, *, sealed: bool = False) -> Iterator[tuple[list[FakeChannel], list[FakeChannel]]]:
    """The sending and the receiving ends of ``count`` channels, closed at the end."""
    pairs = [socket.socketpair() for _ in range(count)]
    ends = [[FakeChannel(pair[side], sealed=sealed) for pair in pairs] for side in range(2)]
    try:
        yield ends[0], ends[1]
    finally:
        for channel in (*ends[0], *ends[1]):
            channel.close()
