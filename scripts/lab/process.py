"""Commands in an emulated host, as its owner sees them: the other end of agent.py."""

from __future__ import annotations

import codecs
import itertools
import re
import shlex
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from scripts.lab import agent
from scripts.lab.errors import HostGone, LabError, LabTimeout

WAIT_SECONDS: Final = 300.0  # for anything, unless the caller knows better; many times what a busy machine needs
SEND_SECONDS: Final = 60  # the agent always reads, so a longer send means that the host hangs
RECEIVE_SIZE: Final = 1 << 18
# QEMU's emulation of SVM now and then loses an interrupt that comes as a guest is entered or left: the timer's of the
# host, say, and with it all that it would have begun. The guest has the processor then until any other interrupt comes,
# which was seen to take a minute. So there is always one soon.
NUDGE_SECONDS: Final = 0.25

Sink = Callable[[int, bytes], object]
"""Takes output as it comes: 1 for standard output or 2 for standard error, and the bytes."""

STREAMS: Final = {agent.STDOUT: 1, agent.STDERR: 2}


class Link:
    """The connection to the agent of one host.

    A thread reads it all the time and gives each process its frames, so that a process nobody waits for is not held up.
    ``changed`` guards what that thread writes, and is notified of every change. ``console`` gives the last lines of the
    host's console, for the text of errors.
    """

    def __init__(self, connection: socket.socket, console: Callable[[], str]) -> None:
        self.changed = threading.Condition()
        self.ready = False  # the agent has said that it runs
        self.gone = False
        self._socket, self._console = connection, console
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._processes: dict[int, Process] = {}
        self._reader = threading.Thread(target=self._read, name="lab-reader", daemon=True)
        self._reader.start()
        self._closing = threading.Event()
        self._nudger = threading.Thread(target=self._nudge, name="lab-nudger", daemon=True)
        self._nudger.start()

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str, size: tuple[int, int] | None, sink: Sink | None
    ) -> Process:
        number = next(self._numbers)
        process = Process(self, number, argv, sink)
        self._processes[number] = process
        self.send(agent.START, number, agent.start_payload(list(argv), dict(env), cwd, size))
        return process

    def forget(self, number: int) -> None:
        """Drop a process and its output; what it may still write goes nowhere."""
        self._processes.pop(number, None)

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        if len(payload) > agent.FRAME_LIMIT:
            raise LabError(f"arguments and environment of {len(payload)} bytes; at most {agent.FRAME_LIMIT} are taken")
        with self._sending:
            try:
                self._socket.sendall(agent.HEADER.pack(kind, number, len(payload)) + payload)
            except OSError as error:
                raise HostGone(self.report("the emulated host takes no more commands")) from error

    def wait_until(
        self, done: Callable[[], bool], timeout: float, awaited: str, process: Process | None = None
    ) -> None:
        """Wait for ``done``, which is called with ``changed`` held."""
        with self.changed:
            if self.changed.wait_for(lambda: done() or self.gone, timeout) and done():
                return
            error, text = (HostGone, "the host ended") if self.gone else (LabTimeout, f"{timeout:g} s were not enough")
        raise error(self.report(f"{text}, waiting for {awaited}", process))

    def report(self, text: str, process: Process | None = None) -> str:
        """``text`` with all that helps to understand it: the output so far and the console of the host."""
        output = f"\n--- output of {process} so far\n{process.output}" if process else ""
        return f"{text}{output}\n--- console of the emulated host\n{self._console()}"

    def close(self) -> None:
        """End the connection, and with it the thread."""
        self._closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._nudger.join()
        self._socket.close()

    def _nudge(self) -> None:
        """Give the host an interrupt now and then, once it runs: the agent drops what it has no job for."""
        with suppress(HostGone):
            while not self._closing.wait(NUDGE_SECONDS):
                if self.ready:
                    self.send(agent.NUDGE, agent.NOBODY)

    def _read(self) -> None:
        data = bytearray()
        try:
            while received := self._receive():
                data += received
                while len(data) >= agent.HEADER.size:
                    kind, number, length = agent.HEADER.unpack_from(data)
                    end = agent.HEADER.size + length
                    if len(data) < end:
                        break
                    self._dispatch(kind, number, bytes(data[agent.HEADER.size : end]))
                    del data[:end]
        finally:
            with self.changed:
                self.gone = True
                self.changed.notify_all()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(RECEIVE_SIZE)
        except ConnectionResetError:  # QEMU ended with something of ours unread
            return b""

    def _dispatch(self, kind: int, number: int, payload: bytes) -> None:
        process = self._processes.get(number)
        if process and process.sink and kind in STREAMS:
            process.sink(STREAMS[kind], payload)  # without the lock: it may block
            return
        with self.changed:
            if kind == agent.READY:
                self.ready = True
            elif process:
                process.receive(kind, payload)
            self.changed.notify_all()


