"""An owner of rings, and a kernel that has /dev/vhost-net: it keeps what each descriptor is told, insists on its rules,
and moves no frames.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from typing import Any

from kvmpy.errors import IoctlError
from tests.fakes.kernel import Kernel
from tests.fakes.loop import Inbox

# What Linux 6.1 answers: VHOST_F_LOG_ALL, VHOST_NET_F_VIRTIO_NET_HDR and VIRTIO_F_ACCESS_PLATFORM among them.
FEATURES = sum(1 << number for number in (15, 24, 26, 27, 28, 29, 32, 33))
LOG_ALL = 26
FILES = {"KICK": "kick", "CALL": "call", "ERR": "error"}


class FakeOwner:
    """A device as `kvmpy.devices.vhost` sees it; ``broken`` has the reasons."""

    def __init__(self, name: str = "net1") -> None:
        self.name = name
        self.lock = threading.RLock()
        self.broken: Inbox[str] = Inbox()

    def break_(self, why: str) -> None:
        self.broken.put(why)


@dataclass
class FakeRing:
    """One ring of a descriptor; -1 is no file."""

    num: int = 0
    base: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    kick: int = -1
    call: int = -1
    error: int = -1
    backend: int = -1
    logged: bool = False
    log_gpa: int = 0

    @property
    def idle(self) -> bool:
        """Whether the kernel holds nothing for it."""
        return self.kick == self.call == self.error == self.backend == -1


class FakeVhost:
    """One open descriptor."""

    def __init__(self) -> None:
        self.owned = False
        self.features = 0
        self.log_base = 0
        self.table: list[tuple[int, int, int]] = []
        self.rings = (FakeRing(), FakeRing())

    @property
    def logs(self) -> bool:
        """Whether writes to buffers are logged, and to both rings that have a backend."""
        return bool(self.features >> LOG_ALL & 1) and all(ring.logged for ring in self.rings if ring.backend != -1)

    @property
    def logs_nothing(self) -> bool:
        """Whether none is, of what it works on."""
        idle = all(ring.backend == -1 for ring in self.rings)
        return idle or not (self.features >> LOG_ALL & 1 or any(ring.logged for ring in self.rings))


class VhostKernel(Kernel):
    """``opened`` has every descriptor it has seen, by number; ``countdown`` requests succeed and then one fails."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: dict[int, FakeVhost] = {}
        self.countdown: int | None = None
        self.offers = FEATURES

    def __call__(self, name: str, fd: int, request: int, argument: Any) -> int:
        super().__call__(name, fd, request, argument)
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown < 0:
                self.countdown = None
                raise IoctlError(name, errno.EIO)
        vhost = self.opened.setdefault(fd, FakeVhost())
        if not vhost.owned and name not in ("VHOST_SET_OWNER", "VHOST_GET_FEATURES"):
            raise IoctlError(name, errno.EPERM)
        if "VRING" in name or "BACKEND" in name:
            self._ring(name, vhost.rings[argument.index], argument)
        else:
            self._device(name, vhost, argument)
        return 0

    def names(self) -> list[str]:
        """The requests since the last call, in their order."""
        names = [name for name, _ in self.seen]
        self.seen.clear()
        return names

    def _device(self, name: str, vhost: FakeVhost, argument: Any) -> None:
        match name:
            case "VHOST_SET_OWNER":
                if vhost.owned:
                    raise IoctlError(name, errno.EBUSY)
                vhost.owned = True
            case "VHOST_GET_FEATURES":
                argument[0] = self.offers
            case "VHOST_SET_FEATURES":
                if argument[0] & ~self.offers:
                    raise IoctlError(name, errno.EOPNOTSUPP)
                if argument[0] >> LOG_ALL & 1 and not vhost.log_base and not vhost.rings[0].idle:
                    raise IoctlError(name, errno.EFAULT)
                vhost.features = argument[0]
            case "VHOST_SET_LOG_BASE":
                vhost.log_base = argument[0]
            case "VHOST_SET_MEM_TABLE":
                regions = [argument.regions[n] for n in range(argument.nregions)]
                vhost.table = [(each.guest_phys_addr, each.memory_size, each.userspace_addr) for each in regions]
            case _:
                raise IoctlError(name, errno.ENOTTY)

    def _ring(self, name: str, ring: FakeRing, argument: Any) -> None:
        match name.split("_"):
            case [*_, "SET", "VRING", "NUM" | "BASE" as what]:
                if ring.backend != -1:
                    raise IoctlError(name, errno.EBUSY)
                setattr(ring, what.lower(), argument.num)
            case [*_, "GET", "VRING", "BASE"]:
                argument.num = ring.base
            case [*_, "VRING", "ADDR"]:
                ring.desc, ring.avail = argument.desc_user_addr, argument.avail_user_addr
                ring.used = argument.used_user_addr
                ring.logged, ring.log_gpa = bool(argument.flags & 1), argument.log_guest_addr
            case [*_, "VRING", "KICK" | "CALL" | "ERR" as what]:
                setattr(ring, FILES[what], argument.fd)
            case [*_, "BACKEND"]:
                ring.backend = argument.fd
