"""Bytes to and from a descriptor that must never block a thread: a terminal, a pipe, a pty, a client's socket."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Callable
from typing import Final

from kvmpy.errors import refusal
from kvmpy.host.reactor import Reactor
from kvmpy.log import Log

log = Log(__name__)

CHUNK: Final = 4096
# Behind a reader that has stopped, output waits up to here; then the stream is full.
BACKLOG: Final = 64 * 1024
# Seconds until a listener whose client could not be accepted (no descriptors left) tries again.
ACCEPT_AGAIN: Final = 1.0
UCRED: Final = struct.Struct("iII")  # struct ucred of SO_PEERCRED: pid, uid, gid
FD: Final = struct.Struct("i")
ROOT: Final = 0
NO_DESCRIPTOR: Final = -1
# So many strangers are named in the log, each once; a host has more uids than a log has room.
MOST_NAMED: Final = 32


class Stream:
    """Non-blocking input and output over one or two descriptors, which it owns."""

    def __init__(self, reactor: Reactor, read_fd: int, write_fd: int) -> None:
        """Either descriptor may be -1. Both must be non-blocking, or such that they never block."""
        self._reactor = reactor
        self._read_fd, self._write_fd = read_fd, write_fd
        self._lock = threading.Lock()
        self._backlog = bytearray()
        self.on_input: Callable[[bytes], object] = _nothing
        self.on_drained: Callable[[], object] = _nothing
        self.on_end: Callable[[Stream], object] = _nothing
        self._reading = False
        self._ended = False
        self._in_turn = False
        self._losing = False

    @property
    def unsent(self) -> bool:
        """Some of what was written waits for the far side to read."""
        return bool(self._backlog)

    @property
    def full(self) -> bool:
        """The far side has not read for so long that more output would be lost."""
        return len(self._backlog) >= BACKLOG

    def write(self, data: bytes) -> None:
        """Send ``data`` now or when the far side reads; all of it is dropped once the stream is full. Any thread."""
        with self._lock:
            if self._write_fd < 0 or self.full:
                return
            if not self._backlog:
                data = data[self._send(data) :]
            if data:
                self._backlog += data
                self._watch()

    def listen(self, *, wanted: bool) -> None:
        """Start or stop taking input; after its end nothing more comes."""
        with self._lock:
            wanted = wanted and self._read_fd >= 0 and not self._ended
            if wanted != self._reading:
                self._reading = wanted
                self._watch()

    @property
    def hung_up(self) -> bool:
        """The far side is gone for good, whether or not all its input has been read."""
        with self._lock:
            if self._read_fd < 0:
                return True
            poll = select.poll()
            poll.register(self._read_fd, 0)
            return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def close(self) -> None:
        """Send what the far side takes at once (all, where the descriptor blocks), then close.

        Closing twice is allowed.
        """
        with self._lock:
            if self._backlog:
                self._send(bytes(self._backlog))
                self._backlog.clear()
            for fd in {self._read_fd, self._write_fd} - {-1}:
                self._reactor.unwatch(fd)
                os.close(fd)
            self._read_fd = self._write_fd = -1
            self._reading = False
        # Whoever is called back holds us: without the collector, which a VMM switches off, the two would live for ever.
        self.on_input = self.on_drained = self.on_end = _nothing

    def _send(self, data: bytes) -> int:
        """How many bytes went; all of them where the far side is gone, for then nobody waits for them."""
        try:
            sent = os.write(self._write_fd, data)
        except BlockingIOError:
            return 0
        except OSError as e:
            self._lose(e)
            return len(data)
        self._losing = False
        return sent

    def _lose(self, e: OSError) -> None:
        """Say that a file takes no more, such as on a full disk: once, until it does again."""
        if not self._losing and stat.S_ISREG(os.fstat(self._write_fd).st_mode):
            path = os.readlink(f"/proc/self/fd/{self._write_fd}")
            log.warning("%s: %s", path, refusal(e.errno, "output is lost"))
        self._losing = True

    def _watch(self) -> None:
        """Ask the reactor for what is of interest now. Under the lock."""
        wanted = {fd: [False, False] for fd in {self._read_fd, self._write_fd} - {-1}}
        if self._reading:
            wanted[self._read_fd][0] = True
        if self._backlog:
            wanted[self._write_fd][1] = True
        for fd, (read, write) in wanted.items():
            if not (read or write):
                self._reactor.unwatch(fd)
                continue
            try:
                self._reactor.watch(
                    fd, readable=self._readable if read else None, writable=self._writable if write else None
                )
            except PermissionError:  # a regular file or /dev/null: never blocks, so serve it in turn with the rest
                if not self._in_turn:
                    self._in_turn = True
                    self._reactor.post(self._take_turn)

    def _take_turn(self) -> None:
        """Read and write what epoll does not watch, once; the next turn comes after everybody else's."""
        try:
            self._readable()
            self._writable()
        finally:
            with self._lock:
                self._in_turn = False
                self._watch()

    def _readable(self) -> None:
        # Under the lock: were another thread to close it now, the descriptor's number could be somebody else's.
        with self._lock:
            if not self._reading:
                return
            try:
                data = self._take()
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._ended, self._reading = True, False
                self._watch()
        if data:
            self.on_input(data)
        else:
            self.on_end(self)

    def _take(self) -> bytes:
        """What there is to read, at most a chunk. Under the lock."""
        return os.read(self._read_fd, CHUNK)

    def _writable(self) -> None:
        with self._lock:
            if not self._backlog:
                return
            sent = self._send(bytes(self._backlog))
            del self._backlog[:sent]
            if not self._backlog:
                self._watch()
        if not self.full:
            self.on_drained()


