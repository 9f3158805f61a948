"""Two emulated hosts: what tests of migration from one to the other rely on."""

from __future__ import annotations

import re
import subprocess
import time
from typing import Final

import pytest

from scripts.lab.hardware import HARDWARE, PRIMARY_MAC, STATION, STATION_ADDRESS
from scripts.lab.nics import functions
from scripts.lab.pair import NAMES, SHARED_DISK, HostPair
from tests.lab.nics import DEVICES

OFFSET: Final = 1 << 20
BOTH: Final = pytest.mark.parametrize("here", [0, 1], ids=["from the first", "from the second"])


@BOTH
def test_each_host_reaches_the_other(two_hosts: HostPair, here: int) -> None:
    peer = two_hosts.addresses[1 - here]
    done = two_hosts.hosts[here].run(["busybox", "ping", "-q", "-c", "3", "-W", "20", peer], check=True)
    assert "3 packets received" in done.stdout


def test_the_station_of_the_first_reaches_the_second_and_is_on_the_same_wire(two_hosts: HostPair) -> None:
    ping = ["ip", "netns", "exec", STATION, "busybox", "ping", "-q", "-c", "3", "-W", "20", two_hosts.addresses[1]]
    assert "3 packets received" in two_hosts.first.run(ping, check=True).stdout
    assert STATION_ADDRESS in two_hosts.second.run(["ip", "neighbour"], check=True).stdout


@BOTH
def test_ssh_runs_a_command_on_the_other_by_its_name(two_hosts: HostPair, here: int) -> None:
    done = two_hosts.hosts[here].run(["ssh", NAMES[1 - here], "hostname; command -v kvmpy"])
    name, program = done.stdout.split()
    assert (done.returncode, name) == (0, NAMES[1 - here]), done.stderr
    assert program.endswith("/bin/kvmpy")


def test_ssh_takes_no_key_but_the_pairs(two_hosts: HostPair) -> None:
    stranger = "rm -f /run/other*; ssh-keygen -q -t ed25519 -N '' -f /run/other"
    login = f"ssh -F none -o BatchMode=yes -o IdentitiesOnly=yes -i /run/other {NAMES[1]} true"
    done = two_hosts.first.run(["sh", "-c", f"{stranger}; {login}"])
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_the_hosts_clocks_agree(two_hosts: HostPair) -> None:
    begin = time.time()
    offsets = []
    for host in two_hosts.hosts:
        before, there = time.time(), float(host.run(["date", "+%s.%N"], check=True).stdout)
        offsets.append(there - before)
    assert abs(offsets[0] - offsets[1]) < time.time() - begin + 0.2


@BOTH
def test_what_one_writes_to_the_shared_disk_the_other_reads(two_hosts: HostPair, here: int) -> None:
    text = f"written by {NAMES[here]}"
    write = f"printf '%-512s' '{text}' | dd of={SHARED_DISK} bs=512 count=1 seek={OFFSET // 512} oflag=direct"
    read = f"dd if={SHARED_DISK} bs=512 count=1 skip={OFFSET // 512} iflag=direct status=none"
    two_hosts.hosts[here].run(["sh", "-c", write], check=True)
    assert two_hosts.hosts[1 - here].run(["sh", "-c", read], check=True).stdout.strip() == text


def test_they_listen_to_nothing_on_this_machine(two_hosts: HostPair) -> None:
    command = ["ss", "--no-header", "--listening", "--tcp", "--udp", "--unix", "--processes"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [host.pid for host in two_hosts.hosts if f"pid={host.pid}," in shown] == []


@BOTH
def test_a_virtual_function_of_either_host_is_on_the_wire_of_the_first_ones_station(
    two_igb_hosts: HostPair, here: int
) -> None:
    host, address = two_igb_hosts.hosts[here], f"10.77.0.{30 + here}"
    function = functions(host)[0]
    assert host.run(["test", "-e", f"{DEVICES}/{function}/iommu_group"]).returncode == 0, "it can be passed through"
    name = host.run(["ls", f"{DEVICES}/{function}/net"], check=True).stdout.strip()
    set_up = f"ip netns add other; ip link set {name} netns other; ip -n other addr add {address}/24 dev {name}"
    host.run(["sh", "-ec", f"{set_up}; ip -n other link set {name} up"], check=True)
    try:
        ping = ["ip", "netns", "exec", STATION, "busybox", "ping", "-q", "-c", "5", "-W", "20", address]
        assert two_igb_hosts.first.run(ping).returncode == 0
    finally:
        host.run(["ip", "netns", "delete", "other"], check=True)


def test_whole_nics_of_both_hosts_have_one_address_and_all_others_have_their_own() -> None:
    wire = [HARDWARE["e1000e"].joined(number, -1).qemu_arguments() for number in (1, 2)]
    first, second = (re.findall(r"mac=([0-9a-f:]+)", " ".join(words)) for words in wire)
    assert [mac for mac in first if mac in second] == [PRIMARY_MAC, PRIMARY_MAC]
