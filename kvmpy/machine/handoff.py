"""What a migration may do to a machine: stop it for good or for a while, let it go on, or begin to run it here.

`kvmpy.migration` decides and calls, by a thread of its own; each change of the run state is the control thread's. While
a migration goes on the machine is `busy`, and whatever an operator would change is refused with that reason. Once the
guest may run elsewhere it is `held`: it goes on here only by force.

A guest's own requests go on being carried out: a reset in the middle of the stop comes before what is saved, and
power-off, panic and crash end the machine, and with it the migration.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar, cast

from kvmpy.devices.base import Device
from kvmpy.errors import CommandError, HostError, KvmpyError
from kvmpy.kvm.cpu_model import CpuDescription, adopt, describe_guest
from kvmpy.kvm.vcpu_state import save
from kvmpy.log import Log
from kvmpy.machine.build import Board
from kvmpy.machine.changes import Change, Steps, at_once
from kvmpy.machine.runstate import RunState

log = Log(__name__)

T = TypeVar("T")

DISK_PATIENCE: Final = 5.0
"""Seconds that the switchover waits for what disks have under way: the guest stands still meanwhile."""


class Stands(Protocol):
    """The machine, as far as a migration needs it. All but `change`, `in_control` and `state` are control's."""

    state: RunState
    board: Board
    first_run_ns: int | None
    parked_ns: int
    resumed_ns: int

    def change(self, change: Change[T]) -> T | None:
        """Make a change of the run state in its turn, and wait for it."""

    def in_control(self, call: Callable[[], T]) -> T:
        """Make a call in the control thread, and wait for it."""

    def become(self, state: RunState) -> None:
        """Change the run state. Raises CommandError where that is not legal."""

    def halt(self, seconds: float | None = None) -> Steps[None]:
        """Stop the vCPUs, then the devices, of which those that the host is at work for get so many ``seconds``."""

    def run(self) -> Steps[bool]:
        """Let the devices go on, then the vCPUs; False where the host failed a device, which ends the machine."""

    def while_parked(self, call: Callable[[], T]) -> T:
        """Make a short call while no vCPU runs."""

    def note_power_on(self) -> None:
        """What KVM holds now is what it holds after power-on."""

    def tell_paused(self) -> None:
        """Tell the guest's clock that it was stopped."""

    def require_alive(self) -> None:
        """Raises CommandError unless the machine runs or is paused."""

    def emit(self, event: str, at_ns: int = 0, /, **data: Any) -> None:
        """Tell the listeners of a change that is complete, now or ``at_ns``."""

    def fail(self, error: KvmpyError) -> Steps[None]:
        """End the machine, which could not be what it was to be."""


