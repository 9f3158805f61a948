"""`kvmpy run` and the commands for a running machine, as processes: terminal, signals, output, and what is left behind.

The guests are a few bytes each; they enter in 32-bit protected mode.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.cli import client, control
from kvmpy.cli.main import main
from kvmpy.cli.run import _Signals
from kvmpy.config.schema import load
from kvmpy.errors import CommandError
from kvmpy.kvm.system import System, virtualization
from kvmpy.machine.machine import Machine
from tests.counts import count
from tests.fakes.loop import each
from tests.fakes.paced_guest import paced
from tests.fakes.pvh_kernel import HALT, LOAD_AT, POWER_OFF, SPIN, pvh_kernel

RATE: Final = 250  # looks at what it waits for, a second
SAY_K: Final = b"\x66\xba\xf8\x03\xb0\x4b\xee"  # mov dx, 0x3f8; mov al, 'K'; out dx, al
PANIC: Final = b"\x66\xba\x05\x05\xb0\x01\xee" + SPIN  # mov dx, 0x505; mov al, 1; out dx, al
TRIPLE_FAULT: Final = b"\x0f\x0b"  # ud2, and there is no IDT
# Enables its power button, says K, and powers off when the button is pressed.
OBEY: Final = paced(
    b"\x66\xba\x02\x06\x66\xb8\x00\x01\x66\xef"  # mov dx, 0x602; mov ax, 0x100 (PWRBTN_EN); out dx, ax
    + SAY_K,
    b"\x66\xba\x00\x06\x66\xed"  # mov dx, 0x600; in ax, dx
    b"\xf6\xc4\x01\x74" + bytes([len(POWER_OFF)]) + POWER_OFF,  # test ah, 1 (PWRBTN_STS); jz over it
    RATE,
)  # fmt: skip


def unless(key: bytes, then: bytes) -> bytes:
    """Do ``then`` where AL holds ``key``: cmp al, key; jne over it."""
    return b"\x3c" + key + b"\x75" + bytes([len(then)]) + then


def echo(before: bytes = b"") -> bytes:
    """Does something, says K, then whatever it is sent; Q powers off, T faults, P panics."""
    answer = (
        b"\xb2\xf8\xec"  # mov dl, 0xf8; in al, dx
        + unless(b"Q", POWER_OFF)
        + unless(b"T", TRIPLE_FAULT)
        + unless(b"P", PANIC)
        + b"\x88\xc4\xb2\xfd\xec\xa8\x20\x74\xfb"  # mov ah, al; mov dl, 0xfd; again: in al, dx; test al, 0x20; jz again
        + b"\x88\xe0\xb2\xf8\xee"  # mov al, ah; mov dl, 0xf8; out dx, al
    )
    look = b"\x66\xba\xfd\x03\xec\xa8\x01"  # next: mov dx, 0x3fd; in al, dx; test al, 1 (data ready)
    look += b"\x74" + bytes([len(answer) + 2])  # jz over all
    return paced(before + SAY_K, look + answer + b"\xeb" + struct.pack("b", -len(look + answer) - 2), RATE)  # jmp next


FIFO: Final = 16


def flood(size: int) -> bytes:
    """Sends ``size`` bytes, as many as the FIFO takes when the transmitter is ready, and powers off."""
    enable = b"\x66\xba\xfa\x03\xb0\x01\xee\x31\xdb"  # mov dx, 0x3fa; mov al, 1; out dx, al; xor ebx, ebx
    enable += b"\xbf" + struct.pack("<I", size // FIFO)  # mov edi, size / 16

    def send(table: int) -> bytes:
        """``table`` holds what is sent, and that again and again."""
        wait = b"\x66\xba\xfd\x03\xec\xa8\x20\x74\xfb"  # next: mov dx, 0x3fd; again: in al, dx; test al, 0x20; jz again
        some = b"\xb2\xf8\x8d\xb3" + struct.pack("<I", table)  # mov dl, 0xf8; lea esi, [ebx + table]
        some += b"\xb9" + struct.pack("<I", FIFO) + b"\xf3\x6e"  # mov ecx, 16; rep outsb
        some += b"\x80\xc3\x10\x4f"  # add bl, 16; dec edi
        return wait + some + b"\x75" + struct.pack("b", -len(wait + some) - 2)  # jnz next

    assert size % FIFO == 0
    code = len(enable + send(0) + POWER_OFF)
    return enable + send(LOAD_AT + code) + POWER_OFF + flooded(size)[:256]


def flooded(size: int) -> bytes:
    """What `flood` sends."""
    return bytes(left & 0xFF for left in range(size, 0, -1))


ECHO: Final = echo()
PATIENCE: Final = 60.0
CTRL_A: Final = b"\x01"


class Terminal:
    """A pty: the test sits at it, the command has the other side."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        os.set_blocking(self.ours, False)
        self.seen = b""

    @property
    def mode(self) -> list[Any]:
        return termios.tcgetattr(self.theirs)

    @property
    def raw(self) -> bool:
        return not self.mode[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def type(self, keys: bytes) -> None:
        while keys:
            _, ready, _ = select.select([], [self.ours], [], PATIENCE)
            assert ready, "nobody reads the terminal"
            with contextlib.suppress(BlockingIOError):
                keys = keys[os.write(self.ours, keys) :]

    def expect(self, text: bytes) -> None:
        """Read until ``text`` has appeared; what came before it is done with."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.seen!r}"
            self.seen += os.read(self.ours, 4096)
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


def until(condition: Callable[[], object]) -> None:
    """Wait for what another process does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


Process = subprocess.Popen[bytes]
Start = Callable[..., Process]
popen: Callable[..., Process] = subprocess.Popen


@pytest.fixture
def here(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with m.toml and a runtime directory; a test leaves nothing in that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    # What we ignore a command ignores too, as when a script runs these tests in the background.
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
    (tmp_path / "run").mkdir()
    (tmp_path / "m.toml").write_text('[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n')
    (tmp_path / "kernel").write_bytes(pvh_kernel(SAY_K + HALT))
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert os.listdir(tmp_path / "run") == []


@pytest.fixture
def start(here: Path) -> Iterator[Start]:
    """``start("run", "m.toml", stdout=...)``: a kvmpy process, without input and with pipes unless said otherwise."""
    with contextlib.ExitStack() as processes:

        def begin(*argv: str, terminal: Terminal | None = None, **streams: Any) -> Process:
            if terminal:
                streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.theirs) | streams
            defaults = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            command = [sys.executable, "-m", "kvmpy", *argv]
            process = popen(command, **(defaults | streams))
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield begin


@pytest.fixture
def run(here: Path, start: Start) -> Start:
    """``run(code, "--set", ...)``: a machine whose kernel is ``code``."""

    def begin(code: bytes, *options: str, **streams: Any) -> Process:
        (here / "kernel").write_bytes(pvh_kernel(code))
        return start("run", "m.toml", *options, **streams)

    return begin


def outcome(process: Process) -> tuple[int, bytes, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err.decode()


def said(process: Process, text: bytes) -> bytes:
    """The next line of standard error that holds ``text``."""
    assert process.stderr
    return next(line for line in process.stderr if text in line)


def started(process: Process) -> Process:
    """The guest has said K."""
    assert process.stdout
    assert process.stdout.read(1) == b"K"
    return process


# How a machine ends

NO_VIRTUALIZATION: Final = (
    "kvmpy: warning: neither vmx nor svm in /proc/cpuinfo: without hardware virtualization a Linux guest most "
    "likely hangs without a word; kvmpy doctor says more\n"
)
NO_TERMINAL: Final = (NO_VIRTUALIZATION if virtualization() is None else "") + (
    "kvmpy: standard input is not a terminal: no escape key; stop the guest with: kvmpy stop m\n"
)


@pytest.mark.parametrize(
    ("code", "exit_code", "error"),
    [
        (POWER_OFF, 0, ""),
        (PANIC, 3, "kvmpy: the guest's kernel panicked; its console says why\n"),
        (TRIPLE_FAULT, 3, "kvmpy: vcpu0: triple fault: the guest's kernel crashed so early"),
    ],
    ids=["power-off", "panic", "triple fault"],
)
def test_the_exit_code_says_how_the_guest_ended(run: Start, code: bytes, exit_code: int, error: str) -> None:
    ended, out, err = outcome(run(SAY_K + code))
    assert (ended, out) == (exit_code, b"K")
    assert err.startswith(NO_TERMINAL + error)
    assert "Traceback" not in err


def test_a_kernel_that_is_gone_at_a_reboot_is_a_mistake_with_its_place(run: Start, here: Path) -> None:
    process = started(run(ECHO))
    (here / "kernel").unlink()
    assert main(["reset", "m"]) == 0
    ended, _, err = outcome(process)
    assert ended == 2
    assert re.fullmatch(r"kvmpy: m\.toml:\d+: boot\.kernel: .*/kernel: cannot be opened: .*", err.splitlines()[-1])


def test_timings_say_when_the_guest_first_ran(run: Start) -> None:
    _, _, err = outcome(run(POWER_OFF, "--timings"))
    assert re.fullmatch(r"kvmpy: where the time went: first KVM_RUN \d+\.\d+ s", err.splitlines()[-1])


def test_timings_are_those_of_the_first_boot(run: Start) -> None:
    """Also after a reset: begun and ready are said after K, and the second time long after it."""
    stamp = b"\xb0\x41\xe6\x80\xb0\x42\xe6\x80"  # mov al, 0x41; out 0x80, al; mov al, 0x42; out 0x80, al
    process = started(run(echo(stamp), "--timings", stdin=subprocess.PIPE))
    assert process.stdin
    seconds = 1.0
    time.sleep(seconds)  # what must not be in the timings
    assert main(["reset", "m"]) == 0
    assert process.stdout
    assert process.stdout.read(1) == b"K"
    process.stdin.write(b"Q")
    process.stdin.close()
    said = process.stderr.read().decode() if process.stderr else ""
    assert process.wait(PATIENCE) == 0
    kernel = re.search(r"where the time went: first KVM_RUN [\d.]+ s, kernel ([\d.]+) s, init [\d.]+ s", said)
    assert kernel
    assert float(kernel[1]) < seconds


def test_a_trace_goes_to_standard_error(run: Start) -> None:
    ended, out, err = outcome(run(SAY_K + POWER_OFF, "--trace", "bus.w*"))
    assert (ended, out) == (0, b"K")
    assert "vcpu0 bus.write bus=pio device=com1 offset=0x0 size=0x1 value=0x4b\n" in err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["machine.memory=1TiB"], "--set machine.memory: the guest wants 1048576 MiB and this host has "),
        (
            ["console.serial=file:absent/x"],
            "--set console.serial: {here}/absent/x: ENOENT: cannot be written; make its",
        ),
        (
            ["console.serial=unix:absent/x"],
            "--set console.serial: {here}/absent/x: ENOENT: cannot listen there; make its",
        ),
        (["monitor.qmp=unix:absent/x"], "--set monitor.qmp: {here}/absent/x: ENOENT: cannot listen there; make its"),
        (["monitor.qmp=unix:m.toml"], "--set monitor.qmp: {here}/m.toml: EADDRINUSE: cannot listen there; remove it"),
    ],
    ids=["memory beyond the host", "no place for a file", "nor for a socket", "nor for the monitor", "place taken"],
)
def test_what_the_host_cannot_do_is_said_where_it_was_asked_for(
    run: Start, here: Path, options: list[str], error: str
) -> None:
    ended, _, err = outcome(run(HALT, *(word for option in options for word in ("--set", option))))
    assert ended == 1
    assert err.startswith(f"kvmpy: {error.format(here=here)}")
    assert err.count("\n") == 1


