"""A PCI function of the host as sysfs shows it: class, driver, IOMMU group, and for a virtual function whose it is.

Every path is made of an address that was checked, or of what the kernel itself links to. Nothing is changed here but
by `set_override`, `unbind` and `bind`, which may take seconds: a driver waits for whoever uses the function.

Specification: Documentation/ABI/testing/sysfs-bus-pci, sysfs-kernel-iommu_groups; Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from typing import Final, NamedTuple

from kvmpy.errors import HostError, errno_name
from kvmpy.host.tree import Host, read

VFIO_PCI: Final = "vfio-pci"
ADDRESS: Final = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])", re.ASCII)
DRIVER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
VIRTUAL: Final = re.compile(r"virtfn([0-9]{1,5})", re.ASCII)
# What the name of a physical port looks like; those of the representors of virtual functions have more to them
PHYSICAL_PORT: Final = re.compile(r"(p[0-9]+)?", re.ASCII)
UNSET: Final = "(null)"
BRIDGE: Final = 0x06  # the base class (PCI Code and ID Assignment Specification)

ADVICE: Final = {
    errno.EACCES: "run as root",
    errno.EPERM: "run as root",
    errno.EROFS: "sysfs is read-only here, as in a container: make it writable, or bind vfio-pci outside beforehand",
    errno.ENODEV: "the driver does not take it; dmesg may say why",
    errno.EBUSY: "another driver has it; see what binds it (driverctl, a service, a udev rule)",
}


class VirtualFunction(NamedTuple):
    """Whose a virtual function is: the PF's address, its number there, and the PF's network interface if it has one."""

    pf: str
    number: int
    interface: str


def parse_address(text: str) -> str:
    """The address as sysfs spells it: with its domain, in lower case. Raises HostError."""
    if (match := ADDRESS.fullmatch(text.lower())) is None:
        raise HostError(f'{text[:40]!a}: expected a PCI address such as "0000:5e:00.2"')
    return f"{match[1] or '0000'}:{match[2]}"


class SysfsFunction:
    """The function at ``address``, whether or not there is one. Attributes are read when they are asked for."""

    def __init__(self, address: str, host: Host = Host()) -> None:  # noqa: B008  immutable
        """Raises HostError where ``address`` is none."""
        self.address = parse_address(address)
        self.host = host
        self.path = f"{host.sys}/bus/pci/devices/{self.address}"

    def exists(self) -> bool:
        """Whether it is there."""
        return os.path.exists(f"{self.path}/config")

    @property
    def base_class(self) -> int:
        """The first byte of its class: 0x02 for a NIC."""
        return int(read(f"{self.path}/class") or "0", 16) >> 16

    @property
    def driver(self) -> str:
        """The driver it is bound to, empty for none."""
        return self._target("driver")

    @property
    def override(self) -> str:
        """The only driver that may bind it, empty for any."""
        text = read(f"{self.path}/driver_override")
        return "" if text == UNSET else text

    @property
    def group(self) -> int | None:
        """Its IOMMU group; None without an IOMMU."""
        number = self._target("iommu_group")
        return int(number) if number.isdecimal() else None

    @property
    def group_node(self) -> str:
        """The group's device node, there once a function of it is bound to vfio-pci."""
        return f"{self.host.dev}/vfio/{self.group}"

    def group_members(self) -> list[SysfsFunction]:
        """The other functions of its group."""
        others = sorted(_list(f"{self.path}/iommu_group/devices"))
        return [SysfsFunction(name, self.host) for name in others if name != self.address and ADDRESS.fullmatch(name)]

    @property
    def upstream_bridge(self) -> str | None:
        """The address of the bridge above its bus; None on a root bus."""
        above = os.path.basename(os.path.dirname(os.path.realpath(self.path)))
        return above if ADDRESS.fullmatch(above) else None

    def bus_neighbours(self) -> list[str]:
        """The addresses of the other functions on its bus."""
        names = sorted(_list(os.path.dirname(os.path.realpath(self.path))))
        return [name for name in names if name != self.address and ADDRESS.fullmatch(name)]

    @property
    def virtual_functions(self) -> int:
        """How many virtual functions it has made; 0 also for what is no PF."""
        count = read(f"{self.path}/sriov_numvfs")
        return int(count) if count.isdecimal() else 0

    def virtual_function(self) -> VirtualFunction | None:
        """What it is a virtual function of; None for any other function."""
        pf = self._target("physfn")
        if not ADDRESS.fullmatch(pf):
            return None
        for name in _list(f"{self.path}/physfn"):
            match = VIRTUAL.fullmatch(name)
            if match and _base(f"{self.path}/physfn/{name}") == self.address:
                ports = SysfsFunction(pf, self.host).interfaces()
                return VirtualFunction(pf, int(match[1]), ports[0] if ports else "")
        return None

    def interfaces(self) -> list[str]:
        """Its network interfaces in our network namespace, without representors of virtual functions."""
        names = sorted(_list(f"{self.path}/net"))
        return [name for name in names if PHYSICAL_PORT.fullmatch(read(f"{self.path}/net/{name}/phys_port_name"))]

    def lock(self) -> int | None:
        """Lock it against other processes of kvmpy's; returns the descriptor to close, None where it is locked.

        Like any lock of flock(2) this goes with its holder. Raises HostError.
        """
        path = f"{self.path}/config"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise HostError(f"{self.address}: {path}: {errno_name(e.errno or 0)}: has it been removed?") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def set_override(self, driver: str) -> None:
        """Let none but ``driver`` bind it; empty lets any. Raises HostError."""
        self._write(f"{self.path}/driver_override", driver or "\n")

    def unbind(self) -> None:
        """Take it from its driver. Raises HostError."""
        if self.driver:
            self._write(f"{self.path}/driver/unbind", self.address)

    def bind(self, driver: str) -> None:
        """Give it to ``driver``. Raises HostError where that does not take it."""
        if not DRIVER.fullmatch(driver):
            raise HostError(f"{self.address}: {driver[:64]!a} is not a driver's name")
        path = f"{self.host.sys}/bus/pci/drivers/{driver}"
        if not os.path.isdir(path):
            raise HostError(f"{self.address}: the kernel has no driver {driver}; modprobe {driver}")
        self._write(f"{path}/bind", self.address)
        if self.driver != driver:
            raise HostError(f"{self.address}: is bound to {self.driver or 'no driver'} after it was bound to {driver}")

    def _write(self, path: str, text: str) -> None:
        try:
            sysfs_write(path, text)
        except OSError as e:
            number = e.errno or 0
            advice = ADVICE.get(number, "")
            raise HostError(f"{self.address}: {path}: {errno_name(number)}{advice and ': '}{advice}") from e

    def _target(self, link: str) -> str:
        return _base(f"{self.path}/{link}")


def sysfs_write(path: str, text: str) -> None:
    """Write an attribute, in one piece. The one place where the host's functions are changed. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _base(link: str) -> str:
    """The last part of what a symbolic link points to, empty where there is none."""
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
