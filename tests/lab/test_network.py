"""A guest's network: a tap in a bridge that kvmpy makes, with frames moved by vhost-net and by kvmpy itself."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from scripts.lab.process import Process
from tests.lab import tables
from tests.lab.guest import FROM_DISK, Guest, root_disk

NAME, NET, TAP, BRIDGE = "network", "net1", "kvtap0", "kvbr0"
HOST, GUEST = "10.77.1.1", "10.77.1.2"
MTU: Final = 1400
MEMORY_MIB: Final = 256
FREE_PAGES: Final = (MEMORY_MIB - 1) << 20  # of no use to Linux, for garble
FREE: Final = f"iomem=relaxed mem={MEMORY_MIB - 1}M"
SLOW: Final = 300.0

ANSWER: Final = re.compile(r"seq=(\d+) ")
ALL_HEARD: Final = "10 packets transmitted, 10 packets received, 0% packet loss"
ENOUGH: Final = 300
"""Frames: one exit for each would be many more than there are for other reasons."""

OFFLOADS: Final = {
    "rx-checksumming",
    "tx-checksum-ip-generic",
    "tx-scatter-gather",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp6-segmentation",
    "rx-gro-hw",
    "rx-vlan-filter",
}


@dataclass
class Lab:
    """A guest with two pairs of queues, and what answers it on the host: a bridge's address and an iperf3."""

    guest: Guest
    host: EmulatedHost
    path: str  # "vhost" or "userspace"

    def set_up(self) -> None:
        """Give the guest its address."""
        heard = f"for n in $(seq 120); do busybox ping -c 1 -W 2 {HOST} >&- && break; done"
        up = f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; {heard}"
        assert self.guest.type(f"{up}; echo $?", SLOW) == "0"

    def ping(self, count: int = 10) -> str:
        """The guest, from the host; the line that says what was lost."""
        done = self.host.run(["busybox", "ping", "-q", "-i", "0.05", "-c", str(count), "-W", "20", GUEST], timeout=SLOW)
        return done.stdout.split("\n")[3]

    def is_deaf(self) -> bool:
        return self.host.run(["busybox", "ping", "-q", "-c", "3", "-W", "1", GUEST]).returncode == 1

    def iperf(self, options: str) -> str:
        """Have iperf3 move some bytes, with the guest as the client; what it says of the receiver, all streams last."""
        text = self.guest.type(f"iperf3 -c {HOST} -f k {options} | grep -E 'receiver|error'", SLOW)
        assert "error" not in text
        return text.splitlines()[-1]

    def await_frames(self, count: int) -> int:
        """Until the tap has passed so many more, either way; how many there were."""
        sum_up = f"cd /sys/class/net/{TAP}/statistics; all() {{ echo $(($(cat rx_packets) + $(cat tx_packets))); }}"
        script = f"{sum_up}; first=$(all); until [ $(all) -ge $((first + {count})) ]; do sleep 0.1; done; "
        return int(self.host.run(["sh", "-ec", f"{script} echo $(($(all) - first))"], timeout=SLOW, check=True).stdout)

    def await_carrier(self, carrier: int) -> None:
        """Until the guest's interface has one, or has none; the line ends with the test's time."""
        self.guest.type(f"until [ $(cat /sys/class/net/eth0/carrier) = {carrier} ]; do sleep 0.1; done")

    def mac(self) -> str:
        return self.guest.type("cat /sys/class/net/eth0/address")

    def virtio_device(self) -> str:
        return self.guest.type("basename $(readlink -f /sys/class/net/eth0/device)")

    def rebind(self, device: str) -> None:
        """Let the guest's driver reset the device and start anew."""
        driver = "/sys/bus/virtio/drivers/virtio_net"
        self.guest.type(f"echo {device} >{driver}/unbind; echo {device} >{driver}/bind", SLOW)
        self.set_up()

    @contextmanager
    def pings_meanwhile(self) -> Iterator[Process]:
        """Ten pings per second of the guest, while something else is done, and until one is answered after that."""
        # Known for good: a guest that is paused for long answers no ARP, and the host would drop what is for it.
        known = ["ip", "neigh", "replace", GUEST, "lladdr", self.mac(), "dev", BRIDGE, "nud", "permanent"]
        self.host.run(known, check=True)
        process = self.host.spawn(["busybox", "ping", "-i", "0.1", GUEST])
        process.expect("seq=1 ")
        yield process
        assert self.ping() == ALL_HEARD  # behind all that waits for the guest
        seen = len(process.output)
        while not ANSWER.search(process.output, seen):
            process.expect(ANSWER)
        process.signal(signal.SIGINT)
        process.wait()


