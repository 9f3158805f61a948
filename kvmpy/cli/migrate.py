"""`kvmpy migrate` and `kvmpy save`: send a machine elsewhere, or into a file. `move` then stays with it."""

from __future__ import annotations

import argparse
import os

from kvmpy.cli.client import Client, find
from kvmpy.cli.main import printable, tell
from kvmpy.cli.move import CHECK_PATIENCE, cancel, check, move, parameters
from kvmpy.errors import ConfigError, MigrationError
from kvmpy.migration.uri import parse


def migrate(args: argparse.Namespace) -> int:
    """Send ``args.name`` to ``args.uri``; or ask whether that would work, or cancel what is under way."""
    if (args.uri is None) != args.cancel:
        raise ConfigError(
            "--cancel: takes no URI"
            if args.cancel
            else "URI: where to? Such as ssh://HOST or tcp:HOST:PORT; or --cancel"
        )
    if args.cancel:
        with Client(find(args.name)) as client:
            return cancel(client, args.name)
    if args.uri.startswith("ssh:"):
        from kvmpy.cli import migrate_ssh

        return migrate_ssh.migrate(args)
    try:
        parse(args.uri)
    except MigrationError as e:
        raise ConfigError(f"URI: {e}; or ssh://HOST") from e
    if option := "--remote-config" if args.remote_config else "--set" if args.set else "":
        raise ConfigError(f"{option}: only with ssh://; elsewhere the destination's kvmpy run says what it has")
    uri = absolute(args.uri)
    with Client(find(args.name), CHECK_PATIENCE) as client, parameters(client, args):
        return check(client, args.name, uri) if args.dry_run else move(client, args, uri)


def save(args: argparse.Namespace) -> int:
    """Put the machine into a file, and end it."""
    if ",offset=" in args.file:
        raise ConfigError(f"{args.file}: ,offset= is of a URI, which kvmpy migrate takes; choose another name")
    if os.path.lexists(args.file):
        raise ConfigError(f"{args.file}: is there already; remove it, or choose another name")
    with Client(find(args.name)) as client, parameters(client, args):
        code = move(client, args, f"file:{os.path.abspath(args.file)}")
    if code == 0:
        tell(f"kvmpy: {args.name}: to go on from there: kvmpy run CONFIG --incoming file:{printable(args.file)}")
    return code


def absolute(uri: str) -> str:
    """A URI whose path is relative to our directory, for the machine, which has another."""
    kind, colon, path = uri.partition(":")
    return f"{kind}:{os.path.abspath(path)}" if colon and path and kind in ("file", "unix") else uri
