"""The Mann-Whitney U test of 1947, exact with ties: whether two sets of runs differ, whatever they are like.

Written out, because it is this short: the exact distribution of a sum of ranks is counted, which for the few runs that
are made here needs no approximation. scipy.stats.mannwhitneyu has the same (method="exact", without ties) for 100 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """``p`` is two-sided; ``superiority`` the chance that a run of the second is larger than one of the first, 0 to 1.

    That is the effect's size: 0.5 where they are alike, ties counted half.
    """

    p: float
    superiority: float


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Raises ValueError where either is empty."""
    if not first or not second:
        raise ValueError("nothing to compare")
    doubled = doubled_ranks([*first, *second])
    total = sum(doubled[len(first) :])
    ways = sums(doubled, len(second))
    mean = sum(doubled) * len(second) / len(doubled)
    as_far = sum(number for at, number in ways.items() if abs(at - mean) >= abs(total - mean) - 1e-9)
    least = len(second) * (len(second) + 1)  # doubled
    superiority = (total - least) / 2 / (len(first) * len(second))
    return Comparison(as_far / sum(ways.values()), superiority)


def doubled_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each, so that the mean rank of ties is whole."""
    ordered = sorted(values)
    first = {value: at for at, value in reversed(list(enumerate(ordered)))}
    last = {value: at for at, value in enumerate(ordered)}
    return [first[value] + last[value] + 2 for value in values]


def sums(ranks: Sequence[int], count: int) -> dict[int, int]:
    """How many choices of ``count`` of ``ranks`` have each sum."""
    chosen: list[dict[int, int]] = [{0: 1}, *({} for _ in range(count))]
    for rank in ranks:
        for size in range(count, 0, -1):
            for total, ways in chosen[size - 1].items():
                chosen[size][total + rank] = chosen[size].get(total + rank, 0) + ways
    return chosen[count]
