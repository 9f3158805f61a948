"""What a machine is doing, in QEMU's words, and how it may change."""

from __future__ import annotations

from enum import Enum
from typing import Final


class RunState(Enum):
    """The value is what query-status says."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    GUEST_PANICKED = "guest-panicked"
    INTERNAL_ERROR = "internal-error"
    SHUTDOWN = "shutdown"


LEGAL: Final[dict[RunState, frozenset[RunState]]] = {
    RunState.PRELAUNCH: frozenset({RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN}),
    RunState.RUNNING: frozenset({RunState.PAUSED, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR, RunState.SHUTDOWN}),
    # A request that the guest made just before it was paused is still carried out.
    RunState.PAUSED: frozenset({RunState.RUNNING, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR, RunState.SHUTDOWN}),
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
