"""Threads for commands that may wait for the host, so that neither the machine nor another client waits with them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from kvmpy.errors import CommandError
from kvmpy.host.reactor import Reactor

T = TypeVar("T")


class Workers:
    """One thread a call, which comes to its end whether or not anybody still wants to know."""

    def __init__(self, control: Reactor) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def start(self, name: str, work: Callable[[], T], then: Callable[[T], object]) -> None:
        """Do ``work``, which does not raise, in a thread, and then call ``then`` with its result, in control's.

        Raises CommandError where there is no thread to be had.
        """
        thread = threading.Thread(target=self._run, args=(work, then), name=f"qmp {name}", daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as e:
            self._forget(thread)
            raise CommandError(f"{name}: EAGAIN: no thread for it; raise the limit of processes (ulimit -u)") from e

    def close(self) -> None:
        """Wait for those under way: what they work on is about to go. Not by control, which they may need."""
        with self._lock:
            threads = tuple(self._threads)
        for thread in threads:
            thread.join()

    def _run(self, work: Callable[[], T], then: Callable[[T], object]) -> None:
        try:
            result = work()
            with contextlib.suppress(RuntimeError):  # the machine is being closed: nobody hears of it any more
                self._control.post(lambda: then(result))
        finally:
            self._forget(threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.discard(thread)
