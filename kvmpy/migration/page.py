"""A migration's report as one HTML file, for people: the picture, and the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kvmpy.migration.picture import draw
from kvmpy.migration.report import PAGE_SIZE, Timeline, markup, megabytes, summary

ROUND_HEAD: Final = ("round", "from ms", "ms", "pages", "zero pages", "sent", "sent per second", "dirtied per second")
STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#1f2328}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15em .8em;text-align:right;"
    "border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def page(line: Timeline) -> str:
    """One HTML file that needs nothing else."""
    title = markup(f"Migration of {line.machine}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{STYLE}</style>'
        f"</head><body>\n<h1>{title}</h1>\n<p>{markup(summary(line))}</p>\n{draw(line)}\n"
        f"<h2>Blackout</h2>\n{_table(('part', 'where', 'from ms', 'ms'), _blackout_rows(line))}\n"
        f"{_pairs(line)}<h2>Rounds</h2>\n{_table(ROUND_HEAD, _round_rows(line))}\n"
        f"<h2>Phases</h2>\n{_table(('phase', 'where', 'from ms', 'ms'), _phase_rows(line))}\n</body></html>\n"
    )


def _pairs(line: Timeline) -> str:
    if not line.waits and not line.paths:
        return ""
    rows = _table(("what", "where", "from ms", "to ms"), _pair_rows(line))
    return f"<h2>Failover pairs</h2>\n{rows}\n"


def _pair_rows(line: Timeline) -> Iterator[tuple[str, ...]]:
    for wait in line.waits:
        end = "" if wait.end_ms is None else f"{wait.end_ms:.1f}"
        ways = f"{wait.device_id} {wait.what}" + f": {wait.outcome}" * bool(wait.outcome)
        yield ways, wait.side, f"{wait.start_ms:.1f}", end
    for stretch in line.paths:
        yield f"{stretch.standby_id}: {stretch.path}", "", f"{stretch.start_ms:.1f}", f"{stretch.end_ms:.1f}"
    for gap in line.gaps:
        what = f"{gap.standby_id}: frames go nowhere, on the way to the {gap.path}"
        yield what, "", f"{gap.start_ms:.1f}", f"{gap.end_ms:.1f}"


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
