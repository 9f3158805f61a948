"""What we say while a machine runs: on standard error, and never at the price of a thread that waits for its reader.

A full pipe, or a terminal that has been stopped, would hold the control thread and with it the monitor and every
signal, or a vCPU. So what cannot be written now is dropped, and its lines are counted.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO, cast

from kvmpy.host.terminal import blocking_as_before, reopen

STDERR: Final = 2


class LossyText(io.TextIOBase):
    """Text to ``fd``, which must not block. Says how many lines were lost before the next one that fits. Any thread."""

    def __init__(self, fd: int) -> None:
        """``fd`` is ours from now on."""
        super().__init__()
        self._fd = fd
        self._lock = threading.Lock()
        self._rest = b""
        self._lost = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Write ``text`` now, or never; the rest of what has been begun comes first when there is room."""
        with self._lock:
            if not self.closed and not self._put(text.encode(errors="backslashreplace")):
                self._lost += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Nothing waits that could be written, not even after the end."""

    def close(self) -> None:
        """Say what is still owed, if there is room, and close the descriptor; closing twice is allowed."""
        with self._lock:
            if not self.closed:
                if self._rest or self._lost:
                    self._put(b"")
                super().close()
                os.close(self._fd)

    def _put(self, data: bytes) -> bool:
        """Whether ``data`` is on its way, behind the line that was begun and a word on those that were lost."""
        if self._rest:
            self._rest = self._rest[self._send(self._rest) :]
            if self._rest:
                return False
        if self._lost:
            lines = "1 line" if self._lost == 1 else f"{self._lost} lines"
            data = f"kvmpy: {lines} lost here: standard error was not being read\n".encode() + data
        sent = self._send(data)
        if not sent:
            return False
        # Half a line would spoil the next one, so the rest of it waits.
        self._rest, self._lost = data[sent:], 0
        return True

    def _send(self, data: bytes) -> int:
        """How many bytes went; all of them where the reader is gone for good, for then nobody waits for them."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)


@contextmanager
def lossy_stderr() -> Iterator[None]:
    """Within, `sys.stderr` and the logging that goes there drop what they cannot write."""
    ordinary = sys.stderr
    ordinary.flush()
    with blocking_as_before(STDERR):
        lossy = cast(TextIO, LossyText(reopen(STDERR, os.O_WRONLY)))
        _redirect(ordinary, lossy)
        try:
            yield
        finally:
            _redirect(lossy, ordinary)
            lossy.close()


def _redirect(before: TextIO, after: TextIO) -> None:
    sys.stderr = after
    if "logging" not in sys.modules:  # nothing has been said yet; then it will be where sys.stderr is
        return
    import logging

    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
