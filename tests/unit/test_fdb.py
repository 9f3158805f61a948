"""Who is told where a failover pair's guest is: what the network helper asks of the kernel, and what it makes of it."""

from __future__ import annotations

import errno
import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpy.errors import HostError
from kvmpy.host.fdb import NTF_MASTER, NTF_SELF, NTF_STICKY, RTM_DELNEIGH, RTM_NEWNEIGH, Fdb
from kvmpy.host.links import Link, LinkError, Links
from kvmpy.host.netlink import Helper, answer
from kvmpy.host.netns import NetworkNamespace
from kvmpy.host.ownership import Before, Mark, process_start
from kvmpy.host.ports import Namespace

ME = Mark("web1", os.getpid(), process_start(os.getpid()))
MAC = "52:54:00:6f:55:cc"
BRIDGE, TAP, UPLINK = 1, 2, 3
PF, VF, PLAIN = "0000:5e:00.0", "0000:5e:10.1", "0000:02:00.0"
STEER = {
    "do": "steer",
    "ifname": "tap0",
    "netns": None,
    "address": MAC,
    "uplinks": ["eth0"],
    "here": True,
    "learn": True,
}


class FakeLinks(Links):
    """``links`` by index; ``entries`` are (ifindex, flags, MAC), ``refuses`` errnos of new ones by ifindex.

    Nothing is to be heard of those in ``lost``.
    """

    def __init__(self, *links: Link) -> None:
        self.links = {link.ifindex: link for link in links}
        self.entries: set[tuple[int, int, str]] = set()
        self.refuses: dict[int, int] = {}
        self.lost: set[int] = set()
        self.learning: list[tuple[int, bool]] = []

    def find(self, name: str) -> Link | None:
        return next((link for link in self.links.values() if link.name == name), None)

    def get(self, index: int) -> Link | None:
        if index in self.lost:
            raise HostError("netlink: no answer")
        return self.links.get(index)

    def ports(self, index: int) -> list[Link]:
        return [link for link in self.links.values() if link.master == index]

    def change(self, index: int, **changes: Any) -> None:
        self.links[index] = self.links[index]._replace(**changes)

    def set_learning(self, index: int, *, learning: bool) -> None:
        self.learning.append((index, learning))
        self.change(index, learning=learning)

    def talk(self, kind: int, request: Any, flags: int = 0) -> tuple[list[bytes], bool]:
        own = request["flags"] & ~NTF_STICKY
        entry = request["ifindex"], own, dict(request["attrs"])["NDA_LLADDR"]
        if kind == RTM_NEWNEIGH and own == NTF_MASTER:
            assert request["flags"] & NTF_STICKY
            self.entries.add(entry)
        elif kind == RTM_NEWNEIGH:
            if entry[0] in self.refuses or entry in self.entries:
                raise LinkError(self.refuses.get(entry[0], errno.EEXIST), "")
            self.entries.add(entry)
        else:
            assert kind == RTM_DELNEIGH
            if entry not in self.entries:
                raise LinkError(errno.ENOENT, "")
            self.entries.discard(entry)
        return [], True

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def pci(tmp_path: Path) -> str:
    """A NIC with virtual functions, one of those, and a NIC without."""
    for device, name in ((PF, "virtfn0"), (VF, "physfn"), (PLAIN, "config")):
        (tmp_path / device / name).mkdir(parents=True)
    return str(tmp_path)


@pytest.fixture
def links() -> FakeLinks:
    bridge = Link(BRIDGE, "br0", kind="bridge")
    return FakeLinks(
        bridge,
        Link(TAP, "tap0", kind="tun", master=BRIDGE, learning=True),
        Link(UPLINK, "eth0", master=BRIDGE, device=PF),
    )


@pytest.fixture
def fdb(links: FakeLinks, pci: str) -> Fdb:
    namespace = cast("NetworkNamespace", SimpleNamespace(close=lambda: None))
    return Fdb(Namespace(namespace, links, ME), pci)


def test_the_uplinks_are_those_with_a_switch_of_their_own(links: FakeLinks, fdb: Fdb) -> None:
    more = (
        Link(4, "eth1", master=BRIDGE, device=VF),
        Link(5, "eth2", master=BRIDGE, device=PLAIN),
        Link(6, "vlan7", kind="vlan", master=BRIDGE, below=7),
        Link(7, "eth3", device=PF),
        Link(8, "bond0", kind="bond", master=BRIDGE),
        Link(9, "eth4", master=8, device=PF),
        Link(10, "eth5", master=8, device=PLAIN),
        Link(11, "tap9", kind="tun", master=BRIDGE),
        Link(12, "eth6", device=PF),
    )
    links.links.update({link.ifindex: link for link in more})
    assert fdb.uplinks("tap0") == {"uplinks": ["eth0", "eth1", "eth3", "eth4"]}


@pytest.mark.parametrize("master", [0, 20])
def test_a_tap_on_no_bridge_of_the_kernels_has_none_and_nobody_is_told(links: FakeLinks, fdb: Fdb, master: int) -> None:
    links.links[20] = Link(20, "ovs-system", kind="openvswitch")
    links.change(TAP, master=master)
    assert fdb.uplinks("tap0") == {"uplinks": []}
    assert fdb.steer("tap0", MAC, [], here=False, learn=False) == {"problems": [], "made": []}
    assert links.learning == []


def test_links_that_go_round_in_circles_are_no_uplinks(links: FakeLinks, fdb: Fdb) -> None:
    links.links[6] = Link(6, "vlan7", kind="vlan", master=BRIDGE, below=6)
    assert fdb.uplinks("tap0") == {"uplinks": ["eth0"]}


