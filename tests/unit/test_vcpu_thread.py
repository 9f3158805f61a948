"""VcpuThread and Gate: threads stop when asked and never otherwise, and a broken device breaks only its access."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import pytest

from kvmpy.bus import Bus
from kvmpy.errors import HostError, IoctlError
from kvmpy.kvm.exits import (
    Exit,
    FailEntry,
    Halted,
    InternalError,
    MmioRead,
    MmioWrite,
    PioRead,
    PioWrite,
    TripleFault,
    Unknown,
)
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.throttle import Throttle
from kvmpy.machine.vcpu import FAULTS_LOGGED, Gate, VcpuThread, hold_back
from tests.counts import count
from tests.fakes.loop import BOUND, Inbox, each
from tests.fakes.vcpu import FakeVcpu

# More threads than glibc keeps the stacks of, so that those of ended ones are unmapped.
ENDING: Final = f"""
import sys, types
from kvmpy.bus import Bus
from kvmpy.kvm.vcpu import Vcpu, accept_kicks
from kvmpy.machine.throttle import Throttle
from kvmpy.machine.vcpu import Gate, VcpuThread
class Idle:
    def __init__(self, index): self.index, self._kvm_run = index, types.SimpleNamespace()
    def accept(self): pass
    def answer(self, pio, mmio): pass
    kick = Vcpu.kick
sys.setswitchinterval(1e-5)
accept_kicks()
for _ in range({count(25, 2000)}):
    gate, bus = Gate(), Bus("pio")
    threads = [VcpuThread(Idle(index), gate, bus, bus, None) for index in range(48)]
    for thread in threads: thread.start()
    gate.wait_parked(threads)
    gate.end(threads)
    for thread in threads: thread.join()
"""


class Port:
    """A device that answers 1, 2, 3 and so on; or fails as it is told."""

    def __init__(self) -> None:
        self.name, self.lock = "port", threading.RLock()
        self.seen: Inbox[tuple[str, int, int, int]] = Inbox()
        self.error: Exception | None = None
        self.reads = 0

    def read(self, offset: int, size: int) -> int:
        if self.error:
            raise self.error
        self.reads += 1
        self.seen.put(("read", offset, size, self.reads))
        return self.reads

    def write(self, offset: int, size: int, value: int) -> None:
        if self.error:
            raise self.error
        self.seen.put(("write", offset, size, value))


class Rig:
    """vCPU threads behind one gate, each with a device at port 0x10 and at gpa 0x1000."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.port = Port()
        self.pio, self.mmio = Bus("pio"), Bus("mmio")
        self.pio.map(0x10, 8, self.port)
        self.mmio.map(0x1000, 8, self.port)
        self.fatal: Inbox[tuple[str, Exit | HostError]] = Inbox()
        self.threads: list[VcpuThread] = []

    def start(self, *vcpus: FakeVcpu) -> None:
        self.threads = [
            VcpuThread(cast(Vcpu, vcpu), self.gate, self.pio, self.mmio, lambda t, w: self.fatal.put((t.name, w)))
            for vcpu in vcpus
        ]
        for thread in self.threads:
            thread.start()

    def run(self, *exits: Any) -> FakeVcpu:
        """One vCPU that has had ``exits`` and runs on in the guest."""
        vcpu = FakeVcpu(*exits)
        self.start(vcpu)
        self.gate.open(self.threads)
        assert vcpu.in_guest.wait(BOUND)
        return vcpu

    def park(self) -> None:
        self.gate.close(self.threads)
        bounded(lambda: self.gate.wait_parked(self.threads))


def bounded(wait: Callable[[], object]) -> None:
    """Fail where ``wait`` does not end."""
    done = threading.Event()

    def run() -> None:
        wait()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(BOUND), "waits for ever"


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.gate.end(rig.threads)
    for thread in rig.threads:
        thread.join(BOUND)
        assert not thread.is_alive()


