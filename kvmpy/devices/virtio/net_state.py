"""What a virtio-net driver has told its device, and the numbers of Virtio 1.2, section 5.1, that it is told in."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated, Final, NamedTuple

from msgspec import Meta

from kvmpy.devices.virtio.device import VirtioDeviceState
from kvmpy.state import u64

MAC_SIZE: Final = 6
BROADCAST: Final = b"\xff" * MAC_SIZE
# In each of the two filter tables, as many as QEMU keeps; a longer table lets everything of its kind pass.
TABLE_LENGTH: Final = 64
VLANS: Final = 4096
MOST_PAIRS: Final = 0x8000  # VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX

Mac = Annotated[bytes, Meta(min_length=MAC_SIZE, max_length=MAC_SIZE)]
MacTable = Annotated[list[Mac], Meta(max_length=TABLE_LENGTH)]


class NetFeature(IntEnum):
    """Numbers of virtio-net's feature bits (section 5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    STANDBY = 62


class NetStatus(IntEnum):
    """Bits of the configuration's status (section 5.1.4)."""

    LINK_UP = 1
    ANNOUNCE = 2


class RxMode(IntFlag):
    """What passes the filter: each bit is one command of the class VIRTIO_NET_CTRL_RX (section 5.1.6.5.1)."""

    PROMISC = 1 << 0
    ALLMULTI = 1 << 1
    ALLUNI = 1 << 2
    NOMULTI = 1 << 3
    NOUNI = 1 << 4
    NOBCAST = 1 << 5


class NetState(VirtioDeviceState):
    """``mac``, ``offloads`` are None until the driver sets its own; a filter table is None when it was too long."""

    NAME = "virtio-net"
    VERSION = 1
    link_up: bool = True
    announce: bool = False
    mac: Mac | None = None
    rx_mode: Annotated[int, Meta(ge=0, le=0x3F)] = int(RxMode.PROMISC)  # all passes until a driver cares
    unicast: MacTable | None = []
    multicast: MacTable | None = []
    vlans: Annotated[bytes, Meta(min_length=VLANS // 8, max_length=VLANS // 8)] = bytes(VLANS // 8)
    pairs: Annotated[int, Meta(ge=1, le=MOST_PAIRS)] = 1
    offloads: u64 | None = None


class Filter(NamedTuple):
    """Which frames are for the guest: to ``addresses``, or to any if that is None."""

    addresses: list[bytes] | None
    all_multicast: bool = False


def receive_filter(state: NetState, mac: bytes) -> Filter:
    """The filter that a driver of the interface with address ``mac`` asked for.

    It may let more pass, never less: an imperfect filter is allowed (section 5.1.6.5.1), and the driver looks again.
    """
    mode = RxMode(state.rx_mode)
    if mode & (RxMode.PROMISC | RxMode.ALLUNI) or state.unicast is None:
        return Filter(None)
    unicast = [] if mode & RxMode.NOUNI else [mac, *state.unicast]
    broadcast = [] if mode & RxMode.NOBCAST else [BROADCAST]
    if mode & RxMode.NOMULTI:
        return Filter(unicast + broadcast)
    multicast, every = state.multicast or [], bool(mode & RxMode.ALLMULTI) or state.multicast is None
    return Filter(unicast + broadcast + multicast, every)
