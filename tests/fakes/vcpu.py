"""A vCPU without KVM: its exits are what a test gives it, and a kick works as immediate_exit and the signal do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvmpy.errors import IoctlError
from kvmpy.kvm.exits import Exit, Interrupted, MmioRead, MmioWrite, PioRead, PioWrite
from kvmpy.kvm.vcpu import INTERRUPTED, MMIO_READ, MMIO_WRITE, PIO_READ, PIO_WRITE, RARE
from tests.fakes.loop import BOUND


def as_access(exit_: Exit) -> tuple[int, int, int, int]:
    """What `Vcpu.enter` returns for it."""
    match exit_:
        case PioWrite(port, size, (value,)):
            return PIO_WRITE, size, port, value
        case PioRead(port, size, 1):
            return PIO_READ, size, port, 0
        case MmioWrite(gpa, size, value):
            return MMIO_WRITE, size, gpa, value
        case MmioRead(gpa, size):
            return MMIO_READ, size, gpa, 0
        case Interrupted():
            return INTERRUPTED, 0, 0, 0
    return RARE, 0, 0, 0


class FakeVcpu:
    """`enter` gives the next of ``exits``, and with none left waits in the guest until it is kicked.

    An exception among the exits is raised. ``log`` has what the thread did, in order.
    """

    def __init__(self, *exits: Exit | BaseException, index: int = 0) -> None:
        self.index = index
        self.log: list[str] = []
        self.replies: list[int] = []
        self.complete_error: IoctlError | None = None
        self.kicks = 0
        self.in_guest = threading.Event()
        self.before_accept: Callable[[], object] = lambda: None
        self._exits = list(exits)
        self._last: Exit = Interrupted()
        self._immediate_exit = False
        self._changed = threading.Condition()

    def answer(self, pio: object, mmio: object) -> None:
        """Nothing is answered by C here: whatever there is comes to the thread."""

    def enter(self) -> tuple[int, int, int, int]:
        """As kvmpy.kvm.vcpu.Vcpu's does: an access as ints, and anything else to be had by `exit`."""
        self._last = self._next()
        return as_access(self._last)

    def exit(self) -> Exit:
        return self._last

    def _next(self) -> Exit:
        with self._changed:
            if not self._immediate_exit and self._exits:
                self.log.append("run")
                exit_ = self._exits.pop(0)
                if isinstance(exit_, BaseException):
                    raise exit_
                return exit_
            self.in_guest.set()
            assert self._changed.wait_for(lambda: self._immediate_exit or self._exits, BOUND), "never kicked"
            self.in_guest.clear()
            self.log.append("interrupted")
            return Interrupted()

    def give(self, *exits: Exit | BaseException) -> None:
        """The guest does these next."""
        with self._changed:
            self._exits += exits
            self._changed.notify_all()

    def reply(self, value: int) -> None:
        self.replies.append(value)

    def reply_all(self, values: Sequence[int]) -> None:
        self.replies += values

    def reply_ones(self) -> None:
        self.replies.append(-1)

    def kick(self, thread: int) -> None:
        with self._changed:
            self.kicks += 1
            self._immediate_exit = True
            self._changed.notify_all()

    def accept(self) -> None:
        self.before_accept()
        with self._changed:
            self._immediate_exit = False

    def complete(self) -> None:
        self.log.append("complete")
        if self.complete_error is not None:
            raise self.complete_error
