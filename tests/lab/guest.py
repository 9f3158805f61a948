"""A Linux guest under `kvmpy run` in an emulated host, driven as an operator drives it: by its terminal."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from kvmpy.cli.qmp import parse_arguments
from scripts.lab.host import Completed, EmulatedHost
from scripts.lab.images import Images
from scripts.lab.kernels import CHECKOUT
from scripts.lab.process import WAIT_SECONDS
from tests.fakes import loop
from tests.lab.monitor import Monitor

BOOT_SECONDS: Final = 600.0
"""A bzImage unpacks for ten seconds in emulation, on a busy machine for a minute."""
QUIET: Final = "console=ttyS0 quiet panic=-1 mitigations=off"
FROM_DISK: Final = "root=/dev/vda modules=button,evdev,pvpanic-mmio,virtio_net,virtio_console,virtio-rng"
"""More words, for a guest that has a root disk, and perhaps other devices."""
UP: Final = re.compile(r"KVMPY-GUEST UP kernel=(\S+) cpus=(\d+) uptime=(\S+) clocksource=(\S+)")
PROMPT: Final = "guest# "
POLL_SECONDS: Final = 0.2


def poll(condition: Callable[[], bool]) -> None:
    """Wait until it holds: each look costs an emulated host some time."""
    loop.poll(condition, bound=WAIT_SECONDS, interval=POLL_SECONDS)


class Guest:
    """``kvmpy run`` of one of the lab's kernels ("generic", "cloud") as "vmlinuz" or "vmlinux"."""

    _monitor: Monitor | None = None

    def __init__(
        self,
        host: EmulatedHost,
        name: str,
        *,
        kernel: str = "cloud",
        image: str = "vmlinux",
        cpus: int = 1,
        mode: str = "shell",
        tables: str = "",
        words: str = "",
        options: str = "",
        before: str = "",
        after: str = "",
    ) -> None:
        """``tables`` are its devices, as TOML, and ``words`` go to its kernel.

        ``options`` go to `kvmpy run`; ``before`` and ``after`` are shell commands around it, on its terminal.
        """
        self.host, self.name = host, name
        file, boot, line = "examples/demo.toml", CHECKOUT / ".lab/guest" / kernel, f"{QUIET} mode={mode} {words}"
        if tables:
            demo, file = Path(CHECKOUT, file).read_text().replace('"../', f'"{CHECKOUT}/'), f"/run/{name}.toml"
            host.write_file(file, f"{demo}\n{tables}")
        run = (
            f"kvmpy run {file} --name {name} --timings"
            f" --set boot.kernel={boot / image} --set boot.initrd={boot / 'initrd.img'}"
            f" --set machine.cpus={cpus} --set machine.memory=256MiB --set 'boot.cmdline={line.strip()}' {options}"
        )
        self.process = host.spawn(["bash", "-c", f"{before}{run}; code=$?; {after}exit $code"], tty=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.host.run(["kvmpy", "stop", self.name])
            self.process.wait()
        if self._monitor is not None:
            self._monitor.close()

    def wait_up(self) -> re.Match[str]:
        """Wait for the guest's line: groups kernel, cpus, uptime, clocksource."""
        return self.process.expect(UP, BOOT_SECONDS)

    def wait_shell(self) -> re.Match[str]:
        """Wait for the line, then for the shell's prompt."""
        up = self.wait_up()
        self.process.expect(PROMPT)
        return up

    def type(self, command: str, timeout: float = WAIT_SECONDS) -> str:
        """Type a command into the guest's shell; returns what it printed. busybox takes a thousand characters."""
        # What is typed is echoed, and wrapped where the line ends; so the marks are not typed as they are printed.
        end = "" if command.endswith("&") else ";"
        self.process.send(f"echo BEGIN$((0)); {command}{end} echo END$((0))\n")
        found = self.process.expect(re.compile(r"BEGIN0\r*\n(.*?)END0", re.DOTALL), timeout)
        self.process.expect(PROMPT)
        return found[1].replace("\r", "").strip()

    def kvmpy(self, *arguments: str) -> Completed:
        """Run a kvmpy command beside it, on the host."""
        return self.host.run(["kvmpy", *arguments], check=True)

    def qmp(self, command: str, *words: str) -> Any:
        """What the machine's monitor returns; the arguments are words like those of `kvmpy qmp`."""
        if self._monitor is None:
            self._monitor = Monitor(self.host, self.name)
        return self._monitor(command, parse_arguments(words))

    def status(self) -> dict[str, Any]:
        """All that the machine says of itself."""
        found: dict[str, Any] = self.qmp("query-machine")
        return found

    def await_status(self, status: str) -> None:
        """Until the machine is, say, "running"."""
        poll(lambda: bool(self.qmp("query-status")["status"] == status))

    def await_listening(self) -> None:
        """Until a machine that was started with --incoming takes its guest."""
        self.process.expect("waiting for the guest at", BOOT_SECONDS)

    def device(self, name: str) -> dict[str, Any]:
        """The part of the status that is a device's."""
        (found,) = (device for device in self.status()["devices"] if device["id"] == name)
        assert isinstance(found, dict)
        return found

    def wait_end(self) -> int:
        """Wait until `kvmpy run` has ended; returns its exit code."""
        return self.process.wait(BOOT_SECONDS)


class Attached(Guest):
    """A guest whose machine runs already: `kvmpy console` is its terminal. As a context manager it ends the machine."""

    def __init__(self, host: EmulatedHost, name: str) -> None:
        self.host, self.name = host, name
        self.process = host.spawn(["kvmpy", "console", name], tty=True)
        self.process.expect("attached")
        self.process.send("\n")
        self.process.expect(PROMPT)

    def detach(self) -> None:
        """End the terminal and leave the machine alone."""
        self.process.signal(signal.SIGTERM)
        self.process.wait()


@contextmanager
def root_disk(host: EmulatedHost, images: Images, name: str) -> Iterator[str]:
    """A root disk for one guest, on the host's scratch disk."""
    path = f"/scratch/{name}-root.img"
    host.run(["cp", "--sparse=always", str(images.guest_root), path], check=True)
    try:
        yield path
    finally:
        host.run(["rm", path], check=True)
