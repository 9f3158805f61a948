"""Both ends of a migration's connections in one process, each in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Generic, TypeVar

from kvmpy.errors import KvmpyError
from kvmpy.migration.arrival import Arrival, Incoming
from kvmpy.migration.channel import SocketChannel
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.stop import Stop
from kvmpy.migration.tls import TlsCredentials
from kvmpy.migration.transport import Connector, connect
from tests.fakes.loop import BOUND

T = TypeVar("T")
# What a test waits for that is not to come.
SHORT = 0.05


class Thread(Generic[T]):
    """A call in a thread of its own; `result` gives what it returned, or raises what it raised."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="other side", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as e:  # noqa: BLE001  raised again by `result`
            self._error = e

    def result(self) -> T:
        self._thread.join(BOUND)
        assert not self._thread.is_alive(), "it waits for ever"
        if self._error is not None:
            raise self._error
        return self._result[0]

    def error(self) -> str:
        """What it raised, in words."""
        try:
            self.result()
        except KvmpyError as e:
            return str(e)
        raise AssertionError("it raised nothing")


@contextmanager
def pair(*, timeout: float = BOUND) -> Iterator[tuple[SocketChannel, SocketChannel]]:
    """Two channels, connected."""
    with ExitStack() as stack:
        channels = []
        for name, end in zip(("here", "there"), socket.socketpair(), strict=True):
            channel = SocketChannel(name, stack.enter_context(Stop()), end)
            channel.timeout = timeout
            stack.callback(channel.close)
            channels.append(channel)
        yield channels[0], channels[1]


@contextmanager
def main_pair(*, timeout: float = BOUND) -> Iterator[tuple[MainChannel, MainChannel]]:
    """Two main channels, connected."""
    with pair(timeout=timeout) as (here, there):
        yield MainChannel(here, 1), MainChannel(there, 1)


@contextmanager
def connected(
    uri: str,
    source_tls: TlsCredentials | None = None,
    destination_tls: TlsCredentials | None = None,
    *,
    timeout: float = BOUND,
) -> Iterator[tuple[Connector, Arrival]]:
    """A source and a destination that have met at ``uri``; tcp:HOST:0 is a port of the kernel's choice."""
    with ExitStack() as stack:
        incoming = stack.enter_context(listening(uri, destination_tls, timeout=timeout))
        arriving = Thread(incoming.accept)
        connector = stack.enter_context(
            connect(
                at(incoming),
                source_tls,
                stop=stack.enter_context(Stop()),
                timeout=timeout,
                insecure=source_tls is None,
            )
        )
        yield connector, stack.enter_context(arriving.result())


@contextmanager
def listening(uri: str, tls: TlsCredentials | None = None, *, timeout: float = BOUND) -> Iterator[Incoming]:
    """A destination that listens, with a Stop of its own."""
    with Stop() as stop, Incoming(uri, tls, stop=stop, timeout=timeout, insecure=tls is None) as incoming:
        yield incoming


def at(incoming: Incoming) -> str:
    """Where it listens."""
    return incoming.uri.removesuffix(":0") + f":{incoming.port}" if incoming.uri.endswith(":0") else incoming.uri
