"""How a machine is put together: the one place that names concrete devices. Read it top to bottom."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvmpy.boot import acpi
from kvmpy.boot.plan import BootPlan, plan
from kvmpy.bus import Bus
from kvmpy.config.schema import Config
from kvmpy.devices.acpi_pm import AcpiPm
from kvmpy.devices.acpi_pm import Reg as PmReg
from kvmpy.devices.base import Device, Power
from kvmpy.devices.cmos import Cmos
from kvmpy.devices.debug_port import DebugPort
from kvmpy.devices.i8042 import I8042
from kvmpy.devices.pvpanic import Pvpanic
from kvmpy.devices.reset_register import RESET_VALUE, ResetRegister
from kvmpy.devices.serial import Serial16550
from kvmpy.errors import ConfigError, HostError
from kvmpy.host.console import Console
from kvmpy.host.memory import Mapping
from kvmpy.host.reactor import Reactor
from kvmpy.kvm.cpuid import guest_cpuid
from kvmpy.kvm.system import System
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm import MemorySlots, Vm
from kvmpy.machine import layout
from kvmpy.memory import GuestMemory, Ram

UNBUILT: Final = ("root_port", "netdev", "drive", "device")
# What to do where a file or socket that the configuration names cannot be made.
ADVICE: Final = {
    errno.EADDRINUSE: "remove it unless another process listens there",
    errno.ENOENT: "make its directory first",
    errno.EACCES: "run as a user who may write there, or choose another path",
    errno.EROFS: "choose another path",
}


@dataclass(frozen=True, slots=True)
class Board:
    """The parts of one machine. ``devices`` is the order in which they are reset, and saved."""

    system: System
    vm: Vm
    memory: GuestMemory
    pio: Bus
    mmio: Bus
    vcpus: tuple[Vcpu, ...]
    devices: tuple[Device[Any], ...]
    serial: Serial16550
    acpi_pm: AcpiPm
    debug_port: DebugPort


def check(config: Config) -> BootPlan:
    """All that can be found out without KVM. Raises ConfigError with every problem there is."""
    problems: list[str] = []
    boot = None
    try:
        boot = plan_boot(config)
    except ConfigError as e:
        problems += e.problems
    try:
        check_devices(config)
    except ConfigError as e:
        problems += e.problems
    if boot is None or problems:
        raise ConfigError(*problems)
    return boot


def plan_boot(config: Config) -> BootPlan:
    """Check what the guest starts with, without KVM and without its RAM.

    Raises ConfigError, each problem with the place in the configuration it comes from.
    """
    try:
        return plan(
            Path(config.boot.kernel),
            Path(config.boot.initrd) if config.boot.initrd else None,
            config.boot.cmdline,
            ram=layout.ram(config.machine.memory, huge_page=_huge_page(config)),
            reserved=layout.RESERVED,
            low=layout.LOW_MEMORY,
            acpi=acpi.build(_acpi_description(config), layout.LOW_MEMORY.acpi.start),
        )
    except ConfigError as e:
        raise ConfigError(*(_located(config, problem) for problem in e.problems)) from e


def check_devices(config: Config) -> None:
    """Raises ConfigError for what is well formed and what this version cannot build yet: nothing is ignored."""
    problems = [
        f"{config.locate(f'{table}.0')}: {table}: this version of kvmpy has no PCI bus yet; leave it out"
        for table in UNBUILT
        if getattr(config, table)
    ]
    if config.machine.dirty_ring:
        problems.append(
            f"{config.locate('machine.dirty_ring')}: machine.dirty_ring: "
            "this version of kvmpy does not migrate yet; leave it out"
        )
    if problems:
        raise ConfigError(*problems)


def build(config: Config, power: Power, console: Console, io: Reactor, resources: ExitStack) -> Board:
    """Make the machine of ``config``; ``resources`` gives everything back, in reverse.

    Raises HostError where this host cannot, with nothing left behind once ``resources`` is closed.
    """
    system = resources.enter_context(System())
    system.require()
    check_vcpu_limit(config, system)
    vm = Vm(system)
    resources.callback(vm.close)
    memory = _build_memory(config, vm, resources)
    vm.create_irqchip(tss=layout.TSS.base, identity_map=layout.IDENTITY_MAP.base)

    com1 = Serial16550("com1", vm.line(layout.COM1_IRQ), console.write, room=console.room)
    console.connect(com1.receive, com1.drained)
    com1.on_room = console.offer
    i8042 = I8042("i8042", power)
    low, high = _ram_sizes(config)
    cmos = Cmos("cmos", vm.line(layout.RTC_IRQ), io.timer, low_memory=low, high_memory=high)
    acpi_pm = AcpiPm("acpi-pm", vm.line(layout.SCI_IRQ), power)
    reset = ResetRegister("reset", power)
    pvpanic = Pvpanic("pvpanic", power)
    debug_port = DebugPort("debug-port")

    pio, mmio = Bus("pio"), Bus("mmio")
    pio.map(*layout.COM1, com1, widest=1)
    pio.map(*layout.I8042_DATA, i8042.data_port, widest=1)
    pio.map(*layout.I8042_COMMAND, i8042.command_port, widest=1)
    pio.map(*layout.CMOS, cmos, widest=1)
    pio.map(*layout.ACPI_PM, acpi_pm, widest=4)
    pio.map(*layout.RESET, reset, widest=1)
    pio.map(*layout.PVPANIC, pvpanic, widest=1)
    pio.map(*layout.DEBUG_PORT, debug_port, widest=1)

    devices = (com1, i8042, cmos, acpi_pm, reset, pvpanic, debug_port)
    for device in devices:
        resources.callback(device.close)
    return Board(
        system=system,
        vm=vm,
        memory=memory,
        pio=pio,
        mmio=mmio,
        vcpus=_build_vcpus(config, vm, resources),
        devices=devices,
        serial=com1,
        acpi_pm=acpi_pm,
        debug_port=debug_port,
    )


def check_vcpu_limit(config: Config, system: System) -> None:
    """Raises ConfigError where KVM cannot give the machine that many vCPUs."""
    if config.machine.cpus > system.max_vcpus:
        problem = (
            f"machine.cpus: {config.machine.cpus} vCPUs, and this host's KVM gives a machine at most {system.max_vcpus}"
        )
        raise ConfigError(_located(config, problem))


def _build_memory(config: Config, vm: Vm, resources: ExitStack) -> GuestMemory:
    size, huge_page = config.machine.memory, _huge_page(config)
    try:
        mapping = Mapping(size, huge_page=huge_page, shared=config.machine.shared, reserve=config.machine.reserve)
    except HostError as e:
        raise located(config, e) from e
    resources.callback(mapping.close)
    memory = GuestMemory()
    resources.callback(memory.close)
    memory.listen(MemorySlots(vm))
    offset = 0
    for extent in layout.ram(size, huge_page=huge_page):
        memory.add(Ram(extent.base, extent.size, mapping, offset))
        offset += extent.size
    return memory


def _build_vcpus(config: Config, vm: Vm, resources: ExitStack) -> tuple[Vcpu, ...]:
    supported = vm.system.supported_cpuid()
    tsc_deadline = bool(vm.system.check("KVM_CAP_TSC_DEADLINE_TIMER"))
    vcpus = []
    for index in range(config.machine.cpus):
        vcpu = Vcpu(vm, index)
        resources.callback(vcpu.close)
        vcpu.set_cpuid(guest_cpuid(supported, index, config.machine.cpus, tsc_deadline=tsc_deadline))
        vcpus.append(vcpu)
    return tuple(vcpus)


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
    )


def located(config: Config, e: HostError) -> HostError:
    """A failure that starts with the key it comes from, with its place and what to do."""
    number = e.__cause__.errno if isinstance(e.__cause__, OSError) else None
    advice = f"; {ADVICE[number]}" if number in ADVICE else ""
    return HostError(_located(config, str(e)) + advice)


def _ram_sizes(config: Config) -> tuple[int, int]:
    """Bytes of RAM below and above 4 GiB."""
    low, *high = layout.ram(config.machine.memory, huge_page=_huge_page(config))
    return low.size, sum(extent.size for extent in high)


def _huge_page(config: Config) -> int:
    """Bytes of a huge page, 0 for none."""
    pages = config.machine.hugepages
    return 0 if pages is pages.OFF else pages.page_size


def _located(config: Config, problem: str) -> str:
    """``boot.kernel: ...`` with the file and line that set boot.kernel before it, or said in terms of its --set."""
    key, _, text = problem.partition(":")
    place = config.locate(key)
    return f"{place}:{text}" if place in (f"--set {key}", f"--{key}") else f"{place}: {problem}"
