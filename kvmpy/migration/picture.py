"""The picture of a migration: an SVG of a few panels, with nothing in it that has to be loaded.

The first has the phases of both hosts as bars on one time axis. On the same axis follow the failover pairs
(picture_pairs.py), where there are any, and the rounds: what was sent in a second, and what the guest dirtied in a
second. Where the second curve is below the first, the migration converges. The last is the blackout, drawn large: from
the last guest instruction here to the first one there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from kvmpy.migration.canvas import CHARACTER, COLOURS, DARK, GRID, LEFT, PALE, RIGHT, Axis, Canvas, lanes, ticks
from kvmpy.migration.picture_pairs import pairs_panel
from kvmpy.migration.report import PAGE_SIZE, Phase, Timeline, megabytes, stamp_text, within

CURVES: Final = 150  # the height of the second panel


def draw(line: Timeline) -> str:
    """The whole picture, one SVG element."""
    colours = _colours(line)
    canvas = Canvas()
    canvas.text(0, 16, f"{line.machine} to {line.uri}", size=14, weight="bold")
    canvas.text(0, 33, _headline(line), colour=PALE)
    axis = Axis(0.0, line.end_ms)
    top = 56.0
    canvas.text(0, top, "Phases", weight="bold")
    begin = top
    top = lanes(
        canvas, axis, top + 8, [(host, _before_blackout(line, phases)) for host, phases in _sides(line)], colours
    )
    top = pairs_panel(canvas, axis, top, line)
    if line.rounds:
        canvas.text(0, top + 20, "Rounds", weight="bold")
        top = _curves(canvas, axis, top + 28, line)
    axis.draw(canvas, begin - 4, top)
    _band(canvas, axis, begin - 4, top, line)
    top += 44
    if line.stopped_ms is not None and line.runs_ms is not None:
        top = _blackout(canvas, top, line, colours)
    return canvas.finish(top)


def _headline(line: Timeline) -> str:
    text = f"{line.status} after {line.total_ms / 1000:.2f} s"
    if line.blackout_ms is not None:
        text += f", blackout {line.blackout_ms:.1f} ms"
    if line.transferred_bytes:
        text += f", {megabytes(line.transferred_bytes)} sent"
    return text + (f": {line.error}" if line.error else "")


def _sides(line: Timeline) -> list[tuple[str, Sequence[Phase]]]:
    return [(side.host, side.phases) for side in (line.source, line.destination) if side]


def _before_blackout(line: Timeline, phases: Sequence[Phase]) -> list[Phase]:
    """What is not in the blackout alone, from the axis' beginning on: the third panel has that, and here no room."""
    stopped, runs = line.stopped_ms, line.runs_ms
    if stopped is None or runs is None:
        return within(phases, 0.0, line.end_ms)
    kept = [phase for phase in phases if phase.start_ms < stopped or phase.end_ms > runs]
    return within(kept, 0.0, line.end_ms)


def _colours(line: Timeline) -> dict[str, str]:
    """A phase has one colour, wherever it is drawn."""
    names = dict.fromkeys(phase.name for _, phases in _sides(line) for phase in phases)
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _curves(canvas: Canvas, axis: Axis, top: float, line: Timeline) -> float:
    """A bar for each round, as high as it was fast, and the guest's dirtying as a line over them."""
    bottom = top + CURVES
    highest = max([each.rate for each in line.rounds] + [each.dirty_rate * PAGE_SIZE for each in line.rounds] + [1.0])

    def y(rate: float) -> float:
        return bottom - (CURVES - 16) * rate / highest

    for share in ticks(highest / (1 << 20)):
        height = y(share * (1 << 20))
        canvas.line([(LEFT, height), (RIGHT, height)], GRID, under=True)
        canvas.text(LEFT - 6, height + 4, f"{share:g}", anchor="end", colour=PALE)
    canvas.text(0, top + 14, "MiB/s", colour=PALE)
    canvas.text(0, top + 30, "■ sent", colour=COLOURS[0])
    canvas.text(0, top + 46, "▬ dirtied", colour=DARK)
    dirty: list[tuple[float, float]] = []
    written = -math.inf  # where the last text over a bar ended
    for each in line.rounds:
        start = each.start_ms or 0.0
        left, right, height = axis.x(start), axis.x(start + each.ms), y(each.rate)
        title = f"round {each.number}: {each.pages} pages, {each.zero_pages} of them zero, {megabytes(each.bytes)}"
        canvas.bar(left, height, right - left - 0.5, bottom - height, COLOURS[0], title)
        dirty += [(left, y(each.dirty_rate * PAGE_SIZE)), (right, y(each.dirty_rate * PAGE_SIZE))]
        text = next(
            (
                text
                for text in (f"{each.number}: {megabytes(each.bytes)}", str(each.number))
                if len(text) * CHARACTER <= max(right - left, 2 * CHARACTER)
            ),
            "",
        )
        middle = (left + right) / 2
        if text and middle - len(text) * CHARACTER / 2 > written:
            canvas.text(middle, height - 3, text, anchor="middle")
            written = middle + len(text) * CHARACTER / 2
    canvas.line(dirty, DARK, width=2)
    return bottom


def _band(canvas: Canvas, axis: Axis, top: float, bottom: float, line: Timeline) -> None:
    """Where the guest stands still, behind everything."""
    if line.stopped_ms is not None and line.runs_ms is not None:
        left = axis.x(line.stopped_ms)
        canvas.shade(left, top, axis.x(line.runs_ms) - left, bottom - top)
        canvas.text(axis.x(line.runs_ms), top, "blackout", anchor="end", colour=DARK)


def _blackout(canvas: Canvas, top: float, line: Timeline, colours: dict[str, str]) -> float:
    assert line.stopped_ms is not None
    assert line.runs_ms is not None
    heading = f"Blackout, {line.runs_ms - line.stopped_ms:.1f} ms"
    if left := line.unaccounted_ms():
        heading += f", of which {left:.1f} ms are in no phase"
    canvas.text(0, top, heading, weight="bold")
    for text, anchor, x in _stamps(line):
        canvas.text(x, top + 18, text, anchor=anchor, colour=DARK)
    axis = Axis(line.stopped_ms, line.runs_ms)
    names = ["source", *(["destination"] if line.destination else [])]
    sides = [(name, [part for side, part in line.blackout() if side == name]) for name in names]
    bottom = lanes(canvas, axis, top + 28, sides, colours)
    for ms in (line.stopped_ms, line.runs_ms):
        canvas.line([(axis.x(ms), top + 22), (axis.x(ms), bottom)], DARK, width=1.5)
    axis.draw(canvas, top + 24, bottom)
    return bottom + 30


def _stamps(line: Timeline) -> Iterator[tuple[str, str, float]]:
    """What each host's clock showed at either end."""
    if line.source.stamp_ns is not None:
        yield f"stopped {stamp_text(line.source.stamp_ns)} on {line.source.host}", "start", LEFT
    if line.destination and line.destination.stamp_ns is not None:
        yield f"runs {stamp_text(line.destination.stamp_ns)} on {line.destination.host}", "end", RIGHT
