"""What the picture of a migration is drawn with: an SVG's elements, an axis of time, and bars with their names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from kvmpy.migration.report import Phase, markup

WIDTH: Final = 1000
LEFT: Final = 120
RIGHT: Final = WIDTH - 40
CHARACTER: Final = 6.6  # of the font, on average
ROW: Final = 24
BAR: Final = 17
TICKS: Final = 8
LEAST_BAR: Final = 1.5  # what is too short to be seen is drawn that wide
LEAST_GAP: Final = 4.0

Point = tuple[float, float]
COLOURS: Final = ("#4c78a8", "#72b7b2", "#54a24b", "#b279a2", "#f58518", "#9d755d", "#79706e", "#a3811f")
INK, PALE, GRID, DARK = "#1f2328", "#656d76", "#e3e7ec", "#d1242f"
FONT: Final = "font-family='DejaVu Sans,Verdana,sans-serif' font-size='11'"


class Canvas(msgspec.Struct):
    """Elements, the last on top."""

    parts: list[str] = msgspec.field(default_factory=list)
    under: list[str] = msgspec.field(default_factory=list)  # what all others are drawn over

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

    def strokes(self, xs: Iterable[float], y: float, height: float, colour: str) -> None:
        """An upright stroke at each of ``xs``; one element for all."""
        if path := "".join(f"M{x:.1f} {y:.1f}v{height:.1f}" for x in xs):
            self.parts.append(f"<path d='{path}' fill='none' stroke='{colour}' stroke-width='1'/>")

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


class Label(msgspec.Struct, frozen=True):
    """A phase's bar and its name: inside where it fits, else beside."""

    begin: float
    end: float
    text: str
    anchor: str
    at: float
    colour: str
    title: str

    @classmethod
    def place(cls, axis: Axis, name: str, start_ms: float, ms: float) -> Label:
        begin, end = axis.x(start_ms), axis.x(start_ms + ms)
        title = f"{name}: {ms:.2f} ms from {start_ms:.2f} ms on"
        text = f"{name} {short(ms)}"
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


def short(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.1f} ms"


def lanes(
    canvas: Canvas, axis: Axis, top: float, sides: Sequence[tuple[str, Sequence[Phase]]], colours: dict[str, str]
) -> float:
    """Each side's phases, in as many rows as keep bars and their names apart; returns where they end."""
    for host, phases in sides:
        canvas.text(0, top + 13, host[: int(LEFT / CHARACTER) - 1], colour=PALE)
        rows: list[list[tuple[float, float]]] = []
        for phase in phases:
            placed = Label.place(axis, phase.name, phase.start_ms, phase.ms)
            row = next((n for n, taken in enumerate(rows) if placed.fits(taken)), len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(placed.extent)
            placed.draw(canvas, top + row * ROW, colours[phase.name])
        top += max(len(rows), 1) * ROW + 6
    return top
