"""Resets on a thread of their own: a reset takes up to seconds, and neither a vCPU nor the control thread has them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmpy.errors import HostError
from kvmpy.log import Log

log = Log(__name__)


class Resetter:
    """Runs ``reset`` for the function ``name``, one at a time. Any thread, but for `wait` one that may block.

    ``error`` is what the last one that ended failed with.
    """

    def __init__(self, name: str, reset: Callable[[], None]) -> None:
        self._name, self._reset = name, reset
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._over.set()
        self.error: HostError | None = None

    @property
    def is_over(self) -> bool:
        """Whether none is under way."""
        return self._over.is_set()

    def start(self, then: Callable[[], object] = lambda: None) -> None:
        """Begin one, unless one is under way; ``then`` runs after it in its thread, when `wait` has returned."""
        with self._lock:
            if not self._over.is_set():
                return
            self._over.clear()
            thread = threading.Thread(target=self._run, args=(then,), name=f"reset-{self._name}", daemon=True)
            # One before may still be at what came after it.
            self._threads = [earlier for earlier in self._threads if earlier.is_alive()] + [thread]
        try:
            thread.start()
        except RuntimeError as e:  # "can't start new thread"
            self._end(HostError(f"{self._name}: no thread to reset it: {e}"))
            then()

    def wait(self, timeout: float | None = None) -> bool:
        """Until none is under way; whether it ended in ``timeout`` seconds."""
        return self._over.wait(timeout)

    def join(self) -> None:
        """Until none is under way and what ran after it has ended too."""
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def _run(self, then: Callable[[], object]) -> None:
        error: HostError | None = HostError(f"{self._name}: its reset has not been finished")
        try:
            self._reset()
            error = None
        except HostError as e:
            error = e
        finally:
            self._end(error)
            then()

    def _end(self, error: HostError | None) -> None:
        self.error = error
        self._over.set()
