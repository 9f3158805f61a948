"""The network helper: a small process beside the VMM that has CAP_NET_ADMIN and pyroute2, and changes links for it.

    python -m kvmpy.host.netlink MACHINE PID STARTED        descriptor 3 is a socket to that process, the VMM

The VMM imports nothing while vCPUs run, and can do without what pyroute2 takes. A line of JSON comes in, one goes back:
{"do": "attach", ...} gives {"ok": {...}}, or {"error": "why not", "key": "bridge"}. When the socket closes, also
because the VMM was killed, the helper takes back what it has changed, says in a last line {"left": [...]} what it could
not, and ends. Where it is killed too, the marks of `kvmpy.host.ownership` tell the machine's next start what it left.

Every change is made under the namespace's lock: a machine that joins a bridge makes it and puts its port in at once,
and one that leaves removes it if it is kvmpy's and no port is left. So a bridge of kvmpy's without a port is in
nobody's hands, and whoever made it can leave before the others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from kvmpy.errors import HostError
from kvmpy.host.links import BRIDGE_SETTINGS, HALF_MADE, Link, LinkError, Links, Vf
from kvmpy.host.netns import NetworkNamespace
from kvmpy.host.ownership import LONGEST, PREFIX, Before, Mark

CONTROL: Final = 3
# Bytes of a request: it holds names and a path.
LONGEST_LINE: Final = 1 << 16
LONGEST_NAME: Final = 15
LONGEST_PATH: Final = 4096
LARGEST_MTU: Final = 65535
LARGEST_VF, LARGEST_VLAN, LARGEST_QOS = 65535, 4094, 7
MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
MOST_DESCRIPTORS: Final = 1 << 20
# Seconds that the kernel may take to let a new port of a bridge of ours forward; it learns of the carrier a bit later.
FORWARDING_LIMIT: Final = 5.0
FORWARDING_POLL: Final = 0.005
MACHINE_ID, BOOT_ID = "/etc/machine-id", "/proc/sys/kernel/random/boot_id"

ADVICE: Final = {
    errno.EPERM: "changing it needs CAP_NET_ADMIN; run as root",
    errno.EOPNOTSUPP: "this kernel has no bridges; modprobe bridge",
    errno.ENODEV: "it has been removed meanwhile",
}


VF_ADVICE: Final = ADVICE | {
    errno.EOPNOTSUPP: "the PF's driver cannot set it",
    errno.EINVAL: "the PF's driver does not take it",
    errno.EBUSY: "the PF is being reset; try again",
}


class Refused(HostError):
    """A request that cannot be granted; ``key`` is the configuration's for what is in the way."""

    def __init__(self, key: str, why: object) -> None:
        super().__init__(str(why))
        self.key = key

    @classmethod
    def by_kernel(cls, key: str, what: str, e: LinkError) -> Refused:
        """The kernel's refusal, with advice."""
        advice = ADVICE.get(e.errno)
        return cls(key, f"{what}: {e}" + (f": {advice}" if advice else ""))


