"""One descriptor of /dev/vhost-net: a worker in the kernel for one pair of rings, 0 receives and 1 transmits.

Nothing here knows a guest: rings are host-virtual addresses. A worker that fails to stop is closed, which stops it in
any case, and from then on refuses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvmpy.abi import vhost as abi
from kvmpy.errors import HostError, IoctlError, refusal
from kvmpy.host.eventfd import EventFd
from kvmpy.log import Log

log = Log(__name__)

DEVICE: Final = "/dev/vhost-net"
RINGS: Final = ("receive", "transmit")


class Region(NamedTuple):
    """[gpa, gpa+size) of the guest is at ``hva``."""

    gpa: int
    size: int
    hva: int


class Ring(NamedTuple):
    """A ring of ``size`` entries: where its parts are, and ``base``, the available index to go on from.

    ``used_gpa`` is where writes to the used ring are logged, when they are.
    """

    size: int
    base: int
    desc: int
    avail: int
    used: int
    used_gpa: int


class VhostWorker:
    """Owns the descriptor and, for each ring, the eventfd ``errors`` on which the kernel says that the ring is broken.

    One thread at a time.
    """

    def __init__(self, path: str = DEVICE) -> None:
        """Raises HostError where there is no vhost-net."""
        self.fd = _open(path)
        self.errors: tuple[EventFd, ...] = ()
        try:
            abi.VHOST_SET_OWNER(self.fd)
            self.errors = tuple(EventFd() for _ in RINGS)
        except BaseException:
            self.close()
            raise

    def features(self) -> int:
        """The feature bits it has, vhost's own among them."""
        return abi.VHOST_GET_FEATURES(self._usable())

    def set_features(self, features: int) -> None:
        """Serve by these virtio features. Raises HostError."""
        abi.VHOST_SET_FEATURES(self._usable(), features)

    def set_memory(self, regions: Sequence[Region]) -> None:
        """Find the buffers of chains in ``regions`` and nowhere else. Raises IoctlError, with the old ones still valid;
        a closed worker finds nothing anyway.
        """
        if self.fd >= 0:
            table = [{"guest_phys_addr": gpa, "memory_size": size, "userspace_addr": hva} for gpa, size, hva in regions]
            abi.VHOST_SET_MEM_TABLE(self.fd, abi.Memory.new(nregions=len(table), regions=table))

    def shrink_memory(self, regions: Sequence[Region]) -> bool:
        """`set_memory` that must not fail: False if it took closing the worker."""
        try:
            self.set_memory(regions)
        except IoctlError as e:
            self._give_up(e)
            return False
        return True

    def set_log(self, address: int) -> None:
        """Where a bitmap lies, a bit for each page from gpa 0 to the end of memory: for features with F_LOG_ALL, and
        rings that are logged. It must stay there as long as these are set. Raises HostError.
        """
        if not self.features() & 1 << abi.F_LOG_ALL:
            raise HostError("vhost: this kernel does not log what it writes; set vhost = false to migrate")
        abi.VHOST_SET_LOG_BASE(self._usable(), address)

    def change_logging(self, features: int, rings: Sequence[Ring], *, enabled: bool) -> None:
        """Log what is written to buffers and to rings that work, or do not: they go on. Raises HostError."""
        self.set_features(features | enabled << abi.F_LOG_ALL)
        for index, ring in enumerate(rings):
            self._set_addresses(index, ring, logged=enabled)

    def stop_logging(self, features: int, rings: Sequence[Ring]) -> bool:
        """`change_logging` that must not fail: False if it took closing the worker."""
        if self.fd < 0:
            return False
        try:
            self.change_logging(features, rings, enabled=False)
        except IoctlError as e:
            self._give_up(e)
            return False
        return True

    def set_up(self, index: int, ring: Ring, *, kick: int, call: int, logged: bool = False) -> None:
        """All that a stopped ring needs before `start`; ``kick`` and ``call`` are eventfds. Raises HostError."""
        fd = self._usable()
        abi.VHOST_SET_VRING_NUM(fd, abi.VringState.new(index=index, num=ring.size))
        abi.VHOST_SET_VRING_BASE(fd, abi.VringState.new(index=index, num=ring.base))
        self._set_addresses(index, ring, logged=logged)
        abi.VHOST_SET_VRING_ERR(fd, abi.VringFile.new(index=index, fd=self.errors[index].fd))
        abi.VHOST_SET_VRING_CALL(fd, abi.VringFile.new(index=index, fd=call))
        abi.VHOST_SET_VRING_KICK(fd, abi.VringFile.new(index=index, fd=kick))

    def start(self, index: int, tap: int) -> None:
        """Move frames between a ring and the tap queue ``tap``. Raises HostError."""
        abi.VHOST_NET_SET_BACKEND(self._usable(), abi.VringFile.new(index=index, fd=tap))

    def set_call(self, index: int, call: int) -> None:
        """Signal ``call`` (-1 for none) from now on when buffers have been used. Raises HostError."""
        abi.VHOST_SET_VRING_CALL(self._usable(), abi.VringFile.new(index=index, fd=call))

    def stop(self) -> list[int]:
        """Let go of both rings and of their eventfds, started or not: what the kernel was at is finished and signalled.

        The next available index of each ring; empty if the worker had to be closed.
        """
        try:
            return self._stop() if self.fd >= 0 else []
        except IoctlError as e:
            self._give_up(e)
            return []
        finally:
            for event in self.errors:
                event.take()  # what it reports is over

    def close(self) -> None:
        """Close everything, which stops the rings too; closing twice is allowed."""
        self._close_fd()
        for event in self.errors:
            event.close()

    def _stop(self) -> list[int]:
        for index in range(len(RINGS)):
            abi.VHOST_NET_SET_BACKEND(self.fd, abi.VringFile.new(index=index, fd=abi.FILE_UNBIND))
        bases = [abi.VringState.new(index=index) for index in range(len(RINGS))]
        for index, base in enumerate(bases):
            for request in (abi.VHOST_SET_VRING_KICK, abi.VHOST_SET_VRING_CALL, abi.VHOST_SET_VRING_ERR):
                request(self.fd, abi.VringFile.new(index=index, fd=abi.FILE_UNBIND))
            abi.VHOST_GET_VRING_BASE(self.fd, base)
        return [base.num for base in bases]

    def _set_addresses(self, index: int, ring: Ring, *, logged: bool) -> None:
        address = abi.VringAddr.new(
            index=index,
            flags=logged << abi.VRING_F_LOG,
            desc_user_addr=ring.desc,
            avail_user_addr=ring.avail,
            used_user_addr=ring.used,
            log_guest_addr=ring.used_gpa,
        )
        abi.VHOST_SET_VRING_ADDR(self._usable(), address)

    def _usable(self) -> int:
        if self.fd < 0:
            raise HostError("vhost: the kernel has failed on this queue pair before")
        return self.fd

    def _give_up(self, e: IoctlError) -> None:
        log.error("vhost: %s; a queue pair is lost to it until kvmpy is started anew", e)
        self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise HostError(
            f"{path}: "
            + refusal(
                e.errno,
                "cannot be opened",
                "load vhost_net (modprobe vhost_net) and run as who may open it, or set vhost = false",
            )
        ) from e
