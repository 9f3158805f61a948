"""An emulated host: QEMU as a whole x86-64 machine in software, with AMD SVM and nested paging, so KVM works in it.

Its root is the outside machine's, read-only over 9p, below a tmpfs that takes all writes: the checkout and its virtual
environment have the same paths as outside, and nothing done inside is seen outside. agent.py runs commands in it.

No emulated host outlives its owner: the kernel ends QEMU when the thread that started it dies, timeout(1) ends it after
a given time, and an agent without an owner ends, which takes the host down from within.
"""

from __future__ import annotations

import compileall
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from scripts.lab import agent
from scripts.lab.errors import HostGone, LabError
from scripts.lab.hardware import IOMMU_ARGUMENTS, Hardware
from scripts.lab.images import SOURCES, Images, make
from scripts.lab.kernels import CHECKOUT, LAB
from scripts.lab.process import WAIT_SECONDS, Link, Process, Sink
from scripts.lab.qemu import Qemu

START_SECONDS: Final = 300.0  # many times what a host needs, for a busy machine
STOP_SECONDS: Final = 60
# With more, QEMU 7.2's emulation of nested virtualization corrupts the host's memory now and then: one boot in five
# of a guest with 4 vCPUs failed under kvmpy, and the host panicked under QEMU. With one CPU, or with QEMU 10, none did.
CPUS: Final = 1
LIFETIME_SECONDS: Final = 7200  # the tests' hosts are kept for all of the lab's tests, which take more than one hour

NICS_SCRIPT: Final = SOURCES / "host_nics.sh"
LOGS: Final = LAB / "run"
KEPT_LOGS: Final = 20
TAIL_BYTES: Final = 4096

MACHINE: Final = "q35,kernel-irqchip=off"
# phys-bits: firmware puts 64-bit BARs as high as addresses go, and some emulated devices do not work that high.
# NOT_EMULATED is what some QEMU warns about: so the host is the same with every QEMU, and its log is clean.
NOT_EMULATED: Final = "-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec"
CPU: Final = f"EPYC,+svm,+npt,phys-bits=36,{NOT_EMULATED}"
ACCELERATOR: Final = "tcg,thread=multi,tb-size=1024"  # MiB of translated code: that of the host and of its guests
# no_timer_check: the kernel counts ticks over some milliseconds, and panics where a busy machine lets none come.
# norandmaps: QEMU finds the code of a program that starts again where it had it: a start of Python takes two thirds.
KERNEL_ARGUMENTS: Final = ("console=ttyS0", "quiet", "mitigations=off", "panic=-1", "no_timer_check", "norandmaps")

SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED_ON: Final = ("TERM", "COLORTERM", "KVMPY_")  # our own variables that commands get too, by prefix