def test_a_name_that_runs_already_is_refused_with_the_process_that_has_it(run: Start) -> None:
    first = started(run(SAY_K + HALT))
    ended, _, err = outcome(run(SAY_K + HALT))
    assert (ended, err) == (
        1,
        f"kvmpy: m.toml: name: 'm' is running already, process {first.pid}; "
        "stop it (kvmpy stop m) or set another name\n",
    )
    assert main(["stop", "m"]) == 0


# The terminal

ENDS: Final[dict[str, tuple[bytes, int]]] = {
    "power-off": (b"Q", 0),
    "triple fault": (b"T", 3),
    "panic": (b"P", 3),
    "Ctrl-A x": (CTRL_A + b"x", 0),
}


@pytest.mark.parametrize(("keys", "exit_code"), ENDS.values(), ids=ENDS)
def test_the_terminal_is_raw_while_the_guest_runs_and_then_as_before(
    run: Start, terminal: Terminal, keys: bytes, exit_code: int
) -> None:
    before = terminal.mode
    process = run(ECHO, terminal=terminal)
    terminal.expect(b"K")
    assert terminal.raw
    terminal.type(keys)
    assert process.wait(PATIENCE) == exit_code
    assert terminal.mode == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_with_the_terminal_as_before(run: Start, terminal: Terminal, number: signal.Signals) -> None:
    before = terminal.mode
    process = run(ECHO, "--powerdown-limit", "0", terminal=terminal)
    terminal.expect(b"K")
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0
    assert terminal.mode == before


