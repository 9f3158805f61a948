"""The lab's command line: make the images, run a command in an emulated host, or get a shell in one."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Final, NoReturn

from scripts.lab import images
from scripts.lab.errors import HostGone, LabError
from scripts.lab.hardware import HARDWARE
from scripts.lab.host import CPUS, LIFETIME_SECONDS, EmulatedHost
from scripts.lab.pair import NAMES, HostPair
from scripts.lab.process import Process

STDIN: Final = 0
READ_SIZE: Final = 1 << 15
EXIT_LAB_FAILED: Final = 125  # like env(1) and timeout(1): it was not the command that failed
EXIT_SIGNALLED: Final = 128  # plus the signal's number, as a shell says it


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        return _make_images() if options.task == "images" else _run(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return EXIT_LAB_FAILED
    except KeyboardInterrupt:
        return EXIT_SIGNALLED + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.lab", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("images", help="make everything the lab boots, below .lab/")
    run = tasks.add_parser("run", help="start an emulated host, run a command in it, return its exit code")
    run.add_argument("--tty", action="store_true", help="give the command a terminal")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="after --: the command and its arguments")
    shell = tasks.add_parser("shell", help="start an emulated host and a shell in it; the host ends with the shell")
    shell.set_defaults(tty=True, command=["bash", "--norc"])  # a bashrc of the outside machine's may set PATH
    for task in (run, shell):
        task.add_argument("--cpus", type=int, default=CPUS, help="more than one is unsafe with QEMU 7.2")
        task.add_argument("--memory", default="3G")
        task.add_argument("--hosts", type=int, choices=(1, 2), default=1, help="2: joined, with a shared disk and ssh")
        task.add_argument("--hardware", choices=HARDWARE, help="a bridge, and NICs to pass through with an IOMMU")
        task.add_argument("--seconds", type=int, default=LIFETIME_SECONDS, help="the host ends after that time")
    return parser


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """End by way of all ``with`` blocks: the host is stopped and the terminal is as it was."""
    sys.exit(EXIT_SIGNALLED + number)


def _make_images() -> int:
    begin = time.monotonic()
    made = images.make()
    print(f"{'igb':8} {made.igb_qemu.program}")
    for name, boot in {"host": made.host, **made.guests}.items():
        print(f"{name:8} {boot.vmlinuz} {boot.vmlinux} {boot.initrd}")
    print(f"{'disk':8} {made.guest_root}")
    print(f"images ready in {time.monotonic() - begin:.1f} s", file=sys.stderr)
    return 0


def _run(options: argparse.Namespace) -> int:
    with _hosts(options) as host:
        process = host.spawn(options.command, tty=options.tty, size=_size(), sink=_write)
        with _terminal(process) if options.tty else nullcontext():
            threading.Thread(target=_forward_input, args=(process,), name="lab-stdin", daemon=True).start()
            code = process.wait(options.seconds)
    return EXIT_SIGNALLED - code if code < 0 else code


@contextmanager
def _hosts(options: argparse.Namespace) -> Iterator[EmulatedHost]:
    """The host that the command is run in; the other of a pair is reached from it by ssh."""
    hardware, memory, seconds = options.hardware, options.memory, options.seconds
    if options.hosts == 1:
        nics = HARDWARE.get(hardware)
        with EmulatedHost(cpus=options.cpus, memory=memory, lifetime=seconds, hardware=nics) as host:
            print(f"emulated host up in {host.boot_seconds:.1f} s", file=sys.stderr)
            yield host
    else:
        with HostPair(hardware or "virtio", memory=memory, lifetime=seconds) as pair:
            where = " and ".join(f"{name} at {address}" for name, address in zip(NAMES, pair.addresses, strict=True))
            print(f"emulated hosts up in {pair.boot_seconds:.1f} s: {where}; this is {NAMES[0]}", file=sys.stderr)
            yield pair.first


def _write(stream: int, data: bytes) -> None:
    """Pass output on. Where nobody reads ours any more, we end, as a command in a pipe does."""
    try:
        while data:
            data = data[os.write(stream, data) :]
    except BrokenPipeError:
        os.kill(os.getpid(), signal.SIGTERM)


def _forward_input(process: Process) -> None:
    with suppress(HostGone):  # the main thread finds that out too, and reports it
        while data := os.read(STDIN, READ_SIZE):
            process.send(data)
        process.close_stdin()


def _size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.lines, size.columns


@contextmanager
def _terminal(process: Process) -> Iterator[None]:
    """Hand our terminal over to the command's: every key goes there, Ctrl-C too, and changes of size follow."""
    if not os.isatty(STDIN):
        yield
        return
    saved = termios.tcgetattr(STDIN)
    signal.signal(signal.SIGWINCH, lambda *_: process.resize(*_size()))
    try:
        tty.setraw(STDIN)
        yield
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        termios.tcsetattr(STDIN, termios.TCSADRAIN, saved)


if __name__ == "__main__":
    sys.exit(main())
