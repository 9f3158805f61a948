"""A Linux guest under `kvmpy run` in an emulated host, driven as an operator drives it: by its terminal."""

from __future__ import annotations

import re
from typing import Final, Self

from scripts.lab.host import Completed, EmulatedHost

BOOT_SECONDS: Final = 240.0
"""A bzImage unpacks for ten seconds in emulation, on a busy machine for a minute."""
QUIET: Final = "console=ttyS0 quiet panic=-1 mitigations=off"
UP: Final = re.compile(r"KVMPY-GUEST UP kernel=(\S+) cpus=(\d+) uptime=(\S+) clocksource=(\S+)")
PROMPT: Final = "guest# "


class Guest:
    """``kvmpy run`` of one of the lab's kernels ("generic", "cloud") as "vmlinuz" or "vmlinux"."""

    def __init__(
        self,
        host: EmulatedHost,
        name: str,
        *,
        kernel: str = "cloud",
        image: str = "vmlinux",
        cpus: int = 1,
        mode: str = "shell",
        options: str = "",
        before: str = "",
        after: str = "",
    ) -> None:
        """``options`` go to `kvmpy run`; ``before`` and ``after`` are shell commands around it, on its terminal."""
        self.host, self.name = host, name
        run = (
            f"kvmpy run examples/demo.toml --name {name} --timings"
            f" --set boot.kernel=../.lab/guest/{kernel}/{image} --set boot.initrd=../.lab/guest/{kernel}/initrd.img"
            f" --set machine.cpus={cpus} --set machine.memory=256MiB --set 'boot.cmdline={QUIET} mode={mode}' {options}"
        )
        self.process = host.spawn(["bash", "-c", f"{before}{run}; code=$?; {after}exit $code"], tty=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.host.run(["kvmpy", "stop", self.name])
            self.process.wait()

    def wait_up(self) -> re.Match[str]:
        """Wait for the guest's line: groups kernel, cpus, uptime, clocksource."""
        return self.process.expect(UP, BOOT_SECONDS)

    def wait_shell(self) -> re.Match[str]:
        """Wait for the line, then for the shell's prompt."""
        up = self.wait_up()
        self.process.expect(PROMPT)
        return up

    def type(self, command: str) -> str:
        """Type a command into the guest's shell; returns what it printed."""
        # What is typed is echoed, and wrapped where the line ends; so the marks are not typed as they are printed.
        self.process.send(f"echo BEGIN$((0)); {command}; echo END$((0))\n")
        found = self.process.expect(re.compile(r"BEGIN0\r*\n(.*?)END0", re.DOTALL))
        self.process.expect(PROMPT)
        return found[1].replace("\r", "").strip()

    def kvmpy(self, *arguments: str) -> Completed:
        """Run a kvmpy command beside it, on the host."""
        return self.host.run(["kvmpy", *arguments], check=True)

    def wait_end(self) -> int:
        """Wait until `kvmpy run` has ended; returns its exit code."""
        return self.process.wait(BOOT_SECONDS)
