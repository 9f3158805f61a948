"""The whole of it: a guest with a failover pair goes to another host by one command, and comes back.

Each host has a NIC with virtual functions, whose PF is its bridge's uplink; the function is another there than here. A
station on the wire, on neither of the bridges, looks on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from scripts.lab.hardware import STATION, STATION_ADDRESS
from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from scripts.lab.nics import functions
from scripts.lab.pair import NAMES, HostPair
from tests.lab.guest import Attached, Guest
from tests.lab.journey import SLACK_MS, SLOW, Pings, pinged
from tests.lab.test_failover import ALL_HEARD, MAC, PICTURE, PRIMARY, TRIO, pair

NAME, ADDRESS = "pair", "10.77.0.50"
WORDS: Final = f"modules=virtio_pci,virtio_net,igbvf address={ADDRESS}/24"
COUNTS: Final = "cat /sys/class/net/eth{}/statistics/tx_packets"

pytestmark = pytest.mark.timeout(1500)


class Seen:
    """A guest as its console shows it, on whichever host."""

    def __init__(self, host: EmulatedHost, guest: Guest) -> None:
        self._host, self._guest = host, guest

    def assert_whole(self) -> None:
        """R44: three interfaces, the primary below the one, its link up, and traffic on it and not on the standby."""
        there = "n=0; until [ -e /sys/class/net/eth2/master ] || [ $n = 1500 ]; do sleep 0.1; n=$((n + 1)); done"
        self._guest.type(there, SLOW)
        assert self._guest.type(PICTURE, SLOW).splitlines() == TRIO
        heard = f"n=0; until busybox ping -c 1 -W 2 {STATION_ADDRESS} >&- || [ $n = 120 ]; do n=$((n + 1)); done"
        assert self._guest.type(f"{heard}; [ $n != 120 ]; echo $?", SLOW) == "0"
        self._guest.type("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")  # which speaks on each of its own accord
        standby, primary = (int(self._guest.type(COUNTS.format(number))) for number in (1, 2))
        said = self._guest.type(f"busybox ping -q -i 0.2 -c 10 -W 20 {STATION_ADDRESS} | grep loss", SLOW)
        assert said == ALL_HEARD
        assert int(self._guest.type(COUNTS.format(1))) == standby
        assert int(self._guest.type(COUNTS.format(2))) >= primary + 10
        (found,) = json.loads(self._host.run(["kvmpy", "qmp", NAME, "query-failover"], check=True).stdout)
        assert (found["state"], found["path"], found["primary-mac"]) == ("plugged", "primary", MAC)


@pytest.fixture
def hosts(two_igb_hosts: HostPair, lab_images: Images) -> Iterator[HostPair]:
    yield two_igb_hosts
    for host in two_igb_hosts.hosts:
        host.run(["sh", "-c", f"[ ! -e /run/kvmpy/{NAME} ] || kvmpy stop {NAME}"])


def assert_prepared_beside(told: dict[str, Any]) -> None:
    """R54: the destination prepared its primary while the guest ran here, and most of it while it let its own go."""
    (prepare,) = [phase for phase in told["destination"]["phases"] if phase["name"] == f"prepare {PRIMARY}"]
    (leaves,) = [phase for phase in told["source"]["phases"] if phase["name"] == "wait-unplug"]
    print({phase["name"]: (phase["start-ms"], phase["ms"]) for phase in (prepare, leaves)})
    assert prepare["start-ms"] < leaves["start-ms"] + leaves["ms"]
    assert prepare["start-ms"] + prepare["ms"] < told["stopped-ms"]


def go(hosts: HostPair, here: int, function: str) -> dict[str, Any]:
    """By ssh from host number ``here`` to the other, where the primary is ``function``; figures of how it went."""
    seen: list[Pings] = []
    with pinged(hosts.first, ADDRESS, seen, netns=STATION):
        words = ["--set", f"device.{PRIMARY}.host={function}", "--report", "/run/there.json"]
        command = ["kvmpy", "migrate", NAME, f"ssh://{NAMES[1 - here]}", *words]
        done = hosts.hosts[here].run(command, timeout=SLOW)
        assert done.returncode == 0, done.stdout + done.stderr
        guest = Attached(hosts.hosts[1 - here], NAME)
        Seen(hosts.hosts[1 - here], guest).assert_whole()
        guest.detach()
    told: dict[str, Any] = json.loads(hosts.hosts[here].run(["cat", "/run/there.json"], check=True).stdout)
    figures = {"blackout-ms": told["blackout-ms"], "gap-ms": seen[0].gap * 1000, "lost": len(seen[0].lost)}
    print(figures, {phase["name"]: phase["ms"] for phase in told["blackout"]})
    assert_prepared_beside(told)
    assert figures["gap-ms"] < figures["blackout-ms"] + SLACK_MS, "it was deaf for much longer than it stood still"
    return figures


def test_r44_r54_a_guest_goes_to_another_host_and_back_with_its_traffic_on_a_primary_at_either(hosts: HostPair) -> None:
    here, there = functions(hosts.first)[0], functions(hosts.second)[1]
    config = pair(here)
    with Guest(hosts.first, NAME, kernel="generic", tables=config, words=WORDS) as guest:
        guest.wait_shell()
        Seen(hosts.first, guest).assert_whole()
        figures = [go(hosts, 0, there)]
        assert guest.wait_end() == 0
    figures.append(go(hosts, 1, here))
    print(figures)
