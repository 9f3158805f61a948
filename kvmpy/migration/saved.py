"""file: a stream that is kept. A new one takes an old one's place when it is whole and on the disk, and not before."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Final

from kvmpy.errors import HostError, MigrationError, StreamError, errno_name, refusal
from kvmpy.migration.aside import aside
from kvmpy.migration.channel import WRITE, FileChannel
from kvmpy.migration.stop import LONGEST, Deadline, Stop
from kvmpy.migration.uri import File

# A guest's RAM is in it, with all its secrets.
MODE: Final = 0o600
ADVICE: Final = {
    errno.ENOENT: "see that its directory is there",
    errno.EACCES: "run as its owner or as root",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EDQUOT: "make room in the quota",
    errno.EISDIR: "it is a directory",
    errno.ENXIO: "nobody reads from that FIFO; start who does first",
}
READING: Final = ADVICE | {errno.ENOENT: "give the file that kvmpy save has written"}


class SavedFile(FileChannel):
    """A stream that is written to a file, or read from it."""

    def __init__(self, name: str, stop: Stop, file: File, *, reading: bool) -> None:
        """Raises MigrationError where it cannot be opened."""
        self._path = os.path.realpath(file.path)  # of a symbolic link, what it stands for is replaced
        self._reading = reading
        self._whole = file.offset is None
        # With an offset the rest of the file is somebody else's, and a device or a FIFO cannot be made anew.
        self._temporary = (
            f"{self._path}.part-{os.getpid()}" if not reading and self._whole and _is_new(self._path) else ""
        )
        flags = os.O_RDONLY if reading else os.O_WRONLY | os.O_CREAT
        # Whoever else may write there must not choose what we write to, nor who may read it.
        flags |= (os.O_EXCL if self._temporary else 0) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            if self._temporary:
                with suppress(FileNotFoundError):  # it is of a process that had our number, and died
                    os.unlink(self._temporary)
            fd = os.open(self._temporary or file.path, flags, MODE)
            try:
                if file.offset is not None:
                    os.lseek(fd, file.offset, os.SEEK_SET)
            except BaseException:
                os.close(fd)
                raise
        except OSError as e:
            said = refusal(e.errno, "cannot be opened", (READING if reading else ADVICE).get(e.errno or 0, ""))
            raise MigrationError(f"{name}: {said}") from e
        super().__init__(name, stop, fd)
        self.is_kept = stat.S_ISREG(os.fstat(fd).st_mode)

    def settle(self) -> None:
        self._secure(Deadline(LONGEST))

    def finish(self) -> None:
        """Raises StreamError where it is not on the disk for sure, or, when it was read, where it goes on."""
        if self._reading:
            if self._whole and self.next_byte():
                raise StreamError(f"{self.name}: goes on after the end of the stream, at byte {self.received - 1}")
            return
        self._secure(Deadline(self.timeout))  # the last message
        try:
            if self._temporary:
                os.rename(self._temporary, self._path)
                self._temporary = ""
                _sync_directory(self._path)
        except OSError as e:
            raise self._unsure(e) from e

    def _secure(self, deadline: Deadline) -> None:
        """Raises StreamError where it is not on the disk, or not in time, and MigrationCancelled."""
        fd = os.dup(self.fd)  # ours may be closed before the disk has answered

        def sync() -> None:
            try:
                _sync(fd)
            finally:
                os.close(fd)

        try:
            aside("sync", sync, self.stop, deadline, f"{self.name}: it is not on the disk")
        except OSError as e:
            raise self._unsure(e) from e
        except HostError:  # no thread for it
            os.close(fd)
            raise

    def _unsure(self, e: OSError) -> StreamError:
        said = refusal(e.errno, "it may not be on the disk", ADVICE.get(e.errno or 0, ""))
        return StreamError(f"{self.name}: {said}")

    def withdraw(self) -> bool:
        if not self._temporary:
            return False
        try:
            os.unlink(self._temporary)
        except OSError:
            return False
        self._temporary = ""
        return True

    def close(self) -> None:
        """What is not finished is removed."""
        super().close()
        self.withdraw()

    def ended(self, missing: int) -> str:
        return f"{self.name}: the file ends after byte {self.received}; {missing} more were due"

    def _broken(self, e: OSError, events: int) -> str:
        if advice := ADVICE.get(e.errno or 0):
            verb, at = ("written", self.sent) if events == WRITE else ("read", self.received)
            return f"{self.name}: {errno_name(e.errno or 0)}: no more can be {verb} after byte {at}; {advice}"
        return super()._broken(e, events)


def _is_new(path: str) -> bool:
    """Whether a file made there would be, or replace, a regular one."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EROFS):  # a pipe or a device has nothing to sync
            raise


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