def test_an_error_at_the_start_leaves_the_terminal_as_before(here: Path, terminal: Terminal) -> None:
    before = terminal.mode
    script = (
        "import os, sys, termios\n"
        "from kvmpy.errors import HostError\n"
        "from kvmpy.machine.machine import Machine\n"
        "def start(machine):\n"
        "    raw = not termios.tcgetattr(0)[3] & termios.ICANON\n"
        "    raise HostError(f'failed while the terminal was raw: {raw}')\n"
        "Machine.start = start\n"
        "from kvmpy.__main__ import main\n"
        "sys.argv[1:] = ['run', 'm.toml']\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=terminal.theirs, stdout=terminal.theirs, stderr=terminal.theirs
    )
    terminal.expect(b"kvmpy: failed while the terminal was raw: True\r\n")
    assert process.wait(PATIENCE) == 1
    assert terminal.mode == before


@pytest.fixture
def shell(here: Path, terminal: Terminal) -> Iterator[Terminal]:
    """An interactive shell on the terminal, with job control."""
    (here / "kvmpy").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmpy "$@"\n')
    (here / "kvmpy").chmod(0o755)
    argv = ["bash", "--norc", "--noprofile", "--noediting", "-i"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.theirs)
    with popen(argv, **streams, preexec_fn=lead, env=os.environ | {"PS1": "prompt> "}) as bash:
        yield terminal
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(pid)) == bash.pid:
                    os.kill(int(pid), signal.SIGKILL)


GONE: Final = b"; p=$(jobs -p); while kill -0 $p; do sleep 0.05; done 2>/dev/null; wait $p; echo code=$?\n"


