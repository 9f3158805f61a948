"""The runtime directory of one machine: /run/kvmpy/NAME with its pid file, sockets, and the lock that makes NAME ours.

The lock is on the pid file: it goes with the process, however that ends, so a directory that a crash left behind
is taken over, and `ps` tells the living from the dead. It goes back to empty and away on close.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from typing import Final, NoReturn

import msgspec

from kvmpy.errors import HostError, refusal

OVERRIDE: Final = "KVMPY_RUNTIME_DIR"
PID: Final = "pid"
QMP_SOCKET: Final = "qmp.sock"
CONSOLE_SOCKET: Final = "console.sock"
PCI_JOURNAL: Final = "pci.json"  # kvmpy.host.pci_journal
PCI_JOURNAL_NEW: Final = "pci.json.new"
OURS: Final = frozenset({PID, QMP_SOCKET, CONSOLE_SOCKET, PCI_JOURNAL, PCI_JOURNAL_NEW})
# What a crash left for the next start to read, and what a close leaves that could not be undone
KEPT: Final = frozenset({PID, PCI_JOURNAL})
# sun_path of a unix socket (man 7 unix), less the terminating zero
LONGEST_SOCKET_PATH: Final = 107
# Of a pid file in a base that users share: another's machine, or no machine at all
STRANGERS: Final = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP})
# Machines of one name that come and go while we make its directory
MOST_TRIES: Final = 100
# fcntl.h: locks of an open file description, which Python does not name; struct flock for a write lock on all of it
F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
WHOLE_FILE: Final = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def base() -> str:
    """Where the directories of this user's machines are."""
    if given := os.environ.get(OVERRIDE):
        return given
    if os.geteuid() == 0:
        return "/run/kvmpy"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}"), "kvmpy")


def make(directory: str) -> bool:
    """Make the directory of a machine that no `RuntimeDirectory` has; whether it was not there.

    Raises OSError, and HostError where strangers could change what will be in it.
    """
    parent = os.path.dirname(directory)
    os.makedirs(parent, 0o755, exist_ok=True)
    _require_safe(os.path.realpath(parent), shared=True)
    try:
        os.mkdir(directory, 0o750)
    except FileExistsError:
        _require_safe(directory)
        return False
    return True


class Running(msgspec.Struct, frozen=True):
    """A machine that runs now."""

    name: str
    pid: int
    directory: str


