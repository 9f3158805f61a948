"""A root port: the bridge to one hot-pluggable slot, and the way in and out of that.

PCI Express Base 5.0, section 6.7 (hot-plug); `port_registers` has the registers. What is pending at the slot, and when,
is `slot.Slot`'s business; here is what is done then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvmpy.devices.base import Closable
from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.express import SLOT_EMPTY, SLOT_OCCUPIED, Link, SlotControl, SlotStatus
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.port_registers import PortRegisters
from kvmpy.devices.pci.slot import MakeTimer, Phase, Slot
from kvmpy.irq import MsiSink
from kvmpy.trace import Tracepoint

trace_slot = Tracepoint("pci.slot", "port what card")


class Seats(Protocol):
    """Where a port's function is put in the machine: `PciRoot` as the port sees it."""

    lock: threading.RLock

    def seat(self, function: PciFunction[Any]) -> None:
        """``function`` is behind the port from now on."""

    def unseat(self, function: PciFunction[Any]) -> None:
        """It is not any more; none of its BARs is mapped and its interrupt is low."""

    def places(self, function: PciFunction[Any]) -> Sequence[range]:
        """Where its BARs in memory are mapped now."""

    def remains(self, function: PciFunction[Any], places: Sequence[range]) -> Closable:
        """Have ``places``, where ``function`` was, read as 0 once it is not busy, until what is returned is closed."""


