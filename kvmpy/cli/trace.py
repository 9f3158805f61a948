"""`kvmpy trace`: what a running machine's tracepoints see, until it ends or Ctrl-C."""

from __future__ import annotations

import argparse
import sys

from kvmpy.cli.client import Client, HungUp, find


def trace(args: argparse.Namespace) -> int:
    """Print each traced line."""
    with Client(find(args.name), patience=None) as client:
        matched = client("trace", name=args.glob)
        print(f"tracing {', '.join(matched)}", file=sys.stderr)
        try:
            for event in client.events():
                if event["event"] == "TRACE":
                    _print(event["data"])
        except (HungUp, KeyboardInterrupt):  # the machine has ended, or whoever watches has seen enough
            return 0
    return 0


def _print(data: dict[str, object]) -> None:
    if data["dropped"]:
        print(f"kvmpy: {data['dropped']} lines came faster than they could be sent", file=sys.stderr)
    lines = data["lines"]
    if isinstance(lines, list):
        print("\n".join(lines), flush=True)
