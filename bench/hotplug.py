"""`python -m bench.hotplug`: how long a device's coming and going takes, beside QEMU on the same emulated host.

pciehp's own sleeps are in both: 5 s from the press, 1 s of power off, 0.12 s for the link. "asked" is what device_add
takes, "in" the time from then on until the guest has used the device, "out" is device_del's until DEVICE_DELETED. A
port without a power controller is measured too, where Linux leaves out a second; with QEMU such a port never lets go.
"""

from __future__ import annotations

import json
import statistics
from typing import Final

from scripts.lab.host import EmulatedHost
from scripts.lab.kernels import CHECKOUT
from tests.lab import tables
from tests.lab.guest import QUIET, Guest
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
ROUNDS: Final = 5
BUDGET: Final = 1.1  # R22


def plug_times(host: EmulatedHost, socket: str, net: dict[str, str], blk: dict[str, str]) -> dict[str, float]:
    """The medians."""
    program = ["bench/plug_times.py", socket, str(ROUNDS), BRIDGE, DATA, json.dumps(net), json.dumps(blk)]
    done = host.run(["python", *program], timeout=900, check=True)
    return {what: statistics.median(times) for what, times in json.loads(done.stdout).items()}


def of_kvmpy(host: EmulatedHost, *, power_controller: bool) -> dict[str, float]:
    bus = {"net": "rp1", "blk": "rp2"} if power_controller else {"net": "rp3", "blk": "rp4"}
    tap = tables.table("netdev", type="tap", id="hostnet", ifname=TAP, bridge=BRIDGE)
    with Guest(host, "times", tables=ports(*PORTS) + tap + spare_drive(), words=WORDS) as guest:
        guest.wait_shell()
        guest.process.send(f"{GUEST_LOOP}\n")
        net = {"driver": "virtio-net-pci", "id": "hot0", "netdev": "hostnet", "bus": bus["net"]}
        blk = {"driver": "virtio-blk-pci", "id": "vd9", "drive": "data", "bus": bus["blk"]}
        return plug_times(host, "/run/kvmpy/times/qmp.sock", net, blk)


def of_qemu(host: EmulatedHost) -> dict[str, float]:
    """q35 with the same kernel, native hot-plug (acpi-pci-hotplug off), the same back ends."""
    host.run(["sh", "-ec", f"ip tuntap add {TAP} mode tap; ip link set {TAP} master {BRIDGE} up"], check=True)
    boot = CHECKOUT / ".lab/guest/cloud"
    qemu = host.spawn(
        [
            *("qemu-system-x86_64", "-accel", "kvm", "-M", "q35", "-cpu", "host", "-m", "256", "-nodefaults"),
            *("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off", "-display", "none", "-no-reboot"),
            *("-kernel", str(boot / "vmlinuz"), "-initrd", str(boot / "initrd.img")),
            *("-append", f"{QUIET} mode=shell {WORDS}", "-serial", "stdio"),
            *("-device", "pcie-root-port,id=rp1,chassis=1,slot=1", "-device", "pcie-root-port,id=rp2,chassis=2,slot=2"),
            *("-netdev", f"tap,id=hostnet,ifname={TAP},script=no,downscript=no,vhost=on"),
            *("-blockdev", f"driver=raw,node-name=data,file.driver=file,file.filename={DATA}"),
            *("-qmp", "unix:/run/qemu.sock,server=on,wait=off"),
        ],
        tty=True,
    )
    try:
        qemu.expect("KVMPY-GUEST UP", 240)
        qemu.expect("guest# ")
        qemu.send(f"{GUEST_LOOP}\n")
        net = {"driver": "virtio-net-pci", "id": "hot0", "netdev": "hostnet", "bus": "rp1"}
        blk = {"driver": "virtio-blk-pci", "id": "vd9", "drive": "data", "bus": "rp2"}
        return plug_times(host, "/run/qemu.sock", net, blk)
    finally:
        qemu.signal(15)
        qemu.wait()
        host.run(["ip", "link", "del", TAP], check=True)


def main() -> None:
    """Measure and print."""
    with EmulatedHost(memory="4G") as host, bridge_and_disk(host):
        ours, theirs = of_kvmpy(host, power_controller=True), of_qemu(host)
        without = of_kvmpy(host, power_controller=False)
    print(f"{'':<12} {'kvmpy':>9} {'QEMU':>9} {'ratio':>7} {'budget':>7}  verdict   kvmpy without a power controller")
    for what, seconds in ours.items():
        ratio = seconds / theirs[what]
        verdict = "met" if ratio <= BUDGET else "missed"
        print(
            f"{what:<12} {seconds:>7.2f} s {theirs[what]:>7.2f} s {ratio:>7.2f} {BUDGET:>7.2f}  {verdict:<9}"
            f" {without[what]:.2f} s"
        )


if __name__ == "__main__":
    main()
