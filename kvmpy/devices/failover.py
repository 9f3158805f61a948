"""A failover pair: a virtio-net device that stands by, and the NIC that a guest uses in its place, the primary.

Specified by VIRTIO_NET_F_STANDBY (Virtio 1.2, section 5.1.3) and, for the rest, by what QEMU does with its
failover_pair_id and what Linux's net_failover expects. This is the pair's state alone: who sees the primary, when. It
is told what happens, and tells its `Hands` what to do; it knows neither registers nor threads.

- The primary is kept out of its slot until the standby's driver has taken STANDBY: a guest that knows nothing of pairs
  would see two NICs with one address, and use both.
- A driver that leaves again, as when its module is unloaded, changes nothing for a primary that the guest has. Nor
  does a standby that is unplugged.
- A system reset hides the primary again: firmware and the next kernel must not see it before their driver asks, and a
  guest that names interfaces by their order finds the order of its first boot.
- The order in which the two come does not matter. A primary whose standby is not there waits, unseen.
- While it is held, as by a migration from the first request until it has ended, no primary becomes visible; what would
  have come does when it is let go (R53).
- A primary that leaves for a migration comes back when that is over, whatever its standby's driver is at by then (R34);
  the one that takes its place at the destination is wanted likewise (`want`). After a system reset there is no driver
  that was at anything: it comes when one asks for it.

Left out: who matches the two in the guest, which goes by their MAC addresses; that those are equal is the business of
whoever makes the devices.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Protocol


class PairState(Enum):
    """What becomes of the primary."""

    NONE = "no-primary"
    WAITING = "waiting-for-standby"
    HIDDEN = "hidden"
    PLUGGING = "plugging"  # in its slot; the guest has not taken it into use yet
    PLUGGED = "plugged"
    LEAVING = "unplug-requested"
    RELEASED = "released"  # out of its slot; it is being given back, or kept for a plug to come
    FAILED = "failed"  # the guest or the host could not use it: see the pair's error


IN_SLOT: Final = (PairState.PLUGGING, PairState.PLUGGED, PairState.LEAVING, PairState.FAILED)


class Hands(Protocol):
    """What a pair has done. None of these may call the pair."""

    def show(self) -> None:
        """Plug the primary in."""

    def hide(self) -> None:
        """Take the primary out of its slot; the machine stands still."""

    def negotiated(self, *, primary: bool) -> None:
        """A driver has taken STANDBY; ``primary`` says whether there is one for it."""

    def plugged(self) -> None:
        """The guest has taken the primary into use."""

    def released(self) -> None:
        """The primary is out of its slot."""

    def failed(self, reason: str) -> None:
        """It cannot be used."""


class Pair:
    """One pair. Calls come one at a time.

    ``acked`` is whether a driver of the standby's knows of pairs, ``wanted`` whether the primary is to come whatever
    that says, and ``error`` why it could not be used last.
    """

    def __init__(self, hands: Hands, *, held: bool = False) -> None:
        self._hands = hands
        self.state = PairState.NONE
        self.has_standby = self.acked = False
        self.error = ""
        self.held = held
        self.wanted = False
        self._was_reset = False  # since the guest was asked for the primary

    # The standby

    def standby_came(self) -> None:
        """It is there; no driver is, yet."""
        self.has_standby, self.acked = True, False
        self._settle()

    def standby_left(self) -> None:
        """It is unplugged. The guest keeps a primary that it has."""
        self.has_standby = self.acked = False
        self._settle()

    def driver_came(self) -> None:
        """Its driver has taken STANDBY."""
        self.acked = True
        self._hands.negotiated(primary=self.state is not PairState.NONE)
        self._settle()

    def driver_left(self) -> None:
        """Its driver has reset it. The guest keeps a primary that it has."""
        self.acked = False

    # The primary

    def primary_came(self) -> None:
        """It is there, in no slot, and prepared, or checked. Raises ValueError where there is one already."""
        if self.state is not PairState.NONE:
            raise ValueError("a second primary")
        self.state, self.error, self.wanted = PairState.HIDDEN, "", False
        self._settle()

    def primary_left(self) -> None:
        """It is no more."""
        self.state, self.wanted = PairState.NONE, False

    def want(self) -> None:
        """Plug it in as soon as may be, whatever the standby's driver is at."""
        self.wanted = True
        self._settle()

    def withdraw(self) -> None:
        """It was about to be plugged in, and is not yet: it is wanted later."""
        if self.state is PairState.PLUGGING:
            self.state, self.wanted = PairState.HIDDEN, True

    def hidden(self) -> None:
        """It is ready to be plugged in again, after it was released, or could not be plugged in."""
        if self.state in (PairState.RELEASED, PairState.FAILED):
            self.state = PairState.HIDDEN
            self._settle()

    def asked(self) -> None:
        """The guest is asked to let it go."""
        if self.state in IN_SLOT:
            self.state, self._was_reset = PairState.LEAVING, False

    def kept(self, reason: str = "") -> None:
        """The guest was asked, and keeps it; ``reason`` is why, where it was not asked to."""
        if self.state in (PairState.LEAVING, PairState.PLUGGED):
            self.state, self.error = PairState.PLUGGED, reason

    def used(self) -> None:
        """The guest has taken it into use."""
        if self.state in IN_SLOT:
            if self.state is not PairState.LEAVING:
                self.state, self.error = PairState.PLUGGED, ""
            self._hands.plugged()

    def failed(self, reason: str) -> None:
        """The guest, or the host, could not use it."""
        if self.state in IN_SLOT:
            self.state, self.error = PairState.FAILED, reason
            self._hands.failed(reason)

    def released(self, *, returns: bool = False) -> None:
        """It is out of its slot: the guest has let it go, or lost it. If it ``returns``, that is as soon as may be."""
        if self.state in IN_SLOT:
            self.state = PairState.RELEASED
            self.wanted = returns and not self._was_reset
            self._hands.released()
            if returns and not self.held:
                self.hidden()

    # The machine

    def reset(self) -> None:
        """A system reset: no driver is there any more, and all is as at the start. The machine stands still.

        A primary that the guest is being asked for leaves, with the slot's reset: `released` follows.
        """
        self.acked = self.wanted = False
        self._was_reset = True
        if self.state in IN_SLOT and self.state is not PairState.LEAVING:
            self.state, self.error = PairState.HIDDEN, ""
            self._hands.hide()
        self._settle()

    def hold(self) -> None:
        """Show nothing until `let_go`."""
        self.held = True

    def let_go(self) -> None:
        """Show what is to be shown."""
        self.held = False
        self._settle()

    def _settle(self) -> None:
        if self.state in (PairState.WAITING, PairState.HIDDEN):
            self.state = PairState.HIDDEN if self.has_standby or self.wanted else PairState.WAITING
            if (self.acked or self.wanted) and not self.held:
                self.state, self.wanted = PairState.PLUGGING, False
                self._hands.show()
