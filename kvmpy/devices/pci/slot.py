"""What goes on at a hot-plug slot: when a card may come, when the button is pressed, when the guest has let a card go.

PCI Express Base 5.0, section 6.7, and what Linux's pciehp makes of it. The slot is told what the guest writes to slot
control and what the operator wants, and tells its port (`Hands`) what to do. It knows no registers but that one.

- A card is asked for by the attention button, never while the power indicator blinks: the guest is at work then, and
  takes a second press for a change of mind. Nor is the button pressed twice within 5 s. A press that has changed
  nothing by then was lost, as by a guest that is just booting, and is repeated.
- A request is taken back by a second press within 4 s of the first, while the indicator blinks. One that the guest
  has not answered yet is taken back as soon as it does.
- The guest has let a card go when it has turned off its power and its indicator: the indicator alone where the slot has
  no power controller. It may do so unasked.
- The same with the attention indicator turned on is a guest that cannot use a card. That card stays, unused.
- No card appears between power off and indicator off, nor within 1.1 s of power off: a guest throws away what it is
  told of the slot meanwhile. Power that goes off in an empty slot has no indicator to follow: pciehp does that as it
  binds.
- A guest whose card was torn out turns off power and indicator as if it let one go. The next card appears after that,
  or it would be taken for the one that the guest lets go; so would it after a press that the guest has not heard yet.
  After 30 s it appears nevertheless, and stays.

What is pending here stays on this host: after a migration or a reset nobody has asked for anything. All that a guest
can notice is in the registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from kvmpy.devices.base import Timer
from kvmpy.devices.pci.express import SlotControl

PRESS_INTERVAL: Final = 5.0
"""Seconds between two presses: a guest waits that long for the second one, which cancels the first."""
CANCEL_WITHIN: Final = 4.0
"""Seconds after a press in which a second one still cancels it for certain."""
POWER_OFF_GUARD: Final = 1.1
"""Seconds after power off in which the guest does not look: pciehp sleeps for one."""

PATIENCE: Final = 30.0
"""Seconds that a card waits for a guest to be done with the last one."""

MakeTimer = Callable[[Callable[[], object]], Timer]


class Indicator(Enum):
    """The power indicator: the field's value in slot control."""

    RESERVED = 0x0000
    ON = 0x0100
    BLINK = 0x0200
    OFF = 0x0300


class Phase(Enum):
    """What goes on at a slot, for an operator."""

    EMPTY = "empty"
    WAITING = "waiting"  # a card is there that the guest is shown when it is done with the last one
    OFF = "off"  # the guest has not turned the card on yet, or could not use it
    WORKING = "working"  # the power indicator blinks: the guest takes the card into use, or lets it go
    ON = "on"
    ASKED = "asked"  # the guest has been asked to let the card go


class Hands(Protocol):
    """What a slot has its port do. Called with the port's lock held; none of these may call the slot."""

    def press(self) -> None:
        """Push the attention button."""

    def show(self) -> None:
        """The card that waits may be seen from now on."""

    def take_out(self) -> None:
        """The guest is done with the card, or never saw it: it leaves."""

    def used(self) -> None:
        """The guest has taken the card into use."""

    def refused(self) -> None:
        """The guest was asked for the card, began, and went back: it keeps it."""

    def kept(self) -> None:
        """The guest keeps the card: a request was taken back, and its indicator is on again."""

    def failed(self, reason: str) -> None:
        """The guest cannot use the card, which stays."""


