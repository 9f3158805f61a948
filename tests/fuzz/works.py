"""Whether the devices of a FuzzMachine do what they are for: each is driven by an honest driver, to a result."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any, Final

from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.irq import MsiMessage
from kvmpy.machine import layout
from tests.fakes.loop import BOUND, settle
from tests.fakes.pci import Accesses
from tests.fakes.tap import HEADER
from tests.fakes.vfio import MSIX
from tests.fakes.virtio_driver import RingDriver
from tests.fakes.virtio_pci_driver import PciGuest
from tests.fuzz.machine import FuzzMachine

RINGS: Final = 0x40_0000  # where the drivers have theirs
RINGS_SIZE: Final = 0x30_0000
SECTOR: Final = 512
IN, OUT = 0, 1
MESSAGE: Final = MsiMessage(0xFEE0_5000, 0x4055)
FRAME: Final = bytes.fromhex("ffffffffffff 525400000001 88b5") + b"hello"


class Driver(PciGuest):
    """For a function wherever firmware has placed it."""

    def __init__(self, machine: FuzzMachine, function: VirtioPci, gpa: int) -> None:
        self.machine, self.function, self.device = machine, function, function.device
        self.board = machine  # type: ignore[assignment]  # it has the parts that are used
        self.memory, self.gpa, self.size = machine.memory, gpa, 8
        self.queues: list[RingDriver] = []
        self.regions: dict[int, tuple[int, int]] = {}
        self.config = config_of(machine, function)
        self.find_regions()
        self.move_bar(self.config.read(0x10, 8) & ~0xF)
        self.config.enable()
        self.start()

    def ask(self, index: int, readable: list[bytes], writable: list[int]) -> bytes:
        """One request, to its end; what it filled."""
        ring = self.queues[index]
        head = ring.offer(readable, writable)
        self.notify_device(index)
        done: dict[int, int] = {}
        self.machine_until(lambda: done.update(ring.used()) or head in done)
        return ring.content(head)[: done[head] or None]

    def notify_device(self, index: int) -> None:
        if self.queues[index].needs_kick():
            self.ring(index)

    def machine_until(self, done: Callable[[], object]) -> None:
        until(self.machine, done, f"{self.device.name}: {self.device.info()}")


def config_of(machine: FuzzMachine, function: PciFunction[Any]) -> Accesses:
    """Its configuration space, by the numbers programmed now."""
    bus, device, number = next(place for *place, found in machine.root.functions() if found is function)
    return Accesses(machine, bus, device, number)  # type: ignore[arg-type]  # only its buses are used


def until(machine: FuzzMachine, done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + BOUND
    while not done():
        assert time.monotonic() < deadline, f"never done: {what}"
        settle(machine.io, 1)


def everything_works(machine: FuzzMachine) -> None:
    """After a reset, running. Raises AssertionError."""
    machine.far.room_left = machine.screen.room_left = None
    drivers = [Driver(machine, function, RINGS + n * RINGS_SIZE) for n, function in enumerate(machine.virtio)]
    net, console, blk, rng = drivers
    assert len(rng.ask(0, [], [64])) == 64
    _disk_works(blk)
    _console_works(machine, console)
    _network_works(machine, net)
    _card_works(machine)
    _nic_works(machine)
    machine.com1.write(0, 1, 0x4B)
    assert machine.screen.text.endswith(b"K")
    assert [function.device.broken for function in machine.virtio] == [None] * 4


def _nic_works(machine: FuzzMachine) -> None:
    """The guest reaches the host's device, and the device the guest."""
    config = config_of(machine, machine.nic)
    config.enable()
    registers, table = machine.nic.bars[0].address, machine.nic.bars[2].address
    assert registers is not None
    assert table is not None
    machine.mmio.write(registers + 0x40, 4, 0xCAFE)
    assert machine.host_nic.peek(0, 0x40, 4) == 0xCAFE
    config.write(config.capability(0x11) + 2, 2, 0x8000)
    machine.mmio.write(table + 0x10, 8, MESSAGE.address)
    machine.mmio.write(table + 0x18, 8, MESSAGE.data)
    machine.sink.take()
    machine.host_nic.signal(MSIX, 1)
    assert MESSAGE in machine.sink.take()


def _disk_works(blk: Driver) -> None:
    data = bytes(range(256)) * 2
    for queue in range(2):
        sector = 7 + queue
        assert blk.ask(queue, [struct.pack("<IIQ", OUT, 0, sector), data], [1]) == b"\0"
        assert blk.ask(queue, [struct.pack("<IIQ", IN, 0, sector)], [SECTOR, 1]) == data + b"\0"


def _console_works(machine: FuzzMachine, console: Driver) -> None:
    console.ask(1, [b"out we go"], [])
    assert machine.far.text.endswith(b"out we go")
    ring = console.queues[0]
    head = ring.offer(writable=[64])
    console.notify_device(0)
    settle(machine.io)
    assert machine.console.receive(b"and in") == 6
    assert ring.used() == [(head, 6)]


def _network_works(machine: FuzzMachine, net: Driver) -> None:
    machine.net.set_link(up=True)
    machine.tap.sent()
    net.ask(1, [HEADER + FRAME], [])
    assert machine.tap.sent() == [HEADER + FRAME]
    ring, came = net.queues[0], b""

    def receive() -> bool:
        """Frames that came while nobody listened are before ours, and some take many buffers."""
        nonlocal came
        came += b"".join(ring.content(head)[:written] for head, written in ring.used())
        while ring.free:
            ring.offer(writable=[2048])
        net.notify_device(0)
        return FRAME in came

    until(machine, lambda: receive() or _send(machine), "the network takes no frame")
    until(machine, receive, f"net0 receives: {machine.net.info()}")


def _send(machine: FuzzMachine) -> bool:
    try:
        machine.tap.send(FRAME)  # behind whatever waits there
    except BlockingIOError:
        return False
    return True


def _card_works(machine: FuzzMachine) -> None:
    config = config_of(machine, machine.card)
    config.enable()
    memory, ports, prefetchable = (bar.address for bar in machine.card.bars.values())
    assert memory is not None
    assert ports is not None
    assert prefetchable is not None
    assert machine.mmio.read(memory + 0x124, 2) == 0x124
    assert machine.pio.read(ports + 4, 1) == 4
    assert machine.mmio.read(prefetchable + 0x1234, 4) == 0x1234
    assert ports in range(layout.PCI_IO.base, sum(layout.PCI_IO))
