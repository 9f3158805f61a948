"""`make bench`: kvmpy beside its peers, all that bench/ measures; prints the table, and writes bench/results/.

Each program is a module of bench/ with ``measure(quick: bool) -> list[Row]`` and, where a quick run leaves something
out, ``LEFT_OUT``, which says what. A program that fails is said at the end, and the others' rows are kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from bench import results
from bench.facts import facts
from bench.page import page
from bench.rows import Row

PROGRAMS: Final = (
    *("exits", "migrating_exits", "start", "memory", "pages", "migration"),
    *("boot", "linux_memory", "network", "disk", "linux_moves", "hotplug", "failover"),
)
"""In the order in which they are run: those that need no emulated host first."""
PAGE: Final = "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all programs have run."""
    options = _options(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    rows: list[Row] = []
    failed: list[str] = []
    for name in options.only or PROGRAMS:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            rows += import_module(f"bench.{name}").measure(options.quick)
        except Exception:  # noqa: BLE001  what the others measure in an hour is not lost with it
            traceback.print_exc()
            failed.append(name)
        print(f"bench: {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        results.write(rows, facts())
        (results.RESULTS / PAGE).write_text(page(rows, facts()), encoding="utf-8")
    print((results.RESULTS / results.TABLE).read_text() + f"with plots: {results.RESULTS / PAGE}")
    if options.quick:
        _say_left_out(options.only or PROGRAMS)
    for name in failed:
        print(f"bench: {name} has failed", file=sys.stderr)
    return int(bool(failed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure kvmpy beside QEMU.")
    parser.add_argument("--quick", action="store_true", help="under five minutes; says what it leaves out")
    parser.add_argument("--only", action="append", choices=PROGRAMS, metavar="PROGRAM", help=", ".join(PROGRAMS))
    return parser.parse_args(arguments)


def _say_left_out(programs: Sequence[str]) -> None:
    left_out = [what for name in programs for what in getattr(import_module(f"bench.{name}"), "LEFT_OUT", ())]
    if left_out:
        print("left out, for it takes longer: " + "; ".join(left_out))


if __name__ == "__main__":
    sys.exit(main())
