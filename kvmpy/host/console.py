"""The far end of the guest's serial line: the configured backend, and whoever attached to the console socket.

Output goes to all of them. The backend sets the pace, where it is one that somebody meant to keep (a terminal, a pipe,
a file): while it is full the guest's transmitter is not ready. A pty or a socket may have nobody behind it, so it loses
what does not fit. Input comes from any of them, and waits with its sender until the guest has room. Not so what the
operator types at the backend's terminal: that is always read, since the key that leaves is in it, and comes first. But
for a terminal that the shell has taken back (`bg`): the guest runs on without it, and has it again after `fg`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tty
from collections.abc import Callable
from typing import Final

from kvmpy.errors import HostError, refusal
from kvmpy.host.reactor import Reactor
from kvmpy.host.stream import Listener, Stream
from kvmpy.host.terminal import in_background
from kvmpy.log import Log

log = Log(__name__)

# A guest that hangs takes no input: what is typed meanwhile waits up to here. A pasted file should fit.
MOST_TYPED: Final = 64 * 1024
# What is offered to the guest at a time; its FIFO is shorter.
OFFER: Final = 4096
# Who attaches may never read, or go away while the guest takes no input: they do not use up our descriptors.
MOST_CLIENTS: Final = 16
# Seconds between two looks at whether the shell has given the terminal back: it tells only those that it had stopped.
LOOK_AGAIN: Final = 0.2
# A regular file never blocks; a named pipe or a terminal must not, and we want no controlling terminal.
FILE_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
FILE_ADVICE: Final = {errno.ELOOP: "it is a symbolic link to what is not there; make that first"}


class TerminalStream(Stream):
    """The operator's terminal. In the background it has no input: ``on_background`` is told, and may only post."""

    def __init__(self, reactor: Reactor, read_fd: int, write_fd: int, on_background: Callable[[], object]) -> None:
        super().__init__(reactor, read_fd, write_fd)
        self._on_background = on_background

    @property
    def in_background(self) -> bool:
        """Another process group has the terminal."""
        return in_background(self._read_fd)

    def _take(self) -> bytes:
        try:
            if not self.in_background:
                return super()._take()
        except OSError as e:
            # Taken from us just now: a thread that blocks SIGTTIN is told so, in another we would be stopped once more.
            if e.errno != errno.EIO or not self.in_background:
                raise
        self._on_background()
        raise BlockingIOError(errno.EAGAIN, "in the background")


