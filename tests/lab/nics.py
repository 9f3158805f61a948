"""Emulated hosts with NICs to pass through, and what a test asks of their sysfs."""

from __future__ import annotations

from typing import Final

from scripts.lab.hardware import HARDWARE, STATION
from scripts.lab.host import Completed, EmulatedHost
from scripts.lab.nics import functions, uplink

DEVICES: Final = "/sys/bus/pci/devices"


class NicHost(EmulatedHost):
    """A host with the hardware called ``name``, "igb" or "e1000e".

    ``functions`` are those that are there to be passed through: two virtual functions of one igb, whose PF, ``uplink``,
    is a port of the bridge br0 at 10.77.0.1; or four e1000e, the first two of one address, the last two in one IOMMU
    group.
    """

    def __init__(self, name: str) -> None:
        super().__init__(memory="4G", hardware=HARDWARE[name])
        self.functions: list[str] = []
        self.uplink = ""

    def start(self) -> None:
        super().start()
        self.functions, self.uplink = functions(self), uplink(self)

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