class Process:
    """A command that runs in an emulated host. Its output is collected here, unless a sink takes it."""

    def __init__(self, link: Link, number: int, argv: Sequence[str], sink: Sink | None) -> None:
        self.argv = tuple(argv)
        self.returncode: int | None = None  # negative: the signal that ended it
        self.number, self.sink = number, sink
        self._link = link
        self._streams = {kind: bytearray() for kind in STREAMS}
        self._decoders = {kind: codecs.getincrementaldecoder("utf-8")("replace") for kind in STREAMS}
        self._text = ""
        self._searched = 0
        self._window = agent.STDIN_WINDOW

    @property
    def output(self) -> str:
        """All that came so far, both streams in the order of arrival."""
        return self._text

    @property
    def stdout(self) -> bytes:
        return bytes(self._streams[agent.STDOUT])

    @property
    def stderr(self) -> bytes:
        return bytes(self._streams[agent.STDERR])

    def expect(self, pattern: str | re.Pattern[str], timeout: float = WAIT_SECONDS) -> re.Match[str]:
        """Wait for a text or a regular expression in the output, after what the last call found."""
        regex = re.compile(re.escape(pattern)) if isinstance(pattern, str) else pattern
        found: re.Match[str] | None = None

        def search() -> bool:
            nonlocal found
            found = regex.search(self._text, self._searched)
            return found is not None or self.returncode is not None

        self._link.wait_until(search, timeout, f"{pattern!r} from {self}", self)
        if found is None:
            raise LabError(self._link.report(f"{self} ended with {self.returncode} and never wrote {pattern!r}", self))
        self._searched = found.end()
        return found

    def wait(self, timeout: float = WAIT_SECONDS) -> int:
        """Wait for the end, and return ``returncode``. What the command wrote before its end is in the output then."""
        self._link.wait_until(lambda: self.returncode is not None, timeout, f"the end of {self}", self)
        assert self.returncode is not None
        return self.returncode

    def send(self, data: str | bytes) -> None:
        """Give the command input, at the rate at which it reads. A command that ended takes none."""
        data = data.encode() if isinstance(data, str) else data
        while data:
            self._link.wait_until(self._takes_input, WAIT_SECONDS, f"{self} to read its input", self)
            with self._link.changed:
                if self.returncode is not None:
                    return
                chunk = data[: min(self._window, agent.CHUNK)]
                self._window -= len(chunk)
            self._link.send(agent.STDIN, self.number, chunk)
            data = data[len(chunk) :]

    def close_stdin(self) -> None:
        """Let the command read the end of its input."""
        self._link.send(agent.STDIN, self.number)

    def signal(self, number: int) -> None:
        """Signal the command and everything it started that is still in its process group."""
        self._link.send(agent.SIGNAL, self.number, agent.NUMBER.pack(number))

    def resize(self, rows: int, columns: int) -> None:
        """Give the command's terminal a new size."""
        self._link.send(agent.RESIZE, self.number, agent.SIZE.pack(rows, columns))

    def receive(self, kind: int, payload: bytes) -> None:
        """Take in a frame; called by the link with ``changed`` held."""
        match kind:
            case agent.STDOUT | agent.STDERR:
                self._streams[kind] += payload
                self._text += self._decoders[kind].decode(payload)
            case agent.TAKEN:
                self._window += agent.NUMBER.unpack(payload)[0]
            case agent.EXIT:
                (self.returncode,) = agent.NUMBER.unpack(payload)

    def __str__(self) -> str:
        return shlex.join(self.argv)

    def _takes_input(self) -> bool:
        return self._window > 0 or self.returncode is not None