class Namespace:
    """What the machine ``owner`` has changed in one network namespace."""

    def __init__(self, namespace: NetworkNamespace, links: Links, owner: Mark) -> None:
        self._namespace, self.links, self._owner = namespace, links, owner
        # Interfaces as they were and as we wanted them, and the bridges they joined, by index: a name may change hands.
        self._ports: list[tuple[Link, Link]] = []
        self._bridges: set[int] = set()
        self._leftovers_cleared = False

    def attach(self, ifname: str, bridge: str | None, mtu: int | None) -> dict[str, Any]:
        """Take the interface up, with ``mtu`` bytes or its bridge's, as a port of ``bridge``; returns what came of it.

        Raises Refused, with everything as it was.
        """
        with self._namespace.locked():
            self._clear_leftovers()
            interface = self.links.find(ifname)
            if interface is None:
                raise Refused("ifname", f"{ifname}: there is no such interface in its network namespace")
            ports, bridges = len(self._ports), set(self._bridges)
            try:
                joined = self._join_bridge(bridge) if bridge is not None else None
                port = self._change(interface, joined, mtu)
            except HostError:
                self._take_back(self._ports[ports:], self._bridges - bridges)
                del self._ports[ports:]
                self._bridges = bridges
                raise
        return self._facts(port, joined)

    def detach(self, ifname: str) -> list[str]:
        """Take back what `attach` did for ``ifname``, and leave bridges without a port of ours."""
        with self._namespace.locked():
            mine = [pair for pair in self._ports if pair[0].name == ifname]
            self._ports = [pair for pair in self._ports if pair not in mine]
            left = self._bridges - {wanted.master for _, wanted in self._ports}
            self._bridges -= left
            return self._take_back(mine, left)

    def close(self) -> list[str]:
        """Take everything back; returns what could not be."""
        try:
            with self._namespace.locked():
                return self._take_back(self._ports, self._bridges)
        except HostError as e:
            return [str(e)]
        finally:
            self.links.close()
            self._namespace.close()

    def _take_back(self, ports: list[tuple[Link, Link]], bridges: set[int]) -> list[str]:
        steps = [partial(self._restore, before, wanted) for before, wanted in reversed(ports)]
        steps += [partial(self._leave_bridge, index) for index in bridges]
        return [str(problem) for step in steps if (problem := _attempt(step))]

    # The interface

    def _change(self, before: Link, bridge: Link | None, mtu: int | None) -> Link:
        """Make it a port, from what it was; its mark says what that is before the first change."""
        wanted = before._replace(up=True, mtu=mtu or (bridge.mtu if bridge else before.mtu))
        if bridge:
            wanted = wanted._replace(master=bridge.ifindex)
        if wanted == before:
            return before
        mark = self._owner._replace(before=Before(before.master, before.mtu, before.up, before.alias))
        if len(mark.text.encode()) <= LONGEST:
            wanted = wanted._replace(alias=mark.text)
        self._ports.append((before, wanted))
        self._set("ifname", before, alias=wanted.alias)
        if wanted.mtu != before.mtu:
            self._set("ifname", before, mtu=wanted.mtu)
        if wanted.master != before.master:
            self._set("bridge", before, master=wanted.master)
        self._set("ifname", before, up=True)
        now = self.links.get(before.ifindex)
        if now is None or (now.mtu, now.up, now.master) != (wanted.mtu, wanted.up, wanted.master):
            raise Refused("ifname", f"{before.name}: is {now} after it was made {wanted}: who else configures it?")
        return now

    def _set(self, key: str, link: Link, **change: Any) -> None:
        try:
            self.links.change(link.ifindex, **change)
        except LinkError as e:
            raise Refused.by_kernel(key, f"{link.name}: {_said(change)}", e) from e

    def _restore(self, before: Link, wanted: Link) -> None:
        """Put back what is still as we made it. One that has another mark by now is no longer ours."""
        now = self.links.get(before.ifindex)
        if now is None or now.alias != wanted.alias:
            return
        for field in ("master", "up", "mtu", "alias"):  # the mark last: until then a next start could do it
            old = getattr(before, field)
            if getattr(now, field) == getattr(wanted, field) != old:
                if field == "master" and old and self.links.get(old) is None:
                    old = 0
                self.links.change(before.ifindex, **{field: old})

    # The bridge

    def _join_bridge(self, name: str) -> Link:
        """The bridge of that name, made where there is none. One that is nobody's any more becomes ours."""
        try:
            bridge = self.links.find(name) or self._make_bridge(name)
            if bridge.kind != "bridge":
                kind = f"a {bridge.kind}" if bridge.kind else "a network interface of another kind"
                raise Refused("bridge", f"{name}: is {kind}, not a bridge; choose another name, or leave bridge out")
            mark = Mark.parse(bridge.alias)
            if bridge.group == HALF_MADE or (mark and not mark.alive()):
                self.links.change(bridge.ifindex, alias=self._owner.text, group=0, up=True)
        except LinkError as e:
            raise Refused.by_kernel("bridge", name, e) from e
        self._bridges.add(bridge.ifindex)
        return bridge

    def _make_bridge(self, name: str) -> Link:
        mac = bridge_mac(name, self._namespace.inode)
        made = self.links.create_bridge(name, mac, self._owner.text)
        self._bridges.add(made.ifindex)
        wrong = [pair for pair in made.settings if BRIDGE_SETTINGS[pair[0]] != pair[1]]
        if wrong or not made.up or made.mac != mac or made.alias != self._owner.text:
            raise Refused("bridge", f"{name}: is {made} after it was made: who else configures it?")
        return made

    def _leave_bridge(self, index: int) -> None:
        """Remove it if it is kvmpy's, not another living machine's, and has no port; else hand it to a port's owner."""
        bridge = self.links.get(index)
        mark = Mark.parse(bridge.alias) if bridge else None
        if bridge is None or bridge.kind != "bridge" or mark is None or (mark != self._owner and mark.alive()):
            return
        ports = self.links.ports(index)
        if not ports:
            self.links.delete(index)
            return
        owners = (found.owner for port in ports if (found := Mark.parse(port.alias)))
        heir = next((owner for owner in owners if owner != self._owner and owner.alive()), None)
        if heir:
            self.links.change(index, alias=heir.text)

    # What is left over

    def _clear_leftovers(self) -> None:
        """Once: what an earlier process of this machine left here, and bridges that never got anybody's mark."""
        if self._leftovers_cleared:
            return
        self._leftovers_cleared = True
        for link in self.links.marked(PREFIX):
            mark = Mark.parse(link.alias)
            if mark is None:
                # Nobody is just making it: we have the lock.
                if link.group == HALF_MADE:
                    _attempt(partial(self.links.delete, link.ifindex))
            elif mark.machine == self._owner.machine and not mark.alive():
                _attempt(partial(self._clear, link, mark.before))

    def _clear(self, link: Link, before: Before | None) -> None:
        if before is None:
            self._leave_bridge(link.ifindex)
            return
        self._restore(link._replace(**before._asdict()), link)
        if link.master not in (0, before.master):
            self._leave_bridge(link.master)

    # What came of it

    def _facts(self, port: Link, joined: Link | None) -> dict[str, Any]:
        port, bridge = self._forwarding(port, joined)
        return {
            "mtu": port.mtu,
            "mac": port.mac,
            "state": port.port_state,
            "bridge_mac": bridge.mac if bridge else "",
            "bridge_up": bridge.up if bridge else False,
            "bridge_owned": bool(bridge and Mark.parse(bridge.alias)),
            "bridge_changed": _changed(joined, bridge, port) if joined and bridge else [],
        }

    def _forwarding(self, port: Link, bridge: Link | None) -> tuple[Link, Link | None]:
        """Both as they are once frames pass, or are known not to pass yet: a bridge with STP takes its time."""
        deadline = time.monotonic() + FORWARDING_LIMIT
        with suppress(HostError):  # it is attached: what we know of it by now will do
            while bridge is not None:
                port = self.links.get(port.ifindex) or port
                bridge = self.links.get(bridge.ifindex) or bridge
                slow = not bridge.up or dict(bridge.settings).get("IFLA_BR_STP_STATE")
                if port.port_state == "forwarding" or slow or time.monotonic() > deadline:
                    break
                time.sleep(FORWARDING_POLL)
        return port, bridge


