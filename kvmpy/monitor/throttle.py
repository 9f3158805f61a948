"""Events that a guest can cause without end, held back so that they crowd nobody out.

As QEMU does with its own: the first goes out at once, and of those that follow within a second, about the same device,
only the last, when that second is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvmpy.devices.base import Timer

THROTTLED: Final = frozenset(
    {
        "DEVICE_BROKEN",
        "DEVICE_PLUG_GUEST_ERROR",
        "DEVICE_UNPLUG_GUEST_ERROR",
        "FAILOVER_NEGOTIATED",
        "FAILOVER_PATH_CHANGED",
        "FAILOVER_PRIMARY_FAILED",
        "FAILOVER_PRIMARY_PLUGGED",
        "FAILOVER_PRIMARY_RECEIVES",
        "FAILOVER_PRIMARY_RELEASED",
    }
)
SECONDS: Final = 1.0

Send = Callable[[str, dict[str, Any], int], object]


class Throttle:
    """``send`` is given what may go out. In the control thread."""

    def __init__(self, timer: Callable[[Callable[[], object]], Timer], send: Send) -> None:
        self._timer, self._send = timer, send
        self._held: dict[tuple[str, object], tuple[dict[str, Any], int] | None] = {}

    def take(self, name: str, data: dict[str, Any], at_ns: int) -> None:
        """An event has happened at ``at_ns`` (CLOCK_REALTIME)."""
        key = name, data.get("device", data.get("device-id"))
        if name not in THROTTLED:
            self._send(name, data, at_ns)
        elif key in self._held:
            self._held[key] = data, at_ns
        else:
            self._begin(key, data, at_ns)

    def _begin(self, key: tuple[str, object], data: dict[str, Any], at_ns: int) -> None:
        self._send(key[0], data, at_ns)
        self._held[key] = None
        self._timer(lambda: self._over(key)).arm(SECONDS)

    def _over(self, key: tuple[str, object]) -> None:
        if (held := self._held.pop(key)) is not None:
            self._begin(key, *held)