def test_no_instruction_runs_before_the_gate_is_opened(rig: Rig) -> None:
    vcpu = FakeVcpu(PioWrite(0x10, 1, (1,)))
    rig.start(vcpu)
    bounded(lambda: rig.gate.wait_parked(rig.threads))
    assert vcpu.log == []
    rig.gate.open(rig.threads)
    assert rig.port.seen.wait() == [("write", 0, 1, 1)]


def test_closed_gate_stops_a_guest_that_never_exits(rig: Rig) -> None:
    vcpu = rig.run()
    rig.park()
    assert vcpu.log == ["interrupted"]


def test_all_threads_are_kicked_before_any_is_waited_for(rig: Rig) -> None:
    vcpus = [FakeVcpu(index=n) for n in range(4)]
    rig.start(*vcpus)
    rig.gate.open(rig.threads)
    assert all(vcpu.in_guest.wait(BOUND) for vcpu in vcpus)
    rig.park()
    assert [vcpu.kicks for vcpu in vcpus] == [1, 1, 1, 1]


def test_parked_threads_run_on_when_the_gate_opens_again(rig: Rig) -> None:
    vcpu = rig.run()
    rig.park()
    vcpu.give(PioWrite(0x10, 1, (7,)))
    rig.gate.open(rig.threads)
    assert rig.port.seen.wait() == [("write", 0, 1, 7)]
    assert rig.threads[0] not in rig.gate._parked


def test_opening_says_when_the_first_went_and_waits_for_it(rig: Rig) -> None:
    rig.start(FakeVcpu(), FakeVcpu(index=1))
    for _ in range(50):
        rig.park()
        before = time.time_ns()
        assert before <= rig.gate.open(rig.threads) <= time.time_ns()
        assert any(thread not in rig.gate._parked for thread in rig.threads)


def test_opening_waits_for_nobody_where_nobody_is_parked(rig: Rig) -> None:
    rig.run()
    bounded(lambda: rig.gate.open(rig.threads))
    never = VcpuThread(cast(Vcpu, FakeVcpu()), rig.gate, rig.pio, rig.mmio, lambda t, w: None)
    bounded(lambda: rig.gate.open([never]))


