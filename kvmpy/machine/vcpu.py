"""A vCPU's thread: every guest access to a device starts here, the first of its three hops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from kvmpy.bus import Bus
from kvmpy.errors import HostError
from kvmpy.kvm.exits import Exit, Interrupted, PioRead, PioWrite
from kvmpy.kvm.vcpu import INTERRUPTED, MMIO_READ, MMIO_WRITE, PIO_READ, PIO_WRITE, Vcpu
from kvmpy.log import Log

log = Log(__name__)

# A device that raises is a bug of ours that the guest may be able to drive: say it this often, then only count.
FAULTS_LOGGED: Final = 10

OnFatal = Callable[["VcpuThread", Exit | HostError], object]


class Gate:
    """Where vCPU threads stop: closed, each parks at its next exit, its last access completed."""

    def __init__(self) -> None:
        self.closed = True
        self._ended = False
        self._napping = 0
        self._parked: set[VcpuThread] = set()
        self._changed = threading.Condition()
        self._left_ns = 0

    def close(self, threads: Sequence[VcpuThread]) -> None:
        """Ask every thread to park, without waiting: signal all first, so that they stop together."""
        self.closed = True
        for thread in threads:
            thread.kick()
        if self._napping:
            self.wake()

    def wake(self) -> None:
        """End all naps."""
        with self._changed:
            self._changed.notify_all()

    def hold_back(self, thread: VcpuThread) -> None:
        """Wait until ``thread`` may go on after what it has done, while open."""
        with self._changed:
            self._napping += 1
            while not self.closed and (hold := thread.hold) is not None:
                left = hold.until - time.monotonic()
                if hold.is_over or left <= 0:
                    thread.hold = None
                else:
                    self._changed.wait(left)
            self._napping -= 1

    def nap(self, thread: VcpuThread) -> None:
        """Wait as long as ``thread`` is to nap, while open."""
        with self._changed:
            self._napping += 1
            until = time.monotonic() + thread.napping
            while not self.closed and thread.napping and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._napping -= 1

    def wait_parked(self, threads: Sequence[VcpuThread]) -> None:
        """Wait until every thread that lives is parked. Never by a vCPU thread."""
        with self._changed:
            self._changed.wait_for(lambda: all(t in self._parked or not t.is_alive() for t in threads))

    def open(self, threads: Sequence[VcpuThread]) -> int:
        """Let the parked ones of ``threads`` run. Returns when the first of them went (CLOCK_REALTIME, in ns).

        Waits for that, or it would wait for us: it needs the interpreter to enter its guest. Never by a vCPU thread.
        """
        with self._changed:
            self._left_ns = 0
            self.closed = False
            self._changed.notify_all()
            if any(thread in self._parked and thread.is_alive() for thread in threads):
                # Closed again: by one that did not wait here, and at once had something to ask.
                self._changed.wait_for(lambda: self._left_ns or self._ended or self.closed)
            return self._left_ns or time.time_ns()

    def end(self, threads: Sequence[VcpuThread]) -> None:
        """Have every thread finish for good: the parked now, the others at their next exit."""
        with self._changed:
            self._ended = self.closed = True
            self._changed.notify_all()
        for thread in threads:
            thread.kick()

    def park(self, thread: VcpuThread) -> bool:
        """Wait while closed; False when the thread is to finish."""
        with self._changed:
            self._parked.add(thread)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or not self.closed)
            self._parked.discard(thread)
            if not self._left_ns:
                self._left_ns = time.time_ns()
                self._changed.notify_all()  # open
            return not self._ended


class Hold:
    """A vCPU that waits with its next instruction, but not beyond ``until``."""

    def __init__(self, gate: Gate, until: float) -> None:
        self._gate, self.until = gate, until
        self.is_over = False

    def end(self) -> None:
        """It may go on. Any thread."""
        self.is_over = True
        self._gate.wake()


def hold_back(seconds: float) -> Callable[[], object]:
    """In a guest's access to a device: the access ends as ever, the vCPU's next instruction waits.

    Until what is returned is called, but not longer than ``seconds``. No lock is held meanwhile, the other vCPUs run,
    and the machine can be paused. By any other thread it does nothing.
    """
    thread = threading.current_thread()
    return thread.hold_back(seconds).end if isinstance(thread, VcpuThread) else lambda: None


class VcpuThread(threading.Thread):
    """Runs one vCPU between the gate's openings."""

    def __init__(self, vcpu: Vcpu, gate: Gate, pio: Bus, mmio: Bus, on_fatal: OnFatal) -> None:
        super().__init__(name=f"vcpu{vcpu.index}", daemon=True)
        self.vcpu = vcpu
        self.other_exits = 0
        self.faults = 0
        self.napping = 0.0
        self.hold: Hold | None = None
        self._gate, self._pio, self._mmio, self._on_fatal = gate, pio, mmio, on_fatal
        vcpu.answer(pio.native, mmio.native)

    def run(self) -> None:
        while True:
            self.vcpu.accept()
            if self._gate.closed:
                # Nothing is pending: the KVM_RUN that a kick cut short finished the last access first.
                if not self._gate.park(self):
                    return
                continue
            if self.hold is not None:
                self._gate.hold_back(self)
                continue
            if self.napping:
                self._gate.nap(self)
                self.napping = 0.0
            try:
                self._serve()
            except HostError as e:
                self._fatal(e)

    def _serve(self) -> None:
        """Run until the gate is to be looked at. Raises HostError where this vCPU cannot go on."""
        try:
            while self.step():
                pass
        except HostError:
            raise
        except Exception:  # noqa: BLE001  no guest access may end the process
            self._contain()

    def kick(self) -> None:
        """Make the thread look at the gate soon. Any thread, itself included."""
        if self.native_id is not None and self.is_alive():
            self.vcpu.kick(self.native_id)

    def hold_back(self, seconds: float) -> Hold:
        """By the thread itself, in an access: see the function of that name."""
        self.hold = Hold(self._gate, time.monotonic() + seconds)
        self.kick()
        return self.hold

    def nap(self, seconds: float) -> None:
        """Have the thread sleep so long, soon, instead of running the guest; 0 ends a nap. Any thread."""
        self.napping = seconds
        if seconds:
            self.kick()
        else:
            self._gate.wake()

    def step(self) -> bool:
        """Run to the next exit that C does not answer, and serve it; False when the gate is to be looked at."""
        kind, size, addr, value = self.vcpu.enter()
        if kind == PIO_WRITE:
            self._pio.write(addr, size, value)
        elif kind == PIO_READ:
            self.vcpu.reply(self._pio.read(addr, size))
        elif kind == MMIO_WRITE:
            self._mmio.write(addr, size, value)
        elif kind == MMIO_READ:
            self.vcpu.reply(self._mmio.read(addr, size))
        elif kind == INTERRUPTED:
            self.other_exits += 1
            return False
        else:
            return self._serve_rare(self.vcpu.exit())
        return True

    def _serve_rare(self, exit_: Exit) -> bool:
        """An access that repeats, or that this vCPU cannot go on."""
        match exit_:
            case PioWrite(port, size, values):
                for value in values:
                    self._pio.write(port, size, value)
            case PioRead(port, size, repeat):
                self.vcpu.reply_all([self._pio.read(port, size) for _ in range(repeat)])
            case Interrupted():
                self.other_exits += 1
                return False
            case fatal:
                self._fatal(fatal)
                return False
        return True

    def _fatal(self, what: Exit | HostError) -> None:
        """This vCPU cannot go on, so none does; whoever owns the machine is told."""
        self._gate.closed = True
        self._on_fatal(self, what)

    def _contain(self) -> None:
        """A device raised: the access is lost, the machine goes on. Raises HostError as `Vcpu.complete` does.

        A read gets all ones, as one that nobody answers.
        """
        self.faults += 1
        if self.faults <= FAULTS_LOGGED:
            log.exception("%s: a device failed; the access is ignored", self.name)
        self.vcpu.reply_ones()
        self.vcpu.complete()
