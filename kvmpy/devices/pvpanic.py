"""pvpanic: one port by which a guest kernel says that it has panicked.

Models QEMU's docs/specs/pvpanic.rst, ISA flavour: a read gives the events the device knows, a write reports some. The
guest finds it in ACPI as QEMU0001. Left out: the guest-shutdown event (bit 2).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from kvmpy.devices.base import Device, Power
from kvmpy.state import State


class Event(IntEnum):
    PANICKED = 0x01
    CRASH_LOADED = 0x02  # panicked too, but a crash kernel takes over


class PvpanicState(State):
    """Nothing to carry: what was reported has left the device."""

    NAME = "pvpanic"
    VERSION = 1


class Pvpanic(Device[PvpanicState]):
    """One byte. ``on_crash_loaded`` is called under the lock and may only post."""

    def __init__(self, name: str, power: Power, on_crash_loaded: Callable[[], object] = lambda: None) -> None:
        super().__init__(name, PvpanicState())
        self._power, self._on_crash_loaded = power, on_crash_loaded

    def read(self, offset: int, size: int) -> int:
        return Event.PANICKED | Event.CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> None:
        if value & Event.PANICKED:
            self._power.report_panic()
        if value & Event.CRASH_LOADED:
            self._on_crash_loaded()
