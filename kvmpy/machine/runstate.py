"""What a machine is doing, in QEMU's words, and how it may change."""

from __future__ import annotations

from enum import Enum
from typing import Final


class RunState(Enum):
    """The value is what query-status says."""

    PRELAUNCH = "prelaunch"
    INMIGRATE = "inmigrate"
    RUNNING = "running"
    PAUSED = "paused"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"
    SHUTDOWN = "shutdown"


_ENDS: Final = frozenset({RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR, RunState.SHUTDOWN})

LEGAL: Final[dict[RunState, frozenset[RunState]]] = {
    RunState.PRELAUNCH: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.INMIGRATE, RunState.SHUTDOWN}),
    # A guest that is to come: it was paused when it left, or runs at once.
    RunState.INMIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN}),
    RunState.RUNNING: frozenset({RunState.PAUSED, RunState.FINISH_MIGRATE}) | _ENDS,
    # A request that the guest made just before it was paused is still carried out.
    RunState.PAUSED: frozenset({RunState.RUNNING, RunState.FINISH_MIGRATE}) | _ENDS,
    RunState.FINISH_MIGRATE: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.POSTMIGRATE}) | _ENDS,
    RunState.POSTMIGRATE: frozenset({RunState.RUNNING, RunState.SHUTDOWN}),
    RunState.GUEST_PANICKED: frozenset({RunState.SHUTDOWN}),
    RunState.INTERNAL_ERROR: frozenset({RunState.SHUTDOWN}),
    RunState.SHUTDOWN: frozenset(),
}


class Outcome(Enum):
    """How a machine ended; the value is the exit code of `kvmpy run`."""

    POWER_OFF = 0
    """The guest turned it off, or the operator did."""
    HOST_ERROR = 1
    """KVM or the host gave up; `Machine.error` says what."""
    GUEST_PANIC = 3
    """The guest reported a panic, or its processor shut down on a triple fault."""
