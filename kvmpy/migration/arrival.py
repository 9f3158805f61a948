"""How the destination of a migration waits for its source, and for nobody else."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final, Self

from kvmpy.errors import MigrationError, StreamError
from kvmpy.log import Log
from kvmpy.migration import sockets, uri
from kvmpy.migration.channel import Channel, SocketChannel
from kvmpy.migration.command import CommandChannel
from kvmpy.migration.descriptor import Take, nobody, open_descriptor
from kvmpy.migration.greeting import drive, introduce, version_of
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.reception import Reception
from kvmpy.migration.saved import SavedFile
from kvmpy.migration.stop import TIMEOUT, Deadline, Stop
from kvmpy.migration.transport import refuse_plain
from kvmpy.migration.uri import Exec, Fd, File, Tcp, Unix
from kvmpy.migration.wire import MAIN, OURS

if TYPE_CHECKING:
    from kvmpy.migration.tls import TlsCredentials

log = Log(__name__)

TOLD_MAX: Final = 32  # of those turned away, so many are named in the log


class Arrival:
    """A source that has connected: its main channel, and those for its pages."""

    def __init__(self, incoming: Incoming, channel: Channel, version: int) -> None:
        self._incoming = incoming
        self._channels = [channel]
        self.main = MainChannel(channel, version)

    def accept_page_channels(self, count: int, token: bytes, timeout: float | None = None) -> list[Channel]:
        """Channels 1 to ``count``, once all have come. Raises MigrationError where they do not come in time."""
        if not self._incoming.has_page_channels:
            return []
        channels = self._incoming.accept_pages(count, token, timeout, self.main)
        self._channels += channels
        return channels

    def shutdown(self, reason: str = "cancelled") -> None:
        """Wake whoever waits for any of the channels. Any thread."""
        for channel in tuple(self._channels):
            channel.shutdown(reason)

    def close(self) -> None:
        """Close all channels. Twice is allowed."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Incoming:
    """The destination's side: waits for a source, again and again where it listens."""

    def __init__(
        self,
        where: str,
        tls: TlsCredentials | None = None,
        *,
        stop: Stop,
        timeout: float = TIMEOUT,
        fds: Take = nobody,
        insecure: bool = False,
    ) -> None:
        """Listens already. Raises MigrationError."""
        self.uri, self._tls, self._stop, self._timeout = where, tls, stop, timeout
        self._address = uri.parse(where)
        self._take = fds
        self._listener: socket.socket | None = None
        self._told = 0
        if isinstance(self._address, Tcp | Unix):
            if isinstance(self._address, Tcp) and tls is None:
                refuse_plain(where, insecure)
            elif tls is not None:
                tls.check("server")
            self._listener = sockets.listen(where, self._address, stop, Deadline(timeout))
        self._used = False
        # Whoever has made a mistake hears of it. A command does things, and is not begun before it is waited for.
        self._opened = self._open() if isinstance(self._address, Fd | File) else None

    @property
    def has_page_channels(self) -> bool:
        """Whether pages can have channels of their own."""
        return self._listener is not None

    @property
    def port(self) -> int:
        """Of tcp, what is listened at: tcp:HOST:0 leaves it to the kernel."""
        assert self._listener is not None
        return int(self._listener.getsockname()[1])

    def accept(self, timeout: float | None = None) -> Arrival:
        """Wait for a source, for ever where there is no ``timeout``; others who connect are turned away.

        Raises MigrationError, and MigrationCancelled when the Stop is set.
        """
        if self._listener is None:
            return self._open_only()
        deadline = None if timeout is None else Deadline(timeout)
        with self._reception(self._listener) as reception:
            while True:
                channel, theirs = reception.next(deadline, f"{self.uri}: no source has connected")
                try:
                    if theirs.channel != MAIN:
                        raise StreamError(f"{channel.name}: a page channel of a migration that is over")
                    return Arrival(self, channel, version_of(channel, theirs))
                except StreamError as e:
                    self._turn_away(channel, e)

    def accept_pages(
        self, count: int, token: bytes, timeout: float | None = None, main: MainChannel | None = None
    ) -> list[Channel]:
        """Channels 1 to ``count`` of the source that knows ``token``, and has that main channel."""
        assert self._listener is not None
        found: dict[int, Channel] = {}
        deadline = Deadline(self._timeout if timeout is None else timeout)
        with ExitStack() as undo, self._reception(self._listener, main) as reception:
            while len(found) < count:
                late = f"{self.uri}: only {len(found)} of {count} page channels have come"
                channel, theirs = reception.next(deadline, late)
                if theirs.token != token or not 1 <= theirs.channel <= count or theirs.channel in found:
                    self._turn_away(channel, StreamError(f"{channel.name}: not a page channel of this migration"))
                    continue
                undo.callback(channel.close)
                channel.name = f"{self.uri} channel {theirs.channel}"
                found[theirs.channel] = channel
            undo.pop_all()
        return [found[number] for number in range(1, count + 1)]

    def _greeted(self, connection: socket.socket) -> Channel:
        """The channel over what has just been accepted."""
        name = f"{self.uri} from {sockets.peer(connection)}"
        if isinstance(self._address, Tcp):
            sockets.tune(connection, self._timeout)
            if self._tls is not None:
                return self._tls.accepted(name, self._stop, connection)
        if not sockets.is_welcome(connection):
            connection.close()
            raise StreamError(f"{name}: only root and our own are let in")
        return SocketChannel(name, self._stop, connection)

    def _turn_away(self, channel: Channel | None, why: MigrationError) -> None:
        """Hang up on one that is not the source, and say so."""
        if channel is not None:
            channel.close()
        self._told += 1
        if self._told <= TOLD_MAX:
            last = "; of more like this nothing is said" if self._told == TOLD_MAX else ""
            log.warning("migration: turned away: %s%s", why, last)

    def shutdown(self, reason: str = "cancelled") -> None:
        """Wake whoever waits, in `accept` too. Any thread."""
        self._stop.set(reason)

    def close(self) -> None:
        """Listen no longer; channels that were accepted stay. Twice is allowed."""
        if self._opened is not None:
            self._opened.close()
        if self._listener is not None and self._listener.fileno() >= 0:
            if isinstance(self._address, Unix):
                # While it is listened at nobody else takes the name: afterwards it could be another's.
                with suppress(OSError):
                    os.unlink(self._address.path)
            self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reception(self, listener: socket.socket, main: MainChannel | None = None) -> Reception:
        return Reception(listener, self._stop, self._timeout, self._greeted, self._turn_away, main)

    def _open_only(self) -> Arrival:
        """What can be opened only once."""
        if self._used:
            raise MigrationError(f"{self.uri}: has been read already; start again to read it once more")
        self._used = True
        channel, self._opened = self._opened or self._open(), None
        channel.timeout = self._timeout
        with ExitStack() as undo:
            undo.callback(channel.close)
            theirs = drive(introduce(channel, OURS), channel, Deadline(self._timeout))
            arrival = Arrival(self, channel, version_of(channel, theirs))
            undo.pop_all()
        return arrival

    def _open(self) -> Channel:
        match self._address:
            case Fd(descriptor):
                return open_descriptor(self.uri, descriptor, self._stop, self._take)
            case Exec(command):
                return CommandChannel(self.uri, self._stop, command, reading=True)
            case File() as file:
                return SavedFile(self.uri, self._stop, file, reading=True)
            case other:
                raise AssertionError(other)