class VirtualFunctions:
    """What the machine has set at virtual functions, through their PFs."""

    def __init__(self, links: Links) -> None:
        self._links = links
        # As they were and as we wanted them, by the PF's index and their number.
        self._changed: dict[tuple[int, int], tuple[Vf, Vf]] = {}

    def change(self, interface: str, number: int, mac: str | None, vlan: int | None) -> dict[str, Any]:
        """Set what is given; returns what there was and what there is. Raises Refused, with everything as it was."""
        pf, before = self._find(interface, number)
        wanted = Vf(mac or before.mac, *((before.vlan, before.qos) if vlan is None else (vlan, 0)))
        if wanted != before:
            try:
                self._set(pf, number, before, wanted)
            except HostError:
                _attempt(partial(self._set, pf, number, wanted, before))  # all of it: how far it came is not known
                raise
            first, _ = self._changed.get((pf.ifindex, number), (before, wanted))
            self._changed[pf.ifindex, number] = first, wanted
        return {"before": before._asdict(), "after": wanted._asdict()}

    def put_back(self, interface: str, number: int, **settings: Any) -> dict[str, Any]:
        """Make of one that is as in ``ours_...`` what it was, ``was_...``, and forget it; any other is left alone."""
        pf, now = self._find(interface, number)
        ours, was = (Vf(*(settings[f"{when}_{field}"] for field in Vf._fields)) for when in ("ours", "was"))
        self._changed.pop((pf.ifindex, number), None)
        if now == ours != was:
            self._set(pf, number, now, was)
            now = was
        return {"before": was._asdict(), "after": now._asdict()}

    def close(self) -> list[str]:
        """Put back what is still as we made it; returns what could not be."""
        steps = [partial(self._put_back, *place, ours, was) for place, (was, ours) in self._changed.items()]
        return [str(problem) for step in steps if (problem := _attempt(step))]

    def _put_back(self, index: int, number: int, ours: Vf, was: Vf) -> None:
        pf = self._links.get(index)
        if pf and ours != was and self._links.vf(index, number) == ours:
            self._set(pf, number, ours, was)

    def _find(self, interface: str, number: int) -> tuple[Link, Vf]:
        try:
            pf = self._links.find(interface)
            function = self._links.vf(pf.ifindex, number) if pf else None
        except LinkError as e:
            raise Refused.by_kernel("host", interface, e) from e
        if pf is None or function is None:
            raise Refused("host", f"{interface}: has no virtual function {number} that it can set anything of")
        return pf, function

    def _set(self, pf: Link, number: int, before: Vf, wanted: Vf) -> None:
        place = f"{pf.name}: virtual function {number}"
        mac = wanted.mac if wanted.mac != before.mac else None
        vlan = wanted[1:] if wanted[1:] != before[1:] else None
        key = "mac" if mac else "vlan"
        try:
            self._links.change_vf(pf.ifindex, number, mac=mac, vlan=vlan)
        except LinkError as e:
            advice = VF_ADVICE.get(e.errno, "see dmesg")
            raise Refused(key, f"{place}: {_said(wanted._asdict())}: {e}: {advice}") from e
        if (now := self._links.vf(pf.ifindex, number)) != wanted:
            raise Refused(key, f"{place}: is {now} after it was made {wanted}: who else configures it?")


