"""A root port: the bridge to one hot-pluggable slot.

PCI Express Base 5.0, sections 7.5.1.3 (header of type 1), 7.5.3 (link, slot and root registers) and 6.7 (hot-plug).
What the guest writes takes effect at once: bus numbers, windows, and whether what is behind can be reached. Where that
ends (slot power off, link disabled, secondary bus reset) the function is reset, and answers nothing.

The link is reported active from the moment a card comes, also while the guest has not given the slot power: Linux
takes no interrupt for presence where there is a button, but it does for the link. What is pending at the slot, and
when, is `slot.Slot`'s business; here are the registers, and the way in and out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.bridge import NOWHERE, BridgeControl, BridgeHeader
from kvmpy.devices.pci.config import Command, PciIds
from kvmpy.devices.pci.express import (
    PORT_NUMBER_SHIFT,
    SLOT_EMPTY,
    SLOT_NUMBER_SHIFT,
    SLOT_NUMBERS,
    SLOT_OCCUPIED,
    Link,
    RootPortCapability,
    SlotControl,
    SlotStatus,
)
from kvmpy.devices.pci.function import PciFunction, PciFunctionState
from kvmpy.devices.pci.msi import Msi
from kvmpy.devices.pci.slot import MakeTimer, Slot
from kvmpy.irq import MsiSink
from kvmpy.trace import Tracepoint

IDS: Final = PciIds(vendor=0x1B36, device=0x000C, class_code=0x06_0400)  # as QEMU's pcie-root-port: drivers know it

trace_slot = Tracepoint("pci.slot", "port what card")


class Forwards(NamedTuple):
    """What a port passes on to the other side now."""

    io: range = NOWHERE
    memory: range = NOWHERE
    prefetchable: range = NOWHERE


class Seats(Protocol):
    """Where a port's function is put in the machine: `PciRoot` as the port sees it."""

    lock: threading.RLock

    def seat(self, function: PciFunction[Any]) -> None:
        """``function`` is behind the port from now on."""

    def unseat(self, function: PciFunction[Any]) -> None:
        """It is not any more; none of its BARs is mapped and its interrupt is low."""


class RootPortState(PciFunctionState):
    NAME = "pcie-root-port"
    VERSION = 1


