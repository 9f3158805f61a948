"""Two emulated hosts, as two machines in a rack: one network, one disk that both have, ssh from each to the other.

The network is a pair of connected sockets between the two QEMUs: nothing listens on this machine. The disk is one file,
given to both as virtio-blk without a cache and without QEMU's lock, and so is SHARED_DISK in both. Every host has one
CPU, as host.py says why.
"""

from __future__ import annotations

import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from scripts.lab.hardware import BRIDGE_ADDRESS, HARDWARE, Hardware
from scripts.lab.host import LIFETIME_SECONDS, LOGS, START_SECONDS, EmulatedHost, command_path
from scripts.lab.images import SOURCES, make

NAMES: Final = ("host1", "host2")
"""What they are called, in each other's /etc/hosts too."""
SHARED_DISK: Final = "/dev/vdb"
SHARED_SIZE: Final = 1 << 30  # a sparse file: it takes what is written
SSH_SCRIPT: Final = SOURCES / "host_ssh.sh"
KEYS: Final = "/run/lab-ssh"
CLOCK_TRIES: Final = 5


class HostPair:
    """Both of them, as a context manager: ``first`` and ``second``, with addresses in ``addresses``.

    ``hardware`` is the NICs that each has, those to be passed through too. The thread that enters must live as long as
    the pair.
    """

    def __init__(self, hardware: str = "virtio", *, memory: str = "3G", lifetime: int = LIFETIME_SECONDS) -> None:
        self._hardware, self._memory, self._lifetime = HARDWARE[hardware], memory, lifetime
        self._resources = ExitStack()
        self.addresses = tuple(self._hardware.joined(number, -1).address(BRIDGE_ADDRESS) for number in (1, 2))

    def __enter__(self) -> Self:
        images = make()
        LOGS.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            disk = stack.enter_context(tempfile.NamedTemporaryFile(dir=LOGS, prefix="shared-", suffix=".img"))
            disk.truncate(SHARED_SIZE)
            joints = socket.socketpair()
            hosts = [self._host(self._hardware.joined(n + 1, joints[n].fileno()), disk.name) for n in (0, 1)]
            for host, joint in zip(hosts, joints, strict=True):
                with joint:  # QEMU has its own
                    stack.callback(host.stop)
                    host.launch()
            for host in hosts:
                host.wait_up()
            self.first, self.second = self.hosts = hosts[0], hosts[1]
            self._agree_on_the_time()
            self._set_up_ssh(images.ssh)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def boot_seconds(self) -> float:
        """How long the slower one took."""
        return max(host.boot_seconds for host in self.hosts)

    def _host(self, hardware: Hardware, disk: str) -> EmulatedHost:
        drive = f"if=none,id=shared,file={disk},format=raw,cache=none,file.locking=off"
        device = "virtio-blk-pci,drive=shared,share-rw=on"
        extra = ["-drive", drive, "-device", device]
        return EmulatedHost(memory=self._memory, lifetime=self._lifetime, hardware=hardware, extra=extra)

    def _agree_on_the_time(self) -> None:
        """A host's clock begins at a whole second of its RTC: without this they are up to a second apart."""
        for host in self.hosts:
            offset = min((_offset(host) for _ in range(CLOCK_TRIES)), key=lambda found: found[0])[1]
            shift = "import sys, time; time.clock_settime(0, time.clock_gettime(0) - float(sys.argv[1]))"
            host.run(["python", "-I", "-S", "-c", shift, str(offset)], check=True)

    def _set_up_ssh(self, tree: Path) -> None:
        """One key for both hosts, and one for whoever goes from one to the other, made on the first."""
        links = f'cp -rsn "{tree}/." / 2>/dev/null; ldconfig; mkdir -m 700 {KEYS}; cd {KEYS}'
        make_keys = "for name in host user; do ssh-keygen -q -t ed25519 -N '' -C lab -f $name; done; tar c ."
        self.first.run(["sh", "-c", f"{links}; {make_keys} >/run/lab-ssh.tar"], timeout=START_SECONDS, check=True)
        keys = self.first.run(["base64", "/run/lab-ssh.tar"], check=True).stdout
        self.second.run(["sh", "-c", f"mkdir -m 700 {KEYS}; base64 -d | tar x -C {KEYS}"], input=keys, check=True)
        for index, host in enumerate(self.hosts):
            environment = {"tree": str(tree), "keys": KEYS, "path": command_path()}
            for place, prefix in ((index, ""), (1 - index, "peer_")):
                environment |= {f"{prefix}name": NAMES[place], f"{prefix}address": self.addresses[place]}
            host.run([str(SSH_SCRIPT)], env=environment | {"peer": NAMES[1 - index]}, timeout=START_SECONDS, check=True)


def _offset(host: EmulatedHost) -> tuple[float, float]:
    """How long it took to ask a host for its time, and how far that is ahead of ours."""
    before = time.time()
    there = float(host.run(["date", "+%s.%N"], check=True).stdout)
    after = time.time()
    return after - before, there - (before + after) / 2
