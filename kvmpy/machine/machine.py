"""A machine that runs: its threads, its run state, and what an operator can ask of it.

    with Machine(config) as machine:
        machine.start()
        outcome = machine.wait()

Three roles of threads. `control` changes the run state, one change at a time, and serves the monitor. `vcpuN` runs the
guest and its devices' registers. `io` moves the console's bytes and keeps the devices' timers. A request by the guest
(reset, power-off, panic) closes the gate at once, so that no vCPU runs on past it, and is carried out by `control`.

A change that has to wait for the host, for a disk or for the reset of a real device, waits in a thread made for it
(`kvmpy.machine.changes`), with the vCPUs parked. No wait holds up the end of a machine for more than END_PATIENCE.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec

from kvmpy.config.schema import Config
from kvmpy.errors import CommandError, HostError, KvmpyError, Problems, VcpuError
from kvmpy.host.console import Console
from kvmpy.host.reactor import Reactor
from kvmpy.host.terminal import blocking_as_before, reopen
from kvmpy.kvm import vcpu_state
from kvmpy.kvm.exits import Exit, TripleFault
from kvmpy.kvm.tsc import load_tsc
from kvmpy.kvm.vcpu import accept_kicks
from kvmpy.kvm.vcpu_registers import VcpuRegisters
from kvmpy.kvm.vm_state import InterruptsState, load_interrupts, save_interrupts
from kvmpy.log import Log
from kvmpy.machine import registers
from kvmpy.machine.announce import Announcer, Rounds
from kvmpy.machine.build import Board, build
from kvmpy.machine.changes import Change, Changes, Steps, Waiting, at_once
from kvmpy.machine.check import check, check_devices, located, placing
from kvmpy.machine.failure import explain
from kvmpy.machine.handoff import Handoff
from kvmpy.machine.runstate import LEGAL, Outcome, RunState
from kvmpy.machine.vcpu import Gate, VcpuThread

if TYPE_CHECKING:
    from kvmpy.machine.departure import Departure
    from kvmpy.machine.hotplug import HotPlug
    from kvmpy.machine.pairing import PairFacts

log = Log(__name__)

T = TypeVar("T")
Listener = Callable[[str, dict[str, Any], int], object]
"""Is told an event's name, its data, and when it happened (CLOCK_REALTIME, in ns)."""

# os.O_RDONLY and os.O_WRONLY of standard input and output
STDIN: Final = (0, 0)
STDOUT: Final = (1, 1)
# Seconds between two looks at whether a slow reader has taken the last of the output
OUTPUT_POLL: Final = 0.05
# Seconds that the end of a machine waits for devices that are at work on the host, and then for what they have of it
END_PATIENCE: Final = 5.0
CAN_RESET: Final = (RunState.RUNNING, RunState.PAUSED, RunState.FINISH_MIGRATE)
MOVING: Final = (RunState.INMIGRATE, RunState.FINISH_MIGRATE)
"""What the machine is then is its state on another host: nothing is changed here."""


class PowerOn(msgspec.Struct, frozen=True):
    """What KVM holds of a machine that has just been made: a reset puts it back."""

    interrupts: InterruptsState
    vcpus: tuple[VcpuRegisters, ...]


