"""Tracepoints for the developer: declared beside the code, off by default, one truth test when off.

    trace_write = Tracepoint("bus.write", "bus device offset size value")
    ...
    if trace_write:
        trace_write(self.name, target.name, offset, size, value)

A Tracepoint is the list of its sinks, so `if trace_write:` is a truth test of an empty list, done in C. `enable`
takes a glob over names, and tracepoints declared later obey it too.
"""

from __future__ import annotations

import fnmatch
import threading
import time
from collections.abc import Callable
from typing import Final

Sink = Callable[[str], object]

_all: Final[dict[str, Tracepoint]] = {}
"""Gone through as a copy: a thread that imports a module declares some at any time."""
_enabled: Final[list[tuple[str, Sink]]] = []
_watchers: Final[list[Callable[[], object]]] = []
_telling: Final = threading.Lock()


class Tracepoint(list[Sink]):
    """One named event. Truthy when somebody listens; calling it formats one line for each listener."""

    def __init__(self, name: str, fields: str) -> None:
        super().__init__()
        for glob, sink in _enabled:
            if fnmatch.fnmatchcase(name, glob) and sink not in self:
                self.append(sink)
        self.name = name
        self.fields = fields.split()
        _all[name] = self

    def __call__(self, *values: object) -> None:
        shown = " ".join(
            f"{field}={value:#x}" if isinstance(value, int) and not isinstance(value, bool) else f"{field}={value}"
            for field, value in zip(self.fields, values, strict=True)
        )
        line = f"{time.monotonic():.6f} {threading.current_thread().name} {self.name} {shown}"
        for sink in tuple(self):
            sink(line)


def enable(glob: str, sink: Sink) -> list[str]:
    """Send every tracepoint whose name matches ``glob`` to ``sink``; returns the names it matched now.

    Those declared later obey it too, unless it matched none now.
    """
    matched = [point for name, point in list(_all.items()) if fnmatch.fnmatchcase(name, glob)]
    if matched and (glob, sink) not in _enabled:
        _enabled.append((glob, sink))
    for point in matched:
        if sink not in point:
            point.append(sink)
    _tell()
    return sorted(point.name for point in matched)


def disable(sink: Sink) -> None:
    """Stop sending anything to ``sink``."""
    _enabled[:] = [entry for entry in _enabled if entry[1] != sink]  # a bound method is a new object each time
    for point in list(_all.values()):
        while sink in point:
            point.remove(sink)
    _tell()


def watch(watcher: Callable[[], object]) -> None:
    """Call ``watcher`` now and whenever a tracepoint may have got or lost a sink. Never undone: of a module."""
    _watchers.append(watcher)
    watcher()


def names() -> list[str]:
    """Every tracepoint declared so far, sorted."""
    return sorted(_all)


def _tell() -> None:
    """Whoever is told last is told how it is: what was true before is not told after."""
    with _telling:
        for watcher in _watchers:
            watcher()
