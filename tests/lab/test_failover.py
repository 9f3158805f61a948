"""A failover pair in a real guest: virtio-net on a tap of the bridge, and a virtual function of its uplink."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

from scripts.lab.hardware import NIC_MACS, STATION_ADDRESS
from scripts.lab.images import Images
from scripts.lab.process import Process
from tests.lab import tables
from tests.lab.guest import Guest, root_disk
from tests.lab.nics import NicHost
from tests.lab.test_network import EVENTS

NAME, STANDBY, PRIMARY, MAC = "pair", "net1", "hostdev0", "52:54:00:6f:55:cc"
ADDRESS: Final = "10.77.0.20"
SLOW: Final = 300.0
NO_MAC: Final = "00:00:00:00:00:00"
ALL_HEARD: Final = "10 packets transmitted, 10 packets received, 0% packet loss"
PICTURE: Final = (
    "for n in /sys/class/net/e*; do m=$(readlink $n/master); d=$(readlink $n/device/driver);"
    " echo ${n##*/} $(cat $n/address) ${m##*/} ${d##*/}; done"
)
TRIO: Final = [f"eth0 {MAC} virtio_net", f"eth1 {MAC} eth0 virtio_net", f"eth2 {MAC} eth0 igbvf"]
ALONE: Final = TRIO[:2]


def pair(function: str) -> str:
    """Two root ports, a standby behind one, and its primary."""
    standby = tables.nic(STANDBY, "tap-pair", "br0", bus="rp2", mac=MAC) + "failover = true\n"
    return tables.root_ports("rp1", "rp2") + standby + tables.table("device", **primary(function))


def primary(function: str) -> dict[str, str]:
    """The keys of its table."""
    return {"driver": "vfio-pci", "id": PRIMARY, "host": function, "bus": "rp1", "failover_pair_id": STANDBY}


@dataclass
class Lab:
    """A guest with the pair, and who tells of its events."""

    guest: Guest
    host: NicHost
    function: str
    events: Process

    def picture(self, trio: list[str]) -> None:
        """Wait until the guest has these interfaces."""
        names = f"[ $(ls -d /sys/class/net/e* | wc -l) = {len(trio)} ]"
        self.guest.type(f"n=0; until {names} || [ $n = 1500 ]; do sleep 0.1; n=$((n + 1)); done", SLOW)
        assert self.guest.type(PICTURE, SLOW).splitlines() == trio

    def pair(self) -> dict[str, Any]:
        (found,) = self.guest.qmp("query-failover")
        assert isinstance(found, dict)
        return found

    def vf_mac(self) -> str:
        """The address that the PF holds the first function to."""
        shown = self.host.run(["ip", "link", "show", "dev", self.host.uplink], check=True).stdout
        found = re.search(r"vf 0 .*?(?:link/ether|MAC) ([0-9a-f:]{17})", shown)
        assert found, shown
        return found[1]

    def set_up(self) -> None:
        """Give the guest its address, and wait until it is heard."""
        self.guest.type(f"ip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up")
        self.wait_heard()

    def wait_heard(self) -> None:
        """Between the moment that a primary is taken in and that its link is up the guest hears nothing."""
        heard = f"n=0; until busybox ping -c 1 -W 2 {STATION_ADDRESS} >&- || [ $n = 120 ]; do n=$((n + 1)); done"
        assert self.guest.type(f"{heard}; [ $n != 120 ]; echo $?", SLOW) == "0"

    def pings(self) -> str:
        """The line that says what was lost."""
        return self.guest.type(f"busybox ping -q -i 0.2 -c 10 -W 20 {STATION_ADDRESS} | grep loss", SLOW)

    def counts(self, interface: str) -> tuple[int, int]:
        """Frames that it has received and sent."""
        at = f"/sys/class/net/{interface}/statistics"
        received, sent = self.guest.type(f"cat {at}/rx_packets {at}/tx_packets").split()
        return int(received), int(sent)

    def wait(self, event: str, device: str) -> None:
        self.events.expect(re.compile(rf'"{event}"[^\n]*"{device}"'), SLOW)

    def wait_all(self, *events: tuple[str, str]) -> None:
        """Until each of these, event and device, has come, in whatever order."""
        each = (rf"""(?=.*"{event}"[^\n]*"{device}")""" for event, device in events)
        self.events.expect(re.compile(rf"(?s){''.join(each)}.*"), SLOW)


@pytest.fixture(scope="module")
def lab(igb_host: NicHost, lab_images: Images) -> Iterator[Lab]:
    function = igb_host.functions[0]
    driver = igb_host.driver(function)
    with root_disk(igb_host, lab_images, NAME) as root:
        config = pair(function) + tables.disk("root", root)
        words = "root=/dev/vda modules=virtio_net,igbvf"
        with Guest(igb_host, NAME, kernel="generic", tables=config, words=words) as guest:
            guest.wait_shell()
            events = igb_host.spawn(["python", "-I", "-S", "-c", EVENTS, f"/run/kvmpy/{NAME}/qmp.sock"])
            events.expect("listening")
            yield Lab(guest, igb_host, function, events)
            events.signal(15)
            events.wait()
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0
    assert igb_host.driver(function) == driver, "the host has it back"


def test_r9_the_guest_has_three_interfaces_and_one_address(lab: Lab) -> None:
    lab.picture(TRIO)
    lab.set_up()
    found = lab.pair()
    assert (found["state"], found["negotiated"], found["path"]) == ("plugged", True, "primary")
    assert (found["standby-mac"], found["primary-mac"]) == (MAC, MAC)
    assert lab.vf_mac() == MAC


def test_r27_each_of_its_bars_has_found_room_in_a_window_of_its_port(lab: Lab) -> None:
    device = "$(readlink -f /sys/class/net/eth2/device)"
    bars = ranges(lab.guest.type(f"head -n 6 {device}/resource"))
    windows = ranges(lab.guest.type(f"cat {device}/../resource"))
    assert len(bars) >= 2
    for first, last in bars:
        assert any(start <= first and last <= end for start, end in windows), (bars, windows)
    assert lab.guest.type("dmesg | grep -c -e 'no space' -e 'failed to assign'") == "0"


def ranges(resources: str) -> list[tuple[int, int]]:
    """The addresses of a function as sysfs lists them: first, last and flags of each, zeros where there is none."""
    lines = [[int(number, 16) for number in line.split()] for line in resources.splitlines()]
    return [(first, last) for first, last, flags in lines if flags and last > first]


def test_traffic_runs_over_the_primary(lab: Lab) -> None:
    lab.guest.type("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")  # which speaks of its own accord, on each
    before, standby = lab.counts("eth2"), lab.counts("eth1")
    assert lab.pings() == ALL_HEARD
    after = lab.counts("eth2")
    assert after[0] - before[0] >= 10
    assert after[1] - before[1] >= 10
    assert lab.counts("eth1")[1] - standby[1] == 0


def test_r49_after_device_del_traffic_goes_on_over_the_standby(lab: Lab) -> None:
    lab.guest.qmp("device_del", f"id={PRIMARY}")
    lab.wait("FAILOVER_PRIMARY_RELEASED", PRIMARY)
    lab.wait("DEVICE_DELETED", PRIMARY)
    lab.picture(ALONE)
    assert lab.pings() == ALL_HEARD
    assert (lab.pair()["state"], lab.pair()["path"]) == ("no-primary", "standby")


def test_r11_device_add_brings_it_back(lab: Lab) -> None:
    words = [f"{key}={value}" for key, value in primary(lab.function).items()]
    lab.guest.qmp("device_add", *words)
    lab.wait_all(("FAILOVER_PATH_CHANGED", STANDBY), ("FAILOVER_PRIMARY_PLUGGED", PRIMARY))
    lab.picture(TRIO)
    lab.wait_heard()
    assert lab.pings() == ALL_HEARD
    assert lab.vf_mac() == MAC


def test_r12_after_a_reboot_names_and_roles_are_those_of_the_first_boot(lab: Lab) -> None:
    lab.guest.kvmpy("reset", NAME)
    lab.wait("RESET", "host-qmp-system-reset")
    lab.guest.wait_shell()
    lab.picture(TRIO)
    lab.set_up()
    assert lab.pings() == ALL_HEARD


def test_a_driver_that_is_unloaded_leaves_the_guest_its_primary(lab: Lab) -> None:
    lab.guest.type("rmmod virtio_net", SLOW)
    assert lab.guest.type(PICTURE, SLOW).splitlines() == [f"eth2 {MAC} igbvf"]
    assert (lab.pair()["state"], lab.pair()["negotiated"]) == ("plugged", False)
    lab.guest.type(f"ip addr add {ADDRESS}/24 dev eth2; ip link set eth2 up")
    lab.wait_heard()
    assert lab.pings() == ALL_HEARD


def test_r9_a_guest_without_virtio_net_never_sees_the_primary(igb_host: NicHost, lab_images: Images) -> None:
    function = igb_host.functions[1]
    config = pair(function).replace("tap-pair", "tap-old").replace(MAC, "52:54:00:6f:55:cd")
    with Guest(igb_host, "old", kernel="generic", tables=config, words="modules=igbvf") as guest:
        guest.wait_shell()
        assert guest.type("ls /sys/class/net") == "lo"
        assert "igbvf" in guest.type("ls /sys/module")
        (found,) = guest.status()["failover"]
        assert (found["state"], found["negotiated"]) == ("hidden", False)
        shown = igb_host.run(["ip", "link", "show", "dev", igb_host.uplink], check=True).stdout
        assert NO_MAC in shown[shown.index("vf 1 ") :], "nothing is delivered to a function that nobody drives"
        guest.process.send("poweroff -f\n")
        assert guest.wait_end() == 0


def test_r6_a_whole_nic_is_a_primary_too_if_its_standby_has_its_address(
    e1000e_host: NicHost, lab_images: Images
) -> None:
    function, mac = e1000e_host.functions[1], NIC_MACS[1]
    config = pair(function).replace("tap-pair", "tap-whole")
    with Guest(
        e1000e_host, "whole", kernel="generic", tables=config, words="modules=virtio_pci,virtio_net,e1000e"
    ) as guest:
        guest.process.expect(f"has the address {mac}, and its standby '{STANDBY}' {MAC}", SLOW)
        assert guest.wait_end() == 1
    assert e1000e_host.driver(function) == "e1000e"
    config = config.replace(MAC, mac)
    with Guest(
        e1000e_host, "whole", kernel="generic", tables=config, words="modules=virtio_pci,virtio_net,e1000e"
    ) as guest:
        guest.wait_shell()
        guest.type(
            "n=0; until [ -e /sys/class/net/eth2/master ] || [ $n = 1500 ]; do sleep 0.1; n=$((n + 1)); done", SLOW
        )
        shown = [line.replace(MAC, mac).replace("igbvf", "e1000e") for line in TRIO]
        assert guest.type(PICTURE, SLOW).splitlines() == shown
        (found,) = guest.status()["failover"]
        assert (found["state"], found["path"], found["primary-mac"]) == ("plugged", "primary", mac)
        guest.type("ip addr add 10.77.0.21/24 dev eth0; ip link set eth0 up")
        heard = f"n=0; until busybox ping -c 1 -W 2 {STATION_ADDRESS} >&- || [ $n = 120 ]; do n=$((n + 1)); done"
        assert guest.type(f"{heard}; [ $n != 120 ]; echo $?", SLOW) == "0"
        guest.process.send("poweroff -f\n")
        assert guest.wait_end() == 0
    assert e1000e_host.driver(function) == "e1000e"
