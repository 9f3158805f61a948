"""Run on an emulated host: writes a register of an e1000e, resets the function in each way, and says what is left.

python -m tests.lab.programs.vfio_reset ADDRESS      the function, bound to vfio-pci
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvmpy.abi import vfio as abi
from kvmpy.devices.pci.config import Command
from kvmpy.devices.vfio.container import Container
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.memory import GuestMemory

SCRATCH = 0x3828  # transmit absolute interrupt delay: 16 bits that do nothing while nothing is sent
VALUE = 0x1234


class Nobody:
    """There is no KVM to be told of the group."""

    def group_added(self, group: int) -> None: ...
    def group_removed(self, group: int) -> None: ...


def main(address: str) -> None:
    memory = GuestMemory()
    group = int(Path("/sys/bus/pci/devices", address, "iommu_group").resolve().name)
    device = VfioDevice(address, group, Container(memory, Nobody()))
    registers = device.bars[0]

    def written() -> int:
        device.set_command(Command.MEMORY)
        device.write(registers, SCRATCH, 4, VALUE)
        return device.read(registers, SCRATCH, 4)

    def left() -> int:
        device.set_command(Command.MEMORY)
        return device.read(registers, SCRATCH, 4)

    print(f"before {written():#x}")
    abi.VFIO_DEVICE_RESET(device.fd)  # whatever the kernel thinks best: for this device, power management
    print(f"kernel's {left():#x}")
    print(f"again {written():#x}")
    device.reset()
    print(f"{device.resets.name} {left():#x}")
    device.close()


main(sys.argv[1])
