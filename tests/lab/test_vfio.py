"""A NIC of the host in a guest: a virtual function (FLR, no INTx) and a whole one (ports, INTx, bus reset only)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from scripts.lab.hardware import STATION, STATION_ADDRESS
from scripts.lab.images import Images
from scripts.lab.process import Process
from tests.counts import count
from tests.lab import tables
from tests.lab.guest import Guest, root_disk
from tests.lab.nics import NicHost
from tests.lab.test_network import EVENTS

NAME, DEVICE, MAC = "vfio", "host0", "52:54:00:6f:55:cc"
ADDRESS, OTHER_ADDRESS = "10.77.0.20", "10.77.0.21"
DRIVERS: Final = {"igb": "igbvf", "e1000e": "e1000e"}
RESETS: Final = {"igb": "flr", "e1000e": "bus"}
WORDS: Final = "root=/dev/vda modules=e1000e,igbvf"
SLOW: Final = 300.0
EXITS: Final = 200  # of a NIC whose interrupts and registers exit there were thousands


@dataclass
class Lab:
    """A guest with the NIC, and who answers it: a station on the wire outside of the host."""

    guest: Guest
    host: NicHost
    model: str
    function: str
    events: Process
    address: str = ADDRESS

    def add(self) -> None:
        """Plug it in, and use it."""
        words = [f"{key}={value}" for key, value in keys(self.function, self.model).items()]
        self.guest.qmp("device_add", "driver=vfio-pci", *words)
        self.guest.type("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done", SLOW)
        self.set_up()

    def wait_deleted(self) -> None:
        self.events.expect(re.compile(rf'"DEVICE_DELETED".*"device": *"{DEVICE}"'), SLOW)

    def set_up(self) -> None:
        """Give the guest its address, and wait until it is heard."""
        up = f"ip addr add {self.address}/24 dev eth0; ip link set eth0 up"
        # One echo request is lost where the link comes up later than its ARP requests are given up, which is 3 seconds.
        heard = f"n=0; until busybox ping -c 1 -W 2 {STATION_ADDRESS} >&- || [ $n = 120 ]; do n=$((n + 1)); done"
        assert self.guest.type(f"{up}; {heard}; [ $n != 120 ]; echo $?", SLOW) == "0"

    def pings(self) -> str:
        """The line that says what was lost."""
        return self.guest.type(f"busybox ping -q -i 0.2 -c 10 -W 20 {STATION_ADDRESS} | grep loss", SLOW)

    def interrupts(self) -> int:
        """How many of the NIC's the guest has had."""
        lines = self.guest.type("grep eth0 /proc/interrupts").splitlines()
        return sum(int(line.split()[1]) for line in lines)

    @contextmanager
    def station(self) -> Iterator[None]:
        """An iperf3 there, for one client."""
        server = self.host.spawn(["ip", "netns", "exec", STATION, "iperf3", "-s", "-1", "--forceflush"])
        server.expect("listening")
        yield
        server.wait(SLOW)


def keys(function: str, model: str) -> dict[str, str]:
    """Of its table."""
    found = {"id": DEVICE, "host": function, "bus": "rp1"}
    return found | {"mac": MAC} if model == "igb" else found


def passed(function: str, model: str = "e1000e") -> str:
    """A root port, and the function behind it."""
    return tables.root_ports("rp1") + tables.table("device", driver="vfio-pci", **keys(function, model))


@pytest.fixture(scope="module", params=["igb", "e1000e"])
def lab(request: pytest.FixtureRequest, lab_images: Images) -> Iterator[Lab]:
    model: str = request.param
    host: NicHost = request.getfixturevalue(f"{model}_host")
    function = host.functions[0]
    driver = host.driver(function)
    with root_disk(host, lab_images, NAME) as root:
        config = passed(function, model) + tables.disk("root", root)
        with Guest(host, NAME, kernel="generic", tables=config, words=WORDS) as guest:
            guest.wait_shell()
            events = host.spawn(["python", "-I", "-S", "-c", EVENTS, f"/run/kvmpy/{NAME}/qmp.sock"])
            events.expect("listening")
            lab = Lab(guest, host, model, function, events)
            lab.set_up()
            yield lab
            events.signal(15)
            events.wait()
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0
    assert host.driver(function) == driver, "the host has it back"
    assert host.override(function) == ""


