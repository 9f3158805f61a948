"""What became of a migration, as a timeline: where its time went, round by round, and what the blackout was made of.

Made of query-migrate's answer at the source, which has the destination's part too where the stream had a way back. The
axis is the source's clock, in milliseconds from `migrate` on. The destination's phases are put on it by the one moment
that both sides know: its first guest instruction, with which the blackout ends. So the picture needs no agreement of
the hosts' clocks; their stamps are told as they are.

Failover pairs are told of by what the monitors of both sides said meanwhile (`primaries.py`), and where somebody pinged
the guest that is on the axis too. `to_json` is for programs; page.py and picture.py are for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

import msgspec

from kvmpy.migration import primaries
from kvmpy.migration.pings import Pings
from kvmpy.migration.primaries import Gap, Stretch, Wait

PAGE_SIZE: Final = 4096
PHASES_MOST: Final = 1000
ROUNDS_MOST: Final = 10000
"""What a picture, and whoever looks at it, can take; a machine says no more of either."""
NS_PER_MS: Final = 1_000_000
AFTER: Final = 1.03
"""So much is shown of what follows when the last primary is there."""
LEAST_MS: Final = 0.05
"""What is shorter is not called a gap: the phases' own rounding."""


class Said(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Part of an answer. What this version does not know of it is left aside."""


class Phase(Said, frozen=True, kw_only=True):
    """Something that took time, from ``start_ms`` on."""

    name: str
    start_ms: float
    ms: float

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.ms


class Round(Said, frozen=True, kw_only=True):
    """One pass over the dirty pages: ``pages`` sent, of which ``zero_pages`` took next to no bytes.

    ``dirty_rate`` is how many pages per second the guest wrote meanwhile.
    """

    number: int
    pages: int
    zero_pages: int = 0
    bytes: int
    ms: float
    dirty_rate: float = 0.0
    start_ms: float | None = None

    @property
    def rate(self) -> float:
        """Bytes sent per second."""
        return self.bytes / self.ms * 1000 if self.ms > 0 else 0.0


class Ram(Said, frozen=True, kw_only=True):
    """Of memory: bytes in all, and bytes that went over the wire."""

    total: int = 0
    transferred: int = 0


class Destination(Said, frozen=True, kw_only=True):
    """What the destination said of itself: its phases on a clock of its own, on which ``first_run_ms`` is."""

    phases: tuple[Phase, ...] = ()
    first_run_ms: float | None = None
    first_run_ns: int | None = None


class Answer(Said, frozen=True, kw_only=True):
    """query-migrate's, as far as a report needs it."""

    status: str = "none"
    error_desc: str = ""
    total_time: float = 0.0
    setup_time: float = 0.0
    downtime: float | None = None
    blackout_ms: float | None = None
    stopped_ms: float | None = None
    stopped_ns: int | None = None
    cpu_throttle_percentage: int = 0
    ram: Ram = Ram()
    phases: tuple[Phase, ...] = ()
    rounds: tuple[Round, ...] = ()
    destination: Destination | None = None


Events = Sequence[Mapping[str, Any]]


class Side(Said, frozen=True, kw_only=True):
    """A host, its phases on the source's axis, and its stamp: when the guest stopped there, or first ran."""

    host: str
    phases: tuple[Phase, ...]
    stamp_ns: int | None = None


class Timeline(Said, frozen=True, kw_only=True):
    """The whole of it. ``blackout`` is what lies between ``stopped_ms`` and the guest's first instruction there."""

    machine: str
    uri: str
    status: str
    error: str
    total_ms: float
    stopped_ms: float | None
    blackout_ms: float | None
    memory_bytes: int
    transferred_bytes: int
    throttle_percentage: int
    source: Side
    destination: Side | None
    rounds: tuple[Round, ...]
    waits: tuple[Wait, ...] = ()
    paths: tuple[Stretch, ...] = ()
    gaps: tuple[Gap, ...] = ()
    pings: Pings | None = None

    @property
    def begin_ns(self) -> int | None:
        """Where the axis begins, by the source's CLOCK_REALTIME."""
        if self.source.stamp_ns is None or self.stopped_ms is None:
            return None
        return self.source.stamp_ns - round(self.stopped_ms * NS_PER_MS)

    @property
    def runs_ms(self) -> float | None:
        """When the guest ran again."""
        if self.stopped_ms is None or self.blackout_ms is None:
            return None
        return self.stopped_ms + self.blackout_ms

    @property
    def end_ms(self) -> float:
        """Where the axis ends."""
        ends = [phase.end_ms for side in (self.source, self.destination) if side for phase in side.phases]
        waited = [wait.end_ms * AFTER for wait in self.waits if wait.end_ms is not None]
        return max([self.total_ms, self.runs_ms or 0.0, *ends, *waited, 1.0])

    def blackout(self) -> tuple[tuple[str, Phase], ...]:
        """The parts of it: which side's, and what; cut off where they reach out of it."""
        if self.stopped_ms is None or self.runs_ms is None:
            return ()
        sides = [("source", self.source), *([("destination", self.destination)] if self.destination else [])]
        return tuple(
            (name, part) for name, side in sides for part in within(side.phases, self.stopped_ms, self.runs_ms)
        )

    def unaccounted_ms(self) -> float:
        """How much of the blackout is in no phase of either side."""
        if self.stopped_ms is None or self.runs_ms is None:
            return 0.0
        covered, reached = 0.0, self.stopped_ms
        for _, part in sorted(self.blackout(), key=lambda entry: entry[1].start_ms):
            covered += max(0.0, part.end_ms - max(part.start_ms, reached))
            reached = max(reached, part.end_ms)
        left = self.runs_ms - self.stopped_ms - covered
        return left if left > LEAST_MS else 0.0


def timeline(
    answer: Mapping[str, Any],
    *,
    machine: str,
    uri: str,
    hosts: tuple[str, str] = ("source", "destination"),
    here: Events = (),
    there: Events | None = None,
) -> Timeline:
    """The timeline that an answer of query-migrate tells, between ``hosts``. Raises ValueError if it makes no sense.

    ``here`` and ``there`` are events, as the monitors of the two sides sent them; None where nobody asked that side.
    """
    try:
        said = msgspec.convert(dict(answer), Answer, strict=False)
    except msgspec.ValidationError as e:
        raise ValueError(f"query-migrate: {e}") from e
    stopped = said.stopped_ms
    if stopped is None and said.blackout_ms is not None:
        stopped = max(0.0, said.total_time - said.blackout_ms)  # the answer that the guest runs there ends it
    return _with_pairs(_told(said, machine, uri, hosts, stopped), here, there, said.destination)


def from_json(text: bytes) -> Timeline:
    """A timeline that `to_json` has told. Raises ValueError."""
    try:
        return msgspec.json.decode(text, type=Timeline)
    except msgspec.MsgspecError as e:
        raise ValueError(f"no report of a migration: {e}") from e


def to_json(line: Timeline) -> bytes:
    """The timeline for programs, with the parts of the blackout picked out."""
    parts = [{"side": side, **msgspec.to_builtins(part)} for side, part in line.blackout()]
    told = msgspec.to_builtins(line) | {"blackout": parts, "unaccounted-ms": line.unaccounted_ms()}
    return msgspec.json.format(msgspec.json.encode(_rounded(told)), indent=2) + b"\n"


def summary(line: Timeline) -> str:
    """What happened, in a sentence or two."""
    parts = [f"{line.machine} to {line.uri}: {line.status} after {line.total_ms / 1000:.2f} s"]
    if line.blackout_ms is not None:
        parts.append(f"the guest stood still for {line.blackout_ms:.1f} ms")
    if line.transferred_bytes:
        parts.append(f"{megabytes(line.transferred_bytes)} sent of {megabytes(line.memory_bytes)} of memory")
    if line.throttle_percentage:
        parts.append(f"its vCPUs slowed down by {line.throttle_percentage} % at the end")
    if line.pings:
        parts.append(line.pings.summary())
    if line.error:
        parts.append(line.error)
    return "; ".join(parts)


def within(phases: Sequence[Phase], begin: float, end: float) -> list[Phase]:
    """What is between two moments of phases that took any time."""
    cut = ((phase.name, max(phase.start_ms, begin), min(phase.end_ms, end)) for phase in phases)
    return [Phase(name=name, start_ms=start, ms=stop - start) for name, start, stop in cut if stop > start]


def megabytes(count: float) -> str:
    """Bytes, in the unit that memory is counted in."""
    return f"{count / (1 << 20):.1f} MiB"


def markup(text: str) -> str:
    """Text for XML, which has no place for what is not to be seen."""
    return escape("".join(char if char.isprintable() else "\ufffd" for char in text))


def stamp_text(stamp_ns: int) -> str:
    """A CLOCK_REALTIME stamp, to the microsecond."""
    seconds, rest = divmod(stamp_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest // 1000:06d} UTC"


def _told(said: Answer, machine: str, uri: str, hosts: tuple[str, str], stopped: float | None) -> Timeline:
    runs = None if stopped is None or said.blackout_ms is None else stopped + said.blackout_ms
    return Timeline(
        machine=machine,
        uri=uri,
        status=said.status,
        error=said.error_desc,
        total_ms=said.total_time,
        stopped_ms=stopped,
        blackout_ms=said.blackout_ms,
        memory_bytes=said.ram.total,
        transferred_bytes=said.ram.transferred,
        throttle_percentage=said.cpu_throttle_percentage,
        source=Side(host=hosts[0], phases=said.phases[:PHASES_MOST], stamp_ns=said.stopped_ns),
        destination=_there(hosts[1], said.destination, runs, said.total_time) if said.destination else None,
        rounds=_placed(said.rounds[:ROUNDS_MOST], said.setup_time),
    )


def _with_pairs(line: Timeline, here: Events, there: Events | None, said: Destination | None) -> Timeline:
    """The same, with what the events tell of its primaries."""
    begin = line.begin_ns or primaries.begin_ns(here)
    if begin is None:
        return line
    ours, theirs = primaries.moments(here, begin, 0.0), None
    if there is not None and line.runs_ms is not None and said is not None and said.first_run_ns is not None:
        theirs = primaries.moments(there, said.first_run_ns, line.runs_ms)
    line = msgspec.structs.replace(line, waits=primaries.waits(ours, theirs, line.runs_ms))
    known = line.end_ms if theirs is not None or line.stopped_ms is None or line.runs_ms is None else line.stopped_ms
    gaps = primaries.gaps(ours, theirs)
    return msgspec.structs.replace(line, paths=primaries.paths(ours, theirs, known), gaps=gaps)


def _rounded(told: Any) -> Any:
    """Milliseconds to the microsecond: what is behind that is noise. Of bytes that are no text, how they are shown."""
    match told:
        case str():
            return told.encode("utf-8", "backslashreplace").decode()
        case float():
            return round(told, 3)
        case dict():
            return {key: _rounded(value) for key, value in told.items()}
        case list() | tuple():
            return [_rounded(value) for value in told]
    return told


def _there(host: str, said: Destination, runs: float | None, total: float) -> Side:
    """The destination on the source's axis. Without an anchor its phases are taken to end with the migration."""
    last = max([phase.end_ms for phase in said.phases], default=0.0)
    if runs is not None and said.first_run_ms is not None:
        shift = runs - said.first_run_ms
    else:
        shift = (total if runs is None else runs) - last
    shifted = (msgspec.structs.replace(phase, start_ms=phase.start_ms + shift) for phase in said.phases[:PHASES_MOST])
    return Side(host=host, phases=tuple(shifted), stamp_ns=said.first_run_ns)


def _placed(rounds: Sequence[Round], begin: float) -> tuple[Round, ...]:
    """Rounds with the time at which each began; those that do not say follow one another."""
    placed = []
    for each in rounds:
        start = begin if each.start_ms is None else each.start_ms
        placed.append(msgspec.structs.replace(each, start_ms=start))
        begin = start + each.ms
    return tuple(placed)
