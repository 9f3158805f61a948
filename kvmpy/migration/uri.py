"""Where a migration goes or comes from, as QEMU spells it.

tcp:HOST:PORT              tcp:[::1]:4444 for IPv6
unix:PATH
fd:NAME or fd:NUMBER       a descriptor that came by getfd, or was inherited
exec:COMMAND               /bin/sh -c COMMAND, its standard input (going) or output (coming)
file:PATH[,offset=N]       save and restore; with an offset, the file's beginning is somebody else's
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from kvmpy.config.toml_lines import plain
from kvmpy.config.values import SOCKET_PATH_MAX
from kvmpy.errors import MigrationError

FORMS: Final = "tcp:HOST:PORT, unix:PATH, fd:NAME, fd:NUMBER, exec:COMMAND, file:PATH"


class Tcp(NamedTuple):
    """A TCP port; a host that is empty is every address of this one."""

    host: str
    port: int


class Unix(NamedTuple):
    """A unix socket."""

    path: str


class Fd(NamedTuple):
    """A descriptor, by name, or by number where the name is one."""

    name: str


class Exec(NamedTuple):
    """A command for the shell."""

    command: str


class File(NamedTuple):
    """A file, from ``offset`` on."""

    path: str
    offset: int | None = None


Address = Tcp | Unix | Fd | Exec | File


def parse(uri: str) -> Address:
    """Raises MigrationError that says what is wrong with it."""
    kind, colon, rest = uri.partition(":")
    readers: dict[str, Callable[[str], Address]] = {"tcp": _tcp, "unix": _unix, "fd": _fd, "exec": _exec, "file": _file}
    if not colon or kind not in readers:
        raise MigrationError(f"{plain(uri)}: expected {FORMS}")
    if "\0" in uri:
        raise MigrationError(f"{plain(uri)}: has a zero byte")
    try:
        return readers[kind](rest)
    except ValueError as e:
        raise MigrationError(f"{plain(uri)}: {e}") from e


def _tcp(rest: str) -> Tcp:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]*)):([0-9]{1,5})", rest, re.ASCII)
    if match is None or not 0 <= int(match[3]) <= 0xFFFF:
        raise ValueError("expected tcp:HOST:PORT, with [ and ] around an IPv6 address")
    return Tcp(match[1] or match[2], int(match[3]))


def _unix(rest: str) -> Unix:
    if not 0 < len(_bytes(rest)) <= SOCKET_PATH_MAX:
        raise ValueError(f"expected unix:PATH, of at most {SOCKET_PATH_MAX} bytes")
    return Unix(rest)


def _fd(rest: str) -> Fd:
    if not rest:
        raise ValueError("expected fd:NAME, or fd:NUMBER")
    return Fd(rest)


def _exec(rest: str) -> Exec:
    if not rest.strip():
        raise ValueError("expected exec:COMMAND")
    return Exec(rest)


def _file(rest: str) -> File:
    path, comma, option = rest.rpartition(",offset=")
    if not comma:
        path, offset = rest, None
    elif not re.fullmatch(r"[0-9]{1,18}|0x[0-9A-Fa-f]{1,15}", option):
        raise ValueError("expected file:PATH,offset=BYTES")
    else:
        offset = int(option, 0) if option.startswith("0x") else int(option)
    if not _bytes(path):
        raise ValueError("expected file:PATH")
    return File(path, offset)


def _bytes(path: str) -> bytes:
    try:
        return path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as e:
        raise ValueError("has characters that no path can have") from e
