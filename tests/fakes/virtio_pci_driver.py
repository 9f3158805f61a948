"""A virtio-pci driver: finds the device by its capabilities, sets it up by its registers, as Linux does.

    board = Board()
    device = Rng("rng0/virtio-rng", memory, loop)
    guest = PciGuest(board, VirtioPci("rng0", device, board.sink), memory)
    guest.start()
    head = guest.queues[0].offer(writable=[64])
    guest.kick(0)
    assert guest.interrupts() == [1]

The vector of queue n is n + 1, that of the configuration 0. What a vector delivers is its number.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from kvmpy.abi.virtio import NO_VECTOR, Feature, Status, feature_mask
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.memory import GuestMemory
from tests.fakes.loop import poll
from tests.fakes.pci import WINDOWS, Board
from tests.fakes.virtio_driver import RingDriver
from tests.fakes.virtio_rig import ManualLoop

VENDOR: Final = 0x09
MSIX: Final = 0x11
BAR: Final = WINDOWS.mem64.start
MESSAGE: Final = 0xFEE0_0000


class Reg(Enum):
    """Offset and width of each register of the common configuration, copied from the specification."""

    DEVICE_FEATURE_SELECT = (0x00, 4)
    DEVICE_FEATURE = (0x04, 4)
    DRIVER_FEATURE_SELECT = (0x08, 4)
    DRIVER_FEATURE = (0x0C, 4)
    CONFIG_VECTOR = (0x10, 2)
    NUM_QUEUES = (0x12, 2)
    STATUS = (0x14, 1)
    GENERATION = (0x15, 1)
    QUEUE_SELECT = (0x16, 2)
    QUEUE_SIZE = (0x18, 2)
    QUEUE_VECTOR = (0x1A, 2)
    QUEUE_ENABLE = (0x1C, 2)
    QUEUE_NOTIFY_OFF = (0x1E, 2)
    QUEUE_DESC_LOW = (0x20, 4)
    QUEUE_DESC_HIGH = (0x24, 4)
    QUEUE_DRIVER_LOW = (0x28, 4)
    QUEUE_DRIVER_HIGH = (0x2C, 4)
    QUEUE_DEVICE_LOW = (0x30, 4)
    QUEUE_DEVICE_HIGH = (0x34, 4)
    QUEUE_DESC = (0x20, 8)
    QUEUE_DRIVER = (0x28, 8)
    QUEUE_DEVICE = (0x30, 8)


class PciGuest:
    """A driver for the device of ``function``, which it finds at 00:02.0 of ``board``. ``queues`` are its rings."""

    def __init__(
        self, board: Board, function: VirtioPci, memory: GuestMemory, *, gpa: int = 0x1000, size: int = 0
    ) -> None:
        self.board, self.function, self.memory, self.gpa, self.size = board, function, memory, gpa, size
        self.device: VirtioDevice[Any] = function.device
        self.queues: list[RingDriver] = []
        self.broken: list[str] = []
        self.device.on_broken = self.broken.append
        self.config = board.add(function, 2)
        self.regions: dict[int, tuple[int, int]] = {}
        self.find_regions()
        self.move_bar(BAR)
        self.config.enable()
        self.device.resume()

    def find_regions(self) -> None:
        """Follow the chain of capabilities."""
        for kind, at in self.config.capabilities():
            if kind == VENDOR:
                cfg_type = self.config.read(at + 3, 1)
                self.regions[cfg_type] = self.config.read(at + 8, 4), self.config.read(at + 12, 4)
                if cfg_type == 2:
                    self.multiplier = self.config.read(at + 16, 4)
                if cfg_type == 5:
                    self.window = at

    def move_bar(self, address: int) -> None:
        self.config.place(0, address, wide=True)
        self.bar = address
        self.common, self.notify, self.isr, self.device_config = (
            address + self.regions[cfg_type][0] for cfg_type in (1, 2, 3, 4)
        )

    def get(self, reg: Reg) -> int:
        offset, size = reg.value
        return self.board.mmio.read(self.common + offset, size)

    def put(self, reg: Reg, value: int) -> None:
        offset, size = reg.value
        self.board.mmio.write(self.common + offset, size, value)

    def select(self, index: int) -> None:
        self.put(Reg.QUEUE_SELECT, index)

    def offered(self) -> int:
        """The device's features."""
        words = []
        for word in (0, 1):
            self.put(Reg.DEVICE_FEATURE_SELECT, word)
            words.append(self.get(Reg.DEVICE_FEATURE))
        return words[0] | words[1] << 32

    def reset(self) -> None:
        """Reset the device, and wait until it says that it is."""
        self.put(Reg.STATUS, 0)
        poll(lambda: self.get(Reg.STATUS) == 0)

    def negotiate(self, features: int) -> None:
        """Up to FEATURES_OK, whatever comes of it."""
        self.reset()
        self.put(Reg.STATUS, Status.ACKNOWLEDGE)
        self.put(Reg.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        for word in (0, 1):
            self.put(Reg.DRIVER_FEATURE_SELECT, word)
            self.put(Reg.DRIVER_FEATURE, features >> 32 * word & 0xFFFF_FFFF)
        self.put(Reg.STATUS, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)

    def start(
        self, features: int | None = None, enable: set[int] | None = None, *, msix: bool = True, go: bool = True
    ) -> None:
        """Everything, with all features and all queues unless said otherwise."""
        wanted = self.offered() if features is None else features | feature_mask(Feature.VERSION_1)
        self.negotiate(wanted)
        assert self.get(Reg.STATUS) & Status.FEATURES_OK
        if msix:
            self.enable_msix()
            self.put(Reg.CONFIG_VECTOR, 0)
        self.queues, gpa = [], self.gpa
        for index in range(self.get(Reg.NUM_QUEUES)):
            self.select(index)
            ring = RingDriver(
                self.memory,
                gpa,
                self.size or self.get(Reg.QUEUE_SIZE),
                event_idx=bool(wanted >> Feature.EVENT_IDX & 1),
                indirect=bool(wanted >> Feature.INDIRECT_DESC & 1),
            )
            gpa = ring.end
            self.queues.append(ring)
            if enable is None or index in enable:
                self.set_up_queue(ring, index + 1 if msix else NO_VECTOR)
        if go:
            self.go()

    def set_up_queue(self, ring: RingDriver, vector: int) -> None:
        """The selected queue."""
        self.put(Reg.QUEUE_SIZE, ring.size)
        self.put(Reg.QUEUE_VECTOR, vector)
        self.put(Reg.QUEUE_DESC_LOW, ring.desc & 0xFFFF_FFFF)
        self.put(Reg.QUEUE_DESC_HIGH, ring.desc >> 32)
        self.put(Reg.QUEUE_DRIVER, ring.driver)
        self.put(Reg.QUEUE_DEVICE, ring.device)
        self.put(Reg.QUEUE_ENABLE, 1)

    def go(self) -> None:
        """DRIVER_OK."""
        self.put(Reg.STATUS, self.get(Reg.STATUS) | Status.DRIVER_OK)

    def enable_msix(self, *, enabled: bool = True) -> None:
        """Every vector with its own number as its message."""
        msix = self.config.capability(MSIX)
        table = self.bar + (self.config.read(msix + 4, 4) & ~7)
        for vector in range((self.config.read(msix + 2, 2) & 0x7FF) + 1):
            for offset, value in ((0, MESSAGE), (4, 0), (8, vector), (12, 0)):
                self.board.mmio.write(table + 16 * vector + offset, 4, value)
        self.config.write(msix + 2, 2, 0x8000 if enabled else 0)

    def interrupts(self) -> list[int]:
        """Vectors delivered since the last call."""
        return [message.data for message in self.board.sink.take()]

    def intx(self) -> bool:
        """Whether our wire is high."""
        return any(line.level for line in self.board.lines)

    def read_isr(self) -> int:
        return self.board.mmio.read(self.isr, 1)

    def doorbell_address(self, index: int) -> int:
        self.select(index)
        return self.notify + self.multiplier * self.get(Reg.QUEUE_NOTIFY_OFF)

    def ring(self, index: int) -> None:
        """Write to the doorbell: KVM absorbs it where it knows it, else it exits."""
        gpa = self.doorbell_address(index)
        if gpa in self.board.doorbells.events:
            self.board.doorbells.ring(gpa)
        else:
            self.board.mmio.write(gpa, 2, index)

    def kick(self, index: int) -> None:
        """Notify if the device wants that, and let a ManualLoop come to rest."""
        if self.queues[index].needs_kick():
            self.ring(index)
        self.settle()

    def settle(self) -> None:
        if isinstance(self.device.io, ManualLoop):
            self.device.io.run()

    def close(self) -> None:
        self.function.close()
        self.device.close()
