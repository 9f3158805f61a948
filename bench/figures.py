"""What a row can show beside its numbers: curves, or bars made of parts. bench/drawing.py draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class Curves(msgspec.Struct, frozen=True, tag="curves"):
    """Lines on two axes, each by its name."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False


class Stack(msgspec.Struct, frozen=True, tag="stack"):
    """Bars, each by its name, and its parts by theirs, one after the other from zero on."""

    title: str
    unit: str
    bars: Mapping[str, Mapping[str, float]]


Figure = Curves | Stack


def distribution(values: Sequence[float], points: int = 60) -> list[tuple[float, float]]:
    """How ``values`` are spread: (value, per cent of them that are no more), dense where the tail is."""
    ordered = sorted(values)
    last = len(ordered) - 1
    shares = [1 - 10 ** (-4 * n / points) for n in range(points)] + [1.0]
    return [(ordered[min(int(share * len(ordered)), last)], 100 * share) for share in shares]
