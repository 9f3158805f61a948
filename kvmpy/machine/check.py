"""What can be found out about a machine before it is made: its boot files, its ACPI tables, what is not built yet."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvmpy.boot import acpi, pci_tables
from kvmpy.boot.plan import BootPlan, plan
from kvmpy.config.schema import Config
from kvmpy.devices.acpi_pm import Reg as PmReg
from kvmpy.devices.reset_register import RESET_VALUE
from kvmpy.errors import ConfigError, HostError
from kvmpy.machine import layout, processor

ROOT_BUS_SLOTS: Final = 31  # and the host bridge
# What to do where a file or socket that the configuration names cannot be made.
ADVICE: Final = {
    errno.EADDRINUSE: "remove it unless another process listens there",
    errno.ENOENT: "make its directory first",
    errno.EACCES: "run as a user who may write there, or choose another path",
    errno.EROFS: "choose another path",
}


def check(config: Config) -> BootPlan:
    """All that can be found out without KVM. Raises ConfigError with every problem there is."""
    problems: list[str] = []
    boot = None
    try:
        boot = plan_boot(config)
    except ConfigError as e:
        problems += e.problems
    for look in (check_devices, processor.baseline):
        try:
            look(config)
        except ConfigError as e:
            problems += e.problems
    if boot is None or problems:
        raise ConfigError(*problems)
    return boot


def plan_boot(config: Config) -> BootPlan:
    """Check what the guest starts with, without KVM and without its RAM.

    Raises ConfigError, each problem with the place in the configuration it comes from.
    """
    with placing(config):
        return plan(
            config.boot.kernel,
            config.boot.initrd or None,
            config.boot.cmdline,
            ram=layout.ram(config.machine.memory, huge_page=huge_page(config)),
            reserved=layout.RESERVED,
            low=layout.LOW_MEMORY,
            acpi=acpi.build(_acpi_description(config), layout.LOW_MEMORY.acpi.start),
        )


def check_devices(config: Config) -> None:
    """Raises ConfigError for what is well formed and cannot be built: nothing is ignored."""
    problems = [config.place(key, problem) for key, problem in _unbuildable(config)]
    if problems:
        raise ConfigError(*problems)


def _unbuildable(config: Config) -> Iterator[tuple[str, str]]:
    """Key and problem."""
    if config.machine.dirty_ring:
        yield "machine.dirty_ring", "this version of kvmpy logs dirty pages in the bitmap only; leave it out"
    if (hook := config.machine.failover_hook) is not None and not (os.path.isfile(hook) and os.access(hook, os.X_OK)):
        yield "machine.failover_hook", f"{hook}: is no executable file; make it one (chmod +x), or leave it out"
    on_root_bus = len(config.root_port) + sum(device.bus is None for device in config.device)
    if on_root_bus > ROOT_BUS_SLOTS:
        yield (
            "root_port" if config.root_port else "device",
            f"{on_root_bus} root ports and devices without a bus, where the root bus has "
            f"{ROOT_BUS_SLOTS} places; plug devices into root ports",
        )


def _acpi_description(config: Config) -> acpi.AcpiDescription:
    return acpi.AcpiDescription(
        cpus=tuple(range(config.machine.cpus)),
        lapic=layout.LAPIC.base,
        ioapic=layout.IOAPIC.base,
        ioapic_id=0,
        sci_irq=layout.SCI_IRQ,
        pm1a_event=layout.ACPI_PM.base + PmReg.PM1_STATUS,
        pm1a_control=layout.ACPI_PM.base + PmReg.PM1_CONTROL,
        pm_timer=layout.ACPI_PM.base + PmReg.PM_TIMER,
        reset_port=layout.RESET.base,
        reset_value=RESET_VALUE,
        serial=(layout.COM1.base, layout.COM1_IRQ),
        rtc=(layout.CMOS.base, layout.RTC_IRQ),
        pvpanic_port=layout.PVPANIC.base,
        extra_dsdt=[
            pci_tables.dsdt(
                buses=pci_buses(config),
                io=layout.PCI_IO_RANGES,
                mem32=layout.MMIO32,
                mem64=mmio64(config),
                irqs=layout.PCI_IRQS,
                reserved=[layout.ECAM, layout.IDENTITY_MAP, layout.TSS],
            )
        ],
        extra_tables=[(b"MCFG", pci_tables.mcfg(layout.ECAM.base, buses=pci_buses(config)))],
    )


def pci_buses(config: Config) -> int:
    """How many buses there can be: the root bus, and one behind each root port."""
    return 1 + len(config.root_port)


def mmio64(config: Config) -> layout.Extent:
    """The window for 64-bit BARs."""
    return layout.mmio64(config.machine.memory, len(config.root_port), huge_page=huge_page(config))


def located(config: Config, key: str, e: HostError) -> HostError:
    """A failure that comes from ``key``, with its place and what to do. Empty, the message begins with the key."""
    number = e.__cause__.errno if isinstance(e.__cause__, OSError) else None
    advice = f"; {ADVICE[number]}" if number in ADVICE else ""
    return HostError(placed(config, f"{key}: {e}" if key else str(e)) + advice)


@contextmanager
def placing(config: Config) -> Iterator[None]:
    """Within, each problem of a ConfigError is told with its place in the configuration."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(*(placed(config, problem) for problem in e.problems)) from e


def huge_page(config: Config) -> int:
    """Bytes of a huge page, 0 for none."""
    pages = config.machine.hugepages
    return 0 if pages is pages.OFF else pages.page_size


def placed(config: Config, problem: str) -> str:
    """``boot.kernel: ...`` with the file and line that set boot.kernel before it, or said in terms of its --set."""
    key, _, text = problem.partition(": ")
    return config.place(key, text) if text else f"{config.locate(key)}: {problem}"
