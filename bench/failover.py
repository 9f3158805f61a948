"""`python -m bench.failover`: how a guest with a failover pair migrates, beside QEMU on the same emulated host.

For virtual functions of an igb, and for whole e1000e, each on a host of its own: a guest of QEMU's, one of kvmpy's, and
one whose pair has no primary, go there and back between two processes, by turns. The same kernel and the same back
ends, native hot-plug in both. What QEMU leaves to whoever manages it, that a virtual function's address goes with the
traffic, is done for it as soon as it says something (`hooks`); kvmpy does it by itself.

"blackout" is from STOP on the source to RESUME on the destination; "gap" what a station on the wire, which pings ten
times a second, heard nothing for, and "lost" how many of its pings. "enslaved" and "in service" are from RESUME until
the guest has taken its primary in, and until that has a link. "back" is the latter from STOP on: QEMU prepares the
primary before RESUME, and kvmpy has none of it in the blackout. "in all" is from `migrate` to RESUME.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Final

from bench.figures import Stack
from bench.linux import NATIVE_HOTPLUG, Machine, answer, end_shared_host, qemu
from bench.results import table
from bench.rows import KVMPY, QEMU, Pair, Row
from scripts.lab.hardware import BRIDGE, HARDWARE, NIC_MACS, UPLINK_MAC, Hardware, Nic
from scripts.lab.host import EmulatedHost
from scripts.lab.nics import functions, pf
from tests.lab import tables
from tests.lab.journey import PINGER

ROUNDS: Final = 5
TURN_SECONDS: Final = 300.0  # more than one takes, for a busy machine
OTHER_MAC, THIRD_MAC, NO_MAC = "52:54:00:00:01:10", "52:54:00:00:01:20", "00:00:00:00:00:00"
PF_MAC: Final = "52:54:00:00:01:30"
DRIVERS: Final = {"igb": "igbvf", "e1000e": "e1000e"}
FIGURES: Final = ("blackout", "gap", "lost", "wait-unplug", "enslaved", "in service", "back", "in all")
NAME: Final = "failover"
LEFT_OUT: Final = ("failover",)
ALONE: Final = "alone"
CONTENDERS: Final = (QEMU, KVMPY, ALONE)

CONFIG: Final = """\
[machine]
memory = "256MiB"
cpus = 1

[boot]
kernel = "{boot}/{image}"
initrd = "{boot}/initrd.img"
cmdline = "{line}"

[console]
serial = "unix:{serial}"

"""


def hardware(model: str) -> Hardware:
    """Two NICs for a guest of QEMU's, two for one of kvmpy's. Whole ones have the address of their guest's pair."""
    if model == "igb":  # with an uplink of its own: see docs/lab.md for what the PF's does beside guests with functions
        nics = Nic("virtio-net-pci", UPLINK_MAC), Nic(model, PF_MAC, port=1)
        return replace(HARDWARE[model], nics=nics, vfs=4, pf=PF_MAC)
    macs = (NIC_MACS[0], NIC_MACS[0], OTHER_MAC, OTHER_MAC)
    passed = (Nic(model, mac, port=port) for port, mac in enumerate(macs, 1))
    return replace(HARDWARE[model], nics=(Nic("virtio-net-pci", UPLINK_MAC), *passed))


def machine(model: str, address: str) -> Machine:
    """The guest's, but for its devices."""
    words = f"modules=virtio_pci,virtio_net,{DRIVERS[model]} address={address}/24"
    return Machine(NAME, "vmlinuz", words, kernel="generic")


