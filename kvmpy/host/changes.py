"""What the changes that the network helper makes have in common: how one is refused, and what it says of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final

from kvmpy.errors import HostError
from kvmpy.host.links import LinkError

ADVICE: Final = {
    errno.EPERM: "changing it needs CAP_NET_ADMIN; run as root",
    errno.EOPNOTSUPP: "this kernel has no bridges; modprobe bridge",
    errno.ENODEV: "it has been removed meanwhile",
}


class Refused(HostError):
    """A request that cannot be granted; ``key`` is the configuration's for what is in the way."""

    def __init__(self, key: str, why: object) -> None:
        super().__init__(str(why))
        self.key = key

    @classmethod
    def by_kernel(cls, key: str, what: str, e: LinkError) -> Refused:
        """The kernel's refusal, with advice."""
        advice = ADVICE.get(e.errno)
        return cls(key, f"{what}: {e}" + (f": {advice}" if advice else ""))


def said(change: dict[str, Any]) -> str:
    """A change, for a message."""
    return ", ".join(f"{name} {value}" for name, value in change.items())


def attempt(step: Callable[[], object]) -> HostError | None:
    """What went wrong, None where nothing did."""
    try:
        step()
    except HostError as e:
        return e
    return None
