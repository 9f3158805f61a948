"""The part of a migration's picture that is about failover pairs, on the axis of the phases.

Each host's primaries on their way: out of the guest before its memory is sent, in again once it runs. Below that, which
path the guest's frames took, marked where they went nowhere, and which pings came back, if somebody pinged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from kvmpy.migration.canvas import BAR, CHARACTER, COLOURS, DARK, LEFT, PALE, RIGHT, ROW, Axis, Canvas, lanes
from kvmpy.migration.primaries import DESTINATION, SOURCE, Stretch, Wait
from kvmpy.migration.report import Phase, Timeline

PATHS: Final = {"primary": COLOURS[0], "standby": COLOURS[4]}
GAP: Final = 3  # the height of a mark below the path: frames go nowhere
OUT, IN = COLOURS[5], COLOURS[2]
WORDS: Final = {
    ("leaves", "released"): "asked, let go after",
    ("leaves", "kept"): "asked, and kept after",
    ("leaves", ""): "asked, and still there after",
    ("comes", "in use"): "plugged in, in use after",
    ("comes", ""): "not yet in use after",
}


def pairs_panel(canvas: Canvas, axis: Axis, top: float, line: Timeline) -> float:
    """Draw it, if there is anything to draw; returns where it ends."""
    if line.waits or line.paths:
        canvas.text(0, top + 20, "Failover pairs", weight="bold")
        top = _ways(canvas, axis, top + 28, line)
        for name in dict.fromkeys(stretch.standby_id for stretch in line.paths):
            top = _path(canvas, axis, top, line, name)
    return _pings(canvas, axis, top, line) if line.pings else top


def _ways(canvas: Canvas, axis: Axis, top: float, line: Timeline) -> float:
    hosts = {SOURCE: line.source.host, DESTINATION: line.destination.host if line.destination else DESTINATION}
    colours: dict[str, str] = {}
    sides = []
    for side, host in hosts.items():
        bars = []
        for wait in line.waits:
            if wait.side == side:
                end = line.end_ms if wait.end_ms is None else wait.end_ms
                bars.append(Phase(name=said(wait), start_ms=wait.start_ms, ms=end - wait.start_ms))
                colours[bars[-1].name] = _colour(wait)
        if bars:
            sides.append((host, bars))
    return lanes(canvas, axis, top, sides, colours)


def said(wait: Wait) -> str:
    """What became of a primary, in words that a duration follows."""
    return f"{wait.device_id}: " + WORDS.get((wait.what, wait.outcome), f"failed ({wait.outcome[:60]}) after")


def _colour(wait: Wait) -> str:
    if (wait.what, wait.outcome) not in WORDS:
        return DARK
    return OUT if wait.what == "leaves" else IN


def _path(canvas: Canvas, axis: Axis, top: float, line: Timeline, name: str) -> float:
    canvas.text(0, top + 13, f"frames of {name}"[: int(LEFT / CHARACTER)], colour=PALE)
    for stretch in _while_it_runs(line, (each for each in line.paths if each.standby_id == name)):
        left, right = axis.x(stretch.start_ms), axis.x(stretch.end_ms)
        title = f"{name}: {stretch.path} from {stretch.start_ms:.1f} to {stretch.end_ms:.1f} ms"
        canvas.bar(left, top, right - left, BAR, PATHS.get(stretch.path, PALE), title)
        if len(stretch.path) * CHARACTER + 6 <= right - left:
            canvas.text((left + right) / 2, top + 12.5, stretch.path, anchor="middle", colour="#ffffff")
    for gap in line.gaps:
        if gap.standby_id == name:
            left, right = axis.x(max(0.0, gap.start_ms)), axis.x(min(gap.end_ms, line.end_ms))
            title = f"{name}: frames go nowhere for {gap.end_ms - gap.start_ms:.1f} ms, on the way to the {gap.path}"
            canvas.bar(left, top + BAR, right - left, GAP, DARK, title)
    return top + ROW


def _while_it_runs(line: Timeline, stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """A guest that stands still has frames on no path."""
    stopped, runs = line.stopped_ms, line.runs_ms
    for each in stretches:
        cuts = [(each.start_ms, each.end_ms)]
        if stopped is not None and runs is not None:
            cuts = [(each.start_ms, min(each.end_ms, stopped)), (max(each.start_ms, runs), each.end_ms)]
        for start, end in cuts:
            if start < end:
                yield Stretch(standby_id=each.standby_id, path=each.path, start_ms=start, end_ms=end)


def _pings(canvas: Canvas, axis: Axis, top: float, line: Timeline) -> float:
    """A stroke for each ping at the time it was sent; one that was lost is red, and longer."""
    assert line.pings
    canvas.text(0, top + 13, "pings", colour=PALE)
    for moments, colour, above in ((line.pings.answered_ms, PALE, 4), (line.pings.lost_ms, DARK, 0)):
        canvas.strokes(map(axis.x, moments), top + above, BAR - 2 * above, colour)
    canvas.text(RIGHT, top + BAR + 11, line.pings.summary(), anchor="end", colour=PALE)
    return top + ROW + 10
