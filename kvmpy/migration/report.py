"""What became of a migration, as a timeline: where its time went, round by round, and what the blackout was made of.

Made of query-migrate's answer at the source, which has the destination's part too where the stream had a way back. The
axis is the source's clock, in milliseconds from `migrate` on. The destination's phases are put on it by the one moment
that both sides know: its first guest instruction, with which the blackout ends. So the picture needs no agreement of
the hosts' clocks; their stamps are told as they are.

`to_json` is for programs, `page` for people: one file, with the picture of `picture.py` in it, that loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

import msgspec

PAGE_SIZE: Final = 4096
PHASES_MOST: Final = 1000
ROUNDS_MOST: Final = 10000
"""What a picture, and whoever looks at it, can take; a machine says no more of either."""
NS_PER_MS: Final = 1_000_000
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
        return max([self.total_ms, self.runs_ms or 0.0, *ends, 1.0])

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
) -> Timeline:
    """The timeline that an answer of query-migrate tells, between ``hosts``. Raises ValueError if it makes no sense."""
    try:
        said = msgspec.convert(dict(answer), Answer, strict=False)
    except msgspec.ValidationError as e:
        raise ValueError(f"query-migrate: {e}") from e
    blackout = said.blackout_ms
    stopped = said.stopped_ms
    if stopped is None and blackout is not None:
        stopped = max(0.0, said.total_time - blackout)  # the answer that the guest runs there ends it
    runs = None if stopped is None or blackout is None else stopped + blackout
    return Timeline(
        machine=machine,
        uri=uri,
        status=said.status,
        error=said.error_desc,
        total_ms=said.total_time,
        stopped_ms=stopped,
        blackout_ms=blackout,
        memory_bytes=said.ram.total,
        transferred_bytes=said.ram.transferred,
        throttle_percentage=said.cpu_throttle_percentage,
        source=Side(host=hosts[0], phases=said.phases[:PHASES_MOST], stamp_ns=said.stopped_ns),
        destination=_there(hosts[1], said.destination, runs, said.total_time) if said.destination else None,
        rounds=_placed(said.rounds[:ROUNDS_MOST], said.setup_time),
    )


def to_json(line: Timeline) -> bytes:
    """The timeline for programs, with the parts of the blackout picked out."""
    parts = [{"side": side, **msgspec.to_builtins(part)} for side, part in line.blackout()]
    told = msgspec.to_builtins(line) | {"blackout": parts, "unaccounted-ms": line.unaccounted_ms()}
    return msgspec.json.format(msgspec.json.encode(_rounded(told)), indent=2) + b"\n"


def page(line: Timeline) -> str:
    """One HTML file that needs nothing else."""
    from kvmpy.migration.picture import draw

    title = markup(f"Migration of {line.machine}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{STYLE}</style>'
        f"</head><body>\n<h1>{title}</h1>\n<p>{markup(summary(line))}</p>\n{draw(line)}\n"
        f"<h2>Blackout</h2>\n{_table(('part', 'where', 'from ms', 'ms'), _blackout_rows(line))}\n"
        f"<h2>Rounds</h2>\n{_table(ROUND_HEAD, _round_rows(line))}\n"
        f"<h2>Phases</h2>\n{_table(('phase', 'where', 'from ms', 'ms'), _phase_rows(line))}\n</body></html>\n"
    )


def summary(line: Timeline) -> str:
    """What happened, in a sentence or two."""
    parts = [f"{line.machine} to {line.uri}: {line.status} after {line.total_ms / 1000:.2f} s"]
    if line.blackout_ms is not None:
        parts.append(f"the guest stood still for {line.blackout_ms:.1f} ms")
    if line.transferred_bytes:
        parts.append(f"{megabytes(line.transferred_bytes)} sent of {megabytes(line.memory_bytes)} of memory")
    if line.throttle_percentage:
        parts.append(f"its vCPUs slowed down by {line.throttle_percentage} % at the end")
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


def _rounded(told: Any) -> Any:
    """Milliseconds to the microsecond: what is behind that is noise."""
    match told:
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


ROUND_HEAD: Final = ("round", "from ms", "ms", "pages", "zero pages", "sent", "sent per second", "dirtied per second")
STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#1f2328}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15em .8em;text-align:right;"
    "border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def _round_rows(line: Timeline) -> Iterator[tuple[str, ...]]:
    for each in line.rounds:
        yield (
            *(str(each.number), f"{each.start_ms or 0:.1f}", f"{each.ms:.1f}", str(each.pages), str(each.zero_pages)),
            *(megabytes(each.bytes), megabytes(each.rate), megabytes(each.dirty_rate * PAGE_SIZE)),
        )


def _blackout_rows(line: Timeline) -> Iterator[tuple[str, ...]]:
    for side, part in line.blackout():
        yield part.name, side, f"{part.start_ms - (line.stopped_ms or 0):.2f}", f"{part.ms:.2f}"
    if left := line.unaccounted_ms():
        yield "in no phase", "", "", f"{left:.2f}"


def _phase_rows(line: Timeline) -> Iterator[tuple[str, ...]]:
    for side in (line.source, line.destination):
        for phase in side.phases if side else ():
            yield phase.name, side.host if side else "", f"{phase.start_ms:.1f}", f"{phase.ms:.2f}"


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{markup(cell)}</{kind}>" for cell in cells) + "</tr>"

    return "<table>" + "\n".join([row(head, "th"), *(row(cells, "td") for cells in rows)]) + "</table>"
