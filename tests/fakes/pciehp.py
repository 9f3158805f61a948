"""Linux's pciehp, as far as it reads and writes a slot: the sequences of drivers/pci/hotplug, with its waits.

The guest's time is a `Clock`'s. An interrupt is a message of the port's; `run` lets the driver serve what has come.
What it does to cards is in ``cards``; ``log`` has every write of slot control.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import Enum
from typing import Final

from kvmpy.devices.pci.express import Slot, SlotControl, SlotStatus
from tests.fakes.pci import Accesses, Board

CONTROL, STATUS, CAPABILITY, LINK_CONTROL, LINK_STATUS = 0x18, 0x1A, 0x14, 0x10, 0x12
EVENTS: Final = SlotStatus.BUTTON | SlotStatus.FAULT | SlotStatus.PRESENCE_CHANGED | SlotStatus.LINK_CHANGED
WIPE: Final = 0x011F
LINK_UP: Final = 0x2000
ON, BLINK, OFF = SlotControl.POWER_INDICATOR_ON, 0x0200, SlotControl.POWER_INDICATOR_OFF
BUTTON_WAIT: Final = 5.0
PROBE: Final = 0.12  # 20 ms, then 100 ms once the link is up
POWER_WAIT: Final = 1.0


class State(Enum):
    OFF = "off"
    ON = "on"
    BLINKING_ON = "blinking on"
    BLINKING_OFF = "blinking off"


class Pciehp:
    """The driver of one port. ``works``: a card can be used; ``delay`` is what its driver takes to let it go."""

    def __init__(self, board: Board, above: Accesses, bus: int, *, by_message: bool = True) -> None:
        self._board, self._above, self._bus, self._by_message = board, above, bus, by_message
        self._express = above.capability(0x10)
        self.works = True
        self.delay = 0.1
        self.state = State.OFF
        self.found = False  # the card's driver is bound
        self.log: list[int] = []
        self.cards: list[str] = []
        self._pending = 0
        self._task: Iterator[float] | None = None  # the thread, waiting for its time
        self._wake = 0.0
        self._button_due: float | None = None
        self._bound = False

    # Registers

    def read(self, register: int, size: int = 2) -> int:
        return self._above.read(self._express + register, size)

    def write(self, register: int, value: int) -> None:
        self._above.write(self._express + register, 2, value)

    def command(self, mask: int, value: int) -> None:
        control = self.read(CONTROL) & ~mask | value
        self.log.append(control)
        self.write(CONTROL, control)

    @property
    def has_power_controller(self) -> bool:
        return bool(self.read(CAPABILITY, 4) & Slot.POWER_CONTROLLER)

    @property
    def occupied(self) -> bool:
        return bool(self.read(STATUS) & SlotStatus.PRESENT or self.read(LINK_STATUS) & LINK_UP)

    def sees_card(self) -> bool:
        return self._board.config(self._bus, 0).read(0, 2) != 0xFFFF

    # What the kernel does

    def scan(self) -> None:
        """The boot's scan of the bus, before the driver is there."""
        self.found = self.sees_card()
        self.state = State.ON if self.found else State.OFF

    def bind(self) -> None:
        """pcie_init and pcie_init_notification, 3.3."""
        self.write(STATUS, WIPE)
        powered = not self.read(CONTROL) & SlotControl.POWER_OFF
        if self.has_power_controller and powered and not self.occupied:
            self.command(SlotControl.POWER_OFF, SlotControl.POWER_OFF)
        if self._by_message:
            at = self._above.capability(0x05)
            self._above.write(at + 4, 8, 0xFEE0_1000)
            self._above.write(at + 0x0C, 2, 0x41)
            self._above.write(at + 2, 2, self._above.read(at + 2, 2) | 1)
        self._bound = True
        self.command(0, SlotControl.LINK_ENABLE | SlotControl.INTERRUPT_ENABLE | SlotControl.BUTTON_ENABLE | 0x10)
        if self.occupied != (self.state in (State.ON, State.BLINKING_OFF)):
            self._pending |= SlotStatus.PRESENCE_CHANGED
        self.run()

    def run(self) -> None:
        """Serve the interrupts that have come, and go on with whatever is due."""
        if not self._bound:
            return
        for _ in itertools.repeat(None, 200):
            self._isr()
            now = self._board.clock.utc()
            if self._task is not None:
                if self._wake > now:
                    return
                self._step()
            elif self._pending or (self._button_due is not None and self._button_due <= now):
                self._task, self._wake = self._thread(), now
            else:
                return
        raise AssertionError("the driver is never done")

    def pass_(self, seconds: float) -> None:
        """Time passes, the driver does what it does at its time."""
        end = self._board.clock.utc() + seconds
        self.run()
        while (due := self._next_due()) is not None and due <= end:
            self._board.clock.pass_(max(due - self._board.clock.utc(), 0.0) + 1e-6)
            self.run()
        self._board.clock.pass_(max(end - self._board.clock.utc(), 0.0))
        self.run()

    def write_power(self, *, on: bool) -> None:
        """A root user in the guest writes slots/N/power, while the driver is idle."""
        assert self._task is None
        self._button_due = None
        self._task, self._wake = (self._enable() if on else self._disable()), self._board.clock.utc()
        self.run()

    @property
    def idle(self) -> bool:
        return self._task is None and self._button_due is None

    def _next_due(self) -> float | None:
        times = [due for timer in self._board.clock.timers if timer.due is not None for due in [timer.due / 1e9]]
        if self._task is not None:
            times.append(self._wake)
        elif self._button_due is not None:
            times.append(self._button_due)
        return min(times, default=None)

    def _isr(self) -> None:
        """pciehp_isr: a message, or the line's level, then a loop until no event is left."""
        if self._by_message and not self._board.sink.take():
            return
        if not self.read(CONTROL) & SlotControl.INTERRUPT_ENABLE:
            return
        while events := self.read(STATUS) & EVENTS:
            self.write(STATUS, events)
            self._pending |= events

    def _step(self) -> None:
        assert self._task is not None
        try:
            self._wake = self._board.clock.utc() + next(self._task)
        except StopIteration:
            self._task = None

    def _thread(self) -> Iterator[float]:
        """pciehp_ist."""
        if self._button_due is not None and self._button_due <= self._board.clock.utc() and not self._pending:
            self._button_due = None
            if self.state is State.BLINKING_OFF:
                yield from self._disable()
            elif self.state is State.BLINKING_ON:
                yield from self._changed()
            return
        events, self._pending = self._pending, 0
        if events & SlotStatus.BUTTON:
            self._button()
        if events & (SlotStatus.PRESENCE_CHANGED | SlotStatus.LINK_CHANGED):
            yield from self._changed()

    def _button(self) -> None:
        match self.state:
            case State.ON:
                self.state = State.BLINKING_OFF
            case State.OFF:
                self.state = State.BLINKING_ON
            case State.BLINKING_OFF | State.BLINKING_ON:
                was_on = self.state is State.BLINKING_OFF
                self.state = State.ON if was_on else State.OFF
                self._button_due = None
                self._indicate(ON if was_on else OFF)
                self.cards.append("cancelled")
                return
        self._indicate(BLINK)
        self._button_due = self._board.clock.utc() + BUTTON_WAIT

    def _changed(self) -> Iterator[float]:
        """pciehp_handle_presence_or_link_change."""
        self._button_due = None
        if self.state in (State.ON, State.BLINKING_OFF):
            self.cards.append("surprise")
            yield from self._disable()
        if self.occupied:
            yield from self._enable()
        elif self.state is State.BLINKING_ON:
            self.state = State.OFF
            self._indicate(OFF)

    def _indicate(self, value: int, attention: int | None = None) -> None:
        mask, bits = int(SlotControl.POWER_INDICATOR), value
        if attention is not None:
            mask, bits = mask | SlotControl.ATTENTION, bits | attention
        self.command(mask, bits)

    def _enable(self) -> Iterator[float]:
        """board_added."""
        if not self.occupied:
            return
        if self.has_power_controller:
            if not self.read(CONTROL) & SlotControl.POWER_OFF:
                self.state = State.ON
                return
            self.command(SlotControl.POWER_OFF, 0)
            self.write(LINK_CONTROL, self.read(LINK_CONTROL) & ~0x10)
        self._indicate(BLINK)
        yield PROBE
        self._isr()
        self._pending &= ~(SlotStatus.LINK_CHANGED | SlotStatus.PRESENCE_CHANGED)
        if self.read(LINK_STATUS) & LINK_UP and self.sees_card() and self.works:
            yield self.delay
            self.found, self.state = True, State.ON
            self.cards.append("on")
            self._indicate(ON, SlotControl.ATTENTION_OFF)
            return
        yield from self._turn_power_off()
        self.cards.append("failed")
        self.state = State.OFF
        self._indicate(OFF, SlotControl.ATTENTION_ON)

    def _disable(self) -> Iterator[float]:
        """remove_board."""
        if self.has_power_controller and self.read(CONTROL) & SlotControl.POWER_OFF:
            return
        yield self.delay
        self.found = False
        yield from self._turn_power_off()
        self.cards.append("off")
        self.state = State.OFF
        self._indicate(OFF)

    def _turn_power_off(self) -> Iterator[float]:
        if self.has_power_controller:
            self.command(SlotControl.POWER_OFF, SlotControl.POWER_OFF)
            yield POWER_WAIT
            self._isr()
            self._pending &= ~(SlotStatus.LINK_CHANGED | SlotStatus.PRESENCE_CHANGED)