class Console:
    """Where a serial device's bytes go and come from."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._streams: list[Stream] = []
        self._pacing: Stream | None = None
        self._listeners: list[Listener] = []
        self._terminal: TerminalStream | None = None
        self._away = False
        self._look = reactor.timer(self._look_again)
        self._typed = bytearray()
        self._losing = False
        self._waiting = bytearray()
        self._pty = -1
        self._receive: Callable[[bytes], int] = len
        self._drained: Callable[[], object] = lambda: None
        self.filter: Callable[[bytes], bytes] = bytes
        """Sees the backend's input first: the terminal's escape key."""
        self.retake: Callable[[], object] = lambda: None
        """Told, in the reactor's thread, that the terminal is ours again, as the shell likes it."""

    def connect(self, receive: Callable[[bytes], int], drained: Callable[[], object]) -> None:
        """The guest's side: ``receive`` says how many bytes it took, ``drained`` hears that `room` is back."""
        self._receive, self._drained = receive, drained

    def write(self, data: bytes) -> None:
        """The guest sent ``data``. Any thread; never blocks."""
        for stream in self._streams:
            stream.write(data)

    def room(self) -> bool:
        """Whether the backend that sets the pace takes more."""
        return self._pacing is None or not self._pacing.full

    @property
    def unsent(self) -> bool:
        """The backend that sets the pace has not taken all of the output yet."""
        return self._pacing is not None and self._pacing.unsent

    def offer(self) -> None:
        """The guest has room for input again. Any thread, under any lock."""
        self._reactor.post(self._deliver)

    def attach(self, read_fd: int, write_fd: int) -> None:
        """Make two descriptors, now ours, the backend that sets the pace.

        Input from a pipe or a file is held back until the guest has room, and all of it comes. A terminal's is not.
        """
        stream: Stream
        if read_fd >= 0 and os.isatty(read_fd):
            stream = self._terminal = TerminalStream(self._reactor, read_fd, write_fd, self.leave)
            take = self._type
        else:
            stream = Stream(self._reactor, read_fd, write_fd)
            take = self._take
        stream.on_drained = lambda: self._drained()
        self._pacing = stream
        self._add(stream, lambda data: take(self.filter(data)))

    def show(self, text: bytes) -> None:
        """Say ``text`` to the backend, and to nobody else. Any thread; never blocks."""
        if self._pacing:
            self._pacing.write(text)

    def leave(self) -> None:
        """The shell has taken the terminal back: read nothing of it until it is ours again. Any thread."""
        with contextlib.suppress(RuntimeError):  # the machine has ended
            self._reactor.post(self._leave)

    def open(self, kind: str, path: str) -> str | None:
        """Open a backend of a ``kind`` that the configuration has, but for stdio. Returns the path of a pty.

        Raises HostError.
        """
        match kind:
            case "pty":
                return self.open_pty()
            case "file":
                self.open_file(path)
            case "unix":
                self.listen(path)
        return None

    def open_pty(self) -> str:
        """Make a new pty a backend; returns the path of its terminal side. Raises HostError."""
        try:
            ours, theirs = os.openpty()
        except OSError as e:
            raise HostError(f"pty: {refusal(e.errno, 'none can be made')}") from e
        # Kept open, or our side would report a hang-up whenever nobody has it open; raw, or it would echo.
        self._pty = theirs
        tty.setraw(theirs)
        os.set_blocking(ours, False)
        self._add(Stream(self._reactor, ours, ours))
        return os.ttyname(theirs)

    def open_file(self, path: str) -> None:
        """Append the guest's output to ``path``. Raises HostError.

        A symbolic link is followed, but no file is made through one: in /tmp it could be anybody's.
        """
        try:
            try:
                fd = os.open(path, FILE_FLAGS)
            except FileNotFoundError:
                fd = os.open(path, FILE_FLAGS | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise HostError(
                f"{path}: {refusal(e.errno, 'cannot be written', FILE_ADVICE.get(e.errno or 0, ''))}"
            ) from e
        self.attach(-1, fd)

    def listen(self, path: str) -> None:
        """Let clients attach at the unix socket ``path``. Raises HostError."""
        try:
            self._listeners.append(Listener(self._reactor, path, self._admit))
        except OSError as e:
            raise HostError(f"{path}: {refusal(e.errno, 'cannot listen there')}") from e

    def close(self) -> None:
        """Close every stream and socket."""
        for listener in self._listeners:
            listener.close()
        for stream in self._streams:
            stream.close()
        if self._pty >= 0:
            os.close(self._pty)
            self._pty = -1
        self._streams, self._listeners, self._pacing, self._terminal = [], [], None, None
        self._look.cancel()

    def _admit(self, client: Stream) -> None:
        """Attach a client of the socket, if need be in the place of one that has hung up."""
        others = [stream for stream in self._streams if stream is not self._pacing]
        if len(others) >= MOST_CLIENTS:
            gone = next((stream for stream in others if stream.hung_up), None)
            if gone is None:
                client.close()
                return
            self._remove(gone)
        self._add(client)

    def _add(self, stream: Stream, on_input: Callable[[bytes], object] | None = None) -> None:
        stream.on_input = on_input or self._take
        stream.on_end = self._remove
        self._streams = [*self._streams, stream]
        self._listen(stream)

    def _listen(self, stream: Stream) -> None:
        if stream is self._terminal:
            stream.listen(wanted=not self._away)
        else:
            stream.listen(wanted=not (self._typed or self._waiting))

    def _leave(self) -> None:
        if self._terminal is not None and not self._away:
            self._away = True
            self._listen(self._terminal)
            self._look.arm(LOOK_AGAIN)

    def _look_again(self) -> None:
        if self._terminal is None:
            return
        if self._terminal.in_background:
            self._look.arm(LOOK_AGAIN)
        else:
            self._away = False
            self.retake()
            self._listen(self._terminal)

    def _remove(self, stream: Stream) -> None:
        if stream is self._pacing:
            return  # the end of standard input is not the end of the output
        self._streams = [other for other in self._streams if other is not stream]
        stream.close()

    def _take(self, data: bytes) -> None:
        self._waiting += data
        self._deliver()

    def _type(self, data: bytes) -> None:
        room = MOST_TYPED - len(self._typed)
        if len(data) > room and not self._losing:
            log.warning("the guest does not read its serial line: what is typed now is lost")
        self._losing = len(data) > room
        self._typed += data[:room]
        self._deliver()

    def _deliver(self) -> None:
        """Give the guest what it takes; while some is left nobody else may send more. In the reactor's thread."""
        while data := bytes((self._typed[:OFFER] + self._waiting)[:OFFER]):
            taken = self._receive(data)
            typed = min(taken, len(self._typed))
            del self._typed[:typed]
            del self._waiting[: taken - typed]
            if taken < len(data):
                break
        for stream in self._streams:
            self._listen(stream)
