"""A machine without KVM: its buses, its devices of every kind, guest memory and the io thread are the real ones.

In place of KVM are a sink for interrupts, a table of doorbells and four lines; at the far ends a socket pair, a file,
and a reader that is sometimes slow.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.abi import ioctl
from kvmpy.boot import pci_setup
from kvmpy.bus import Bus
from kvmpy.devices.acpi_pm import AcpiPm
from kvmpy.devices.base import Device
from kvmpy.devices.cmos import Cmos
from kvmpy.devices.debug_port import DebugPort
from kvmpy.devices.i8042 import I8042
from kvmpy.devices.pci.bar import Bar, BarKind
from kvmpy.devices.pci.decode import PciWindows
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.host_bridge import HostBridge
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.pvpanic import Pvpanic
from kvmpy.devices.reset_register import ResetRegister
from kvmpy.devices.serial import Serial16550
from kvmpy.devices.vfio.container import Container
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.devices.virtio.blk import VirtioBlk
from kvmpy.devices.virtio.console import VirtioConsole
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.devices.virtio.net import VirtioNet
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.devices.virtio.rng import VirtioRng
from kvmpy.host.disk import Disk
from kvmpy.host.memory import Mapping
from kvmpy.host.reactor import Reactor
from kvmpy.machine import layout
from kvmpy.memory import GuestMemory, Ram
from kvmpy.state import load, save
from tests.fakes.host import Line, Switch
from tests.fakes.interrupts import FakeDoorbells, FakeSink
from tests.fakes.net_rig import MAC
from tests.fakes.pci import Card
from tests.fakes.tap import FakeTap
from tests.fakes.vfio import ADDRESS, GROUP, VfioKernel
from tests.fakes.vfio_rig import reset_by

LOW_RAM: Final = 16 << 20
HIGH_RAM: Final = 2 << 20
RAM_IN_WINDOW: Final = 0xE000_0000
"""One page, where no machine has any: the windows alone would keep BARs off RAM."""
DISK: Final = 4 << 20
WORKERS: Final = 2
WINDOWS: Final = PciWindows(
    *(range(base, base + size) for base, size in (layout.PCI_IO, layout.MMIO32, layout.mmio64(LOW_RAM, 5)))
)


class FarEnd:
    """Who reads what the guest writes: the last of it is kept. ``room_left`` is None where it is fast."""

    def __init__(self, io: Reactor) -> None:
        self.text = b""
        self.room_left: int | None = None
        self.offered: Callable[[], object] = lambda: None
        self._io = io

    def room(self) -> bool:
        left = self.room_left
        return left is None or left > 0

    def write(self, data: bytes) -> None:
        self.text = (self.text + data)[-4096:]
        if self.room_left is not None:
            self.room_left -= len(data)

    def offer(self) -> None:
        self._io.post(lambda: self.offered())


class FuzzMachine:
    """``devices`` are in the order of a reset. What a test drives has a name of its own."""

    def __init__(self, resources: ExitStack, directory: Path) -> None:
        self.io = Reactor("io")
        resources.callback(self.io.close)
        self.memory = self._make_memory(resources)
        self.mmio, self.pio = Bus("mmio"), Bus("pio")
        self.doorbells, self.sink, self.power = FakeDoorbells(), FakeSink(), Switch()
        resources.callback(self.sink.close)
        self.lines = [Line() for _ in layout.PCI_IRQS]
        self.devices: list[Device[Any]] = self._make_platform()
        self.root = PciRoot(
            self.mmio, self.pio, self.doorbells, self.lines, WINDOWS, self.memory.overlaps, self.reset_register
        )
        self.pio.map(*layout.PCI_CONFIG, self.root.ports, widest=4)
        self.mmio.map(*layout.ECAM, self.root.ecam)
        self.devices.append(self.root.ports)
        self.functions: list[PciFunction[Any]] = []
        self.places: list[tuple[RootPort, PciFunction[Any]]] = []
        self.released: list[str] = []
        self.ports = [RootPort(f"rp{slot}", slot, self.sink, self.io.timer) for slot in (1, 2, 3, 4, 5)]
        self._add(HostBridge("host-bridge"), 0)
        for number, port in enumerate(self.ports, 1):
            self._add(port, number)
        self._make_devices(resources, directory)
        for device in self.devices:
            resources.callback(device.close)

    def _make_memory(self, resources: ExitStack) -> GuestMemory:
        mapping = Mapping(LOW_RAM + HIGH_RAM + mmap.PAGESIZE)
        resources.callback(mapping.close)
        memory = GuestMemory()
        resources.callback(memory.close)
        memory.add(Ram(0, LOW_RAM, mapping))
        memory.add(Ram(layout.HIGH_RAM, HIGH_RAM, mapping, LOW_RAM))
        memory.add(Ram(RAM_IN_WINDOW, mmap.PAGESIZE, mapping, LOW_RAM + HIGH_RAM))
        return memory

    def _make_platform(self) -> list[Device[Any]]:
        self.screen = FarEnd(self.io)
        com1 = Serial16550("com1", Line(), self.screen.write, room=self.screen.room)
        i8042 = I8042("i8042", self.power)
        cmos = Cmos("cmos", Line(), self.io.timer, low_memory=LOW_RAM, high_memory=HIGH_RAM)
        self.reset_register = ResetRegister("reset", self.power)
        self.com1, self.acpi_pm = com1, AcpiPm("acpi-pm", Line(), self.power)
        pvpanic, debug = Pvpanic("pvpanic", self.power), DebugPort("debug")
        self.pio.map(*layout.I8042_DATA, i8042.data_port, widest=1)
        self.pio.map(*layout.I8042_COMMAND, i8042.command_port, widest=1)
        for place, device, widest in (
            (layout.COM1, com1, 1),
            (layout.CMOS, cmos, 1),
            (layout.ACPI_PM, self.acpi_pm, 4),
            (layout.PVPANIC, pvpanic, 1),
            (layout.DEBUG_PORT, debug, 1),
        ):
            self.pio.map(*place, device, widest)
        return [com1, i8042, cmos, self.acpi_pm, self.reset_register, pvpanic, debug]

    def _make_devices(self, resources: ExitStack, directory: Path) -> None:
        """A network device and a console on the root bus, a disk, random numbers and a card of ours behind ports."""
        image = directory / "disk.raw"
        image.write_bytes(b"")
        with image.open("r+b") as file:
            file.truncate(DISK)
        self.disk = Disk.open(str(image), readonly=False, direct=False)
        resources.callback(self.disk.close)
        self.tap = FakeTap(2)
        resources.callback(self.tap.close)
        self.far = FarEnd(self.io)
        memory, io = self.memory, self.io
        self.net = VirtioNet("net0/virtio-net", memory, io, self.tap, MAC, mtu=1500, standby=True)
        self.console = VirtioConsole("con0/virtio-console", memory, io, self.far, "null")
        self.blk = VirtioBlk("vd0/virtio-blk", memory, io, self.disk, serial="disk0", queues=2, workers=WORKERS)
        self.rng = VirtioRng("rng0/virtio-rng", memory, io)
        self.virtio: list[VirtioPci] = []
        self._add(self._virtio_pci(self.net), 6)
        self._add(self._virtio_pci(self.console), 7)
        self._plug(self.ports[0], self._virtio_pci(self.blk))
        self._plug(self.ports[1], self._virtio_pci(self.rng))
        self.card = Card(
            "card", bars={0: (0x1000, BarKind.MEM32), 1: (0x20, BarKind.IO), 2: (0x10000, BarKind.MEM64_PREFETCHABLE)}
        )
        self._plug(self.ports[2], self.card)
        self.spare = Card("spare", bars={0: (0x4000, BarKind.MEM64_PREFETCHABLE)}, pin=2)
        self._plug(self.ports[3], self.spare)
        self._plug(self.ports[4], self._make_nic(resources, directory))

    def _make_nic(self, resources: ExitStack, directory: Path) -> VfioPci:
        """One of a host whose kernel is a fake, but for the descriptors."""
        vfio = directory / "vfio"
        vfio.mkdir()
        patch = resources.enter_context(pytest.MonkeyPatch.context())
        kernel = VfioKernel(vfio)
        patch.setattr(ioctl, "sys_ioctl", kernel)
        patch.setattr("kvmpy.devices.vfio.device.choose", reset_by("flr"))
        self.host_nic = kernel.nic
        resources.callback(self.host_nic.close)
        device = VfioDevice(ADDRESS, GROUP, Container(self.memory, kernel, str(vfio)))
        resources.callback(device.close)
        self.nic = VfioPci("nic0", device, self.sink, self.io)
        return self.nic

    def _virtio_pci(self, device: VirtioDevice[Any]) -> VirtioPci:
        self.devices.append(device)
        function = VirtioPci(device.name.partition("/")[0], device, self.sink)
        self.virtio.append(function)
        return function

    def _add(self, function: PciFunction[Any], number: int) -> None:
        self.devices.append(function)
        self.functions.append(function)
        self.root.add(function, number)

    def _plug(self, port: RootPort, function: PciFunction[Any]) -> None:
        self.devices.append(function)
        self.functions.append(function)
        self.places.append((port, function))
        port.on_released = lambda function: self.released.append(function.name)
        port.plug(function)

    @property
    def bars(self) -> Iterator[Bar]:
        return (bar for function in self.functions for bar in function.bars.values())

    # What a control thread does, with the vCPUs parked

    def resume(self) -> None:
        for device in self.devices:
            device.resume()

    def pause(self) -> None:
        for device in self.devices:
            device.pause()

    def reset(self) -> None:
        """All as at power-on, every card in its slot, then as firmware leaves it. The machine is paused."""
        for port, function in self.places:
            port.finish()
            if port.card is None:
                port.plug(function)
        for device in self.devices:
            with device.lock:
                device.reset()
        self.set_up_pci()

    def set_up_pci(self) -> None:
        pci_setup.set_up(self.root, WINDOWS, layout.PCI_IRQS)

    def move(self) -> None:
        """To another host, which happens to be this one. The machine is paused."""
        saved = [(device, type(device.state), save(device.state)) for device in self.devices]
        for device, kind, section in saved:
            device.state = load(kind, section)
        for device in self.devices:
            with device.lock:
                device.post_load()

    # What an operator does, while the vCPUs run

    def operate(self, dice: random.Random) -> None:
        """Something with a slot: any time is right."""
        port, function = dice.choice(self.places)
        if port.card is None:
            port.insert(function)
        else:
            dice.choice((port.request, port.request, port.cancel, port.tear_out))()

    # What a vCPU does

    def write(self, gpa: int, size: int, value: int) -> None:
        """A write to memory-mapped registers, which KVM takes if a doorbell is there."""
        event = self.doorbells.events.get(gpa)
        if event is not None:
            event.signal()
        else:
            self.mmio.write(gpa, size, value)
