"""How far a migration is, on standard error: a bar where a person looks and `rich` is there, else lines.

Nothing else of kvmpy imports rich (the extra `tui`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

from kvmpy.cli.main import printable, tell
from kvmpy.cli.primaries import waiting
from kvmpy.migration.report import PAGE_SIZE, megabytes

LINE_SECONDS: Final = 5.0  # as long as nothing changes but the figures
FULL: Final = 1000
BAR: Final = 16  # characters


class Progress(Protocol):
    """Shows answers of query-migrate."""

    def show(self, answer: Mapping[str, Any]) -> None:
        """The newest."""

    def say(self, text: str) -> None:
        """Something else, without a mess."""

    def close(self) -> None:
        """No more is to come."""


def progress(name: str, *, plain: bool) -> Progress:
    """For machine ``name``; a bar only where it can be drawn."""
    if not plain and sys.stderr.isatty():
        try:
            return Bar(name)
        except ImportError:
            pass
    return Lines(name)


def figures(answer: Mapping[str, Any]) -> str:
    """What there is to know while pages travel, as far as the answer has it; before that, who is waited for.

    "awaited" of the answer is what `primaries.awaited` says, by whoever asked.
    """
    if waits := waiting(answer.get("status"), answer.get("awaited") or {}):
        return waits
    if answer.get("status") in ("setup", "wait-unplug", "completed", "failed", "cancelled"):
        return ""
    ram = answer.get("ram") or {}
    parts = _rounds(ram)
    if answer.get("expected-downtime"):
        parts.append(f"downtime would be {answer['expected-downtime']:g} ms")
    said = str(answer.get("not-converging") or "")
    if answer.get("cpu-throttle-percentage") and "vCPUs sleep" not in said:
        parts.append(f"vCPUs slowed down by {answer['cpu-throttle-percentage']} %")
    if ram.get("transferred"):
        parts.append(f"{megabytes(ram['transferred'])} sent")
    if answer.get("preparing"):
        parts.append("the destination is still preparing its primaries")
    if said:
        parts.append(said)
    return ", ".join(parts)


def _rounds(ram: Mapping[str, Any]) -> list[str]:
    parts = [f"round {ram['dirty-sync-count']}"] if ram.get("dirty-sync-count") else []
    if "remaining" in ram:
        parts.append(f"{megabytes(ram['remaining'])} to go")
    if ram.get("mbps"):
        parts.append(f"{megabytes(ram['mbps'] * 1e6 / 8)}/s")
    if ram.get("dirty-pages-rate"):
        parts.append(f"dirtied {megabytes(ram['dirty-pages-rate'] * (ram.get('page-size') or PAGE_SIZE))}/s")
    return parts


def share_done(answer: Mapping[str, Any]) -> float:
    """How much of memory is at the destination as it is here, from 0 to 1."""
    ram = answer.get("ram") or {}
    total, remaining = ram.get("total") or 0, ram.get("remaining")
    if answer.get("status") == "completed":
        return 1.0
    return min(1.0, max(0.0, 1 - remaining / total)) if total and remaining is not None else 0.0


class Lines:
    """A line for each change of status or round, and one now and then in between."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown: tuple[object, ...] | None = None
        self._next = 0.0

    def show(self, answer: Mapping[str, Any]) -> None:
        ram = answer.get("ram") or {}
        key = (answer.get("status"), ram.get("dirty-sync-count"), *(answer.get("awaited") or {}))
        now = time.monotonic()
        if key != self._shown or now >= self._next:
            self._shown, self._next = key, now + LINE_SECONDS
            told = figures(answer)
            self.say(f"{self._name}: {answer.get('status')}" + (f": {told}" if told else ""))

    def say(self, text: str) -> None:
        tell(f"kvmpy: {printable(text)}")

    def close(self) -> None:
        pass


class Bar:
    """One line that is drawn over and over. Raises ImportError where rich is not there."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        status, told = (TextColumn(f"{{task.{what}}}", markup=False) for what in ("description", "fields[figures]"))
        # auto_refresh would be a thread of its own; there is nothing new between two answers.
        self._bar = RichProgress(status, BarColumn(BAR), told, console=Console(stderr=True), auto_refresh=False)
        self._name = name
        self._task = self._bar.add_task(name, total=FULL, figures="")
        self._bar.start()

    def show(self, answer: Mapping[str, Any]) -> None:
        status = f"{self._name} {answer.get('status')}"
        # One line: what there is no room for is cut off, or rich would make everything narrow for it.
        room = max(0, self._bar.console.width - len(status) - BAR - 3)
        done = round(share_done(answer) * FULL)
        self._bar.update(self._task, completed=done, description=status, figures=figures(answer)[:room], refresh=True)

    def say(self, text: str) -> None:
        self._bar.console.print(f"kvmpy: {printable(text)}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
