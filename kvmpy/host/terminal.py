"""The operator's terminal in raw mode, always put back.

Raw but for output processing, which stays on so that our own messages do not staircase. The descriptors are opened
afresh where the kernel allows it: O_NONBLOCK belongs to an open file description, and setting it on ours would set it
for the shell that started us too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import stat
import termios
from collections.abc import Callable
from typing import Any, Final, Self

ESCAPE: Final = 0x01  # Ctrl-A, as in QEMU


def reopen(fd: int, flags: int) -> int:
    """A descriptor for what ``fd`` is that does not block; /dev/null where ``fd`` is closed.

    A terminal or pipe is opened afresh. A regular file never blocks, and opened afresh it would begin at its start.
    """
    try:
        kind = os.fstat(fd).st_mode
    except OSError:
        return os.open(os.devnull, flags | os.O_CLOEXEC)
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        with contextlib.suppress(OSError):  # we may not open it again: it was passed to us by another user
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    copy = os.dup(fd)
    if not stat.S_ISREG(kind):
        os.set_blocking(copy, False)
    return copy


class RawTerminal:
    """``fd``'s terminal in raw mode between `__enter__` and `__exit__`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None
        self._handler: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._saved = termios.tcgetattr(self._fd)
        atexit.register(self.restore)
        self._handler = signal.signal(signal.SIGCONT, self._continued)
        self._set_raw()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the terminal back as it was; a second call does nothing."""
        if self._saved is not None:
            saved, self._saved = self._saved, None
            signal.signal(signal.SIGCONT, self._handler)
            with contextlib.suppress(termios.error):  # it was hung up meanwhile
                termios.tcsetattr(self._fd, termios.TCSADRAIN, saved)
            atexit.unregister(self.restore)

    def _continued(self, *_: object) -> None:
        """The shell has brought us back, with the terminal as it likes it. In the main thread, whatever that does."""
        with contextlib.suppress(termios.error):  # it was hung up meanwhile
            self._set_raw()

    def _set_raw(self) -> None:
        mode = termios.tcgetattr(self._fd)
        mode[0] &= ~(
            termios.BRKINT
            | termios.ICRNL
            | termios.IGNCR
            | termios.INLCR
            | termios.INPCK
            | termios.ISTRIP
            | termios.IXON
            | termios.PARMRK
        )
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        # Background process groups stop here until they are brought to the front, as they should.
        termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)


class EscapeFilter:
    """Takes Ctrl-A commands out of what the operator types.

    ``commands`` maps a letter to what it does and says; "h" and "a" are ours. Unknown letters are dropped, as in QEMU.
    """

    def __init__(self, commands: dict[str, tuple[Callable[[], object], str]], show: Callable[[bytes], object]) -> None:
        """``show`` puts the help on the terminal."""
        self._commands, self._show = commands, show
        self._escaped = False

    @property
    def help(self) -> bytes:
        """What the keys do, a line each."""
        lines = [("h", "this help"), *((key, text) for key, (_, text) in self._commands.items()), ("a", "send Ctrl-A")]
        return "".join(f"\r\nCtrl-A {key}  {text}" for key, text in lines).encode() + b"\r\n"

    def __call__(self, data: bytes) -> bytes:
        kept = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    kept.append(byte)
                continue
            self._escaped = False
            if byte in (ord("a"), ESCAPE):
                kept.append(ESCAPE)
            elif byte in (ord("h"), ord("?")):
                self._show(self.help)
            elif command := self._commands.get(chr(byte)):
                command[0]()
        return bytes(kept)
