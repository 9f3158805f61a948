"""An eventfd, owned: the kernel's counter with which KVM, vhost and our threads wake each other."""

from __future__ import annotations

import contextlib
import os
from typing import Self

from kvmpy.errors import HostError, refusal


class EventFd:
    """A non-blocking, close-on-exec eventfd."""

    def __init__(self) -> None:
        """Raises HostError where the host has no descriptors left."""
        try:
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as e:
            raise HostError(f"eventfd: {refusal(e.errno, 'none can be made')}") from e

    def fileno(self) -> int:
        """The descriptor; it stays ours."""
        return self.fd

    def signal(self) -> None:
        """Add one to the counter."""
        # A full counter means the other side has not read 2**64-2 signals: it is woken already.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def take(self) -> int:
        """The count since the last call, 0 if there was no signal."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close the descriptor; closing twice is allowed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
