"""`kvmpy check`: everything that can be known of a configuration without running it."""

from __future__ import annotations

import argparse

from kvmpy.cli.main import printable, tell
from kvmpy.config.schema import load, warnings
from kvmpy.config.values import size_text
from kvmpy.machine.check import check as check_config


def check(args: argparse.Namespace) -> int:
    """Report every mistake at once, or say what would be run."""
    config = load(args.config, args.set, name=args.name)
    for warning in warnings(config):
        tell(f"kvmpy: warning: {printable(warning)}")
    description = check_config(config).description
    machine = config.machine
    cpus = "1 vCPU" if machine.cpus == 1 else f"{machine.cpus} vCPUs"
    print(f"{args.config}: ok: {config.name}: {description}, {cpus}, {size_text(machine.memory)}")
    return 0