def test_r46_on_the_way_to_the_primary_the_bridge_forgets_the_guest_and_learns_nothing(
    links: FakeLinks, fdb: Fdb
) -> None:
    links.entries.add((TAP, NTF_MASTER, MAC))
    assert fdb.steer("tap0", MAC, [], here=False, learn=False) == {"problems": [], "made": []}
    assert (links.entries, links.learning) == (set(), [(TAP, False)])
    assert Mark.parse(links.links[TAP].alias) == ME._replace(before=Before(BRIDGE, 0, False, "", learned=True))
    fdb.steer("tap0", MAC, [], here=True, learn=True)
    assert links.learning == [(TAP, False), (TAP, True)]


def test_r46_a_bridge_without_such_an_entry_is_no_problem(fdb: Fdb) -> None:
    assert fdb.steer("tap0", MAC, [], here=False, learn=False)["problems"] == []


def test_a_port_that_its_operator_keeps_from_learning_is_kept_so(links: FakeLinks, fdb: Fdb) -> None:
    links.change(TAP, learning=False)
    fdb.steer("tap0", MAC, [], here=False, learn=False)
    fdb.steer("tap0", MAC, [], here=True, learn=True)
    assert (links.learning, links.links[TAP].alias) == ([], "")


def test_a_new_helper_lets_learn_again_what_the_one_before_it_did_not(links: FakeLinks, pci: str) -> None:
    namespace = cast("NetworkNamespace", SimpleNamespace(close=lambda: None))
    Fdb(Namespace(namespace, links, ME), pci).steer("tap0", MAC, [], here=False, learn=False)
    Fdb(Namespace(namespace, links, ME), pci).steer("tap0", MAC, [], here=True, learn=True)
    assert links.learning == [(TAP, False), (TAP, True)]


def test_on_the_standby_the_uplink_has_an_entry_and_on_the_primary_none(links: FakeLinks, fdb: Fdb) -> None:
    assert fdb.steer("tap0", MAC, ["eth0"], here=True, learn=True) == {"problems": [], "made": ["eth0"]}
    assert links.entries == {(TAP, NTF_MASTER, MAC), (UPLINK, NTF_SELF, MAC)}
    assert fdb.steer("tap0", MAC, ["eth0"], here=True, learn=True)["made"] == [], "nothing new"
    fdb.steer("tap0", MAC, ["eth0"], here=False, learn=False)
    assert links.entries == set()
    assert fdb.close() == []


def test_an_entry_that_somebody_else_made_is_not_ours_to_remove(links: FakeLinks, fdb: Fdb) -> None:
    links.entries.add((UPLINK, NTF_SELF, MAC))
    assert fdb.steer("tap0", MAC, ["eth0"], here=True, learn=True) == {"problems": [], "made": []}
    assert fdb.close() == []
    assert links.entries == {(UPLINK, NTF_SELF, MAC)}


def test_what_was_made_goes_with_the_helper(links: FakeLinks, fdb: Fdb) -> None:
    fdb.steer("tap0", MAC, ["eth0"], here=True, learn=True)
    assert fdb.close() == []
    assert links.entries == set()


def test_a_link_that_cannot_be_looked_up_keeps_nobody_from_the_rest(
    links: FakeLinks, fdb: Fdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = cast("NetworkNamespace", SimpleNamespace(close=lambda: None, locked=nullcontext))
    ports, helper = Namespace(namespace, links, ME), Helper(ME)
    helper._fdbs, helper._namespaces = {None: fdb}, {None: ports}
    monkeypatch.setattr(ports, "_take_back", lambda ports, bridges: ["the ports too"])
    fdb.steer("tap0", MAC, ["eth0"], here=True, learn=True)
    links.lost.add(TAP)
    assert helper.close() == ["netlink: no answer", "the ports too"]
    assert links.entries == {(TAP, NTF_MASTER, MAC)}


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOMEM, errno.EIO])
def test_a_nic_that_takes_no_entry_is_a_problem_with_advice_and_keeps_nobody_from_the_rest(
    links: FakeLinks, fdb: Fdb, number: int
) -> None:
    links.links[4] = Link(4, "eth1", master=BRIDGE, device=VF)
    links.refuses[UPLINK] = number
    steered = fdb.steer("tap0", MAC, ["eth0", "eth1"], here=True, learn=True)
    assert steered["made"] == ["eth1"]
    (problem,) = steered["problems"]
    assert problem.startswith(f"eth0: its switch cannot be told of {MAC}: {errno.errorcode[number]}: ")
    assert ("bridge over another NIC" in problem) == (number != errno.EIO)


def test_an_uplink_that_has_gone_is_no_problem(fdb: Fdb) -> None:
    for here in (True, False):
        assert fdb.steer("tap0", MAC, ["eth9"], here=here, learn=here) == {"problems": [], "made": []}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ifname", None),
        ("address", None),
        ("address", "52:54"),
        ("uplinks", None),
        ("uplinks", "eth0"),
        ("uplinks", ["eth0", 5]),
        ("uplinks", ["eth0"] * 257),
        ("here", 1),
        ("learn", None),
        ("netns", "relative"),
        ("more", 1),
    ],
)
def test_a_request_with_something_wrong_is_refused(key: str, value: object) -> None:
    helper = Helper(ME)
    assert answer(helper, json.dumps(STEER | {key: value}).encode())["key"] in (key, "")
    assert helper.close() == []
