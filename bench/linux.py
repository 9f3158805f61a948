"""The same Linux guest under kvmpy and under QEMU, on one emulated host: what the other programs of bench/ measure.

Both get the lab's kernel and initramfs, the same RAM, one vCPU, the host's processor, disks with O_DIRECT, and taps in
a bridge. QEMU's has no device beside these: `-nodefaults`, and none of what its configuration of a distribution adds.
"""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from bench import watch
from scripts.lab.host import EmulatedHost
from scripts.lab.kernels import CHECKOUT
from tests.lab import tables
from tests.lab.guest import QUIET, Guest

MEMORY_MIB: Final = 256
Q35, MICROVM = "q35", "microvm"
NATIVE_HOTPLUG: Final = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
"""Words for QEMU: a guest's slots are its kernel's, as with kvmpy, not ACPI's."""
HOST_SECONDS: Final = 4 * 3600
STDOUT: Final = 1


@contextmanager
def shared_host() -> Iterator[EmulatedHost]:
    """One host for all programs that run together; who fails on it leaves the next a new one."""
    host = _host()
    try:
        yield host
    except BaseException:
        _host.cache_clear()
        host.stop()
        raise


def end_shared_host() -> None:
    """It is not to take processor time from another."""
    if _host.cache_info().currsize:
        _host().stop()
        _host.cache_clear()


@cache
def _host() -> EmulatedHost:
    host = EmulatedHost(memory="4G", lifetime=HOST_SECONDS)
    host.start()
    atexit.register(host.stop)
    watch.mount(host)
    return host


def answer(host: EmulatedHost, words: Sequence[str], seconds: float) -> Any:
    """What Python says there, as JSON; what it says beside that is shown. Raises RuntimeError where it fails."""
    said = bytearray()

    def show(stream: int, data: bytes) -> None:
        if stream == STDOUT:
            said.extend(data)
        else:
            print(data.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    if host.spawn(["python", *words], sink=show).wait(seconds):
        logs = host.run(["sh", "-c", "tail -n 20 /run/*.log"]).stdout
        raise RuntimeError(f"{' '.join(words[:2])}:\n{logs}\n{host.console_tail()}")
    return json.loads(said)


@contextmanager
def bridge(host: EmulatedHost, name: str, address: str = "") -> Iterator[None]:
    """A bridge of the host's, and its ``address`` with the bits of its network."""
    give = f"ip addr add {address} dev {name}; " if address else ""
    host.run(["sh", "-ec", f"ip link add {name} type bridge; {give}ip link set {name} up"], check=True)
    try:
        yield
    finally:
        host.run(["ip", "link", "del", name])


@dataclass(frozen=True)
class Nic:
    """A network device with a tap in ``bridge``; ``name`` is at most eight characters."""

    name: str
    bridge: str
    mac: str
    vhost: bool = True


@dataclass(frozen=True)
class Disk:
    """``aio`` is how QEMU reads and writes it; kvmpy has one way."""

    name: str
    path: str
    aio: str = "threads"


@dataclass(frozen=True)
class Machine:
    """What a guest is to have; ``kernel`` is one of the lab's, and ``words`` are for it."""

    name: str
    image: str = "vmlinux"
    words: str = ""
    disks: Sequence[Disk] = ()
    nics: Sequence[Nic] = ()
    kernel: str = "cloud"

    @property
    def boot(self) -> Path:
        """The directory of its kernel and its initrd."""
        return CHECKOUT / ".lab/guest" / self.kernel

    @property
    def command_line(self) -> str:
        return f"{QUIET} mode=shell {self.words}".strip()


class LinuxGuest(Guest):
    """A guest whose VMM has written its process id to ``pid_file``."""

    pid_file: str


class KvmpyGuest(LinuxGuest):
    """``kvmpy run`` of a machine."""

    def __init__(self, host: EmulatedHost, machine: Machine) -> None:
        devices = "".join(tables.disk(disk.name, disk.path) for disk in machine.disks)
        for nic in machine.nics:
            devices += tables.nic(nic.name, f"tk-{nic.name}", nic.bridge, vhost=nic.vhost, mac=nic.mac)
        super().__init__(
            host, machine.name, kernel=machine.kernel, image=machine.image, tables=devices, words=machine.words
        )
        self.pid_file = f"/run/kvmpy/{machine.name}/pid"

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.send("\x01x")  # sooner than `kvmpy stop`
            self.process.wait()


class QemuGuest(LinuxGuest):
    """A machine under Debian's QEMU; ``kind`` is which of QEMU's machines."""

    def __init__(self, host: EmulatedHost, machine: Machine, kind: str = Q35) -> None:
        self.host, self.name = host, machine.name
        self.pid_file = f"/run/{machine.name}.pid"
        self._taps = [f"tq-{nic.name}" for nic in machine.nics]
        devices = [word for disk in machine.disks for word in _disk(disk)]
        for nic, tap in zip(machine.nics, self._taps, strict=True):
            making = f"ip tuntap add {tap} mode tap; ip link set {tap} master {nic.bridge} up"
            host.run(["sh", "-ec", making], check=True)
            devices += _nic(nic, tap)
        self.process = host.spawn(
            [*qemu(machine, kind), "-serial", "stdio", "-pidfile", self.pid_file, *devices], tty=True
        )

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.signal(15)
            self.process.wait()
        for tap in self._taps:
            self.host.run(["ip", "link", "del", tap])


def qemu(machine: Machine, kind: str = Q35) -> list[str]:
    """The beginning of QEMU's command line."""
    boot = machine.boot
    return [
        *("qemu-system-x86_64", "-accel", "kvm", "-M", kind, "-cpu", "host", "-m", str(MEMORY_MIB), "-nodefaults"),
        *("-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(boot / machine.image), "-initrd", str(boot / "initrd.img")),
        *("-append", machine.command_line),
    ]


def _disk(disk: Disk) -> list[str]:
    file = f"file.driver=file,file.filename={disk.path},file.aio={disk.aio},cache.direct=on,file.cache.direct=on"
    return [
        *("-blockdev", f"driver=raw,node-name={disk.name},{file}"),
        *("-device", f"virtio-blk-pci,drive={disk.name},num-queues=1"),
    ]


def _nic(nic: Nic, tap: str) -> list[str]:
    vhost = "on" if nic.vhost else "off"
    return [
        *("-netdev", f"tap,id={nic.name},ifname={tap},script=no,downscript=no,vhost={vhost}"),
        *("-device", f"virtio-net-pci,netdev={nic.name},mac={nic.mac}"),
    ]
