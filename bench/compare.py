"""`python -m bench.compare REV [PROGRAM...]`: what has become slower or faster since a commit, told by a rank test.

Both commits are measured by the same programs, this checkout's: REV's kvmpy is checked out into a worktree of its own,
which gets a copy of bench/, and built there. Turns alternate, each in processes of its own, and a turn's figure is one
sample: kvmpy's, not the ratio, for QEMU is the same in both. A difference is said where chance alone would rarely
bring it about (p), with its size: the medians' quotient, and the chance that a run of ours is larger than one of REV's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.installed import CHECKOUT
from bench.ranks import compare
from bench.results import as_json, figure

PROGRAMS: Final = ("exits", "migrating_exits", "start", "memory", "pages", "migration")
"""Those without an emulated host, whose kvmpy is this checkout's in any case."""
LEAST: Final = 5
"""Turns: with fewer p is never as small."""
SIGNIFICANT: Final = 0.01
"""Of some forty rows, one in two or three runs says so with no reason."""
TURNS: Final = 8
GIT: Final = ("git", "-C", str(CHECKOUT))
Figures = Mapping[str, tuple[float, str]]
"""What a turn found, by the name of the row, and its unit."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.turn:
        rows = [row for name in options.program for row in import_module(f"bench.{name}").measure(True)]
        print(json.dumps([as_json(row) for row in rows]))
        return 0
    with worktree(options.rev) as there:
        found = alternate(there, options.program or ["exits", "start"], options.turns)
    print("\n".join(report(options.rev, *found)))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.compare", description="Compare this checkout with another commit.")
    parser.add_argument("rev", metavar="REV", help="a commit, as git names it")
    parser.add_argument("program", nargs="*", metavar="PROGRAM", help=f"{', '.join(PROGRAMS)}; default: exits start")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each of the two")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.program if name not in PROGRAMS]:
        parser.error(f"{unknown[0]}: expected one of {', '.join(PROGRAMS)}")
    if options.turns < LEAST:
        parser.error(f"--turns: at least {LEAST}: with fewer nothing can be told from chance")
    known = subprocess.run([*GIT, "rev-parse", "--verify", "--quiet", f"{options.rev}^{{commit}}"], capture_output=True)
    if known.returncode:
        parser.error(f"{options.rev}: is no commit here")
    return options


@contextmanager
def worktree(rev: str) -> Iterator[Path]:
    """A checkout of ``rev``, built, with this one's bench/ and what that uses of tests/ and scripts/."""
    with tempfile.TemporaryDirectory() as directory:
        there = Path(directory) / "rev"
        git = (*GIT, "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(there), rev], check=True)
        try:
            for name in ("bench", "tests/fakes", "scripts"):
                shutil.rmtree(there / name, ignore_errors=True)
                shutil.copytree(CHECKOUT / name, there / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=there, check=True)
            yield there
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)


def alternate(there: Path, programs: Sequence[str], turns: int) -> tuple[list[Figures], list[Figures]]:
    """What each of the two found in each turn, ours second."""
    found: tuple[list[Figures], list[Figures]] = [], []
    for number in range(turns):
        for which in (0, 1) if number % 2 else (1, 0):
            print(f"compare: turn {number + 1}, {'here' if which else 'there'}", file=sys.stderr, flush=True)
            found[which].append(turn(CHECKOUT if which else there, programs))
    return found


def turn(checkout: Path, programs: Sequence[str]) -> Figures:
    command = [sys.executable, "-m", "bench.compare", "--turn", "HEAD", *programs]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return {row["name"]: (row["kvmpy"], row["unit"]) for row in rows if row["kvmpy"] is not None}


def report(rev: str, before: Sequence[Figures], after: Sequence[Figures]) -> Iterator[str]:
    """A line for each row that both have in each turn, those that differ marked; and the names of the others."""
    names = [name for name in after[0] if all(name in each for each in (*before, *after))]
    width = max([len(name) for name in names] + [20])
    yield f"{'':<{width}} {rev[:12]:>12} {'here':>12} {'quotient':>9} {'p':>9} {'larger':>7}"
    for name in names:
        theirs, ours = ([each[name][0] for each in side] for side in (before, after))
        unit = after[0][name][1]
        was, now, found = median(theirs), median(ours), compare(theirs, ours)
        quotient = f"{now / was:.3f}" if was else "-"
        yield (
            f"{name:<{width}} {figure(was, unit):>12} {figure(now, unit):>12} {quotient:>9} {found.p:>9.2g}"
            f" {found.superiority:>7.2f}" + ("  differs" if found.p < SIGNIFICANT else "")
        )
    yield from (f"{name}: not measured in each turn" for name in sorted({*before[0], *after[0]} - {*names}))


if __name__ == "__main__":
    sys.exit(main())
