"""Locks on whole files, against other processes: open file description locks (fcntl(2), F_OFD_SETLK).

They belong to the open file, not to the process: they end with its last descriptor, however that comes about, and two
opens of one file in one process exclude each other. They are a help, no wall: nobody has to ask, and on block devices
only those who opened the same node meet. Another host does not see them, unless the filesystem says so (NFS does).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from kvmpy.errors import HostError, errno_name

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length (0: all there will be), pid


def lock(fd: int, path: str, *, shared: bool) -> None:
    """Take the lock, at once. Raises HostError that names ``path`` and, where they can be found, who holds it."""
    try:
        _set(fd, fcntl.F_RDLCK if shared else fcntl.F_WRLCK)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            raise HostError(f"{path}: {errno_name(e.errno or 0)}: its filesystem cannot lock it") from e
        held = ", ".join(holders(fd)) or "another process"
        advice = "stop that first" if shared else "stop that first, or open it readonly everywhere"
        raise HostError(f"{path}: locked by {held}; {advice}") from e


def unlock(fd: int) -> None:
    """Give the lock up; where there is none, nothing happens."""
    _set(fd, fcntl.F_UNLCK)


def holders(fd: int) -> list[str]:
    """Who has a lock on the file behind ``fd``, as "name (pid 123)"; of other users' processes only root sees it."""
    file = os.fstat(fd)
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        # Processes come and go, and some are none of our business.
        with contextlib.suppress(OSError):
            if any(_locks(pid, number, file) for number in os.listdir(f"/proc/{pid}/fd")):
                found.add(int(pid))
    return [named(pid) for pid in sorted(found)]


def _set(fd: int, kind: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


def _locks(pid: str, number: str, file: os.stat_result) -> bool:
    """Whether descriptor ``number`` of process ``pid`` holds a lock on ``file``."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), file):
            return any(line.startswith("lock:") for line in _lines(f"/proc/{pid}/fdinfo/{number}"))
    return False


def named(pid: int) -> str:
    """A process for a message: "name (pid 123)"."""
    if pid == os.getpid():
        return f"this process itself (pid {pid})"
    name = ""
    with contextlib.suppress(OSError):
        name = "".join(_lines(f"/proc/{pid}/comm")).strip()
    return f"{name or 'a process'} (pid {pid})"


def _lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from file
