"""`python -m bench.hotplug`: how long a device's coming and going takes, beside QEMU on the same emulated host.

pciehp's own sleeps are in both: 5 s from the press, 1 s of power off, 0.12 s for the link. "asked" is what device_add
takes, "in" the time from then on until the guest has used the device, "usable" is both, and "out" is device_del's until
DEVICE_DELETED. The taps of both are in the bridge beforehand. A port without a power controller is measured too, where
Linux leaves out a second; with QEMU such a port never lets go.

Both guests run all the time, and each round is one's turn after the other's: whatever else the machine does meanwhile
befalls both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

from bench.linux import NATIVE_HOTPLUG, Machine, qemu, shared_host
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row
from scripts.lab.host import EmulatedHost
from tests.lab import tables
from tests.lab.guest import Guest
from tests.lab.test_hotplug import BRIDGE, DATA, GUEST, HOST, PORTS, TAP, bridge_and_disk, ports, spare_drive

GUEST_LOOP: Final = (
    "n=; b=; while :; do"
    " if [ -d /sys/class/net/eth0 ]; then [ $n ] || { ip addr add "
    + GUEST
    + "/24 dev eth0; ip link set eth0 up; ping -c 1 -W 5 "
    + HOST
    + " && n=1; }; else n=; fi;"
    " if [ -b /dev/vda ]; then [ $b ] || { dd if=/proc/uptime of=/dev/vda conv=fsync && b=1; }; else b=; fi;"
    " sleep 0.05; done >/dev/null 2>&1 &"
)
WORDS: Final = "modules=virtio_pci,virtio_net,virtio_blk"
ROUNDS: Final = 3
NAME: Final = "hotplug"
LEFT_OUT: Final = ("hot-plug",)
WITHOUT: Final = "without"
QEMU_TAP, QEMU_DATA, QEMU_SOCKET = f"{TAP}q", f"{DATA}.qemu", "/run/qemu.sock"
SHOWN: Final = ("asked", "in", "usable", "out")


def contender(socket: str, net_bus: str, blk_bus: str, disk: str) -> dict[str, Any]:
    """What plug_times.py is told of one."""
    net = {"driver": "virtio-net-pci", "id": "hot0", "netdev": "hostnet", "bus": net_bus}
    blk = {"driver": "virtio-blk-pci", "id": "vd9", "drive": "data", "bus": blk_bus}
    return {"socket": socket, "net": net, "blk": blk, "disk": disk}


@contextmanager
def tap(host: EmulatedHost, name: str) -> Iterator[None]:
    """A port of the bridge, made before any device asks for it."""
    made = f"ip tuntap add {name} mode tap vnet_hdr; ip link set {name} master {BRIDGE} up"
    host.run(["sh", "-ec", made], check=True)
    try:
        yield
    finally:
        host.run(["ip", "link", "del", name], check=True)


@contextmanager
def kvmpy_guest(host: EmulatedHost) -> Iterator[None]:
    netdev = tables.table("netdev", type="tap", id="hostnet", ifname=TAP)
    with tap(host, TAP), Guest(host, "times", tables=ports(*PORTS) + netdev + spare_drive(), words=WORDS) as guest:
        guest.wait_shell()
        guest.process.send(f"{GUEST_LOOP}\n")
        yield


@contextmanager
def qemu_guest(host: EmulatedHost) -> Iterator[None]:
    """q35 with the same kernel, native hot-plug, the same back ends."""
    host.run(["cp", "--sparse=always", DATA, QEMU_DATA], check=True)
    process = host.spawn(
        [
            *(*qemu(Machine(NAME, "vmlinuz", WORDS)), *NATIVE_HOTPLUG, "-serial", "stdio"),
            *("-device", "pcie-root-port,id=rp1,chassis=1,slot=1", "-device", "pcie-root-port,id=rp2,chassis=2,slot=2"),
            *("-netdev", f"tap,id=hostnet,ifname={QEMU_TAP},script=no,downscript=no,vhost=on"),
            *("-blockdev", f"driver=raw,node-name=data,file.driver=file,file.filename={QEMU_DATA}"),
            *("-qmp", f"unix:{QEMU_SOCKET},server=on,wait=off"),
        ],
        tty=True,
    )
    try:
        process.expect("KVMPY-GUEST UP", 240)
        process.expect("guest# ")
        process.send(f"{GUEST_LOOP}\n")
        yield
    finally:
        process.signal(15)
        process.wait()
        host.run(["rm", "-f", QEMU_DATA], check=True)


def plug_times(host: EmulatedHost, rounds: int) -> Mapping[str, Mapping[str, list[float]]]:
    """Who takes how long for what."""
    ours = "/run/kvmpy/times/qmp.sock"
    contenders = {
        KVMPY: contender(ours, "rp1", "rp2", DATA),
        QEMU: contender(QEMU_SOCKET, "rp1", "rp2", QEMU_DATA),
        WITHOUT: contender(ours, "rp3", "rp4", DATA),
    }
    program = ["bench/plug_times.py", str(rounds), BRIDGE, json.dumps(contenders)]
    done = host.run(["python", *program], timeout=60 + rounds * 300, check=True)
    said: dict[str, dict[str, list[float]]] = json.loads(done.stdout)
    return said


def measure(quick: bool) -> list[Row]:
    """None of it is quick: pciehp's sleeps are in all of it."""
    if quick:
        return []
    with shared_host() as host, bridge_and_disk(host), kvmpy_guest(host), tap(host, QEMU_TAP), qemu_guest(host):
        taken = plug_times(host, ROUNDS)
    rows = []
    for what in [f"{kind} {shown}" for kind in ("net", "blk") for shown in SHOWN]:
        note = f"without a power controller {median(taken[WITHOUT][what]):.2f} s"
        rows.append(Pair(f"hot-plug: {what}", taken[KVMPY][what], taken[QEMU][what], "s", "hotplug", note=note).row())
    return rows


if __name__ == "__main__":
    main(NAME, measure)
