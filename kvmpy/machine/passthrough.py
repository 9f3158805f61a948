"""Functions of the host's PCI bus for the guest: found, opened, and made into devices.

All of them share one container, in which the guest's RAM is mapped for DMA while there is any.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Protocol

from kvmpy.config.schema import VfioPci as VfioPciTable
from kvmpy.devices.vfio.container import Container, GroupListener
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.errors import HostError
from kvmpy.host.reactor import Reactor
from kvmpy.irq import MsiSink
from kvmpy.memory import GuestMemory

SYSFS: Final = Path("/sys/bus/pci/devices")
DRIVER: Final = "vfio-pci"


class Surroundings(Protocol):
    """What a passed-through function needs of the machine: part of `kvmpy.machine.plug.Host`."""

    @property
    def memory(self) -> GuestMemory: ...
    @property
    def io(self) -> Reactor: ...
    @property
    def sink(self) -> MsiSink: ...
    @property
    def groups(self) -> GroupListener: ...
    @property
    def report(self) -> Callable[..., None]: ...


class Claimed(Protocol):
    """A function of the host that is ours until `close`."""

    @property
    def group(self) -> int: ...

    def close(self) -> None: ...


class Passthrough:
    """Makes the passed-through functions of one machine."""

    def __init__(self, host: Surroundings, claim: Callable[[str], Claimed] | None = None) -> None:
        """``claim`` takes a function from the host's driver; by default it must have been taken already."""
        self._host, self._claim = host, claim or BoundFunction
        self._container = Container(host.memory, host.groups)

    def make(self, table: VfioPciTable, resources: ExitStack) -> VfioPci:
        """The function of ``table``, reset, and all RAM mapped: seconds. By a thread that no vCPU waits for.

        `close` of it is the caller's; what ``resources`` gets is to be closed after that. Raises HostError, beginning
        with the key it concerns, with nothing left behind.
        """
        name, host = str(table.id), self._host
        try:
            with ExitStack() as undo:
                claimed = self._claim(str(table.host))
                undo.callback(claimed.close)
                device = VfioDevice(str(table.host), claimed.group, self._container)
                with ExitStack() as failed:
                    failed.callback(device.close)
                    device.reset()
                    function = VfioPci(name, device, host.sink, host.io)
                    failed.pop_all()
                resources.push(undo.pop_all())
        except HostError as e:
            raise HostError(f"device.{name}.host: {e}") from e
        function.on_broken = lambda why: host.report("DEVICE_BROKEN", device=name, reason=why)
        function.on_wanted_back = lambda: host.report("DEVICE_WANTED_BACK", device=name, host=str(table.host))
        return function


class BoundFunction:
    """A function that vfio-pci has already, and keeps (a `Claimed`)."""

    def __init__(self, address: str, sysfs: Path = SYSFS) -> None:
        """Raises HostError where vfio-pci has it not."""
        self.group = bound_group(address, sysfs)

    def close(self) -> None:
        """Nothing was changed."""


def bound_group(address: str, sysfs: Path) -> int:
    """The IOMMU group of a function that vfio-pci has. Raises HostError where it has not."""
    function = sysfs / address
    if not function.exists():
        raise HostError(f"{address}: this host has no such PCI function; see lspci -D")
    driver = (function / "driver").resolve().name if (function / "driver").exists() else None
    if driver != DRIVER:
        bound = f"has the driver {driver}" if driver else "has no driver"
        raise HostError(
            f"{address}: {bound}, not {DRIVER}; bind it: echo {DRIVER} >{function}/driver_override; "
            f"echo {address} >{function}/driver/unbind; echo {address} >/sys/bus/pci/drivers_probe"
        )
    group = function / "iommu_group"
    if not group.exists():
        raise HostError(
            f"{address}: is in no IOMMU group, so this host uses no IOMMU; switch it on in the firmware, and with "
            "intel_iommu=on on the kernel's command line where that is needed"
        )
    return int(group.resolve().name)
