"""What the doctor finds: a precondition with a verdict, and how to mend it."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """One precondition: ``verdict`` is ok, warn (kvmpy can do without, or not for everything) or fail."""

    what: str
    verdict: str
    found: str
    remedy: str = ""
