"""`kvmpy run`: a machine in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec

from kvmpy import trace
from kvmpy.cli.main import printable, say, tell
from kvmpy.config.schema import Config, load, warnings
from kvmpy.config.values import Backend
from kvmpy.errors import CommandError, ConfigError, HostError, MigrationError
from kvmpy.host.rundir import CONSOLE_SOCKET, PCI_JOURNAL, QMP_SOCKET, RuntimeDirectory
from kvmpy.host.stderr import lossy_stderr
from kvmpy.host.terminal import EscapeFilter, RawTerminal, heeded, in_background
from kvmpy.kvm.system import virtualization
from kvmpy.log import Log, get_ready, to_stderr
from kvmpy.machine.check import located
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.monitor.server import MonitorServer

if TYPE_CHECKING:
    from kvmpy.migration.control import Migrations

log = Log(__name__)

STDIN: Final = 0
STDOUT: Final = 1
NO_GUEST: Final = (RunState.INMIGRATE, RunState.POSTMIGRATE)
"""It is to come, or has gone: nobody can be asked to power off."""
DEFER: Final = "defer"
FILE_POLL: Final = 0.1
PRESS_AGAIN: Final = 0.1
ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How long a thread may keep the GIL when another wants it. The default of 5 ms would be added to a guest's exit.
SWITCH_INTERVAL: Final = 1e-4
# What the lab's guests write to the debug port: /init begins, and it is ready.
INIT_BEGINS, INIT_READY = 0x41, 0x42


def run(args: argparse.Namespace) -> int:
    """Run the machine of ``args.config`` to its end; returns the exit code of its outcome."""
    started_ns = _process_start_ns() if args.timings else 0
    to_stderr()
    for glob in args.trace:
        if not trace.enable(glob, tell):
            raise ConfigError(f"--trace {glob}: matches none of {', '.join(trace.names())}")
    config = load(args.config, args.set, name=args.name)
    if args.insecure and args.incoming is None:
        raise ConfigError("--insecure: only with --incoming")
    if args.incoming not in (None, DEFER):
        _check_uri(args.incoming)
    for warning in warnings(config):
        _note(f"warning: {printable(warning)}")
    if not args.detach:
        return _run(args, config, started_ns, lambda: None)
    from kvmpy.cli.detach import detach

    ready = detach(config.name, args.log)
    return ready if isinstance(ready, int) else _run(args, _without_terminal(config), started_ns, ready)


def _run(args: argparse.Namespace, config: Config, started_ns: int, ready: Callable[[], object]) -> int:
    """Make the machine, and run it; ``ready`` is called when it runs."""
    with ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        stack.enter_context(lossy_stderr())
        directory = _runtime_directory(config)
        stack.callback(directory.close)
        with signals.ending():
            _give_back_leftovers(directory)
            machine = stack.enter_context(Machine(config, named=True, incoming=args.incoming is not None))
        migrations = _migrations(machine, args)
        monitor = _serve_monitor(machine, directory, migrations)
        stack.callback(monitor.close)
        machine.console.listen(directory.file(CONSOLE_SOCKET))
        if machine.pty:
            _note(f"the guest's serial line is {machine.pty}")
        if virtualization() is None:
            _note(
                "warning: neither vmx nor svm in /proc/cpuinfo: without hardware virtualization a Linux guest most "
                "likely hangs without a word; kvmpy doctor says more"
            )
        with ExitStack() as terminal:
            with signals.ending():  # in the background it stops us until we are brought to the foreground
                terminal.enter_context(_terminal(machine, signals))
            _settle_interpreter()
            signals.end_if_caught()
            with signals.main_thread_only():
                machine.start()
                if migrations is not None and args.incoming not in (None, DEFER):
                    migrations.incoming(args.incoming)
            signals.serve(machine, args.powerdown_limit)
            get_ready()
            monitor.get_ready()
            if _has_come(machine, migrations, args.incoming or ""):
                ready()
            outcome = machine.wait()
            _finish_callback(machine)
        with signals.ending():
            machine.finish_output()
    if args.timings:
        _say_timings(machine, started_ns)
    if isinstance(machine.error, ConfigError):  # at a reboot: the kernel has gone
        return say(machine.error)
    if machine.error is not None:
        say(machine.error)
    elif outcome is Outcome.GUEST_PANIC:
        log.error("the guest's kernel panicked; its console says why")
    return Outcome.HOST_ERROR.value if outcome is None else outcome.value


def _has_come(machine: Machine, migrations: Migrations | None, uri: str) -> bool:
    """Whether all is well so far: a file is read first, for nobody is waited for with it; False where it is no good."""
    if migrations is None or not uri.startswith("file:"):
        return True
    while machine.outcome is None:
        if migrations.wait(FILE_POLL).value in ("completed", "failed"):
            break
    return machine.error is None and migrations.progress.error is None


def _note(text: str) -> None:
    """What is said before the guest runs, which does not wait for logging to be imported."""
    tell(f"kvmpy: {text}")


class _Signals:
    """SIGTERM, SIGINT and SIGHUP: the first presses the power button, the second pulls the plug.

    Python runs a handler in the main thread between two bytecodes, where a lock may be held; so the handler does
    next to nothing, and the control thread reads the signal's number from a pipe. Before the machine runs, and while
    its last output waits for a reader, a signal ends us where nothing that we would leave behind is half made.
    """

    def __init__(self) -> None:
        self._presses = 0
        self._caught: list[int] = []
        self._served = 0
        self._at_once = False

    def __enter__(self) -> _Signals:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in heeded(ENDING)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read_fd)
        os.close(self._write_fd)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Within, a signal ends us at once; so does one that came before."""
        self._at_once = True
        try:
            self.end_if_caught()
            yield
        finally:
            self._at_once = False

    @staticmethod
    @contextmanager
    def main_thread_only() -> Iterator[None]:
        """Threads that are started within, and theirs, leave signals to the main thread, where the handlers run.

        When we are continued while SIGTERM waits, any thread may take the two; the main thread would not hear of them
        before the system call for which it was stopped has begun, and stopped us, again. A read of a terminal that the
        shell has taken is refused instead of stopping us (SIGTTIN): the guest runs on in the background.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*ENDING, signal.SIGCONT, signal.SIGTTIN])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def serve(self, machine: Machine, limit: float) -> None:
        """From now on signals are for ``machine``; ``limit`` seconds after the first it is stopped.

        So is one that came while it started: that is in the pipe.
        """
        machine.control.watch(self._read_fd, readable=lambda: self._act(machine, limit))

    def _handle(self, number: int, _: Any) -> None:
        self._caught.append(number)
        if self._at_once:
            self._end(number)

    def end_if_caught(self) -> None:
        """End us where a signal came that the machine was not told of."""
        if len(self._caught) > self._served:
            self._end(self._caught[-1])

    def _end(self, number: int) -> NoReturn:
        """Unwind, once: another signal would tear what is being put away out of its cleanup's hands."""
        self._at_once = False
        raise SystemExit(128 + number)

    @property
    def caught(self) -> bool:
        """Whether a signal has come."""
        return bool(self._caught)

    def _act(self, machine: Machine, limit: float) -> None:
        for number in os.read(self._read_fd, 16):
            if number in ENDING:
                self._presses += 1
                self._served += self._press(machine, signal.Signals(number).name, limit)

    def _press(self, machine: Machine, name: str, limit: float) -> bool:
        """Whether the signal was for the machine; else it has just ended by itself, and the signal is for us."""
        try:
            if self._presses > 1 or machine.state in NO_GUEST:
                log.info("%s: stopping the guest" if self._presses > 1 else "%s: there is no guest here", name)
                machine.stop()
            elif machine.powerdown(limit):
                log.info("%s: pressed the power button; the guest has %g s", name, limit)
            else:
                log.warning(
                    "%s: the guest has not enabled its power button; stopping it in %g s, or at the next signal",
                    name,
                    limit,
                )
        except CommandError:
            if machine.outcome is not None:
                return False
            self._press_later(machine, name, limit)
        return True

    def _press_later(self, machine: Machine, name: str, limit: float) -> None:
        """The guest is being handed over: it stays and hears the button, or goes, or a second signal ends the wait."""

        def again() -> None:
            if self._presses > 1:
                return
            if machine.handoff.held is not None and machine.state not in NO_GUEST:  # nobody knows where it runs
                timer.arm(PRESS_AGAIN)
            else:
                self._press(machine, name, limit)

        timer = machine.control.timer(again)
        timer.arm(PRESS_AGAIN)


