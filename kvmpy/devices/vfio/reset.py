"""How a function is put back to power-on: by a reset that is known to reset, or it is not passed through at all.

What one guest left in a device must not reach the next, and a device that goes on with DMA must be stopped. A function
level reset does it; so does a reset of the bus it is on, if nothing else is there. A reset by power management (D3hot
and back) is not trusted: many devices keep all their registers, and say otherwise.

While the host waits for a device, to unbind it from vfio-pci, the kernel refuses every reset of it, its own when the
device is closed among them. It stops the device's DMA all the same. Whoever has it next resets it: most drivers when
they start, vfio-pci when it is opened, a machine before its guest gets it.

VFIO_DEVICE_RESET takes the first method of the kernel's list for the device, so it is used only where that is a good
one; else the bus is reset by name.
"""

from __future__ import annotations

import errno
from typing import Final, Protocol

from kvmpy.abi import vfio as abi
from kvmpy.devices.vfio.config import HostConfig
from kvmpy.errors import HostError, IoctlError
from kvmpy.host.pci_function import SysfsFunction
from kvmpy.host.pci_reset import TRUSTED, first_method
from kvmpy.host.tree import Host

MOST_DEVICES: Final = 256 * 8  # on a bus, and its subordinates


class ResetRefused(HostError):
    """The kernel is busy with the device, most often because it waits to take it back, and resets nothing meanwhile."""


class Reset(Protocol):
    """One way."""

    name: str

    def check(self, fd: int) -> None:
        """Raises HostError where it is not to be had for the device ``fd``."""

    def reset(self, fd: int, group: int) -> None:
        """Do it; ``group`` is the descriptor of the device's group. Raises HostError."""


class FunctionReset:
    """By VFIO_DEVICE_RESET, which does ``name``."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self.name = address, name

    def check(self, fd: int) -> None:
        """There is nothing to find out."""

    def reset(self, fd: int, group: int) -> None:
        """Reset the function."""
        try:
            abi.VFIO_DEVICE_RESET(fd)
        except IoctlError as e:
            raise _failure(self.address, e, "it has not been reset") from e


class BusReset:
    """By VFIO_DEVICE_PCI_HOT_RESET, of a bus that has no other function on it."""

    name = "bus"

    def __init__(self, address: str) -> None:
        self.address = address

    def check(self, fd: int) -> None:
        """Raises HostError where the kernel cannot, or where others would be reset too."""
        try:
            info = abi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(fd, devices=MOST_DEVICES)
        except IoctlError as e:
            reason = "" if e.errno == errno.ENODEV else f" ({e})"
            raise HostError(
                f"{self.address}: cannot be reset, neither by itself nor by its bus{reason}, so it cannot be passed "
                "through: what this guest leaves in it would reach the next"
            ) from e
        found = [info.devices[n] for n in range(min(info.count, MOST_DEVICES))]
        addresses = [f"{d.segment:04x}:{d.bus:02x}:{d.devfn >> 3:02x}.{d.devfn & 7}" for d in found]
        if others := [address for address in addresses if address != self.address]:
            raise HostError(
                f"{self.address}: can be reset only with its whole bus, where {', '.join(others)} would be reset too, "
                "so it cannot be passed through"
            )

    def reset(self, fd: int, group: int) -> None:
        """Reset the bus."""
        try:
            abi.VFIO_DEVICE_PCI_HOT_RESET(fd, count=1, group_fds=[group])
        except IoctlError as e:
            raise _failure(self.address, e, "its bus has not been reset") from e


def _failure(address: str, e: IoctlError, outcome: str) -> HostError:
    if e.errno == errno.EAGAIN:  # it is locked: an unbind holds the lock until we have closed the device
        return ResetRefused(f"{address}: {e}: {outcome}: the host is about to take it back, or busy with it otherwise")
    return HostError(f"{address}: {e}: {outcome}")


def choose(address: str, config: HostConfig, *, resets: bool, host: Host = Host()) -> Reset:  # noqa: B008  immutable
    """The best way for a function; ``resets`` is whether the kernel has any for it."""
    method = first_method(SysfsFunction(address, host))
    if method is None and config.has_flr:  # before Linux 5.15, where it comes before all but the device's own
        method = "flr"
    if resets and method in TRUSTED:
        return FunctionReset(address, method)
    return BusReset(address)