@pytest.fixture(scope="module", params=["vhost", "userspace"])
def lab(request: pytest.FixtureRequest, host: EmulatedHost, lab_images: Images) -> Iterator[Lab]:
    path: str = request.param
    with root_disk(host, lab_images, NAME) as root:
        config = (
            tables.root_ports("rp1", "rp2")
            + tables.disk("root", root)
            + tables.nic(NET, TAP, BRIDGE, vhost=path == "vhost", queues=2, bus="rp1", mtu=MTU)
            + tables.rng("rng0", bus="rp2")
        )
        with Guest(host, NAME, tables=config, words=f"{FROM_DISK} {FREE}") as guest:
            guest.wait_shell()
            host.run(["ip", "addr", "add", f"{HOST}/24", "dev", BRIDGE], check=True)
            server = host.spawn(["iperf3", "-s", "--forceflush"])
            server.expect("listening")
            lab = Lab(guest, host, path)
            lab.set_up()
            yield lab
            server.signal(15)
            server.wait()
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0
    left = host.run(["ip", "-brief", "link"], check=True).stdout
    assert TAP not in left
    assert BRIDGE not in left


def test_the_bridge_joins_guest_and_host_and_has_an_address_of_its_own(lab: Lab) -> None:
    addresses = {name: lab.host.run(["cat", f"/sys/class/net/{name}/address"]).stdout.strip() for name in (TAP, BRIDGE)}
    mac = lab.mac()
    assert mac not in addresses.values()
    assert mac in lab.host.run(["bridge", "fdb", "show", "br", BRIDGE], check=True).stdout
    assert f"master {BRIDGE}" in lab.host.run(["ip", "link", "show", TAP], check=True).stdout


def test_frames_take_the_path_of_the_configuration(lab: Lab) -> None:
    assert lab.ping() == ALL_HEARD
    device = lab.guest.device(NET)
    assert (device["path"], device["link"]) == (lab.path, "up")
    assert (device["userspace"]["rx-frames"] > 0) is (lab.path == "userspace")
    assert f"{NET} (up {lab.path})" in lab.guest.kvmpy("ps").stdout


@pytest.mark.parametrize("options", ["", "-R"], ids=["from the guest", "to the guest"])
def test_tcp_flows(lab: Lab, options: str) -> None:
    assert moved(lab.iperf(f"-n 1M {options}")) > 0


@pytest.mark.parametrize("options", ["", "-R"], ids=["from the guest", "to the guest"])
def test_udp_arrives(lab: Lab, options: str) -> None:
    said = lab.iperf(f"-u -b 0.5M -n 128K {options}")
    assert moved(said) > 0
    assert " 0/" in said, f"some are lost: {said}"


def moved(said: str) -> float:
    """What iperf3 says the receiver got, in the unit that it chose."""
    found = re.search(r"([\d.]+) [KMG]?Bytes", said)
    assert found, said
    return float(found[1])


def test_guest_and_tap_have_the_mtu_of_the_configuration(lab: Lab) -> None:
    assert lab.guest.type("cat /sys/class/net/eth0/mtu") == str(MTU)
    assert lab.host.run(["cat", f"/sys/class/net/{TAP}/mtu"]).stdout.strip() == str(MTU)


def test_the_guest_is_offered_checksums_and_segmentation(lab: Lab) -> None:
    shown = lab.guest.type("ethtool -k eth0 | grep ': on'")
    assert set(re.findall(r"^\s*(\S+): on", shown, re.MULTILINE)) >= OFFLOADS


