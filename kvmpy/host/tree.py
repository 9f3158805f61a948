"""Where the host shows itself: the roots of its three file systems that the kernel fills. A test has others."""

from __future__ import annotations

from typing import NamedTuple


class Host(NamedTuple):
    """The paths of /dev, /proc and /sys."""

    dev: str = "/dev"
    proc: str = "/proc"
    sys: str = "/sys"


def read(path: str) -> str:
    """The text of a small file without white space around it; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