def lead() -> None:
    """Begin a session whose terminal is the standard input."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_machine_started_in_the_background_says_so_and_runs_when_brought_to_the_foreground(
    shell: Terminal, here: Path
) -> None:
    (here / "kernel").write_bytes(pvh_kernel(ECHO))
    shell.type(b"./kvmpy run m.toml &\n")
    shell.expect(b"stopped until it is brought to the foreground")
    until_stopped(shell)
    shell.type(b"fg\n")
    shell.expect(b"\nK")
    assert shell.raw
    shell.type(b"helloQ")
    shell.expect(b"hello")
    shell.expect(b"prompt> ")
    shell.type(b"echo code=$?\n")
    shell.expect(b"code=0\r\n")


def test_a_machine_that_waits_for_the_foreground_is_ended_by_sigterm(shell: Terminal, here: Path) -> None:
    shell.type(b"./kvmpy run m.toml &\n")
    until_stopped(shell)
    shell.type(b"kill %1" + GONE)
    shell.expect(b"code=143\r\n")


def test_a_machine_stopped_while_it_ran_is_ended_by_sigterm(shell: Terminal, here: Path) -> None:
    shell.type(b"./kvmpy run m.toml --powerdown-limit 0\n")
    shell.expect(b"K")
    pid = int((here / "run/m/pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    shell.expect(b"Stopped")
    shell.type(b"kill %1\n")
    until(lambda: not (here / "run/m").exists())
    shell.expect(b"SIGTERM: the guest has not enabled its power button; stopping it in 0 s")


def test_a_machine_runs_on_in_the_background_and_has_the_terminal_again_in_the_foreground(
    shell: Terminal, here: Path
) -> None:
    (here / "kernel").write_bytes(pvh_kernel(ECHO))
    shell.type(b"./kvmpy run m.toml\n")
    shell.expect(b"K")
    pid = int((here / "run/m/pid").read_text())
    for turn in (b"one", b"two"):
        os.kill(pid, signal.SIGSTOP)
        shell.expect(b"Stopped")
        shell.type(b"bg\n")
        # What is typed now is for the shell, and we neither read it nor stop because of it.
        for word in (b"a", b"b", b"c"):
            shell.type(b"jobs; echo he''re " + word + b"\n")
            shell.expect(b"Running")
            shell.expect(b"here " + word)
        with client.Client(client.find("m")) as monitor:
            assert monitor("query-status")["running"]
        shell.type(b"fg\n")
        until(lambda: shell.raw)
        shell.type(turn)
        shell.expect(turn)
    shell.type(b"Q")
    shell.expect(b"prompt> ")
    shell.type(b"echo code=$?\n")
    shell.expect(b"code=0\r\n")
    assert not shell.raw


def test_a_console_in_the_background_is_ended_by_sigterm(shell: Terminal, run: Start, stopped: Process) -> None:
    shell.type(b"./kvmpy console m &\n")
    shell.expect(b"stopped until it is brought to the foreground")
    until_stopped(shell)
    shell.type(b"kill %1" + GONE)
    shell.expect(b"code=143\r\n")


def test_a_console_is_brought_to_the_foreground(shell: Terminal, stopped: Process) -> None:
    shell.type(b"./kvmpy console m &\n")
    until_stopped(shell)
    shell.type(b"fg\n")
    shell.expect(b"m: attached; Ctrl-A x leaves, Ctrl-A h helps\r\n")
    shell.type(b"hello")
    shell.expect(b"hello")
    shell.type(CTRL_A + b"x")
    shell.expect(b"prompt> ")
    shell.type(b"echo code=$?\n")
    shell.expect(b"code=0\r\n")


def until_stopped(shell: Terminal) -> None:
    """Ask the shell for its jobs until one has stopped."""
    shell.type(b"until jobs -s | grep -q .; do sleep 0.05; done; echo is stop''ped\n")
    shell.expect(b"is stopped\r\n")


def test_what_is_typed_reaches_the_guest_and_ctrl_c_is_a_byte_like_another(run: Start, terminal: Terminal) -> None:
    process = run(ECHO, terminal=terminal)
    terminal.expect(b"K")
    terminal.type(b"hello\x03\x1a\r")
    terminal.expect(b"hello\x03\x1a\r")
    terminal.type(b"Q")
    assert process.wait(PATIENCE) == 0


def test_ctrl_a_a_sends_ctrl_a(run: Start, terminal: Terminal) -> None:
    process = run(ECHO, terminal=terminal)
    terminal.expect(b"K")
    terminal.type(CTRL_A + b"a.")
    terminal.expect(b"\x01.")
    terminal.type(b"Q")
    assert process.wait(PATIENCE) == 0


def test_ctrl_a_h_lists_the_keys(run: Start, terminal: Terminal) -> None:
    process = run(ECHO, terminal=terminal)
    terminal.expect(b"K")
    terminal.type(CTRL_A + b"h")
    for key in (b"Ctrl-A h", b"Ctrl-A x", b"Ctrl-A p", b"Ctrl-A a"):
        terminal.expect(key)
    terminal.type(b"Q")
    assert process.wait(PATIENCE) == 0


def test_help_does_not_go_into_the_file_that_the_output_goes_to(run: Start, here: Path, terminal: Terminal) -> None:
    with open(here / "output", "wb") as output:
        process = run(ECHO, terminal=terminal, stdout=output)
    until(lambda: (here / "output").read_bytes() == b"K")
    terminal.type(CTRL_A + b"h")
    terminal.expect(b"Ctrl-A x")
    terminal.type(b"Q")
    assert process.wait(PATIENCE) == 0
    assert (here / "output").read_bytes() == b"K"


def test_ctrl_a_p_presses_the_power_button(run: Start, terminal: Terminal) -> None:
    process = run(OBEY, terminal=terminal)
    terminal.expect(b"K")
    terminal.type(CTRL_A + b"p")
    assert process.wait(PATIENCE) == 0


def test_ctrl_a_p_says_so_where_the_guest_does_not_listen(run: Start, terminal: Terminal) -> None:
    process = run(ECHO, terminal=terminal)
    terminal.expect(b"K")
    terminal.type(CTRL_A + b"p")
    terminal.expect(b"kvmpy: the guest has not enabled its power button; Ctrl-A x stops it\r\n")
    terminal.type(CTRL_A + b"x")
    assert process.wait(PATIENCE) == 0


def test_ctrl_a_x_stops_a_guest_that_reads_nothing(run: Start, terminal: Terminal) -> None:
    process = run(SAY_K + HALT, terminal=terminal)
    terminal.expect(b"K")
    terminal.type(b"anybody there? " * 10_000 + CTRL_A + b"x")
    terminal.expect(b"kvmpy: the guest does not read its serial line: what is typed now is lost\r\n")
    assert process.wait(PATIENCE) == 0


def test_a_client_of_the_console_does_not_lock_the_operator_out(run: Start, terminal: Terminal, here: Path) -> None:
    process = run(SAY_K + HALT, terminal=terminal)
    terminal.expect(b"K")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(here / "run/m/console.sock"))
        client.sendall(bytes(1000))
        # Its bytes have been read, all or none: what it has sent and we have not taken is asked of its own end.
        until(lambda: struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0] == 0)
        terminal.type(CTRL_A + b"x")
        assert process.wait(PATIENCE) == 0


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_presses_the_power_button(run: Start, number: signal.Signals) -> None:
    process = started(run(OBEY))
    process.send_signal(number)
    ended, _, err = outcome(process)
    assert (ended, err) == (
        0,
        f"{NO_TERMINAL}kvmpy: {number.name}: pressed the power button; the guest has 30 s\n",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_when_it_started_is_ignored(run: Start, number: signal.Signals) -> None:
    """As in a script's `kvmpy run m.toml &`, or after nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        process = started(run(OBEY))
    finally:
        signal.signal(number, before)
    process.send_signal(number)
    process.terminate()
    ended, _, err = outcome(process)
    assert (ended, "SIGTERM: pressed" in err, number.name in err) == (0, True, False)


