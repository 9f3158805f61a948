"""The contenders, for a flat guest on this machine's KVM: how either VMM is started with the same kernel."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench import installed
from tests.fakes.pvh_kernel import pvh_kernel

CONFIG: Final = """\
name = "{name}"
[boot]
kernel = "kernel"
[machine]
memory = "{memory}MiB"
cpus = {cpus}
[console]
serial = "{serial}"
"""
WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")
"""What is started with these words does not outlive us."""
POLL: Final = 0.02
PATIENCE: Final = 300.0
LIMIT: Final = 100.0
"""Seconds that a guest which ends by itself may take, on a machine that is busy otherwise."""


class Flat:
    """A flat guest in a directory of its own, for either."""

    def __init__(self, directory: Path, code: bytes, *, memory: int = 32, cpus: int = 1, serial: str = "null") -> None:
        """``memory`` in MiB; ``serial`` is "null" or "file"."""
        self.directory, self.memory, self.cpus, self.serial = directory, memory, cpus, serial
        directory.mkdir(exist_ok=True)
        (directory / "kernel").write_bytes(pvh_kernel(code))

    def kvmpy(self, *words: str, name: str = "bench") -> list[str]:
        """The command that runs it, with kvmpy."""
        return [str(installed.environment() / "kvmpy"), "run", str(self.config(name)), *words]

    def config(self, name: str = "bench") -> Path:
        """The file that kvmpy runs."""
        config = self.directory / f"{name}.toml"
        serial = f"file:{self.directory}/{name}.serial" if self.serial == "file" else self.serial
        config.write_text(CONFIG.format(name=name, memory=self.memory, cpus=self.cpus, serial=serial))
        return config

    def qemu(self, *words: str, machine: str = "q35", name: str = "bench") -> list[str]:
        """The same with QEMU, and as little beside the guest as it can do with."""
        where = f"file:{self.directory}/{name}.serial" if self.serial == "file" else self.serial
        return [
            *("qemu-system-x86_64", "-accel", "kvm", "-M", machine, "-cpu", "host"),
            *("-m", str(self.memory), "-smp", str(self.cpus), "-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(self.directory / "kernel"), "-serial", where, *words),
        ]

    def said(self, name: str = "bench") -> bytes:
        """What has come from its serial line."""
        path = self.directory / f"{name}.serial"
        return path.read_bytes() if path.exists() else b""

    def forget(self, name: str = "bench") -> None:
        """What it has said: kvmpy would append to it."""
        (self.directory / f"{name}.serial").unlink(missing_ok=True)


def environment(directory: Path) -> dict[str, str]:
    """With the kvmpy that was installed, its bytecode kept, and no other machine's names."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "KVMPY_RUNTIME_DIR": str(directory)}


def run(command: Sequence[str], directory: Path) -> None:
    """To its end. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(directory),
        timeout=LIMIT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout.decode(errors='replace')}")


def wait_for(true: Callable[[], bool], process: subprocess.Popen[bytes], what: str, poll: float = POLL) -> None:
    """Poll. Raises RuntimeError where ``process`` ends before, or that takes far too long."""
    end = time.monotonic() + PATIENCE
    while True:
        ended = process.poll()
        if true():  # also if it has ended by now
            return
        if ended is not None:
            raise RuntimeError(f"{what}: it has ended before, with exit code {ended}")
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not within {PATIENCE:.0f} s")
        time.sleep(poll)


@contextmanager
def running(command: Sequence[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Until the end of the block. What it says goes to a file, and with an exception's notes."""
    with open(directory / "said", "a+b") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment(directory)
        )
        try:
            yield process
        except BaseException as e:
            said.seek(0)
            e.add_note(f"{' '.join(command)} said: {said.read().decode(errors='replace')}")
            raise
        finally:
            process.kill()
            process.wait()
