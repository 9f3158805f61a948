"""By which reset a function can be put back to power-on, as far as sysfs tells while it still has its driver.

Not told are bridges that the kernel knows not to survive a reset of their bus; those show when the function is open.

Specification: Documentation/ABI/testing/sysfs-bus-pci, reset_method (Linux 5.15). It, and the older reset before it,
are there only where the kernel has a method.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from kvmpy.host.pci_function import SysfsFunction
from kvmpy.host.tree import read

# The methods that reset the function, all of it, and nothing else but it
TRUSTED: Final = ("device_specific", "flr", "af_flr", "bus", "cxl_bus")


class Reset(NamedTuple):
    """``name`` of the method, or ``why_not``; neither where this kernel does not say."""

    name: str = ""
    why_not: str = ""


def first_method(function: SysfsFunction) -> str | None:
    """What the kernel would do, empty for nothing; None where it does not say."""
    path = f"{function.path}/reset_method"
    return next(iter(read(path).split()), "") if os.path.exists(path) else None


def find_reset(function: SysfsFunction) -> Reset:
    """The one that it would get: the kernel's first if that is to be trusted, else one of its bus."""
    method = first_method(function)
    if method in TRUSTED:
        return Reset(method or "")
    if method is None and os.path.exists(f"{function.path}/reset"):
        return Reset()
    by_itself = f"the kernel's method for it, {method}, is not sure to" if method else "the kernel has no method for it"
    if function.upstream_bridge is None:
        return Reset(why_not=f"{by_itself}, and there is no bridge above it that could reset its bus")
    if others := function.bus_neighbours():
        return Reset(why_not=f"{by_itself}, and a reset of its bus would hit {', '.join(others)} too")
    return Reset("bus")
