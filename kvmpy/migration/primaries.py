"""What became of the failover primaries in a migration, and which path frames took when: from what both monitors told.

Events have stamps of CLOCK_REALTIME. Those of a side are put on the source's axis by a moment of it that is known by
both clocks, as the phases of `report.py` are. Either side may have said nothing, or, for the destination, not have been
asked: None. What a monitor says is taken as it comes: what makes no sense is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec

MOST: Final = 1000
"""Events that are looked at, of each side."""
LONGEST_GAP: Final = 1e7
"""Milliseconds. One that is longer is a mistake."""
NS_PER_MS: Final = 1_000_000
SOURCE, DESTINATION = "source", "destination"
ENDED: Final = ("cancelling", "failed", "cancelled")
OTHER: Final = {"primary": "standby", "standby": "primary"}


class Clock(msgspec.Struct, frozen=True):
    """When an event was told."""

    seconds: int
    microseconds: int


class Told(msgspec.Struct, frozen=True):
    """An event as the monitor sends it."""

    event: str
    timestamp: Clock
    data: dict[str, Any] = {}

    @property
    def ns(self) -> int:
        return self.timestamp.seconds * 10**9 + self.timestamp.microseconds * 1000


class Moment(msgspec.Struct, frozen=True):
    """An event on the source's axis."""

    ms: float
    event: str
    data: dict[str, Any]

    def of(self, key: str) -> str:
        return str(self.data.get(key, ""))[:100]


class Wait(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A primary on its way: ``what`` is "leaves" or "comes". Without ``end_ms`` that was not over when last looked.

    ``outcome`` is "released", "kept" or "in use", or why it failed.
    """

    side: str
    device_id: str
    what: str
    start_ms: float
    end_ms: float | None = None
    outcome: str = ""


class Stretch(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """The pair of ``standby_id`` has its frames on one ``path``, "primary" or "standby"."""

    standby_id: str
    path: str
    start_ms: float
    end_ms: float


class Gap(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Frames for the pair of ``standby_id`` went nowhere: no more the one way, and not yet the other, to ``path``."""

    standby_id: str
    path: str
    start_ms: float
    end_ms: float


def moments(events: Sequence[Mapping[str, Any]], zero_ns: int, zero_ms: float) -> list[Moment]:
    """Events on the axis on which ``zero_ns`` of CLOCK_REALTIME is ``zero_ms``."""
    found = []
    for event in islice(events, MOST):
        try:
            told = msgspec.convert(dict(event), Told)
        except (msgspec.ValidationError, TypeError, ValueError):
            continue
        found.append(Moment(zero_ms + (told.ns - zero_ns) / NS_PER_MS, told.event, told.data))
    return sorted(found, key=lambda moment: moment.ms)


def begin_ns(events: Sequence[Mapping[str, Any]]) -> int | None:
    """When a migration began, by the events of its source: its first status is told at once."""
    for event in islice(events, MOST):
        if event.get("event") == "MIGRATION" and event.get("data") == {"status": "setup"}:
            return msgspec.convert(dict(event), Told).ns
    return None


def waits(here: Sequence[Moment], there: Sequence[Moment] | None, runs_ms: float | None) -> tuple[Wait, ...]:
    """Every primary's ways out and in."""
    left = list(_at_the_source(here))
    if there is None or runs_ms is None:
        return tuple(left)
    return (*left, *_at_the_destination([each.device_id for each in left], there, runs_ms))


def _at_the_source(here: Sequence[Moment]) -> Iterator[Wait]:
    """Those that were asked for leave; if the migration comes to nothing after that, they come again."""
    leaving: dict[str, float] = {}
    away: dict[str, float] = {}
    for moment in here:
        name = moment.of("device-id")
        match moment.event:
            case "UNPLUG_PRIMARY":
                leaving[name] = moment.ms
            case "FAILOVER_PRIMARY_RELEASED" if name in leaving:
                yield _wait(SOURCE, name, "leaves", leaving.pop(name), moment.ms, "released")
                away[name] = moment.ms
            case "FAILOVER_PRIMARY_PLUGGED" if name in leaving:
                yield _wait(SOURCE, name, "leaves", leaving.pop(name), moment.ms, "kept")
            case "FAILOVER_PRIMARY_PLUGGED" if name in away:
                yield _wait(SOURCE, name, "comes", away.pop(name), moment.ms, "in use")
            case "FAILOVER_PRIMARY_FAILED" if name in away:
                yield _wait(SOURCE, name, "comes", away.pop(name), moment.ms, moment.of("reason"))
            case "MIGRATION" if moment.of("status") in ENDED:
                away = dict.fromkeys(away, moment.ms)  # until now nothing was to bring it back
    for name, start in leaving.items():
        yield Wait(side=SOURCE, device_id=name, what="leaves", start_ms=start)


def _at_the_destination(expected: Sequence[str], there: Sequence[Moment], runs_ms: float) -> Iterator[Wait]:
    """From the guest's first instruction on, until it has each."""
    ends: dict[str, tuple[float, str]] = {}
    for moment in there:
        name = moment.of("device-id")
        match moment.event:
            case "FAILOVER_PRIMARY_PLUGGED":
                ends.setdefault(name, (moment.ms, "in use"))
            case "FAILOVER_PRIMARY_FAILED":
                ends.setdefault(name, (moment.ms, moment.of("reason")))
    for name in dict.fromkeys((*expected, *ends)):
        end, outcome = ends.get(name, (None, ""))
        yield _wait(DESTINATION, name, "comes", runs_ms, end, outcome)


def _wait(side: str, name: str, what: str, start: float, end: float | None, outcome: str) -> Wait:
    """One whose clock says that it ended before it began took no time."""
    ended = None if end is None else max(start, end)
    return Wait(side=side, device_id=name, what=what, start_ms=start, end_ms=ended, outcome=outcome)


def paths(here: Sequence[Moment], there: Sequence[Moment] | None, end_ms: float) -> tuple[Stretch, ...]:
    """Which path the frames of each pair took until ``end_ms``; nothing of a pair whose path never changed."""
    changes: dict[str, list[tuple[float, str]]] = {}
    for moment in (*here, *(there or ())):
        path = moment.of("path")
        if moment.event == "FAILOVER_PATH_CHANGED" and path in OTHER:
            changes.setdefault(moment.of("device-id"), []).append((moment.ms, path))
    return tuple(stretch for name, found in changes.items() for stretch in _stretches(name, found, end_ms))


def gaps(here: Sequence[Moment], there: Sequence[Moment] | None) -> tuple[Gap, ...]:
    """What changes of the path cost, as either side has measured it."""
    return tuple(gap for moment in (*here, *(there or ())) if (gap := _gap(moment)) is not None)


def _gap(moment: Moment) -> Gap | None:
    ms = moment.data.get("rx-gap-ms")
    if not isinstance(ms, int | float) or not 0 < ms < LONGEST_GAP:
        return None
    match moment.event:
        case "FAILOVER_PATH_CHANGED":
            name, path = moment.of("device-id"), "standby"
        case "FAILOVER_PRIMARY_RECEIVES":
            name, path = moment.of("standby-id"), "primary"
        case _:
            return None
    return Gap(standby_id=name, path=path, start_ms=moment.ms - ms, end_ms=moment.ms)


def _stretches(name: str, changes: list[tuple[float, str]], end_ms: float) -> Iterator[Stretch]:
    start, path = 0.0, OTHER[changes[0][1]]
    for ms, new in (*changes, (end_ms, "")):
        if new != path and ms > start:
            yield Stretch(standby_id=name, path=path, start_ms=start, end_ms=ms)
            start = ms
        path = new