@dataclass(frozen=True)
class Completed:
    """A command that ended. A negative ``returncode`` is the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


class EmulatedHost:
    """One emulated host, as a context manager.

    ``hardware`` is its NICs, with an IOMMU where they are there to be passed through; ``extra`` are further arguments
    for QEMU, such as disks, and ``kernel_arguments`` words for the host's kernel. The thread that calls start() or
    launch() must live as long as the host.
    """

    def __init__(
        self,
        *,
        cpus: int = CPUS,
        memory: str = "3G",
        lifetime: int = LIFETIME_SECONDS,
        hardware: Hardware | None = None,
        extra: Sequence[str] = (),
        kernel_arguments: Sequence[str] = (),
    ) -> None:
        self.cpus, self.memory, self.lifetime = cpus, memory, lifetime
        self.hardware = hardware
        self.extra, self.kernel_arguments = tuple(extra), tuple(kernel_arguments)
        self.boot_seconds = self._launched = 0.0
        self.log: Path | None = None  # what the console showed, kept after the end
        self._qemu: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process outside that is this host."""
        if self._qemu is None:
            raise LabError("the emulated host is not started")
        return self._qemu.pid

    def start(self) -> None:
        """Boot, and return when commands can run; makes the images where they are missing."""
        self.launch()
        self.wait_up()

    def launch(self) -> None:
        """Begin to boot."""
        images = make()
        _compile_checkout()
        self._launched = time.monotonic()
        ours, theirs = socket.socketpair()
        self.log = _new_log()
        with theirs, self.log.open("ab") as log:
            command = self._command(images, theirs.fileno(), self.log)
            inherited = [theirs.fileno(), *self._joint()]
            self._qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=inherited)
        self._link = Link(ours, self.console_tail)

    def wait_up(self) -> None:
        """Wait until commands can run."""
        link = self._connected()
        try:
            link.wait_until(lambda: link.ready, START_SECONDS, "the agent of the emulated host")
            if self.hardware:
                self.run([str(NICS_SCRIPT)], env=self.hardware.environment(), timeout=START_SECONDS, check=True)
        except BaseException:
            self.stop()
            raise
        self.boot_seconds = time.monotonic() - self._launched

    def stop(self) -> None:
        """End the host at once: there is nothing in it to save. May be called again."""
        if self._qemu:
            self._qemu.terminate()
            try:
                self._qemu.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._qemu.kill()  # timeout(1), whose death QEMU does not survive
                self._qemu.wait()
            self._qemu = None
        if self._link:
            self._link.close()
            self._link = None

    def spawn(
        self,
        argv: Sequence[str],
        *,
        tty: bool = False,
        env: Mapping[str, str] | None = None,
        size: tuple[int, int] = (24, 80),
        sink: Sink | None = None,
    ) -> Process:
        """Start a command in the checkout's directory, with ``env`` added to what every command gets."""
        return self._connected().spawn(
            argv, _environment() | dict(env or {}), str(CHECKOUT), size if tty else None, sink
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = WAIT_SECONDS,
        input: str | bytes = b"",  # noqa: A002  as subprocess.run calls it
        env: Mapping[str, str] | None = None,
        check: bool = False,
    ) -> Completed:
        """Run a command to its end. One that does not end in time is killed with its process group."""
        link = self._connected()
        process = self.spawn(argv, env=env)
        try:
            process.send(input)
            process.close_stdin()
            process.wait(timeout)
        except BaseException:
            with suppress(HostGone):
                process.signal(signal.SIGKILL)
            raise
        finally:
            link.forget(process.number)
        assert process.returncode is not None
        if check and process.returncode:
            raise LabError(link.report(f"{process} ended with {process.returncode}", process))
        stdout, stderr = (stream.decode(errors="replace") for stream in (process.stdout, process.stderr))
        return Completed(process.returncode, stdout, stderr)

    def write_file(self, path: str | Path, content: str | bytes) -> None:
        """Make a file in the host, such as a configuration below /tmp or /run."""
        self.run(["sh", "-c", 'cat >"$0"', str(path)], input=content, check=True)

    def console_tail(self) -> str:
        """The last lines of the host's console, and what QEMU itself complained about."""
        if self.log is None:
            return "(never started)"
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            return log.read().decode(errors="replace")

    def _connected(self) -> Link:
        if self._link is None:
            raise LabError("the emulated host is not started")
        return self._link

    def _joint(self) -> tuple[int, ...]:
        """The descriptor of the wire to another host."""
        return () if self.hardware is None or self.hardware.joint is None else (self.hardware.joint,)

    def _command(self, images: Images, connection: int, log: Path) -> list[str]:
        # After "--" come the arguments of init, which host_init.sh runs as pid 1 of the real root.
        hardware = self.hardware
        qemu = images.igb_qemu if hardware and hardware.needs_igb else Qemu()
        kernel_line = [
            *(*KERNEL_ARGUMENTS, *(IOMMU_ARGUMENTS if hardware and hardware.passed else ()), *self.kernel_arguments),
            *(f'lab_checkout="{CHECKOUT}"', f'lab_modules="{images.host_modules}"'),
            *("--", f'"{Path(sys.executable).resolve()}"', "-I", "-S", f'"{_agent_file()}"'),
        ]
        return [
            *("setpriv", "--pdeathsig", "TERM", "timeout", f"--kill-after={STOP_SECONDS}", str(self.lifetime)),
            *("setpriv", "--pdeathsig", "KILL", *qemu.command()),
            *("-M", MACHINE, "-cpu", CPU, "-accel", ACCELERATOR, "-smp", str(self.cpus), "-m", self.memory),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-chardev", f"file,id=console,path={log},append=on", "-serial", "chardev:console"),
            *(
                "-kernel",
                str(images.host.vmlinux),
                "-initrd",
                str(images.host.initrd),
                "-append",
                " ".join(kernel_line),
            ),
            *("-fsdev", "local,id=outside,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=outside,mount_tag=outside"),
            *("-chardev", f"socket,id=agent,fd={connection}", "-device", "virtio-serial-pci"),
            *("-device", f"virtserialport,chardev=agent,name={agent.PORT_NAME}"),
            *("-drive", f"if=none,id=scratch,file={images.host_scratch},format=raw,snapshot=on,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=scratch"),  # before all others, so it is /dev/vda
            *(hardware.qemu_arguments() if hardware else ()),
            *self.extra,
        ]


def command_path() -> str:
    """The PATH of every command: our virtual environment first."""
    return f"{sys.prefix}/bin:{SYSTEM_PATH}"


def _environment() -> dict[str, str]:
    """What every command gets: our virtual environment first in PATH, and little of what surrounds us here."""
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    own = {
        "PATH": command_path(),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return passed_on | own


def _compile_checkout() -> None:
    """Compile Python's modules here, where it is quick, instead of in every process in the host."""
    for package in ("kvmpy", "scripts"):
        compileall.compile_dir(CHECKOUT / package, quiet=2)


def _agent_file() -> Path:
    """The agent as bytecode where there is some: compiling it inside would delay every boot."""
    source = Path(agent.__file__)
    compiled = Path(importlib.util.cache_from_source(str(source)))
    return compiled if compiled.exists() else source


def _new_log() -> Path:
    """A new file for a host's console; all but the newest logs are removed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for old in sorted(LOGS.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix="host-", suffix=".log", dir=LOGS)
    os.close(handle)
    return Path(name)
