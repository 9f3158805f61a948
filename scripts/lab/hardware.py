"""The NICs of an emulated host: an uplink, and what it has to pass through, with an IOMMU that remaps interrupts.

Intel's IOMMU works beside the emulated AMD processor. All NICs are on one wire, a hub inside QEMU with no way out but
to the other host of a pair (pair.py). A function alone behind its root port is alone in its IOMMU group, as is each
virtual function, for QEMU's root ports have ACS; functions of one slot share a group. host_nics.sh makes the rest of
it when the host is up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from scripts.lab import qemu

UPLINK_MAC: Final = "52:54:00:00:00:01"
STATION_MAC: Final = "52:54:00:00:00:09"
PRIMARY_MAC: Final = "52:54:00:00:01:00"
"""What the first two whole NICs have, on either host of a pair: they are for one guest, which uses one at a time."""
NIC_MACS: Final = (PRIMARY_MAC, PRIMARY_MAC, "52:54:00:00:01:02", "52:54:00:00:01:03")

BRIDGE: Final = "br0"
BRIDGE_ADDRESS: Final = "10.77.0.1"
STATION: Final = "station"
STATION_ADDRESS: Final = "10.77.0.9"
"""A network namespace in the host with a NIC of its own on the wire: what a peer outside the host sees."""

IOMMU_ARGUMENTS: Final = ("intel_iommu=on", "iommu=pt")
NATIVE_HOT_PLUG: Final = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"
"""With ACPI's, root ports never report an active link, and the kernel takes a reset of their bus for a failed one."""
MODULES: Final = ("virtio_net",)
PASSED_MODULES: Final = ("igb", "igbvf", "e1000e")


@dataclass(frozen=True)
class Nic:
    """A NIC of a host."""

    model: str
    mac: str
    port: int | None = None  # the number of the root port that it is behind; None: on the root complex
    function: int = 0  # which function of the slot behind that port


@dataclass(frozen=True)
class Hardware:
    """The NICs of a host. The one with UPLINK_MAC becomes a port of BRIDGE.

    The one with the address ``pf`` has ``vfs`` virtual functions. ``passed`` is the PCI id of those that are there to
    be passed through, empty where there are none. ``number`` is the host's in a pair, and ``joint`` a connected socket:
    the wire goes on there. Its addresses are those of host 1; the other's differ as `mac` and `address` say.
    """

    nics: tuple[Nic, ...]
    passed: str = ""
    vfs: int = 0
    pf: str = UPLINK_MAC
    number: int = 1
    joint: int | None = None

    def joined(self, number: int, joint: int) -> Hardware:
        """The same for host ``number`` of a pair."""
        return replace(self, number=number, joint=joint)

    def mac(self, mac: str) -> str:
        """What host 1's ``mac`` is on this host."""
        return mac if mac == PRIMARY_MAC else f"{mac[:9]}{self.number - 1:02x}{mac[11:]}"

    def address(self, address: str) -> str:
        """What host 1's ``address`` is on this host."""
        network, _, last = address.rpartition(".")
        return f"{network}.{int(last) + self.number - 1}"

    @property
    def needs_igb(self) -> bool:
        """Whether not every QEMU has what it takes."""
        return any(nic.model == qemu.MODEL for nic in self.nics)

    def qemu_arguments(self) -> list[str]:
        """The words for QEMU."""
        words = ["-global", NATIVE_HOT_PLUG]
        if self.passed:
            words += ["-device", "intel-iommu,intremap=on"]
        for port in sorted({nic.port for nic in self.nics if nic.port is not None}):
            words += ["-device", f"pcie-root-port,id=port{port},chassis={port},slot={port}"]
        for number, nic in enumerate((*self.nics, Nic("virtio-net-pci", STATION_MAC))):
            place = "" if nic.port is None else f",bus=port{nic.port},addr=0.{nic.function},multifunction=on"
            words += ["-netdev", f"hubport,id=wire{number},hubid=0"]
            words += ["-device", f"{nic.model},netdev=wire{number},mac={self.mac(nic.mac)}{place}"]
        if self.joint is not None:
            words += ["-netdev", f"socket,id=joint,fd={self.joint}", "-netdev", "hubport,id=way,hubid=0,netdev=joint"]
        return words

    def environment(self) -> dict[str, str]:
        """What host_nics.sh is told."""
        return {
            "modules": " ".join((*MODULES, *(PASSED_MODULES if self.passed else ()))),
            "uplink": self.mac(UPLINK_MAC),
            "vfs": str(self.vfs),
            "pf": self.mac(self.pf),
            "bridge": BRIDGE,
            "bridge_address": self.address(BRIDGE_ADDRESS),
            "station": STATION,
            "station_mac": self.mac(STATION_MAC),
            "station_address": self.address(STATION_ADDRESS),
        }


HARDWARE: Final = {
    "virtio": Hardware((Nic("virtio-net-pci", UPLINK_MAC),)),
    "igb": Hardware((Nic("igb", UPLINK_MAC, port=1),), passed="8086:10ca", vfs=2),
    "e1000e": Hardware(
        (
            Nic("virtio-net-pci", UPLINK_MAC),
            Nic("e1000e", NIC_MACS[0], port=1),
            Nic("e1000e", NIC_MACS[1], port=2),
            Nic("e1000e", NIC_MACS[2], port=3),
            Nic("e1000e", NIC_MACS[3], port=3, function=1),
        ),
        passed="8086:10d3",
    ),
}
"""By what is passed through: nothing; two virtual functions of an 82576; whole 82574s, two in one IOMMU group."""
