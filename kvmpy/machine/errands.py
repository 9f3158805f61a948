"""Calls that take a while, made one after the other by a thread that is there as long as there are any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from kvmpy.log import Log

log = Log(__name__)

CLOSE_LIMIT: Final = 60.0  # seconds


class Errands:
    """At most ``most`` wait beside the one that is made: one more takes the place of the last of them.

    So the last is always made, in its turn. Any thread.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], object]] = []
        self._working: threading.Thread | None = None
        self._closed = False
        self.left_out = 0

    def add(self, call: Callable[[], object]) -> None:
        """Make ``call`` when those before it have been; it logs its own failures. Does not wait."""
        with self._lock:
            if self._closed:
                return
            if len(self._waiting) == self._most:
                self._waiting.pop()
                self.left_out += 1
            self._waiting.append(call)
            if self._working is None:
                self._working = threading.Thread(target=self._work, name=self._name, daemon=True)
                try:
                    self._working.start()
                except RuntimeError as e:  # "can't start new thread"; the next one may have one
                    self._working = None
                    log.error("%s: no thread for it: %s", self._name, e)

    def drop(self) -> None:
        """Forget those that wait."""
        with self._lock:
            self._waiting.clear()

    def close(self) -> None:
        """Take no more, and wait until those that were taken are made, for CLOSE_LIMIT seconds."""
        with self._lock:
            self._closed, working = True, self._working
        if working is not None:
            working.join(CLOSE_LIMIT)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working = None
                    return
                call = self._waiting.pop(0)
            try:
                call()
            except Exception:
                log.exception("%s: failed", self._name)
