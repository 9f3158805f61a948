"""The frame that tells switches behind which port a guest's address is now, sent when it may have moved.

A reverse ARP request (RFC 903), as QEMU sends it: broadcast, so every switch learns the port it came from, and of no
interest to hosts. It says nothing of IP; for that the guest speaks itself (VIRTIO_NET_F_GUEST_ANNOUNCE).
"""

from __future__ import annotations

import struct
from typing import Final

BROADCAST: Final = b"\xff" * 6
ETH_P_RARP: Final = 0x8035
ETH_P_IP: Final = 0x0800
ARPHRD_ETHER: Final = 1
ARPOP_RREQUEST: Final = 3
SHORTEST_FRAME: Final = 60  # of Ethernet, without its checksum
# Destination, source, type; hardware and protocol, the lengths of their addresses, operation; sender and target.
RARP: Final = struct.Struct("!6s6sHHHBBH6s4s6s4s")


def rarp(mac: bytes) -> bytes:
    """The frame for the address ``mac``, without a virtio-net header."""
    fields = (ARPHRD_ETHER, ETH_P_IP, 6, 4, ARPOP_RREQUEST, mac, bytes(4), mac, bytes(4))
    return RARP.pack(BROADCAST, mac, ETH_P_RARP, *fields).ljust(SHORTEST_FRAME, b"\0")