def _check_uri(where: str) -> None:
    """Raises ConfigError before there is a machine, rather than MigrationError after."""
    from kvmpy.migration import uri

    try:
        uri.parse(where)
    except MigrationError as e:
        raise ConfigError(f"--incoming {e}") from e


def _without_terminal(config: Config) -> Config:
    """The same for a machine that has no terminal: `kvmpy console` is its terminal then."""
    if config.console.serial != "stdio":
        return config
    console = msgspec.structs.replace(config.console, serial=Backend("pty"))
    return msgspec.structs.replace(config, console=console)


def _runtime_directory(config: Config) -> RuntimeDirectory:
    try:
        return RuntimeDirectory(config.name)
    except HostError as e:
        raise (located(config, "", e) if str(e).startswith("name:") else e) from e


def _give_back_leftovers(directory: RuntimeDirectory) -> None:
    """Give the host's functions back that this machine had when it crashed."""
    if os.path.lexists(directory.file(PCI_JOURNAL)):
        from kvmpy.host.pci import recover

        recover(directory.path)


def _migrations(machine: Machine, args: argparse.Namespace) -> Migrations | None:
    """Those of a machine that is to come in, or has certificates to go with. Others that are to go import it then."""
    credentials = machine.config.migration.tls_creds
    if args.incoming is None and credentials is None:
        return None
    from kvmpy.migration.control import Migrations

    if credentials is not None:
        import kvmpy.migration.tls  # noqa: F401  not beside running vCPUs: ssl takes long

    return Migrations(machine, insecure=args.insecure)


