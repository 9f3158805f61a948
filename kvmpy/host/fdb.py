"""Where a bridge, and the switch in the NIC of its uplink, send what is for one address: for the network helper alone.

Specified by what Linux does with RTM_NEWNEIGH and RTM_DELNEIGH of family AF_BRIDGE (`man 8 bridge`), and the manual
recipe of Documentation/networking/net_failover.rst. There are two places to tell where the guest of a failover pair is:

- The bridge is given an entry while the guest is on its standby, which no frame moves elsewhere: there are NICs that
  hand a PF its own broadcasts back, the guest's among them. While it has its primary nothing of it is to be learned at
  its tap: Linux sends over its standby until the primary has a carrier, and hears nothing there any more (R46).
- A NIC with virtual functions has a switch of its own, between those and the wire. That delivers to the bridge what it
  is told to: an entry of the uplink for itself (NTF_SELF). Without one some send such frames out on the wire alone.

Left out: switches in front of the NIC, which learn from frames, and bridges that are not the kernel's, which a hook
tells (`kvmpy.host.hook`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final

from kvmpy.errors import HostError
from kvmpy.host.changes import ADVICE, Refused, attempt
from kvmpy.host.links import NLM_F_CREATE_NEW, Link, LinkError, message_class
from kvmpy.host.ports import Namespace

Message: Final = message_class("ndmsg")

# linux/socket.h, linux/rtnetlink.h, linux/neighbour.h
AF_BRIDGE: Final = 7
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
NTF_SELF, NTF_MASTER, NTF_STICKY = 0x02, 0x04, 0x40
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80  # to a bridge: an entry that stays, one for the host itself
NLM_F_REPLACE, NLM_F_CREATE = 0x100, 0x400

PCI: Final = "/sys/bus/pci/devices"
SWITCHED: Final = ("physfn", "virtfn0")  # a virtual function has the first, a PF with such the second
BY_HAND: Final = "a station behind the same NIC may not reach the guest on its standby; if so, bridge over another NIC"
ENTRY_ADVICE: Final = ADVICE | {
    errno.EOPNOTSUPP: f"its driver takes no addresses: {BY_HAND}",
    errno.EINVAL: f"its driver does not take it: {BY_HAND}",
    errno.ENOMEM: f"it has no room for one more address: {BY_HAND}",
    errno.ENOSPC: f"it has no room for one more address: {BY_HAND}",
}


class Fdb:
    """What the machine has told in one network namespace; ``pci`` is the directory of the host's functions."""

    def __init__(self, namespace: Namespace, pci: str = PCI) -> None:
        self._namespace, self._links, self._pci = namespace, namespace.links, pci
        self._made: set[tuple[int, str, int]] = set()  # by ifindex, with the flag that says whose: bridge's or its own

    def uplinks(self, ifname: str) -> dict[str, Any]:
        """The interfaces beside ``ifname`` in its bridge, or below such a one, whose NIC has a switch of its own."""
        try:
            port = self._port(ifname)
            beside = self._links.ports(port.master) if port else []
            found = {link.name for other in beside if other != port for link in self._hardware(other)}
        except LinkError as e:
            raise Refused.by_kernel("bridge", ifname, e) from e
        return {"uplinks": sorted(found)}

    def steer(self, ifname: str, address: str, uplinks: Sequence[str], *, here: bool, learn: bool) -> dict[str, Any]:
        """Have what is for ``address`` go to the port ``ifname``, or with ``here`` false no longer.

        With ``learn`` the bridge learns from the port what it did before. Entries are made at ``uplinks``, or removed.
        What cannot be done keeps nobody from the rest: it is in ``problems``, and ``made`` has where an entry is new.
        """
        made: list[str] = []
        steps = [
            partial(self._add, name, address, made) if here else partial(self.remove, name, address) for name in uplinks
        ]
        steps.insert(0, partial(self._tell_bridge, ifname, address, here=here, learn=learn))
        return {"problems": [str(problem) for step in steps if (problem := attempt(step))], "made": made}

    def remove(self, uplink: str, mac: str) -> None:
        """Have an entry no more; one that is not there is no error. Raises Refused."""
        if (link := self._links.find(uplink)) is not None:
            self._remove(link, mac)

    def close(self) -> list[str]:
        """Remove what was made; returns what could not be."""
        steps = [partial(self._undo, index, mac, flag) for index, mac, flag in self._made]
        return [str(problem) for step in steps if (problem := attempt(step))]

    def _tell_bridge(self, ifname: str, mac: str, *, here: bool, learn: bool) -> None:
        try:
            if (port := self._port(ifname)) is None:
                return
            self._namespace.set_learning(port, learning=learn)
            if here:
                request = _message(port, mac, NTF_MASTER | NTF_STICKY, NUD_NOARP)
                self._links.talk(RTM_NEWNEIGH, request, NLM_F_CREATE | NLM_F_REPLACE)
                self._made.add((port.ifindex, mac, NTF_MASTER))
            else:
                self._delete(port, mac, NTF_MASTER)
        except LinkError as e:
            raise Refused.by_kernel("bridge", f"{ifname}: its bridge cannot be told where {mac} is", e) from e

    def _add(self, uplink: str, mac: str, made: list[str]) -> None:
        if (link := self._links.find(uplink)) is None:
            return
        try:
            request = _message(link, mac, NTF_SELF, NUD_PERMANENT)
            self._links.talk(RTM_NEWNEIGH, request, NLM_F_CREATE_NEW)
        except LinkError as e:
            if e.errno != errno.EEXIST:  # there already: somebody else's, or ours
                raise _refused(link, mac, e) from e
        else:
            self._made.add((link.ifindex, mac, NTF_SELF))
            made.append(link.name)

    def _remove(self, link: Link, mac: str) -> None:
        try:
            self._delete(link, mac, NTF_SELF)
        except LinkError as e:
            raise _refused(link, mac, e) from e

    def _undo(self, index: int, mac: str, flag: int) -> None:
        if (link := self._links.get(index)) is not None:
            self._delete(link, mac, flag)

    def _delete(self, link: Link, mac: str, flag: int) -> None:
        """In every VLAN, where there are any."""
        try:
            self._links.talk(RTM_DELNEIGH, _message(link, mac, flag, NUD_PERMANENT if flag == NTF_SELF else 0))
        except LinkError as e:
            if e.errno not in (errno.ENOENT, errno.EOPNOTSUPP):  # of a port that is none any more, the bridge has none
                raise
        self._made.discard((link.ifindex, mac, flag))

    def _port(self, ifname: str) -> Link | None:
        """It, where it is a port of a bridge."""
        port = self._links.find(ifname)
        bridge = self._links.get(port.master) if port is not None and port.master else None
        return port if bridge is not None and bridge.kind == "bridge" else None

    def _hardware(self, link: Link, depth: int = 0) -> Iterator[Link]:
        """The functions of PCI that are ``link``, or below it, if it is a VLAN, a bond or a team."""
        if link.device and any(os.path.exists(f"{self._pci}/{link.device}/{name}") for name in SWITCHED):
            yield link
        elif link.kind == "vlan" and depth < 4:
            if (below := self._links.get(link.below)) is not None:
                yield from self._hardware(below, depth + 1)
        elif link.kind in ("bond", "team") and depth < 4:
            for member in self._links.ports(link.ifindex):
                yield from self._hardware(member, depth + 1)


def _refused(link: Link, mac: str, e: HostError) -> Refused:
    number = e.errno if isinstance(e, LinkError) else 0
    advice = ENTRY_ADVICE.get(number, "see dmesg")
    return Refused("bridge", f"{link.name}: its switch cannot be told of {mac}: {e}: {advice}")


def _message(link: Link, mac: str, flags: int, state: int) -> Any:
    message = Message()
    message.update({"family": AF_BRIDGE, "ifindex": link.ifindex, "flags": flags, "state": state})
    message["attrs"] = [("NDA_LLADDR", mac)]
    return message
