"""Whatever goes wrong in a migration, and whenever: one side runs or none does, never both, and the next one succeeds.

Somebody in between (tests/fakes/middle.py) does harm at a message of the main channel. Before GO the guest is the
source's and goes on there as if nothing had been; once GO is on its way nobody but the destination can say.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from kvmpy.cli.run import _Signals
from kvmpy.errors import CommandError, HostError
from kvmpy.host.disk import Disk
from kvmpy.kvm.system import System
from kvmpy.machine.pairs import Pairs
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.migration import description, destination, main_channel
from kvmpy.migration.description import Findings
from kvmpy.migration.dirty import DirtyLog, DirtyPages
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.messages import Kind
from kvmpy.migration.source import UNKNOWN
from kvmpy.migration.status import Status
from tests.fakes.journey import PATIENCE, Journey, Stop
from tests.fakes.loop import BOUND, poll
from tests.fakes.middle import Harm, Middle

DISK = """
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
cache = "writeback"
[[device]]
driver = "virtio-blk-pci"
id = "vd0"
drive = "disk0"
"""
HASTE = 0.5
"""Less, where one that is too slow on a busy host, and not harmed, is a failure like any other."""
BEFORE_GO = (
    *(Kind.HEADER, Kind.ACCEPT, Kind.ROUND, Kind.ROUND_END, Kind.ARRIVED),
    *(Kind.SECTIONS, Kind.END_OF_STATE, Kind.READY),
)


@pytest.fixture
def curt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side waits long for what the other, which says nothing, may have said last."""
    monkeypatch.setattr(main_channel, "LAST_WORDS", 0.1)


@pytest.fixture
def journey(system: System, tmp_path: Path) -> Iterator[Journey]:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    with ExitStack() as stack:
        yield Journey(tmp_path, stack, extra=DISK)


def set_out(
    journey: Journey,
    at: Kind | None = None,
    harm: Harm | None = None,
    hooks: Mapping[Kind, Callable[[], object]] | None = None,
    patience: float = PATIENCE,
    here: float | None = None,
) -> tuple[Stop, Stop]:
    """A migration that meets with ``harm``; returns source and destination. ``here`` is the source's own patience."""
    source = journey.begin(x_timeout=patience if here is None else here)
    source.wait_for_count()
    there = journey.wait_at(x_timeout=patience)
    middle = Middle(journey.socket("middle"), there.uri.removeprefix("unix:"), at, harm, hooks=hooks)
    journey.at_end(middle.close)
    source.migrations.migrate(f"unix:{journey.socket('middle')}")
    return source, there


def steal(directory: Path, thief: ExitStack) -> None:
    """Lock the disk, as soon as nobody has it."""
    disk = Disk(str(directory / "disk.raw"), readonly=False, direct=False)
    thief.callback(disk.close)
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        with suppress(HostError):
            disk.lock()
            return
        os.sched_yield()
    raise AssertionError("somebody has it all the time")


def goes_on_as_before(journey: Journey, source: Stop, there: Stop) -> None:
    """The guest has stayed: it runs, its disk is locked, nothing is logged or throttled, and it can go elsewhere."""
    assert source.machine.state is RunState.RUNNING
    assert not there.runs
    assert source.machine.board.memory.log is None
    assert source.machine.handoff.busy is None
    assert all(not thread.napping for thread in source.machine.threads)
    source.wait_for_count()
    there.machine.close()
    assert there.said == b"", "it never ran there"
    source.migrations.set_parameters(x_timeout=BOUND)  # nobody does any harm to this one
    here = journey.move(source, x_timeout=BOUND)
    here.wait_for_count()
    journey.check()


@pytest.mark.usefixtures("curt")
@pytest.mark.parametrize("harm", [Harm.CUT, Harm.HANG, Harm.DEAF, Harm.GARBAGE])
@pytest.mark.parametrize("at", BEFORE_GO)
def test_before_go_the_guest_stays(journey: Journey, at: Kind, harm: Harm) -> None:
    source, there = set_out(journey, at, harm, patience=HASTE)
    source.wait(Status.FAILED)
    goes_on_as_before(journey, source, there)


@pytest.mark.usefixtures("curt")
@pytest.mark.parametrize("at", [Kind.SECTIONS, Kind.END_OF_STATE, Kind.READY])
def test_a_guest_that_stands_still_does_not_wait_for_as_long_as_one_that_runs(journey: Journey, at: Kind) -> None:
    source, there = set_out(journey, at, Harm.HANG, patience=3600)
    source.wait(Status.FAILED)
    goes_on_as_before(journey, source, there)


