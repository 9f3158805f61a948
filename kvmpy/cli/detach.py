"""`kvmpy run --detach`: the machine in a process of its own, which outlives the terminal and the session.

We fork before anything of the machine is made. The child leaves our session; its input is /dev/null and its output a
log, to which it appends. The parent waits until the machine runs, or waits for its guest, and tells what came of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Callable
from typing import Final

from kvmpy.cli.main import printable, tell
from kvmpy.errors import HostError, refusal, signal_name

STDIN, STDOUT, STDERR = 0, 1, 2
RUNS: Final = b"\1"
SHOWN: Final = 4096  # bytes of the log's end, of a machine that did not come to run


def log_path(name: str) -> str:
    """Where the log of machine ``name`` is unless somebody says otherwise."""
    if os.geteuid() == 0:
        return f"/var/log/kvmpy/{name}.log"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "kvmpy", f"{name}.log")


def detach(name: str, log: str | None) -> Callable[[], object] | int:
    """In the child, returns what is to be called when the machine runs; in the parent, once it does, the exit code."""
    path = log or log_path(name)
    fd = _open_log(path)
    begin = os.lseek(fd, 0, os.SEEK_END)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        try:
            return _wait(name, child, read_end, path, begin)
        finally:
            os.close(read_end)
            os.close(fd)
    os.close(read_end)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for standard, source in ((STDIN, null), (STDOUT, fd), (STDERR, fd)):
        os.dup2(source, standard)
    os.close(null)
    os.close(fd)

    def ready() -> None:
        with contextlib.suppress(BrokenPipeError):  # who started us has gone, and we were to outlive it
            os.write(write_end, RUNS)
        os.close(write_end)

    return ready


def _wait(name: str, child: int, read_end: int, path: str, begin: int) -> int:
    """Until the machine runs, or has ended before. Ctrl-C ends it."""
    try:
        word = os.read(read_end, 1)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        raise
    if word == RUNS:
        tell(f"kvmpy: {printable(name)}: process {child}; what it says goes to {printable(path)}")
        return 0
    _, status = os.waitpid(child, 0)
    if said := _since(path, begin).rstrip():
        tell(said)
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    tell(f"kvmpy: process {child} was ended by {signal_name(number)} before its guest ran; see {printable(path)}")
    return 128 + number


def _open_log(path: str) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), 0o750, exist_ok=True)
        fd = os.open(path, flags, 0o640)
    except OSError as e:
        why = refusal(e.errno, "the log cannot be written", "choose another with --log")
        raise HostError(f"{path}: {why}") from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise HostError(f"{path}: is not a file, so it is no place for a log; choose another with --log")
    return fd


def _since(path: str, begin: int) -> str:
    """What was written to the log since then, or the end of it."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - SHOWN))
        return file.read().decode(errors="replace")
    return f"kvmpy: see {path}"
