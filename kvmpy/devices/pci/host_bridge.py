"""The host bridge as a function of its own bus, at 00:00.0: what an operating system expects to see first.

It has no registers beyond the header: its windows and ECAM are fixed, and ACPI tells them.
"""

from __future__ import annotations

from typing import Final

from kvmpy.devices.pci.config import PciIds
from kvmpy.devices.pci.function import PciFunction, PciFunctionState

# As QEMU's generic host bridge: no driver has quirks for it.
IDS: Final = PciIds(vendor=0x1B36, device=0x0008, class_code=0x06_0000, subsystem_vendor=0x1AF4, subsystem=0x1100)


class HostBridgeState(PciFunctionState):
    NAME = "pci-host-bridge"
    VERSION = 1


class HostBridge(PciFunction[HostBridgeState]):
    """00:00.0."""

    def __init__(self, name: str) -> None:
        super().__init__(name, HostBridgeState(), IDS, express=None, pin=0)