def _serve_monitor(machine: Machine, directory: RuntimeDirectory, migrations: Migrations | None) -> MonitorServer:
    """Listen where the configuration says, and let the commands find the socket in the runtime directory."""
    standard = directory.file(QMP_SOCKET)
    qmp = machine.config.monitor.qmp
    try:
        server = MonitorServer(machine, qmp.path if qmp else standard, migrations)
    except HostError as e:
        raise located(machine.config, "", e) from e
    if qmp:
        with contextlib.suppress(FileExistsError):  # it is the same place
            os.symlink(qmp.path, standard)
    return server


def _finish_callback(machine: Machine) -> None:
    """Wait for the control thread to finish what ended the machine: it may owe a client its reply."""
    finished = threading.Event()
    machine.control.post(finished.set)
    finished.wait()


def _terminal(machine: Machine, signals: _Signals) -> AbstractContextManager[object]:
    """Raw mode and the escape key, where the guest's serial line is on a terminal."""
    if machine.config.console.serial != "stdio":
        return nullcontext()
    if not os.isatty(STDIN):
        _note(f"standard input is not a terminal: no escape key; stop the guest with: kvmpy stop {machine.name}")
        return nullcontext()
    # Typed in the io thread, which must not wait for the machine to stop.
    machine.console.filter = EscapeFilter(
        {
            "x": (lambda: machine.control.post(machine.stop), "stop the guest and leave"),
            "p": (lambda: machine.control.post(lambda: _power_button(machine)), "press the power button"),
        },
        # Help is for who typed, not for the file or pipe that the guest's output may go to.
        machine.console.show if os.isatty(STDOUT) else lambda text: sys.stderr.write(text.decode()),
    )
    if in_background(STDIN):
        _note(
            f"{machine.name} is stopped until it is brought to the foreground (fg); "
            "to run it in the background, give its serial line another place, such as --set console.serial=pty"
        )
    raw = RawTerminal(STDIN, lambda: signals.caught, machine.console.leave)
    machine.console.retake = raw.retake
    return raw


def _power_button(machine: Machine) -> None:
    with contextlib.suppress(CommandError):  # it has just ended by itself
        if not machine.powerdown():
            log.warning("the guest has not enabled its power button; Ctrl-A x stops it")


def _settle_interpreter() -> None:
    """No collection and no long hold of the GIL while vCPUs run: what is alive now stays alive."""
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(SWITCH_INTERVAL)


def _process_start_ns() -> int:
    """When the kernel started this process, on time.monotonic_ns's clock, to a hundredth of a second."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    since_boot = ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return since_boot + time.monotonic_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _say_timings(machine: Machine, started_ns: int) -> None:
    stamps = dict(machine.board.debug_port.stamps)
    moments = [
        ("first KVM_RUN", machine.first_run_ns),
        ("kernel", stamps.get(INIT_BEGINS)),
        ("init", stamps.get(INIT_READY)),
    ]
    before, parts = started_ns, []
    for name, moment in moments:
        if moment is not None:
            parts.append(f"{name} {(moment - before) / 1e9:.3f} s")
            before = moment
    tell("kvmpy: where the time went: " + ", ".join(parts))
