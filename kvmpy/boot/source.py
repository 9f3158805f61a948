"""A file that the configuration names, read in pieces and never trusted.

Every failure is a ConfigError that starts with the TOML path and the file's name: what cannot be opened, read or used
is the operator's to mend.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from kvmpy.errors import ConfigError, errno_name
from kvmpy.host.memory import StrPath

CHUNK: Final = 1 << 20  # bytes of one read into the guest's memory


class Source(msgspec.Struct, frozen=True):
    """The file at ``path``, named by ``field`` of the configuration, such as "boot.kernel"."""

    field: str
    path: StrPath

    def error(self, text: str) -> ConfigError:
        """A ConfigError about this file."""
        return ConfigError(f"{self.field}: {self.path}: {text}")

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """Open the file; what the operating system refuses meanwhile is a ConfigError too."""
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._refused("cannot be opened", error) from error
        except ValueError as error:
            raise self.error("not a file name") from error
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise self.error("is a directory")
            if not stat.S_ISREG(status.st_mode):
                raise self.error("is not a regular file")
            if status.st_size == 0:
                raise self.error("is empty")
            yield Reader(self, fd, status.st_size)
        except OSError as error:
            raise self._refused("cannot be read", error) from error
        finally:
            os.close(fd)

    def _refused(self, what: str, error: OSError) -> ConfigError:
        number = error.errno or 0
        return self.error(f"{what}: {os.strerror(number)} ({errno_name(number)})")


class Reader(msgspec.Struct, frozen=True):
    """An open Source of ``size`` bytes."""

    source: Source
    fd: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """[offset, offset+size) of the file, or as much of it as there is."""
        return os.pread(self.fd, size, offset)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` on, without a copy and in pieces that hold no lock for long."""
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done : done + CHUNK]], offset + done)
            if count == 0:
                raise self.source.error(f"ends at byte {offset + done}: it became shorter while it was read")
            done += count
