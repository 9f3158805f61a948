"""A passed-through NIC behind a root port of a fake board: what a guest does to it, and what reaches the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from kvmpy.abi import ioctl
from kvmpy.devices.pci.config import Command
from kvmpy.devices.vfio.container import Container
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.devices.vfio.reset import BusReset, FunctionReset, Reset
from kvmpy.host.memory import Mapping
from kvmpy.host.reactor import Reactor
from kvmpy.memory import GuestMemory, Ram
from tests.fakes.pci import Board, open_windows
from tests.fakes.vfio import ADDRESS, GROUP, FakeNic, VfioKernel

LOW, PORT_IO = 0xC000_0000, 0x2000
HIGH: Final = 1 << 36
BAR0, BAR1, BAR2, BAR4 = LOW, PORT_IO, HIGH, LOW + 0x1_0000
ON: Final = Command.MEMORY | Command.IO | Command.BUS_MASTER
RAM: Final = 4 << 20


def reset_by(name: str) -> Callable[..., Reset]:
    """What `kvmpy.devices.vfio.reset.choose` would say, had sysfs said so."""
    return lambda address, config, resets: BusReset(address) if name == "bus" else FunctionReset(address, name)


class NicRig:
    """``function`` is the NIC as the guest sees it, at 01:00.0; ``nic`` the host's."""

    def __init__(
        self,
        resources: ExitStack,
        monkeypatch: pytest.MonkeyPatch,
        directory: Path,
        nic: FakeNic | None = None,
        *,
        rombar: bool = True,
    ) -> None:
        self.rombar = rombar
        self.kernel = VfioKernel(directory, nic)
        self.nic = self.kernel.nic
        resources.callback(self.nic.close)
        monkeypatch.setattr(ioctl, "sys_ioctl", self.kernel)
        monkeypatch.setattr("kvmpy.devices.vfio.device.choose", reset_by("flr"))
        self.board = Board()
        resources.callback(self.board.close)
        self.io = Reactor("io")
        resources.callback(self.io.close)
        mapping = Mapping(RAM)
        resources.callback(mapping.close)
        self.memory = GuestMemory()
        resources.callback(self.memory.close)
        self.memory.add(Ram(0, RAM, mapping))
        self.container = Container(self.memory, self.kernel, str(directory))
        self.port, self.port_config = self.board.add_port(bus=1)
        self.function = self.make()
        resources.callback(self.close)

    def make(self, *, prepared: bool = True) -> VfioPci:
        """It, or one that is only checked."""
        device = VfioDevice(ADDRESS, GROUP, self.container)
        try:
            if prepared:
                device.map_memory()
            return VfioPci("host0", device, self.board.sink, self.io, rombar=self.rombar, prepared=prepared)
        except BaseException:
            device.close()
            raise

    def plug(self) -> None:
        self.port.plug(self.function)
        self.config = self.board.config(1, 0)
        open_windows(
            self.port_config, range(LOW, LOW + (16 << 20)), range(HIGH, HIGH + (1 << 30)), range(0x2000, 0x3000)
        )

    def enable(self, command: int = ON) -> None:
        """What firmware and a driver do."""
        for index, address, wide in ((0, BAR0, False), (1, BAR1, False), (2, BAR2, True), (4, BAR4, False)):
            self.config.place(index, address, wide=wide)
        self.config.enable(command)

    def close(self) -> None:
        self.function.close()

    def settle(self) -> None:
        """Until no reset is under way, nor what comes after it."""
        for thread in threading.enumerate():
            if thread.name == "reset-host0":
                thread.join()

    @property
    def slots(self) -> dict[int, int]:
        """Address and size of what the guest reaches with no exit."""
        return {gpa: size for gpa, (size, _) in self.board.doorbells.slots.items()}

    def msix(self, control: int) -> None:
        self.config.write(self.config.capability(0x11) + 2, 2, control)

    def entry(self, index: int, *, masked: bool, data: int = 0x4041) -> None:
        """Write an entry of the table, through the BAR."""
        at = BAR2 + 16 * index
        for offset, value in ((12, 1), (0, 0xFEE0_1000), (4, 0), (8, data), (12, int(masked))):
            self.board.mmio.write(at + offset, 4, value)
