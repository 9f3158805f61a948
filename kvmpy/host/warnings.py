"""Warnings that a guest can bring about again and again: each is logged once, and never more than so many."""

from __future__ import annotations

from typing import Final

from kvmpy.log import Log

MOST: Final = 20


class Warnings:
    """Of one subject, which logs them by ``log``."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._said: set[str] = set()

    def say(self, text: str) -> None:
        """Log ``text``, unless that was said before, or enough was."""
        if text not in self._said and len(self._said) < MOST:
            self._said.add(text)
            self._log.warning("%s", text)