def test_a_guest_that_ignores_the_button_is_stopped_in_the_time_it_has(run: Start) -> None:
    process = started(run(SAY_K + SPIN, "--powerdown-limit", "0.1"))
    process.terminate()
    ended, _, err = outcome(process)
    assert ended == 0
    assert err.splitlines()[-2:] == [
        "kvmpy: SIGTERM: the guest has not enabled its power button; stopping it in 0.1 s, or at the next signal",
        "kvmpy: the guest has not powered off in time; stopping it",
    ]


def test_a_second_signal_stops_the_guest_at_once(run: Start) -> None:
    process = started(run(SAY_K + SPIN, "--powerdown-limit", "1000"))
    process.terminate()
    said(process, b"stopping it in 1000 s")
    process.send_signal(signal.SIGINT)
    ended, _, err = outcome(process)
    assert (ended, err) == (0, "kvmpy: SIGINT: stopping the guest\n")


def test_a_signal_while_memory_is_taken_ends_at_once_and_leaves_nothing(run: Start, here: Path) -> None:
    process = run(HALT, "--set", "machine.memory=1GiB", "--set", "machine.reserve=true")
    until((here / "run" / "m" / "pid").exists)
    process.terminate()
    ended, out, err = outcome(process)
    assert (ended, out, err) == (128 + signal.SIGTERM, b"", "")


@pytest.mark.parametrize("milliseconds", range(10, 130, 10))
def test_a_signal_at_any_time_of_the_start_leaves_nothing(run: Start, milliseconds: int) -> None:
    process = run(SPIN, "--powerdown-limit", "0", stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(milliseconds / 1000)
    process.terminate()
    assert process.wait(PATIENCE) in (-signal.SIGTERM, 128 + signal.SIGTERM, 0)  # the first: before kvmpy is imported


def test_a_second_signal_while_the_first_unwinds_leaves_the_cleanup_alone() -> None:
    cleaned: list[str] = []
    with ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        stack.callback(cleaned.append, "all")
        stack.enter_context(pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)))
        stack.enter_context(signals.ending())
        stack.callback(each(lambda: signal.raise_signal(signal.SIGINT), lambda: cleaned.append("this")))
        signal.raise_signal(signal.SIGTERM)
    assert cleaned == ["this", "all"]


# Output


def test_a_socket_that_others_use_blocks_them_again_afterwards(run: Start) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        process = run(ECHO, stdin=theirs, stdout=theirs)
        assert ours.recv(1) == b"K"
        assert not os.get_blocking(theirs.fileno())
        ours.send(b"Q")
        assert process.wait(PATIENCE) == 0
        assert os.get_blocking(theirs.fileno())