class Yard:
    """An emulated host, and whom it has seats for."""

    def __init__(self, host: EmulatedHost, model: str) -> None:
        self._host, self._model = host, model
        self._functions, self._pf = functions(host), pf(host)

    def contenders(self) -> dict[str, Any]:
        """What failover_turns.py is told."""
        first, second = NIC_MACS[0], OTHER_MAC
        return {
            QEMU: self._contender("10.77.0.51", first, [self._qemu(n, first, "10.77.0.51") for n in (0, 1)]),
            KVMPY: self._contender("10.77.0.52", second, [self._kvmpy(n, second, "10.77.0.52") for n in (0, 1)]),
            ALONE: self._contender("10.77.0.53", THIRD_MAC, [self._alone(n, "10.77.0.53") for n in (0, 1)], False),
        }

    @staticmethod
    def _contender(address: str, mac: str, seats: list[dict[str, Any]], primary: bool = True) -> dict[str, Any]:
        return {"address": address, "mac": mac, "primary": primary, "seats": seats}

    def _qemu(self, number: int, mac: str, address: str) -> dict[str, Any]:
        """q35 with the function ``number``, which is reserved for it, and with native hot-plug."""
        tap, function, at = f"tap-q{number}", self._functions[number], f"/run/qemu{number}"
        make_tap = f"ip tuntap add {tap} mode tap; ip link set {tap} master {BRIDGE} up"
        take = (
            f"cd /sys/bus/pci/devices/{function}; [ ! -e driver ] || echo {function} >driver/unbind;"
            f" echo vfio-pci >driver_override; echo {function} >/sys/bus/pci/drivers_probe"
        )
        self._host.run(["sh", "-ec", f"{make_tap}; {take}"], check=True)
        if number == 0:
            self._host.run(self._steer(0, mac) or ["true"], check=True)
        words = [
            *(*qemu(machine(self._model, address)), *NATIVE_HOTPLUG),
            *("-serial", f"unix:{at}.serial,server=on,wait=off"),
            *("-device", "pcie-root-port,id=rp1,chassis=1,slot=1", "-device", "pcie-root-port,id=rp2,chassis=2,slot=2"),
            *("-netdev", f"tap,id=hostnet,ifname={tap},script=no,downscript=no,vhost=on"),
            *("-device", f"virtio-net-pci,netdev=hostnet,id=net1,mac={mac},bus=rp2,failover=on"),
            *("-device", f"vfio-pci,host={function},id=hostdev0,bus=rp1,failover_pair_id=net1"),
            *("-qmp", f"unix:{at}.qmp,server=on,wait=off"),
        ]
        hooks = {"source:MIGRATION active": self._steer(number, NO_MAC)}
        hooks["destination:FAILOVER_NEGOTIATED"] = self._steer(number, mac)
        seat = {"qmp": f"{at}.qmp", "serial": f"{at}.serial", "uri": f"unix:{at}.stream"}
        moved = {event: [words] for event, words in hooks.items() if words}
        return seat | {"command": words, "incoming": ["-incoming", seat["uri"]], "hooks": moved}

    def _steer(self, number: int, mac: str) -> list[str]:
        """What gives a virtual function an address."""
        return ["ip", "link", "set", self._pf, "vf", str(number), "mac", mac] if self._model == "igb" else []

    def _kvmpy(self, number: int, mac: str, address: str) -> dict[str, Any]:
        keys = {"driver": "vfio-pci", "id": "hostdev0", "host": self._functions[2 + number], "bus": "rp1"}
        return self._seat(f"k{number}", mac, address, tables.table("device", **keys, failover_pair_id="net1"))

    def _alone(self, number: int, address: str) -> dict[str, Any]:
        return self._seat(f"a{number}", THIRD_MAC, address, "")

    def _seat(self, name: str, mac: str, address: str, primary: str) -> dict[str, Any]:
        """kvmpy with a standby, and with its ``primary``."""
        standby = tables.nic("net1", f"tap-{name}", BRIDGE, bus="rp2", mac=mac) + "failover = true\n"
        serial, file = f"/run/{name}.serial", f"/run/{name}.toml"
        guest = machine(self._model, address)
        known = {"boot": guest.boot, "image": guest.image, "line": guest.command_line, "serial": serial}
        self._host.write_file(file, CONFIG.format(**known) + tables.root_ports("rp1", "rp2") + standby + primary)
        uri = f"unix:/run/{name}.stream"
        seat = {"qmp": f"/run/kvmpy/{name}/qmp.sock", "serial": serial, "uri": uri, "hooks": {}}
        return seat | {"command": ["kvmpy", "run", file, "--name", name], "incoming": ["--incoming", uri]}


def turns(model: str, rounds: int, names: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Each figure of each contender's turns; what a contender has not is no number."""
    end_shared_host()
    with EmulatedHost(memory="4G", hardware=hardware(model)) as host:
        known = {name: each for name, each in Yard(host, model).contenders().items() if name in names}
        words = ["-m", "bench.failover_turns", str(rounds), str(PINGER), json.dumps(known)]
        said: dict[str, list[dict[str, float | None]]]
        said = answer(host, words, len(known) * (rounds + 2) * TURN_SECONDS)
    return {who: {what: [_number(turn[what]) for turn in each] for what in each[0]} for who, each in said.items()}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def measure(quick: bool) -> list[Row]:
    """None of it is quick: a guest with a pair goes there and back in minutes."""
    return [] if quick else [row for model in DRIVERS for row in rows(model, turns(model, ROUNDS, CONTENDERS))]


def rows(model: str, taken: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Row]:
    ours, theirs, alone = taken[KVMPY], taken[QEMU], taken[ALONE]
    name = f"failover, {model}"
    bars = {who: _parts(taken[who]) for who in (KVMPY, QEMU)}
    figure = Stack(f"From the guest's last instruction until its primary is in service, {model}", "s", bars)
    return [
        Pair(f"{name}: blackout", ours["blackout"], theirs["blackout"], "s", f"failover {model}").row(),
        Pair(
            f"{name}: blackout, no primary",
            *(ours["blackout"], alone["blackout"], "s", "failover alone"),
            peer_name="kvmpy without a primary",
        ).row(),
        Pair(f"{name}: primary back", ours["back"], theirs["back"], "s", "failover back", figure=figure).row(),
        Pair(f"{name}: in all", ours["in all"], theirs["in all"]).row(),
    ]


def _parts(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    blackout, enslaved, linked = (median(taken[what]) for what in ("blackout", "enslaved", "in service"))
    return {"blackout": blackout, "without the primary": enslaved, "until it has a link": linked - enslaved}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.failover", description="Migrate a guest with a failover pair.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each guest, of which the median is taken")
    parser.add_argument("--model", choices=DRIVERS, action="append", help="the NICs: both kinds, one after the other")
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="not all of them")
    options = parser.parse_args()
    for model in options.model or DRIVERS:
        taken = turns(model, options.rounds, options.only or CONTENDERS)
        print(f"{model:<14}" + "".join(f"{who:>10}" for who in taken))
        for what in FIGURES:
            print(f"{what:<14}" + "".join(f"{median(each[what]):>10.3f}" for each in taken.values()))
        if len(taken) == len(CONTENDERS):
            print("\n".join(table(rows(model, taken))))


if __name__ == "__main__":
    main()
