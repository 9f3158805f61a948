"""The files of `kvmpy migrate --report`: HTML or SVG to look at, JSON for programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any, Final, Self

from kvmpy.cli.main import printable, tell
from kvmpy.errors import ConfigError, HostError, errno_name
from kvmpy.migration.report import Events, Timeline, timeline, to_json


def _host(uri: str) -> str:
    """Where a URI leads, for people."""
    kind, _, rest = uri.partition(":")
    if kind in ("tcp", "ssh"):
        place = rest.strip("/").rpartition("@")[2]
        return place.rpartition(":")[0] or place if not place.endswith("]") else place
    return "destination"


def _svg(line: Timeline) -> str:
    from kvmpy.migration.picture import draw

    return draw(line)


def _page(line: Timeline) -> str:
    from kvmpy.migration.page import page

    return page(line)


KINDS: Final[dict[str, Callable[[Timeline], str]]] = {
    ".html": _page,
    ".svg": _svg,
    ".json": lambda line: to_json(line).decode(),
}


class Reports:
    """Opened before anything moves, so that a path that cannot be written is found out in time."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Raises ConfigError where a name says nothing of what it should be, HostError where it cannot be written."""
        self._resources = ExitStack()
        self._files: list[tuple[Callable[[Timeline], str], IO[str]]] = []
        with ExitStack() as stack:
            for path in paths:
                kind = next((kind for suffix, kind in KINDS.items() if path.endswith(suffix)), None)
                if kind is None:
                    raise ConfigError(f"--report {path}: expected a name that ends in {', '.join(KINDS)}")
                try:
                    self._files.append((kind, stack.enter_context(open(path, "a", encoding="utf-8"))))
                except OSError as e:
                    raise HostError(f"--report {path}: {errno_name(e.errno or 0)}: it cannot be written") from e
            self._resources = stack.pop_all()

    def write(
        self, answer: Mapping[str, Any], machine: str, uri: str, here: Events = (), there: Events | None = None
    ) -> None:
        """Write all of them. What goes wrong here is told, and changes nothing about the migration."""
        if not self._files:
            return
        try:
            hosts = (os.uname().nodename, _host(uri))
            line = timeline(answer, machine=machine, uri=uri, hosts=hosts, here=here, there=there)
        except ValueError as e:
            tell(f"kvmpy: no report: {printable(str(e))}")
            return
        for kind, file in self._files:
            try:
                file.truncate(0)
                file.write(kind(line))
                file.flush()
            except OSError as e:
                tell(f"kvmpy: --report {file.name}: {errno_name(e.errno or 0)}: it is not whole")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()
