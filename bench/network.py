"""`python -m bench.network`: a guest's network beside QEMU's, through vhost-net and through userspace, in one host.

Both guests run all the time, each with a network device of either kind, and take turns. iperf3's server is in the guest
and its client on the host; with -R the guest sends. The host has one processor, which the guest, vhost and iperf3
share: a rate there is what a packet costs all of them together. Beside the rates are the exits to userspace meanwhile,
and the share of the processor that the VMM had beside its vCPU, vhost's thread included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any, Final, NamedTuple

from bench import watch
from bench.budgets import NETWORK_EXITS
from bench.linux import Disk, KvmpyGuest, LinuxGuest, Machine, Nic, QemuGuest, bridge, shared_host
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, alternately
from scripts.lab.host import EmulatedHost
from scripts.lab.images import make
from tests.lab.guest import FROM_DISK, root_disk

NAME: Final = "network"
LEFT_OUT: Final = ("network through userspace, and to the guest",)
PATHS: Final = {"vhost": "10.77.1", "userspace": "10.77.2"}
"""The kinds of network devices, in the guest's order, and the network that each is on."""
GUESTS: Final = {KVMPY: 2, QEMU: 3}
"""The last byte of their addresses; the host's is 1."""
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
SENDS: Final = "-R"
"""The guest does, not the client on the host."""
SECONDS: Final = 3
PINGS: Final = 100
SLOW: Final = 120.0
PING: Final = re.compile(r"time=([\d.]+) ms")


class Traffic(NamedTuple):
    """What iperf3 is told, and what of its report is the figure."""

    name: str
    options: Sequence[str]
    unit: str


TRAFFICS: Final = (
    Traffic("TCP from the guest", (SENDS,), "bit/s"),
    Traffic("TCP to the guest", (), "bit/s"),
    Traffic("UDP of 64 bytes from the guest", (SENDS, "-u", "-b", "0", "-l", "64"), "packet/s"),
    Traffic("UDP of 64 bytes to the guest", ("-u", "-b", "0", "-l", "64"), "packet/s"),
)
QUICK_TRAFFICS: Final = (TRAFFICS[0], TRAFFICS[2])
LATENCY: Final = "round trip of a ping"


def rate(report: Mapping[str, Any], unit: str) -> float:
    """What arrived, of iperf3's report: bits or datagrams in a second."""
    if "error" in report:
        raise ValueError(f"iperf3: {report['error']}")
    received = report["end"]["sum_received"]
    if unit == "bit/s":
        return float(received["bits_per_second"])
    return float((received["packets"] - received["lost_packets"]) / received["seconds"])


def send(host: EmulatedHost, pid: int, address: str, traffic: Traffic) -> dict[str, float]:
    """One run: its rate, and what the VMM had to do meanwhile."""
    watch.count_exits(host)
    before = watch.processor(host, pid)
    words = ["iperf3", "-c", address, "-t", str(SECONDS), "-J", *traffic.options]
    report = json.loads(host.run(words, timeout=SLOW, check=True).stdout)
    after, exits = watch.processor(host, pid), watch.exits(host, pid)
    seconds = after.at - before.at
    return {
        "rate": rate(report, traffic.unit),
        "exits": exits / seconds,
        "share": (after.own - before.own) / seconds,
    }


def ping(host: EmulatedHost, address: str) -> dict[str, float]:
    """The median round trip, in seconds."""
    words = ["busybox", "ping", "-c", str(PINGS), "-i", "0.02", address]
    return {"rate": median(round_trips(host.run(words, timeout=SLOW, check=True).stdout))}


def round_trips(text: str) -> list[float]:
    return [float(milliseconds) / 1000 for milliseconds in PING.findall(text)]


def begin(host: EmulatedHost, stack: ExitStack, who: str) -> int:
    """Start a guest and have it answer; returns the VMM's process."""
    number = GUESTS[who]
    name = f"net-{who.lower()}"
    root = stack.enter_context(root_disk(host, make(), name))
    nics = [
        Nic(path, f"br-{path}", f"52:54:00:00:0{kind}:0{number}", vhost=path == "vhost")
        for kind, path in enumerate(PATHS)
    ]
    machine = Machine(name, words=FROM_DISK, disks=[Disk("root", root)], nics=nics)
    guest: LinuxGuest = KvmpyGuest(host, machine) if who == KVMPY else QemuGuest(host, machine)
    stack.enter_context(guest)
    guest.wait_shell()
    for kind, network in enumerate(PATHS.values()):
        guest.type(f"ip addr add {network}.{number}/24 dev eth{kind}; ip link set eth{kind} up")
    pid = watch.pid_of(host, guest.pid_file)
    watch.count_exits(host)
    guest.type("ip link set lo up; iperf3 -s -D", SLOW)
    if not watch.exits(host, pid):  # those of its serial line; else that there are none later would say nothing
        raise RuntimeError(f"{who}: its exits are not counted")
    return pid


def measure(quick: bool) -> list[Row]:
    rows = []
    with shared_host() as host, ExitStack() as stack:
        for path, network in PATHS.items():
            stack.enter_context(bridge(host, f"br-{path}", f"{network}.1/24"))
        pids = {who: begin(host, stack, who) for who in GUESTS}
        for path in ("vhost",) if quick else PATHS:
            addresses = {who: f"{PATHS[path]}.{number}" for who, number in GUESTS.items()}
            for traffic in QUICK_TRAFFICS if quick else TRAFFICS:
                ways = {who: partial(send, host, pids[who], addresses[who], traffic) for who in GUESTS}
                found = alternately(ways, QUICK_ROUNDS if quick else ROUNDS)
                rows += traffic_rows(path, traffic, found)
            pings = {who: partial(ping, host, addresses[who]) for who in GUESTS}
            found = alternately(pings, QUICK_ROUNDS if quick else ROUNDS)
            rows.append(Pair(f"{LATENCY}, {path}", found[KVMPY]["rate"], found[QEMU]["rate"]).row())
    return rows


def traffic_rows(path: str, traffic: Traffic, found: Mapping[str, Mapping[str, list[float]]]) -> list[Row]:
    ours, theirs = found[KVMPY], found[QEMU]
    name, is_vhost = f"{traffic.name}, {path}", path == "vhost"
    budget = "network rate" if is_vhost and SENDS in traffic.options else None
    rows = [
        Pair(name, ours["rate"], theirs["rate"], traffic.unit, budget).row(),
        Pair(f"{name}: the VMM's share of a processor", ours["share"], theirs["share"], "").row(),
    ]
    if is_vhost:
        limit = [NETWORK_EXITS] * len(ours["exits"])
        rows.append(Pair(f"{name}: exits", ours["exits"], limit, "1/s", "network exits", peer_name="the limit").row())
    rows.append(Pair(f"{name}: exits beside QEMU's", ours["exits"], theirs["exits"], "1/s").row())
    return rows


if __name__ == "__main__":
    main(NAME, measure)