@pytest.mark.usefixtures("curt")
def test_a_guest_that_stands_still_does_not_wait_for_one_who_is_at_work_for_ever(journey: Journey) -> None:
    source, there = set_out(journey, Kind.READY, Harm.CHATTER, patience=BOUND, here=HASTE)
    source.wait(Status.FAILED)
    assert source.error is not None
    assert "nothing more from the other side" in source.error
    goes_on_as_before(journey, source, there)


@pytest.mark.usefixtures("curt")
@pytest.mark.parametrize("harm", [Harm.CUT, Harm.HANG])
def test_when_go_is_lost_nobody_runs_until_force(journey: Journey, harm: Harm) -> None:
    source, there = set_out(journey, Kind.GO, harm)
    source.wait(Status.FAILED)
    assert source.error is not None
    assert source.error.startswith(UNKNOWN)
    assert source.machine.state is RunState.PAUSED
    assert there.machine.wait(BOUND) is Outcome.HOST_ERROR
    with pytest.raises(CommandError, match="outcome unknown"):
        source.machine.resume()
    with pytest.raises(CommandError, match="outcome unknown"):
        source.migrations.migrate(there.uri)
    assert source.machine.state is RunState.PAUSED
    there.machine.close()
    source.machine.resume(force=True)
    goes_on_as_before(journey, source, there)


@pytest.mark.usefixtures("curt")
@pytest.mark.parametrize("harm", [Harm.CUT, Harm.HANG, Harm.DEAF, Harm.GARBAGE])
def test_when_started_is_lost_the_destination_alone_runs(journey: Journey, harm: Harm) -> None:
    source, there = set_out(journey, Kind.STARTED, harm)
    source.wait(Status.FAILED)
    assert source.machine.state is RunState.PAUSED
    there.wait(Status.COMPLETED)
    there.wait_for_count()
    assert UNKNOWN in str(source.error)
    there.migrations.set_parameters(x_timeout=BOUND)
    here = journey.move(there, x_timeout=BOUND)
    here.wait_for_count()
    journey.check()


def test_a_destination_that_cannot_run_it_says_so_and_the_guest_stays(journey: Journey, tmp_path: Path) -> None:
    """Between two owners the disk is nobody's: a third takes it, and the destination cannot."""
    thief = ExitStack()

    source, there = set_out(
        journey, hooks={Kind.GO: lambda: steal(tmp_path, thief), Kind.REFUSED: thief.close}, patience=BOUND
    )
    source.wait(Status.FAILED)
    assert "the destination could not run the guest" in str(source.error)
    assert "disk.raw: locked by this process itself" in str(source.error)
    assert there.machine.wait(BOUND) is Outcome.HOST_ERROR
    goes_on_as_before(journey, source, there)


def test_a_guest_whose_disk_was_taken_meanwhile_stays_paused_until_it_is_back(journey: Journey, tmp_path: Path) -> None:
    thief = ExitStack()

    source, there = set_out(journey, Kind.READY, Harm.CUT, {Kind.READY: lambda: steal(tmp_path, thief)})
    source.wait(Status.FAILED)
    assert source.machine.state is RunState.PAUSED
    assert "stays paused here" in str(source.error)
    with pytest.raises(HostError, match="locked by"):
        source.machine.resume()
    thief.close()
    source.machine.resume()
    goes_on_as_before(journey, source, there)


@pytest.mark.parametrize("at", BEFORE_GO)
def test_a_cancel_at_any_message_before_go_leaves_the_guest_here(journey: Journey, at: Kind) -> None:
    source, there = set_out(journey, hooks={at: lambda: journey.stops[0].migrations.cancel()}, patience=BOUND)
    source.wait(Status.CANCELLED)
    assert source.error == "cancelled"
    assert at is Kind.HEADER or there.machine.wait(BOUND) is Outcome.HOST_ERROR
    goes_on_as_before(journey, source, there)


@pytest.mark.parametrize("at", [Kind.ACCEPT, Kind.READY])
def test_a_destination_whose_source_is_told_to_cancel_says_so(journey: Journey, at: Kind) -> None:
    source, there = set_out(journey, hooks={at: lambda: journey.stops[0].migrations.cancel()}, patience=BOUND)
    source.wait(Status.CANCELLED)
    there.wait(Status.FAILED)
    assert there.error == "the other side says: cancelled"


