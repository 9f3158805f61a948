"""The network around a failover pair: who reaches the guest on either path, and what is noted of it where.

There are three stations: the host itself, on the bridge behind the PF; one on the wire; and a mate behind the NIC's
other virtual function, which the PF's switch alone is between.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

from scripts.lab.hardware import BRIDGE_ADDRESS, STATION_ADDRESS
from scripts.lab.images import Images
from scripts.lab.process import Process
from tests.lab.guest import Guest
from tests.lab.nics import NicHost
from tests.lab.test_failover import ADDRESS, MAC, PRIMARY, SLOW, STANDBY, TRIO, Lab, pair, primary
from tests.lab.test_network import EVENTS

NAME, TAP, MATE, MATE_ADDRESS = "pair", "tap-pair", "mate", "10.77.0.30"
HOOK, TOLD = "/run/hook", "/run/hook.log"
SCRIPT: Final = f"""#!/bin/sh
echo "$1 $KVMPY_EVENT $KVMPY_MACHINE $KVMPY_STANDBY $KVMPY_PRIMARY $KVMPY_MAC $KVMPY_TAP $KVMPY_HOST" \\
    "$KVMPY_PF $KVMPY_VF" >>{TOLD}
"""
STATIONS: Final = {
    "bridge": ("sh", "-c", 'exec "$@"', "sh"),
    "wire": ("ip", "netns", "exec", "station"),
    "mate": ("ip", "netns", "exec", MATE),
}
ADDRESSES: Final = {"bridge": BRIDGE_ADDRESS, "wire": STATION_ADDRESS, "mate": MATE_ADDRESS}
EVERY: Final = 0.1  # seconds between two pings
OWN: Final = 5.0  # what the guest's driver takes before and after, on a busy emulated host


@dataclass
class Network(Lab):
    """The same, and its stations."""

    def fdb(self, interface: str) -> list[str]:
        """The entries of an interface for the pair's address, without its name."""
        shown = self.host.run(["bridge", "fdb", "show", "dev", interface], check=True).stdout
        return [line.removeprefix(MAC).strip() for line in shown.splitlines() if line.startswith(MAC)]

    def all_reach(self) -> dict[str, bool]:
        """Which stations hear the guest, at their first try but for ARP's."""
        ping = ("busybox", "ping", "-q", "-c", "3", "-i", "0.2", "-W", "20", ADDRESS)
        return {name: self.host.run([*prefix, *ping]).returncode == 0 for name, prefix in STATIONS.items()}

    def pinging(self) -> dict[str, Process]:
        """Each station pings the guest, until `lost`."""
        ping = ("busybox", "ping", "-i", str(EVERY), ADDRESS)
        started = {name: self.host.spawn([*prefix, *ping]) for name, prefix in STATIONS.items()}
        for process in started.values():
            process.expect("seq=3", SLOW)
        return started

    def lost(self, started: dict[str, Process]) -> dict[str, int]:
        """How many of each one's pings in a row were not answered, at most."""
        gaps = {}
        for name, process in started.items():
            process.signal(2)
            process.wait()
            numbers = [int(number) for number in re.findall(r"seq=(\d+) ", process.output)]
            gaps[name] = max(after - before - 1 for before, after in itertools.pairwise(numbers))
        return gaps

    def gap(self, event: str) -> float:
        """The RX gap that an event reports, in seconds."""
        found = self.events.expect(re.compile(rf'"{event}"[^\n]*"rx-gap-ms": ?([0-9.]+)'), SLOW)
        return float(found[1]) / 1000

    def told(self) -> list[str]:
        """What the hook was told."""
        return self.host.run(["cat", TOLD], check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def mate(igb_host: NicHost) -> Iterator[None]:
    """The other virtual function, in a namespace of its own."""
    script = f"""
        n=$(ls /sys/bus/pci/devices/{igb_host.functions[1]}/net); ip netns add {MATE}; ip link set $n netns {MATE}
        ip -n {MATE} link set lo up; ip -n {MATE} addr add {MATE_ADDRESS}/24 dev $n; ip -n {MATE} link set $n up
        for i in $(seq 100); do ip netns exec {MATE} busybox ping -c 1 -W 1 {STATION_ADDRESS} && exit; done; exit 1
    """
    igb_host.run(["sh", "-ec", script], check=True, timeout=SLOW)
    yield
    igb_host.run(["ip", "netns", "del", MATE], check=True)


@pytest.fixture(scope="module")
def lab(igb_host: NicHost, lab_images: Images, mate: None) -> Iterator[Network]:
    function = igb_host.functions[0]
    igb_host.write_file(HOOK, SCRIPT)
    igb_host.run(["sh", "-c", f"chmod +x {HOOK}; rm -f {TOLD}"], check=True)
    words = "modules=virtio_pci,virtio_net,igbvf"
    options = f"--set machine.failover_hook={HOOK}"
    with Guest(igb_host, NAME, kernel="generic", tables=pair(function), words=words, options=options) as guest:
        guest.wait_shell()
        events = igb_host.spawn(["python", "-I", "-S", "-c", EVENTS, f"/run/kvmpy/{NAME}/qmp.sock"])
        events.expect("listening")
        lab = Network(guest, igb_host, function, events)
        lab.picture(TRIO)
        lab.set_up()
        guest.type("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
        yield lab
        events.signal(15)
        events.wait()
        guest.process.send("poweroff -f\n")
        assert guest.wait_end() == 0
    told = lab.told()
    assert told[-1].split()[:4] == ["none", "path", NAME, STANDBY]
    assert "self permanent" not in lab.fdb(lab.host.uplink)
    assert lab.host.run(["ip", "link", "show", TAP]).returncode == 1


def test_a_bridge_over_a_virtual_function_has_the_entry_too_and_its_guest_is_reached(
    igb_host: NicHost, lab_images: Images
) -> None:
    """The PF lets that one have more addresses than one, and send from them: it is the operator's to say."""
    uplink = igb_host.run(["ls", f"/sys/bus/pci/devices/{igb_host.functions[1]}/net"], check=True).stdout.strip()
    allowed = f"ip link set {igb_host.uplink} vf 1 trust {{}} spoofchk {{}}"
    script = f"{allowed.format('on', 'off')}; ip link add br1 type bridge; ip link set {uplink} master br1 up"
    igb_host.run(["sh", "-ec", f"{script}; ip link set br1 up"], check=True)
    config = pair(igb_host.functions[0]).replace('"br0"', '"br1"').replace(TAP, "tap-vf")
    ping = ("busybox", "ping", "-q", "-c", "20", "-i", "0.5", ADDRESS)
    with Guest(igb_host, "vf", kernel="generic", tables=config, words="modules=virtio_pci,virtio_net") as guest:
        guest.wait_shell()
        guest.type(f"ip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up")
        (found,) = guest.status()["failover"]
        assert (found["path"], found.get("network-error")) == ("standby", None)
        shown = igb_host.run(["bridge", "fdb", "show", "dev", uplink], check=True).stdout
        assert f"{MAC} self permanent" in shown
        assert igb_host.station(*ping).returncode == 0
        assert igb_host.run(list(ping)).returncode == 0, "from behind the PF"
        guest.process.send("poweroff -f\n")
        assert guest.wait_end() == 0
    igb_host.run(["sh", "-ec", f"ip link del br1; {allowed.format('off', 'on')}"], check=True)


def test_r46_on_the_primary_neither_bridge_nor_nic_has_the_guest_at_the_standby(lab: Network) -> None:
    assert lab.pair()["path"] == "primary"
    assert lab.fdb(TAP) == []
    assert lab.fdb(lab.host.uplink) in ([], ["master br0"]), "the bridge may have heard it there"
    shown = lab.host.run(["bridge", "-d", "link", "show", "dev", TAP], check=True).stdout
    assert "learning off" in shown
    assert lab.all_reach() == dict.fromkeys(STATIONS, True)


def test_r45_on_the_way_to_the_standby_nothing_is_lost_but_in_the_gap_that_is_reported(lab: Network) -> None:
    started = lab.pinging()
    lab.guest.qmp("device_del", f"id={PRIMARY}")
    gap = lab.gap("FAILOVER_PATH_CHANGED")
    lab.wait("DEVICE_DELETED", PRIMARY)
    assert lab.all_reach() == dict.fromkeys(STATIONS, True)
    lost = lab.lost(started)
    print(f"to the standby: gap {gap:.3f} s, pings lost in a row {lost}")
    assert max(lost.values()) * EVERY <= gap + OWN
    assert lab.pair()["rx-gap-ms"] == pytest.approx(gap * 1000)


def test_r46_on_the_standby_bridge_and_nic_know_it(lab: Network) -> None:
    assert (lab.pair()["path"], lab.pair().get("network-error")) == ("standby", None)
    at_tap = lab.fdb(TAP)
    assert at_tap, "in each VLAN that the bridge has"
    assert all(line.endswith("sticky master br0 static") for line in at_tap)
    assert "self permanent" in lab.fdb(lab.host.uplink)
    assert lab.all_reach() == dict.fromkeys(STATIONS, True)


def test_r45_on_the_way_to_the_primary_too(lab: Network) -> None:
    bridge = lab.host.run(["readlink", f"/sys/class/net/{TAP}/master"], check=True).stdout.strip().rpartition("/")[2]
    filtering = ("ip", "link", "set", bridge, "type", "bridge", "vlan_filtering")
    lab.host.run([*filtering, "1"], check=True)
    lab.host.run(["bridge", "vlan", "add", "dev", TAP, "vid", "7"], check=True)
    lab.host.run(["bridge", "fdb", "add", MAC, "dev", TAP, "master", "dynamic", "vlan", "7"], check=True)
    assert len(lab.fdb(TAP)) >= 2
    started = lab.pinging()
    words = [f"{key}={value}" for key, value in primary(lab.function).items()]
    lab.guest.qmp("device_add", *words)
    gap = lab.gap("FAILOVER_PRIMARY_RECEIVES")
    lab.picture(TRIO)
    lab.wait_heard()
    assert lab.all_reach() == dict.fromkeys(STATIONS, True)
    lost = lab.lost(started)
    print(f"to the primary: gap {gap:.3f} s, pings lost in a row {lost}")
    assert max(lost.values()) * EVERY <= gap + OWN
    assert lab.fdb(TAP) == [], "of no VLAN"
    lab.host.run([*filtering, "0"], check=True)


def test_r44_the_standbys_frames_are_counted(lab: Network) -> None:
    def sent() -> int:
        return int(lab.pair()["standby-tx-frames"])

    before, others = sent(), lab.counts("eth1")[1]
    assert lab.all_reach() == dict.fromkeys(STATIONS, True)
    assert (sent(), lab.counts("eth1")[1]) == (before, others), "nothing goes out there"
    status: dict[str, Any] = json.loads(lab.guest.kvmpy("status", "--json", NAME).stdout)
    assert status["failover"][0]["standby-tx-frames"] == before
    assert "over the standby: " in lab.guest.kvmpy("status", NAME).stdout


def test_the_hook_is_told_of_each_change_in_order(lab: Network) -> None:
    facts = f"path {NAME} {STANDBY} {PRIMARY} {MAC} {TAP} {lab.function} {lab.host.uplink} 0"
    told = lab.told()
    assert told[-2:] == [f"standby {facts}", f"primary {facts}"]
    paths = [line.split()[0] for line in told]
    assert paths[0] == "standby"
    assert all(one != other for one, other in itertools.pairwise(paths))
