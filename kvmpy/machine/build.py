"""How a machine is put together: the one place that names concrete devices. Read it top to bottom."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from kvmpy.boot import pci_setup
from kvmpy.bus import Bus
from kvmpy.config.schema import Config, VfioPci
from kvmpy.config.schema import Device as DeviceTable
from kvmpy.devices.acpi_pm import AcpiPm
from kvmpy.devices.base import Device, Power
from kvmpy.devices.cmos import Cmos
from kvmpy.devices.debug_port import DebugPort
from kvmpy.devices.i8042 import I8042
from kvmpy.devices.pci.decode import PciWindows
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.pvpanic import Pvpanic
from kvmpy.devices.reset_register import ResetRegister
from kvmpy.devices.serial import Serial16550
from kvmpy.errors import ConfigError, HostError
from kvmpy.host import rundir
from kvmpy.host.console import Console
from kvmpy.host.memory import Mapping as HostMemory
from kvmpy.host.reactor import Reactor
from kvmpy.kvm.cpuid import address_bits
from kvmpy.kvm.system import System
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vfio import VfioGroups
from kvmpy.kvm.vm import MemorySlots, Vm
from kvmpy.machine import layout, processor
from kvmpy.machine.check import huge_page, located, mmio64, placed
from kvmpy.machine.inventory import Inventory, Plugged
from kvmpy.machine.plug import Host, Plugger, Report
from kvmpy.memory import GuestMemory, Ram

if TYPE_CHECKING:
    from kvmpy.devices.virtio.net import VirtioNet
    from kvmpy.host.hook import Hook
    from kvmpy.host.network import Network


class Board(msgspec.Struct, frozen=True):
    """The parts of one machine. What is plugged in can change; the properties say what it is now."""

    system: System
    vm: Vm
    memory: GuestMemory
    pio: Bus
    mmio: Bus
    vcpus: tuple[Vcpu, ...]
    serial: Serial16550
    acpi_pm: AcpiPm
    debug_port: DebugPort
    pci: PciRoot
    pci_windows: PciWindows
    inventory: Inventory
    plugger: Plugger

    @property
    def devices(self) -> tuple[Device[Any], ...]:
        """The order in which they are reset, and saved."""
        return self.inventory.devices

    @property
    def moving(self) -> tuple[Device[Any], ...]:
        """Those that go with the guest in a migration."""
        return self.inventory.moving

    @property
    def by_id(self) -> Mapping[str, Device[Any]]:
        """The devices of the configuration, and those added since."""
        return self.inventory.by_id

    @property
    def nics(self) -> Mapping[str, VirtioNet]:
        """Network devices by their id and by their netdev's."""
        return self.inventory.nics

    @property
    def ports(self) -> Mapping[str, RootPort]:
        """The root ports by their id."""
        return self.plugger.ports

    def set_up_pci(self) -> None:
        """Number the buses and place every BAR, as firmware does after power-on. Raises HostError."""
        with self.pci.lock:
            pci_setup.set_up(self.pci, self.pci_windows, layout.PCI_IRQS, self._expected())

    def require_room(self, more: Plugged) -> None:
        """Raises HostError where `set_up_pci`, at the guest's next reboot, would have no place for ``more``."""
        there = (*self.inventory.plugged.values(), more)
        on_root = [size for plugged in there if plugged.table.bus not in self.ports for size in _sizes(plugged)]
        behind = []
        for port in self.ports:
            found = [plugged for plugged in there if plugged.table.bus == port]
            bars = [size for plugged in found if plugged.standby is None for size in _sizes(plugged)]
            expected = [size for plugged in found if plugged.standby is not None for size in _sizes(plugged)]
            behind.append(pci_setup.Behind(str(port), bars, expected))
        pci_setup.require_room(self.pci_windows, on_root, behind)

    def _expected(self) -> pci_setup.Expected:
        """The BARs of failover primaries, whether or not they are in their slots yet."""
        places = {
            function.name: device << 3 | number for bus, device, number, function in self.pci.functions() if not bus
        }
        hidden = [plugged for plugged in self.inventory.plugged.values() if plugged.standby is not None]
        return {places[str(plugged.table.bus)]: _sizes(plugged) for plugged in hidden}


def _sizes(plugged: Plugged) -> pci_setup.Sizes:
    return [(pci_setup.space(bar.kind), bar.size) for bar in plugged.function.bars.values()]


