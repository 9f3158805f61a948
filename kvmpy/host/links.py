"""The links of a network namespace over rtnetlink: read, made, changed and removed. For the network helper alone.

The messages are pyroute2's, the socket is ours. pyroute2's sockets run an asyncio loop for each request, wait for the
kernel without a limit and leave its explanations (extended acks) aside; and importing anything of pyroute2 imports all
of it, 215 ms and 24 MiB here, fifty times as long on an emulated host. The message classes alone cost 45 ms and 6 MiB.

Specification: Documentation/userspace-api/netlink/intro.rst, rtnetlink(7).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from kvmpy.errors import HostError, errno_name
from kvmpy.host.netns import NetworkNamespace


def message_class(name: str) -> Any:
    """A message of pyroute2's, imported without the rest: its package stands empty in sys.modules meanwhile."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is None:
        raise HostError("pyroute2 is not installed; pip install pyroute2")
    empty = "pyroute2" not in sys.modules
    if empty:
        sys.modules["pyroute2"] = importlib.util.module_from_spec(spec)
    try:
        return getattr(importlib.import_module(f"pyroute2.netlink.rtnl.{name}"), name)
    finally:
        if empty:
            del sys.modules["pyroute2"]


Message: Final = message_class("ifinfmsg")

# linux/netlink.h, linux/rtnetlink.h, linux/if.h
SOL_NETLINK: Final = 270
NETLINK_CAP_ACK, NETLINK_EXT_ACK = 10, 11
NLMSG_ERROR, NLMSG_DONE = 2, 3
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_CREATE_NEW: Final = 0x400 | 0x200  # NLM_F_CREATE | NLM_F_EXCL
NLM_F_ACK_TLVS: Final = 0x200
NLMSGERR_ATTR_MSG: Final = 1
RTEXT_FILTER_VF, RTEXT_FILTER_SKIP_STATS = 1, 8
IFF_UP: Final = 0x1
HEADER: Final = struct.Struct("IHHII")
ATTRIBUTE: Final = struct.Struct("HH")
PORT_STATES: Final = ("disabled", "listening", "learning", "forwarding", "blocking")  # linux/if_bridge.h

# Seconds: whoever removes many links at once holds the kernel's lock for as long.
ANSWER_LIMIT: Final = 30.0
LARGEST_ANSWER: Final = 1 << 18
MOST_DUMPS: Final = 100  # each was interrupted by a change

# A bridge's group from when it is made until it has its mark: the kernel takes an alias of a link that exists, not of
# one that it is to make. Its letters are "kvmp".
HALF_MADE: Final = 0x6B766D70
# No STP: a guest sends from its first moment on, and no loop goes through a tap. No snooping: with a querier somewhere
# on the network, a guest that has just come by migration would get no multicast, IPv6's neighbour solicitations among
# it, until that asks again.
BRIDGE_SETTINGS: Final = {"IFLA_BR_STP_STATE": 0, "IFLA_BR_FORWARD_DELAY": 0, "IFLA_BR_MCAST_SNOOPING": 0}


class Link(NamedTuple):
    """A link as the kernel shows it. ``kind`` is empty for hardware, ``master`` is another's ifindex, 0 for none.

    ``below`` is the ifindex of what a VLAN is on, ``device`` the PCI address of hardware. ``learning``: it is a port
    whose bridge learns addresses from what comes in.
    """

    ifindex: int
    name: str
    kind: str = ""
    mac: str = ""
    mtu: int = 0
    up: bool = False
    master: int = 0
    alias: str = ""
    group: int = 0
    port_state: str = ""
    settings: tuple[tuple[str, int], ...] = ()
    below: int = 0
    device: str = ""
    learning: bool = False


class Vf(NamedTuple):
    """What a PF holds one of its virtual functions to. A MAC of zeros leaves it to the function, VLAN 0 is none."""

    mac: str
    vlan: int = 0
    qos: int = 0


class LinkError(HostError):
    """The kernel refused a request. ``errno`` is what it said, ``explained`` its own words, often none."""

    def __init__(self, number: int, explained: str) -> None:
        super().__init__(errno_name(number) + (f": {explained}" if explained else ""))
        self.errno = number