def test_a_slow_reader_gets_every_byte(run: Start) -> None:
    size = count(90_000, 400_000)  # more than the pipe and kvmpy's own backlog hold
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = run(flood(size), stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    received = b"".join(iter(lambda: os.read(reader, 100), b""))
    os.close(reader)
    assert received == flooded(size)
    assert process.wait(PATIENCE) == 0


@pytest.fixture
def stuck(run: Start) -> tuple[Process, int]:
    """A guest that has powered off, and 50,000 bytes of its output that do not fit the pipe; where they come out."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = run(flood(50_000), stdout=writer)
    os.close(writer)
    until(lambda: Path("run/m/pid").exists() and status_of("m") == "shutdown")
    return process, reader


def status_of(name: str) -> str:
    with contextlib.suppress(Exception), client.Client(client.find(name)) as session:
        return str(session("query-status")["status"])
    return ""


def test_the_last_output_waits_for_a_reader_that_takes_its_time(stuck: tuple[Process, int]) -> None:
    process, reader = stuck
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(count(1, 6))
    with os.fdopen(reader, "rb") as output:
        assert output.read() == flooded(50_000)
    assert process.wait(PATIENCE) == 0


def test_a_signal_ends_the_wait_for_a_reader(stuck: tuple[Process, int]) -> None:
    process, reader = stuck
    process.terminate()
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    os.close(reader)


def test_a_guest_that_is_stopped_does_not_wait_for_a_reader(run: Start) -> None:
    reader, writer = os.pipe()
    process = run(flood(10_000_000), stdout=writer)
    os.close(writer)
    until(lambda: status_of("m") == "running")
    assert main(["stop", "m"]) == 0
    assert process.wait(PATIENCE) == 0
    os.close(reader)


def test_a_reader_that_goes_away_does_not_end_the_guest(run: Start) -> None:
    reader, writer = os.pipe()
    process = run(flood(10_000), stdout=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(PATIENCE) == 0


@pytest.fixture
def deaf(run: Start) -> Iterator[tuple[Process, int]]:
    """A guest that has enabled its button and whose standard error is a full pipe; where that comes out."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4096)
    process = started(run(ECHO, "--powerdown-limit", "1000", "--trace", "bus.*", stdin=subprocess.PIPE, stderr=writer))
    os.close(writer)
    yield process, reader
    os.close(reader)


def test_signals_and_the_monitor_do_not_wait_for_a_reader_of_standard_error(deaf: tuple[Process, int]) -> None:
    process, reader = deaf
    process.send_signal(signal.SIGTERM)
    assert status_of("m") == "running"
    os.read(reader, 4096)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert os.read(reader, 4096).startswith(b"kvmpy: ")


def test_a_vcpu_does_not_wait_for_a_reader_of_its_trace(deaf: tuple[Process, int]) -> None:
    process, _ = deaf
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"hello")
    process.stdin.flush()
    assert process.stdout.read(5) == b"hello"
    assert main(["stop", "m"]) == 0
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nobodys_file(here: Path, closed: str) -> None:
    (here / "kernel").write_bytes(pvh_kernel(flood(2000)))
    command = f"exec {sys.executable} -m kvmpy run m.toml {closed}"
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=PATIENCE)
    assert ended.returncode == 0
    assert ended.stdout == (b"" if ">&-" in closed.split() else flooded(2000))


@pytest.mark.parametrize("redirection", [">", ">>"])
def test_output_to_a_file_comes_in_its_place(here: Path, redirection: str) -> None:
    (here / "kernel").write_bytes(pvh_kernel(SAY_K + POWER_OFF))
    command = f"{{ echo one; {sys.executable} -m kvmpy run m.toml; echo two; }} {redirection}output 2>&1"
    subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, timeout=PATIENCE, check=True)
    assert (here / "output").read_text() == f"one\n{NO_TERMINAL}Ktwo\n"


# The commands for a machine that runs

Kvmpy = Callable[..., tuple[int, str, str]]


@pytest.fixture
def kvmpy(here: Path, capfd: pytest.CaptureFixture[str]) -> Kvmpy:
    """``kvmpy("status", "m")``: exit code, standard output, standard error."""
    return lambda *argv: (main(argv), *capfd.readouterr())


@pytest.fixture
def running(run: Start) -> Process:
    """A machine named m that has said K and echoes."""
    return started(run(ECHO, "--powerdown-limit", "0"))


@pytest.fixture
def stopped(running: Process) -> Iterator[Process]:
    """The same, to be stopped when the test is over."""
    yield running
    assert main(["stop", "m"]) == 0
    assert running.wait(PATIENCE) == 0


def test_status_describes_the_machine(kvmpy: Kvmpy, stopped: Process) -> None:
    code, out, _ = kvmpy("status", "m")
    assert code == 0
    assert out.startswith(f"m: running, process {stopped.pid}\n  1 vCPUs, 16 MiB of memory\n  kernel: ELF vmlinux")


def test_status_in_json_is_what_the_monitor_says(kvmpy: Kvmpy, stopped: Process) -> None:
    code, out, _ = kvmpy("status", "m", "--json")
    told = json.loads(out)
    assert (code, told["name"], told["pid"], told["status"]) == (0, "m", stopped.pid, "running")


def test_status_says_how_often_the_guest_exits(kvmpy: Kvmpy, stopped: Process) -> None:
    told = json.loads(kvmpy("status", "m", "--json")[1])
    assert told["exits-per-second"].keys() == told["exits"].keys() == {"pio", "mmio", "other"}
    assert told["exits"]["pio"] > 0


def test_a_running_machine_can_be_traced_and_then_no_more(kvmpy: Kvmpy, start: Start, stopped: Process) -> None:
    watching = start("trace", "m", "bus.*")
    assert b"bus.read, bus.unclaimed, bus.write" in said(watching, b"tracing")
    assert watching.stdout
    assert b" bus.read bus=pio device=com1 " in watching.stdout.readline()  # the guest polls
    watching.send_signal(signal.SIGINT)
    assert watching.wait(PATIENCE) == 0


def test_ps_lists_the_machine(kvmpy: Kvmpy, stopped: Process) -> None:
    _, out, _ = kvmpy("ps")
    assert out.splitlines()[1].split() == ["m", str(stopped.pid), "running", "1", "16", "MiB", "-"]
    _, listed, _ = kvmpy("ps", "--json")
    assert json.loads(listed) == [
        {"name": "m", "pid": stopped.pid, "status": "running", "cpus": 1, "memory": 16 << 20, "devices": []}
    ]


def test_pause_and_resume_are_seen_in_the_status(kvmpy: Kvmpy, stopped: Process) -> None:
    seen = []
    for command in ("pause", "pause", "resume", "resume"):
        assert kvmpy(command, "m") == (0, "", "")
        seen.append(status_of("m"))
    assert seen == ["paused", "paused", "running", "running"]


