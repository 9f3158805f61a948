"""What a migration is doing, in QEMU's words, and how that may change."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Status(Enum):
    """The value is what query-migrate says."""

    NONE = "none"
    SETUP = "setup"
    WAIT_UNPLUG = "wait-unplug"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"


OVER: Final = frozenset({Status.NONE, Status.COMPLETED, Status.CANCELLED, Status.FAILED})
LEGAL: Final[dict[Status, frozenset[Status]]] = {
    Status.NONE: frozenset({Status.SETUP}),
    Status.SETUP: frozenset({Status.WAIT_UNPLUG, Status.ACTIVE, Status.CANCELLING, Status.FAILED}),
    Status.WAIT_UNPLUG: frozenset({Status.ACTIVE, Status.CANCELLING, Status.FAILED}),
    # A destination does not say that it is at the devices: who listens would be served while the guest stands still.
    Status.ACTIVE: frozenset({Status.DEVICE, Status.COMPLETED, Status.CANCELLING, Status.FAILED}),
    # Back where the guest was reset in the last moment, and pages are sent again.
    Status.DEVICE: frozenset({Status.COMPLETED, Status.ACTIVE, Status.CANCELLING, Status.FAILED}),
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.FAILED}),
    Status.COMPLETED: frozenset(),
    Status.CANCELLED: frozenset(),
    Status.FAILED: frozenset(),
}
