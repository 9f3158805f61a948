"""The guest's side of one root port of a whole machine: a pciehp that takes no time, with a virtio driver behind it.

It polls: the vCPU of such a machine does something else. `serve` does what the port's events ask for.
"""

from __future__ import annotations

from typing import Any, Final

from kvmpy.bus import Bus
from kvmpy.devices.pci.express import SlotControl, SlotStatus
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.memory import GuestMemory
from tests.fakes.pci import Accesses
from tests.fakes.virtio_driver import RingDriver
from tests.fakes.virtio_pci_driver import PciGuest

CONTROL, STATUS = 0x18, 0x1A
EVENTS: Final = 0x0109
ON, BLINK, OFF = 0x0100, 0x0200, 0x0300
RINGS: Final = 0x40_0000
RINGS_SIZE: Final = 0x20_0000


class MachineBus:
    """What `Accesses` and `PciGuest` use of a board."""

    def __init__(self, mmio: Bus) -> None:
        self.mmio = mmio


class CardDriver(PciGuest):
    """The driver of a virtio function behind a port, its BAR placed in the port's window."""

    def __init__(self, bus: MachineBus, memory: GuestMemory, function: VirtioPci, config: Accesses, gpa: int) -> None:
        self.function, self.device = function, function.device
        self.board = bus  # type: ignore[assignment]  # it has the parts that are used
        self.memory, self.gpa, self.size = memory, gpa, 8
        self.queues: list[RingDriver] = []
        self.regions: dict[int, tuple[int, int]] = {}
        self.config = config
        self.find_regions()

    def begin(self, window: range) -> None:
        self.move_bar(window.start)
        self.config.enable()
        self.start()

    def submit(self, index: int, readable: list[bytes], writable: list[int]) -> int:
        head = self.queues[index].offer(readable, writable)
        if self.queues[index].needs_kick():
            self.ring_by_bus(index)
        return head

    def ring_by_bus(self, index: int) -> None:
        self.board.mmio.write(self.doorbell_address(index), 2, index)


class HotplugGuest:
    """``driver`` while there is a card that it uses."""

    def __init__(self, mmio: Bus, memory: GuestMemory, port: RootPort, number: int) -> None:
        """``number`` is the port's device number on bus 0, and chooses where its drivers have their rings."""
        self.bus, self.memory, self.port, self._rings = MachineBus(mmio), memory, port, RINGS + number * RINGS_SIZE
        self.above = Accesses(self.bus, 0, number)  # type: ignore[arg-type]  # only its bus is used
        self.express = self.above.capability(0x10)
        self.driver: CardDriver | None = None
        self.obeys = True
        self.works = True

    def bind(self) -> None:
        self.above.write(self.express + CONTROL, 2, self._control() | 0x1021)

    def serve(self) -> None:
        """Do all that is to be done."""
        while events := self.above.read(self.express + STATUS, 2) & EVENTS:
            self.above.write(self.express + STATUS, 2, events)
            if events & SlotStatus.BUTTON and self.obeys:
                self.let_go()
            if events & (SlotStatus.PRESENCE_CHANGED | SlotStatus.LINK_CHANGED):
                self._look()

    def let_go(self) -> None:
        """As `echo 0 > slots/N/power`."""
        self._indicate(BLINK)
        if self.driver is not None:
            self.driver.reset()
            self.driver = None
        self._write(self._control() | SlotControl.POWER_OFF)
        self._indicate(OFF)

    def refuse(self) -> None:
        """Begin, and think better of it."""
        self._indicate(BLINK)
        self._indicate(ON)

    def _look(self) -> None:
        present = self.above.read(self.express + STATUS, 2) & SlotStatus.PRESENT
        if not present:
            self.driver = None
        elif self.driver is None:
            self._write(self._control() & ~SlotControl.POWER_OFF)
            self._indicate(BLINK)
            if self.works:
                self._begin()
            else:
                self._write(self._control() & ~0xC0 | 0x40 | SlotControl.POWER_OFF | OFF)

    def _begin(self) -> None:
        function: Any = self.port.behind
        assert isinstance(function, VirtioPci)
        config = Accesses(self.bus, self.port.header.secondary, 0)  # type: ignore[arg-type]
        assert config.read(0, 2) == 0x1AF4
        self.driver = CardDriver(self.bus, self.memory, function, config, self._rings)
        self.driver.begin(self.port.header.prefetchable)
        self._indicate(ON)

    def _control(self) -> int:
        return self.above.read(self.express + CONTROL, 2)

    def _write(self, control: int) -> None:
        self.above.write(self.express + CONTROL, 2, control)

    def _indicate(self, value: int) -> None:
        self._write(self._control() & ~0x300 | value)
