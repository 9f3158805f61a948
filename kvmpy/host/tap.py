"""A tap: an Ethernet interface of the host whose other end is descriptors of ours, one a queue.

Opened by ourselves, not by netlink, as the descriptors are what matters: a frame is one read or write, with a
virtio-net header of 12 bytes before it, so checksums and segmentation can be left to whoever does them best.

A tap that is not there is created and vanishes with its last descriptor. One that is there was made to stay (`ip
tuntap add`): it is attached and, at the end, left with MTU, up or down and header size as they were. What another
program holds open is refused.

The kernel's rules, read in drivers/net/tun.c where its documentation is silent: attaching sets the flags of a tap anew,
but not when it has a queue already, so they are read back; segmentation offloads count only together with checksums,
and UDP's for IPv4 only together with that for IPv6; the first eight addresses of a filter are exact, the others must be
multicast and are hashed, else everything passes; broadcast has to be named.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import Final, Self

from kvmpy.abi import tun
from kvmpy.errors import HostError, IoctlError, refusal
from kvmpy.host.interface import ADVICE, Counts, Interface, check_name, telling
from kvmpy.host.visit import inside

HEADER_SIZE: Final = 12  # struct virtio_net_hdr_v1
DEVICE: Final = "/dev/net/tun"

TSO: Final = tun.TUN_F_TSO4 | tun.TUN_F_TSO6
USO: Final = tun.TUN_F_USO4 | tun.TUN_F_USO6
# From the most that a kernel can do to the least; USO came with Linux 6.2.
OFFLOADS: Final = (tun.TUN_F_CSUM | TSO | tun.TUN_F_TSO_ECN | USO, tun.TUN_F_CSUM | TSO | tun.TUN_F_TSO_ECN, 0)

# The first byte of the address that a tap of ours has in the host: of one station, locally administered, and above what
# hardware has. A bridge that was given no address has the lowest of its ports', which must stay the host's own.
HIGH: Final = 0xFE
NOBODY: Final = bytes(6)  # no frame has this address: a filter with it alone lets nothing pass

OPEN_ADVICE: Final = {
    errno.ENOENT: "the kernel has no taps; `modprobe tun`",
    errno.ENODEV: "the kernel has no taps; `modprobe tun`",
    errno.EACCES: "run as root, or as a user who may open it",
}
ATTACH_ADVICE: Final = ADVICE | {
    errno.EPERM: "needs CAP_NET_ADMIN to create it, or to be the user it was made for: run as root",
    errno.EBUSY: "another program is using it; stop that, or choose another ifname",
    errno.E2BIG: "more queues than the kernel allows",
}


def acceptable(offloads: int) -> int:
    """As much of ``offloads`` (TUN_F_...) as the kernel takes together."""
    if not offloads & tun.TUN_F_CSUM:
        return 0
    if not offloads & TSO:
        offloads &= ~tun.TUN_F_TSO_ECN
    return offloads if offloads & USO == USO else offloads & ~USO


class Tap:
    """One tap with ``fds``, one a queue: non-blocking, closed on exec, ours until `close`. Any thread.

    ``created``: it was not there before. ``offloads``: the TUN_F_... that this kernel can do. ``interface``: its end in
    the host.
    """

    def __init__(self, ifname: str, queues: int = 1) -> None:
        """In the network namespace of the calling thread; `open` is for all others. Raises HostError."""
        check_name(ifname)
        self.name = ifname
        self.fds: list[int] = []
        self.created = False
        self._in_use = queues
        self._undo: list[Callable[[], object]] = []
        with contextlib.ExitStack() as rollback:
            self._counts = Counts(ifname)
            rollback.callback(self._counts.close)
            self.interface = Interface(ifname)
            rollback.callback(self.close)
            self._attach(queues)
            if self.created:
                self._raise_address()
            self._set_header()
            self.offloads = self._probe()
            rollback.pop_all()

    @classmethod
    def open(cls, ifname: str, queues: int = 1, *, netns: str | None = None) -> Self:
        """Create or attach ``ifname`` in the network namespace ``netns`` (a name or a path; None is ours).

        With more than one of ``queues`` it is a multi-queue tap. Raises HostError that says what to do.
        """
        return inside(netns, lambda: cls(ifname, queues))

    def set_mtu(self, mtu: int) -> None:
        """Give the interface this MTU, in bytes."""
        if (before := self.interface.mtu) != mtu:
            self.interface.set_mtu(mtu)
            self._undo.append(lambda: self.interface.set_mtu(before))

    def set_up(self) -> None:
        """Take the interface up."""
        if not self.interface.up:
            self.interface.set_up(up=True)
            self._undo.append(lambda: self.interface.set_up(up=False))

    def set_offload(self, offloads: int) -> int:
        """Let the host hand over frames with these TUN_F_... left undone; returns the most that it may.

        It may leave less undone (`ethtool -K tap0 sg off`); more would be for a guest that cannot take it.
        """
        offloads = acceptable(offloads & self.offloads)
        with telling(f"tap {self.name}"):
            tun.TUNSETOFFLOAD(self.fds[0], offloads)
        try:
            now = self.interface.offloading()
        except HostError:  # renamed, so nobody knows
            return offloads
        asked = bool(offloads & tun.TUN_F_CSUM), bool(offloads & TSO)
        if any(on and not wanted for on, wanted in zip(now, asked, strict=True)):
            raise HostError(f"tap {self.name}: checksum and TCP offload are {now} after {offloads:#x} was set")
        return offloads

    def set_queues(self, count: int) -> None:
        """Use the first ``count`` queues: frames for the guest are spread over these alone.

        Raises HostError, with as many in use as before.
        """
        if not 1 <= count <= len(self.fds):
            raise ValueError(f"tap {self.name}: {count} of {len(self.fds)} queues")
        before = self._in_use
        with telling(f"tap {self.name}"):
            try:
                self._attach_first(count)
            except IoctlError:
                with contextlib.suppress(IoctlError):
                    self._attach_first(before)
                raise

    def set_filter(self, addresses: Sequence[bytes] | None, *, all_multicast: bool = False) -> None:
        """Let only frames to these MAC addresses pass towards us, on every queue; None is all frames.

        Too many addresses are all frames. Broadcast is an address like others.
        """
        flags = tun.TUN_FLT_ALLMULTI if all_multicast else 0
        listed = [] if addresses is None else sorted(addresses, key=lambda mac: mac[0] & 1) or [NOBODY]
        with telling(f"tap {self.name}"):
            tun.TUNSETTXFILTER(self.fds[0], tun.TunFilter.new(flags=flags, count=len(listed), addr=listed))

    @property
    def sndbuf(self) -> int:
        """How many bytes of ours may wait in the host before a write says so."""
        with telling(f"tap {self.name}"):
            return tun.TUNGETSNDBUF(self.fds[0])

    def set_sndbuf(self, size: int) -> None:
        """Bound what waits in the host; the kernel's default is no bound."""
        with telling(f"tap {self.name}"):
            tun.TUNSETSNDBUF(self.fds[0], size)

    def frames(self) -> tuple[int, int]:
        """How many frames the host has sent to us since the tap was made, and how many it has had of us."""
        received, sent = self._counts.frames()
        return sent, received

    def close(self) -> None:
        """Give the queues back; a tap that we created vanishes. Closing twice is allowed."""
        while self._undo:
            undo = self._undo.pop()
            if not self.created:
                with contextlib.suppress(HostError):  # somebody may have removed it
                    undo()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.interface.close()
        self._counts.close()

    def _attach(self, queues: int) -> None:
        wanted = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR | (tun.IFF_MULTI_QUEUE if queues > 1 else 0)
        try:
            self.created = self._create(wanted)
            if queues > 1 and not self.created and self._held(wanted):
                raise self._in_use_elsewhere()
            for index in range(queues):
                if index == len(self.fds):
                    self._open_queue()
                if index or not self.created:
                    tun.TUNSETIFF(self.fds[index], tun.ifreq(self.name, flags=wanted))
            flags = tun.flags_of(tun.TUNGETIFF(self.fds[0]))
        except IoctlError as e:
            raise self._refusal(e, queues) from e
        if flags & wanted != wanted or not (self.created or flags & tun.IFF_PERSIST):
            raise self._in_use_elsewhere()

    def _attach_first(self, count: int) -> None:
        while self._in_use < count:
            tun.TUNSETQUEUE(self.fds[self._in_use], tun.ifreq("", flags=tun.IFF_ATTACH_QUEUE))
            self._in_use += 1
        while self._in_use > count:
            tun.TUNSETQUEUE(self.fds[self._in_use - 1], tun.ifreq("", flags=tun.IFF_DETACH_QUEUE))
            self._in_use -= 1

    def _create(self, flags: int) -> bool:
        """Open the first queue, and create the tap with it unless there is an interface of that name."""
        self._open_queue()
        try:
            tun.TUNSETIFF(self.fds[0], tun.ifreq(self.name, flags=flags | tun.IFF_TUN_EXCL))
        except IoctlError as e:
            if e.errno != errno.EBUSY:
                raise
            return False
        return True

    def _held(self, flags: int) -> bool:
        """Whether somebody has a queue of a multi-queue tap, where the kernel refuses nobody.

        The flags of whoever attaches to a tap without queues become the tap's, so one without IFF_VNET_HDR takes that
        from it; if it is still there, another's queue is too. Where it is not, `_attach` will see whether it can be.
        """
        fd = self._open()
        try:
            tun.TUNSETIFF(fd, tun.ifreq(self.name, flags=flags & ~tun.IFF_VNET_HDR))
            return bool(tun.flags_of(tun.TUNGETIFF(fd)) & tun.IFF_VNET_HDR)
        finally:
            os.close(fd)  # one that is attached cannot be attached otherwise

    def _in_use_elsewhere(self) -> HostError:
        return HostError(f"tap {self.name}: {ATTACH_ADVICE[errno.EBUSY]}")

    def _open_queue(self) -> None:
        self.fds.append(self._open())

    def _open(self) -> int:
        try:
            return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            number = e.errno or 0
            raise HostError(f"{DEVICE}: {refusal(number, OPEN_ADVICE.get(number, 'cannot open it'))}") from e

    def _refusal(self, e: IoctlError, queues: int) -> HostError:
        """Why the kernel did not let us attach: it says only EINVAL where the interface is of the wrong kind."""
        advice = ATTACH_ADVICE.get(e.errno or 0, "cannot attach to it")
        if e.errno == errno.EINVAL:
            made = "one queue" if queues > 1 else "multi_queue"
            advice = (
                f"it was made with {made}; change queues, or remove it and have it created"
                if self.interface.driver() == ("tun", "tap")
                else "it is another kind of interface; choose another ifname"
            )
        return HostError(f"tap {self.name}: {e}: {advice}")

    def _raise_address(self) -> None:
        """Keep the kernel's random address, but for the first byte."""
        request = tun.ifreq(self.name)
        with telling(f"tap {self.name}: its address"):
            tun.SIOCGIFHWADDR(self.fds[0], request)
            tun.hwaddr_of(request)[0] = HIGH
            tun.SIOCSIFHWADDR(self.fds[0], request)

    def _set_header(self) -> None:
        fd = self.fds[0]
        with telling(f"tap {self.name}"):
            before = tun.TUNGETVNETHDRSZ(fd)
            tun.TUNSETVNETHDRSZ(fd, HEADER_SIZE)
            self._undo.append(lambda: tun.TUNSETVNETHDRSZ(fd, before))
            now = tun.TUNGETVNETHDRSZ(fd)
        if now != HEADER_SIZE:
            raise HostError(f"tap {self.name}: a header of {now} bytes after it was set to {HEADER_SIZE}")

    def _probe(self) -> int:
        """The offloads that this kernel takes; none is on afterwards, nor when a tap that stays is left."""
        self._undo += (lambda: self.set_offload(0), lambda: self.set_filter(None))
        for offloads in OFFLOADS:
            with contextlib.suppress(IoctlError):
                tun.TUNSETOFFLOAD(self.fds[0], offloads)
                tun.TUNSETOFFLOAD(self.fds[0], 0)
                return offloads
        return 0
