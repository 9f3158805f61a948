"""The bridge around a failover standby, on the real kernel: where frames for its guest go, and what is left behind.

A veth stands for the uplink's NIC: it takes entries as a real one does, and its far end is the wire.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from kvmpy.errors import HostError
from kvmpy.host.network import Network
from kvmpy.host.pci import recover
from kvmpy.host.standby_port import StandbyPort
from kvmpy.host.tap import HEADER_SIZE, Tap
from tests.fakes.loop import poll
from tests.host.conftest import Namespace

MAC: Final = "52:54:00:6f:55:cc"
GUEST: Final = bytes.fromhex(MAC.replace(":", ""))
STATION: Final = bytes.fromhex("525400000009")
ETH_P_ALL: Final = 3
TYPE: Final = b"\x88\xb5"  # for experiments
# A VMM with a standby on tap0, whose guest is on the given path.
VMM: Final = """
import sys
from kvmpy.host.network import Network
from kvmpy.host.standby_port import StandbyPort
class Switched(Network):
    def uplinks(self, ifname, *, netns=None):
        return ["eth0"]
run, netns, here, attach = sys.argv[1:]
network = Switched("web1")
if attach:
    network.attach("n1", "tap0", bridge="br0", netns=netns)
port = StandbyPort(network, run, "tap0", "52:54:00:6f:55:cc", netns=netns)
problems = port.steer(here=here == "standby")
print(network.pid, problems, flush=True)
sys.stdin.read()
"""


class Switched(Network):
    """The helper, on a host whose uplink is a NIC with virtual functions."""

    def uplinks(self, ifname: str, *, netns: str | None = None) -> list[str]:
        assert super().uplinks(ifname, netns=netns) == [], "a veth is none"
        return ["eth0"]


class Bridge:
    """br0 with the guest's tap, the uplink eth0, and a station's tap; ``wire`` is the uplink's far end."""

    def __init__(self, netns: Namespace, resources: ExitStack) -> None:
        self.netns = netns
        netns.ip("link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "wire")
        for name in ("eth0", "wire", "br0"):
            netns.ip("link", "set", name, "up", *(("master", "br0") if name == "eth0" else ()))
        self.tap, self.station = (Tap.open(name, netns=netns.path) for name in ("tap0", "tap1"))
        for tap in (self.tap, self.station):
            resources.callback(tap.close)
            netns.ip("link", "set", tap.name, "up", "master", "br0")
        self.wire = netns.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        resources.callback(self.wire.close)
        self.wire.bind(("wire", 0))
        self.wire.setblocking(False)
        poll(lambda: "state forwarding" in self.show("link", "show", "dev", "tap0"))

    def show(self, *words: str) -> str:
        """What `bridge ...` prints."""
        command = ["bridge", *words]
        done = self.netns.run(lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True))
        return done.stdout

    def entries(self, interface: str) -> list[str]:
        """The guest's at an interface."""
        lines = self.show("fdb", "show", "dev", interface).splitlines()
        return [line.removeprefix(MAC).strip() for line in lines if line.startswith(MAC)]

    def learns(self) -> bool:
        return "learning on" in self.show("-d", "link", "show", "dev", "tap0")

    def guest_sends(self) -> None:
        os.write(self.tap.fds[0], bytes(HEADER_SIZE) + b"\xff" * 6 + GUEST + TYPE + bytes(46))

    def reached(self) -> set[str]:
        """Where a frame of the station's for the guest arrives: at the tap, on the wire."""
        for drain in (self._from_tap, self._from_wire):
            while drain():
                pass
        os.write(self.station.fds[0], bytes(HEADER_SIZE) + GUEST + STATION + TYPE + bytes(46))
        found = {"tap"} if self._from_tap()[:6] == GUEST else set()
        return found | ({"wire"} if self._from_wire()[:6] == GUEST else set())

    def _from_tap(self) -> bytes:
        try:
            return os.read(self.tap.fds[0], 2048)[HEADER_SIZE:]
        except BlockingIOError:
            return b""

    def _from_wire(self) -> bytes:
        try:
            return self.wire.recv(2048)
        except BlockingIOError:
            return b""


@pytest.fixture
def bridge(netns: Namespace) -> Iterator[Bridge]:
    with ExitStack() as resources:
        yield Bridge(netns, resources)


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run/web1").mkdir(mode=0o750)
    return str(tmp_path / "run/web1")


@pytest.fixture
def network() -> Iterator[Network]:
    network = Switched("web1")
    yield network
    network.close()


@pytest.fixture
def port(network: Network, bridge: Bridge, run: str) -> Iterator[StandbyPort]:
    port = StandbyPort(network, run, "tap0", MAC, netns=bridge.netns.path)
    yield port
    port.close()


def test_r46_on_the_primary_frames_leave_by_the_uplink_whatever_the_guest_still_sends_here(
    bridge: Bridge, port: StandbyPort
) -> None:
    assert port.steer(here=True) == []
    bridge.guest_sends()
    assert bridge.reached() == {"tap"}
    assert port.steer(here=False) == []
    assert (bridge.entries("tap0"), bridge.learns()) == ([], False)
    assert bridge.reached() == {"tap", "wire"}, "the bridge does not know where it is"
    bridge.guest_sends()  # as Linux does until its primary has a carrier
    assert bridge.reached() == {"tap", "wire"}
    bridge.wire.send(b"\xff" * 6 + GUEST + TYPE + bytes(46))
    assert bridge.reached() == {"wire"}
    assert port.steer(here=True) == []
    assert (bridge.reached(), bridge.learns()) == ({"tap"}, True)


