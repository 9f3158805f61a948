"""The dirty set: which pages of RAM the other side has not, or not as they are.

Three logs make it up, and each is blind for what the others see: KVM's (what vCPUs write), kvmpy's own (what devices
here write), and vhost's (what the kernel's network back end writes); the last two share one bitmap. What a function
that is passed through writes is in none of them: it must have left before.

    log, dirty = DirtyLog(vm, memory), DirtyPages(memory)
    log.start()
    log.collect(dirty)  # the first time: every page
    sender.send_round(dirty, 1)  # takes the pages out of it
    log.collect(dirty)  # what has been written since
    ...
    log.stop()

A page counts as sent only where it was read after it had left the logs. So the order is: out of the logs, then read;
and whoever writes, notes it afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from kvmpy.kvm.dirty import KvmDirtyLog, ToClear
from kvmpy.kvm.vm import Vm
from kvmpy.memory import GuestMemory, Ram
from kvmpy.pagebits import PAGE, PageBits, WriteLog, pages
from kvmpy.trace import Tracepoint

trace_collect = Tracepoint("migration.collect", "pages rate")

Clock = Callable[[], float]


class BlockPages(NamedTuple):
    """The pages of one block of RAM that are to be sent, and where their log is cleared, before they are read."""

    block: Ram
    bits: PageBits
    to_clear: ToClear | None = None


class DirtyPages:
    """A set of pages of ``memory``'s blocks, empty at first. ``rate`` is how many a second became dirty, in the time in
    which these did; 0 where that is not known.
    """

    def __init__(self, memory: GuestMemory) -> None:
        for block in memory.blocks:
            if block.gpa % PAGE or block.size % PAGE:
                raise ValueError(f"RAM at {block.gpa:#x}+{block.size:#x} is not whole pages")
        self.blocks = [BlockPages(block, PageBits(pages(block.size))) for block in memory.blocks]
        self.rate = 0.0

    def fill(self) -> None:
        """All of them."""
        for each in self.blocks:
            each.bits.fill()

    def clear(self) -> None:
        """None of them."""
        for each in self.blocks:
            each.bits.clear()
        self.rate = 0.0

    def count(self) -> int:
        """How many there are."""
        return sum(each.bits.count() for each in self.blocks)

    def __contains__(self, gpa: int) -> bool:
        return any((gpa - each.block.gpa) // PAGE in each.bits for each in self.blocks)


class DirtyLog:
    """All logs of a machine, together. The migration's thread, and one at a time; `stop` any number of times.

    After a failure of `collect` the next one gives every page: what had been taken out of a log is not lost.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, *, manual: bool = True, clock: Clock = time.monotonic) -> None:
        """``manual`` is whether KVM's manual protection is used where it is."""
        self._memory, self._clock = memory, clock
        self._kvm = KvmDirtyLog(vm, memory.blocks, manual=manual)
        self._writes: WriteLog | None = None
        self._everything = True
        self._last: float | None = None  # when `collect` was called last,
        self._begin: float | None = None  # and before those that `into` has pages of

    @property
    def started(self) -> bool:
        """Whether it logs."""
        return self._writes is not None

    def start(self) -> None:
        """Log from now on; the first `collect` gives every page. Anew, where it does already.

        Raises HostError, and then nothing is logged.
        """
        self.stop()
        try:
            self._kvm.start()
            self._writes = self._memory.start_log()
        except BaseException:
            self.stop()
            raise
        self._everything, self._last, self._begin = True, None, None

    def collect(self, into: DirtyPages) -> None:
        """Add what has become dirty since the last time, and forget it here. Raises IoctlError."""
        assert self._writes is not None, "the log has not been started"
        fresh = not into.count()
        everything, self._everything = self._everything, True
        for index, (block, bits, _) in enumerate(into.blocks):
            self._kvm.collect(block, bits)
            self._writes.take(block.gpa, bits)
            if everything:
                bits.fill()
            into.blocks[index] = BlockPages(block, bits, self._kvm.to_clear(block))
        self._everything = False
        self._measure(into, fresh=fresh, known=not everything)

    def stop(self) -> None:
        """Log nothing any more: vCPUs and devices are as fast as before. Raises HostError, having tried everything."""
        self._writes = None
        try:
            self._memory.stop_log()
        finally:
            self._kvm.stop()

    def _measure(self, into: DirtyPages, *, fresh: bool, known: bool) -> None:
        now, count = self._clock(), into.count()
        if fresh:
            self._begin = self._last
        self._last = now
        into.rate = count / (now - self._begin) if known and self._begin is not None and now > self._begin else 0.0
        if trace_collect:
            trace_collect(count, int(into.rate))
