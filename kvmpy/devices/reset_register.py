"""The reset control register of Intel chipsets, and the FADT's reset register.

Models RST_CNT of the ICH9 data sheet (section 13.7.5). All resets are the same here: the whole machine. One byte inside
the dword of PCI's 0xCF8, where dword accesses mean the PCI address: only a byte access is meant for this device.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from kvmpy.devices.base import Device, Power
from kvmpy.state import State, u8


class ResetControl(IntEnum):
    SYSTEM = 0x02  # hard reset rather than INIT of the CPU
    CPU = 0x04  # resets when it goes from 0 to 1
    FULL = 0x08  # power cycle


RESET_VALUE: Final = ResetControl.SYSTEM | ResetControl.CPU  # what the FADT tells the guest to write


class ResetRegisterState(State):
    NAME = "reset-register"
    VERSION = 1
    value: u8 = 0


class ResetRegister(Device[ResetRegisterState]):
    """One byte."""

    def __init__(self, name: str, power: Power) -> None:
        super().__init__(name, ResetRegisterState())
        self._power = power

    def read(self, offset: int, size: int) -> int:
        return self.state.value

    def write(self, offset: int, size: int, value: int) -> None:
        rising = value & ~self.state.value
        self.state.value = value & (ResetControl.SYSTEM | ResetControl.CPU | ResetControl.FULL)
        if rising & ResetControl.CPU:
            self._power.request_reset()
