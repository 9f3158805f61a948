"""What a hostile guest does, one thing at a time: mostly right, for what is quite wrong is refused at once.

Each Vcpu has its own dice. It keeps in mind no more than where firmware put things; all else it reads from the rings in
guest memory, which others write too.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kvmpy.abi.virtio import Feature, Status, feature_mask
from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.virtio.net_state import NetFeature
from kvmpy.devices.virtio.pci import COMMON, DEVICE, ISR, MSIX_TABLE, NOTIFY, VirtioPci
from kvmpy.errors import GuestError
from kvmpy.machine import layout
from tests.fakes.vfio import MSIX
from tests.fakes.virtio_driver import INDIRECT, NEXT, WRITE
from tests.fakes.virtio_pci_driver import Reg
from tests.fuzz.machine import HIGH_RAM, LOW_RAM, RAM_IN_WINDOW, WINDOWS, FuzzMachine

SIZES: Final = (1, 2, 3, 4, 5, 6, 7, 8)
RING_SIZE: Final = 16
RINGS: Final = 0x20_0000
QUEUE: Final = 0x2000  # bytes for each queue's rings: table, available, used, indirect tables
TABLE, AVAILABLE, USED, INDIRECTS = 0x0, 0x400, 0x800, 0x1000
BUFFERS: Final = 0x80_0000
FUNCTION_STATUS: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
ALL_STATUS: Final = FUNCTION_STATUS | Status.DRIVER_OK
# How often something is wrong that could be right; a Vcpu has one of them for some time.
CARE: Final = (0.0003, 0.003, 0.03)
EDGES: Final = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1)


class Place(NamedTuple):
    """Where firmware put a function, and the first 64 bytes of its configuration then."""

    function: PciFunction[Any]
    config: int
    header: bytes


class Map:
    """What a guest knows of its machine once firmware has run."""

    def __init__(self, machine: FuzzMachine) -> None:
        self.places = [
            Place(
                function,
                layout.ECAM.base + (bus << 20 | device << 15 | number << 12),
                b"".join(function.config_read(at, 4).to_bytes(4, "little") for at in range(0, 0x40, 4)),
            )
            for bus, device, number, function in machine.root.functions()
        ]
        self.bars = {
            place.function: int.from_bytes(place.header[0x10:0x18], "little") & ~0xF
            for place in self.places
            if isinstance(place.function, VirtioPci)
        }


class Vcpu:
    """One stream of operations on ``machine``."""

    def __init__(self, machine: FuzzMachine, here: Map, seed: int) -> None:
        self.machine, self.map, self.dice = machine, here, random.Random(seed)
        self.last = "nothing"
        self._rings = {
            (function, queue): RINGS + QUEUE * (8 * n + queue)
            for n, function in enumerate(machine.virtio)
            for queue in range(len(function.device.queues))
        }
        self._queues = list(self._rings)
        self._slips = 0.0

    def run(self, count: int) -> None:
        """So many operations, all with the same care, on a bus that has been put in order before."""
        self._slips = self.dice.choice(CARE)
        for place in self.map.places:
            self.program(place)
        for function in self.machine.virtio:
            if self.dice.random() < 0.4 or not function.device.running:
                self.set_up(function)
        rude = self._slips * 60  # times as often as the others
        table: list[tuple[Callable[[], object], float]] = [
            (self.offer, 60),
            (self.kick, 10),
            (self.pio, 8),
            (self.mmio, 8 * rude),
            (self.config, 8 * rude),
            (self.config_ports, 4 * rude),
            (self.look_around, 8),
            (self.common, 8 * rude),
            (self.set_up, 1 + rude),
            (self.restore, 1 + rude),
            (self.move_bar, 1 + 2 * rude),
            (self.switch_port, 0.1 + rude),
            (self.msix, 6),
            (self.device_config, 4),
            (self.stop, 0.3 + rude),
            (self.scribble, 4 * rude),
            (self.control_command, 6),
            (self.network, 16),
            (self.passed_through, 10),
            (self.keyboard, 4),
            (self.look, 2),
        ]
        operations, weights = zip(*table, strict=True)
        for operation in self.dice.choices(operations, weights, k=count):
            self.last = operation.__name__
            operation()

    def slip(self) -> bool:
        return self.dice.random() < self._slips

    # Numbers

    def number(self, size: int) -> int:
        """Small, one bit, an edge, or any, of ``size`` bytes."""
        dice, mask = self.dice, (1 << 8 * size) - 1
        match dice.randrange(5):
            case 0 | 1:
                return dice.randrange(0x40) & mask
            case 2:
                return 1 << dice.randrange(8 * size)
            case 3:
                return dice.choice(EDGES) & mask
            case _:
                return dice.getrandbits(8 * size)

    def address(self) -> int:
        """Of RAM, or of its ends, or of none."""
        dice = self.dice
        if self.slip():
            return dice.choice(
                (
                    LOW_RAM - dice.choice((1, 2, 15, 16, 4096)),
                    layout.HIGH_RAM + HIGH_RAM - dice.randrange(64),
                    dice.choice(list(self._rings.values())) + dice.randrange(QUEUE),
                    dice.choice((LOW_RAM, layout.ECAM.base, WINDOWS.mem64.start, (1 << 64) - 8)),
                    dice.getrandbits(64),
                )
            )
        if dice.random() < 0.1:
            return layout.HIGH_RAM + dice.randrange(HIGH_RAM - 0x1_0000)
        return BUFFERS + dice.randrange(LOW_RAM - BUFFERS - 0x1_0000)

    def length(self) -> int:
        dice = self.dice
        if self.slip():
            return dice.choice((0, 0x1_0000, 0x40_0000, 0xFFFF_FFFF))
        return dice.choice((dice.randrange(1, 64), dice.randrange(1, 2048), 512 * dice.randrange(1, 9), 0x1_0000))

    def write(self, gpa: int, data: bytes) -> None:
        """To the guest's own memory, where it is some."""
        with contextlib.suppress(GuestError):
            self.machine.memory.write(gpa, data)

    def access(self, gpa: int, size: int, value: int | None = None) -> None:
        if value is None and self.dice.random() < 0.4:
            got = self.machine.mmio.read(gpa, size)
            assert 0 <= got < 1 << 8 * size, f"{gpa:#x} gave {got:#x}"
        else:
            self.machine.write(gpa, size, self.number(size) if value is None else value)

    # Any register

    def pio(self) -> None:
        dice, bus = self.dice, self.machine.pio
        window = dice.choice(bus.windows)
        port = max(window.base + dice.randrange(-2, min(window.size, 32) + 2), 0)
        size = dice.choice((1, 1, 2, 4))
        if dice.random() < 0.5:
            value = bus.read(port, size)
            assert 0 <= value < 1 << 8 * size, f"port {port:#x} gave {value:#x}"
        else:
            bus.write(port, size, self.number(size))

    def mmio(self) -> None:
        dice = self.dice
        window = dice.choice(self.machine.mmio.windows)
        offset = dice.choice((dice.randrange(-8, 64), dice.randrange(window.size), window.size - dice.randrange(12)))
        self.access(max(window.base + offset, 0), dice.choice(SIZES))

    def config(self) -> None:
        """Of some function, mostly in a register that there is; of any width and alignment."""
        dice = self.dice
        place = dice.choice(self.map.places)
        offset = dice.choice((dice.randrange(0x40), dice.randrange(0x40, 0x100), dice.randrange(0x1000)))
        self.access(place.config + offset, dice.choice(SIZES))

    def config_ports(self) -> None:
        dice, pio = self.dice, self.machine.pio
        place = dice.choice(self.map.places)
        number = place.config - layout.ECAM.base
        pio.write(0xCF8, 4, 0x8000_0000 | number >> 4 & 0xFF_FF00 | dice.randrange(0, 0x100, 4))
        port, size = 0xCFC + dice.randrange(4), dice.choice((1, 2, 4))
        if dice.random() < 0.5:
            pio.read(port, size)
        else:
            pio.write(port, size, self.number(size))

    # What an operating system does to a bus

    def restore(self) -> None:
        """Put a function back, and every port, as firmware had them."""
        for place in self.map.places:
            if isinstance(place.function, RootPort):
                self.program(place)
        self.program(self.dice.choice(self.map.places))

    def program(self, place: Place) -> None:
        if isinstance(place.function, RootPort):
            for register, _, on in self.switches(place):
                self.machine.mmio.write(register, 2, on)
        for at in range(0x10, 0x34, 4):
            self.machine.mmio.write(place.config + at, 4, int.from_bytes(place.header[at : at + 4], "little"))
        self.machine.mmio.write(place.config + 4, 2, self.dice.choice((0x6, 0x403, 0x3)) if self.slip() else 0x7)

    def look_around(self) -> None:
        """Configuration space and a BAR, by reads alone, as a driver does."""
        dice, machine = self.dice, self.machine
        machine.mmio.read(dice.choice(self.map.places).config + dice.randrange(0x104), dice.choice(SIZES))
        machine.mmio.read(self.bar_of(dice.choice(machine.virtio)) + dice.randrange(0x8000), dice.choice(SIZES))

    def move_bar(self) -> None:
        """Over RAM, over another, beside its window, or somewhere that is allowed."""
        dice, machine = self.dice, self.machine
        place = dice.choice([place for place in self.map.places if place.function.bars])
        index, bar = dice.choice(list(place.function.bars.items()))
        others = [other.address for other in machine.bars if other.address is not None] or [0]
        window = dice.choice(WINDOWS)
        to = dice.choice(
            (
                dice.choice((0, BUFFERS, layout.HIGH_RAM)),
                RAM_IN_WINDOW + dice.choice((0, 0x1000, -0x1000)),
                dice.choice(others),
                window.start + dice.randrange(0, 0x10_0000, 0x1000),
                window.stop - bar.size,
                window.stop - 16,
                layout.ECAM.base,
                self.number(8),
            )
        )
        for half in range(bar.kind.registers):
            machine.mmio.write(place.config + 0x10 + 4 * (index + half), 4, to >> 32 * half & 0xFFFF_FFFF)

    def switch_port(self) -> None:
        """A link or a slot off, and perhaps on again."""
        dice, machine = self.dice, self.machine
        place = dice.choice([place for place in self.map.places if isinstance(place.function, RootPort)])
        register, off, on = dice.choice(self.switches(place))
        machine.mmio.write(register, 2, off)
        if not self.slip():
            machine.mmio.write(register, 2, on)

    def switches(self, place: Place) -> list[tuple[int, int, int]]:
        """What decides about a port's link, slot control first: the register, and its values for off and on."""
        assert place.function.express is not None
        express = place.config + place.function.express.offset
        return [(express + 0x18, 0x7C0, 0x1C0), (express + 0x10, 0x10, 0), (place.config + 0x3E, 0x40, 0)]

    # A virtio driver

    def bar_of(self, function: VirtioPci) -> int:
        """Where it is, if anywhere, else where it was."""
        return function.bars[0].address or self.map.bars[function]

    def common(self) -> None:
        """A register of the common configuration, of its own width, or nearly."""
        dice = self.dice
        function = dice.choice(self.machine.virtio)
        reg = dice.choice(list(Reg))
        offset, size = reg.value
        if dice.random() < 0.1:
            offset, size = offset + dice.randrange(4), dice.choice(SIZES)
        value: int | None = None
        match reg:
            case Reg.QUEUE_SELECT:
                value = dice.randrange(8)
            case Reg.QUEUE_SIZE:
                value = dice.choice((RING_SIZE, 8, 1, 3, 1024))
            case Reg.STATUS if dice.random() < 0.8:
                value = dice.choice((ALL_STATUS, FUNCTION_STATUS, Status.ACKNOWLEDGE))
            case Reg.QUEUE_DESC | Reg.QUEUE_DRIVER | Reg.QUEUE_DEVICE if dice.random() < 0.7:
                value = self.address()
        self.access(
            self.bar_of(function) + COMMON + offset, size, None if value is None else value & (1 << 8 * size) - 1
        )

    def set_up(self, function: VirtioPci | None = None) -> None:
        """All that a driver does until a device is live, with a slip here and there."""
        dice, machine = self.dice, self.machine
        if function is None:
            function = dice.choice(machine.virtio)
        common = self.bar_of(function) + COMMON

        def put(reg: Reg, value: int) -> None:
            offset, size = reg.value
            machine.write(common + offset, size, value & (1 << 8 * size) - 1)

        features = function.device.features
        if dice.random() < 0.5:
            features &= dice.getrandbits(64) | feature_mask(Feature.VERSION_1)
        for status in (0, Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
            put(Reg.STATUS, status)
        for word in (0, 1):
            put(Reg.DRIVER_FEATURE_SELECT, word)
            put(Reg.DRIVER_FEATURE, features >> 32 * word)
        put(Reg.STATUS, FUNCTION_STATUS)
        for queue in range(len(function.device.queues)):
            base = self._rings[function, queue]
            put(Reg.QUEUE_SELECT, queue)
            put(Reg.QUEUE_SIZE, RING_SIZE)
            put(Reg.QUEUE_VECTOR, dice.choice((queue + 1, queue + 1, 0, 0xFFFF, 99)))
            put(Reg.QUEUE_DESC, self.address() if self.slip() else base + TABLE)
            put(Reg.QUEUE_DRIVER, base + AVAILABLE)
            put(Reg.QUEUE_DEVICE, self.address() if self.slip() else base + USED)
            self.write(base + AVAILABLE, bytes(INDIRECTS - AVAILABLE))
            if not self.slip():
                put(Reg.QUEUE_ENABLE, 1)
        put(Reg.STATUS, ALL_STATUS)

    def offer(self) -> None:
        """A chain in some queue, nearly always a possible one, and often the driver tells of it."""
        dice, memory = self.dice, self.machine.memory
        key = dice.choice(self._queues)
        function, queue = key
        base = self._rings[key]
        avail, used = (int.from_bytes(memory.read(base + ring + 2, 2), "little") for ring in (AVAILABLE, USED))
        if (avail - used) & 0xFFFF >= 4 and not self.slip():
            self.notify(function, queue)
            return
        parts = self.chain(function, queue)
        head = 4 * (avail % 4)
        if dice.random() < 0.4 and (function.device.acked(Feature.INDIRECT_DESC) or self.slip()):
            table = base + INDIRECTS + 0x100 * (avail % 4)
            self.put_chain(table, 0, parts)
            self.put_chain(base + TABLE, head, [(table, 16 * len(parts), INDIRECT)])
        else:
            self.put_chain(base + TABLE, head, parts[:4])
        if self.slip():
            self.spoil(base + dice.choice((TABLE, INDIRECTS + 0x100 * (avail % 4))) + 16 * (head + dice.randrange(4)))
        entry = self.number(2) if self.slip() else head
        self.write(base + AVAILABLE + 4 + 2 * (avail % RING_SIZE), entry.to_bytes(2, "little"))
        step = self.number(2) if self.slip() else 1
        self.write(base + AVAILABLE + 2, ((avail + step) & 0xFFFF).to_bytes(2, "little"))
        if dice.random() < 0.5:
            self.notify(function, queue)

    def put_chain(self, table: int, first: int, parts: list[tuple[int, int, int]]) -> None:
        for step, (gpa, size, flags) in enumerate(parts):
            more = step + 1 < len(parts)
            entry = struct.pack("<QIHH", gpa, size, flags | (NEXT if more else 0), first + step + 1 if more else 0)
            self.write(table + 16 * (first + step), entry)

    def spoil(self, descriptor: int) -> None:
        """Make it lead back, or aside, or anything."""
        dice = self.dice
        flags = dice.choice((NEXT, NEXT, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, WRITE, 0, dice.getrandbits(16)))
        following = dice.randrange(RING_SIZE + 1) if dice.random() < 0.9 else self.number(2)
        size = 16 * dice.randrange(1, 5) if dice.random() < 0.5 else self.length()
        self.write(descriptor, struct.pack("<QIHH", self.address(), size, flags, following))

    def chain(self, function: VirtioPci, queue: int) -> list[tuple[int, int, int]]:
        """(address, length, flags) of the buffers of a request as its device knows them."""
        dice, machine = self.dice, self.machine
        header, body = self.address(), self.address()
        device = function.device
        if device is machine.blk:
            kind = dice.choice((0, 0, 1, 1, 4, 8, 11, 13, 99))
            self.write(header, struct.pack("<IIQ", kind, 0, dice.choice((dice.randrange(64), 8191, self.number(8)))))
            if kind in (11, 13):
                self.write(body, struct.pack("<QII", dice.randrange(64), dice.randrange(64), dice.randrange(2)))
            size = 16 if kind in (11, 13) else self.length()
            flags = WRITE if kind in (0, 8) else 0
            return [(header, 16, 0), (body, size, flags), (self.address(), 1, WRITE)]
        if device is machine.net and queue == len(device.queues) - 1:
            return self.command(header, body)
        writable = device is machine.rng or not queue % 2
        if device is machine.net and not writable:
            self.write(header, bytes(12))
            return [(header, 12, 0), (body, self.length(), 0)]
        return [(self.address(), self.length(), WRITE if writable else 0) for _ in range(dice.randrange(1, 4))]

    def command(self, header: int, body: int) -> list[tuple[int, int, int]]:
        """Of the network device's control queue."""
        dice = self.dice
        self.write(header, bytes((dice.randrange(6), dice.randrange(6))))
        data = dice.choice(
            (bytes((dice.randrange(2),)), dice.randbytes(2), bytes((dice.randrange(4), 0)), dice.randbytes(6))
        )
        if dice.random() < 0.3:
            data = struct.pack("<I6sI6s", dice.choice((1, self.number(4))), dice.randbytes(6), 1, dice.randbytes(6))
        self.write(body, data)
        return [(header, 2, 0), (body, len(data), 0), (self.address(), 1, WRITE)]

    def control_command(self) -> None:
        """More often than chance would: few of them change much."""
        function = self.machine.virtio[0]
        if not function.device.acked(NetFeature.CTRL_VQ):
            return
        base = self._rings[function, len(function.device.queues) - 1]
        avail = int.from_bytes(self.machine.memory.read(base + AVAILABLE + 2, 2), "little")
        self.put_chain(base + TABLE, head := 4 * (avail % 4), self.command(self.address(), self.address()))
        self.write(base + AVAILABLE + 4 + 2 * (avail % RING_SIZE), head.to_bytes(2, "little"))
        self.write(base + AVAILABLE + 2, ((avail + 1) & 0xFFFF).to_bytes(2, "little"))
        self.notify(function, len(function.device.queues) - 1)

    def kick(self) -> None:
        function, queue = self.dice.choice(self._queues)
        self.notify(function, queue)

    def notify(self, function: VirtioPci, queue: int) -> None:
        dice = self.dice
        at = dice.randrange(0x1000) if self.slip() else 4 * queue
        self.machine.write(self.bar_of(function) + NOTIFY + at, dice.choice((2, 2, 4, 1)), queue)

    def msix(self) -> None:
        """An entry of the table, or whether it is used at all."""
        dice = self.dice
        function = dice.choice(self.machine.virtio)
        if dice.random() < 0.3:
            place = next(place for place in self.map.places if place.function is function)
            at = next(capability.offset for capability in function.config.capabilities if capability.id == 0x11)
            self.machine.mmio.write(place.config + at + 2, 2, dice.choice((0x8000, 0x8000, 0, 0xC000)))
            return
        offset = dice.choice((0, 4, 8, 12, 12)) + 16 * dice.randrange(6)
        value = dice.choice((0, 1, 0xFEE0_0000, self.number(4)))
        self.access(self.bar_of(function) + MSIX_TABLE + offset, 4, value)

    def device_config(self) -> None:
        function = self.dice.choice(self.machine.virtio)
        where = self.dice.choice((DEVICE, DEVICE, ISR))
        self.access(self.bar_of(function) + where + self.dice.randrange(0x40), self.dice.choice(SIZES))

    def stop(self) -> None:
        """Reset a device, or give it up."""
        dice = self.dice
        status = self.bar_of(dice.choice(self.machine.virtio)) + COMMON + Reg.STATUS.value[0]
        self.machine.write(status, 1, dice.choice((0, 0, 0, Status.FAILED, Status.NEEDS_RESET)))

    def scribble(self) -> None:
        """What the device looks at while it does."""
        base = self.dice.choice(list(self._rings.values()))
        where = self.dice.choice((TABLE, AVAILABLE, USED, INDIRECTS))
        self.write(base + where + self.dice.randrange(0x60), self.number(2).to_bytes(2, "little"))

    # The world outside

    def network(self) -> None:
        """Frames come, and those the guest sent are taken; seldom the cable is pulled."""
        dice, machine = self.dice, self.machine
        queue = dice.randrange(2)
        match dice.randrange(20):
            case 0:
                machine.net.set_link(up=dice.random() < 0.8)
            case 1:
                machine.net.announce()
            case 2 | 3 | 4 | 5:
                machine.tap.sent(queue)
            case _:
                with contextlib.suppress(BlockingIOError):
                    machine.tap.send(dice.randbytes(dice.choice((14, 60, 1514, 9000, 60_000))), queue)

    def passed_through(self) -> None:
        """The host's NIC: its driver enables its interrupts and uses its registers; it interrupts."""
        dice, machine = self.dice, self.machine
        place = next(place for place in self.map.places if place.function is machine.nic)
        match dice.randrange(4):
            case 0:
                kind = dice.choice((0x11, 0x11, 0x05, 0x01))
                at = next(each.offset for each in machine.nic.config.capabilities if each.id == kind)
                value = dice.choice((0, 1, 0x8000, 0xC000, self.number(2)))
                machine.mmio.write(place.config + at + (4 if kind == 0x01 else 2), 2, value)
            case 1:
                with machine.nic.lock:  # or the other vCPU may just be closing it
                    for index, triggers in machine.host_nic.triggers.items():
                        if index <= MSIX:
                            os.eventfd_write(dice.choice(triggers), 1)
            case _:
                bar = dice.choice(list(machine.nic.bars.values()))
                address = bar.address  # which the other vCPU may just be changing
                if bar.kind is not BarKind.IO and address is not None:
                    self.access(address + dice.randrange(bar.size), dice.choice(SIZES))

    def keyboard(self) -> None:
        """Somebody types, or reads more slowly than the guest writes."""
        dice, machine = self.dice, self.machine
        far, device = dice.choice(((machine.far, machine.console), (machine.screen, machine.com1)))
        if dice.random() < 0.5:
            device.receive(dice.randbytes(dice.randrange(1, 200)))
        else:
            far.room_left = dice.choice((None, 0, 10, 5000))
            device.drained()

    def look(self) -> None:
        """An operator asks."""
        device = self.dice.choice(self.machine.devices)
        device.info()
        if self.dice.random() < 0.1:
            self.machine.acpi_pm.press_power_button()
