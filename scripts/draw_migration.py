"""Draws a migration's report (`kvmpy migrate --report FILE.json`) anew, with the pings that somebody sent meanwhile.

    python -m scripts.draw_migration there.json --pings there.pings there.html there.svg

A log of pings has a line of JSON for each (kvmpy/migration/pings.py says what); scripts/lab/pinger.py writes one. The
clocks of the pinger and of the migration's source must agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from kvmpy.cli.reports import KINDS
from kvmpy.migration.pings import read
from kvmpy.migration.report import Timeline, from_json


def with_pings(line: Timeline, log: str) -> Timeline:
    """The same, with what a pinger's log says. Raises ValueError."""
    if line.begin_ns is None:
        raise ValueError("the report does not say when the guest stood still, so there is no place for pings")
    return msgspec.structs.replace(line, pings=read(log.splitlines(), line.begin_ns, line.end_ms))


def main(arguments: list[str] | None = None) -> int:
    """0 where all are drawn; 1 where a file makes no sense."""
    parser = argparse.ArgumentParser(prog="scripts.draw_migration", description="Draw a migration's report anew.")
    parser.add_argument("report", type=Path, help="what kvmpy migrate --report FILE.json wrote")
    parser.add_argument("--pings", type=Path, help="a log of the pings that were sent meanwhile")
    parser.add_argument("picture", type=Path, nargs="+", help="FILE.html, FILE.svg or FILE.json")
    options = parser.parse_args(arguments)
    if unknown := [path for path in options.picture if path.suffix not in KINDS]:
        parser.error(f"{unknown[0]}: expected a name that ends in {', '.join(KINDS)}")
    try:
        line = from_json(options.report.read_bytes())
        if options.pings:
            line = with_pings(line, options.pings.read_text())
        for path in options.picture:
            path.write_text(KINDS[path.suffix](line), encoding="utf-8")
    except (ValueError, OSError) as e:
        print(f"draw_migration: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