class Handoff:
    """The migration that goes on, as the machine sees it. Any thread, but for what is said to be the control thread's.

    ``busy`` is why nothing may be changed now, ``held`` why the machine may not simply go on. ``was_running`` says
    whether it ran before it was stopped.
    """

    def __init__(self, machine: Stands) -> None:
        self._machine = machine
        self.busy: str | None = None
        self.held: str | None = None
        self._abort: Callable[[str], object] = lambda reason: None
        self._forced: Callable[[], object] = lambda: None
        self._closers: list[Callable[[], object]] = []
        self.was_running = False
        self.settled_ns = 0  # when the devices, too, stood still: what their state is of (CLOCK_REALTIME)
        self._was_reset = False
        self._cpu: CpuDescription | None = None
        self._given: list[Device[Any]] = []  # whose part of the host is not ours now

    def blockers(self) -> list[str]:
        """Why this machine cannot be migrated now, whatever the destination: each with what to do."""
        board, found = self._machine.board, []
        for plugged in board.inventory.plugged.values():
            reasons = {part.blocks_migration for part in plugged.parts} - {None}
            found += [f"device {plugged.table.id}: {reason}" for reason in sorted(map(str, reasons))]
            port = board.ports.get(str(plugged.table.bus))
            if port is None or port.card is not plugged.function:
                continue
            if plugged.standby is None and port.is_releasing:
                found.append(f"device {plugged.table.id}: the guest is being asked for it; wait for DEVICE_DELETED")
            elif plugged.standby is not None and self._machine.state is not RunState.RUNNING:
                found.append(f"device {plugged.table.id}: a guest that is stopped does not let it go; cont first")
        return found

    def describe_cpu(self) -> CpuDescription:
        """The processor that the guest has; the first time vCPUs that run are stopped for that, for a moment."""
        if self._cpu is None:
            vcpu = self._machine.board.vcpus[0]
            self._cpu = self._machine.in_control(lambda: self._machine.while_parked(lambda: describe_guest(vcpu)))
        return self._cpu

    def rehearse(self) -> None:
        """Stop the vCPUs for a moment, save one, and let them go on: so that it is known how long that takes here."""
        vcpu = self._machine.board.vcpus[0]
        self._machine.in_control(lambda: self._machine.while_parked(lambda: save(vcpu)))

    # The source

    def begin(self, busy: str, abort: Callable[[str], object]) -> None:
        """A migration begins; ``abort`` is told, with a reason, should the machine end meanwhile. Must not block."""
        self._machine.in_control(lambda: self._begin(busy, abort))

    def end(self) -> None:
        """It is over, however it ended."""
        self.busy, self._abort = None, lambda reason: None

    def stop(self) -> int | None:
        """Stop the machine for the switchover. Returns when its last vCPU stopped (CLOCK_REALTIME, in ns).

        None where the guest asked for a reset meanwhile: that is done, all it wrote is new, and the machine runs on.
        """
        stopped_ns = self._change(self._stop())
        # What a vCPU asked for before it stopped is carried out between these two changes.
        return stopped_ns if self._change(self._settle()) else None

    @property
    def is_durable(self) -> bool:
        """Whether there is nothing for `make_durable` to do."""
        return all(device.is_durable for device in self._machine.board.devices)

    def make_durable(self) -> None:
        """Once stopped: all that was written is there for whoever runs the guest next. Waits for disks, maybe for ever.

        Raises HostError.
        """
        for device in self._machine.board.devices:
            device.make_durable()

    def give(self) -> None:
        """After that: unlock what of the host belongs to whoever runs the guest."""
        for device in self._machine.board.devices:
            self._given.append(device)
            device.hand_over()

    def keep(self) -> None:
        """The guest stays: it goes on as before `stop`. Raises HostError where it has to stay paused."""
        self._change(self._keep())

    def let_go(self, state: RunState, held: str, forced: Callable[[], object]) -> None:
        """The guest runs elsewhere, or may; ``forced`` is told should it be let go on here nevertheless."""
        self._change(at_once(lambda: self._let_go(state, held, forced)))

    # The destination

    def adopt_cpu(self, cpu: CpuDescription) -> None:
        """Have the processor that the guest had, also after a reset. Raises StateError, HostError."""
        adopt(self._machine.board.vcpus, cpu)
        self._machine.note_power_on()
        self._cpu = cpu

    def arrive(self, *, running: bool) -> int:
        """All is loaded and the guest is ours: take what it has of the host, and let it run unless it was paused.

        Returns when that was (CLOCK_REALTIME, in ns). Raises HostError or CommandError if not, and it never ran then.
        """
        return self._change(self._arrive(running=running))

    def fail(self, error: KvmpyError) -> None:
        """Nothing came of it: the machine ends."""
        self._change(self._machine.fail(error))

    # For the machine, in the control thread

    def require_idle(self) -> None:
        """Raises CommandError while a migration goes on."""
        if self.busy is not None:
            raise CommandError(self.busy)

    def allow_resume(self, *, force: bool) -> None:
        """Before the machine goes on. Raises CommandError, HostError where it may not."""
        if self.held is not None and not force:
            raise CommandError(f"{self.held}; where that cannot be, use force")
        self._take_back()
        if self.held is not None:
            log.warning("the machine goes on by force: %s", self.held)
            self.held = None
            self._forced()

    def machine_ended(self, reason: str) -> None:
        """There is nothing to migrate any more."""
        self._abort(reason)

    def at_close(self, close: Callable[[], object]) -> None:
        """Have ``close`` called, by the thread that closes the machine, before anything of it is taken away."""
        self._closers.append(close)

    def close(self) -> None:
        """The machine is being closed, and has ended."""
        while self._closers:
            self._closers.pop()()

    def _change(self, steps: Steps[T]) -> T:
        """In its turn, and waited for: by a migration's thread."""
        return cast(T, self._machine.change(Change(steps)))

    # The control thread

    def _begin(self, busy: str, abort: Callable[[str], object]) -> None:
        self._machine.require_alive()
        self.require_idle()
        if self.held is not None:
            raise CommandError(self.held)
        self.busy, self._abort = busy, abort

    def _stop(self) -> Steps[int]:
        machine = self._machine
        machine.require_alive()
        self.was_running, self._was_reset = machine.state is RunState.RUNNING, False
        yield from machine.halt(DISK_PATIENCE)  # also one that was paused: its devices' time is up to date then
        self.settled_ns = time.time_ns()
        machine.become(RunState.FINISH_MIGRATE)
        if self.was_running:
            machine.emit("STOP", machine.parked_ns)
        return machine.parked_ns

    def note_reset(self) -> None:
        """The guest, or an operator, has reset the machine."""
        self._was_reset = True

    def _settle(self) -> Steps[bool]:
        if self._machine.state is not RunState.FINISH_MIGRATE:
            raise CommandError(f"the machine is {self._machine.state.value}")
        if busy := [device.name for device in self._machine.board.devices if not device.begin_pause()]:
            raise HostError(f"{busy[0]}: its disk does not answer; migrate when it does")
        if self._was_reset:
            yield from self._keep()
        return not self._was_reset

    def _keep(self) -> Steps[None]:
        machine = self._machine
        if machine.state is not RunState.FINISH_MIGRATE:
            return  # it has ended, or was not even stopped
        try:
            self._take_back()
            if self.was_running:
                machine.tell_paused()
        except HostError:
            machine.become(RunState.PAUSED)
            raise
        if not self.was_running:
            machine.become(RunState.PAUSED)
            return
        machine.become(RunState.RUNNING)
        if (yield from machine.run()):
            machine.emit("RESUME", machine.resumed_ns)

    def _take_back(self) -> None:
        """Raises HostError, with nothing taken that was not before."""
        taken: list[Device[Any]] = []
        try:
            for device in self._given:
                device.take_over()
                taken.append(device)
        except HostError:
            for device in taken:
                device.hand_over()
            raise
        self._given.clear()

    def _let_go(self, state: RunState, held: str, forced: Callable[[], object]) -> None:
        if self._machine.state is RunState.FINISH_MIGRATE:
            self._machine.become(state)
        self.held, self._forced = held, forced

    def _arrive(self, *, running: bool) -> Steps[int]:
        machine = self._machine
        if machine.state is not RunState.INMIGRATE:
            raise CommandError(f"the machine is {machine.state.value}")
        devices = machine.board.devices
        self._given = list(devices)
        self._take_back()
        try:
            if running:
                machine.tell_paused()
            machine.become(RunState.RUNNING if running else RunState.PAUSED)
            if running:
                yield from self._run()
        except BaseException:
            for device in devices:  # before anybody hears that the source has the guest again
                device.hand_over()
            raise
        return machine.resumed_ns if running else time.time_ns()

    def _run(self) -> Steps[None]:
        """What raises has come before the first instruction: nothing may fail after it, or both sides would run."""
        machine = self._machine
        if not (yield from machine.run()):
            raise HostError("a device could not go on here")
        machine.first_run_ns = time.monotonic_ns()
        machine.emit("RESUME", machine.resumed_ns)
