"""Two commits are told apart by ranks, exactly."""

from __future__ import annotations

from itertools import combinations

import pytest

from bench.compare import report
from bench.ranks import compare, doubled_ranks, sums

# Rosner, and any table of the test: the least p of n against n runs is 2 / C(2n, n).
LEAST = {3: 2 / 20, 4: 2 / 70, 5: 2 / 252, 8: 2 / 12870}


@pytest.mark.parametrize("count", LEAST)
def test_runs_that_are_all_larger_have_the_least_p(count: int) -> None:
    found = compare([float(n) for n in range(count)], [100.0 + n for n in range(count)])
    assert found.p == pytest.approx(LEAST[count])
    assert found.superiority == 1.0


def test_a_published_example_has_its_published_p() -> None:
    # The example of scipy.stats.mannwhitneyu's documentation: ages of males and females at diagnosis; U1 = 17 of 20.
    found = compare([20.0, 11.0, 17.0, 12.0], [19.0, 22.0, 16.0, 29.0, 24.0])
    assert found.p == pytest.approx(0.1111111, abs=1e-6)
    assert found.superiority == 17 / 20


def test_the_same_runs_do_not_differ() -> None:
    assert compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (1.0, 0.5)
    assert compare([5.0] * 6, [5.0] * 6) == (1.0, 0.5)


def test_it_is_the_same_from_the_other_side() -> None:
    here, there = [3.0, 1.0, 4.0, 1.0, 5.0], [9.0, 2.0, 6.0, 5.0, 3.0, 5.0]
    one, other = compare(here, there), compare(there, here)
    assert one.p == pytest.approx(other.p)
    assert one.superiority == pytest.approx(1 - other.superiority)


def test_ties_share_their_ranks() -> None:
    assert doubled_ranks([7.0, 5.0, 7.0, 9.0]) == [5, 2, 5, 8]


def test_every_choice_is_counted() -> None:
    ranks = doubled_ranks([1.0, 2.0, 2.0, 3.0, 5.0, 5.0])
    expected: dict[int, int] = {}
    for choice in combinations(ranks, 3):
        expected[sum(choice)] = expected.get(sum(choice), 0) + 1
    assert sums(ranks, 3) == expected


def test_nothing_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], [1.0])


def test_a_report_marks_what_differs_and_names_what_one_does_not_have() -> None:
    before = [{"start": (0.1 + n / 1000, "s"), "memory": (30.0, "MiB"), "gone": (1.0, "s")} for n in range(5)]
    after = [{"start": (0.2 + n / 1000, "s"), "memory": (30.0, "MiB")} for n in range(5)]
    _, start, memory, gone = report("v1", before, after)
    assert start.split() == ["start", "102", "ms", "202", "ms", "1.980", "0.0079", "1.00", "differs"]
    assert memory.split() == ["memory", "30", "MiB", "30", "MiB", "1.000", "1", "0.50"]
    assert gone == "gone: not measured in each turn"