class Links:
    """The links of ``namespace``. One thread."""

    def __init__(self, namespace: NetworkNamespace) -> None:
        """Raises HostError."""
        self._socket = namespace.socket(socket.AF_NETLINK, socket.NETLINK_ROUTE)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.bind((0, 0))
        self._socket.settimeout(ANSWER_LIMIT)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def find(self, name: str) -> Link | None:
        """The link called ``name``, also where that is one of its other names."""
        return self._get(IFLA_IFNAME=name)

    def get(self, index: int) -> Link | None:
        """The link with that index. The kernel does not give an index to another link soon."""
        return self._get(index)

    def ports(self, index: int) -> list[Link]:
        """The ports of a bridge."""
        return [link for link in self._dump(IFLA_MASTER=index) if link.master == index]

    def marked(self, text: str) -> list[Link]:
        """Links with ``text`` in their alias, and those half made. (To decode a host's every link takes a while.)"""
        needles = text.encode(), struct.pack("I", HALF_MADE)
        return [link for link in self._dump(*needles) if text in link.alias or link.group == HALF_MADE]

    def create_bridge(self, name: str, mac: str, alias: str) -> Link:
        """A bridge, up, with BRIDGE_SETTINGS; the alias and HALF_MADE leave no moment in which it is nobody's."""
        info = [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", {"attrs": list(BRIDGE_SETTINGS.items())})]
        request = _message(IFLA_IFNAME=name, IFLA_ADDRESS=mac, IFLA_GROUP=HALF_MADE, IFLA_LINKINFO={"attrs": info})
        self.talk(RTM_NEWLINK, request, NLM_F_CREATE_NEW)
        try:
            made = self._require(name)
            self.change(made.ifindex, alias=alias, group=0, up=True)
            return self._require(name)
        except HostError:
            with contextlib.suppress(HostError):
                self.delete(self._require(name).ifindex)
            raise

    def change(
        self,
        index: int,
        *,
        alias: str | None = None,
        mtu: int | None = None,
        group: int | None = None,
        master: int | None = None,
        up: bool | None = None,
    ) -> None:
        """Set what is given. Raises LinkError, with what came before in this order possibly set."""
        values = {"IFLA_MTU": mtu, "IFLA_GROUP": group, "IFLA_IFALIAS": alias, "IFLA_MASTER": master}
        request = _message(index, **{name: value for name, value in values.items() if value is not None})
        if up is not None:
            request["flags"], request["change"] = IFF_UP if up else 0, IFF_UP
        self.talk(RTM_SETLINK, request)

    def set_learning(self, index: int, *, learning: bool) -> None:
        """Whether the bridge of the port ``index`` learns addresses from what comes in there."""
        data = {"attrs": [("IFLA_BRPORT_LEARNING", int(learning))]}
        info = {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", data)]}
        self.talk(RTM_NEWLINK, _message(index, IFLA_LINKINFO=info))

    def vf(self, index: int, number: int) -> Vf | None:
        """Virtual function ``number`` of the PF with that index."""
        mask = RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS
        answers, _ = self.talk(RTM_GETLINK, _message(index, IFLA_EXT_MASK=mask))
        return _vf(answers[0], number)

    def change_vf(
        self, index: int, number: int, *, mac: str | None = None, vlan: tuple[int, int] | None = None
    ) -> None:
        """Set its MAC, and its VLAN with the priority, where given. Raises LinkError, with the MAC possibly set."""
        wanted: list[tuple[str, dict[str, Any]]] = []
        if mac is not None:
            wanted.append(("IFLA_VF_MAC", {"vf": number, "mac": mac}))
        if vlan is not None:
            wanted.append(("IFLA_VF_VLAN", {"vf": number, "vlan": vlan[0], "qos": vlan[1]}))
        if wanted:
            functions = {"attrs": [("IFLA_VF_INFO", {"attrs": wanted})]}
            self.talk(RTM_SETLINK, _message(index, IFLA_VFINFO_LIST=functions))

    def delete(self, index: int) -> None:
        """Remove a link."""
        self.talk(RTM_DELLINK, _message(index))

    def _require(self, name: str) -> Link:
        if (link := self.find(name)) is None:
            raise LinkError(errno.ENODEV, "")
        return link

    def _get(self, index: int = 0, **attributes: Any) -> Link | None:
        try:
            answers, _ = self.talk(RTM_GETLINK, _message(index, IFLA_EXT_MASK=RTEXT_FILTER_SKIP_STATS, **attributes))
        except LinkError as e:
            if e.errno == errno.ENODEV:
                return None
            raise
        return _link(answers[0])

    def _dump(self, *needles: bytes, **attributes: Any) -> list[Link]:
        """The links that have one of ``needles`` in their message; which attributes filter, the kernel decides."""
        request = _message(IFLA_EXT_MASK=RTEXT_FILTER_SKIP_STATS, **attributes)
        for _ in range(MOST_DUMPS):
            answers, whole = self.talk(RTM_GETLINK, request, NLM_F_DUMP)
            if whole:
                return [_link(data) for data in answers if not needles or any(needle in data for needle in needles)]
        raise HostError("netlink: the list of links changes faster than it can be read")

    def talk(self, kind: int, request: Any, flags: int = 0) -> tuple[list[bytes], bool]:
        """Send a request; returns the answers, and whether they are of one moment. Raises LinkError, HostError."""
        self._sequence += 1
        header = request["header"]
        header["type"], header["sequence_number"] = kind, self._sequence
        header["flags"] = flags | NLM_F_REQUEST | NLM_F_ACK
        request.reset()
        request.encode()
        try:
            self._socket.send(request.data)
            return self._answers()
        except TimeoutError as e:
            raise HostError(
                f"netlink: no answer from the kernel in {ANSWER_LIMIT:g} s; see what holds up its network configuration"
            ) from e
        except OSError as e:
            raise HostError(f"netlink: {errno_name(e.errno or 0)}: {e.strerror}") from e

    def _answers(self) -> tuple[list[bytes], bool]:
        answers: list[bytes] = []
        whole = True
        while True:
            for kind, flags, data in self._receive():
                whole = whole and not flags & NLM_F_DUMP_INTR
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_error(kind, flags, data)
                    return answers, whole
                answers.append(data)

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        """The messages of one datagram: type, flags, and all of it. Leaves out what does not answer our request."""
        data, (sender, _) = self._socket.recvfrom(LARGEST_ANSWER)
        while len(data) >= HEADER.size:
            length, kind, flags, sequence, _ = HEADER.unpack_from(data)
            if sender == 0 and sequence == self._sequence:
                yield kind, flags, data[:length]
            data = data[_aligned(max(length, HEADER.size)) :]


def _message(index: int = 0, /, **attributes: Any) -> Any:
    message = Message()
    message["index"] = index
    message["attrs"] = list(attributes.items())
    return message


def _link(data: bytes) -> Link:
    message = Message(data)
    message.decode()
    has = _Attributes(message)
    info = has.within("IFLA_LINKINFO")
    bridge, port = info.within("IFLA_INFO_DATA"), info.within("IFLA_INFO_SLAVE_DATA")
    state = port["IFLA_BRPORT_STATE"]
    return Link(
        ifindex=message["index"],
        name=has["IFLA_IFNAME"],
        kind=info["IFLA_INFO_KIND"] or "",
        mac=has["IFLA_ADDRESS"] or "",
        mtu=has["IFLA_MTU"] or 0,
        up=bool(message["flags"] & IFF_UP),
        master=has["IFLA_MASTER"] or 0,
        alias=has["IFLA_IFALIAS"] or "",
        group=has["IFLA_GROUP"] or 0,
        port_state=PORT_STATES[state] if state in range(len(PORT_STATES)) else "",
        settings=tuple((name, value) for name in BRIDGE_SETTINGS if (value := bridge[name]) is not None),
        below=has["IFLA_LINK"] or 0,
        device=has["IFLA_PARENT_DEV_NAME"] or "" if has["IFLA_PARENT_DEV_BUS_NAME"] == "pci" else "",
        learning=bool(port["IFLA_BRPORT_LEARNING"]),
    )


class _Attributes:
    """What a message has, by its name; None for what it has not. (pyroute2 itself looks through all for each.)"""

    def __init__(self, message: Any) -> None:
        slots = message["attrs"] if isinstance(message, dict) and "attrs" in message else ()
        self._slots = {slot.name: slot for slot in reversed(slots)}

    def __getitem__(self, name: str) -> Any:
        slot = self._slots.get(name)
        return None if slot is None else slot.value

    def within(self, name: str) -> _Attributes:
        """Those of one of them."""
        return _Attributes(self[name])


def _vf(data: bytes, number: int) -> Vf | None:
    message = Message(data)
    message.decode()
    functions = message.get_attr("IFLA_VFINFO_LIST")
    for function in functions.get_attrs("IFLA_VF_INFO") if functions else ():
        mac, vlan = function.get_attr("IFLA_VF_MAC"), function.get_attr("IFLA_VF_VLAN")
        if mac and mac["vf"] == number:
            return Vf(mac["mac"], vlan["vlan"], vlan["qos"]) if vlan else Vf(mac["mac"])
    return None


def _raise_error(kind: int, flags: int, data: bytes) -> None:
    """Raises LinkError where an acknowledgement is a refusal, or the end of a dump is not that of all.

    After the error's number an acknowledgement repeats our header; then come the kernel's words.
    """
    code = int.from_bytes(data[HEADER.size : HEADER.size + 4], sys.byteorder, signed=True)
    if code >= 0:
        return
    explained = ""
    words = HEADER.size + 4 + (HEADER.size if kind == NLMSG_ERROR else 0)
    attributes = data[words:] if flags & NLM_F_ACK_TLVS else b""
    while len(attributes) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(attributes)
        if kind == NLMSGERR_ATTR_MSG:
            explained = attributes[ATTRIBUTE.size : length].rstrip(b"\0").decode(errors="replace")
        attributes = attributes[_aligned(max(length, ATTRIBUTE.size)) :]
    raise LinkError(-code, explained)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
