"""What a migration may do to a machine: the rules of `busy` and `held`, and disks that come back all or not at all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest

from kvmpy.errors import CommandError, HostError
from kvmpy.machine.build import Board
from kvmpy.machine.changes import Change, Steps
from kvmpy.machine.handoff import Handoff
from kvmpy.machine.runstate import LEGAL, RunState

T = TypeVar("T")


class Disk:
    """A device with a lock that somebody else may have."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.locked = True
        self.taken = False

        self.answers = True

    def begin_pause(self) -> bool:
        return self.answers

    def hand_over(self) -> None:
        self.locked = False

    def take_over(self) -> None:
        if self.taken:
            raise HostError(f"{self.name}: locked by somebody")
        self.locked = True


class Standing:
    """A machine without threads: the caller is its control thread. ``log`` has what was done to it."""

    def __init__(self) -> None:
        self.state = RunState.RUNNING
        self.first_run_ns: int | None = None
        self.parked_ns = self.resumed_ns = 0
        self.disks = [Disk("a"), Disk("b")]
        self.board = cast(
            Board,
            SimpleNamespace(devices=self.disks, inventory=SimpleNamespace(plugged={}), ports={}, vcpus=()),
        )
        self.log: list[str] = []
        self.runs = self.has_clock = True

    def change(self, change: Change[T]) -> T | None:
        with pytest.raises(StopIteration) as ended:
            next(change.steps)
        made: T | None = ended.value.value
        return made

    def in_control(self, call: Callable[[], T]) -> T:
        return call()

    def while_parked(self, call: Callable[[], T]) -> T:
        return call()

    def become(self, state: RunState) -> None:
        assert state in LEGAL[self.state], (self.state, state)
        self.state = state

    def halt(self, seconds: float | None = None) -> Steps[None]:
        yield from ()
        self.log.append("halt")

    def run(self) -> Steps[bool]:
        yield from ()
        assert all(disk.locked for disk in self.disks)
        self.log.append("run")
        return self.runs

    def note_power_on(self) -> None: ...

    def tell_paused(self) -> None:
        if not self.has_clock:
            raise HostError("KVM_KVMCLOCK_CTRL: EIO")

    def require_alive(self) -> None:
        if self.state not in (RunState.RUNNING, RunState.PAUSED):
            raise CommandError(f"the machine is {self.state.value}")

    def emit(self, event: str, at_ns: int = 0, /, **data: Any) -> None:
        self.log.append(event)

    def fail(self, error: Exception) -> Steps[None]:
        yield from ()
        self.log.append(str(error))


@pytest.fixture
def machine() -> Standing:
    return Standing()


@pytest.fixture
def handoff(machine: Standing) -> Handoff:
    return Handoff(machine)


def nothing(*_: object) -> None: ...


def test_a_stopped_machine_goes_on_with_its_disks(machine: Standing, handoff: Handoff) -> None:
    handoff.begin("busy", nothing)
    assert handoff.stop() is not None
    handoff.give()
    assert [disk.locked for disk in machine.disks] == [False, False]
    handoff.keep()
    assert machine.log == ["halt", "STOP", "run", "RESUME"]
    assert machine.state is RunState.RUNNING


def test_one_that_was_paused_stays_so(machine: Standing, handoff: Handoff) -> None:
    machine.state = RunState.PAUSED
    handoff.stop()
    assert not handoff.was_running
    handoff.give()
    handoff.keep()
    assert machine.state is RunState.PAUSED
    assert machine.log == ["halt"]
    assert all(disk.locked for disk in machine.disks)


def test_a_disk_that_is_not_to_be_had_keeps_the_guest_paused_and_no_other_locked(
    machine: Standing, handoff: Handoff
) -> None:
    handoff.stop()
    handoff.give()
    machine.disks[1].taken = True
    with pytest.raises(HostError, match="b: locked by somebody"):
        handoff.keep()
    assert machine.state is RunState.PAUSED
    assert not machine.disks[0].locked
    with pytest.raises(HostError, match="b: locked by somebody"):
        handoff.allow_resume(force=False)
    machine.disks[1].taken = False
    handoff.allow_resume(force=False)
    assert all(disk.locked for disk in machine.disks)


def test_a_guest_that_cannot_be_told_of_the_stop_stays_paused_and_may_go_on_later(
    machine: Standing, handoff: Handoff
) -> None:
    handoff.stop()
    handoff.give()
    machine.has_clock = False
    with pytest.raises(HostError, match="KVM_KVMCLOCK_CTRL"):
        handoff.keep()
    assert machine.state is RunState.PAUSED
    assert all(disk.locked for disk in machine.disks)
    handoff.allow_resume(force=False)


