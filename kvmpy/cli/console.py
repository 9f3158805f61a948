"""`kvmpy console`: this terminal on a running machine's serial line."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
from typing import Final, NoReturn

from kvmpy.cli.client import find
from kvmpy.cli.main import tell
from kvmpy.errors import HostError, errno_name
from kvmpy.host import rundir
from kvmpy.host.terminal import EscapeFilter, RawTerminal, blocking_as_before, heeded, in_background, reopen

STDIN, STDOUT = 0, 1
CHUNK: Final = 4096
# A guest that hangs takes no input: what is typed meanwhile waits up to here, and the rest is lost.
MOST_TYPED: Final = 64 * 1024
# They end us at once, but not before the terminal has been put back.
ENDING: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def console(args: argparse.Namespace) -> int:
    """Attach until Ctrl-A x, or until the machine ends."""
    path = os.path.join(find(args.name).directory, rundir.CONSOLE_SOCKET)
    if not os.isatty(STDIN):
        raise HostError(f"standard input is not a terminal; a script can use the socket {path} itself")
    with socket.socket(socket.AF_UNIX) as wire:
        try:
            wire.connect(path)
        except OSError as e:
            raise HostError(f"{path}: {errno_name(e.errno or 0)}: the machine does not answer; is it ending?") from e
        caught = _catch_signals()
        wire.setblocking(False)
        if in_background(STDIN):
            tell(f"kvmpy: the console of {args.name} is stopped until it is brought to the foreground (fg)")
        with blocking_as_before(STDOUT):
            screen = reopen(STDOUT, os.O_WRONLY)
            try:
                with RawTerminal(STDIN):
                    _say(screen, f"{args.name}: attached; Ctrl-A x leaves, Ctrl-A h helps")
                    left = _shuttle(wire, screen, caught)
                    _say(screen, "" if left else f"{args.name}: the machine has ended")
            finally:
                os.close(screen)
    return 0


def _catch_signals() -> int:
    """End at a signal. Returns what becomes readable then: a select that is just beginning is not interrupted."""
    caught, wake = os.pipe()
    for fd in (caught, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake)
    for number in heeded(ENDING):
        signal.signal(number, _end)
    return caught


def _end(number: int, _: object) -> NoReturn:
    """Unwind, once: a second signal must not keep the terminal from being put back."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _shuttle(wire: socket.socket, screen: int, caught: int) -> bool:
    """Carry bytes both ways until either side ends; True where that was ours. Waits for nothing but the next byte."""
    leaving = False
    typed, said = bytearray(), bytearray()

    def leave() -> None:
        nonlocal leaving
        leaving = True

    keys = EscapeFilter({"x": (leave, "leave; the guest runs on")}, said.extend)
    try:
        while not leaving:
            # Always the keyboard, or Ctrl-A x would not be seen; the machine only once the screen has shown the last.
            readable, writable, _ = select.select(
                [STDIN, caught] if said else [STDIN, caught, wire.fileno()],
                [fd for fd, pending in ((wire.fileno(), typed), (screen, said)) if pending],
                [],
            )
            if STDIN in readable:
                data = os.read(STDIN, CHUNK)
                if not data:
                    return True
                typed += keys(data)[: MOST_TYPED - len(typed)]
            if wire.fileno() in readable:
                data = wire.recv(CHUNK)
                if not data:
                    return False
                said += data
            for fd in writable:
                _send(fd, typed if fd == wire.fileno() else said)
    except ConnectionError:
        return False
    return True


def _send(fd: int, pending: bytearray) -> None:
    """Send what ``fd`` takes now of ``pending``."""
    with contextlib.suppress(BlockingIOError):
        del pending[: os.write(fd, pending)]


def _say(screen: int, text: str) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(screen, f"\n{text}\n".encode() if text else b"\n")