def build(
    config: Config,
    power: Power,
    console: Console,
    io: Reactor,
    control: Reactor,
    report: Report,
    resources: ExitStack,
    *,
    named: bool = False,
    incoming: bool = False,
) -> Board:
    """Make the machine of ``config``; ``resources`` gives everything back, in reverse.

    ``named``: its name is locked already. With ``incoming`` the disks are another machine's still, and are not locked.

    Raises HostError where this host cannot, with nothing left behind once ``resources`` is closed.
    """
    system = resources.enter_context(System())
    system.require()
    check_vcpu_limit(config, system)
    network, hook = _start_network(config, resources), _start_hook(config, resources)
    cpu = processor.baseline(config)
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
    pio.map(*layout.COM1, com1, widest=1, latches=[com1.line_status])
    pio.map(*layout.I8042_DATA, i8042.data_port, widest=1)
    pio.map(*layout.I8042_COMMAND, i8042.command_port, widest=1)
    pio.map(*layout.CMOS, cmos, widest=1, latches=[cmos.index])
    pio.map(*layout.ACPI_PM, acpi_pm, widest=4)
    pio.map(*layout.PVPANIC, pvpanic, widest=1)
    pio.map(*layout.DEBUG_PORT, debug_port, widest=1, latches=[debug_port.last])

    windows = pci_windows(config, address_bits(processor.table(cpu, system)))
    lines = [vm.line(gsi) for gsi in layout.PCI_IRQS]
    pci = PciRoot(mmio, pio, vm, lines, windows, memory.overlaps, reset)
    pio.map(*layout.PCI_CONFIG, pci.ports, widest=4, latches=[pci.ports.address])
    mmio.map(*layout.ECAM, pci.ecam, widest=8)
    platform = (com1, i8042, cmos, acpi_pm, reset, pvpanic, debug_port, pci.ports)
    for device in platform:
        resources.callback(device.close)
    inventory = Inventory()
    inventory.fix(platform)
    groups = VfioGroups(vm)
    resources.callback(groups.close)
    directory = os.path.join(rundir.base(), config.name)
    host = Host(memory, io, vm, network, report, control.timer, groups, directory, named=named, hook=hook)
    plugger = Plugger(config, pci, host, inventory, resources)
    plugger.plug_all(incoming=incoming)
    return Board(
        system=system,
        vm=vm,
        memory=memory,
        pio=pio,
        mmio=mmio,
        vcpus=processor.build_vcpus(config, cpu, vm, resources),
        serial=com1,
        acpi_pm=acpi_pm,
        debug_port=debug_port,
        pci=pci,
        pci_windows=windows,
        inventory=inventory,
        plugger=plugger,
    )


def pci_windows(config: Config, bits: int) -> PciWindows:
    """The addresses for BARs. Raises HostError where the guest's processor cannot reach all of them."""
    mem64 = mmio64(config)
    if not layout.is_addressable(mem64, bits):
        raise HostError(
            placed(
                config,
                f"machine.memory: with the PCI window above it the guest needs addresses up to {sum(mem64):#x}, "
                f"and this processor has {bits} bits; give the guest less memory or fewer root ports",
            )
        )
    return PciWindows(*(range(base, base + size) for base, size in (layout.PCI_IO, layout.MMIO32, mem64)))


def check_vcpu_limit(config: Config, system: System) -> None:
    """Raises ConfigError where KVM cannot give the machine that many vCPUs."""
    if config.machine.cpus > system.max_vcpus:
        problem = (
            f"machine.cpus: {config.machine.cpus} vCPUs, and this host's KVM gives a machine at most {system.max_vcpus}"
        )
        raise ConfigError(placed(config, problem))


def _build_memory(config: Config, vm: Vm, resources: ExitStack) -> GuestMemory:
    machine, page = config.machine, huge_page(config)
    try:
        mapping = HostMemory(machine.memory, huge_page=page, shared=machine.shared, reserve=machine.reserve)
    except HostError as e:
        raise located(config, "", e) from e
    resources.callback(mapping.close)
    memory = GuestMemory()
    resources.callback(memory.close)
    memory.listen(MemorySlots(vm))
    offset = 0
    for extent in layout.ram(machine.memory, huge_page=page):
        memory.add(Ram(extent.base, extent.size, mapping, offset))
        offset += extent.size
    return memory


def _start_network(config: Config, resources: ExitStack) -> Network | None:
    """The helper process, where it is needed. It takes a moment to start, and the machine is made meanwhile.

    Where devices can be plugged in later, it can be started then.
    """
    needed = any(netdev.bridge for netdev in config.netdev) or any(map(_is_assigned, config.device))
    if not config.root_port and not needed:
        return None
    from kvmpy.host.network import Network

    network = Network(config.name)
    resources.callback(network.close)
    if needed:
        network.start()
    return network


def _start_hook(config: Config, resources: ExitStack) -> Hook | None:
    """What runs the operator's program, started like the network helper; without root ports there is no failover."""
    program = config.machine.failover_hook
    if program is None or not config.root_port:
        return None
    from kvmpy.host.hook import Hook

    hook = Hook(str(program), config.name)
    resources.callback(hook.close)
    hook.start()
    return hook


def _is_assigned(table: DeviceTable) -> bool:
    """Whether a device may be a virtual function whose PF is told something."""
    return isinstance(table, VfioPci) and any(
        value is not None for value in (table.mac, table.vlan, table.failover_pair_id)
    )


def _ram_sizes(config: Config) -> tuple[int, int]:
    """Bytes of RAM below and above 4 GiB."""
    low, *high = layout.ram(config.machine.memory, huge_page=huge_page(config))
    return low.size, sum(extent.size for extent in high)