def test_reset_starts_the_guest_again(kvmpy: Kvmpy, stopped: Process) -> None:
    assert kvmpy("reset", "m") == (0, "", "")
    started(stopped)


def test_powerdown_presses_the_button(kvmpy: Kvmpy, run: Start) -> None:
    process = started(run(OBEY))
    assert kvmpy("powerdown", "m") == (0, "", "")
    assert process.wait(PATIENCE) == 0


def test_powerdown_of_a_guest_that_does_not_listen_says_so_and_has_a_limit(kvmpy: Kvmpy, running: Process) -> None:
    code, out, err = kvmpy("powerdown", "m", "--limit", "0.1")
    assert (code, out) == (0, "")
    assert err.startswith("kvmpy: m: the guest has not enabled its power button")
    assert running.wait(PATIENCE) == 0


def test_stop_returns_when_the_name_is_free_again(kvmpy: Kvmpy, running: Process, run: Start) -> None:
    assert kvmpy("stop", "m") == (0, "", "")
    assert not Path("run/m").exists()
    again = started(run(ECHO))
    assert kvmpy("stop", "m") == (0, "", "")
    assert (running.wait(PATIENCE), again.wait(PATIENCE)) == (0, 0)


def test_qmp_prints_what_the_command_returns(kvmpy: Kvmpy, stopped: Process) -> None:
    code, out, _ = kvmpy("qmp", "m", "query-version")
    assert code == 0
    assert json.loads(out)["package"].startswith("kvmpy ")


def test_qmp_without_a_command_lists_those_there_are(kvmpy: Kvmpy, stopped: Process) -> None:
    code, out, err = kvmpy("qmp", "m")
    assert (code, err) == (0, "")
    assert {"query-status", "set_link name=STRING up=BOOLEAN"} <= set(out.splitlines())


