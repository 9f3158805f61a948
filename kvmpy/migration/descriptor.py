"""fd: a connected socket, a pipe or an open file that somebody else has made."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from typing import Final

from kvmpy.errors import MigrationError, errno_name
from kvmpy.migration.channel import Channel, FileChannel, SocketChannel
from kvmpy.migration.stop import Stop

# Gives the descriptor of a name, the caller's from then on, or raises KeyError.
Take = Callable[[str], int]


def nobody(name: str) -> int:
    """Where there are no names."""
    raise KeyError(name)


class Offer:
    """A descriptor for one migration, which takes it once, under whatever name. `close` closes what was not taken."""

    def __init__(self, fd: int = -1) -> None:
        self._fd = fd

    def __call__(self, name: str) -> int:
        """Raises KeyError where there is none, or none any more."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise KeyError(name)
        return fd

    def close(self) -> None:
        """Twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


NOTHING: Final = Offer()


def open_descriptor(uri: str, name: str, stop: Stop, take: Take) -> Channel:
    """The channel over it, which owns it from now on. Raises MigrationError where there is none, or one unfit."""
    fd = _number(uri, name) if name.isdecimal() else _named(uri, name, take)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            return SocketChannel(uri, stop, _stream_socket(uri, fd))
        if not stat.S_ISFIFO(mode) and not stat.S_ISREG(mode):
            raise MigrationError(f"{uri}: neither a socket nor a pipe or file")
        os.set_inheritable(fd, False)
        return FileChannel(uri, stop, fd)
    except BaseException:
        if not name.isdecimal():
            os.close(fd)
        raise


def _number(uri: str, name: str) -> int:
    try:
        fd = int(name[:10])
        os.fstat(fd)
    except (OSError, OverflowError) as e:
        raise MigrationError(f"{uri}: EBADF: no such descriptor is open here") from e
    return fd


def _named(uri: str, name: str, take: Take) -> int:
    try:
        return take(name)
    except KeyError as e:
        raise MigrationError(f"{uri}: no descriptor has that name; send it with getfd first, in this session") from e


def _stream_socket(uri: str, fd: int) -> socket.socket:
    """Raises MigrationError where it is none that is connected; the descriptor is then still the caller's."""
    connection = socket.socket(fileno=fd)
    try:
        if connection.type != socket.SOCK_STREAM:
            raise MigrationError(f"{uri}: not a stream socket")
        connection.getpeername()
    except OSError as e:
        connection.detach()
        raise MigrationError(f"{uri}: {errno_name(e.errno or 0)}: not a connected socket") from e
    except BaseException:
        connection.detach()
        raise
    connection.setblocking(False)
    os.set_inheritable(fd, False)
    return connection
