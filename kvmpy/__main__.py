"""`kvmpy` and `python -m kvmpy`: the process around the command line."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run one command; returns the exit code."""
    open_missing_streams()
    # Who started us may ignore it, and so would we: the kernel would keep from us how the processes we start end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        from kvmpy.cli.main import main as run_command

        code = run_command(sys.argv[1:])
    except SystemExit as e:  # argparse has said what it had to, or a signal ended us
        code = e.code if isinstance(e.code, int) else 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    return flush(code)


def open_missing_streams() -> None:
    """Put /dev/null where standard input, output or error is closed: the next file opened would become it."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number free, which is fd
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115  it lives as long as the process
    # A path may hold bytes that are no text here; it is shown all the same.
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")


def flush(code: int) -> int:
    """Write out what is buffered; returns ``code``, or 1 where standard output takes no more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            # Or Python would try again at its end, fail again, and choose an exit code of its own.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            if stream is sys.stdout:
                code = _refused(e) or code
    return code


def _refused(e: OSError) -> int:
    from kvmpy.cli.main import say

    return 1 if isinstance(e, BrokenPipeError) else say(e)  # whoever read our output may have had enough


if __name__ == "__main__":
    sys.exit(main())
