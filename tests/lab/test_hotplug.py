"""Devices that come and go beside a running Linux, which has its own driver for slots."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from scripts.lab.kernels import CHECKOUT
from scripts.lab.process import Process
from tests.counts import count
from tests.lab import tables
from tests.lab.guest import FROM_DISK, QUIET, Guest, root_disk
from tests.lab.test_network import EVENTS
from tests.lab.test_pci import COMPLAINTS

NAME, BRIDGE, TAP, DATA = "hotplug", "kvbrhp", "kvtaphp", "/scratch/hotplug-data.img"
HOST, GUEST = "10.78.1.1", "10.78.1.2"
SLOW: Final = 180.0
UNPLUG: Final = 60.0
DATA_MIB: Final = 16
PORTS: Final = ("rp1", "rp2", "rp3", "rp4")
WITHOUT_POWER: Final = ("rp3", "rp4")
"""Ports that have no power controller."""
SEED: Final = int(os.environ.get("KVMPY_SEED", "20260101"))


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
        self.guest.kvmpy("qmp", NAME, command, *words)

    def add_nic(self, name: str, bus: str) -> None:
        """A network device with a netdev of its own, up and with an address."""
        self.qmp("netdev_add", type="tap", id=f"tap-{name}", ifname=TAP, bridge=BRIDGE)
        self.qmp("device_add", driver="virtio-net-pci", id=name, netdev=f"tap-{name}", bus=bus)
        self.until("[ -d /sys/class/net/eth0 ]")
        up = f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; busybox ping -c 1 -w 20 {HOST} >&-"
        assert self.guest.type(f"{up}; echo $?", SLOW) == "0"

    def add_disk(self, name: str, bus: str) -> None:
        self.qmp("device_add", driver="virtio-blk-pci", id=name, drive="data", bus=bus)
        self.until("[ -b /dev/vdb ]")

    def remove(self, name: str) -> None:
        self.qmp("device_del", id=name)
        self.wait_deleted(name)

    def wait_deleted(self, name: str) -> None:
        self.events.expect(re.compile(rf'"DEVICE_DELETED".*"device": *"{name}"'), UNPLUG)

    def until(self, condition: str) -> None:
        """Until a shell's condition holds in the guest; the line ends with the test's time."""
        self.guest.type(f"until {condition}; do sleep 0.1; done", SLOW)

    def dmesg(self) -> str:
        return self.guest.type("dmesg -c | grep -E 'pci|Slot' | cut -c 1-150", SLOW)


@pytest.fixture(scope="module", params=["generic", "cloud"])
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
def test_a_network_device_comes_works_and_goes(lab: Lab, bus: str) -> None:
    lab.add_nic("hot0", bus)
    assert re.search(r"BAR \d.*assigned \[mem 0x[0-9a-f]{9,} ?-", said := lab.dmesg()), said
    assert not re.search(COMPLAINTS, said, re.IGNORECASE), said
    assert lab.guest.device("hot0")["link"] == "up"
    lab.remove("hot0")
    assert lab.guest.type("ls /sys/class/net") == "lo"
    assert TAP not in lab.host.run(["ip", "-brief", "link"], check=True).stdout
    lab.qmp("netdev_del", id="tap-hot0")


@pytest.mark.parametrize("bus", ["rp2", "rp4"], ids=["power controller", "no power controller"])
def test_a_disk_comes_works_and_goes(lab: Lab, bus: str) -> None:
    lab.add_disk("vd9", bus)
    copied = "dd if=/dev/urandom of=/dev/vdb bs=64k count=16 conv=fsync 2>&-; head -c 1M /dev/vdb | sha256sum"
    said = lab.guest.type(copied, SLOW).split()[0]
    there = lab.host.run(["sh", "-c", f"head -c 1M {DATA} | sha256sum"], check=True).stdout.split()[0]
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


def test_a_network_device_is_removed_under_traffic(lab: Lab) -> None:
    server = lab.host.spawn(["iperf3", "-s", "--forceflush"])
    server.expect("listening")
    lab.add_nic("hot0", "rp1")
    lab.guest.type(f"iperf3 -c {HOST} -t 60 --connect-timeout 5000 >/tmp/iperf 2>&1 &")
    server.expect(r"sec .*bits/sec")
    lab.remove("hot0")
    assert lab.guest.type("ls /sys/class/net") == "lo"
    lab.guest.type("busybox pkill iperf3; wait", SLOW)
    server.signal(15)
    server.wait()
    lab.qmp("netdev_del", id="tap-hot0")
    status = lab.guest.status()
    assert (status["status"], status["device-faults"]) == ("running", 0)


def test_a_device_is_torn_out_and_the_guest_lives_on(lab: Lab) -> None:
    lab.add_disk("vd9", "rp2")
    lab.qmp("device_del", id="vd9", force="true")
    lab.wait_deleted("vd9")
    lab.until("[ ! -b /dev/vdb ]")
    lab.until("[ $(cat /sys/bus/pci/slots/2/power) = 0 ]")
    lab.add_disk("vd9", "rp2")
    lab.remove("vd9")


# Time, beside QEMU


GUEST_LOOP: Final = (
    "n=; b=; while :; do"
    " if [ -d /sys/class/net/eth0 ]; then [ $n ] || { n=1; ip addr add "
    + GUEST
    + "/24 dev eth0; ip link set eth0 up; ping -c 1 -W 5 "
    + HOST
    + "; }; else n=; fi;"
    " if [ -b /dev/vda ]; then [ $b ] || { b=1; dd if=/proc/uptime of=/dev/vda conv=fsync; }; else b=; fi;"
    " sleep 0.05; done >/dev/null 2>&1 &"
)
WORDS: Final = "modules=virtio_pci,virtio_net,virtio_blk"
ROUNDS: Final = count(2, 5)
PROGRAMS: Final = "tests/lab/programs"


def plug_times(host: EmulatedHost, socket: str, net: dict[str, str], blk: dict[str, str]) -> dict[str, float]:
    """The medians."""
    program = [f"{PROGRAMS}/plug_times.py", socket, str(ROUNDS), BRIDGE, DATA, json.dumps(net), json.dumps(blk)]
    done = host.run(["python", *program], timeout=500, check=True)
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


@pytest.mark.timeout(1800)
def test_r22_a_plug_and_an_unplug_take_no_longer_than_qemus(
    host: EmulatedHost, lab_images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    """pciehp's own sleeps are in both: 5 s from the press, 1 s of power off, 0.12 s for the link."""
    with bridge_and_disk(host):
        ours, theirs = of_kvmpy(host, power_controller=True), of_qemu(host)
        without = of_kvmpy(host, power_controller=False)
    ratios = {what: ours[what] / theirs[what] for what in ours}
    with capsys.disabled():
        for what, ratio in ratios.items():
            print(
                f"\n{what:8} kvmpy {ours[what]:.2f} s, QEMU {theirs[what]:.2f} s, ratio {ratio:.2f};"
                f" kvmpy without a power controller {without[what]:.2f} s",
                end="",
            )
    assert all(ratio <= 1.1 for ratio in ratios.values()), ratios
    assert all(without[what] < theirs[what] for what in ("net out", "blk out")), "a second less, at the same pace"