class Machine:
    """One virtual machine. Methods may be called by any thread; those that change the run state wait until it has.

    By the control thread itself, as a listener does, they return before that where there is something to wait for.
    """

    def __init__(self, config: Config, *, named: bool = False, incoming: bool = False) -> None:
        """Make the machine, its vCPUs parked before their first instruction.

        ``named``: the caller has locked its name (`kvmpy.host.rundir.RuntimeDirectory`), and given back what an earlier
        machine of that name had left. Else that is done with the first function of the host that it is given.
        With ``incoming`` it does not boot: it waits for another machine's state (`kvmpy.migration`), and leaves that
        one's disks alone until then.

        Raises ConfigError where the configuration cannot be used, HostError where this host cannot run it.
        """
        self.config = config
        self.name: str = config.name
        self.state = RunState.PRELAUNCH
        self.outcome: Outcome | None = None
        self.error: KvmpyError | None = None
        self.listeners: list[Listener] = []
        self.first_run_ns: int | None = None
        # When the vCPUs stood still last, all of them, and when the first went on (CLOCK_REALTIME)
        self.parked_ns = self.resumed_ns = 0
        self._ended = threading.Event()
        self._unplugged = threading.Event()
        self._lifecycle = threading.Lock()
        self._started = self._closed = False
        self.is_incoming = incoming
        self._process = os.getpid()
        self._boots = self._asked = 0
        self._gate = Gate()
        self._threads: tuple[VcpuThread, ...] = ()
        problems = Problems()
        with problems.noted():
            self.boot = check(config)
        if not incoming:
            problems.raise_all()
        check_devices(config)  # or it could not even be tried
        with ExitStack() as resources:
            self._io = Reactor("io")
            resources.callback(self._io.close)
            self.control = Reactor("control")
            resources.callback(self.control.close)
            self._changes = Changes(self.control)
            if config.console.serial.kind == "stdio":
                resources.enter_context(blocking_as_before(STDIN[0], STDOUT[0]))
            self.console = Console(self._io)
            resources.callback(self.console.close)
            self.pty = self._open_console()
            with problems.noted():
                self.board: Board = build(
                    config,
                    self,
                    self.console,
                    self._io,
                    self.control,
                    self.report,
                    resources,
                    named=named,
                    incoming=incoming,
                )
            problems.raise_all()
            self._hotplug = self._make_hotplug()
            self.board.set_up_pci()
            self._power_on = self._read_power_on()
            self._powerdown_limit = self.control.timer(self._power_off_by_force)
            self._announcer = Announcer(self.control, lambda: self.board.nics)
            self.handoff = Handoff(self)
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What an operator asks

    def start(self) -> None:
        """Load the kernel and run, or wait for what is to come; once.

        Raises ConfigError where a file has gone since the machine was made, HostError where a thread cannot be had.
        """
        with self._lifecycle:
            if self._started or self._closed:
                raise CommandError("the machine has been " + ("closed" if self._closed else "started already"))
            self._started = True
            self._start_threads()

    def _start_threads(self) -> None:
        accept_kicks()
        if not self.is_incoming:
            self._load_kernel()
        self._threads = tuple(
            VcpuThread(vcpu, self._gate, self.board.pio, self.board.mmio, self._vcpu_failed)
            for vcpu in self.board.vcpus
        )
        running = Change(self._start())
        try:
            self._io.start()
            for thread in self._threads:
                thread.start()
            # Posted first, so that it comes before what a client of the monitor may have sent already.
            self.control.post(lambda: self._changes.begin(running))
            self.control.start()
        except RuntimeError as e:  # "can't start new thread", without an errno
            raise HostError(
                f"machine.cpus: EAGAIN: no thread for each of {len(self._threads)} vCPUs; "
                "raise the limit of processes (ulimit -u, or pids.max of the cgroup), or give the guest fewer"
            ) from e
        running.result()

    def pause(self) -> None:
        """Stop every vCPU between two instructions. The guest's clocks go on, as over a suspended laptop."""
        self.change(Change(self._pause()))

    def resume(self, *, force: bool = False) -> None:
        """Run on after `pause`; with ``force`` also after a migration, where the guest runs elsewhere or may.

        Raises CommandError, and HostError where the disks are not to be had any more.
        """
        self.change(Change(self._resume(force=force)))

    def reset(self) -> None:
        """Press the reset button: registers, devices and kernel as at the start."""
        self.change(Change(self._reset_by_operator()))

    def powerdown(self, limit: float | None = None) -> bool:
        """Press the power button. False where the guest has not enabled it, and so may never look.

        With ``limit``, in seconds, the machine is stopped if the guest has not powered off by then.
        """
        if limit is not None and not 0 <= limit < math.inf:  # no timer takes NaN
            raise CommandError(f"limit: expected seconds, 0 or more, got {limit}")
        return self.in_control(lambda: self._powerdown(limit))

    def set_link(self, name: str, *, up: bool) -> None:
        """Plug a network device's cable in, or pull it. ``name`` is the device's id or its netdev's.

        Raises CommandError where no network device has that name.
        """
        self.in_control(lambda: self._set_link(name, up=up))

    def device_add(self, table: Mapping[str, Any]) -> None:
        """Plug in the device that ``table`` says, which has the keys of a [[device]]. Not by the control thread.

        Raises CommandError, with everything as it was.
        """
        self.handoff.require_idle()
        self._require_hotplug(table.get("bus")).device_add(table)

    def device_del(self, name: str, *, force: bool = False) -> None:
        """Ask the guest to let a device go; with ``force`` take it away, whatever the guest does with it.

        DEVICE_DELETED follows, or DEVICE_UNPLUG_GUEST_ERROR. Raises CommandError.
        """
        if self._hotplug is None:
            self.handoff.require_idle()
            if name not in self.board.by_id:
                raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
            raise CommandError("Bus 'pcie.0' does not support hotplugging")
        self._hotplug.device_del(name, force=force)

    def netdev_add(self, table: Mapping[str, Any]) -> None:
        """Have the netdev that ``table`` says, which has the keys of a [[netdev]], for a device to use.

        Not by the control thread. Raises CommandError.
        """
        self.handoff.require_idle()
        self._require_hotplug(None).netdev_add(table)

    def netdev_del(self, name: str) -> None:
        """Have that netdev no more. Not by the control thread. Raises CommandError where a device uses it."""
        self.handoff.require_idle()
        self._require_hotplug(None).netdev_del(name)

    def current_config(self) -> Config:
        """The configuration as it would be written now: with what was added, and without what was removed."""
        return self.config if self._hotplug is None else self._hotplug.config()

    def announce(self, rounds: Rounds, *, nics: Sequence[str] | None = None, id: str = "") -> None:  # noqa: A002
        """Have the network learn where the guest is: ``nics``, or all network devices, by their or their netdev's name.

        Replaces what goes on under the same ``id``. Raises CommandError where one is not there.
        """
        self.in_control(lambda: self._announce(rounds, nics, id))

    def stop(self) -> None:
        """Pull the plug: end the machine now."""
        self._pull_the_plug(reason="host-qmp-quit")

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait until the machine has ended, or ``timeout`` seconds; None where it still runs."""
        self._ended.wait(timeout)
        return self.outcome

    def finish_output(self) -> None:
        """Once the machine has ended: wait for whoever reads our standard output, unless the plug was pulled.

        A `stop` ends the wait, and so does an exception, such as a signal's.
        """
        while self.console.unsent and not self._unplugged.wait(OUTPUT_POLL):
            pass

    def close(self) -> None:
        """End what still runs, and give everything back to the host. Closing twice is allowed; a listener cannot.

        Where a disk does not answer, a thread goes on with that after this has returned: until then the host writes to
        guest memory, which stays, as does the disk's lock.
        """
        if os.getpid() != self._process:
            return  # a fork's copy: the machine, its threads and its sockets are the parent's
        if threading.current_thread() is self.control.thread:
            raise CommandError("a machine cannot be closed by its own control thread")
        with self._lifecycle:
            if self._closed:
                return
            self._closed = True
            if self.control.thread is not None and not self._ended.is_set():
                self.stop()
            self.handoff.close()
            self._gate.end(self._threads)
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
            self.control.stop()
            if self._is_held_up():
                giving = threading.Thread(target=self._give_back, name=f"close-{self.name}", daemon=True)
                giving.start()
                giving.join(END_PATIENCE)
                if giving.is_alive():
                    log.error("%s: a disk does not answer: what it uses of the host is kept until it does", self.name)
            else:
                self._give_back()

    def _is_held_up(self) -> bool:
        """A device is still at work on the host."""
        leaving = self._hotplug is not None and self._hotplug.is_waiting
        return leaving or not all(device.begin_pause() for device in self.board.devices)

    def _give_back(self) -> None:
        if self._hotplug is not None:
            self._hotplug.close()
        self._io.stop()  # or it could accept a client that nobody closes
        self._resources.close()

    @property
    def threads(self) -> tuple[VcpuThread, ...]:
        """The vCPU threads, with their counts of exits."""
        return self._threads

    # For kvmpy.machine.hotplug

    @property
    def io(self) -> Reactor:
        """The loop of the io thread."""
        return self._io

    @property
    def pairs(self) -> list[PairFacts]:
        """The failover pairs. By the control thread."""
        return [] if self._hotplug is None else self._hotplug.pairs.facts()

    @property
    def departure(self) -> Departure | None:
        """How failover primaries leave and come back, for a migration. Any thread; None where there can be none."""
        return None if self._hotplug is None else self._hotplug.departure

    @property
    def is_running(self) -> bool:
        """The vCPUs run; asked by the control thread."""
        return self.state is RunState.RUNNING

    def require_changeable(self) -> None:
        """By the control thread: raises CommandError unless the machine is alive, and is not being migrated."""
        self.require_alive()
        self.handoff.require_idle()

    def let_accesses_end(self) -> None:
        """By the control thread: wait until no vCPU is in an access that it has begun before."""
        if self.state is RunState.RUNNING:
            self.while_parked(lambda: None)

    def while_parked(self, call: Callable[[], T]) -> T:
        """By the control thread: make a short call while no vCPU runs, and return what it returns."""
        if self.state is not RunState.RUNNING:
            return call()
        asked, pending = self._asked, self._gate.closed
        self._park()
        try:
            return call()
        finally:
            if not pending and asked == self._asked:  # else none may run on before the guest's request is carried out
                self._gate.open(self._threads)

    # What the guest asks (kvmpy.devices.base.Power): by vCPU threads, under a device's lock

    def request_reset(self) -> None:
        """The guest asks for a system reset."""
        self._ask(lambda: self._reset(by_guest=True))

    def request_shutdown(self) -> None:
        """The guest turns the machine off."""
        self._ask(lambda: self._end(Outcome.POWER_OFF, reason="guest-shutdown", by_guest=True), last=True)

    def report_panic(self) -> None:
        """The guest's kernel has panicked."""
        self._ask(self._panicked, last=True)

    def report(self, event: str, **data: Any) -> None:
        """Tell the listeners of something that happened to a device. Any thread, also under a device's lock."""
        at_ns = time.time_ns()
        with contextlib.suppress(RuntimeError):  # the machine is being closed
            self.control.post(lambda: self.emit(event, at_ns, **data))

    # The control thread

    def _start(self) -> Steps[None]:
        if self.state is RunState.SHUTDOWN:  # stopped, by the escape key say, before it ran
            return
        if self.is_incoming:
            self.become(RunState.INMIGRATE)
            return
        self.become(RunState.RUNNING)
        self.first_run_ns = time.monotonic_ns()
        yield from self.run()

    # A change is complete before its event is sent: a listener may make the next one.

    def _pause(self) -> Steps[None]:
        self.require_alive()
        self.handoff.require_idle()
        if self.state is RunState.RUNNING:
            yield from self.halt()
            self.become(RunState.PAUSED)
            try:
                self.tell_paused()
            finally:
                self.emit("STOP", self.parked_ns)

    def _resume(self, *, force: bool) -> Steps[None]:
        self.handoff.require_idle()
        if self.state is not RunState.POSTMIGRATE:
            self.require_alive()
        if self.state is not RunState.RUNNING:
            self.handoff.allow_resume(force=force)
            self.become(RunState.RUNNING)
            if (yield from self.run()):
                self.emit("RESUME", self.resumed_ns)

    def _reset_by_operator(self) -> Steps[None]:
        self.require_alive()
        self.handoff.require_idle()
        yield from self._reset(by_guest=False)

    def _reset(self, *, by_guest: bool) -> Steps[None]:
        if self.state not in CAN_RESET:
            return
        yield from self.halt()
        self.handoff.note_reset()
        self._boots += 1
        try:
            yield from self._reset_the_host_s()
            self._power_cycle()
        except KvmpyError as e:
            yield from self._end(Outcome.HOST_ERROR, error=e)
            return
        if self.state is not RunState.RUNNING or (yield from self.run()):
            self.emit("RESET", guest=by_guest, reason="guest-reset" if by_guest else "host-qmp-system-reset")

    def _reset_the_host_s(self) -> Steps[None]:
        """Real devices take up to seconds: all of them at once."""
        resetting = [device for device in self.board.devices if not device.begin_reset()]
        if resetting:
            yield Waiting([device.await_reset for device in resetting])

    def _power_cycle(self) -> None:
        """All as it was when the machine was made, and the kernel loaded anew. Raises KvmpyError."""
        board = self.board
        if self._hotplug is not None:
            self._hotplug.pairs.reset()
        for port in board.ports.values():
            port.finish()
        load_interrupts(board.vm, self._power_on.interrupts)
        for vcpu, state in zip(board.vcpus, self._power_on.vcpus, strict=True):
            vcpu_state.load(vcpu, state)
        load_tsc(board.vcpus, self._power_on.vcpus, goes_on=False)
        for device in board.devices:
            with device.lock:
                device.reset()
        board.set_up_pci()
        self._load_kernel()

    def _load_kernel(self) -> None:
        """What the boot vCPU runs next. Raises ConfigError where a file cannot be used any more."""
        with placing(self.config):
            registers.enter(self.board.vcpus[0], self.boot.load(self.board.memory))

    def _powerdown(self, limit: float | None) -> bool:
        self.require_alive()
        heard = self.board.acpi_pm.press_power_button()
        if limit is not None:
            self._powerdown_limit.arm(limit)
        self.emit("POWERDOWN")
        return heard

    def _set_link(self, name: str, *, up: bool) -> None:
        if self.state in MOVING:
            self.require_alive()
        nic = self.board.nics.get(name)
        if nic is None:
            raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
        nic.set_link(up=up)

    def _announce(self, rounds: Rounds, nics: Sequence[str] | None, id_: str) -> None:
        self.require_alive()
        self._announcer.start(rounds, nics, id_)

    def _panicked(self) -> Steps[None]:
        if self.state is RunState.SHUTDOWN:
            return
        self.handoff.machine_ended("guest-panic")
        self._park()
        self.become(RunState.GUEST_PANICKED)
        self.emit("GUEST_PANICKED", action="poweroff")
        yield from self._end(Outcome.GUEST_PANIC, reason="guest-panic", by_guest=True)

    def _failed(self, thread: VcpuThread, what: Exit | HostError) -> Steps[None]:
        if self.state is RunState.SHUTDOWN:
            return
        self._park()
        self.become(RunState.INTERNAL_ERROR)
        outcome = Outcome.GUEST_PANIC if isinstance(what, TripleFault) else Outcome.HOST_ERROR
        text = f"{thread.name}: {explain(what)}"
        if registers.are_lost(thread.vcpu):
            text += "; this processor resets its registers then, so those below are not the crash's"
        error = VcpuError(text, registers.dump(thread.vcpu))
        reason = "guest-panic" if outcome is Outcome.GUEST_PANIC else "host-error"
        yield from self._end(outcome, error=error, reason=reason)

    def _power_off_by_force(self) -> None:
        log.warning("the guest has not powered off in time; stopping it")
        self._pull_the_plug(reason="host-signal")

    def _pull_the_plug(self, *, reason: str) -> None:
        """End the machine whatever it waits for, also for whoever reads its output."""
        self.change(Change(self._end(Outcome.POWER_OFF, reason=reason, by_force=True), last=True), cut_in=True)

    def _end(
        self,
        outcome: Outcome,
        *,
        error: KvmpyError | None = None,
        reason: str = "host-error",
        by_guest: bool = False,
        by_force: bool = False,
    ) -> Steps[None]:
        if by_force:
            self._unplugged.set()
        if self.state is RunState.SHUTDOWN:
            return
        self.handoff.machine_ended(reason)
        if self._hotplug is not None:
            self._hotplug.departure.abandon()
        yield from self.halt(END_PATIENCE)
        self.become(RunState.SHUTDOWN)
        self._powerdown_limit.cancel()
        self._announcer.stop()
        self.outcome, self.error = outcome, error
        self.emit("SHUTDOWN", guest=by_guest, reason=reason)
        self._ended.set()

    # For kvmpy.machine.handoff

    def note_power_on(self) -> None:
        """What KVM holds now is what it holds after power-on."""
        self._power_on = self._read_power_on()

    def _read_power_on(self) -> PowerOn:
        return PowerOn(save_interrupts(self.board.vm), tuple(map(vcpu_state.save, self.board.vcpus)))

    def fail(self, error: KvmpyError) -> Steps[None]:
        """End the machine, which could not be what it was to be."""
        yield from self._end(Outcome.HOST_ERROR, error=error)

    def tell_paused(self) -> None:
        """Tell the guest's clock that it was stopped, so that its watchdogs do not bark at the gap."""
        for vcpu in self.board.vcpus:
            vcpu.tell_paused()

    def run(self) -> Steps[bool]:
        """Let the devices go on, then the vCPUs. A host that fails a device ends the machine: False."""
        try:
            for device in self.board.devices:
                device.resume()
        except HostError as e:
            yield from self._end(Outcome.HOST_ERROR, error=e)
            return False
        self.resumed_ns = self._gate.open(self._threads)
        if self._hotplug is not None:
            try:
                self._hotplug.pairs.runs()
            except Exception:  # the guest runs: nobody may hear that it does not, or it would run elsewhere, too
                log.exception("failover pairs: not told that the guest runs")
        return True

    def halt(self, seconds: float | None = None) -> Steps[None]:
        """Stop the vCPUs, then the devices: when this is made, nobody touches the guest's memory.

        But for a disk that has not answered in so many ``seconds``.
        """
        self._park()
        self.parked_ns = time.time_ns()
        if working := [device for device in self.board.devices if not device.begin_pause()]:
            yield Waiting([device.pause for device in working], seconds)
        for device in self.board.devices:
            if not device.begin_pause():
                log.error("%s: stopped while the host was at work for it", device.name)
                continue
            try:
                device.pause()
            except HostError as e:  # the machine's change goes on: its devices are not what decides it
                log.error("%s: %s", device.name, e)

    def _park(self) -> None:
        """Stop all vCPUs and wait until they have."""
        self._gate.close(self._threads)
        self._gate.wait_parked(self._threads)

    def become(self, state: RunState) -> None:
        """Change the run state. Raises CommandError where that is not legal."""
        if state not in LEGAL[self.state]:
            raise CommandError(f"the machine is {self.state.value}, it cannot become {state.value}")
        self.state = state

    def require_alive(self) -> None:
        """Raises CommandError unless the machine runs or is paused."""
        if self.state not in (RunState.RUNNING, RunState.PAUSED):
            raise CommandError(f"the machine is not running: its state is {self.state.value}")

    def emit(self, event: str, at_ns: int = 0, /, **data: Any) -> None:
        """By the control thread: tell the listeners of a change that is complete, now or ``at_ns``."""
        at_ns = at_ns or time.time_ns()
        for listener in tuple(self.listeners):
            try:
                listener(event, data, at_ns)
            except Exception:  # whoever listens does not decide whether the change goes on
                log.exception("a listener failed at %s", event)

    # Between threads

    def _ask(self, request: Callable[[], Steps[None]], *, last: bool = False) -> None:
        """Let no vCPU run on past the guest's request, and have `control` carry it out, unless a reset comes first."""
        boot = self._boots
        self._gate.close(self._threads)
        self._asked += 1  # in this order: see let_accesses_end
        change = Change(self._unless_reset(boot, request), last=last)
        self.control.post(lambda: self.change(change))

    def _unless_reset(self, boot: int, request: Callable[[], Steps[None]]) -> Steps[None]:
        if boot == self._boots:
            yield from request()

    def _vcpu_failed(self, thread: VcpuThread, what: Exit | HostError) -> None:
        self._ask(functools.partial(self._failed, thread, what), last=True)

    def change(self, change: Change[T], *, cut_in: bool = False) -> T | None:
        """Make a change of the run state when those before it are made, and wait for it; see the class."""
        begin = self._changes.cut_in if cut_in else self._changes.begin
        if threading.current_thread() is self.control.thread:
            begin(change)
            if not change.is_over:
                change.forget()
                return None
        else:
            self._post(lambda: begin(change))
        return change.result()

    def in_turn(self, call: Callable[[], object]) -> None:
        """Make a call in the control thread, once the changes of the run state before it are made; raises what it does.

        Not by the control thread.
        """
        self.change(Change(at_once(call)))

    def in_control(self, call: Callable[[], T]) -> T:
        """Make a call in the control thread, whatever a change waits for; returns or raises what it does."""
        if threading.current_thread() is self.control.thread:
            return call()
        made = Change(at_once(call))
        self._post(lambda: self._changes.make(made))
        return made.result()

    def _post(self, call: Callable[[], object]) -> None:
        if self.control.thread is None:
            raise CommandError("the machine has not been started")
        try:
            self.control.post(call)
        except RuntimeError as e:
            raise CommandError("the machine has been closed") from e

    def _make_hotplug(self) -> HotPlug | None:
        """None without root ports: what plugging takes is not even imported."""
        if not self.config.root_port:
            return None
        from kvmpy.machine.hotplug import HotPlug

        return HotPlug(self)

    def _require_hotplug(self, bus: object) -> HotPlug:
        if self._hotplug is None:
            where = "Bus 'pcie.0' does not support hotplugging" if bus in (None, "pcie.0") else f"Bus {bus!r} not found"
            raise CommandError(f"{where}; the machine has no root ports")
        return self._hotplug

    def _open_console(self) -> str | None:
        """Open the configured backend; returns the path of a pty."""
        serial = self.config.console.serial
        if serial.kind == "stdio":
            self.console.attach(reopen(*STDIN), reopen(*STDOUT))
            return None
        try:
            return self.console.open(serial.kind, serial.path)
        except HostError as e:
            raise located(self.config, "console.serial", e) from e
