"""Emulated hosts with NICs to pass through, and what a test asks of their sysfs."""

from __future__ import annotations

from typing import Final

from scripts.lab.hardware import HARDWARE, STATION, UPLINK_MAC
from scripts.lab.host import Completed, EmulatedHost

DEVICES: Final = "/sys/bus/pci/devices"


class NicHost(EmulatedHost):
    """A host with the hardware called ``name``, "igb" or "e1000e".

    ``functions`` are those that are there to be passed through: two virtual functions of one igb, whose PF, ``uplink``,
    is a port of the bridge br0 at 10.77.0.1; or four e1000e, the last two of them in one IOMMU group.
    """

    def __init__(self, name: str) -> None:
        super().__init__(memory="4G", hardware=HARDWARE[name])
        self.passed = HARDWARE[name].passed
        self.functions: list[str] = []
        self.uplink = ""

    def start(self) -> None:
        super().start()
        listed = self.run(["lspci", "-Dnd", self.passed], check=True).stdout
        self.functions = [line.split()[0] for line in listed.splitlines()]
        shown = self.run(["sh", "-c", f"grep -l {UPLINK_MAC} /sys/class/net/e*/address"], check=True).stdout
        self.uplink = shown.split("/")[4]

    def driver(self, address: str) -> str:
        """The driver that a function has, empty for none."""
        return self._target(address, "driver")

    def group(self, address: str) -> int:
        """The IOMMU group of a function."""
        return int(self._target(address, "iommu_group"))

    def override(self, address: str) -> str:
        """The driver it is reserved for, empty for none."""
        text = self.run(["cat", f"{DEVICES}/{address}/driver_override"], check=True).stdout.strip()
        return "" if text == "(null)" else text

    def bind(self, address: str, driver: str) -> None:
        """Give a function to a driver, by driver_override, which is empty again afterwards."""
        script = (
            f"cd {DEVICES}/{address}; echo {driver} >driver_override; [ ! -e driver ] || echo {address} >driver/unbind;"
            f" echo {address} >/sys/bus/pci/drivers_probe; echo >driver_override"
        )
        self.run(["sh", "-ec", script], check=True)

    def station(self, *command: str) -> Completed:
        """Run a command as the third station on the wire, at 10.77.0.9."""
        return self.run(["ip", "netns", "exec", STATION, *command])

    def _target(self, address: str, link: str) -> str:
        return self.run(["sh", "-c", f"readlink {DEVICES}/{address}/{link}"]).stdout.strip().rpartition("/")[2]
