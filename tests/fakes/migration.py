"""Both ends of a migration's connections in one process, each in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Generic, Self, TypeVar

from kvmpy.errors import KvmpyError
from kvmpy.migration.arrival import Arrival, Incoming
from kvmpy.migration.channel import SocketChannel
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.stop import Deadline, Stop
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

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def over(self) -> None:
        """Wait until it is, however it ends."""
        self._thread.join(BOUND)
        assert not self.is_alive(), "it waits for ever"

    def result(self) -> T:
        self.over()
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


def soon(seconds: float = 0.02) -> Deadline:
    """For a pause that makes what is tested likelier, and without which a test is right too."""
    return Deadline(seconds)


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


class Relay:
    """A cable between a source and a destination that can be cut: who is at its ends hears nothing of it."""

    def __init__(self, directory: Path) -> None:
        self._path = f"{directory}/relay"
        self._stack = ExitStack()
        self._cut: dict[str, threading.Event] = {"forward": threading.Event(), "back": threading.Event()}

    @contextmanager
    def connected(self, *, timeout: float) -> Iterator[tuple[Connector, Arrival]]:
        """Both ends, whose waits end after ``timeout``; they have met before it counts."""
        with ExitStack() as stack:
            incoming = stack.enter_context(listening(f"unix:{self._path}.far"))
            server = stack.enter_context(socket.create_server(self._path, family=socket.AF_UNIX))
            arriving = Thread(incoming.accept)
            linking = Thread(lambda: self._link(server))
            stop = stack.enter_context(Stop())
            source = stack.enter_context(connect(f"unix:{self._path}", stop=stop, timeout=BOUND))
            destination = stack.enter_context(arriving.result())
            linking.result()
            source.main.channel.timeout = destination.main.channel.timeout = timeout
            yield source, destination

    def cut(self, *, forward: bool, back: bool) -> None:
        """What goes from the source to the destination, and what comes back."""
        for name, wanted in (("forward", forward), ("back", back)):
            if wanted:
                self._cut[name].set()

    def _link(self, server: socket.socket) -> None:
        near, _ = server.accept()
        far = socket.socket(socket.AF_UNIX)
        far.connect(f"{self._path}.far")
        for end in (near, far):
            self._stack.callback(end.close)
        for name, source, sink in (("forward", near, far), ("back", far, near)):
            thread = threading.Thread(target=self._pump, args=(self._cut[name], source, sink), daemon=True)
            thread.start()
            self._stack.callback(thread.join, BOUND)
            self._stack.callback(_shut, source)

    def _pump(self, cut: threading.Event, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while not cut.is_set() and (data := source.recv(1 << 16)):
                if not cut.is_set():
                    sink.sendall(data)
            if not cut.is_set():
                sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def at(incoming: Incoming) -> str:
    """Where it listens."""
    return incoming.uri.removesuffix(":0") + f":{incoming.port}" if incoming.uri.endswith(":0") else incoming.uri
