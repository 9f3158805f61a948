"""The picture of a migration: an SVG of three panels, with nothing in it that has to be loaded.

The first has the phases of both hosts as bars on one time axis, the second the rounds on the same axis: what was sent
in a second, and what the guest dirtied in a second. Where the second curve is below the first, the migration converges.
The third is the blackout, drawn large: from the last guest instruction here to the first one there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvmpy.migration.report import PAGE_SIZE, Phase, Timeline, markup, megabytes, stamp_text, within

WIDTH: Final = 1000
LEFT: Final = 120
RIGHT: Final = WIDTH - 40
CHARACTER: Final = 6.6  # of the font, on average
ROW: Final = 24
BAR: Final = 17
CURVES: Final = 150  # the height of the second panel
TICKS: Final = 8
LEAST_BAR: Final = 1.5  # what is too short to be seen is drawn that wide
LEAST_GAP: Final = 4.0

Point = tuple[float, float]
COLOURS: Final = ("#4c78a8", "#72b7b2", "#54a24b", "#b279a2", "#f58518", "#9d755d", "#79706e", "#a3811f")
INK, PALE, GRID, DARK = "#1f2328", "#656d76", "#e3e7ec", "#d1242f"
FONT: Final = "font-family='DejaVu Sans,Verdana,sans-serif' font-size='11'"


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
    top = _lanes(
        canvas, axis, top + 8, [(host, _before_blackout(line, phases)) for host, phases in _sides(line)], colours
    )
    if line.rounds:
        canvas.text(0, top + 20, "Rounds", weight="bold")
        top = _curves(canvas, axis, top + 28, line)
    axis.draw(canvas, begin - 4, top)
    _band(canvas, axis, begin - 4, top, line)
    top += 44
    if line.stopped_ms is not None and line.runs_ms is not None:
        top = _blackout(canvas, top, line, colours)
    return canvas.finish(top)


@dataclass
class Canvas:
    """Elements, the last on top."""

    parts: list[str] = field(default_factory=list)
    under: list[str] = field(default_factory=list)  # what all others are drawn over

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        colour: str = INK,
        size: int = 11,
        weight: str = "",
    ) -> None:
        style = f" font-size='{size}'" * (size != 11) + f" font-weight='{weight}'" * bool(weight)
        self.parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}'{style}>{markup(text)}</text>"
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str, title: str) -> None:
        self.parts.append(
            f"<rect x='{x:.2f}' y='{y:.1f}' width='{max(width, LEAST_BAR):.2f}' height='{height:.1f}' fill='{colour}'>"
            f"<title>{markup(title)}</title></rect>"
        )

    def line(
        self, points: Iterable[tuple[float, float]], colour: str, *, under: bool = False, width: float = 1
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        element = f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'/>"
        (self.under if under else self.parts).append(element)

    def shade(self, x: float, y: float, width: float, height: float) -> None:
        self.under.append(
            f"<rect x='{x:.2f}' y='{y:.1f}' width='{max(width, LEAST_BAR):.2f}' height='{height:.1f}' "
            f"fill='{DARK}' fill-opacity='0.15'/>"
        )

    def finish(self, height: float) -> str:
        body = "\n".join([*self.under, *self.parts])
        size = f"width='{WIDTH}' height='{height:.0f}' viewBox='0 0 {WIDTH} {height:.0f}'"
        ground = f"<rect width='{WIDTH}' height='{height:.0f}' fill='#ffffff'/>"
        return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT}>\n{ground}\n{body}\n</svg>"


class Axis:
    """Milliseconds across the picture."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin, self.end = begin, max(end, begin + 1e-3)

    def x(self, ms: float) -> float:
        return LEFT + (RIGHT - LEFT) * (ms - self.begin) / (self.end - self.begin)

    def draw(self, canvas: Canvas, top: float, bottom: float) -> None:
        """Grid lines, and their times below."""
        length = self.end - self.begin
        unit, name = (1000.0, "s") if length >= 2000 else (1.0, "ms")
        for value in ticks(length):
            x = self.x(self.begin + value)
            canvas.line([(x, top), (x, bottom)], GRID, under=True)
            canvas.text(x, bottom + 14, f"{value / unit:g} {name}", anchor="middle", colour=PALE)


def ticks(length: float) -> list[float]:
    """Round numbers from 0 to ``length``, some `TICKS` of them."""
    rough = length / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(step * number, 9) for number in range(int(length / step) + 1)]


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


def _lanes(
    canvas: Canvas, axis: Axis, top: float, sides: Sequence[tuple[str, Sequence[Phase]]], colours: dict[str, str]
) -> float:
    """Each side's phases, in as many rows as keep bars and their names apart; returns where they end."""
    for host, phases in sides:
        canvas.text(0, top + 13, host[: int(LEFT / CHARACTER) - 1], colour=PALE)
        rows: list[list[tuple[float, float]]] = []
        for phase in phases:
            placed = Label.place(axis, phase)
            row = next((n for n, taken in enumerate(rows) if placed.fits(taken)), len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(placed.extent)
            placed.draw(canvas, top + row * ROW, colours[phase.name])
        top += max(len(rows), 1) * ROW + 6
    return top


@dataclass(frozen=True)
class Label:
    """A phase's bar and its name: inside where it fits, else beside."""

    begin: float
    end: float
    text: str
    anchor: str
    at: float
    colour: str
    title: str

    @classmethod
    def place(cls, axis: Axis, phase: Phase) -> Label:
        begin, end = axis.x(phase.start_ms), axis.x(phase.end_ms)
        title = f"{phase.name}: {phase.ms:.2f} ms from {phase.start_ms:.2f} ms on"
        text = f"{phase.name} {_short(phase.ms)}"
        width = len(text) * CHARACTER
        if width + 6 <= end - begin:
            return cls(begin, end, text, "middle", (begin + end) / 2, "#ffffff", title)
        if end + width + 5 <= RIGHT:
            return cls(begin, end, text, "start", end + 4, INK, title)
        return cls(begin, end, text, "end", begin - 4, INK, title)

    @property
    def extent(self) -> tuple[float, float]:
        """What they take of a row."""
        width = len(self.text) * CHARACTER
        begin = {"start": self.begin, "middle": self.begin, "end": self.at - width}[self.anchor]
        return begin, max(self.end, self.at + width if self.anchor == "start" else 0.0, self.begin + LEAST_BAR)

    def fits(self, taken: Iterable[tuple[float, float]]) -> bool:
        begin, end = self.extent
        return all(end + LEAST_GAP <= first or last + LEAST_GAP <= begin for first, last in taken)

    def draw(self, canvas: Canvas, top: float, colour: str) -> None:
        canvas.bar(self.begin, top, self.end - self.begin, BAR, colour, self.title)
        canvas.text(self.at, top + 12.5, self.text, anchor=self.anchor, colour=self.colour)


def _short(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.1f} ms"


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
    bottom = _lanes(canvas, axis, top + 28, sides, colours)
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
