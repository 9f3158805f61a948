"""Telling the other side that we are at work, while it waits for a message and we are at something else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvmpy.errors import MigrationError
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.messages import Keepalive

TIMES: Final = 8  # in each time that the other side waits: one that is late does no harm
SHARE: Final = 4
LEAST: Final = 1.0


def silence(timeout: float) -> float:
    """Seconds without a word that are too many at the switchover, while the guest stands still: less than at others."""
    return min(timeout, max(LEAST, timeout / SHARE))


@contextmanager
def keepalive(main: MainChannel, timeout: float) -> Iterator[None]:
    """Within, say so often enough for one who waits ``timeout`` seconds."""
    over = threading.Event()

    def tell() -> None:
        try:
            while not over.wait(timeout / TIMES):
                main.tell(Keepalive())  # without a look at why it fails: that may be the answer another waits for
        except MigrationError:  # whoever uses the channel hears of it too
            return

    thread = threading.Thread(target=tell, name="keepalive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
