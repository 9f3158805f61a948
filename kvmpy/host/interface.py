"""A network interface of the host, by plain ioctls: its MTU, up or down, whose driver it has, its offloads.

What a tap without a bridge needs; links, addresses and bridges are netlink's (`kvmpy.host.network`). Whatever is set is
read back: a driver may take less than it was given, and say nothing.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvmpy.abi import tun
from kvmpy.abi.ioctl import Put
from kvmpy.errors import HostError, IoctlError, refusal

LONGEST_NAME: Final = 15  # bytes
COUNTS: Final = "/proc/thread-self/net/dev"
LARGEST_COUNTS: Final = 1 << 20
RECEIVED, SENT = 2, 10  # which field of a line after its name: man 5 proc

ADVICE: Final = {
    errno.EPERM: "needs CAP_NET_ADMIN: run as root",
    errno.EACCES: "needs CAP_NET_ADMIN: run as root",
    errno.ENODEV: "there is no such interface in this network namespace",
    errno.EBADFD: "the interface has been removed",
}


def check_name(ifname: str) -> None:
    """Raise HostError unless an interface can have this name (the kernel's dev_valid_name, and no pattern)."""
    good = all(c.isprintable() and not c.isspace() and c not in "/:%" for c in ifname)
    if not good or not 0 < len(ifname.encode()) <= LONGEST_NAME or ifname in (".", ".."):
        raise HostError(f"interface {ifname!r}: a name has 1 to {LONGEST_NAME} bytes, without blanks and / : %")


@contextmanager
def telling(what: str, advice: dict[int, str] = ADVICE) -> Iterator[None]:
    """A failed ioctl in here is a HostError that begins with ``what`` and ends with the advice for its errno."""
    try:
        yield
    except IoctlError as e:
        hint = advice.get(e.errno or 0, "")
        raise HostError(f"{what}: {e}{hint and ': '}{hint}") from e


class Interface:
    """The interface ``name`` in the network namespace of the thread that makes this. Any thread uses it."""

    def __init__(self, name: str) -> None:
        """Raises HostError."""
        check_name(name)
        self.name = name
        try:
            # Any socket will do, and this kind is never left out of a kernel.
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        except OSError as e:
            raise HostError(f"socket: {refusal(e.errno, 'none can be made')}") from e

    @property
    def mtu(self) -> int:
        """The MTU now, in bytes."""
        return tun.mtu_of(self._query(tun.SIOCGIFMTU))

    def set_mtu(self, mtu: int) -> None:
        """Set the MTU and read it back."""
        with telling(f"{self.name}: MTU {mtu}", {**ADVICE, errno.EINVAL: "the interface cannot have it"}):
            tun.SIOCSIFMTU(self._socket.fileno(), tun.ifreq(self.name, mtu=mtu))
        if (now := self.mtu) != mtu:
            raise HostError(f"{self.name}: MTU {now} after it was set to {mtu}")

    @property
    def up(self) -> bool:
        """Whether it is up."""
        return bool(self._flags() & tun.IFF_UP)

    def set_up(self, *, up: bool) -> None:
        """Take it up, or down, and read that back."""
        flags = self._flags() & ~tun.IFF_UP | (tun.IFF_UP if up else 0)
        with telling(self.name):
            tun.SIOCSIFFLAGS(self._socket.fileno(), tun.ifreq(self.name, flags=flags))
        if self.up is not up:
            raise HostError(f"{self.name}: is {'down' if up else 'up'} after it was set {'up' if up else 'down'}")

    def driver(self) -> tuple[str, str]:
        """Its driver, and what that says of the bus: ("tun", "tap") for a tap, ("", "") where nobody says."""
        try:
            return tun.ethtool_driver(self._socket.fileno(), self.name)
        except IoctlError:
            return "", ""

    def offloading(self) -> tuple[bool, bool]:
        """Whether it takes frames without checksums, and TCP frames to be segmented, as ethtool shows it."""
        with telling(self.name):
            asked = [
                tun.ethtool_value(self._socket.fileno(), self.name, command)
                for command in (tun.ETHTOOL_GTXCSUM, tun.ETHTOOL_GTSO)
            ]
        return bool(asked[0]), bool(asked[1])

    def close(self) -> None:
        """Give the socket back; the interface stays as it is."""
        self._socket.close()

    def _flags(self) -> int:
        return tun.flags_of(self._query(tun.SIOCGIFFLAGS))

    def _query(self, request: Put[tun.Ifreq]) -> tun.Ifreq:
        answer = tun.ifreq(self.name)
        with telling(self.name):
            request(self._socket.fileno(), answer)
        return answer


class Counts:
    """How many frames an interface has received and sent, in the network namespace of the thread that makes this.

    The kernel counts them, whoever moves them. /proc has that without the lock of the kernel's network configuration,
    which netlink would wait for, and a descriptor of it stays in its namespace. Any thread.
    """

    def __init__(self, name: str) -> None:
        """Raises HostError."""
        self._line = f"{name}:".encode()
        try:
            self._fd = os.open(COUNTS, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise HostError(f"{COUNTS}: {refusal(e.errno, 'the counts of interfaces cannot be read')}") from e

    def frames(self) -> tuple[int, int]:
        """Received and sent by the host. Raises HostError where the interface has been removed."""
        for line in self._read().splitlines():
            name, _, counts = line.strip().partition(b" ")
            if name == self._line:
                fields = counts.split()
                return int(fields[RECEIVED - 1]), int(fields[SENT - 1])
        raise HostError(f"{self._line[:-1].decode()}: {ADVICE[errno.ENODEV]}")

    def _read(self) -> bytes:
        text = b""
        try:
            while len(text) < LARGEST_COUNTS and (data := os.pread(self._fd, 1 << 16, len(text))):
                text += data
        except OSError as e:
            raise HostError(f"{COUNTS}: {refusal(e.errno, 'the counts of interfaces cannot be read')}") from e
        return text

    def close(self) -> None:
        """Give the descriptor back; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
