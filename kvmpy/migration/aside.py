"""Calls that nobody can interrupt, such as flushing a disk, for a migration that waits for nothing for ever.

They are made in a thread of their own. Whoever waits for it leaves it to itself once time is over.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import TypeVar

from kvmpy.errors import MigrationError, refusal
from kvmpy.host.threads import begin
from kvmpy.migration.stop import Deadline, Stop

T = TypeVar("T")


def aside(name: str, call: Callable[[], T], stop: Stop, deadline: Deadline, late: str) -> T:
    """What ``call`` returns or raises. Raises StreamError, "``late`` within n seconds", MigrationCancelled, HostError.

    Then the call may go on: what it does must be harmless at any time.
    """
    try:
        ours, theirs = socket.socketpair()
    except OSError as e:
        raise MigrationError(f"{name}: {refusal(e.errno, 'cannot be waited for')}") from e
    returned: list[T] = []
    raised: list[Exception] = []

    def make() -> None:
        with theirs:
            try:
                returned.append(call())
            except Exception as e:  # noqa: BLE001  raised again, by whoever waits
                raised.append(e)

    with ours:
        try:
            begin(name, make)
        except BaseException:
            theirs.close()
            raise
        stop.wait(ours.fileno(), select.POLLIN, deadline, late)
    if raised:
        raise raised.pop()
    return returned[0]