def test_opening_ends_where_it_is_closed_again_before_anybody_went(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another vCPU, say, that was not parked yet, and whose first instruction resets the machine."""
    rig.start(FakeVcpu())
    rig.park()
    notify = rig.gate._changed.notify_all

    def close_and_notify() -> None:
        rig.gate.closed = True
        notify()

    with monkeypatch.context() as patch:
        patch.setattr(rig.gate._changed, "notify_all", close_and_notify)
        bounded(lambda: rig.gate.open(rig.threads))
    assert rig.threads[0] in rig.gate._parked


def test_opening_ends_where_the_threads_end_instead(rig: Rig) -> None:
    rig.start(FakeVcpu())
    rig.park()
    rig.gate.end(rig.threads)
    bounded(lambda: rig.gate.open(rig.threads))


def test_kick_just_before_the_thread_listens_again_is_heard(rig: Rig) -> None:
    vcpu = FakeVcpu()
    accepted: Inbox[None] = Inbox()
    vcpu.before_accept = each(lambda: rig.gate.close(rig.threads), lambda: accepted.put(None))
    rig.start(vcpu)
    bounded(lambda: rig.gate.wait_parked(rig.threads))
    rig.gate.open(rig.threads)
    accepted.wait(2)
    bounded(lambda: rig.gate.wait_parked(rig.threads))
    assert vcpu.log == []


def test_no_kick_is_lost_however_often_the_gate_closes_and_opens(rig: Rig) -> None:
    vcpus = [FakeVcpu(index=n) for n in range(3)]
    rig.start(*vcpus)
    stop_and_go = [lambda: rig.gate.open(rig.threads), rig.park] * 200
    for step in stop_and_go:
        step()
    assert all(thread in rig.gate._parked for thread in rig.threads)


def test_guest_in_a_storm_of_exits_stops_too(rig: Rig) -> None:
    vcpu = FakeVcpu(*[PioWrite(0x10, 1, (0,))] * 100_000)
    rig.start(vcpu)
    rig.gate.open(rig.threads)
    rig.port.seen.wait(10)
    rig.park()
    assert len(rig.port.seen.items) < 100_000


def test_device_that_closes_the_gate_from_the_vcpus_own_thread_parks_it(rig: Rig) -> None:
    vcpu = FakeVcpu(PioWrite(0x20, 1, (0,)), PioWrite(0x10, 1, (1,)))

    class Power(Port):
        def write(self, offset: int, size: int, value: int) -> None:
            rig.gate.close(rig.threads)

    rig.pio.map(0x20, 1, Power())
    rig.start(vcpu)
    rig.gate.open(rig.threads)
    bounded(lambda: rig.gate.wait_parked(rig.threads))
    assert rig.port.seen.items == []


def test_thread_that_is_done_or_was_never_started_is_not_waited_for(rig: Rig) -> None:
    rig.run()
    never = VcpuThread(cast(Vcpu, FakeVcpu()), rig.gate, rig.pio, rig.mmio, lambda t, w: None)
    rig.park()
    rig.gate.end(rig.threads)
    rig.threads[0].join(BOUND)
    bounded(lambda: rig.gate.wait_parked([*rig.threads, never]))
    rig.gate.close([*rig.threads, never])


def test_end_finishes_a_thread_that_runs(rig: Rig) -> None:
    vcpu = rig.run()
    rig.gate.end(rig.threads)
    rig.threads[0].join(BOUND)
    assert not rig.threads[0].is_alive()
    assert vcpu.log == ["interrupted"]


def test_writes_reach_the_device_item_by_item(rig: Rig) -> None:
    rig.run(PioWrite(0x12, 2, (0xAAAA, 0xBBBB)), MmioWrite(0x1004, 4, 0xCCCC))
    assert rig.port.seen.items == [("write", 2, 2, 0xAAAA), ("write", 2, 2, 0xBBBB), ("write", 4, 4, 0xCCCC)]
    assert rig.threads[0].faults == 0


def test_reads_are_answered_item_by_item(rig: Rig) -> None:
    vcpu = rig.run(PioRead(0x10, 2, 3), MmioRead(0x1000, 4))
    assert vcpu.replies == [1, 2, 3, 4]


def test_device_that_raises_costs_its_access_and_the_guest_runs_on(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.port.error = ZeroDivisionError("a bug of ours")
    with caplog.at_level(logging.ERROR):
        vcpu = rig.run(PioWrite(0x10, 1, (1,)), MmioRead(0x1000, 4), PioRead(0x10, 1, 1))
    assert rig.threads[0].faults == 3
    assert vcpu.log == ["run", "complete"] * 3
    assert vcpu.replies == [-1, -1, -1]
    assert "vcpu0: a device failed; the access is ignored" in caplog.text
    assert "a bug of ours" in caplog.text
    assert rig.fatal.items == []


def test_device_that_raises_for_ever_fills_no_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.port.error = ZeroDivisionError()
    with caplog.at_level(logging.ERROR):
        rig.run(*[PioWrite(0x10, 1, (1,))] * 100)
    assert rig.threads[0].faults == 100
    assert len(caplog.records) == FAULTS_LOGGED


@pytest.mark.parametrize(
    "fatal", [Halted(), TripleFault(), InternalError(1, (2, 3)), FailEntry(0x8000_0021, 0), Unknown(99)]
)
def test_vcpu_that_cannot_go_on_closes_the_gate_and_says_why_once(rig: Rig, fatal: Exit) -> None:
    vcpu = FakeVcpu(fatal, PioWrite(0x10, 1, (1,)))
    rig.start(vcpu)
    rig.gate.open(rig.threads)
    assert rig.fatal.wait() == [("vcpu0", fatal)]
    bounded(lambda: rig.gate.wait_parked(rig.threads))
    assert rig.gate.closed
    assert vcpu.log == ["run"]
    assert len(rig.fatal.items) == 1


def test_kvm_run_that_fails_is_fatal(rig: Rig) -> None:
    error = IoctlError("KVM_RUN", errno.EFAULT)
    rig.start(FakeVcpu(error))
    rig.gate.open(rig.threads)
    assert rig.fatal.wait() == [("vcpu0", error)]
    bounded(lambda: rig.gate.wait_parked(rig.threads))


def test_kvm_that_fails_to_complete_a_failed_devices_access_is_fatal_and_the_thread_lives_to_park(rig: Rig) -> None:
    rig.port.error = ZeroDivisionError()
    vcpu = FakeVcpu(PioWrite(0x10, 1, (1,)))
    vcpu.complete_error = IoctlError("KVM_RUN", errno.EIO)
    rig.start(vcpu)
    rig.gate.open(rig.threads)
    assert rig.fatal.wait() == [("vcpu0", vcpu.complete_error)]
    bounded(lambda: rig.gate.wait_parked(rig.threads))
    assert rig.threads[0].is_alive()


def test_many_threads_end_while_they_are_kicked() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


# Naps, by which a migration slows a guest down


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        os.sched_yield()


def test_a_nap_keeps_the_guest_from_running(rig: Rig) -> None:
    vcpu = rig.run()
    rig.threads[0].nap(BOUND)
    wait_until(lambda: vcpu.log == ["interrupted"])
    assert not vcpu.in_guest.wait(0.05)
    rig.threads[0].nap(0)
    assert vcpu.in_guest.wait(BOUND)


def test_a_stop_ends_a_nap_at_once(rig: Rig) -> None:
    vcpu = rig.run()
    rig.threads[0].nap(BOUND)
    wait_until(lambda: vcpu.log == ["interrupted"])
    rig.park()


def held_by(rig: Rig, seconds: float) -> Callable[[], object]:
    """A vCPU whose access has been answered, and that is held back after it; returns what lets it go."""
    held: list[Callable[[], object]] = []
    write = rig.port.write

    def hold(offset: int, size: int, value: int) -> None:
        held.append(hold_back(seconds))
        write(offset, size, value)

    rig.port.write = hold  # type: ignore[method-assign]
    vcpu = FakeVcpu(PioWrite(0x10, 1, (1,)), PioWrite(0x10, 1, (2,)))
    rig.start(vcpu)
    rig.gate.open(rig.threads)
    rig.port.seen.wait(1)
    wait_until(lambda: "interrupted" in vcpu.log)
    return held[0]


def test_r49_an_access_ends_and_the_next_instruction_waits(rig: Rig) -> None:
    go_on = held_by(rig, BOUND)
    with rig.port.lock:  # nobody holds it
        assert len(rig.port.seen.items) == 1
    go_on()
    assert rig.port.seen.wait(2) == [("write", 0, 1, 1), ("write", 0, 1, 2)]


def test_r49_a_vcpu_that_is_held_back_parks_and_is_held_back_again(rig: Rig) -> None:
    go_on = held_by(rig, BOUND)
    rig.park()
    rig.gate.open(rig.threads)
    assert len(rig.port.seen.items) == 1
    go_on()
    rig.port.seen.wait(2)


def test_r49_it_goes_on_by_itself_in_the_end(rig: Rig) -> None:
    held_by(rig, 0.05)
    rig.port.seen.wait(2)


def test_any_other_thread_is_not_held_back() -> None:
    hold_back(BOUND)()


def test_a_throttle_makes_all_vcpus_nap_again_and_again_until_it_stops(rig: Rig) -> None:
    vcpus = [FakeVcpu(index=n) for n in range(2)]
    rig.start(*vcpus)
    rig.gate.open(rig.threads)
    assert all(vcpu.in_guest.wait(BOUND) for vcpu in vcpus)
    throttle = Throttle(rig.threads)
    throttle.set(50)
    wait_until(lambda: all(vcpu.log.count("interrupted") >= 3 for vcpu in vcpus))
    assert throttle.percentage == 50
    throttle.stop()
    assert throttle.percentage == 0
    wait_until(lambda: all(vcpu.in_guest.is_set() for vcpu in vcpus))
    kicks = [vcpu.kicks for vcpu in vcpus]
    assert "throttle" not in [thread.name for thread in threading.enumerate()]
    assert [vcpu.kicks for vcpu in vcpus] == kicks
