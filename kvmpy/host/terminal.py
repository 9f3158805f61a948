"""The operator's terminal in raw mode, always put back.

Raw but for output processing, which stays on so that our own messages do not staircase. The descriptors are opened
afresh where the kernel allows it: O_NONBLOCK belongs to an open file description, and setting it on ours would set it
for the shell that started us too. Of a shell's job control: a background process group waits for the foreground before
it touches the terminal, unless it has something else to do, and once it is to end it leaves the terminal to whoever has
it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import stat
import termios
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, Self

from kvmpy.errors import HostError

ESCAPE: Final = 0x01  # Ctrl-A, as in QEMU


def reopen(fd: int, flags: int) -> int:
    """A descriptor for what ``fd`` is that does not block; /dev/null where ``fd`` is closed.

    A terminal or pipe is opened afresh. A regular file never blocks, and opened afresh it would begin at its start.
    What cannot be opened afresh, such as a socket, is made not to block for all that have it: see `blocking_as_before`.
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


@contextlib.contextmanager
def blocking_as_before(*fds: int) -> Iterator[None]:
    """Afterwards ``fds`` block their other users as they did, whatever `reopen` had to do to them."""
    before = {}
    for fd in fds:
        with contextlib.suppress(OSError):  # it is closed
            before[fd] = os.get_blocking(fd)
    try:
        yield
    finally:
        for fd, blocking in before.items():
            with contextlib.suppress(OSError):
                os.set_blocking(fd, blocking)


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those of ``numbers`` to catch: SIGINT and SIGHUP stay ignored where we were started so, by `&` or by nohup."""
    kept = (signal.SIGINT, signal.SIGHUP)
    return [number for number in numbers if number not in kept or signal.getsignal(number) != signal.SIG_IGN]


def in_background(fd: int) -> bool:
    """Whether ``fd`` is our controlling terminal and another process group has it."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # it does not control us, or was hung up
        return False


class RawTerminal:
    """``fd``'s terminal in raw mode between `__enter__` and `__exit__`.

    Once ``ending`` says so, being in the background is no reason to stop any more: a signal has to end us there too.
    ``on_background`` is told, by the main thread, when we go on in the background after a stop: whoever has something
    to do without the terminal calls `retake` later. Without it we stop until we are in the foreground.
    """

    def __init__(
        self,
        fd: int,
        ending: Callable[[], bool] = lambda: False,
        on_background: Callable[[], object] | None = None,
    ) -> None:
        self._fd, self._ending, self._on_background = fd, ending, on_background
        self._saved: list[Any] | None = None
        self._handler: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._wait_for_foreground()
        self._saved = termios.tcgetattr(self._fd)
        atexit.register(self.restore)
        self._handler = signal.signal(signal.SIGCONT, self._continued)
        try:
            self._set_raw()
        except BaseException:
            self.restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the terminal back as it was; a second call does nothing.

        In the background it is somebody else's, and is as they like it.
        """
        if self._saved is not None:
            saved, self._saved = self._saved, None
            signal.signal(signal.SIGCONT, self._handler)
            # It may be taken from us just now, and we would stop.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
            with contextlib.suppress(termios.error):  # it was hung up meanwhile
                if not in_background(self._fd):
                    _retry(partial(termios.tcsetattr, self._fd, termios.TCSADRAIN, saved))
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            atexit.unregister(self.restore)

    def _wait_for_foreground(self) -> None:
        """A background process group stops here until it is brought to the front: the kernel sends it SIGTTOU.

        Only then is the terminal as the shell wants it back: at its prompt it has other settings.
        """
        try:
            _retry(partial(termios.tcdrain, self._fd))
        except termios.error as e:
            if e.args[0] == errno.EIO and in_background(self._fd):
                raise HostError(
                    "EIO: standard input is a terminal that another process group has, and no shell can bring this one "
                    "to the foreground; redirect standard input"
                ) from e
            raise

    def _continued(self, *_: object) -> None:
        """We go on after a stop. In the main thread, whatever that does."""
        if self._on_background is not None and in_background(self._fd):
            self._on_background()
        else:
            self.retake()

    def retake(self) -> None:
        """We are in the foreground, with the terminal as the shell likes it: make it raw again. Any thread."""
        if self._saved is None:
            return
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
        _retry(partial(termios.tcsetattr, self._fd, termios.TCSADRAIN, mode), self._left)

    def _left(self) -> bool:
        return self._ending() and in_background(self._fd)


def _retry(call: Callable[[], object], unless: Callable[[], bool] = lambda: False) -> None:
    """``call``, again each time a signal interrupts it, such as SIGCONT after SIGTTOU. Not where ``unless``.

    ``call`` is not Python: between the two a handler would run, and its news come too late.
    """
    while not unless():
        try:
            call()
        except termios.error as e:
            if e.args[0] != errno.EINTR:
                raise
        else:
            return


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