class Helper:
    """The requests of one VMM, and what has to be taken back when it goes."""

    def __init__(self, owner: Mark) -> None:
        self._owner = owner
        self._namespaces: dict[str | None, Namespace] = {}
        self._functions: VirtualFunctions | None = None

    def attach(self, *, ifname: str, bridge: str | None, mtu: int | None, netns: str | None) -> dict[str, Any]:
        """See Namespace.attach; ``netns`` is the path of the namespace, None for our own. Raises HostError."""
        return self._namespace(netns).attach(ifname, bridge, mtu)

    def detach(self, *, ifname: str, netns: str | None) -> None:
        """See Namespace.detach. Raises HostError with what could not be taken back."""
        if left := self._namespace(netns).detach(ifname):
            raise HostError("; ".join(left))

    def set_vf(self, *, interface: str, number: int, mac: str | None, vlan: int | None) -> dict[str, Any]:
        """See VirtualFunctions.change. Raises HostError."""
        return self._virtual_functions().change(interface, number, mac, vlan)

    def put_vf_back(self, **request: Any) -> dict[str, Any]:
        """See VirtualFunctions.put_back. Raises HostError."""
        return self._virtual_functions().put_back(**request)

    def close(self) -> list[str]:
        """Take everything back; returns what could not be."""
        left = self._functions.close() if self._functions else []
        return left + [problem for namespace in self._namespaces.values() for problem in namespace.close()]

    def _virtual_functions(self) -> VirtualFunctions:
        """Those of our own namespace: a PF that serves machines is the host's."""
        if self._functions is None:
            self._functions = VirtualFunctions(self._namespace(None).links)
        return self._functions

    def _namespace(self, path: str | None) -> Namespace:
        if path not in self._namespaces:
            try:
                namespace = NetworkNamespace(path)
                self._namespaces[path] = Namespace(namespace, Links(namespace), self._owner)
            except HostError as e:
                raise Refused("netns", e) from e
        return self._namespaces[path]


def _changed(before: Link, now: Link, port: Link) -> list[str]:
    """What a port has done to a bridge of the operator's: whatever that was not given, it has of its ports."""
    pairs = (("address", before.mac, now.mac), ("mtu", before.mtu, now.mtu))
    return [
        f"{now.name}: its {what} went from {old} to {new} with the port {port.name}; "
        f"to keep it: ip link set {now.name} {what} {old}"
        for what, old, new in pairs
        if old != new and not Mark.parse(now.alias)
    ]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= LONGEST_NAME


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value.startswith("/") and len(value) <= LONGEST_PATH


