"""exec: a command of the operator's, with the stream on its standard input or output."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import Final

from kvmpy.errors import MigrationError, StreamError, refusal, signal_name
from kvmpy.migration.channel import READ, FileChannel
from kvmpy.migration.stop import Deadline, Stop

SHELL: Final = "/bin/sh"
# What Python ignores, and every program expects as it is by default.
DEFAULT: Final = (signal.SIGPIPE, signal.SIGXFSZ)


class CommandChannel(FileChannel):
    """Our end of a pipe, and the shell at the other. The command has a session of its own, and dies with it."""

    def __init__(self, name: str, stop: Stop, command: str, *, reading: bool) -> None:
        """Raises MigrationError where no command can be started. ``reading``: we read what it writes."""
        try:
            read_fd, write_fd = os.pipe()
            ours, theirs = (read_fd, write_fd) if reading else (write_fd, read_fd)
            try:
                self._pid = _spawn(command, theirs, 1 if reading else 0)
            except BaseException:
                os.close(ours)
                raise
            finally:
                os.close(theirs)
        except OSError as e:
            raise MigrationError(f"{name}: {refusal(e.errno, f'{SHELL} cannot be started')}") from e
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError as e:
            os.close(ours)
            _kill(self._pid)
            os.waitpid(self._pid, 0)
            raise MigrationError(f"{name}: {refusal(e.errno, 'its process cannot be watched')}") from e
        self._reading = reading
        self._status: int | None = None
        super().__init__(name, stop, ours)

    def finish(self) -> None:
        """Wait until it has taken or given everything and left. Raises StreamError where it fails."""
        if self._reading:
            if self.next_byte():
                raise StreamError(f"{self.name}: the command writes on after the end of the stream")
        else:
            super().close()
        self.stop.wait(self._pidfd, READ, Deadline(self.timeout), f"{self.name}: the command has not ended")
        if said := self._said():
            raise StreamError(f"{self.name}: the command {said}")

    def close(self) -> None:
        """A command that still runs is killed, with all that it has started in its session's process group."""
        super().close()
        if self._pidfd < 0:
            return
        if self._status is None:
            _kill(self._pid)
            self._reap()
        os.close(self._pidfd)
        self._pidfd = -1

    def ended(self, missing: int) -> str:
        return f"{super().ended(missing)}; the command {self._said() or 'has closed its output'}"

    def _broken(self, e: OSError, events: int) -> str:
        return f"{super()._broken(e, events)}; the command {self._said() or 'has closed its input'}"

    def _said(self) -> str:
        """How it has ended, if that was no success; it is given a moment, for pipes close before processes end."""
        poll = select.poll()
        poll.register(self._pidfd, READ)
        if self._status is None and poll.poll(1000):
            self._reap()
        if not self._status:
            return ""
        if self._status < 0:
            return f"was killed by {signal_name(-self._status)}"
        return f"has failed with status {self._status}"

    def _reap(self) -> None:
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _kill(pid: int) -> None:
    """With all that it has started in its session's process group."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _spawn(command: str, pipe: int, number: int) -> int:
    """Raises OSError. posix_spawn has nothing to import, and nothing to copy of a guest's RAM."""
    null = (os.POSIX_SPAWN_OPEN, 1 - number, os.devnull, os.O_RDWR, 0)
    return os.posix_spawn(
        SHELL,
        (SHELL, "-c", command),
        os.environ,
        file_actions=((os.POSIX_SPAWN_DUP2, pipe, number), *((null,) if number == 1 else ())),
        setsid=True,
        setsigmask=(),
        setsigdef=DEFAULT,
    )
