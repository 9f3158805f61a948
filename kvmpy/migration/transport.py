"""How the source of a migration reaches its destination; how that waits for it is in `arrival`.

tcp and unix have a connection for the main channel and one for each page channel. fd has one, both ways if it is a
socket; exec and file have one, one way: no answer, and the pages travel in it. Whatever is waited for has a timeout,
and ends at once when the Stop is set that it was given.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from kvmpy.errors import MigrationError, StreamError
from kvmpy.migration import sockets, uri
from kvmpy.migration.channel import Channel, SocketChannel
from kvmpy.migration.command import CommandChannel
from kvmpy.migration.descriptor import Take, nobody, open_descriptor
from kvmpy.migration.greeting import drive, introduce, version_of
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.saved import SavedFile
from kvmpy.migration.stop import TIMEOUT, Deadline, Stop
from kvmpy.migration.uri import Address, Exec, Fd, File, Tcp, Unix
from kvmpy.migration.wire import MAIN, NEWEST, OURS, Preamble

if TYPE_CHECKING:  # ssl takes 10 ms to import: only where it is wanted
    from kvmpy.migration.tls import TlsCredentials


class Connector:
    """The source's connections."""

    def __init__(
        self,
        where: str,
        address: Address,
        tls: TlsCredentials | None,
        stop: Stop,
        timeout: float,
        take: Take,
        name: str,
        *,
        asking: bool,
    ) -> None:
        """Connects, and hears who is there. Raises MigrationError."""
        self._uri, self._address, self._tls, self._stop = where, address, tls, stop
        self._place = address  # of a name, what has answered once: page channels must come to the same host
        self._timeout, self._tls_name, self._asking = timeout, name, asking
        self._channels: list[Channel] = []
        deadline = Deadline(timeout)
        with ExitStack() as undo:
            undo.callback(self.close)
            channel = self._kept(self._open(where, deadline, take))
            self.main = MainChannel(channel, self._introduce(channel, OURS, deadline))
            undo.pop_all()

    def open_page_channels(self, count: int, token: bytes) -> list[Channel]:
        """Channels 1 to ``count``; none where pages travel in the main channel. Raises MigrationError."""
        if not isinstance(self._address, Tcp | Unix):
            return []
        deadline = Deadline(self._timeout)
        numbers = range(1, count + 1)
        channels = [self._kept(self._dial(f"{self._uri} channel {number}", deadline)) for number in numbers]
        for number, channel in zip(numbers, channels, strict=True):  # each is there already, or on its way
            self._introduce(channel, OURS._replace(channel=number, token=token), deadline)
        return channels

    @property
    def has_page_channels(self) -> bool:
        """Whether pages can have channels of their own."""
        return isinstance(self._address, Tcp | Unix)

    def shutdown(self, reason: str = "cancelled") -> None:
        """Wake whoever waits for any of the channels. Any thread."""
        self._stop.set(reason)
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

    def _open(self, name: str, deadline: Deadline, take: Take) -> Channel:
        match self._address:
            case Fd(descriptor):
                return open_descriptor(name, descriptor, self._stop, take)
            case Exec(command):
                return CommandChannel(name, self._stop, command, reading=False)
            case File() as file:
                return SavedFile(name, self._stop, file, reading=False)
        return self._dial(name, deadline)

    def _dial(self, name: str, deadline: Deadline) -> Channel:
        address, place = self._address, self._place
        assert isinstance(place, Tcp | Unix)
        connection = sockets.dial(self._uri, place, self._stop, deadline)
        if not isinstance(address, Tcp):
            return SocketChannel(name, self._stop, connection)
        self._place = sockets.reached(connection, address)
        if self._tls is None:
            return SocketChannel(name, self._stop, connection)
        return self._tls.connected(name, self._stop, connection, self._tls_name or address.host or "localhost")

    def _introduce(self, channel: Channel, ours: Preamble, deadline: Deadline) -> int:
        """The version that is spoken; where nobody answers, ours."""
        channel.timeout = self._timeout
        if not channel.can_answer:
            if not self._asking:
                channel.send(Preamble(NEWEST, NEWEST).pack())
            return NEWEST
        try:
            theirs = drive(introduce(channel, ours), channel, deadline)
        except StreamError as e:
            if channel.received or self._tls is not None or not isinstance(self._address, Tcp):
                raise
            raise StreamError(f"{e}; it may want TLS: give this side tls-creds") from e
        if theirs.channel != MAIN:
            raise StreamError(f"{channel.name}: a source answers there, not a destination")
        return version_of(channel, theirs)

    def _kept(self, channel: Channel) -> Channel:
        self._channels.append(channel)
        return channel


def connect(
    where: str,
    tls: TlsCredentials | None = None,
    *,
    stop: Stop,
    timeout: float = TIMEOUT,
    fds: Take = nobody,
    insecure: bool = False,
    tls_hostname: str = "",
    asking: bool = False,
) -> Connector:
    """Connect to the destination at ``where``. Raises MigrationError, in time or when ``stop`` is set.

    ``asking``: only to ask something; who cannot answer is sent nothing.

    tcp without TLS is refused unless it is said to be meant, with ``insecure``. ``tls_hostname`` is what the
    destination's certificate must name, where that is not the host in ``where``.
    """
    address = uri.parse(where)
    if isinstance(address, Tcp) and tls is None:
        refuse_plain(where, insecure)
    if isinstance(address, Tcp) and tls is not None:
        tls.check("client")
    return Connector(where, address, tls, stop, timeout, fds, tls_hostname, asking=asking)


def refuse_plain(where: str, insecure: bool) -> None:
    """Raises MigrationError unless tcp without TLS is said to be meant."""
    if not insecure:
        raise MigrationError(
            f"{where}: without TLS anybody on the way reads the guest's memory, or replaces it; give tls-creds, "
            "or say that it is meant with insecure (--insecure)"
        )
