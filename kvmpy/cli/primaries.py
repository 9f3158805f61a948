"""Failover primaries while their machine migrates: whom the guest is asked for, and what it has again in the end.

All by what the monitors tell: the source's while it is followed, the destination's where `kvmpy receive` listens to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvmpy.cli.main import printable, tell
from kvmpy.errors import HostError

ASKED, RELEASED, PLUGGED = "UNPLUG_PRIMARY", "FAILOVER_PRIMARY_RELEASED", "FAILOVER_PRIMARY_PLUGGED"
Said = Mapping[str, Any]
Ask = Callable[[], Said]
"""Asks the destination: {"events", "pairs"}. Raises HostError."""


def stamp_ns(event: Said) -> int:
    """When it was told, by CLOCK_REALTIME."""
    clock = event["timestamp"]
    return int(clock["seconds"]) * 10**9 + int(clock["microseconds"]) * 1000


def awaited(events: Iterable[Said], now_ns: int | None = None) -> dict[str, float]:
    """The ids of those that the guest has been asked for and still has, and for how many seconds by now."""
    now = time.time_ns() if now_ns is None else now_ns
    since: dict[str, int] = {}
    for event in events:
        name = str((event.get("data") or {}).get("device-id"))
        if event["event"] == ASKED:
            since[name] = stamp_ns(event)
        elif event["event"] == RELEASED:
            since.pop(name, None)
    return {name: max(0, now - begun) / 1e9 for name, begun in since.items()}


def names(ids: Sequence[str]) -> str:
    """As a person says them."""
    return " and ".join(filter(None, (", ".join(ids[:-1]), *ids[-1:])))


def waiting(status: object, asked: Mapping[str, float]) -> str:
    """What a migration waits for, where that is a primary; else nothing."""
    if not asked or status not in ("wait-unplug", "cancelling"):
        return ""
    if status == "cancelling":
        return f"the guest is to keep {names(list(asked))}"
    return f"waiting for the guest to let {names(list(asked))} go, {max(asked.values()):.0f} s"


def arrival(name: str, uri: str, answer: Said, here: Sequence[Said], ask: Ask) -> list[Said] | None:
    """Wait for the primaries that the guest had ``here`` to be in use there, and say so.

    Returns what the destination has told, None where that is not known. A primary that does not come is said to, and
    no more: the guest runs, on its standby.
    """
    left = [str(event["data"]["device-id"]) for event in here if event["event"] == ASKED]
    if not left:
        return None
    tell(f"kvmpy: {name}: the guest runs there; waiting for it to take {names(left)} into use")
    try:
        said = ask()
    except HostError as e:
        tell(f"kvmpy: {printable(str(e))}; query-failover there says what became of {names(left)}")
        return None
    began = (answer.get("destination") or {}).get("first-run-ns")
    for pair in said["pairs"]:
        tell(f"kvmpy: {uri}: {printable(became(pair, said['events'], began))}")
    return list(said["events"])


def became(pair: Said, events: Iterable[Said], began_ns: int | None) -> str:
    """What the destination has made of a pair, in words."""
    primary, standby = pair.get("primary-id"), pair["standby-id"]
    if primary is None:
        return f"there is no primary for {standby}; the guest goes on over that"
    if pair["state"] != "plugged":
        why = f": {pair['error']}" if pair.get("error") else ""
        return f"{primary} is {pair['state']}{why}; the guest goes on over {standby}"
    came = [stamp_ns(each) for each in events if each["event"] == PLUGGED and each["data"].get("device-id") == primary]
    after = f", {(came[0] - began_ns) / 1e9:.1f} s after it ran" if came and began_ns is not None else ""
    path = "its frames take it" if pair.get("path") == "primary" else f"its frames still take {standby}"
    return f"the guest has {primary} in use{after}; {path}"
