"""Telling the other side that we are at work, while it waits for a message and we are at something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from kvmpy.errors import MigrationError
from kvmpy.host.threads import begin
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.messages import Keepalive

TIMES: Final = 8  # in each time that the other side waits: one that is late does no harm
STILL: Final = 0.8
"""Seconds without a word that are too many while the guest stands still: it is to go on within one."""
SLOW: Final = 20
"""But not from a host that is slow at all it does: so many times what it took to load its state, a few ms as a rule."""


def silence(timeout: float, on_the_way: float = 0.0, loading: float = 0.0) -> float:
    """Seconds without a word that are too many at the switchover, less than at other times.

    Nobody can answer what is still on its way, for ``on_the_way`` seconds; ``loading`` is what the other side has said
    that its state takes it.
    """
    return min(timeout, max(STILL, SLOW * loading) + on_the_way)


@contextmanager
def keepalive(main: MainChannel, timeout: float, at_work: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within, while we are ``at_work``, say so often enough for one who waits ``timeout`` seconds, or STILL.

    Not where something else has just been said: to hear it takes the other side time, and the guest may stand still.
    The other side's patience is its own operator's choice, and may be less than ours. Raises HostError.
    """
    over, period = threading.Event(), min(timeout, STILL) / TIMES

    def tell() -> None:
        left = period
        try:
            while not over.wait(left):
                left = main.said + period - time.monotonic()
                if left <= 0:
                    left = period
                    if at_work():
                        main.say(Keepalive())
        except MigrationError:  # whoever uses the channel hears of it too
            return

    thread = begin("keepalive", tell)
    try:
        yield
    finally:
        over.set()
        thread.join()