class RuntimeDirectory:
    """The directory of machine ``name``, locked by this process until `close`."""

    def __init__(self, name: str) -> None:
        """Raises HostError where the name runs already or the directory cannot be written."""
        self.path = os.path.join(base(), name)
        longest = self.file(CONSOLE_SOCKET)
        if (excess := len(os.fsencode(longest)) - LONGEST_SOCKET_PATH) > 0:
            raise HostError(f"name: {longest}: too long for a socket by {excess} bytes")
        self._lock = -1
        try:
            self._take()
        except OSError as e:
            self._let_go()
            with contextlib.suppress(OSError):  # one that we have just made, or that is as good as new
                os.rmdir(self.path)
            advice = f"run as root, or set {OVERRIDE} to a directory of yours"
            why = refusal(e.errno, "the runtime directory cannot be written", advice)
            raise HostError(f"{e.filename or self.path}: {why}") from e

    def _take(self) -> None:
        self._lock = self._open_pid_file()
        while not _lock(self._lock):
            # A machine of that name is just going away, and has unlinked the file we hold.
            if _is_at(self._lock, self.file(PID)):
                self._refuse()
            self._let_go()
            self._lock = self._open_pid_file()
        try:
            os.ftruncate(self._lock, 0)
            os.write(self._lock, f"{os.getpid()}\n".encode())
        except OSError:
            self.close()
            raise
        self._clear()

    def _open_pid_file(self) -> int:
        os.makedirs(base(), 0o755, exist_ok=True)
        _require_safe(os.path.realpath(base()), shared=True)
        for _ in range(MOST_TRIES):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o750)
            with contextlib.suppress(FileNotFoundError):
                self._require_ours()
            # A machine of that name, just going away, may take the directory from under us: make it again.
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.file(PID), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        raise FileNotFoundError(errno.ENOENT, "does not stay", self.path)

    def _require_ours(self) -> None:
        """Raises HostError unless the directory is one that kvmpy made for us: it will be emptied and removed."""
        _require_safe(self.path)
        if strange := sorted(set(os.listdir(self.path)) - OURS):
            raise HostError(
                f"name: {self.path}: holds {strange[0]!r}, so it is not a machine's directory; set another name, "
                f"or another {OVERRIDE}"
            )

    def _refuse(self) -> NoReturn:
        pid = os.read(self._lock, 20).decode(errors="replace").strip()
        self._let_go()
        name = os.path.basename(self.path)
        raise HostError(
            f"name: {name!r} is running already, process {pid or 'unknown'}; "
            f"stop it (kvmpy stop {name}) or set another name"
        )

    def file(self, name: str) -> str:
        """The path of one of its files."""
        return os.path.join(self.path, name)

    def close(self) -> None:
        """Remove what is ours in it, then the directory, then let the name go."""
        if self._lock >= 0:
            self._clear()
            # Once the pid file is gone the name may be another's: nothing but the empty directory is touched after it.
            with contextlib.suppress(OSError):
                os.unlink(self.file(PID))
                os.rmdir(self.path)
            self._let_go()

    def _let_go(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _clear(self) -> None:
        """Remove everything of ours but what is kept."""
        for name in OURS - KEPT:
            with contextlib.suppress(OSError):
                os.unlink(self.file(name))


def _require_safe(path: str, *, shared: bool = False) -> None:
    """Raises HostError unless ``path`` is a directory in which no stranger can change what is ours.

    ``shared`` allows one that a group of ours may write to, or one like /tmp, where others may not rename or remove.
    """
    info = os.lstat(path)
    mine = info.st_uid in (os.geteuid(), 0)
    if shared:
        closed = info.st_mode & stat.S_ISVTX or not info.st_mode & stat.S_IWOTH
    else:
        closed = not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not (stat.S_ISDIR(info.st_mode) and mine and closed):
        raise HostError(
            f"{path}: is not a directory that only its owner, you or root, can write to; remove it, "
            f"or set {OVERRIDE} to a directory of yours"
        )


def running() -> list[Running]:
    """Every machine of this user that runs now, by name."""
    try:
        names = sorted(os.listdir(base()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        try:
            found.append(_probe(name))
        except OSError as e:
            if e.errno not in STRANGERS:
                raise
    return [machine for machine in found if machine]


def find(name: str) -> Running | None:
    """Machine ``name``, if it runs now. Raises HostError where its directory may not be read."""
    try:
        return _probe(name)
    except OSError as e:
        why = refusal(e.errno, "not permitted", "run as the user who started it")
        raise HostError(f"{os.path.join(base(), name)}: {why}") from e


def _probe(name: str) -> Running | None:
    directory = os.path.join(base(), name)
    try:
        fd = os.open(os.path.join(directory, PID), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(fd) as file:
        if not _is_locked(fd):
            return None
        pid = file.read(20).strip()
        return Running(name, int(pid) if pid.isdigit() else 0, directory)


def _lock(fd: int) -> bool:
    """Take the lock, which belongs to this open file: another descriptor of ours may be closed without losing it."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, WHOLE_FILE)
    except BlockingIOError:
        return False
    return _is_at(fd, os.readlink(f"/proc/self/fd/{fd}"))


def _is_locked(fd: int) -> bool:
    """Whether somebody has the lock; asking takes nothing."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, WHOLE_FILE)
    kind: int = struct.unpack_from("h", answer)[0]
    return kind != fcntl.F_UNLCK


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
