"""How often a test repeats: a count for every day, and the full one of `make soak`."""

from __future__ import annotations

import os


def count(daily: int, soak: int) -> int:
    """``soak`` where KVMPY_SOAK is set, else ``daily``."""
    return soak if os.environ.get("KVMPY_SOAK") else daily
