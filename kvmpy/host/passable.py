"""What is in the way of passing a function through, each with how to mend it: for whoever claims one, and the doctor.

Type 1 of vfio wants an IOMMU, remapped interrupts (else a device could forge any interrupt) and a group in which no
driver of the host's drives anything: a group's functions reach each other, so all go to a guest together, or none. And
it must be sure that a reset clears it, which kvmpy wants, not vfio.

Specification: Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvmpy.errors import errno_name
from kvmpy.host.lock import named
from kvmpy.host.pci_function import BRIDGE, VFIO_PCI, SysfsFunction
from kvmpy.host.pci_reset import find_reset
from kvmpy.host.tree import Host, read

NO_IOMMU: Final = (
    "switch VT-d or AMD-Vi on in the firmware, and boot with intel_iommu=on where the processor is Intel's"
)
NO_REMAPPING: Final = (
    "switch interrupt remapping (x2APIC) on in the firmware; where the hardware has none and the guest is trusted, "
    "modprobe vfio_iommu_type1 allow_unsafe_interrupts=1"
)
NO_DRIVER: Final = "modprobe vfio-pci, and name it in /etc/modules-load.d to have it after the next boot"
# Drivers that do no DMA of their own, or leave it to vfio; those of vendors for vfio end alike
HARMLESS: Final = frozenset({"", "pcieport", "pci-stub", VFIO_PCI})
VENDORS_VFIO: Final = ("-vfio-pci", "_vfio_pci")


class Obstacle(NamedTuple):
    """What is in the way, and the remedy. ``passing``: it goes away when whoever has the function lets it go."""

    what: str
    remedy: str
    passing: bool = False

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def is_vfio(driver: str) -> bool:
    """Whether ``driver`` is vfio-pci or a vendor's variant of it."""
    return driver == VFIO_PCI or driver.endswith(VENDORS_VFIO)


def interrupts_remapped(host: Host) -> bool:
    """Whether the IOMMU remaps interrupts. sysfs does not say; the names of the interrupt controllers do ("IR-...")."""
    return " IR-" in read(f"{host.proc}/interrupts")


def unsafe_interrupts_allowed(host: Host) -> bool:
    """Whether the administrator has said that vfio may do without."""
    return read(f"{host.sys}/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") == "Y"


def has_vfio_pci(host: Host) -> bool:
    """Whether the driver is loaded."""
    return os.path.isdir(f"{host.sys}/bus/pci/drivers/{VFIO_PCI}")


def obstacles(function: SysfsFunction) -> Iterator[Obstacle]:
    """All there are, the first one first to mend. Nothing is changed, but a free group is opened for a moment."""
    if not function.exists():
        yield Obstacle("there is no such PCI function", "lspci -D lists them")
        return
    if function.base_class == BRIDGE:
        yield Obstacle("is a bridge", "choose a function behind it")
        return
    yield from _isolation(function)
    if why_not := find_reset(function).why_not:
        remedy = "passed through it could leak one guest's data to the next: choose another function"
        yield Obstacle(f"cannot be reset: {why_not}", remedy)
    if count := function.virtual_functions:
        remedy = f"pass those through, or write 0 to {function.path}/sriov_numvfs"
        yield Obstacle(f"has {count} virtual functions, which would vanish with its driver", remedy)
    if is_vfio(function.driver):
        yield from group_in_use(function)
        return
    if not has_vfio_pci(function.host):
        yield Obstacle("the kernel has no driver vfio-pci", NO_DRIVER)
    if not os.access(f"{function.path}/driver_override", os.W_OK):
        yield Obstacle(f"{VFIO_PCI} cannot be bound", "run as root")


def _isolation(function: SysfsFunction) -> Iterator[Obstacle]:
    host = function.host
    if function.group is None:
        yield Obstacle("is not behind an IOMMU", NO_IOMMU)
        return
    if not interrupts_remapped(host) and not unsafe_interrupts_allowed(host):
        yield Obstacle("the IOMMU does not remap interrupts", NO_REMAPPING)
    drivers = {member.address: member.driver for member in function.group_members()}
    if foreign := [f"{name} ({driver})" for name, driver in drivers.items() if not _harmless(driver)]:
        yield Obstacle(
            f"shares IOMMU group {function.group} with {', '.join(foreign)}",
            "give those up too (docs/passthrough.md says how), or use a slot with a group of its own",
        )


def _harmless(driver: str) -> bool:
    return driver in HARMLESS or is_vfio(driver)


def group_in_use(function: SysfsFunction) -> Iterator[Obstacle]:
    """Why the group's node cannot be opened; nothing where it can, or where it is this process that has it open."""
    node = function.group_node
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        number = e.errno or 0
        if number == errno.EBUSY:
            users = _users(node, function.host)
            if os.getpid() not in users:
                shown = ", ".join(named(pid) for pid in users) or "another process"
                yield Obstacle(f"{node}: EBUSY: in use by {shown}", "stop that first", passing=True)
        else:
            remedy = "run as root, or give the user the node" if number == errno.EACCES else "load vfio (modprobe vfio)"
            yield Obstacle(f"{node}: {errno_name(number)}", remedy)


def _users(node: str, host: Host) -> list[int]:
    """The processes that have ``node`` open; of other users' only root sees them."""
    return sorted(int(pid) for pid in os.listdir(host.proc) if pid.isdecimal() and node in _open_files(host, pid))


def _open_files(host: Host, pid: str) -> list[str]:
    """What process ``pid`` has open, as far as that can be seen."""
    directory = f"{host.proc}/{pid}/fd"
    try:
        return [os.readlink(f"{directory}/{number}") for number in os.listdir(directory)]
    except OSError:  # it, or a descriptor of it, has gone meanwhile, or it is none of our business
        return []
