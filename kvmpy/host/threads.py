"""Threads, which a host may refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmpy.errors import HostError


def begin(name: str, work: Callable[[], object]) -> threading.Thread:
    """A thread that does ``work``, and does not keep the process from ending. Raises HostError where there is none."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as e:  # "can't start new thread", without an errno
        raise HostError(
            f"EAGAIN: no thread for {name}; raise the limit of processes (ulimit -u, or pids.max of the cgroup)"
        ) from e
    return thread
