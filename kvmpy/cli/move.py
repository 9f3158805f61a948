"""Tell a machine to go, and stay with it until it is there or back here: for `kvmpy migrate` and `kvmpy save`.

Ctrl-C and SIGTERM cancel, and then wait: the command does not end before the guest runs again, or is where it should
be. The machine does the migration, not this process; even if that is killed, it goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from typing import Any, Final

from kvmpy.cli.client import GREETING_PATIENCE, Client, HungUp, find
from kvmpy.cli.main import printable, tell
from kvmpy.cli.primaries import Ask, arrival, awaited
from kvmpy.cli.progress import Progress, progress
from kvmpy.cli.reports import Reports
from kvmpy.errors import HostError
from kvmpy.host.terminal import heeded

# Exit codes beyond those that all commands have (docs/exit-codes.md)
BLOCKED: Final = 4
CANCELLED: Final = 5
UNKNOWN: Final = 6

POLL_SECONDS: Final = 0.25
# For the source to have its guest again: disks are locked and the dirty log is given up meanwhile.
RETURN_SECONDS: Final = 60.0
# A dry run compares two machines over the network, perhaps a slow one.
CHECK_PATIENCE: Final = 120.0
FINAL: Final = frozenset({"completed", "failed", "cancelled"})
OUTCOME_UNKNOWN: Final = "outcome unknown"  # how the machine's error begins then
NOT_YET: Final = ("none", "")


class Settled(Enum):
    """What has become of a destination that was told to run the guest."""

    ARRIVED = "it has the guest"
    ENDED = "its process has ended"
    UNKNOWN = "nobody can say"


@contextmanager
def parameters(client: Client, args: argparse.Namespace) -> Iterator[None]:
    """Within, the machine has what the options say; after that what it had, if it has stayed: none but this migration
    is to do without encryption because this one may.
    """
    if not (wanted := _wanted(args)):
        yield
        return
    before = client("query-migrate-parameters")
    capabilities = [each for each in client("query-migrate-capabilities") if each["capability"] == "multifd"]

    def put_back(raised: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as stack:
            if raised is SystemExit:  # by a signal, and the session may be in the middle of an answer
                stack.enter_context(suppress(HostError))
                session = stack.enter_context(Client(find(args.name), GREETING_PATIENCE))
            else:
                stack.enter_context(suppress(HungUp))  # it has gone
                session = client
            session("migrate-set-parameters", **{name: before[name] for name in wanted})
            if args.channels is not None:
                session("migrate-set-capabilities", capabilities=capabilities)

    with ExitStack() as undo:
        undo.push(put_back)
        client("migrate-set-parameters", **wanted)
        if args.channels is not None:
            multifd = {"capability": "multifd", "state": args.channels > 0}
            client("migrate-set-capabilities", capabilities=[multifd])
        yield


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    """The migration parameters that the options say."""
    wanted = {
        "max-bandwidth": args.max_bandwidth,
        "downtime-limit": args.downtime_limit,
        "multifd-channels": args.channels,
        "multifd-compression": args.compression,
        "tls-creds": args.tls_creds and os.path.abspath(args.tls_creds),
        "tls-hostname": args.tls_hostname,
        "x-timeout": args.timeout,
        "x-insecure": args.insecure or None,
        "x-on-no-convergence": args.on_no_convergence,
        "x-unplug-timeout": None if args.unplug_timeout is None else max(1, round(args.unplug_timeout * 1000)),
        "x-prepare-timeout": None if args.prepare_timeout is None else max(1, round(args.prepare_timeout * 1000)),
        "x-on-unplug-timeout": args.on_unplug_timeout,
        "x-primaries": args.primaries,
        "x-release-primaries": args.release_primaries or None,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def check(client: Client, name: str, uri: str, shown: str | None = None) -> int:
    """Ask both sides, and print everything that stands in the way of going to ``uri``, which is called ``shown``."""
    answer = client("x-migrate-check", uri=uri)
    return tell_blockers(name, shown or uri, answer["problems"], answer["warnings"])


def tell_blockers(name: str, uri: str, blockers: Sequence[object], warnings: Sequence[object] = ()) -> int:
    """Print all that stands in the way, if anything does; returns the exit code."""
    for blocker in blockers:
        print(printable(str(blocker)))
    for warning in warnings:
        tell(f"kvmpy: warning: {printable(str(warning))}")
    tell(f"kvmpy: {name} {'cannot' if blockers else 'can'} migrate to {printable(uri)}")
    return BLOCKED if blockers else 0


def cancel(client: Client, name: str) -> int:
    """Cancel a migration that somebody else began, and wait until it is over."""
    before = client("query-migrate").get("status", "none")
    if before in FINAL or before in NOT_YET:
        raise HostError(f"{name}: no migration is under way")
    client("migrate_cancel")
    answer = follow(client, lambda answer: None, lambda: False)
    if answer["status"] == "completed":
        raise HostError(f"{name}: it was completed before it could be cancelled")
    wait_until_back(client, name, ("running", "paused"))
    return 0


def move(
    client: Client,
    args: argparse.Namespace,
    uri: str,
    *,
    shown: str | None = None,
    settle: Callable[[], Settled] = lambda: Settled.UNKNOWN,
    primaries: Ask | None = None,
) -> int:
    """Migrate to ``uri``, called ``shown``, tell how far it is and what came of it; returns the exit code.

    ``settle`` is asked what became of the destination where the source has not heard, and so cannot know, and
    ``primaries``, if it is there, what that has made of failover primaries.
    """
    name = args.name
    with ExitStack() as stack:
        reports = stack.enter_context(Reports(args.report))
        display = progress(name, plain=args.plain)
        stack.callback(display.close)
        interrupted = stack.enter_context(interruptible(client, display, name))
        before = client("query-status")["status"]
        client("migrate", uri=uri)
        answer = follow(client, display.show, interrupted)
        display.close()
        for warning in answer.get("warnings") or []:
            tell(f"kvmpy: {name}: warning: {printable(warning)}")
        there = None
        try:
            code = outcome(client, args, answer, before, settle)
            if code == 0 and primaries is not None:
                there = arrival(name, shown or uri, answer, client.seen, primaries)
        finally:
            reports.write(answer, name, shown or uri, client.seen, there)
        return code


def outcome(
    client: Client, args: argparse.Namespace, answer: Mapping[str, Any], before: str, settle: Callable[[], Settled]
) -> int:
    """See to it that one side has the guest, and say which."""
    name, status, error = args.name, answer["status"], answer.get("error-desc") or ""
    if status == "completed":
        tell(f"kvmpy: {name}: {summary(answer)}")
        return gone(client, args)
    if status == "failed" and error.startswith(OUTCOME_UNKNOWN):
        tell(f"kvmpy: {name}: {printable(error)}")
        match settle():
            case Settled.ARRIVED:
                tell(f"kvmpy: {name}: the guest is at the destination")
                return gone(client, args)
            case Settled.UNKNOWN:
                tell(
                    f"kvmpy: {name}: it stays paused. Look at the destination: if the guest runs there, "
                    f"or has run, kvmpy stop {name}; if its process has ended before that, kvmpy resume --force {name}"
                )
                return UNKNOWN
            case Settled.ENDED:
                tell(f"kvmpy: {name}: the destination's process has ended, so the guest is here")
                if before == "running":
                    client("cont", force=True)
                else:
                    tell(f"kvmpy: {name}: kvmpy resume --force {name} lets it go on")
    return stayed(client, name, answer, before)


def stayed(client: Client, name: str, answer: Mapping[str, Any], before: str) -> int:
    """The migration came to nothing: wait for the guest to be as it was ``before``, and say why."""
    status, error = answer["status"], answer.get("error-desc") or ""
    try:
        wait_until_back(client, name, (before,))
    except HostError as e:
        raise HostError(f"{name}: migration {status}: {error or 'no reason was given'}; {e}") from e
    for became in answer.get("primaries") or []:
        tell(f"kvmpy: {name}: {printable(became)}")
    if status == "cancelled":
        tell(f"kvmpy: {name}: cancelled; the guest is here, and {before}")
        return CANCELLED
    problems = answer.get("problems") or []
    for problem in problems if problems != [error] else ():
        tell(f"kvmpy: {name}: {printable(problem)}")
    raise HostError(f"{name}: migration failed: {error or 'no reason was given'}; the guest is here, and {before}")


def gone(client: Client, args: argparse.Namespace) -> int:
    """The guest is elsewhere: end the process that it has left, unless that is to be kept."""
    if args.keep:
        tell(f"kvmpy: {args.name}: its process is kept, paused; kvmpy stop {args.name} ends it")
    else:
        client.quit()
    return 0


def summary(answer: Mapping[str, Any]) -> str:
    """A migration that was completed, in a line."""
    blackout = answer.get("blackout-ms", answer.get("downtime"))
    stood = "" if blackout is None else f"; the guest stood still for {blackout:.1f} ms"
    return f"migrated in {answer.get('total-time', 0) / 1000:.1f} s{stood}"


def follow(client: Client, show: Callable[[Mapping[str, Any]], object], ask: Callable[[], object]) -> dict[str, Any]:
    """Look until it is over; returns the last answer of query-migrate."""
    while True:
        answer: dict[str, Any] = client("query-migrate")
        show(answer | {"awaited": awaited(client.seen)})
        if answer.get("status") in FINAL:
            return answer
        ask()
        client.listen(POLL_SECONDS)


def wait_until_back(client: Client, name: str, wanted: tuple[str, ...]) -> None:
    """Until the source has its guest as before. Raises HostError where that takes too long."""
    end = time.monotonic() + RETURN_SECONDS
    while (status := client("query-status")["status"]) not in wanted:
        if time.monotonic() > end:
            raise HostError(
                f"{name}: is {status} and not {wanted[0]} after {RETURN_SECONDS:g} s; see kvmpy status {name}"
            )
        client.listen(POLL_SECONDS)


@contextmanager
def interruptible(client: Client, shown: Progress, name: str) -> Iterator[Callable[[], None]]:
    """Within, the first Ctrl-C or SIGTERM is noted, and what this gives, when called, cancels; a second ends us."""
    caught: list[int] = []
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if caught:
            raise SystemExit(128 + number)
        caught.append(number)

    def ask() -> None:
        if caught and not asked:
            asked.append(caught[0])
            shown.say(f"{name}: cancelling; the guest stays here")
            try:
                client("migrate_cancel")
            except HostError as e:  # it has just been handed over, or has ended
                shown.say(str(e))

    before = {number: signal.signal(number, note) for number in heeded((signal.SIGINT, signal.SIGTERM))}
    try:
        yield ask
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
