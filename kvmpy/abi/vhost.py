"""linux/vhost.h, typed: constants, structs and requests by their kernel names.

Values and layouts come from the compiler (vhost.cdef); this file only puts types on them.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Final

from kvmpy._native import lib
from kvmpy.abi.ioctl import Call, GetNumber, Layout, Put, PutNumber


class VringState(Layout, c="struct vhost_vring_state"):
    index: int
    num: int


class VringFile(Layout, c="struct vhost_vring_file"):
    index: int
    fd: int


class VringAddr(Layout, c="struct vhost_vring_addr"):
    index: int
    flags: int
    desc_user_addr: int
    used_user_addr: int
    avail_user_addr: int
    log_guest_addr: int


class MemoryRegion(Layout, c="struct vhost_memory_region"):
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    flags_padding: int


class Memory(Layout, c="struct vhost_memory"):
    nregions: int
    padding: int
    regions: MutableSequence[MemoryRegion]


VHOST_GET_FEATURES = GetNumber("VHOST_GET_FEATURES")
VHOST_SET_FEATURES = PutNumber("VHOST_SET_FEATURES")
VHOST_SET_OWNER = Call("VHOST_SET_OWNER")
VHOST_SET_MEM_TABLE = Put("VHOST_SET_MEM_TABLE", Memory)
VHOST_SET_LOG_BASE = PutNumber("VHOST_SET_LOG_BASE")

VHOST_SET_VRING_NUM = Put("VHOST_SET_VRING_NUM", VringState)
VHOST_SET_VRING_ADDR = Put("VHOST_SET_VRING_ADDR", VringAddr)
VHOST_SET_VRING_BASE = Put("VHOST_SET_VRING_BASE", VringState)
VHOST_GET_VRING_BASE = Put("VHOST_GET_VRING_BASE", VringState)
VHOST_SET_VRING_KICK = Put("VHOST_SET_VRING_KICK", VringFile)
VHOST_SET_VRING_CALL = Put("VHOST_SET_VRING_CALL", VringFile)
VHOST_SET_VRING_ERR = Put("VHOST_SET_VRING_ERR", VringFile)
VHOST_NET_SET_BACKEND = Put("VHOST_NET_SET_BACKEND", VringFile)

FILE_UNBIND: Final = -1
VRING_F_LOG: Final[int] = lib.VHOST_VRING_F_LOG
F_LOG_ALL: Final[int] = lib.VHOST_F_LOG_ALL
F_VIRTIO_NET_HDR: Final[int] = lib.VHOST_NET_F_VIRTIO_NET_HDR
