"""A figure as SVG, with the elements that the picture of a migration is drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from bench.figures import Curves, Figure, Stack
from kvmpy.migration.canvas import BAR, CHARACTER, COLOURS, GRID, LEFT, PALE, RIGHT, ROW, Canvas, ticks

HEIGHT: Final = 200
TOP: Final = 30
LEAST: Final = 1e-9
Scale = Callable[[float], float]


def draw(figure: Figure) -> str:
    """One SVG element."""
    return _curves(figure) if isinstance(figure, Curves) else _stack(figure)


def _curves(figure: Curves) -> str:
    canvas = Canvas()
    canvas.text(0, 14, figure.title, size=13, weight="bold")
    points = [point for line in figure.lines.values() for point in line]
    if not points:
        canvas.text(LEFT, TOP + 14, "nothing was measured", colour=PALE)
        return canvas.finish(TOP + ROW)
    bottom = TOP + HEIGHT
    highest = max(max(y for _, y in points), LEAST)
    across = _across([x for x, _ in points], canvas, bottom, is_log=figure.log_x)
    for value in ticks(highest):
        y = bottom - HEIGHT * value / highest
        canvas.line([(LEFT, y), (RIGHT, y)], GRID, under=True)
        canvas.text(LEFT - 6, y + 4, f"{value:g}", anchor="end", colour=PALE)
    for number, (name, line) in enumerate(figure.lines.items()):
        colour = COLOURS[number * 4 % len(COLOURS)]
        canvas.text(0, TOP + 14 + 16 * number, f"▬ {name}", colour=colour)
        canvas.line([(across(x), bottom - HEIGHT * y / highest) for x, y in line], colour, width=1.5)
    canvas.text(RIGHT, bottom + 30, f"{figure.x}; upward: {figure.y}", anchor="end", colour=PALE)
    return canvas.finish(bottom + 40)


def _across(xs: Sequence[float], canvas: Canvas, bottom: float, *, is_log: bool) -> Scale:
    """Where an x is, and the axis drawn: of decades, each with its 2 and 5, or of round steps from 0 on."""
    if is_log:
        first, last = math.log10(max(min(xs), LEAST)), math.log10(max(*xs, 10 * LEAST))
        decades = range(math.floor(first), math.ceil(last) + 1)
        marks = [step * 10.0**power for power in decades for step in (1, 2, 5)]
    else:
        first, last = 0.0, max(*xs, LEAST)
        marks = ticks(last)
    length = max(last - first, LEAST)

    def across(x: float) -> float:
        value = math.log10(max(x, LEAST)) if is_log else x
        return LEFT + (RIGHT - LEFT) * (value - first) / length

    for mark in marks:
        if LEFT - 0.5 <= (x := across(mark)) <= RIGHT + 0.5:
            canvas.line([(x, TOP), (x, bottom)], GRID, under=True)
            canvas.text(x, bottom + 14, f"{mark:g}", anchor="middle", colour=PALE)
    return across


def _stack(figure: Stack) -> str:
    canvas = Canvas()
    canvas.text(0, 14, figure.title, size=13, weight="bold")
    longest = max([sum(parts.values()) for parts in figure.bars.values()] + [LEAST])
    names = dict.fromkeys(part for parts in figure.bars.values() for part in parts)
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    bottom = TOP + len(figure.bars) * ROW
    for value in ticks(longest):
        x = LEFT + (RIGHT - LEFT) * value / longest
        canvas.line([(x, TOP), (x, bottom)], GRID, under=True)
        canvas.text(x, bottom + 14, f"{value:g} {figure.unit}", anchor="middle", colour=PALE)
    for number, (name, parts) in enumerate(figure.bars.items()):
        top, left = TOP + number * ROW, float(LEFT)
        canvas.text(0, top + 13, name)
        for part, value in parts.items():
            width = (RIGHT - LEFT) * value / longest
            canvas.bar(left, top, width, BAR, colours[part], f"{part}: {value:.3g} {figure.unit}")
            left += width
    return canvas.finish(_legend(canvas, bottom + 36, colours))


def _legend(canvas: Canvas, top: float, colours: dict[str, str]) -> float:
    """The names of the parts, in as many lines as they take; returns where they end."""
    left = float(LEFT)
    for name, colour in colours.items():
        width = (len(name) + 4) * CHARACTER
        if left + width > RIGHT and left > LEFT:
            left, top = float(LEFT), top + 16
        canvas.text(left, top, f"■ {name}", colour=colour)
        left += width
    return top + 12