class Slot:
    """One slot. Its port's lock serializes all calls; `tick` is the timer's callback, with that lock.

    ``requested``: the guest is being asked for the card; ``retracted``: no longer, and what it makes of that is not
    known yet. ``waiting``: a card has come and cannot be shown yet.
    Made paused and empty; while paused no time passes and no button is pressed.
    """

    def __init__(self, hands: Hands, timer: Timer, now: Callable[[], float], *, power_controller: bool) -> None:
        self._hands, self._timer, self._now = hands, timer, now
        self._power_controller = power_controller
        self._control = 0
        self.present = self.waiting = self.requested = self.retracted = False
        self._pressed = False  # for this request
        self._answered = False  # the indicator, which was on, blinks since
        self._used = False  # the indicator has been on since the card came, or was turned on
        self._given_up = False
        self._torn = False  # should the guest turn the slot off now, that is for a card that was torn out
        self._owed = False  # it is about to, or has turned off the power and not yet the indicator
        self._paused_at: float | None = now()
        self._last_press = self._power_off = self._steady = self._shown = self._begun = -math.inf

    # What the operator wants

    def insert(self) -> bool:
        """A card comes, to a slot that has none. True: it can be seen at once; else `Hands.show` follows."""
        due = self._show_due()
        self.waiting = due > self._now()
        if self.waiting:
            self._consider()
        else:
            self._show()
        return not self.waiting

    def request(self) -> None:
        """Ask the guest for the card, which may take any time; one that it does not use leaves at once."""
        self.requested, self.retracted = True, False
        self._pressed = self._answered = False
        self._consider()

    def cancel(self) -> bool:
        """Ask no more. True if that was in time to press the button again, which has the guest keep the card.

        While ``retracted`` then, the guest may let it go nevertheless; `Hands.kept` or `Hands.take_out` follows.
        """
        if not self.requested:
            return False
        in_time = self._answered and self._now() - self._last_press < CANCEL_WITHIN
        self.requested, self.retracted = False, self._pressed
        self._timer.cancel()
        if in_time:
            self._press()
        return in_time

    def remove(self) -> None:
        """The card leaves unasked, whatever the guest does with it."""
        is_unheard = (self.requested or self.retracted) and self._pressed and not self._answered
        if self.present and (is_unheard or not self._is_off(self._control)):
            self._torn = True
            self._owed = self._owed or bool(self._control & SlotControl.INTERRUPT_ENABLE)
            self._begun = self._now() if self._paused_at is None else self._paused_at
        self._leave()

    # What the guest does

    def control_written(self, old: int, new: int) -> None:
        """Slot control has changed."""
        self._control, now = new, self._now()
        before, after = _indicator(old), _indicator(new)
        was_answered = self._answered
        if before is not after:
            self._steady = now
            self._answered = self._pressed and (before, after) == (Indicator.ON, Indicator.BLINK)
            if self._answered and self.retracted:
                self._press()
        if new & ~old & SlotControl.POWER_OFF:
            self._power_off = self._begun = now
            self._owed = self._owed or self.present
        if self._is_off(new) and not self._is_off(old):
            was_torn, self._torn, self._owed = self._torn, False, False
            if self.present and (self.requested or not was_torn):
                self._turned_off(old, new)
        elif self.present and after is not Indicator.OFF:
            if before is not after and not new & SlotControl.POWER_OFF:  # it has begun with the card that is there now
                self._torn = self._owed = False
            if after is Indicator.ON:
                self._turned_on(went_back=was_answered and before is Indicator.BLINK)
        self._consider()

    # The life cycle

    def settle(self, control: int, *, present: bool) -> None:
        """The registers say this now, after power-on or a move: nothing is pending."""
        self._timer.cancel()
        self._control, self.present = control, present
        self.waiting = self.requested = self.retracted = self._given_up = self._torn = self._owed = False
        self._used = present and self.indicator is Indicator.ON
        self._last_press = self._power_off = self._steady = self._shown = self._begun = -math.inf

    def pause(self) -> None:
        """Time stops."""
        if self._paused_at is None:
            self._timer.cancel()
            self._paused_at = self._now()

    def resume(self) -> None:
        """Time goes on where it stopped."""
        if self._paused_at is not None:
            passed, self._paused_at = self._now() - self._paused_at, None
            self._last_press += passed
            self._power_off += passed
            self._steady += passed
            self._shown += passed
            self._begun += passed
            self._consider()

    def tick(self) -> None:
        """What was waited for may have come."""
        self._consider()

    @property
    def indicator(self) -> Indicator:
        """The power indicator now."""
        return _indicator(self._control)

    @property
    def phase(self) -> Phase:
        """What goes on."""
        if self.requested:
            return Phase.ASKED
        if not self.present:
            return Phase.WAITING if self.waiting else Phase.EMPTY
        return {Indicator.ON: Phase.ON, Indicator.BLINK: Phase.WORKING}.get(self.indicator, Phase.OFF)

    @property
    def unused(self) -> bool:
        """The guest has certainly nothing to do with the card: it has no power, or could not be used."""
        return self._is_off(self._control) and (self._power_controller or self._given_up)

    def _consider(self) -> None:
        """Do what can be done now; for the rest come back in time, or when the guest has written."""
        self._timer.cancel()
        if self.requested and (self.waiting or (self.present and self.unused)):
            self._leave()
            self._hands.take_out()
        if self._paused_at is not None:
            return
        due = None
        if self.waiting:
            due = self._show_due()
        elif self.requested and self.present and self.indicator is not Indicator.BLINK:
            due = self._press_due()
        if due is not None and due > self._now():
            self._timer.arm(due - self._now())
        elif due is not None and self.waiting:
            self._show()
            self._hands.show()
        elif due is not None:
            self._pressed = True
            self._press()
            self._timer.arm(PRESS_INTERVAL)

    def _show_due(self) -> float:
        """When a card may appear, should the guest write nothing until then."""
        powered_down = self._power_controller and self._control & SlotControl.POWER_OFF
        if self._owed:
            return self._begun + PATIENCE
        if powered_down and self.indicator is Indicator.BLINK:
            return max(self._power_off, self._steady) + PATIENCE
        return self._power_off + POWER_OFF_GUARD

    def _press_due(self) -> float:
        """When the button may be pressed, should the indicator not blink then."""
        due = self._last_press + PRESS_INTERVAL
        if self._pressed:
            due = max(due, self._steady + PRESS_INTERVAL)
        if not self._used:  # just come: the guest may be about to begin with it
            due = max(due, self._shown + PRESS_INTERVAL)
        return due

    def _press(self) -> None:
        self._last_press = self._now()
        self._hands.press()

    def _show(self) -> None:
        self.present, self.waiting = True, False
        self._shown = self._now()
        self._used, self._given_up = self.indicator is Indicator.ON, False

    def _turned_on(self, *, went_back: bool) -> None:
        was_used, self._used, self._given_up = self._used, True, False
        if not was_used:
            self._hands.used()
        if went_back and self.requested:
            self.requested = False
            self._hands.refused()
        elif went_back and self.retracted:
            self.retracted = False
            self._hands.kept()

    def _turned_off(self, old: int, new: int) -> None:
        attention = new & SlotControl.ATTENTION == SlotControl.ATTENTION_ON
        had_attention = old & SlotControl.ATTENTION == SlotControl.ATTENTION_ON
        if attention and not self.requested and not (had_attention and self._used):
            self._used, self._given_up = False, True
            self._hands.failed(
                "the guest turned the slot off and its attention indicator on: it found no working device, or no room "
                "for its registers; its kernel log says more"
            )
        else:
            self._leave()
            self._hands.take_out()

    def _leave(self) -> None:
        self._timer.cancel()
        self.present = self.waiting = self.requested = self.retracted = False
        self._used = self._given_up = False

    def _is_off(self, control: int) -> bool:
        dark = _indicator(control) is Indicator.OFF
        return dark and (not self._power_controller or bool(control & SlotControl.POWER_OFF))


def _indicator(control: int) -> Indicator:
    return Indicator(control & SlotControl.POWER_INDICATOR)
