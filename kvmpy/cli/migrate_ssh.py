"""`kvmpy migrate NAME ssh://HOST`: the destination is started there, and the stream carried by the same session.

It has the configuration that the machine has now, hot-plugged devices and all, or `--remote-config`; kernel, initrd,
disks and bridges must be there under the same names, or be overridden with `--set`. When the migration fails the
destination is ended and cleaned up after. Where nobody here can know what became of it, the session can: a destination
whose process has ended without having run the guest is proof that nobody has it, and the source goes on.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Final

from kvmpy.cli.client import Client, find
from kvmpy.cli.main import HOST_ERROR, printable, tell
from kvmpy.cli.move import CHECK_PATIENCE, UNKNOWN, Settled, check, move, parameters, tell_blockers
from kvmpy.cli.receive import ENDED, INCOMING
from kvmpy.cli.remote import Remote
from kvmpy.errors import HostError, HostProblems

OUTCOME_SECONDS: Final = 60.0  # for a destination that was told to run the guest, to do it or to end
PRIMARY_SECONDS: Final = 60.0  # for a guest to find its primaries; it runs meanwhile


def migrate(args: argparse.Namespace) -> int:
    """Start the destination, and send the machine to it."""
    running = find(args.name)
    with Client(running, CHECK_PATIENCE) as client:
        name = client("query-name")["name"]
        config = None if args.remote_config else client("query-config")["config"]
        with Remote(args.uri, ssh=args.ssh, kvmpy=args.remote_kvmpy) as remote:
            try:
                started = remote.start(name=name, config=config, file=args.remote_config, overrides=args.set)
            except HostProblems as e:
                if not args.dry_run:
                    raise
                return tell_blockers(args.name, args.uri, [*client("x-migrate-check")["problems"], *e.problems])
            tell(f"{args.uri}: {printable(started['said'])}")
            return _go(client, args, remote)


def _go(client: Client, args: argparse.Namespace, remote: Remote) -> int:
    uri, code = f"unix:{remote.stream}", HOST_ERROR
    try:
        with parameters(client, args):
            if args.dry_run:
                return check(client, args.name, uri, args.uri)
            primaries = partial(remote.primaries, PRIMARY_SECONDS)
            code = move(client, args, uri, shown=args.uri, settle=lambda: settle(remote), primaries=primaries)
            return code
    except SystemExit:  # by a signal: the machine goes on without us
        code = UNKNOWN
        raise
    finally:
        if code != UNKNOWN:  # else it may be about to run the guest
            _leave(remote, arrived=code == 0)


def settle(remote: Remote) -> Settled:
    """What the far end sees of a destination of which the source has not heard."""
    try:
        status = remote.outcome(OUTCOME_SECONDS)
    except HostError as e:
        tell(f"kvmpy: {printable(str(e))}")
        return Settled.UNKNOWN
    if status == ENDED:
        return Settled.ENDED
    return Settled.UNKNOWN if status == INCOMING else Settled.ARRIVED


def _leave(remote: Remote, *, arrived: bool) -> None:
    """Clean up there, and say so where something stays that should not. What raised before is what is reported."""
    try:
        status = remote.outcome(OUTCOME_SECONDS) if arrived else remote.end()
    except HostError as e:
        if sys.exc_info()[0] is not None or arrived:
            tell(f"kvmpy: {printable(str(e))}; look there for what may be left: {remote.directory}")
        return
    if arrived:
        tell(f"kvmpy: {remote.uri}: the guest is {status} there")
    elif status != ENDED:
        tell(f"kvmpy: {remote.uri}: the destination is {status}, and was left alone")