def test_the_guest_sees_the_link_go_down_and_up(lab: Lab) -> None:
    lab.guest.qmp("set_link", f"name={NET}", "up=false")
    lab.await_carrier(0)
    assert lab.guest.device(NET)["link"] == "down"
    assert lab.is_deaf()
    lab.guest.qmp("set_link", f"name={NET}", "up=true")
    lab.await_carrier(1)
    assert lab.ping() == ALL_HEARD


def test_the_guest_uses_as_many_queues_as_it_likes(lab: Lab) -> None:
    channels = "ethtool -l eth0 | sed -n 's/Combined:\\s*//p'"
    assert lab.guest.type(channels).split() == ["2", "1"], "one for its one CPU"
    assert lab.guest.type(f"ethtool -L eth0 combined 2; {channels}").split() == ["2", "2"]
    assert lab.guest.device(NET)["pairs"] == 2
    assert lab.ping() == ALL_HEARD
    assert moved(lab.iperf("-n 1M -P 4")) > 0
    assert lab.guest.type(f"ethtool -L eth0 combined 1; {channels}").split() == ["2", "1"]
    assert lab.ping() == ALL_HEARD


def test_no_frame_is_lost_or_repeated_over_a_pause(lab: Lab) -> None:
    with lab.pings_meanwhile() as pings:
        lab.guest.kvmpy("pause", NAME)
        assert json.loads(lab.guest.kvmpy("ps", "--json").stdout)[0]["status"] == "paused"
        lab.guest.kvmpy("resume", NAME)
    answered = [int(number) for number in ANSWER.findall(pings.output)]
    assert answered == list(range(len(answered)))


def test_traffic_goes_on_after_the_driver_reset_the_device(lab: Lab) -> None:
    with lab.pings_meanwhile():
        lab.rebind(lab.virtio_device())
    assert lab.ping() == ALL_HEARD


def test_traffic_costs_no_exits(lab: Lab) -> None:
    lab.guest.type(f"iperf3 -c {HOST} -t 3600 >/tmp/iperf 2>&1 &")
    lab.await_frames(1)
    before, frames = sum(lab.guest.status()["exits"].values()), lab.await_frames(ENOUGH)
    exits = sum(lab.guest.status()["exits"].values()) - before
    lab.guest.type("kill $!; wait", SLOW)
    print(f"{exits} exits, {frames} frames")
    assert exits < frames / 4


def test_garbage_in_a_live_ring_stops_that_device_alone_until_its_reset(lab: Lab) -> None:
    device = lab.virtio_device()
    events = lab.host.spawn(["python", "-I", "-S", "-c", EVENTS, f"/run/kvmpy/{NAME}/qmp.sock"])
    events.expect("listening")
    assert lab.guest.type(f"garble 01:00.0 0 02:00.0 {FREE_PAGES}", SLOW) == "garbled queue 0 of 01:00.0"
    assert lab.is_deaf()
    assert events.expect(re.compile(r'"DEVICE_BROKEN".*"device": *"(\w+)"'))[1] == NET
    events.signal(15)
    broken = {name["id"] for name in lab.guest.status()["devices"] if name.get("broken")}
    assert broken == {NET}
    assert (
        lab.guest.type(
            "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/urandom of=/x bs=64k count=8 conv=fsync 2>&-; echo $?"
        )
        == "0"
    )
    lab.rebind(device)
    assert lab.guest.device(NET)["broken"] is None
    assert lab.ping() == ALL_HEARD


def test_a_reset_of_the_machine_under_traffic_starts_over(lab: Lab) -> None:
    with lab.pings_meanwhile():
        lab.guest.kvmpy("reset", NAME)
        lab.guest.wait_shell()
        lab.set_up()
    assert lab.ping() == ALL_HEARD
    assert lab.guest.device(NET)["path"] == lab.path


EVENTS = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(b'{"execute": "qmp_capabilities"}')
stream = connection.makefile()
print(stream.readline(), stream.readline(), "listening", flush=True)
for line in stream:
    print(line, flush=True)
"""
