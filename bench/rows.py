"""The core of the measurements: kvmpy beside a peer, in turns, as a ratio with a budget.

A program of bench/ has a function ``measure(quick: bool) -> list[Row]``. It runs kvmpy and its peer alternately with
`alternately`, and makes a row of each figure with `Pair`. The ratio is the median of the pairs' ratios, each of two
runs next to each other, which share whatever else the machine did; it need not be that of the two medians beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Final

import msgspec

from bench.budgets import BUDGETS, Budget
from bench.figures import Figure

QEMU: Final = "QEMU"
KVMPY: Final = "kvmpy"
MET, MISSED, UNBUDGETED = "met", "missed", "-"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of kvmpy's, its peer's (medians), and their ratio.

    ``spread`` is the quartiles of the pairs' ratios, ``samples`` what was measured, by who.
    """

    name: str
    kvmpy: float
    peer: float
    ratio: float
    unit: str
    budget: float | None = None
    bound: str = ""
    peer_name: str = QEMU
    spread: tuple[float, float] | None = None
    note: str = ""
    samples: Mapping[str, Sequence[float]] = {}
    figure: Figure | None = None

    @property
    def verdict(self) -> str:
        """Whether the budget is met; "-" where there is none."""
        if self.budget is None:
            return UNBUDGETED
        return MET if Budget(self.budget, self.bound).allows(self.ratio) else MISSED


@dataclass(frozen=True)
class Pair:
    """What was measured of one figure: kvmpy's runs and its peer's, of which those with the same index are a pair.

    ``budget`` is a name in `BUDGETS`; None where the figure has none.
    """

    name: str
    kvmpy: Sequence[float]
    peer: Sequence[float]
    unit: str = "s"
    budget: str | None = None
    peer_name: str = QEMU
    note: str = ""
    figure: Figure | None = None

    def row(self) -> Row:
        """As a row of the table. Raises ValueError where either side was not measured, or a run has no pair."""
        if not self.kvmpy or not self.peer:
            raise ValueError(f"{self.name}: nothing was measured")
        budget = BUDGETS[self.budget] if self.budget else None
        ratios = [quotient(*pair) for pair in zip(self.kvmpy, self.peer, strict=True)]
        if any(map(math.isnan, ratios)) or (budget and not all(self.peer)):
            ratios = [math.nan]  # a pair that failed is not outvoted by the others, and beside nothing nothing is met
        return Row(
            name=self.name,
            kvmpy=median(self.kvmpy),
            peer=median(self.peer),
            ratio=median(ratios),
            unit=self.unit,
            budget=budget.limit if budget else None,
            bound=budget.bound if budget else "",
            peer_name=self.peer_name,
            spread=spread(ratios),
            note="; ".join(filter(None, (self.note, undecided(ratios, budget)))),
            samples={KVMPY: list(self.kvmpy), self.peer_name: list(self.peer)},
            figure=self.figure,
        )


def quotient(ours: float, theirs: float) -> float:
    """``ours`` / ``theirs``; against nothing it is one where both are nothing, else no number."""
    if theirs:
        return ours / theirs
    return float("nan") if ours else 1.0


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """The quartiles; None of a single value."""
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def undecided(ratios: Sequence[float], budget: Budget | None) -> str:
    """What there is to say of a verdict that another run might turn round."""
    if budget is None:
        return ""
    if any(map(math.isnan, ratios)):
        return "nothing was measured"
    if len(ratios) < 2:
        return "one pair"
    low, high = spread(ratios) or (ratios[0], ratios[0])
    return "undecided: the quartiles lie on both sides" if budget.allows(low) != budget.allows(high) else ""


Way = Callable[[], Mapping[str, float]]
"""One run: its figures, by name."""


def alternately(ways: Mapping[str, Way], rounds: int) -> dict[str, dict[str, list[float]]]:
    """What each way's runs found, by way and figure. They take turns, and who goes first does, too."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            for figure, value in ways[name]().items():
                found[name].setdefault(figure, []).append(value)
    return found
