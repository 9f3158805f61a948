"""The older way to configuration space: an address in port 0xCF8, its data in 0xCFC to 0xCFF.

PCI Local Bus 3.0, section 3.2.2.3.2. Only an aligned dword at 0xCF8 is the address register. A byte at 0xCF9 belongs to
the chipset's reset register, which lives in the middle of it; any other access there is nobody's.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol

from kvmpy.bus import Target
from kvmpy.devices.base import Device
from kvmpy.latch import Latch
from kvmpy.state import State, u32

ADDRESS: Final = 0
RESET: Final = 1
DATA: Final = 4
ENABLE: Final = 0x8000_0000
ADDRESS_BITS: Final = 0x80FF_FFFC


class ConfigAccess(Protocol):
    """Configuration space by the numbers programmed now, which ``lock`` keeps still: hold it."""

    lock: threading.RLock

    def read(self, bus: int, devfn: int, offset: int, size: int) -> int:
        """All ones where there is nothing."""

    def write(self, bus: int, devfn: int, offset: int, size: int, value: int) -> None:
        """Ignored where there is nothing."""


class ConfigPortsState(State):
    NAME = "pci-config-ports"
    VERSION = 1
    address: u32 = 0


class ConfigPorts(Device[ConfigPortsState]):
    """Eight ports, to be mapped with accesses of at most 4 bytes. ``reset_register`` gets the byte at offset 1.

    Their lock is that of ``config``.
    """

    def __init__(self, name: str, config: ConfigAccess, reset_register: Target) -> None:
        super().__init__(name, ConfigPortsState())
        self.lock = config.lock
        self._config, self._reset_register = config, reset_register
        self.address = Latch(ADDRESS, 4, mask=ADDRESS_BITS)
        self.post_load()

    def read(self, offset: int, size: int) -> int:
        address = self.address.value
        if offset >= DATA and address & ENABLE:
            register = (address & 0xFC) + offset - DATA
            return self._config.read(address >> 16 & 0xFF, address >> 8 & 0xFF, register, size)
        if (offset, size) == (ADDRESS, 4):
            return address
        if (offset, size) == (RESET, 1):
            with self._reset_register.lock:
                return self._reset_register.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= DATA:
            if (address := self.address.value) & ENABLE:
                register = (address & 0xFC) + offset - DATA
                self._config.write(address >> 16 & 0xFF, address >> 8 & 0xFF, register, size, value)
        elif (offset, size) == (ADDRESS, 4):
            self._select(value)
        elif (offset, size) == (RESET, 1):
            with self._reset_register.lock:
                self._reset_register.write(0, 1, value)

    def post_load(self) -> None:
        self._select(self.state.address)

    def pause(self) -> None:
        self.state.address = self.address.value

    def _select(self, address: int) -> None:
        self.address.set(address, reads=True, stores=True)