class SocketStream(Stream):
    """A client's connected unix socket. With ``takes_descriptors`` it can be sent one along with the bytes.

    As with QEMU, a descriptor waits for the command that takes it until another comes or the client leaves, and of
    several in one message all but the first are dropped.
    """

    def __init__(self, reactor: Reactor, client: socket.socket) -> None:
        super().__init__(reactor, client.fileno(), client.fileno())
        self._socket = client
        self._received = NO_DESCRIPTOR
        self.takes_descriptors = False

    def take_descriptor(self) -> int | None:
        """The descriptor that came last, the caller's from now on; None where there is none."""
        with self._lock:
            received, self._received = self._received, NO_DESCRIPTOR
        return None if received == NO_DESCRIPTOR else received

    def close(self) -> None:
        super().close()
        self._socket.detach()  # which has been closed
        if (received := self.take_descriptor()) is not None:
            os.close(received)

    def _take(self) -> bytes:
        if not self.takes_descriptors:
            return super()._take()  # the kernel drops what comes along
        # Room for one: the kernel does not let us have the others. (socket.recv_fds has no use for its flags.)
        data, control, _, _ = self._socket.recvmsg(CHUNK, socket.CMSG_LEN(FD.size), socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(content) >= FD.size:
                if self._received != NO_DESCRIPTOR:
                    os.close(self._received)
                (self._received,) = FD.unpack_from(content)
        return data


class Listener:
    """A unix socket at ``path`` (mode 0600) that hands each client to ``on_client`` as a Stream.

    A client is root or who we are. Others do not get past the socket's mode, but a descriptor of it can be inherited,
    and a mode changed: who connected is asked of the kernel.
    """

    def __init__(self, reactor: Reactor, path: str, on_client: Callable[[SocketStream], object]) -> None:
        """Raises OSError where ``path`` cannot be bound; a socket there that nobody listens at any more is replaced."""
        self._reactor, self._path, self._on_client = reactor, path, on_client
        self._spare = -1
        self._starving = False
        self._socket = listen_at(path)
        self._strangers: set[int] = set()
        self._again = reactor.timer(self._watch)
        self._keep_spare()
        self._watch()

    def close(self) -> None:
        """Take the socket away; clients keep their streams."""
        self._again.cancel()
        self._reactor.unwatch(self._socket.fileno())
        # While it is listened at nobody else takes the name: afterwards it could be another's.
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self._socket.close()
        self._drop_spare()

    def _accept(self) -> None:
        try:
            client, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as e:
            self._starve(e)
            return
        self._starving = False
        self._keep_spare()
        if self._is_welcome(client):
            client.setblocking(False)
            self._on_client(SocketStream(self._reactor, client))
        else:
            client.close()

    def _is_welcome(self, client: socket.socket) -> bool:
        uid = peer_uid(client)
        if uid in (ROOT, os.geteuid()):
            return True
        if uid not in self._strangers and len(self._strangers) < MOST_NAMED:
            self._strangers.add(uid)
            log.warning("%s: turned away a client of uid %d: only root and our own are let in", self._path, uid)
        return False

    def _starve(self, e: OSError) -> None:
        """There is no descriptor for a client: hang up on it, else let it wait; say so once, until there is one."""
        gone = self._turn_away()
        if not self._starving:
            what = "clients are turned away" if gone else "clients have to wait"
            log.warning("%s: %s", self._path, refusal(e.errno, what))
        self._starving = True
        if not gone:
            # It stays in the queue, so the socket stays readable: asking again at once would never end.
            self._reactor.unwatch(self._socket.fileno())
            self._again.arm(ACCEPT_AGAIN)

    def _turn_away(self) -> bool:
        """Whether it could be done, with the descriptor that is kept for this."""
        self._drop_spare()
        try:
            self._socket.accept()[0].close()
        except OSError:
            return False
        finally:
            self._keep_spare()
        return True

    def _keep_spare(self) -> None:
        if self._spare < 0:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _drop_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def _watch(self) -> None:
        self._reactor.watch(self._socket.fileno(), readable=self._accept)


def listen_at(path: str) -> socket.socket:
    """A unix socket at ``path``, mode 0600, that does not block; one that nobody listens at any more is replaced.

    Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if _is_abandoned(path):
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def peer_uid(client: socket.socket) -> int:
    """Who is at the other end of a unix socket, by the kernel's word."""
    _, uid, _ = UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)


def _nothing(*_: object) -> None:
    """The callback of nobody."""


def _is_abandoned(path: str) -> bool:
    """A unix socket whose process is gone, as a killed one leaves it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return stat.S_ISSOCK(os.lstat(path).st_mode)
        except OSError:
            return False
    return False
