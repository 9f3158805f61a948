"""What Linux finds on the PCI Express bus, and that it keeps what the firmware part of kvmpy set up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from tests.lab import tables
from tests.lab.guest import FROM_DISK, Guest, root_disk

COMPLAINTS: Final = r"can.t claim|no space|failed to assign|BAR.*failed|no compatible|conflict|firmware (bug|warn)"
CONSOLE: Final = "/run/pci-console"
MARK: Final = "====="
CAPABILITIES: Final = ("CommonCfg", "ISR", "DeviceCfg", "Notify")
FUNCTION: Final = re.compile(r"^(\w\w:\w\w\.\w) \w{4}: (\w{4}:\w{4})(.*?)(?=^\w\w:|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Bus:
    """A guest's PCI bus as its tools show it."""

    dmesg: str
    functions: dict[str, tuple[str, str]]  # by address: vendor and device, and the rest that lspci says
    config_sizes: set[int]
    interrupts: str

    @classmethod
    def seen_by(cls, guest: Guest, console: str) -> Bus:
        """What ``guest`` sees, told by way of the file of its virtio console: its serial line is slow."""
        commands = ("dmesg", "lspci -vvn", "stat -c %s /sys/bus/pci/devices/*/config", "cat /proc/interrupts", "")
        told = f"; echo {MARK}; ".join(commands)
        guest.type(f"({told}) 2>/dev/null >/dev/hvc0")
        waiting = f'until [ "$(grep -c {MARK} {console})" = {len(commands) - 1} ]; do sleep 0.1; done; cat {console}'
        text = guest.host.run(["sh", "-c", waiting], check=True).stdout.replace("\r", "")
        dmesg, listing, sizes, interrupts, _ = text.split(f"{MARK}\n")
        functions = {found[1]: (found[2], found[3]) for found in FUNCTION.finditer(listing)}
        return cls(dmesg, functions, set(map(int, sizes.split())), interrupts)

    def ids(self) -> dict[str, str]:
        return {address: ids for address, (ids, _) in self.functions.items()}

    def virtio(self) -> dict[str, str]:
        return {address: ids for address, ids in self.ids().items() if ids.startswith("1af4:")}

    def facts(self, address: str, *patterns: str) -> list[str]:
        """What the group in each pattern finds in a function's part of the listing; "" where it finds nothing."""
        text = self.functions[address][1]
        return [found[1] if (found := re.search(pattern, text)) else "" for pattern in patterns]


@pytest.fixture(scope="module", params=[("generic", "vmlinuz", 4), ("cloud", "vmlinux", 1)], ids=["generic", "cloud"])
def setup(request: pytest.FixtureRequest) -> tuple[str, str, int]:
    """The kernel, its image, and the number of root ports."""
    found: tuple[str, str, int] = request.param
    return found


@pytest.fixture(scope="module")
def bus(host: EmulatedHost, lab_images: Images, setup: tuple[str, str, int]) -> Iterator[Bus]:
    """Root ports, the first with a network device and the last with nothing; beside them three more devices."""
    kernel, image, count = setup
    host.run(["rm", "-f", CONSOLE], check=True)
    with root_disk(host, lab_images, "pci") as path:
        config = (
            tables.root_ports(*(f"rp{number}" for number in range(count)))
            + tables.disk("disk0", path, queues=3)
            + tables.nic("net0", "kvpci", "kvbrpci", queues=2, bus="rp0")
            + tables.console("console0", f"file:{CONSOLE}")
            + tables.rng("rng0", bus="rp1" if count > 1 else None)
        )
        with Guest(host, "pci", kernel=kernel, image=image, tables=config, words=FROM_DISK) as guest:
            guest.wait_shell()
            yield Bus.seen_by(guest, CONSOLE)
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0


def test_linux_has_nothing_to_complain_about(bus: Bus) -> None:
    assert [line for line in bus.dmesg.splitlines() if re.search(COMPLAINTS, line, re.IGNORECASE)] == []


def test_linux_reads_configuration_space_in_memory(bus: Bus, setup: tuple[str, str, int]) -> None:
    _, _, ports = setup
    assert re.search(rf"PCI: MMCONFIG for domain 0000 \[bus 00-{ports:02x}\]", bus.dmesg)
    assert "MMCONFIG at" in bus.dmesg, "and finds it reserved"
    assert bus.config_sizes == {4096}