def test_who_only_asks_does_not_wait_for_ever_for_one_who_is_at_work(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, compare = threading.Event(), description.compare

    def slow(*descriptions: Any, **options: Any) -> Findings:
        if options:  # else it compares itself with itself, to get ready
            go.wait()
        return compare(*descriptions, **options)

    monkeypatch.setattr(destination, "compare", slow)
    source, there = journey.begin(x_timeout=HASTE), journey.wait_at(x_timeout=HASTE)
    journey.at_end(go.set)
    with pytest.raises(CommandError, match=r"nothing has come for|within"):
        source.migrations.check(there.uri)
    assert source.runs


def test_what_fails_here_once_the_guest_has_gone_is_no_failure_of_the_migration(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = DirtyLog.stop

    def fail(log: DirtyLog) -> None:
        was_started = log.started
        stop(log)
        if was_started:
            raise HostError("KVM_SET_USER_MEMORY_REGION: ENOMEM")

    source = journey.begin()
    source.wait_for_count()
    monkeypatch.setattr(DirtyLog, "stop", fail)
    journey.move(source)
    journey.check()


def test_what_fails_there_once_the_guest_runs_is_no_failure_of_the_migration(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = PageReceiver.close

    def fail(pages: PageReceiver) -> None:
        close(pages)
        raise HostError("EIO: something is left")

    monkeypatch.setattr(PageReceiver, "close", fail)
    source = journey.begin()
    source.wait_for_count()
    journey.move(source)
    journey.check()


def test_what_fails_once_the_guest_runs_does_not_take_it_back(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pairs: Pairs) -> None:
        raise HostError("no primary can be shown")

    journey.extra += '[[root_port]]\nid = "root1"\n'
    source = journey.begin()
    source.wait_for_count()
    monkeypatch.setattr(Pairs, "runs", fail)
    journey.move(source)
    journey.check()


def test_a_cancel_that_comes_with_go_is_refused(journey: Journey) -> None:
    refused: list[CommandError] = []

    def cancel() -> None:
        try:
            journey.stops[0].migrations.cancel()
        except CommandError as e:
            refused.append(e)

    source, there = set_out(journey, hooks={Kind.GO: cancel}, patience=BOUND)
    source.wait(Status.COMPLETED)
    there.wait_for_count()
    assert "too late" in str(refused[0])
    journey.check()


@pytest.mark.usefixtures("curt")
@pytest.mark.parametrize("harm", [Harm.DEAF, Harm.GARBAGE])
def test_when_go_is_lost_and_the_destination_says_that_it_gave_up_the_guest_goes_on_here(
    journey: Journey, harm: Harm
) -> None:
    source, there = set_out(journey, Kind.GO, harm, here=BOUND)
    source.wait(Status.FAILED)
    assert str(source.error).startswith("the destination could not run the guest: ")
    goes_on_as_before(journey, source, there)


def test_a_destination_that_gave_up_before_go_could_reach_it_is_proof_that_it_never_ran(journey: Journey) -> None:
    """As when all of the source is stopped for longer than the destination waits."""
    source, there = set_out(journey, hooks={Kind.READY: lambda: journey.stops[1].machine.stop()}, patience=BOUND)
    source.wait(Status.FAILED)
    assert UNKNOWN not in str(source.error)
    goes_on_as_before(journey, source, there)


def test_a_source_whose_destination_hangs_after_go_can_be_closed_at_once(journey: Journey) -> None:
    go = threading.Event()
    source, _ = set_out(journey, Kind.GO, Harm.HANG, {Kind.GO: go.set}, patience=3600)
    assert go.wait(BOUND)
    source.machine.close()
    assert str(source.error).startswith(UNKNOWN)


@pytest.mark.usefixtures("curt")
@pytest.mark.parametrize("cancel", [False, True], ids=["patience ends", "somebody cancels"])
def test_a_disk_that_cannot_be_flushed_keeps_the_guest_for_no_longer_than_anything_else(
    journey: Journey, monkeypatch: pytest.MonkeyPatch, cancel: bool
) -> None:
    answers, asked = threading.Event(), threading.Event()

    def flush(_: Disk) -> None:
        asked.set()
        answers.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "flush", flush)
        source, there = set_out(journey, patience=3600 if cancel else PATIENCE)
        assert asked.wait(BOUND)
        if cancel:
            source.migrations.cancel()
        source.wait(Status.CANCELLED if cancel else Status.FAILED)
        assert cancel or "a disk does not answer" in str(source.error)
        assert source.runs
        answers.set()
    goes_on_as_before(journey, source, there)


def test_a_limit_that_is_set_while_the_guest_stands_still_does_not_keep_it_so(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = DirtyLog.collect

    def limit_and_collect(log: DirtyLog, into: DirtyPages) -> None:
        if journey.stops[0].machine.state is RunState.FINISH_MIGRATE:
            journey.stops[0].migrations.set_parameters(max_bandwidth=1)
        collect(log, into)

    monkeypatch.setattr(DirtyLog, "collect", limit_and_collect)
    source, _ = set_out(journey, patience=BOUND)
    source.wait(Status.COMPLETED)


# The guest itself


@pytest.mark.parametrize("at", [Kind.ROUND, Kind.SECTIONS, Kind.READY])
def test_a_machine_that_is_stopped_ends_its_migration(journey: Journey, at: Kind) -> None:
    source, there = set_out(journey, hooks={at: lambda: journey.stops[0].machine.stop()}, patience=BOUND)
    source.wait(Status.FAILED)
    assert "has ended" in str(source.error)
    assert source.machine.wait(BOUND) is Outcome.POWER_OFF
    assert there.machine.wait(BOUND) is Outcome.HOST_ERROR
    assert there.said == b""


@pytest.fixture
def signals() -> Iterator[_Signals]:
    with _Signals() as signals:
        yield signals


def send_signal(journey: Journey, signals: _Signals) -> None:
    """To the source, which has heard it when this returns."""
    machine = journey.stops[0].machine
    assert machine.state is RunState.FINISH_MIGRATE
    signals.serve(machine, limit=3600)
    signal.raise_signal(signal.SIGTERM)
    machine.in_control(lambda: None)


def test_a_signal_during_the_switchover_presses_the_button_of_a_guest_that_stays(
    journey: Journey, signals: _Signals
) -> None:
    source, _ = set_out(journey, Kind.READY, Harm.CUT, {Kind.READY: lambda: send_signal(journey, signals)})
    source.wait(Status.FAILED)
    poll(lambda: "POWERDOWN" in [name for name, _ in source.events], lambda: "nobody pressed the button")
    assert source.runs
    source.machine.stop()
    signals.end_if_caught()  # which it was told of


@pytest.mark.usefixtures("curt")
def test_a_signal_during_the_switchover_waits_while_nobody_knows_where_the_guest_runs(
    journey: Journey, signals: _Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmpy.cli.run.PRESS_AGAIN", 0.001)
    source, _ = set_out(journey, Kind.GO, Harm.CUT, {Kind.READY: lambda: send_signal(journey, signals)})
    source.wait(Status.FAILED)
    assert source.error is not None
    assert source.error.startswith(UNKNOWN)
    passes: list[int] = []
    timer = source.machine.control.timer(lambda: again())

    def again() -> None:
        passes.append(1)
        if len(passes) < 20:
            timer.arm(0.002)

    source.machine.in_control(again)
    poll(lambda: len(passes) == 20)
    assert "POWERDOWN" not in [name for name, _ in source.events]
    source.machine.resume(force=True)
    poll(lambda: "POWERDOWN" in [name for name, _ in source.events], lambda: "nobody pressed the button")


@pytest.mark.parametrize("quit_by", ["kvmpy migrate", "the signal"])
def test_a_signal_during_the_switchover_ends_a_source_whose_guest_has_gone_as_if_there_had_been_none(
    journey: Journey, signals: _Signals, quit_by: str
) -> None:
    source, there = set_out(journey, hooks={Kind.READY: lambda: send_signal(journey, signals)}, patience=BOUND)
    source.wait(Status.COMPLETED)
    if quit_by == "kvmpy migrate":
        source.machine.stop()
    assert source.machine.wait(BOUND) is Outcome.POWER_OFF
    signals.end_if_caught()
    there.wait_for_count()


def test_a_destination_that_is_stopped_leaves_the_guest_at_the_source(journey: Journey) -> None:
    source, there = set_out(journey, hooks={Kind.SECTIONS: lambda: journey.stops[1].machine.stop()}, patience=BOUND)
    source.wait(Status.FAILED)
    goes_on_as_before(journey, source, there)
