"""The contract every device keeps, and the few protocols through which it speaks outward.

A device is told offsets, never addresses. The bus holds its ``lock`` around read and write; an entry from the host side
(a character typed, a timer, the power button) takes it itself. A device never takes another's lock, never blocks, and
speaks only through what it was given: an IrqLine, a sink, a Power, a Timer.
"""

from __future__ import annotations

import threading
from typing import Any, Generic, Protocol, TypeVar

from kvmpy.host.eventfd import EventFd
from kvmpy.state import State

S = TypeVar("S", bound=State)


class Power(Protocol):
    """The machine's power switch as a device sees it: requests are posted, not waited for. Any thread."""

    def request_reset(self) -> None:
        """The guest asks for a system reset."""

    def request_shutdown(self) -> None:
        """The guest turns the machine off (S5)."""

    def report_panic(self) -> None:
        """The guest says that its kernel has panicked."""


class Timer(Protocol):
    """A one-shot alarm of the host, made for one callback. Any thread; never blocks."""

    def arm(self, seconds: float) -> None:
        """Call back in ``seconds`` from now; replaces an earlier arming."""

    def cancel(self) -> None:
        """Do not call back. One callback already under way may still come."""


class Closable(Protocol):
    """Something taken that can be given back."""

    def close(self) -> None:
        """Give it back; closing twice is allowed."""


class Doorbells(Protocol):
    """Guest writes that only wake somebody: absorbed in the kernel, no exit. Any thread."""

    def doorbell(self, gpa: int, event: EventFd) -> Closable:
        """Let a guest's write of any width at ``gpa`` signal ``event``. Raises HostError."""


class Shortcuts(Doorbells, Protocol):
    """What a guest's access reaches with nobody of ours involved."""

    def direct(self, gpa: int, size: int, hva: int) -> Closable:
        """Let [gpa, gpa+size) be host memory at ``hva``, all in whole pages. Raises HostError.

        It is no RAM of the guest: nothing of ours reads it, and no device is given it for DMA.
        """


class Device(Generic[S]):
    """A device model with its migratable state.

    ``name`` is stable and comes from the configuration or build.py: it is the id under which the state migrates.
    ``blocks_migration`` is a reason, where there is one, why the machine cannot be migrated now.
    """

    blocks_migration: str | None = None

    def __init__(self, name: str, state: S) -> None:
        self.name = name
        self.state = state
        self.lock = threading.RLock()

    def read(self, offset: int, size: int) -> int:
        """The ``size`` bytes at ``offset``; all ones where nothing is implemented."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value``; ignored where nothing is implemented."""

    def reset(self) -> None:
        """Back to power-on: a fresh state, then whatever follows from it."""
        self.state = type(self.state)()
        self.post_load()

    def post_load(self) -> None:
        """Rebuild what follows from the state (a line's level, a timer). Touches no other device."""

    def advance(self, nanoseconds: int) -> None:
        """Count time that no host's clock has seen: the machine was on its way from one to another. Before `resume`."""

    def begin_reset(self) -> bool:
        """The machine is about to be reset, and stands still: begin what `reset` would have to wait for.

        False while it would: a thread that may wait calls `await_reset`. By the control thread, without the lock.
        """
        return True

    def await_reset(self) -> None:
        """Wait until `reset` would not. Without the lock."""

    def begin_pause(self) -> bool:
        """Begin with what a `pause` may have to wait for; whether it would not wait now. By the control thread."""
        return True

    def pause(self) -> None:
        """Stop touching the guest's memory; nothing is lost.

        Every vCPU parked, without the lock. By the control thread, or while `begin_pause` says False by one that may
        wait. A device that is paused can be reset or saved.
        """

    def resume(self) -> None:
        """Go on after `pause`, or begin: a device is made paused. By the control thread, before the vCPUs run."""

    @property
    def is_durable(self) -> bool:
        """Whether there is nothing for `make_durable` to do."""
        return True

    def make_durable(self) -> None:
        """The guest, paused, is about to run on another host: what it has written must be there. May wait for ever.

        Raises HostError where it may not be.
        """

    def hand_over(self) -> None:
        """After `make_durable`: unlock what both may reach. Does not wait."""

    def take_over(self) -> None:
        """The guest is to run here, before `resume`: lock what `hand_over` unlocks. Raises HostError if it cannot."""

    def facts(self) -> dict[str, Any]:
        """What a device must have alike to go on with this one's state, as JSON values. Any thread."""
        return {}

    def negotiated(self) -> tuple[list[str], list[str]]:
        """The names of the features that it offers its driver, and of those that the driver uses. With the lock."""
        return [], []

    def info(self) -> dict[str, Any]:
        """What an operator is shown of the device, as JSON values. Any thread."""
        return {}

    def close(self) -> None:
        """Give back host resources. Nothing is called afterwards."""