def _is_mtu(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST_MTU


def _is_mac(value: object) -> bool:
    return isinstance(value, str) and MAC.fullmatch(value) is not None


def _is_number(largest: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 0 <= value <= largest


# What a request carries, each with its test: the VMM is trusted no more than it has to be. A guest may be in it.
Fields = dict[str, tuple[Callable[[object], bool], str]]
ATTACH: Final[Fields] = {
    "ifname": (_is_name, "an interface's name"),
    "bridge": (_is_name, "an interface's name"),
    "mtu": (_is_mtu, "an MTU"),
    "netns": (_is_path, "the path of a network namespace"),
}
VLAN: Final = (_is_number(LARGEST_VLAN), "a VLAN")
FUNCTION: Final[Fields] = {
    "interface": (_is_name, "an interface's name"),
    "number": (_is_number(LARGEST_VF), "a virtual function's number"),
}
SET_VF: Final[Fields] = {**FUNCTION, "mac": (_is_mac, "a MAC address"), "vlan": VLAN}
PUT_VF_BACK: Final[Fields] = FUNCTION | {
    f"{when}_{field}": test
    for when in ("ours", "was")
    for field, test in {
        "mac": (_is_mac, "a MAC address"),
        "vlan": VLAN,
        "qos": (_is_number(LARGEST_QOS), "a priority"),
    }.items()
}
OPTIONAL: Final = frozenset({"bridge", "mtu", "netns", "mac", "vlan"})  # may be null
DETACH: Final[Fields] = {"ifname": ATTACH["ifname"], "netns": ATTACH["netns"]}
REQUESTS: Final[dict[str, tuple[Callable[..., dict[str, Any] | None], Fields]]] = {
    "attach": (Helper.attach, ATTACH),
    "detach": (Helper.detach, DETACH),
    "set-vf": (Helper.set_vf, SET_VF),
    "put-vf-back": (Helper.put_vf_back, PUT_VF_BACK),
}


def serve(control: socket.socket, helper: Helper) -> None:
    """Answer each line until the socket closes, or a line is cut off or too long."""
    with control.makefile("rb") as lines:
        try:
            while (line := lines.readline(LONGEST_LINE)).endswith(b"\n"):
                control.sendall(_line(answer(helper, line)))
        except OSError:  # the VMM has gone, with an answer of ours unread or a question half asked
            return


def answer(helper: Helper, line: bytes) -> dict[str, Any]:
    """The reply to one line."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"error": "expected a line of JSON", "key": ""}
    name = request.pop("do", None) if isinstance(request, dict) else None
    if not isinstance(name, str) or name not in REQUESTS:
        return {"error": "expected one of the requests " + ", ".join(REQUESTS), "key": ""}
    function, fields = REQUESTS[name]
    if request.keys() != fields.keys():
        return {"error": f"{name}: expected {', '.join(fields)}", "key": ""}
    for field, (is_good, what) in fields.items():
        value = request[field]
        if not is_good(value) and not (value is None and field in OPTIONAL):
            return {"error": f"{str(value)[:100]!a}: cannot be {what}", "key": field}
    try:
        return {"ok": function(helper, **request)}
    except HostError as e:
        return {"error": str(e), "key": e.key if isinstance(e, Refused) else ""}


def bridge_mac(name: str, inode: int) -> str:
    """A locally administered address for a bridge of ours in namespace ``inode``: the same while host and that last.

    Left to itself a bridge takes the lowest of its ports' addresses, and changes it as they come and go.
    """
    host = _read(MACHINE_ID) or _read(BOOT_ID)
    first, *others = hashlib.blake2b(f"{host} {inode} {name}".encode(), digest_size=6).digest()
    return ":".join(f"{byte:02x}" for byte in (first & 0xFC | 0x02, *others))


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _said(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in change.items())


def _attempt(step: Callable[[], object]) -> HostError | None:
    """What went wrong, None where nothing did."""
    try:
        step()
    except HostError as e:
        return e
    return None


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def main(arguments: list[str]) -> int:
    """Serve the VMM named by ``arguments`` until it closes the socket."""
    os.closerange(CONTROL + 1, MOST_DESCRIPTORS)
    machine, pid, started = arguments
    helper = Helper(Mark(machine, int(pid), int(started)))
    with socket.socket(fileno=CONTROL) as control:
        try:
            serve(control, helper)
        finally:
            _say_left(control, helper.close())
    return 0


def _say_left(control: socket.socket, left: list[str]) -> None:
    """To the VMM, also where it is nothing; where that has been killed, to whoever reads its standard error."""
    try:
        control.sendall(_line({"left": left}))
    except OSError:
        sys.stderr.writelines(f"kvmpy: network: {problem}\n" for problem in left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