def test_r46_a_nic_that_hands_back_the_guests_own_broadcasts_misleads_nobody(bridge: Bridge, port: StandbyPort) -> None:
    port.steer(here=True)
    bridge.guest_sends()
    bridge.wire.send(b"\xff" * 6 + GUEST + TYPE + bytes(46))
    assert bridge.reached() == {"tap"}
    assert bridge.entries("eth0") == ["self permanent"]


def test_the_uplink_has_an_entry_while_the_guest_is_on_its_standby(bridge: Bridge, port: StandbyPort) -> None:
    port.steer(here=True)
    assert bridge.entries("eth0") == ["self permanent"]
    port.steer(here=False)
    assert bridge.entries("eth0") == []
    port.steer(here=True)
    port.close()
    assert bridge.entries("eth0") == []


def test_an_operators_entry_stays(bridge: Bridge, port: StandbyPort) -> None:
    bridge.show("fdb", "add", MAC, "dev", "eth0", "self", "permanent")
    for here in (True, False, True):
        assert port.steer(here=here) == []
        assert bridge.entries("eth0") == ["self permanent"]
    port.close()
    assert bridge.entries("eth0") == ["self permanent"]


def test_the_end_leaves_the_port_as_it_was(bridge: Bridge, network: Network, port: StandbyPort) -> None:
    bridge.netns.ip("link", "set", "tap0", "alias", "the operator's")
    before = bridge.netns.ip("-d", "link", "show", "tap0")
    port.steer(here=False)
    assert not bridge.learns()
    port.close()
    network.close()
    assert bridge.learns()
    assert "alias the operator's" in before
    assert bridge.netns.ip("-d", "link", "show", "tap0").split("bridge_slave")[0] == before.split("bridge_slave")[0]


def test_a_tap_on_no_bridge_is_left_alone(bridge: Bridge, port: StandbyPort) -> None:
    bridge.netns.ip("link", "set", "tap0", "nomaster")
    assert port.steer(here=False) == []
    bridge.netns.ip("link", "del", "br0")
    assert [port.steer(here=here) for here in (True, False)] == [[], []]


@pytest.mark.parametrize("path", ["standby", "primary"])
def test_a_vmm_that_is_killed_leaves_neither_entry_nor_a_deaf_bridge(bridge: Bridge, run: str, path: str) -> None:
    with vmm(bridge, run, path) as process:
        assert (bridge.entries("eth0") != [], bridge.learns()) == (path == "standby", path == "standby")
        process.kill()
        poll(lambda: (bridge.entries("tap0"), bridge.entries("eth0"), bridge.learns()) == ([], [], True))


@pytest.mark.parametrize("path", ["standby", "primary"])
def test_where_its_helper_is_killed_too_the_next_start_sees_to_it(bridge: Bridge, run: str, path: str) -> None:
    bridge.tap.close()
    bridge.netns.ip("tuntap", "add", "dev", "tap0", "mode", "tap")
    bridge.netns.ip("link", "set", "tap0", "master", "br0", "up", "alias", "kept")
    with vmm(bridge, run, path, attach=True) as process:
        assert process.stdout is not None
        os.kill(process.helper, signal.SIGKILL)
        process.kill()
        process.wait()
    assert (bridge.entries("eth0") != [], bridge.learns()) == (path == "standby", path == "standby")
    recover(run)
    network = Network("web1")
    network.attach("n2", "tap1", bridge="br0", netns=bridge.netns.path)
    network.close()
    assert (bridge.entries("tap0"), bridge.entries("eth0"), bridge.learns()) == ([], [], True)
    assert os.listdir(run) == []
    assert "alias kept" in bridge.netns.ip("link", "show", "tap0")


def test_a_helper_that_was_killed_alone_is_followed_by_one_that_knows_its_work(
    bridge: Bridge, network: Network, port: StandbyPort, run: str
) -> None:
    port.steer(here=True)
    os.kill(network.pid, signal.SIGKILL)
    (problem,) = port.steer(here=False)
    assert "the network helper" in problem
    assert port.steer(here=False) == []
    assert (bridge.entries("eth0"), bridge.learns()) == ([], False)
    os.kill(network.pid, signal.SIGKILL)
    with pytest.raises(HostError):
        network.uplinks("tap0", netns=bridge.netns.path)
    assert port.steer(here=True) == []
    assert bridge.learns()


def test_frames_are_counted_as_the_guest_sees_them(bridge: Bridge) -> None:
    received, sent = bridge.tap.frames()
    for _ in range(3):
        bridge.guest_sends()
    bridge.reached()
    now = bridge.tap.frames()
    assert now[1] - sent == 3
    assert now[0] - received >= 1
    bridge.netns.ip("link", "del", "tap0")
    with pytest.raises(HostError, match="tap0: there is no such interface"):
        bridge.tap.frames()


class Vmm(subprocess.Popen[str]):
    """``helper`` is its network helper's process."""

    def __init__(self, bridge: Bridge, run: str, path: str, attach: str) -> None:
        command = [sys.executable, "-c", VMM, run, bridge.netns.path, path, attach]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.stdout is not None
        pid, _, problems = self.stdout.readline().strip().partition(" ")
        assert problems == "[]"
        self.helper = int(pid)


def vmm(bridge: Bridge, run: str, path: str, *, attach: bool = False) -> Vmm:
    """A VMM in a process of its own whose guest is on that path."""
    return Vmm(bridge, run, path, "attach" if attach else "")
