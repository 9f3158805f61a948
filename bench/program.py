"""What a program of bench/ is when it is run by itself: `python -m bench.NAME [--quick]`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

from bench.facts import facts
from bench.results import facts_text, table
from bench.rows import Row

Measure = Callable[[bool], list[Row]]


def main(name: str, measure: Measure) -> None:
    """Measure and print; nothing is written."""
    parser = argparse.ArgumentParser(prog=f"bench.{name}", description=f"Measure {name}: kvmpy beside its peer.")
    parser.add_argument("--quick", action="store_true", help="fewer runs, and only what takes a minute or so")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    rows = measure(options.quick)
    print("\n".join([*facts_text(facts()), "", *table(rows)]))
