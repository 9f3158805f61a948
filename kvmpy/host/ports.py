"""Ports and bridges of one network namespace, as the network helper changes them for its machine and takes them back.

Every change is made under the namespace's lock: a machine that joins a bridge makes it and puts its port in at once,
and one that leaves removes it if it is kvmpy's and no port is left. So a bridge of kvmpy's without a port is in
nobody's hands, and whoever made it can leave before the others.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from functools import partial
from typing import Any, Final

from kvmpy.errors import HostError
from kvmpy.host.changes import Refused, attempt, said
from kvmpy.host.links import BRIDGE_SETTINGS, HALF_MADE, Link, LinkError, Links
from kvmpy.host.netns import NetworkNamespace
from kvmpy.host.ownership import LONGEST, PREFIX, Before, Mark

# Seconds that the kernel may take to let a new port of a bridge of ours forward; it learns of the carrier a bit later.
FORWARDING_LIMIT: Final = 5.0
FORWARDING_POLL: Final = 0.005
MACHINE_ID, BOOT_ID = "/etc/machine-id", "/proc/sys/kernel/random/boot_id"


class Namespace:
    """What the machine ``owner`` has changed in one network namespace."""

    def __init__(self, namespace: NetworkNamespace, links: Links, owner: Mark) -> None:
        self._namespace, self.links, self._owner = namespace, links, owner
        # Interfaces as they were and as we wanted them, and the bridges they joined, by index: a name may change hands.
        self._ports: list[tuple[Link, Link]] = []
        self._bridges: set[int] = set()
        self._unlearning: set[int] = set()
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

    def set_learning(self, port: Link, *, learning: bool) -> None:
        """Whether the bridge of ``port`` learns addresses from it. To allow that again undoes what we have done alone.

        The mark says what there was before that is changed, so that a next start could put it back. Raises LinkError.
        """
        if learning:
            mark = Mark.parse(port.alias)
            noted = mark is not None and mark.owner == self._owner and mark.before is not None and mark.before.learned
            if noted or port.ifindex in self._unlearning:  # noted by a helper before us, where we do not know it
                self.links.set_learning(port.ifindex, learning=True)
                self._note_learning(port, learned=False)
                self._unlearning.discard(port.ifindex)
        elif port.learning:
            self._note_learning(port, learned=True)
            self._unlearning.add(port.ifindex)
            self.links.set_learning(port.ifindex, learning=False)

    def _note_learning(self, port: Link, *, learned: bool) -> None:
        number = next((n for n, (_, wanted) in enumerate(self._ports) if wanted.ifindex == port.ifindex), None)
        before, wanted = (port, port) if number is None else self._ports[number]
        earlier = Before(before.master, before.mtu, before.up, before.alias, learned)
        mark = self._owner._replace(before=earlier)
        if len(mark.text.encode()) > LONGEST or wanted.alias != port.alias:
            return
        wanted = wanted._replace(alias=mark.text)
        self.links.change(port.ifindex, alias=wanted.alias)
        if number is None:
            self._ports.append((before, wanted))
        else:
            self._ports[number] = before, wanted

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
        return [str(problem) for step in steps if (problem := attempt(step))]

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
            raise Refused.by_kernel(key, f"{link.name}: {said(change)}", e) from e

    def _restore(self, before: Link, wanted: Link) -> None:
        """Put back what is still as we made it. One that has another mark by now is no longer ours."""
        now = self.links.get(before.ifindex)
        if now is None or now.alias != wanted.alias:
            return
        if before.ifindex in self._unlearning and now.master:
            self._unlearning.discard(before.ifindex)
            self.links.set_learning(before.ifindex, learning=True)
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
                    attempt(partial(self.links.delete, link.ifindex))
            elif mark.machine == self._owner.machine and not mark.alive():
                attempt(partial(self._clear, link, mark.before))

    def _clear(self, link: Link, before: Before | None) -> None:
        if before is None:
            self._leave_bridge(link.ifindex)
            return
        if before.learned:
            self._unlearning.add(link.ifindex)
        was = link._replace(master=before.master, mtu=before.mtu, up=before.up, alias=before.alias)
        self._restore(was, link)
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
                bridge = self.links.get(bridge.ifindex) or bridge
                slow = not bridge.up or dict(bridge.settings).get("IFLA_BR_STP_STATE")
                if port.port_state == "forwarding" or slow or time.monotonic() > deadline:
                    break
                time.sleep(FORWARDING_POLL)
                port = self.links.get(port.ifindex) or port
        return port, bridge


def _changed(before: Link, now: Link, port: Link) -> list[str]:
    """What a port has done to a bridge of the operator's: whatever that was not given, it has of its ports."""
    pairs = (("address", before.mac, now.mac), ("mtu", before.mtu, now.mtu))
    return [
        f"{now.name}: its {what} went from {old} to {new} with the port {port.name}; "
        f"to keep it: ip link set {now.name} {what} {old}"
        for what, old, new in pairs
        if old != new and not Mark.parse(now.alias)
    ]


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
