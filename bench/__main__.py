"""`make bench`: kvmpy beside its peers, all that bench/ measures; prints the table, and writes bench/results/.

Each program is a module of bench/ with ``measure(quick: bool) -> list[Row]`` and, where a quick run leaves something
out, ``LEFT_OUT``, which says what. A program that fails is said at the end, and with the results; the others' rows are
kept. What is not all of it, `--quick` and `--only`, has a directory of its own, so that it replaces nothing.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final

from bench import results
from bench.facts import facts
from bench.page import page
from bench.rows import Row
from kvmpy.errors import HostError
from kvmpy.kvm.system import System

PROGRAMS: Final = (
    *("exits", "migrating_exits", "start", "memory", "pages", "migration"),
    *("boot", "linux_memory", "network", "disk", "linux_moves", "hotplug", "failover"),
)
"""In the order in which they are run: those that need no emulated host first."""
KVM_HERE: Final = ("exits", "migrating_exits", "start", "memory", "migration")
"""Those that run guests on this machine's own KVM."""
PAGE: Final = "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all programs have run."""
    options = _options(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    warnings = Warnings()
    logging.getLogger("bench").addHandler(warnings)
    rows: list[Row] = []
    programs, failed = options.only or PROGRAMS, without_kvm(options.only or PROGRAMS)
    directory = results.RESULTS / ("quick" if options.quick else "part" if options.only else "")
    for name in programs:
        if name in failed:
            continue
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            rows += import_module(f"bench.{name}").measure(options.quick)
        except Exception:  # noqa: BLE001  what the others measure in an hour is not lost with it
            traceback.print_exc()
            failed[name] = "it has failed, see above"
        print(f"bench: {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        known = facts() | what_it_is(options.quick, programs, failed, warnings.said)
        results.write(rows, known, directory)
        (directory / PAGE).write_text(page(rows, known), encoding="utf-8")
    if rows:
        print((directory / results.TABLE).read_text() + f"with plots: {directory / PAGE}")
    for name, why in failed.items():
        print(f"bench: {name} was not measured: {why}", file=sys.stderr)
    return int(bool(failed))


def without_kvm(programs: Sequence[str]) -> dict[str, str]:
    """Those that cannot run here, and why."""
    try:
        System().close()
    except HostError as e:
        return {name: str(e) for name in programs if name in KVM_HERE}
    return {}


class Warnings(logging.Handler):
    """Keeps what programs have warned of: what they left out, for this machine has not what it takes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def what_it_is(
    quick: bool, programs: Sequence[str], failed: Mapping[str, str], warned: Sequence[str]
) -> dict[str, str]:
    """What goes with the facts: how much of it was measured."""
    modules = [import_module(f"bench.{name}") for name in programs] if quick else []
    left_out = [*(what for module in modules for what in getattr(module, "LEFT_OUT", ())), *warned]
    said = {
        "run": ", ".join(programs) + " (quick)" * quick,
        "left out": "; ".join(left_out),
        "FAILED": ", ".join(failed),
    }
    return {name: text for name, text in said.items() if text}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure kvmpy beside QEMU.")
    parser.add_argument("--quick", action="store_true", help="under five minutes; says what it leaves out")
    parser.add_argument("--only", action="append", choices=PROGRAMS, metavar="PROGRAM", help=", ".join(PROGRAMS))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
