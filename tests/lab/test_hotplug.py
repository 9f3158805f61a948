"""Devices that come and go beside a running Linux, which has its own driver for slots."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from scripts.lab.process import Process
from tests.counts import count
from tests.lab import tables
from tests.lab.guest import FROM_DISK, Guest, root_disk
from tests.lab.test_network import EVENTS
from tests.lab.test_pci import COMPLAINTS

NAME, BRIDGE, TAP, DATA = "hotplug", "kvbrhp", "kvtaphp", "/scratch/hotplug-data.img"
HOST, GUEST = "10.78.1.1", "10.78.1.2"
ASSIGNED: Final = r"BAR 0(: assigned)? \[mem 0x[1-9a-f]\w{8}-.*"
"""What Linux says of a BAR that has a place above 4 GiB, older kernels and newer ones."""
SLOW: Final = 300.0
DATA_MIB: Final = 16
PORTS: Final = ("rp1", "rp2", "rp3", "rp4")
WITHOUT_POWER: Final = ("rp3", "rp4")
"""Ports that have no power controller."""


def ports(*names: str) -> str:
    return "".join(
        tables.table("root_port", id=name, power_controller=False if name in WITHOUT_POWER else None) for name in names
    )


def spare_drive() -> str:
    return tables.table("drive", id="data", path=DATA, format="raw", cache="writeback")


@contextmanager
def bridge_and_disk(host: EmulatedHost) -> Iterator[None]:
    """A bridge with the host's address, and a disk's file."""
    host.run(["sh", "-ec", f"ip link add {BRIDGE} type bridge; ip addr add {HOST}/24 dev {BRIDGE}"], check=True)
    host.run(["sh", "-ec", f"ip link set {BRIDGE} up; truncate -s {DATA_MIB}M {DATA}"], check=True)
    try:
        yield
    finally:
        host.run(["sh", "-c", f"ip link del {BRIDGE}; rm -f {DATA}"], check=True)


@dataclass
class Lab:
    guest: Guest
    host: EmulatedHost
    events: Process

    def qmp(self, command: str, **arguments: Any) -> None:
        words = [f"{key.replace('_', '-') if key == 'num_queues' else key}={value}" for key, value in arguments.items()]
        self.guest.qmp(command, *words)

    def add_nic(self, name: str, bus: str) -> None:
        """A network device with a netdev of its own, up and with an address."""
        self.qmp("netdev_add", type="tap", id=f"tap-{name}", ifname=TAP, bridge=BRIDGE)
        self.qmp("device_add", driver="virtio-net-pci", id=name, netdev=f"tap-{name}", bus=bus)
        self.until("[ -d /sys/class/net/eth0 ]")
        heard = f"for n in $(seq 120); do busybox ping -c 1 -W 2 {HOST} >&- && break; done"
        up = f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; {heard}"
        assert self.guest.type(f"{up}; echo $?", SLOW) == "0"

    def add_disk(self, name: str, bus: str) -> None:
        self.qmp("device_add", driver="virtio-blk-pci", id=name, drive="data", bus=bus)
        self.until("[ -b /dev/vdb ]")

    def remove(self, name: str) -> None:
        self.qmp("device_del", id=name)
        self.wait_deleted(name)

    def wait_deleted(self, name: str) -> None:
        self.events.expect(re.compile(rf'"DEVICE_DELETED".*"device": *"{name}"'), SLOW)

    def until(self, condition: str) -> None:
        """Until a shell's condition holds in the guest; the line ends with the test's time."""
        self.guest.type(f"until {condition}; do sleep 0.1; done", SLOW)

    def dmesg(self) -> str:
        return self.guest.type("dmesg -c | grep -E 'pci|Slot' | cut -c 1-150", SLOW)


@pytest.fixture(scope="module", params=["generic", "cloud"][: count(1, 2)])  # whose drivers are the same
def lab(request: pytest.FixtureRequest, host: EmulatedHost, lab_images: Images) -> Iterator[Lab]:
    with bridge_and_disk(host), root_disk(host, lab_images, NAME) as root:
        config = ports(*PORTS) + tables.disk("root", root) + spare_drive()
        with Guest(host, NAME, kernel=request.param, tables=config, words=FROM_DISK) as guest:
            guest.wait_shell()
            events = host.spawn(["python", "-I", "-S", "-c", EVENTS, f"/run/kvmpy/{NAME}/qmp.sock"])
            events.expect("listening")
            lab = Lab(guest, host, events)
            lab.guest.type("dmesg -c >/dev/null; dmesg -n 1")
            yield lab
            events.signal(15)
            events.wait()
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0


@pytest.mark.parametrize("bus", ["rp1", "rp3"], ids=["power controller", "no power controller"])
def test_r22_a_network_device_comes_works_and_goes(lab: Lab, bus: str) -> None:
    lab.add_nic("hot0", bus)
    assert re.search(ASSIGNED, said := lab.dmesg()), said
    assert not re.search(COMPLAINTS, said, re.IGNORECASE), said
    assert lab.guest.device("hot0")["link"] == "up"
    lab.remove("hot0")
    assert lab.guest.type("ls /sys/class/net") == "lo"
    assert TAP not in lab.host.run(["ip", "-brief", "link"], check=True).stdout
    lab.qmp("netdev_del", id="tap-hot0")


@pytest.mark.parametrize("bus", ["rp2", "rp4"], ids=["power controller", "no power controller"])
def test_r22_a_disk_comes_works_and_goes(lab: Lab, bus: str) -> None:
    lab.add_disk("vd9", bus)
    copied = "dd if=/dev/urandom of=/dev/vdb bs=64k count=16 conv=fsync 2>&-; head -c 1048576 /dev/vdb | sha256sum"
    said = lab.guest.type(copied, SLOW).split()[0]
    there = lab.host.run(["sh", "-c", f"head -c 1048576 {DATA} | sha256sum"], check=True).stdout.split()[0]
    assert said == there
    lab.remove("vd9")
    assert lab.guest.type("ls /dev/vdb 2>&-") == ""


def test_r23_a_guest_ejects_a_device_by_itself(lab: Lab) -> None:
    lab.add_disk("vd9", "rp2")
    lab.guest.type("echo 0 > /sys/bus/pci/slots/2/power", SLOW)
    lab.wait_deleted("vd9")
    assert lab.guest.type("cat /sys/bus/pci/slots/2/adapter") == "0"
    lab.add_disk("vd9", "rp2")
    lab.remove("vd9")


@contextmanager
def iperf_server(host: EmulatedHost) -> Iterator[Process]:
    server = host.spawn(["iperf3", "-s", "--forceflush"])
    try:
        server.expect("listening")
        yield server
    finally:
        server.signal(15)
        server.wait()


def test_a_network_device_is_removed_under_traffic(lab: Lab) -> None:
    with iperf_server(lab.host) as server:
        lab.add_nic("hot0", "rp1")
        lab.guest.type(f"iperf3 -c {HOST} -t 3600 --connect-timeout 5000 >/tmp/iperf 2>&1 &")
        server.expect(re.compile(r"sec .*bits/sec"))
        lab.remove("hot0")
        assert lab.guest.type("ls /sys/class/net") == "lo"
        lab.guest.type("kill -9 $!; wait", SLOW)
    lab.qmp("netdev_del", id="tap-hot0")
    status = lab.guest.status()
    assert (status["status"], status["device-faults"]) == ("running", 0)


@pytest.mark.parametrize("bus", ["rp2", "rp4"], ids=["power controller", "no power controller"])
def test_a_device_is_torn_out_and_another_put_in(lab: Lab, bus: str) -> None:
    lab.add_disk("vd9", bus)
    lab.qmp("device_del", id="vd9", force="true")
    lab.wait_deleted("vd9")
    lab.until("[ ! -b /dev/vdb ]")
    lab.add_disk("vd9", bus)
    lab.remove("vd9")