def test_the_guests_own_driver_has_the_device(lab: Lab) -> None:
    assert lab.guest.type("basename $(readlink /sys/class/net/eth0/device/driver)") == DRIVERS[lab.model]
    assert lab.host.driver(lab.function) == "vfio-pci"
    if lab.model == "igb":
        assert lab.guest.type("cat /sys/class/net/eth0/address") == MAC


def test_status_says_what_it_is_and_how_it_is_reset(lab: Lab) -> None:
    device = lab.guest.device(DEVICE)
    assert (device["driver"], device["host"], device["reset"]) == ("vfio-pci", lab.function, RESETS[lab.model])
    assert (device["interrupts"], device["broken"]) == ("msix", None)


def test_frames_reach_a_station_on_the_wire(lab: Lab) -> None:
    assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"


@pytest.mark.parametrize("options", ["", "-R"], ids=["from the guest", "to the guest"])
def test_traffic_flows_and_neither_interrupts_nor_registers_visit_kvmpy(lab: Lab, options: str) -> None:
    interrupts, exits = lab.interrupts(), lab.guest.status()["exits"]
    while lab.interrupts() - interrupts < 2 * EXITS:
        with lab.station():
            text = lab.guest.type(f"iperf3 -c {STATION_ADDRESS} -n 2M -f m {options} | grep -E 'receiver|error'", SLOW)
        assert re.search(r"[1-9][\d.]* [KM]Bytes .*receiver", text), text
    assert lab.guest.status()["exits"]["mmio"] - exits["mmio"] < EXITS


def test_lspci_makes_sense_of_it(lab: Lab) -> None:
    shown = lab.guest.type("lspci -vvn -s 01:00.0", SLOW)
    host = lab.host.run(["lspci", "-vvn", "-s", lab.function], check=True).stdout
    size = re.compile(r"Region (\d): .*?(\[size=\w+\])")
    assert size.findall(shown) == size.findall(host)
    assert re.findall(r"01:00\.0 (\w+: \w+:\w+)", shown) == re.findall(r"^\S+ (\w+: \w+:\w+)", host)
    assert re.search(r"MSI-X: Enable\+ Count=\d+ Masked-", shown)
    assert re.search(r"Status: D0 NoSoftRst\+", shown)
    assert "DevSta:\tCorrErr- NonFatalErr- FatalErr-" in shown
    assert not re.search(r"unknown|broken|!!!", shown, re.IGNORECASE)


def test_its_rom_is_what_the_host_reads(lab: Lab) -> None:
    # The beginning alone: every four bytes are an exit, and it has a quarter of a million.
    digest = "echo 1 >rom; dd if=rom bs=512 count=1 2>&- | md5sum; echo 0 >rom"
    read = f"cd /sys/bus/pci/devices/{{}}; if [ -e rom ]; then {digest}; else echo none; fi"
    on_host = lab.host.run(["bash", "-c", read.format(lab.function)], check=True).stdout.strip()
    assert (on_host == "none") == (lab.model == "igb"), "a virtual function has none"
    assert lab.guest.type(read.format("0000:01:00.0"), SLOW) == on_host


def test_a_driver_that_comes_again_finds_the_device_in_order(lab: Lab) -> None:
    driver = f"/sys/bus/pci/drivers/{DRIVERS[lab.model]}"
    lab.guest.type(f"echo 0000:01:00.0 >{driver}/unbind; echo 0000:01:00.0 >{driver}/bind", SLOW)
    lab.set_up()
    assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"


def test_a_system_reset_resets_it_too(lab: Lab) -> None:
    lab.guest.kvmpy("reset", NAME)
    lab.guest.wait_shell()
    lab.set_up()
    assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"


def test_it_comes_and_goes_while_the_guest_runs(lab: Lab) -> None:
    for _ in range(count(1, 10)):
        lab.guest.qmp("device_del", f"id={DEVICE}")
        lab.wait_deleted()
        assert lab.guest.type("ls /sys/class/net") == "lo"
        assert lab.host.driver(lab.function) == DRIVERS[lab.model], "the host has it meanwhile"
        lab.add()
        assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"


