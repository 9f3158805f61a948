"""Who may run the guest, at each moment of a hand-over: a small state machine for each side.

    source       OWNER --all is sent--> OFFERED --READY--> AGREED --it sends GO--> COMMITTED --STARTED--> GONE
    destination  LOADING --it sends READY--> OFFERED --GO--> TAKING --its vCPUs run--> OWNER, and it says STARTED
                                                             or --it fails--> REFUSING, and it says REFUSED

The commit point is the *sending* of GO. Before it the source may take everything back at any moment, and the
destination, which starts on GO alone, gives up when the channel ends first. After it the source waits for an answer:
STARTED, or REFUSED, which proves that no vCPU ran there and none will. With neither nobody here can know what came of
it. The source stays as it is then, until whoever can know says so: that is `Event.FORCED`.

What is done at a transition (a message, disk locks, vCPUs) is the business of `source` and `destination`. They make the
transition first, and act on it then: a side that dies in between has done less than it might, never more.

A stream without a way back (a file, a command's input) has no READY and no answer: the source agrees with itself, and
that GO has left is all there is to hear.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, Generic, TypeVar


class Event(Enum):
    """What happens to one side: a message, its own decision, or a misfortune."""

    SENT = "everything is sent"
    READY = "READY"
    GO = "GO"
    STARTED = "STARTED"
    REFUSED = "REFUSED"
    FAILED = "something failed, was cancelled, or took too long"
    FORCED = "somebody who can know says that the other side does not run, and never will"


class Source(Enum):
    """The side that has the guest at first."""

    OWNER = "sending"
    OFFERED = "waiting for READY"
    AGREED = "about to send GO"
    COMMITTED = "waiting for an answer to GO"
    GONE = "the guest runs at the destination"
    KEPT = "the guest stays here"
    UNKNOWN = "the destination may be running"

    @property
    def may_run(self) -> bool:
        """Whether vCPUs may run here."""
        return self in (Source.OWNER, Source.OFFERED, Source.AGREED, Source.KEPT)

    @property
    def may_cancel(self) -> bool:
        """Whether everything can still be taken back, without a word from the destination."""
        return self in (Source.OWNER, Source.OFFERED, Source.AGREED)


class Destination(Enum):
    """The side that is to have it."""

    LOADING = "receiving"
    OFFERED = "waiting for GO"
    TAKING = "about to run the guest"
    OWNER = "the guest runs here"
    REFUSING = "it could not run here"
    GIVEN_UP = "over, and it never ran"

    @property
    def may_run(self) -> bool:
        """Whether vCPUs may run here."""
        return self is Destination.OWNER


P = TypeVar("P", bound=Enum)
Table = Mapping[tuple[P, Event], P]

SOURCE: Final[Table[Source]] = {
    (Source.OWNER, Event.SENT): Source.OFFERED,
    (Source.OWNER, Event.FAILED): Source.KEPT,
    (Source.OFFERED, Event.READY): Source.AGREED,
    (Source.OFFERED, Event.FAILED): Source.KEPT,
    (Source.AGREED, Event.GO): Source.COMMITTED,
    (Source.AGREED, Event.FAILED): Source.KEPT,
    (Source.COMMITTED, Event.STARTED): Source.GONE,
    (Source.COMMITTED, Event.REFUSED): Source.KEPT,
    (Source.COMMITTED, Event.FAILED): Source.UNKNOWN,
    (Source.UNKNOWN, Event.FORCED): Source.KEPT,
    (Source.GONE, Event.FORCED): Source.KEPT,
}

DESTINATION: Final[Table[Destination]] = {
    (Destination.LOADING, Event.READY): Destination.OFFERED,
    (Destination.LOADING, Event.FAILED): Destination.GIVEN_UP,
    (Destination.OFFERED, Event.GO): Destination.TAKING,
    (Destination.OFFERED, Event.FAILED): Destination.GIVEN_UP,
    (Destination.TAKING, Event.STARTED): Destination.OWNER,
    (Destination.TAKING, Event.FAILED): Destination.REFUSING,
}


class Handover(Generic[P]):
    """One side's place in a hand-over. Whoever uses it serializes the calls."""

    def __init__(self, table: Table[P], start: P) -> None:
        self._table = table
        self.phase = start

    def on(self, event: Event) -> P:
        """Go on; returns the new phase. Nothing may happen that the table does not have."""
        try:
            self.phase = self._table[self.phase, event]
        except KeyError:
            raise AssertionError(f"hand-over: {event.name} while {self.phase.name}") from None
        return self.phase

    def allows(self, event: Event) -> bool:
        """Whether that may happen now."""
        return (self.phase, event) in self._table


def source() -> Handover[Source]:
    """The source's side, at its beginning."""
    return Handover(SOURCE, Source.OWNER)


def destination() -> Handover[Destination]:
    """The destination's side, at its beginning."""
    return Handover(DESTINATION, Destination.LOADING)
