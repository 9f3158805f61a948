"""Connections of a migration by TCP and unix sockets: made and awaited without ever blocking for long."""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import suppress
from functools import partial
from typing import Any, Final

from kvmpy.errors import MigrationError, StreamError, refusal
from kvmpy.host.stream import ROOT, listen_at, peer_uid
from kvmpy.migration.aside import aside
from kvmpy.migration.stop import Deadline, Stop
from kvmpy.migration.uri import Tcp, Unix
from kvmpy.migration.wire import CHANNELS_MAX

ADVICE: Final = {
    errno.ECONNREFUSED: "nobody listens there; start the destination first (kvmpy run --incoming)",
    errno.ENOENT: "start the destination first (kvmpy run --incoming)",
    errno.ENETUNREACH: "there is no route to it",
    errno.EHOSTUNREACH: "it is down, or a firewall is in between",
    errno.EADDRINUSE: "another process listens there; take another port or path, or stop that",
    errno.EADDRNOTAVAIL: "this host has no such address",
    errno.EACCES: "run as its owner or as root",
}
LISTENING: Final = ADVICE | {errno.ENOENT: "make the directory of the socket first"}
PROBES: Final = 3  # of a connection on which nothing moves
# getaddrinfo, of each address: family, type, protocol, canonical name, address.
Addresses = list[tuple[Any, ...]]


def dial(uri: str, address: Tcp | Unix, stop: Stop, deadline: Deadline) -> socket.socket:
    """A connected socket, to the first of the host's addresses that answers. Raises MigrationError."""
    if isinstance(address, Unix):
        return _connect(uri, socket.AF_UNIX, address.path, stop, deadline)
    failed: list[MigrationError] = []
    for family, _, _, _, place in resolve(uri, address, stop, deadline):
        try:
            connection = _connect(uri, family, place, stop, deadline)
        except StreamError:
            raise
        except MigrationError as e:
            failed.append(e)
        else:
            tune(connection, deadline.seconds)
            return connection
    try:
        raise failed[-1]
    finally:
        failed.clear()  # or the list and the traceback hold each other


def listen(uri: str, address: Tcp | Unix, stop: Stop, deadline: Deadline) -> socket.socket:
    """A listening socket that does not block. Raises MigrationError."""
    try:
        if isinstance(address, Unix):
            return listen_at(address.path)
        if not address.host and socket.has_dualstack_ipv6():
            return _listen_tcp(socket.AF_INET6, ("::", address.port))
        family, _, _, _, place = resolve(uri, address, stop, deadline, passive=True)[0]
        return _listen_tcp(family, place)
    except OSError as e:
        raise MigrationError(
            f"{uri}: {refusal(e.errno, 'cannot listen there', LISTENING.get(e.errno or 0, ''))}"
        ) from e


def tune(connection: socket.socket, seconds: float) -> None:
    """Small messages go at once, and a host that is gone is found within ``seconds`` by a wait that lasts longer."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = max(1, int(seconds / (PROBES + 1)))
    for option, value in ((socket.TCP_KEEPIDLE, step), (socket.TCP_KEEPINTVL, step), (socket.TCP_KEEPCNT, PROBES)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def resolve(uri: str, address: Tcp, stop: Stop, deadline: Deadline, *, passive: bool = False) -> Addresses:
    """The host's addresses. A name server that does not answer is waited for in a thread, which is left to it."""
    host: bytes | None = None
    try:
        host = address.host.encode("ascii") or (None if passive else b"localhost")  # bytes: str would import idna
        return _addresses(host, address.port, passive, socket.AI_NUMERICHOST)
    except UnicodeEncodeError as e:
        raise MigrationError(f"{uri}: a host's name is ASCII; write xn--... for one that is not") from e
    except socket.gaierror:
        pass
    ask = partial(_addresses, host, address.port, passive, 0)
    try:
        return aside("resolver", ask, stop, deadline, f"{uri}: no name server has said who that is")
    except OSError as e:
        raise MigrationError(f"{uri}: {e.strerror}: write its address, or mend the name") from e


def peer(connection: socket.socket) -> str:
    """The other end, for a message."""
    with suppress(OSError):
        if connection.family == socket.AF_UNIX:
            return f"a process of uid {peer_uid(connection)}"
        host, port, *_ = connection.getpeername()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "one that has left"


def reached(connection: socket.socket, address: Tcp) -> Tcp:
    """Where it has come to: ``address`` may be a name with several addresses, and takes time to look up."""
    with suppress(OSError):  # who was there may have left
        host, port, *rest = connection.getpeername()
        scope = f"%{rest[1]}" if rest and rest[1] else ""
        return Tcp(host + scope, port)
    return address


def is_welcome(connection: socket.socket) -> bool:
    """Whether it is root's or our own, where a unix socket can tell."""
    return connection.family != socket.AF_UNIX or peer_uid(connection) in (ROOT, os.geteuid())


def _addresses(host: bytes | None, port: int, passive: bool, flags: int) -> Addresses:
    flags |= socket.AI_PASSIVE if passive else 0
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags))


def _connect(uri: str, family: int, place: Any, stop: Stop, deadline: Deadline) -> socket.socket:
    try:
        connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as e:
        raise MigrationError(f"{uri}: {refusal(e.errno, 'no socket can be made')}") from e
    try:
        number = connection.connect_ex(place)
        if number == errno.EINPROGRESS:
            stop.wait(connection.fileno(), select.POLLOUT, deadline, f"{uri}: no connection")
            number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            advice = "its backlog is full: it does not accept" if number == errno.EAGAIN else ADVICE.get(number, "")
            raise MigrationError(f"{uri}: {refusal(number, 'cannot connect', advice)}")
    except BaseException:
        connection.close()
        raise
    return connection


def _listen_tcp(family: int, place: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" is every address of both families, whatever net.ipv6.bindv6only says
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(place)
        listener.listen(CHANNELS_MAX)
    except BaseException:
        listener.close()
        raise
    return listener