# While the guest boots

MOMENTS: Final = count(8, 24)
AT_A_TIME: Final = 8
BOOT: Final = 12.0  # seconds over which the moments are spread; where the boot is shorter, the last come after it


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("turn", range(MOMENTS // AT_A_TIME))
def test_r24_what_is_plugged_while_the_guest_boots_ends_present(
    host: EmulatedHost, lab_images: Images, turn: int
) -> None:
    dice = random.Random(SEED + turn)
    names = [f"rp{number}" for number in range(1, AT_A_TIME + 1)]
    plan = [
        f"{moment:.2f}:{name}" for moment, name in zip(sorted(dice.uniform(0, BOOT) for _ in names), names, strict=True)
    ]
    kernel = ("generic", "cloud")[turn % 2]
    words = "modules=virtio_pci,virtio-rng"
    with Guest(host, "boot", kernel=kernel, tables=ports(*names), words=words) as guest:
        program = ["python", "-m", "tests.lab.programs.plug_at_boot", "/run/kvmpy/boot/qmp.sock", *plan]
        plugging = host.spawn(program)
        guest.wait_shell()
        plugging.expect("all plugged", SLOW)
        slots = f"/sys/bus/pci/slots/[1-{AT_A_TIME}]"
        guest.type(f"until [ $(cat {slots}/power | grep -c 1) = {AT_A_TIME} ]; do sleep 0.2; done", SLOW)
        guest.type("sleep 8")  # no press of a button is behind it
        assert guest.type(f"cat {slots}/power {slots}/adapter | grep -c 1") == str(2 * AT_A_TIME)
        bound = "ls -d /sys/bus/virtio/drivers/virtio_rng/virtio* | wc -l"
        assert guest.type(bound) == str(AT_A_TIME), f"seed {SEED + turn}: {plan}: {plugging.output}"
        guest.process.send("poweroff\n")
        assert guest.wait_end() == 0