class RootPort(PciFunction[RootPortState]):
    """The port of physical slot ``slot``, which must be the only one with that number. It interrupts by MSI, else INTx.

    ``behind`` is the function in the slot; ``forwards`` what reaches it, for any thread to read. The callbacks are
    made under the locks of root and port, and may only post: ``on_released(function)`` once a function is out of the
    machine, ``on_refused(function)`` when the guest keeps one that it was asked for, ``on_failed(function, reason)``
    when it cannot use one. ``timer`` and ``now``, in seconds, are the host's. Without a power controller a card has
    power while it is in the slot, and the guest lets it go a second sooner.
    """

    header: BridgeHeader
    express: RootPortCapability
    msi: Msi

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
        if slot not in SLOT_NUMBERS:
            raise ValueError(f"{name}: no slot can have the number {slot}")
        super().__init__(name, RootPortState(), IDS, header=BridgeHeader, express=RootPortCapability)
        self.express.preset(
            slot_capability=self.express.slot_capability | slot << SLOT_NUMBER_SHIFT,
            link_capability=self.express.link_capability | (slot & 0xFF) << PORT_NUMBER_SHIFT,
        )
        if not power_controller:
            self.express.leave_out_power_controller()
        self.add_msi(sink)
        self.slot = slot
        self.behind: PciFunction[Any] | None = None
        self.forwards = Forwards()
        self.seats: Seats | None = None  # set by PciRoot
        self.on_released: Callable[[PciFunction[Any]], object] = lambda function: None
        self.on_refused: Callable[[PciFunction[Any]], object] = lambda function: None
        self.on_failed: Callable[[PciFunction[Any], str], object] = lambda function, reason: None
        self._waiting: PciFunction[Any] | None = None
        self._reachable = self._interrupting = False
        self._slot = Slot(self, timer(self._tick), now, power_controller=power_controller)
        self._slot.settle(self.express.slot_control, present=False)
        self.header.on_window = self._decode
        self.header.on_bridge_control = self._follow_link
        self.express.on_link = self._follow_link
        self.express.on_slot = self._slot_written
        self.express.on_events = self._drive
        self.msi.on_change = self._drive

    @property
    def reachable(self) -> bool:
        """Whether the function behind answers."""
        return self._reachable

    @property
    def card(self) -> PciFunction[Any] | None:
        """The function in the slot, or the one that waits to be shown there."""
        return self.behind or self._waiting

    @property
    def is_releasing(self) -> bool:
        """The guest is being asked for the card."""
        return self._slot.requested

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
            if self.behind is not None:
                self._unseat(self.behind)
            self._preset(SLOT_EMPTY, 0)

    def finish(self) -> None:
        """Before a system reset: a card that is asked for leaves, one that waits is there from power-on on."""
        with self._seats().lock, self.lock:
            if self.behind is not None and self._slot.requested:
                self._slot.remove()
                self._take_out(self.behind)
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
        """Ask no more. True if the guest has been told so in time, and keeps the function."""
        with self._seats().lock, self.lock:
            return self._slot.cancel()

    def tear_out(self) -> None:
        """Take the function out unasked; a guest that uses it is surprised. `on_released` follows."""
        with self._seats().lock, self.lock:
            if self.card is not None:
                self._slot.remove()
                self.release()

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

    def release(self) -> None:
        """The card leaves."""
        if self._waiting is not None:
            function, self._waiting = self._waiting, None
            self.on_released(function)
        elif self.behind is not None:
            self._take_out(self.behind)

    def refused(self) -> None:
        """The guest keeps the card."""
        if self.behind is not None:
            self._trace("refused")
            self.on_refused(self.behind)

    def failed(self, reason: str) -> None:
        """The guest cannot use the card."""
        if self.behind is not None:
            self._trace("failed")
            self.on_failed(self.behind, reason)

    # The life cycle

    def config_write(self, offset: int, size: int, value: int) -> None:
        with self.lock:
            super().config_write(offset, size, self.express.keep_unseen_events(offset, size, value))

    def post_load(self) -> None:
        # Whether a card is there is a fact of this machine; the function behind has a state of its own.
        present = SlotStatus.PRESENT if self.behind is not None else 0
        super().post_load()
        express = self.express
        express.slot_status = express.slot_status & ~SlotStatus.PRESENT | present
        # Before the guest has given the slot power, a link that is active says that it has not yet seen the card.
        unseen = bool(express.link_status & Link.ACTIVE and present) and not self._is_link_held()
        self._slot.settle(express.slot_control, present=self.behind is not None)
        self._reach()
        self._set_link(active=self._reachable or unseen)
        self._interrupting = express.interrupt_wanted and self.msi.enabled
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
        self.behind = function
        self.header.set_io_window(there=any(bar.kind is BarKind.IO for bar in function.bars.values()))
        self._seats().seat(function)

    def _unseat(self, function: PciFunction[Any]) -> None:
        """From the first line on the function does nothing to the guest, and from the last one on nobody finds it."""
        with function.lock:
            function.release()
        self.behind = None
        self._reach()
        self._seats().unseat(function)
        self.header.set_io_window(there=False)

    def _take_out(self, function: PciFunction[Any]) -> None:
        self._trace("released")
        self._unseat(function)
        self._preset_only_for_reset(SLOT_EMPTY, 0)
        self.express.slot_status = self.express.slot_status & ~SlotStatus.PRESENT | SlotStatus.PRESENCE_CHANGED
        self._report_link(active=False)
        self._drive()
        self.on_released(function)

    def _preset(self, control: int, status: int) -> None:
        self.express.preset(slot_control=self._possible(control), slot_status=status)
        self._slot.settle(self.express.slot_control, present=self.behind is not None)
        self._reach()
        self._set_link(active=self._reachable)

    def _preset_only_for_reset(self, control: int, status: int) -> None:
        now = self.express.slot_control, self.express.slot_status
        self.express.preset(slot_control=self._possible(control), slot_status=status)
        self.express.slot_control, self.express.slot_status = now

    def _possible(self, control: int) -> int:
        return control if self.express.has_power_controller else control & ~SlotControl.POWER_OFF

    # Registers

    def _tick(self) -> None:
        with self._seats().lock, self.lock:
            self._slot.tick()

    def _slot_written(self, old: int, new: int) -> None:
        if (old ^ new) & SlotControl.POWER_OFF:
            self._follow_link()
        self._slot.control_written(old, new)
        self._drive()

    def _is_link_held(self) -> bool:
        """The guest keeps the link down."""
        return bool(
            self.express.link_control & Link.DISABLE or self.header.bridge_control & BridgeControl.SECONDARY_BUS_RESET
        )

    def _follow_link(self) -> None:
        """Whether the function answers may have changed. Where it does no longer, it is reset."""
        was = self._reachable
        self._reach()
        if was and not self._reachable and self.behind is not None:
            with self.behind.lock:
                self.behind.bus_reset()
        self._report_link(active=self._reachable)
        self._drive()

    def _reach(self) -> None:
        has_power = not self.express.slot_control & SlotControl.POWER_OFF
        self._reachable = self.behind is not None and has_power and not self._is_link_held()
        self._decode()

    def _report_link(self, *, active: bool) -> None:
        """Say that the link has changed, if it has."""
        if active != bool(self.express.link_status & Link.ACTIVE):
            self.express.slot_status |= SlotStatus.LINK_CHANGED
            self._set_link(active=active)

    def _set_link(self, *, active: bool) -> None:
        status = self.express.link_status
        self.express.link_status = status | Link.ACTIVE if active else status & ~Link.ACTIVE

    def _drive(self) -> None:
        """Interrupt as the events say: by one message each time they begin, or by a level while there are any."""
        wanted = self.express.interrupt_wanted
        interrupting = wanted and self.msi.enabled
        if interrupting and not self._interrupting:
            self.msi.signal()
        elif self._interrupting and not interrupting:
            self.msi.discard()  # one that is masked still: its reason is gone
        self._interrupting = interrupting
        self.intx.set(level=wanted and not self.msi.enabled)

    def _decode(self) -> None:
        super()._decode()
        header, command, up = self.header, self.header.command, self._reachable
        forwards = Forwards(
            io=header.io if up and command & Command.IO else NOWHERE,
            memory=header.memory if up and command & Command.MEMORY else NOWHERE,
            prefetchable=header.prefetchable if up and command & Command.MEMORY else NOWHERE,
        )
        if forwards != self.forwards:
            self.forwards = forwards
            self.on_decode()

    def _trace(self, what: str) -> None:
        if trace_slot:
            trace_slot(self.name, what, "" if self.behind is None else self.behind.name)
