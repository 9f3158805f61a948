"""The kernel's command line: what may be in it and how long it may be."""

from __future__ import annotations

from typing import Final

from kvmpy.errors import ConfigError

FIELD: Final = "boot.cmdline"
SIZE: Final = 2048  # COMMAND_LINE_SIZE of Linux on x86, with the NUL: the room kvmpy keeps


def encode(text: str) -> bytes:
    """``text`` with its NUL. Raises ConfigError if a character cannot stand in a command line."""
    for position, char in enumerate(text):
        if not char.isascii() or char in "\0\r\n":
            raise ConfigError(f"{FIELD}: character {position + 1} is {char!a}; only ASCII on one line is possible")
    return text.encode("ascii") + b"\0"


def check_length(line: bytes, limit: int) -> None:
    """Raise ConfigError if ``line`` without its NUL is longer than ``limit``, the kernel's, or kvmpy's own."""
    length, limit = len(line) - 1, min(limit, SIZE - 1)
    if length > limit:
        raise ConfigError(f"{FIELD}: {length} characters, and the kernel takes at most {limit}")
