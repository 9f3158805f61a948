"""What somebody who pinged the guest during a migration saw: a log with a line of JSON for each ping.

    {"sent": 1764142462.1, "answered": 1764142462.102}

Stamps are CLOCK_REALTIME in seconds; "answered" is null for a ping that never came back.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import msgspec


class Ping(msgspec.Struct, frozen=True):
    """One of them."""

    sent: float
    answered: float | None = None


class Pings(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """When each was sent, on the migration's axis: those that were answered, and those that were lost."""

    answered_ms: tuple[float, ...] = ()
    lost_ms: tuple[float, ...] = ()

    def summary(self) -> str:
        """What was lost, in a sentence."""
        count = len(self.answered_ms) + len(self.lost_ms)
        if not self.lost_ms:
            return f"none of {count} pings lost"
        return f"{len(self.lost_ms)} of {count} pings lost; at most {self.deaf_ms() / 1000:.1f} s between two answered"

    def deaf_ms(self) -> float:
        """The longest time from one that was answered to the next."""
        return max((later - before for before, later in pairwise(sorted(self.answered_ms))), default=0.0)


def read(lines: Iterable[str], begin_ns: int, end_ms: float) -> Pings:
    """The pings of a log that were sent in the ``end_ms`` from ``begin_ns`` of CLOCK_REALTIME on. Raises ValueError."""
    answered: list[float] = []
    lost: list[float] = []
    for number, line in enumerate(lines, 1):
        if not line.startswith("{"):
            continue  # a pinger may say other things
        try:
            ping = msgspec.json.decode(line, type=Ping)
        except msgspec.MsgspecError as e:
            raise ValueError(f"line {number}: {e}") from e
        ms = (ping.sent * 1e9 - begin_ns) / 1e6
        if 0 <= ms <= end_ms:
            (lost if ping.answered is None else answered).append(ms)
    return Pings(answered_ms=tuple(answered), lost_ms=tuple(lost))