def test_qmp_gives_arguments_as_json(kvmpy: Kvmpy, running: Process) -> None:
    assert kvmpy("qmp", "m", "system_powerdown", "limit=0.1") == (0, "{}\n", "")
    assert running.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["no-such"], "no-such: The command no-such has not been found"),
        (["query-name", "x=1"], "query-name: Parameter 'x' is unexpected"),
        (["system_powerdown", "limit=soon"], "system_powerdown: Invalid parameter type for 'limit', expected: number"),
        (["system_powerdown", "limit=NaN"], "system_powerdown: Invalid parameter type for 'limit', expected: number"),
        (["system_powerdown", "limit=-1"], "system_powerdown: Parameter 'limit' expects number >= 0.0"),
    ],
    ids=["unknown command", "unknown argument", "wrong type", "no number", "wrong value"],
)
def test_qmp_says_what_the_machine_refuses(kvmpy: Kvmpy, stopped: Process, argv: list[str], error: str) -> None:
    code, out, err = kvmpy("qmp", "m", *argv)
    assert (code, out) == (1, "")
    assert err.startswith(f"kvmpy: m: {error}")
    assert status_of("m") == "running"


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
def test_a_limit_that_no_timer_takes_is_refused_by_the_machine(
    here: Path, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Machine(load("m.toml", ["console.serial=null"])) as machine:
        machine.start()
        with pytest.raises(CommandError, match="limit: expected seconds"):
            machine.powerdown(limit)


@pytest.mark.parametrize("command", ["status", "pause", "resume", "reset", "powerdown", "stop", "console"])
def test_a_name_that_does_not_run_is_answered_with_those_that_do(
    kvmpy: Kvmpy, here: Path, stopped: Process, command: str
) -> None:
    assert kvmpy(command, "web1") == (
        1,
        "",
        f"kvmpy: web1: no such machine runs under {here}/run; running: m\n",
    )


def test_the_commands_find_a_monitor_that_is_elsewhere(kvmpy: Kvmpy, run: Start, here: Path) -> None:
    process = started(run(ECHO, "--set", "monitor.qmp=unix:mine.sock"))
    assert (here / "mine.sock").is_socket()
    assert status_of("m") == "running"
    assert kvmpy("stop", "m") == (0, "", "")
    assert process.wait(PATIENCE) == 0
    assert not (here / "mine.sock").exists()


def test_a_killed_machine_is_not_listed_and_its_name_is_free(kvmpy: Kvmpy, running: Process, run: Start) -> None:
    running.kill()
    running.wait(PATIENCE)
    assert sorted(os.listdir("run/m")) == ["console.sock", "pid", "qmp.sock"]
    assert kvmpy("ps", "--json") == (0, "[]\n", "")
    assert kvmpy("status", "m")[0] == 1
    assert outcome(run(SAY_K + POWER_OFF))[:2] == (0, b"K")


def stop(process: Process) -> None:
    """Stop it, and wait until all its threads are."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


@pytest.fixture
def hanging(running: Process) -> Iterator[Process]:
    """A machine whose process is stopped: it accepts, and does not answer."""
    stop(running)
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(control, "PS_PATIENCE", 0.2)
        impatient.setattr(client.Client.__init__, "__defaults__", (0.2,))
        yield running
    running.send_signal(signal.SIGCONT)
    assert main(["stop", "m"]) == 0
    running.wait(PATIENCE)


def test_ps_does_not_wait_for_a_machine_that_hangs(kvmpy: Kvmpy, hanging: Process) -> None:
    _, out, err = kvmpy("ps")
    assert out.splitlines()[1].split() == ["m", str(hanging.pid), "no", "answer", "-", "-", "-"]
    assert err == ""


def test_a_command_says_which_process_hangs(kvmpy: Kvmpy, hanging: Process) -> None:
    assert kvmpy("pause", "m") == (
        1,
        "",
        f"kvmpy: m: greeting: no answer in 0.2 s; process {hanging.pid} is stopped; "
        f"in its shell, fg brings it to the foreground, or: kill -CONT {hanging.pid}\n",
    )


def test_a_command_does_not_wait_long_for_the_greeting_of_a_machine_that_hangs(kvmpy: Kvmpy, running: Process) -> None:
    stop(running)
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(client, "GREETING_PATIENCE", 0.2)
        code, _, err = kvmpy("status", "m")
    running.send_signal(signal.SIGCONT)
    assert (code, err.partition(";")[0]) == (1, "kvmpy: m: greeting: no answer in 0.2 s")
    assert main(["stop", "m"]) == 0
    running.wait(PATIENCE)


def test_a_monitor_that_nobody_serves_is_an_error_with_its_errno(kvmpy: Kvmpy, running: Process, here: Path) -> None:
    (here / "run/m/qmp.sock").unlink()
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(here / "run/m/qmp.sock"))
        code, _, err = kvmpy("status", "m")
    assert code == 1
    assert err.startswith(f"kvmpy: {here}/run/m/qmp.sock: ECONNREFUSED: the machine does not answer; ")
    running.terminate()
    assert running.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("greeting", "error"),
    [(b"", "greeting: the machine hung up"), (b"SSH-2.0\r\n", "greeting: what answers does not speak QMP")],
    ids=["hangs up", "something else"],
)
def test_a_monitor_that_does_not_greet_is_an_error(
    kvmpy: Kvmpy, running: Process, here: Path, greeting: bytes, error: str
) -> None:
    (here / "run/m/qmp.sock").unlink()
    with socket.create_server(str(here / "run/m/qmp.sock"), family=socket.AF_UNIX) as server:
        answer = threading.Thread(target=greet, args=(server, greeting))
        answer.start()
        code, _, err = kvmpy("status", "m")
        answer.join()
    assert code == 1
    assert err.startswith(f"kvmpy: m: {error}")
    running.terminate()
    assert running.wait(PATIENCE) == 0


def greet(server: socket.socket, greeting: bytes) -> None:
    """Answer one client, and hang up."""
    connection, _ = server.accept()
    with connection:
        connection.sendall(greeting)


# console


@pytest.fixture
def attached(start: Start, terminal: Terminal, stopped: Process) -> Process:
    """`kvmpy console m` on the terminal."""
    process = start("console", "m", terminal=terminal)
    terminal.expect(b"m: attached; Ctrl-A x leaves, Ctrl-A h helps\r\n")
    return process


def test_a_console_carries_bytes_both_ways_and_leaves_the_guest_running(attached: Process, terminal: Terminal) -> None:
    terminal.type(b"hello")
    terminal.expect(b"hello")
    seen = terminal.raw
    terminal.type(CTRL_A + b"x")
    assert attached.wait(PATIENCE) == 0
    assert (seen, terminal.raw) == (True, False)
    assert status_of("m") == "running"


def test_a_console_is_left_though_the_guest_reads_nothing(start: Start, run: Start, terminal: Terminal) -> None:
    machine = started(run(SAY_K + HALT))
    process = start("console", "m", terminal=terminal)
    terminal.expect(b"attached")
    terminal.type(b"anybody there? " * 50_000 + CTRL_A + b"x")
    assert process.wait(PATIENCE) == 0
    assert main(["stop", "m"]) == 0
    assert machine.wait(PATIENCE) == 0


@pytest.mark.usefixtures("stopped")
def test_console_leaves_a_socket_that_others_use_blocking_them(start: Start, terminal: Terminal) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        process = start("console", "m", terminal=terminal, stdout=theirs)
        assert ours.recv(100).startswith(b"\nm: attached")
        assert not os.get_blocking(theirs.fileno())
        terminal.type(CTRL_A + b"x")
        assert process.wait(PATIENCE) == 0
        assert os.get_blocking(theirs.fileno())


def test_a_console_is_left_though_nobody_reads_its_output(start: Start, stopped: Process, terminal: Terminal) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, bytes(4096))
    process = start("console", "m", terminal=terminal, stdout=writer)
    os.close(writer)
    until(lambda: terminal.raw)
    terminal.type(b"hello" + CTRL_A + b"x")
    assert process.wait(PATIENCE) == 0
    assert not terminal.raw
    os.close(reader)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_console_with_the_terminal_as_before(
    attached: Process, terminal: Terminal, number: signal.Signals
) -> None:
    attached.send_signal(number)
    assert attached.wait(PATIENCE) == 128 + number
    assert not terminal.raw


def test_a_console_ends_with_its_machine(start: Start, terminal: Terminal, running: Process) -> None:
    before = terminal.mode
    process = start("console", "m", terminal=terminal)
    terminal.expect(b"attached")
    terminal.type(b"Q")
    terminal.expect(b"m: the machine has ended\r\n")
    assert process.wait(PATIENCE) == 0
    assert terminal.mode == before
    assert running.wait(PATIENCE) == 0


def test_a_console_without_a_terminal_says_which_socket_a_script_can_use(
    start: Start, stopped: Process, here: Path
) -> None:
    ended, _, err = outcome(start("console", "m"))
    assert (ended, err) == (
        1,
        f"kvmpy: standard input is not a terminal; a script can use the socket {here}/run/m/console.sock itself\n",
    )
