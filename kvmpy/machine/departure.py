"""The primaries of a machine leave it for a migration, and come back when that comes to nothing (R28 to R41).

While a migration goes on no primary becomes visible (R53), and each that the guest has is asked for: by the button of
its slot, which is pressed again where the guest was busy or went back. One that is out of its slot stays ours, reset
and mapped as it was at the start, until the migration is over. What happens is the slots', the guest's and `pairs`'
business; whoever waits is woken, and nobody polls.

Taken back, each is where the guest had it: one that the guest has not let go yet by a second press in time (R38), the
others by being plugged in anew. A guest that answers only after everybody has stopped waiting gets its primary back
nevertheless: what it lets go then is not what anybody wants any more.
"""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from kvmpy.devices.failover import IN_SLOT, PairState
from kvmpy.devices.pci.function import PciFunction
from kvmpy.host.eventfd import EventFd
from kvmpy.machine.pairing import Pairing
from kvmpy.machine.pairs import Pairs

T = TypeVar("T")

STEADY: Final = 0.5
"""Seconds: a guest whose power indicator is on for so long after it was asked no more has kept the primary (R38)."""
NO_ANSWER: Final = "the guest has not answered; should it let it go yet, it is plugged in again"


class Runs(Protocol):
    """The machine."""

    def in_control(self, call: Callable[[], T]) -> T:
        """Make a call in the control thread, and wait for it. Raises CommandError where there is none any more."""

    def report(self, event: str, **data: Any) -> None:
        """Tell the listeners of an event."""


class Departure:
    """``give_back`` has the host have a function again that is in no slot; by the control thread.

    One migration at a time: `begin`, then `come_back` or `gone`, by its thread, which reads `fd` meanwhile. `wake` is
    for any thread, and so is `release`.
    """

    def __init__(self, machine: Runs, pairs: Pairs, give_back: Callable[[PciFunction[Any]], object]) -> None:
        self._machine, self._pairs, self._give_back = machine, pairs, give_back
        self._leavers: list[Pairing] = []
        self._changed: EventFd | None = None
        self._lock = threading.Lock()
        self._over = False  # the machine has ended, for good
        pairs.on_change = self.wake

    # The migration's thread

    def begin(self) -> bool:
        """Show no primary from now on, and ask for those that the guest has; False where it has none."""
        with self._lock:
            self._changed = EventFd()
        self._machine.in_control(self._begin)
        return bool(self._leavers)

    @property
    def fd(self) -> int:
        """Readable, until `staying` is asked, once something has changed."""
        assert self._changed is not None, "begin() makes it"
        return self._changed.fd

    def staying(self) -> list[str]:
        """The ids of the primaries that the guest still has."""
        assert self._changed is not None
        self._changed.take()
        return self._machine.in_control(lambda: [str(each.primary_id) for each in self._in_slots()])

    def tear_out(self) -> None:
        """Take them away, which is a surprise for the guest."""
        self._machine.in_control(self._tear_out)

    def attached(self) -> tuple[str, ...]:
        """The ids of those that are to be plugged in where the guest goes, whatever its driver is at (R34)."""
        return self._machine.in_control(self._pairs.wanted)

    def come_back(self, seconds: float) -> list[str]:
        """The guest stays: it gets its primaries back. Returns what has become of each, when that is known.

        That is when it has kept one, or has let it go and it is on its way back in; or after so many ``seconds``, or
        when the machine has ended.
        """
        try:
            self._machine.in_control(self._come_back)
            end = time.monotonic() + seconds
            while not self._over and (due := self._machine.in_control(self._due)) is not None:
                left = min(due, end) - time.monotonic()
                if left <= 0 and due > end:
                    break
                self._wait(max(left, 0))
            return self._machine.in_control(self._settle)
        finally:
            self._close()

    def gone(self) -> None:
        """The guest is elsewhere. Its primaries stay ours until `release`, for one that comes back by force."""
        try:
            self._machine.in_control(self._pairs.gone)
        finally:
            self._close()

    # Any thread

    def wake(self) -> None:
        """Something has changed."""
        with self._lock:
            if self._changed is not None:
                self._changed.signal()

    def release(self) -> None:
        """The guest, which has gone, is not to come back: the host has all primaries again, unless it has by now."""
        self._machine.in_control(self._release)

    def abandon(self) -> None:
        """The machine ends: nobody is to be waited for."""
        self._over = True
        self.wake()

    # The destination, by its migration's thread

    def expect(self, primaries: tuple[str, ...]) -> list[str]:
        """The guest had these where it comes from, and is to have them when it runs; returns those that are not here.

        That can be none, or one that cannot be used: the guest goes on on its standby then.
        """
        return self._machine.in_control(lambda: self._pairs.want(primaries))

    # The control thread

    def _begin(self) -> None:
        self._leavers = self._pairs.depart()
        for pairing in self._leavers:
            self._machine.report("UNPLUG_PRIMARY", **{"device-id": str(pairing.primary_id)})
            pairing.ask()

    def _in_slots(self) -> list[Pairing]:
        return [each for each in self._leavers if each.primary is not None and each.pair.state in IN_SLOT]

    def _tear_out(self) -> None:
        for pairing in self._in_slots():
            pairing.port.tear_out()

    def _come_back(self) -> None:
        self._leavers = [pairing for pairing in self._leavers if pairing.returns]
        self._pairs.arrive()
        for pairing in self._leavers:
            pairing.ask_no_more()

    def _due(self) -> float | None:
        """When to look again, if nothing happens before; None once all is known."""
        dues = [due for pairing in self._leavers if (due := self._due_of(pairing)) is not None]
        return min(dues) if dues else None

    def _due_of(self, pairing: Pairing) -> float | None:
        if pairing.pair.state is PairState.LEAVING:
            return math.inf
        kept = pairing.kept_at
        if pairing.pair.state is PairState.PLUGGED and kept is not None and time.monotonic() - kept < STEADY:
            return kept + STEADY
        return None

    def _settle(self) -> list[str]:
        said = []
        for pairing in self._leavers:
            if pairing.pair.state is PairState.LEAVING:
                pairing.pair.kept(NO_ANSWER)
            said.append(f"{pairing.primary_id} {_became(pairing)}")
        self._leavers = []
        return said

    def _release(self) -> None:
        self._leavers = []
        for primary in self._pairs.left_behind():
            self._pairs.give_up(primary)
            self._give_back(primary.function)

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(None if seconds == math.inf else int(seconds * 1000) + 1)
        assert self._changed is not None
        self._changed.take()

    def _close(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, None
        if changed is not None:
            changed.close()


def _became(pairing: Pairing) -> str:
    """What an operator is told."""
    match pairing.pair.state:
        case PairState.PLUGGED if pairing.pair.error:
            return f"is still in its slot: {pairing.pair.error}"
        case PairState.PLUGGED | PairState.PLUGGING:
            return "is plugged in again" if pairing.was_out else "has stayed with the guest"
        case PairState.FAILED:
            return f"cannot be used: {pairing.pair.error}"
        case PairState.NONE | PairState.RELEASED:
            return "has been given back to the host"
        case _:
            return "is hidden until the guest asks for it"