def test_linux_is_granted_native_hotplug(bus: Bus, setup: tuple[str, str, int]) -> None:
    _, _, ports = setup
    assert re.search(r"_OSC: OS now controls \[PCIeHotplug PME .*PCIeCapability", bus.dmesg)
    slots = re.findall(r"pciehp: Slot #(\d+)", bus.dmesg)
    assert slots == [str(number) for number in range(1, ports + 1)]


def test_every_function_is_where_the_configuration_says(bus: Bus, setup: tuple[str, str, int]) -> None:
    _, _, ports = setup
    expected = {"00:00.0": "1b36:0008"} | {f"00:{number:02x}.0": "1b36:000c" for number in range(1, ports + 1)}
    expected |= {f"00:{ports + 1:02x}.0": "1af4:1042", f"00:{ports + 2:02x}.0": "1af4:1043", "01:00.0": "1af4:1041"}
    expected |= {"02:00.0" if ports > 1 else f"00:{ports + 3:02x}.0": "1af4:1044"}
    assert bus.ids() == expected


def test_root_ports_are_bridges_to_slots_with_room(bus: Bus, setup: tuple[str, str, int]) -> None:
    _, _, ports = setup
    facts = (
        r"secondary=(\w\w)",
        r"subordinate=(\w\w)",
        r"Root Port \((Slot\+)\)",
        r"Slot #(\d+)",
        r"(HotPlug\+)",
        r"\tMemory behind bridge: .*\[size=(\w+)\]",
        r"Prefetchable memory behind bridge: .*\[size=(\w+)\]",
        r"Kernel driver in use: (\S+)",
    )
    seen = {number: bus.facts(f"00:{number:02x}.0", *facts) for number in range(1, ports + 1)}
    assert seen == {
        number: [f"{number:02x}", f"{number:02x}", "Slot+", str(number), "HotPlug+", "16M", "1G", "pcieport"]
        for number in range(1, ports + 1)
    }


def test_a_slot_shows_whether_there_is_a_card(bus: Bus, setup: tuple[str, str, int]) -> None:
    _, _, ports = setup
    taken = [bus.facts(f"00:{number:02x}.0", r"SltSta:.*PresDet([+-])") for number in range(1, ports + 1)]
    assert taken == [["+"], ["+"], ["-"], ["-"]][:ports]


def test_every_device_has_a_vector_for_each_queue_and_one_more(bus: Bus) -> None:
    vectors = {ids: bus.facts(address, r"MSI-X: Enable\+ Count=(\d+)") for address, ids in bus.virtio().items()}
    network, block, console, entropy = ["6"], ["4"], ["3"], ["2"]  # 2 pairs and control, 3, 2, 1
    assert vectors == {"1af4:1041": network, "1af4:1042": block, "1af4:1043": console, "1af4:1044": entropy}


def test_every_device_has_its_registers_above_4_gib_and_a_driver(bus: Bus) -> None:
    facts = (
        r"Region \d: Memory at [1-9a-f]\w{8} \(64-bit, prefetchable\) \[size=(\w+)\]",
        r"Express \(v2\) (.*Endpoint)",
        *[f"VirtIO: ({capability})" for capability in CAPABILITIES],
        r"Kernel driver in use: (\S+)",
    )
    seen = {address: bus.facts(address, *facts) for address in bus.virtio()}
    assert seen == {
        address: [
            "32K",
            "Root Complex Integrated Endpoint" if address < "01" else "Endpoint",
            *CAPABILITIES,
            "virtio-pci",
        ]
        for address in bus.virtio()
    }


def test_the_disk_interrupts_by_message(bus: Bus) -> None:
    assert re.search(r"\s[1-9]\d* +PCI-MSI \d+-edge +virtio\d+-req\.0", bus.interrupts)


def test_a_guest_without_msi_gets_by_with_interrupt_lines(host: EmulatedHost, lab_images: Images) -> None:
    with root_disk(host, lab_images, "intx") as path:
        config = tables.root_ports("rp0") + tables.disk("disk0", path, bus="rp0") + tables.rng("rng0")
        with Guest(host, "intx", tables=config, words=f"{FROM_DISK} pci=nomsi") as guest:
            guest.wait_shell()
            assert len(guest.type("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | xxd -p")) == 32
            interrupts = guest.type("cat /proc/interrupts")
            assert re.search(r"\s[1-9]\d* +IO-APIC +1[6-9]-fasteoi .*virtio0", interrupts)
            assert re.search(r"\s[1-9]\d* +IO-APIC +1[6-9]-fasteoi .*virtio1", interrupts)
            assert "PCI-MSI" not in interrupts
            guest.process.send("poweroff\n")
            assert guest.wait_end() == 0
