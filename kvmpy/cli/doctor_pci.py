"""What `kvmpy doctor` says of passing PCI functions through: of the host, and with --device of one function."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvmpy.cli.finding import FAIL, OK, WARN, Finding
from kvmpy.errors import errno_name
from kvmpy.host.memory import MIB
from kvmpy.host.passable import (
    NO_DRIVER,
    NO_IOMMU,
    NO_REMAPPING,
    has_vfio_pci,
    interrupts_remapped,
    obstacles,
    unsafe_interrupts_allowed,
)
from kvmpy.host.pci_function import SysfsFunction
from kvmpy.host.pci_reset import find_reset
from kvmpy.host.pci_use import uses
from kvmpy.host.tree import Host

# QEMU's and libvirt's usual advice: enough locked memory to map a small guest for a device
LOCKED_MEMORY_WANTED: Final = 1024 * MIB


def passthrough(host: Host) -> Iterator[Finding]:
    """The preconditions that all functions share."""
    yield node(f"{host.dev}/vfio/vfio", "passed-through PCI functions", "modprobe vfio")
    if has_vfio_pci(host):
        yield Finding("vfio-pci", OK, "loaded")
    else:
        yield Finding("vfio-pci", WARN, "not loaded; needed for passed-through PCI functions", NO_DRIVER)
    yield from _iommu(host)
    yield _locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], root=os.geteuid() == 0)


def examine_device(address: str, host: Host) -> Iterator[Finding]:
    """Whether the function at ``address`` can be passed through, and what to do if not. Raises HostError."""
    function = SysfsFunction(address, host)
    yield from passthrough(host)
    found = list(obstacles(function))
    for obstacle in found:
        yield Finding(function.address, FAIL, obstacle.what, obstacle.remedy)
    if not function.exists():
        return
    if not found:
        driver = function.driver or "no driver"
        yield Finding(function.address, OK, f"can be passed through; IOMMU group {function.group}, {driver}")
    yield from _settings(function)
    for use in uses(function):
        yield Finding(use.what, WARN, use.how, use.remedy)
    yield from _reset(function)


def node(path: str, purpose: str, remedy: str) -> Finding:
    """Opened in earnest: the node of a module that is not loaded is there all the same."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        remedy = "run as root, or join the group that owns it"
        return Finding(path, WARN, f"not permitted; needed for {purpose}", remedy)
    except OSError as e:
        found = "missing" if e.errno == errno.ENOENT else errno_name(e.errno or 0)
        return Finding(path, WARN, f"{found}; needed for {purpose}", remedy)
    return Finding(path, OK, "can be opened")


def _iommu(host: Host) -> Iterator[Finding]:
    groups = list(Path(host.sys, "kernel/iommu_groups").glob("*"))
    if not groups:
        yield Finding("IOMMU", WARN, "no groups; needed for passed-through PCI functions", NO_IOMMU)
        return
    count = sum(len(list(group.glob("devices/*"))) for group in groups)
    yield Finding("IOMMU", OK, f"{count} functions in {len(groups)} groups")
    if interrupts_remapped(host):
        yield Finding("interrupt remapping", OK, "on")
    elif unsafe_interrupts_allowed(host):
        yield Finding("interrupt remapping", OK, "off, which vfio was told to allow (allow_unsafe_interrupts)")
    else:
        yield Finding("interrupt remapping", WARN, "off; needed for passed-through PCI functions", NO_REMAPPING)


def _locked_memory(soft: int, *, root: bool) -> Finding:
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // MIB} MiB"
    if root or soft == resource.RLIM_INFINITY or soft >= LOCKED_MEMORY_WANTED:
        return Finding("locked memory", OK, shown)
    remedy = "raise it to the guest's memory (ulimit -l, or LimitMEMLOCK= in a unit) before passing a function through"
    return Finding("locked memory", WARN, shown, remedy)


def _settings(function: SysfsFunction) -> Iterator[Finding]:
    """Whether MAC and VLAN can be set: that is for a PF to do, by its network interface."""
    if (vf := function.virtual_function()) is None:
        return
    found = f"virtual function {vf.number} of {vf.pf}"
    if vf.interface:
        yield Finding("MAC and VLAN", OK, f"{found}, set through {vf.interface}")
    else:
        remedy = "bind the PF to its own driver, in this network namespace; or leave mac and vlan out"
        yield Finding("MAC and VLAN", WARN, f"{found}, which has no network interface here", remedy)


def _reset(function: SysfsFunction) -> Iterator[Finding]:
    """By what it would be reset; where that is by nothing there was an obstacle."""
    name, why_not = find_reset(function)
    if name:
        yield Finding("reset", OK, name)
    elif not why_not:
        remedy = "a start shows it: a function without a function level reset, or a bus of its own, is refused"
        yield Finding("reset", WARN, "by a method that this kernel does not name", remedy)
