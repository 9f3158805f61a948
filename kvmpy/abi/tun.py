"""linux/if_tun.h, typed, and the few requests of linux/if.h and linux/ethtool.h that a tap needs.

Values and layouts come from the compiler (tun.cdef). The API is described in the kernel's
Documentation/networking/tuntap.rst; what it leaves out is said in drivers/net/tun.c.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any, Final

from kvmpy._native import ffi, lib
from kvmpy.abi.ioctl import Call, Get, GetNumber, Layout, Put, PutNumber


class Ifreq(Layout, c="struct ifreq"):
    """The name of an interface, and one thing about it: see `ifreq` and `value`."""

    ifr_ifrn: object
    ifr_ifru: object


class EthtoolValue(Layout, c="struct ethtool_value"):
    cmd: int
    data: int


class EthtoolDrvinfo(Layout, c="struct ethtool_drvinfo"):
    cmd: int
    driver: MutableSequence[bytes]
    bus_info: MutableSequence[bytes]


class TunFilter(Layout, c="struct tun_filter"):
    flags: int
    count: int
    addr: MutableSequence[bytes]


TUNSETIFF = Put("TUNSETIFF", Ifreq)
TUNGETIFF = Get("TUNGETIFF", Ifreq)
TUNGETFEATURES = GetNumber("TUNGETFEATURES", "unsigned int")
TUNSETOFFLOAD = Call("TUNSETOFFLOAD")
TUNSETTXFILTER = Put("TUNSETTXFILTER", TunFilter)
TUNGETSNDBUF = GetNumber("TUNGETSNDBUF", "int")
TUNSETSNDBUF = PutNumber("TUNSETSNDBUF", "int")
TUNGETVNETHDRSZ = GetNumber("TUNGETVNETHDRSZ", "int")
TUNSETVNETHDRSZ = PutNumber("TUNSETVNETHDRSZ", "int")
TUNSETQUEUE = Put("TUNSETQUEUE", Ifreq)

# On a tap's descriptor as well as on a socket.
SIOCGIFHWADDR = Put("SIOCGIFHWADDR", Ifreq)
SIOCSIFHWADDR = Put("SIOCSIFHWADDR", Ifreq)

# On any socket of the interface's network namespace.
SIOCGIFFLAGS = Put("SIOCGIFFLAGS", Ifreq)
SIOCSIFFLAGS = Put("SIOCSIFFLAGS", Ifreq)
SIOCGIFMTU = Put("SIOCGIFMTU", Ifreq)
SIOCSIFMTU = Put("SIOCSIFMTU", Ifreq)
SIOCETHTOOL = Put("SIOCETHTOOL", Ifreq)

IFF_UP: Final[int] = lib.IFF_UP
IFF_TAP: Final[int] = lib.IFF_TAP
IFF_NO_PI: Final[int] = lib.IFF_NO_PI
IFF_VNET_HDR: Final[int] = lib.IFF_VNET_HDR
IFF_TUN_EXCL: Final[int] = lib.IFF_TUN_EXCL
IFF_MULTI_QUEUE: Final[int] = lib.IFF_MULTI_QUEUE
IFF_ATTACH_QUEUE: Final[int] = lib.IFF_ATTACH_QUEUE
IFF_DETACH_QUEUE: Final[int] = lib.IFF_DETACH_QUEUE
IFF_PERSIST: Final[int] = lib.IFF_PERSIST

TUN_F_CSUM: Final[int] = lib.TUN_F_CSUM
TUN_F_TSO4: Final[int] = lib.TUN_F_TSO4
TUN_F_TSO6: Final[int] = lib.TUN_F_TSO6
TUN_F_TSO_ECN: Final[int] = lib.TUN_F_TSO_ECN
TUN_F_USO4: Final[int] = lib.TUN_F_USO4
TUN_F_USO6: Final[int] = lib.TUN_F_USO6
TUN_FLT_ALLMULTI: Final[int] = lib.TUN_FLT_ALLMULTI

ETHTOOL_GDRVINFO: Final[int] = lib.ETHTOOL_GDRVINFO
ETHTOOL_GTXCSUM: Final[int] = lib.ETHTOOL_GTXCSUM
ETHTOOL_GTSO: Final[int] = lib.ETHTOOL_GTSO

ETH_ALEN: Final = 6
_FLAGS_MASK: Final = 0xFFFF


def ifreq(name: str, *, flags: int = 0, mtu: int | None = None) -> Ifreq:
    """A request about the interface ``name``, carrying its flags or its MTU."""
    value = {"ifru_mtu": mtu} if mtu is not None else {"ifru_flags": ffi.cast("short", flags & _FLAGS_MASK)}
    return Ifreq.new(ifr_ifrn={"ifrn_name": name.encode()}, ifr_ifru=value)


def name_of(request: Ifreq) -> str:
    """The interface's name in ``request``, as the kernel filled it in."""
    names: Any = request.ifr_ifrn
    said: bytes = ffi.string(names.ifrn_name)
    return said.decode(errors="replace")


def flags_of(request: Ifreq) -> int:
    """The 16 flags in ``request``; IFF_TUN_EXCL is the uppermost."""
    value: Any = request.ifr_ifru
    return int(value.ifru_flags) & _FLAGS_MASK


def mtu_of(request: Ifreq) -> int:
    """The MTU in ``request``, in bytes."""
    value: Any = request.ifr_ifru
    return int(value.ifru_mtu)


def hwaddr_of(request: Ifreq) -> memoryview:
    """The Ethernet address in ``request``, to be read or changed."""
    value: Any = request.ifr_ifru
    return memoryview(ffi.buffer(value.ifru_hwaddr.sa_data, ETH_ALEN))


def ethtool_value(fd: int, name: str, command: int) -> int:
    """What ethtool's ``command``, one that gets a number, says of the interface ``name``."""
    answer = EthtoolValue.new(cmd=command)
    _ethtool(fd, name, answer)
    return answer.data


def ethtool_driver(fd: int, name: str) -> tuple[str, str]:
    """The driver of the interface ``name`` and what it says of the bus: ("tun", "tap") for a tap."""
    answer = EthtoolDrvinfo.new(cmd=ETHTOOL_GDRVINFO)
    _ethtool(fd, name, answer)
    driver, bus = (ffi.string(text).decode(errors="replace") for text in (answer.driver, answer.bus_info))
    return driver, bus


def _ethtool(fd: int, name: str, answer: EthtoolValue | EthtoolDrvinfo) -> None:
    request = ifreq(name)
    union: Any = request.ifr_ifru
    union.ifru_data = answer
    SIOCETHTOOL(fd, request)
