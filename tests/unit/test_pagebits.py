"""Bitmaps of pages, against sets of numbers; and nothing that is marked while others take is lost."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.pagebits import PAGE, PageBits, WriteLog, pages
from tests.counts import count

EXAMPLES = count(30, 5000)
SIZES = st.integers(0, 300)


def members(bits: PageBits) -> set[int]:
    return {page for page in range(bits.size) if page in bits}


@settings(max_examples=EXAMPLES)
@given(SIZES, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400))))
def test_bits_that_are_set_are_those_of_the_runs_as_far_as_they_exist(size: int, runs: list[tuple[int, int]]) -> None:
    bits = PageBits(size)
    for first, length in runs:
        bits.set(first, length)
    assert members(bits) == {page for first, length in runs for page in range(first, first + length) if page < size}
    assert bits.count() == len(members(bits))


def test_run_of_any_length_ends_at_the_end() -> None:
    bits = PageBits(70)
    bits.set(69, (1 << 64) - 1)
    bits.set(1 << 63, 5)
    assert members(bits) == {69}


@given(SIZES)
def test_filling_sets_every_bit_and_none_behind_them(size: int) -> None:
    bits = PageBits(size)
    bits.fill()
    assert bits.count() == size
    bits.clear()
    assert bits.count() == 0


def test_merging_is_the_union() -> None:
    one, other = PageBits(200), PageBits(200)
    one.set(0, 100)
    other.set(90, 20)
    one.merge(other)
    assert members(one) == set(range(110))


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 1), (PAGE, 1), (PAGE + 1, 2)])
def test_part_of_a_page_is_a_page(size: int, expected: int) -> None:
    assert pages(size) == expected


@settings(max_examples=EXAMPLES)
@given(st.lists(st.tuples(st.integers(0, 600 * PAGE), st.integers(1, 5 * PAGE))), st.integers(0, 300), SIZES)
def test_taking_moves_a_part_of_the_log_and_leaves_the_rest(
    writes: list[tuple[int, int]], first: int, size: int
) -> None:
    log = WriteLog(600 * PAGE)
    written = set()
    for gpa, length in writes:
        log.mark(gpa, length)
        written |= set(range(gpa // PAGE, pages(gpa + length)))
    taken, again, rest = PageBits(size), PageBits(size), PageBits(600)
    log.take(first * PAGE, taken)
    log.take(first * PAGE, again)
    log.take(0, rest)
    here = {page - first for page in written if first <= page < first + size}
    assert members(taken) == here
    assert members(again) == set()
    assert members(rest) == {page for page in written if page < 600} - {page + first for page in here}


def test_nothing_that_threads_mark_is_lost_while_it_is_taken() -> None:
    size = count(20_000, 1_000_000)
    log, seen = WriteLog(size * PAGE), PageBits(size)

    def mark(start: int) -> None:  # each page once, beside the other thread's
        for page in range(start, size, 2):
            log.mark(page * PAGE, 1)

    threads = [threading.Thread(target=mark, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        log.take(0, seen)
    log.take(0, seen)
    assert seen.count() == size