class RootPort(PortRegisters):
    """The port of physical slot ``slot``, which must be the only one with that number.

    ``behind`` is the function in the slot; ``forwards`` what reaches it, for any thread to read. The callbacks are
    made under the locks of root and port, and may only post: ``on_used(function)`` once the guest uses a function that
    came while it ran, ``on_released(function)`` once one is out of the machine, ``on_refused(function)`` when the guest
    keeps one that it was asked for, ``on_kept(function)`` when it does so because it is asked no more, and
    ``on_failed(function, reason)`` when it cannot use one. ``timer`` and ``now``, in seconds, are the host's. Without a
    power controller a card has power while it is in the slot, and the guest lets it go a second sooner.
    """

    def __init__(
        self,
        name: str,
        slot: int,
        sink: MsiSink,
        timer: MakeTimer,
        now: Callable[[], float] = time.monotonic,
        *,
        power_controller: bool = True,
    ) -> None:
        super().__init__(name, slot, sink, power_controller=power_controller)
        self.seats: Seats | None = None  # set by PciRoot
        self.on_used: Callable[[PciFunction[Any]], object] = lambda function: None
        self.on_released: Callable[[PciFunction[Any]], object] = lambda function: None
        self.on_refused: Callable[[PciFunction[Any]], object] = lambda function: None
        self.on_kept: Callable[[PciFunction[Any]], object] = lambda function: None
        self.on_failed: Callable[[PciFunction[Any], str], object] = lambda function, reason: None
        self._waiting: PciFunction[Any] | None = None
        self._remains: Closable | None = None
        self._slot = Slot(self, timer(self._tick), now, power_controller=power_controller)
        self._slot.settle(self.express.slot_control, present=False)
        self.express.on_slot = self._slot_written

    @property
    def card(self) -> PciFunction[Any] | None:
        """The function in the slot, or the one that waits to be shown there."""
        return self.behind or self._waiting

    @property
    def is_releasing(self) -> bool:
        """The guest is being asked for the card."""
        return self._slot.requested

    @property
    def is_retracting(self) -> bool:
        """It is not any more, and may let it go nevertheless."""
        return self._slot.retracted

    @property
    def phase(self) -> Phase:
        """What goes on at the slot."""
        return self._slot.phase

    # What the machine does, while it stands still

    def plug(self, function: PciFunction[Any]) -> None:
        """Put ``function`` in the slot, before the machine runs: present and powered from power-on on."""
        with self._seats().lock, self.lock:
            self._require_empty()
            self._seat(function)
            self._preset(SLOT_OCCUPIED, SlotStatus.PRESENT)

    def unplug(self) -> None:
        """Take the function out of the slot, while the machine stands still; it is reset. Nothing happens if empty."""
        with self._seats().lock, self.lock:
            self._waiting = None
            if self.behind is not None:
                self._unseat(self.behind)
            self._preset(SLOT_EMPTY, 0)

    def finish(self) -> None:
        """Before a system reset: a card that is asked for leaves, one that waits is there from power-on on."""
        with self._seats().lock, self.lock:
            if self.behind is not None and self._slot.requested:
                self._slot.remove()
                self._lose(self.behind)
            elif self._waiting is not None:
                self._slot.settle(self.express.slot_control, present=True)
                self.show()

    # What an operator does, while the machine runs

    def insert(self, function: PciFunction[Any]) -> None:
        """Plug ``function`` in, which the guest is told of as soon as it listens. It is realised, and may be used."""
        with self._seats().lock, self.lock:
            self._require_empty()
            self._waiting = function
            if self._slot.insert():
                self.show()

    def request(self) -> None:
        """Ask the guest to let the function go; `on_released` follows when it has."""
        with self._seats().lock, self.lock:
            if self.card is not None:
                self._slot.request()

    def cancel(self) -> bool:
        """Ask no more. True if the guest has been told so in time, and keeps the function; see `is_retracting`."""
        with self._seats().lock, self.lock:
            return self._slot.cancel()

    def tear_out(self) -> None:
        """Take the function out unasked; a guest that uses it is surprised. `on_released` follows."""
        with self._seats().lock, self.lock:
            if self.card is None:
                return
            torn = self.behind
            places = self._seats().places(torn) if torn is not None and torn.ZERO_WHEN_TORN_OUT else ()
            self._slot.remove()
            self.take_out()
            if torn is not None and places:
                self._remains = self._seats().remains(torn, places)

    # What the slot has us do (`slot.Hands`), with both locks

    def press(self) -> None:
        """Push the attention button."""
        self._trace("press")
        self.express.slot_status |= SlotStatus.BUTTON
        self._drive()

    def show(self) -> None:
        """The card that waits is there: first it answers, then it is seen."""
        if self._waiting is None:
            raise AssertionError(f"{self.name}: no card waits")
        function, self._waiting = self._waiting, None
        self._seat(function)
        self._preset_only_for_reset(SLOT_OCCUPIED, SlotStatus.PRESENT)
        self._trace("plugged")
        self.express.slot_status |= SlotStatus.PRESENT | SlotStatus.PRESENCE_CHANGED
        self._reach()
        self._report_link(active=not self._is_link_held())
        self._drive()

    def take_out(self) -> None:
        """The card leaves."""
        if self._waiting is not None:
            function, self._waiting = self._waiting, None
            self.on_released(function)
        elif self.behind is not None:
            self._lose(self.behind)

    def used(self) -> None:
        """The guest uses the card."""
        if self.behind is not None:
            self._trace("used")
            self.on_used(self.behind)

    def refused(self) -> None:
        """The guest keeps the card."""
        if self.behind is not None:
            self._trace("refused")
            self.on_refused(self.behind)

    def kept(self) -> None:
        """The guest keeps the card, for which it is asked no more."""
        if self.behind is not None:
            self._trace("kept")
            self.on_kept(self.behind)

    def failed(self, reason: str) -> None:
        """The guest cannot use the card."""
        if self.behind is not None:
            self._trace("failed")
            self.on_failed(self.behind, reason)

    # The life cycle

    def post_load(self) -> None:
        # Whether a card is there is a fact of this machine; the function behind has a state of its own.
        present = SlotStatus.PRESENT if self.behind is not None else 0
        self._forget()
        super().post_load()
        express = self.express
        express.slot_status = express.slot_status & ~SlotStatus.PRESENT | present
        # Before the guest has given the slot power, a link that is active says that it has not yet seen the card.
        unseen = bool(express.link_status & Link.ACTIVE and present) and not self._is_link_held()
        self._slot.settle(express.slot_control, present=self.behind is not None)
        self._reach()
        self._set_link(active=self._reachable or unseen)
        self._interrupting = express.interrupt_wanted and self.msi.enabled
        if self._interrupting:  # a message that was on its way did not come along; one too many does no harm
            self.msi.signal()
        self._drive()

    def pause(self) -> None:
        super().pause()
        with self.lock:
            self._slot.pause()

    def resume(self) -> None:
        super().resume()
        with self._seats().lock, self.lock:
            self._slot.resume()

    def info(self) -> dict[str, Any]:
        with self.lock:
            behind = None if self.behind is None else self.behind.name
            return super().info() | {"slot": self.slot, "bus": self.header.secondary, "behind": behind}

    # In and out

    def _seats(self) -> Seats:
        if self.seats is None:
            raise ValueError(f"{self.name} is in no machine yet")
        return self.seats

    def _require_empty(self) -> None:
        if self.card is not None:
            raise ValueError(f"{self.name}: {self.card.name} is in the slot")

    def _seat(self, function: PciFunction[Any]) -> None:
        self._forget()
        self.behind = function
        self.header.set_io_window(there=any(bar.kind is BarKind.IO for bar in function.bars.values()))
        self._seats().seat(function)

    def _forget(self) -> None:
        """Nothing is left of a function that was torn out."""
        if self._remains is not None:
            self._remains.close()
            self._remains = None

    def _unseat(self, function: PciFunction[Any]) -> None:
        """From the first line on the function does nothing to the guest, and from the last one on nobody finds it."""
        with function.lock:
            function.release()
        self.behind = None
        self._reach()
        self._seats().unseat(function)
        self.header.set_io_window(there=False)

    def _lose(self, function: PciFunction[Any]) -> None:
        self._trace("released")
        self._unseat(function)
        self._preset_only_for_reset(SLOT_EMPTY, 0)
        # A press that the guest has not seen yet was for this card, not for the next.
        gone = SlotStatus.PRESENT | SlotStatus.BUTTON
        self.express.slot_status = self.express.slot_status & ~gone | SlotStatus.PRESENCE_CHANGED
        self._report_link(active=False)
        self._drive()
        self.on_released(function)

    def _preset(self, control: int, status: int) -> None:
        self.express.preset(slot_control=self._possible(control), slot_status=status)
        self._slot.settle(self.express.slot_control, present=self.behind is not None)
        self._reach()
        self._set_link(active=self._reachable)

    def _tick(self) -> None:
        with self._seats().lock, self.lock:
            self._slot.tick()

    def _slot_written(self, old: int, new: int) -> None:
        if (old ^ new) & SlotControl.POWER_OFF:
            self._follow_link()
        if new & SlotControl.POWER_INDICATOR == SlotControl.POWER_INDICATOR_OFF:
            self._forget()
        self._slot.control_written(old, new)
        self._drive()

    def _trace(self, what: str) -> None:
        if trace_slot:
            trace_slot(self.name, what, "" if self.behind is None else self.behind.name)
