"""A network namespace as the network helper uses it: sockets inside it, and a lock that all helpers in it share.

A socket belongs to the namespace it was made in, for ever, so one visit is enough: no process or thread stays inside.

The lock is flock(2) on the namespace's own inode (nsfs). It is exactly as wide as what it protects, it needs no file
anywhere, and it goes with its holder. Any process inside the namespace could hold it, so the wait has a limit, and
whoever has it is named.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvmpy.errors import HostError, refusal

OWN: Final = "/proc/self/ns/net"
# Seconds. Another helper holds the lock for some ten requests to the kernel; on a busy emulated host, for seconds.
LOCK_LIMIT: Final = 60.0
LOCK_POLL: Final = 0.01


class NetworkNamespace:
    """The network namespace at ``path``; None is the one we are in."""

    def __init__(self, path: str | None, *, lock_limit: float = LOCK_LIMIT) -> None:
        """Raises HostError where there is none."""
        self.path = path
        self._lock_limit = lock_limit
        try:
            self._fd = os.open(path or OWN, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            why = refusal(e.errno, "no such network namespace can be opened", "ip netns add makes one")
            raise HostError(f"{path}: {why}") from e

    @property
    def inode(self) -> int:
        """What tells it from every other namespace of this boot that exists now."""
        return os.fstat(self._fd).st_ino

    def socket(self, family: int, protocol: int) -> socket.socket:
        """A raw socket inside. Raises HostError."""
        if self.path is None:
            return socket.socket(family, socket.SOCK_RAW, protocol)
        from kvmpy.host.visit import inside  # most helpers stay at home, and what it imports takes a while

        return inside(self.path, lambda: socket.socket(family, socket.SOCK_RAW, protocol))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other helper changes links here. Raises HostError where that is not to be had in time."""
        deadline = time.monotonic() + self._lock_limit
        while not self._try_lock():
            if time.monotonic() > deadline:
                raise HostError(
                    f"{self.path or OWN}: locked for {self._lock_limit:g} s by {self._holder()}; "
                    "see what holds it (/proc/locks), and end that"
                )
            time.sleep(LOCK_POLL)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> str:
        """Who has the lock, for a message. A line of /proc/locks is `1: FLOCK ADVISORY WRITE PID 00:04:INODE 0 EOF`."""
        inode = f":{self.inode}"
        with open("/proc/locks") as file:
            holders = [
                fields[4] for line in file if (fields := line.split())[5].endswith(inode) and fields[1] == "FLOCK"
            ]
        return f"process {holders[0]}" if holders else "a process out of sight"

    def close(self) -> None:
        """Let the namespace go; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