def test_a_reset_that_came_with_the_stop_lets_it_run_on(machine: Standing, handoff: Handoff) -> None:
    calls = 0

    make = machine.change

    def change(change: Change[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the guest's request is carried out between the two
            handoff.note_reset()
        return make(change)

    machine.change = change  # type: ignore[method-assign]
    assert handoff.stop() is None
    assert machine.state is RunState.RUNNING
    assert machine.log[-2:] == ["run", "RESUME"]


def test_a_disk_that_does_not_answer_holds_the_guest_up_no_longer_than_is_said(
    machine: Standing, handoff: Handoff
) -> None:
    machine.disks[1].answers = False
    with pytest.raises(HostError, match="b: its disk does not answer"):
        handoff.stop()
    handoff.keep()
    assert machine.log[-2:] == ["run", "RESUME"]


def test_a_machine_that_ended_meanwhile_is_neither_stopped_nor_kept(machine: Standing, handoff: Handoff) -> None:
    reasons: list[str] = []
    handoff.begin("busy", reasons.append)
    handoff.stop()
    machine.state = RunState.SHUTDOWN
    handoff.machine_ended("guest-shutdown")
    assert reasons == ["guest-shutdown"]
    handoff.keep()
    assert machine.state is RunState.SHUTDOWN
    with pytest.raises(CommandError):
        handoff.stop()


def test_while_it_is_busy_a_second_cannot_begin(handoff: Handoff) -> None:
    handoff.begin("being migrated", nothing)
    with pytest.raises(CommandError, match="being migrated"):
        handoff.begin("again", nothing)
    handoff.end()
    handoff.begin("again", nothing)


def test_what_has_gone_comes_back_only_by_force_and_that_is_told(machine: Standing, handoff: Handoff) -> None:
    told: list[bool] = []
    handoff.stop()
    handoff.give()
    handoff.let_go(RunState.POSTMIGRATE, "it runs elsewhere", lambda: told.append(True))
    assert machine.state is RunState.POSTMIGRATE
    with pytest.raises(CommandError, match="it runs elsewhere; where that cannot be, use force"):
        handoff.allow_resume(force=False)
    assert not any(disk.locked for disk in machine.disks)
    handoff.allow_resume(force=True)
    assert told == [True]
    assert all(disk.locked for disk in machine.disks)
    handoff.allow_resume(force=False)


def test_force_takes_no_disk_that_somebody_has(machine: Standing, handoff: Handoff) -> None:
    handoff.stop()
    handoff.give()
    handoff.let_go(RunState.PAUSED, "unknown", nothing)
    machine.disks[0].taken = True
    with pytest.raises(HostError):
        handoff.allow_resume(force=True)
    assert handoff.held == "unknown"


def test_an_arrival_that_cannot_run_gives_the_disks_back_first(machine: Standing, handoff: Handoff) -> None:
    machine.state, machine.runs = RunState.INMIGRATE, False
    with pytest.raises(HostError):
        handoff.arrive(running=True)
    assert not any(disk.locked for disk in machine.disks)
    assert "RESUME" not in machine.log


def test_an_arrival_that_cannot_run_is_no_machine_that_somebody_could_pause_and_let_go_on(
    machine: Standing, handoff: Handoff
) -> None:
    machine.state, machine.has_clock = RunState.INMIGRATE, False
    with pytest.raises(HostError, match="KVM_KVMCLOCK_CTRL"):
        handoff.arrive(running=True)
    assert machine.state is RunState.INMIGRATE
    assert not any(disk.locked for disk in machine.disks)


def test_a_paused_guest_arrives_with_its_disks_and_does_not_run(machine: Standing, handoff: Handoff) -> None:
    machine.state = RunState.INMIGRATE
    for disk in machine.disks:
        disk.locked = False
    handoff.arrive(running=False)
    assert machine.state is RunState.PAUSED
    assert all(disk.locked for disk in machine.disks)
    assert machine.log == []


def test_a_device_that_cannot_go_is_named_with_what_to_do(machine: Standing, handoff: Handoff) -> None:
    board = cast(Any, machine.board)
    board.inventory.plugged = {
        "hostdev0": plugged("hostdev0", "unplug it"),
        "net1": plugged("net1", None),
        "vd0": plugged("vd0", None, "root1"),
    }
    board.ports = {"root1": SimpleNamespace(is_releasing=True, card="vd0")}
    assert handoff.blockers() == [
        "device hostdev0: unplug it",
        "device vd0: the guest is being asked for it; wait for DEVICE_DELETED",
    ]


def test_r36_a_primary_can_leave_a_guest_that_runs_and_no_other(machine: Standing, handoff: Handoff) -> None:
    board = cast(Any, machine.board)
    board.inventory.plugged = {"hostdev0": plugged("hostdev0", None, "root1", standby="net1")}
    board.ports = {"root1": SimpleNamespace(is_releasing=True, card="hostdev0")}
    assert handoff.blockers() == []
    machine.state = RunState.PAUSED
    assert handoff.blockers() == ["device hostdev0: a guest that is stopped does not let it go; cont first"]
    board.ports["root1"].card = None  # it is hidden
    assert handoff.blockers() == []


def plugged(name: str, reason: str | None, bus: str | None = None, standby: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        table=SimpleNamespace(id=name, bus=bus),
        parts=[SimpleNamespace(blocks_migration=reason)],
        standby=standby,
        function=name,
    )