def test_r23_a_guest_that_turns_its_slot_off_gives_it_back(lab: Lab) -> None:
    lab.guest.type("echo 0 >/sys/bus/pci/slots/1/power", SLOW)
    lab.wait_deleted()
    assert lab.host.driver(lab.function) == DRIVERS[lab.model]
    lab.add()


def test_a_device_that_is_torn_out_works_again_later(lab: Lab) -> None:
    lab.guest.qmp("device_del", f"id={DEVICE}", "force=true")
    lab.wait_deleted()
    gone = "[ $(cat /sys/bus/pci/slots/1/power) = 0 ] && [ ! -e /sys/class/net/eth0 ]"
    lab.guest.type(f"until {gone}; do sleep 0.1; done", SLOW)
    lab.add()
    assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"


def test_a_host_that_wants_it_back_gets_it_from_the_guest(lab: Lab) -> None:
    told, said = len(lab.events.output), len(lab.guest.process.output)
    unbind = lab.host.spawn(["sh", "-c", f"echo {lab.function} >/sys/bus/pci/drivers/vfio-pci/unbind"])
    lab.events.expect(re.compile(rf'"DEVICE_WANTED_BACK".*"device": *"{DEVICE}"'), SLOW)
    lab.wait_deleted()
    unbind.wait(SLOW)
    assert lab.host.driver(lab.function) == DRIVERS[lab.model]
    assert "DEVICE_BROKEN" not in lab.events.output[told:], "it is being released: the kernel refuses it a reset"
    assert f"{DEVICE}: the host wants {lab.function} back" in lab.guest.process.output[said:]
    assert "VFIO_" not in lab.guest.process.output[said:], "no request that failed"
    lab.add()
    assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"


def test_a_function_left_by_a_crash_is_taken_again_and_given_back(e1000e_host: NicHost, lab_images: Images) -> None:
    function = e1000e_host.functions[1]
    config = passed(function)
    with Guest(e1000e_host, "crash", kernel="generic", tables=config, words="modules=e1000e") as guest:
        guest.wait_shell()
        e1000e_host.run(["kill", "-9", str(guest.status()["pid"])], check=True)
        guest.process.wait()
    with Guest(e1000e_host, "crash", kernel="generic", tables=config, words="modules=e1000e") as guest:
        guest.wait_shell()
        assert guest.type("ls /sys/class/net").split() == ["eth0", "lo"]
        guest.process.send("poweroff -f\n")
        assert guest.wait_end() == 0
    assert e1000e_host.driver(function) == "e1000e"


def test_intx_works_by_irqfd_and_resample(e1000e_host: NicHost, lab_images: Images) -> None:
    with root_disk(e1000e_host, lab_images, "intx") as root:
        function = e1000e_host.functions[1]  # another guest may have the first
        config = passed(function) + tables.disk("root", root)
        with Guest(e1000e_host, "intx", kernel="generic", tables=config, words=f"{WORDS} pci=nomsi") as guest:
            guest.wait_shell()
            lab = Lab(guest, e1000e_host, "e1000e", function, guest.process, OTHER_ADDRESS)
            lab.set_up()
            assert guest.device(DEVICE)["interrupts"] == "intx"
            assert "IO-APIC" in guest.type("grep eth0 /proc/interrupts")
            before, exits = lab.interrupts(), guest.status()["exits"]["mmio"]
            assert lab.pings() == "10 packets transmitted, 10 packets received, 0% packet loss"
            assert lab.interrupts() - before >= 10
            assert guest.status()["exits"]["mmio"] - exits < EXITS
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0


def test_a_reset_clears_the_devices_registers_where_the_kernels_own_choice_does_not(e1000e_host: NicHost) -> None:
    function = e1000e_host.functions[1]
    driver = e1000e_host.driver(function)
    e1000e_host.bind(function, "vfio-pci")
    done = e1000e_host.run(["python", "-m", "tests.lab.programs.vfio_reset", function], check=True)
    e1000e_host.bind(function, driver)
    assert done.stdout.splitlines() == ["before 0x1234", "kernel's 0x1234", "again 0x1234", "bus 0x0"]
