"""The page of a run: what it was taken on, the table, and the figures; one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.drawing import draw
from bench.results import beside, budget, figure
from bench.rows import KVMPY, MISSED, UNBUDGETED, Row
from kvmpy.migration.report import markup

STYLE = """\
body { font: 14px 'DejaVu Sans', Verdana, sans-serif; max-width: 1100px; margin: 2em auto; color: #1f2328 }
table { border-collapse: collapse; font-size: 12px } td, th { padding: 2px 8px; text-align: right }
td:first-child, th:first-child, td:last-child { text-align: left } tr:nth-child(even) { background: #f6f8fa }
.missed { color: #d1242f; font-weight: bold } .met { color: #1a7f37 } svg { margin: 1.5em 0; display: block }"""
HEADINGS = ("", KVMPY, "peer", "ratio", "quartiles", "budget", "verdict", "")


def page(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """All of it."""
    taken = "\n".join(f"<tr><td>{markup(name)}</td><td>{markup(text)}</td></tr>" for name, text in facts.items())
    head = "".join(f"<th>{name}</th>" for name in HEADINGS)
    body = "\n".join(_row(row) for row in rows)
    pictures = "\n".join(draw(row.figure) for row in rows if row.figure)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>kvmpy, measured</title><style>
{STYLE}
</style></head><body>
<h1>kvmpy beside its peers</h1>
<p>{_summary(rows)} A ratio is kvmpy's figure divided by its peer's in the same run: the median of the pairs' ratios,
with their quartiles. The peer is QEMU where no other is named.</p>
<table>
{taken}
</table>
<h2>Figures</h2>
{pictures}
<h2>All rows</h2>
<table>
<tr>{head}</tr>
{body}
</table>
</body></html>
"""


def _summary(rows: Sequence[Row]) -> str:
    budgeted = [row for row in rows if row.verdict != UNBUDGETED]
    missed = sum(row.verdict == MISSED for row in budgeted)
    return f"{len(rows)} ratios; of {len(budgeted)} that have a budget, {len(budgeted) - missed} meet it."


def _row(row: Row) -> str:
    spread = "" if row.spread is None else f"{row.spread[0]:.3f} to {row.spread[1]:.3f}"
    numbers = (figure(row.kvmpy, row.unit), figure(row.peer, row.unit), f"{row.ratio:.3f}", spread, budget(row))
    cells = "".join(f"<td>{markup(text)}</td>" for text in (row.name, *numbers))
    return f"<tr>{cells}<td class='{row.verdict}'>{row.verdict}</td><td>{markup(beside(row))}</td></tr>"
