"""Receiving the pages of RAM (`kvmpy.migration.records`).

Every record is the other side's to choose, and is checked before anything of it touches memory; what is wrong is said
with its place in the stream. A page that is to be zero and is zero already is not written, so memory that no guest has
touched costs this host nothing either, unless it is shared: what is read of a memfd is there from then on.
"""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from kvmpy._native import ffi, lib
from kvmpy.errors import HostError, MigrationCancelled, MigrationError, StreamError
from kvmpy.memory import GuestMemory
from kvmpy.migration.records import (
    DATA,
    END,
    MOST_BATCH,
    MOST_CHANNELS,
    RECORD,
    ZERO,
    ZSTD,
    Flow,
    PageChannel,
    failure,
    milliseconds,
)
from kvmpy.migration.zstd import Unpacker
from kvmpy.pagebits import PAGE
from kvmpy.trace import Tracepoint

trace_end = Tracepoint("migration.end_of_round", "channel number")

# How long a channel on which bytes do not pass as they are may be silent between records: its timeout is for all waits.
IDLE: Final = 24 * 3600.0
# Bytes that a page channel's reader takes beyond what it asked for: single pages come many in a call then.
AHEAD: Final = 128 << 10


class PageReceiver:
    """Fills guest memory from ``channels``, a thread for each, from `start` until `close`.

    One thread calls `wait_round`, or `receive_inline`; any thread `cancel`. ``on_failure`` is told, by its thread, when
    a channel brings nothing more, and why.
    """

    def __init__(
        self,
        memory: GuestMemory,
        channels: Sequence[PageChannel] = (),
        *,
        compression: str = "none",
        on_failure: Callable[[Exception], object] = lambda e: None,
    ) -> None:
        """Raises HostError where there is no zstd."""
        if len(channels) > MOST_CHANNELS:
            raise ValueError(f"{len(channels)} page channels")
        self._memory, self._compression = memory, compression
        self._on_failure = on_failure
        self._flow = Flow()
        self._changed = threading.Condition()
        self._cancelled = False
        self._lanes = [self._lane(f"page channel {index}", channel) for index, channel in enumerate(channels)]
        self._inline: _Lane | None = None
        self._threads: list[threading.Thread] = []

    @property
    def received(self) -> tuple[int, int, int]:
        """(pages, zero pages among them, bytes) so far."""
        counts = [lane.counts() for lane in (*self._lanes, *([self._inline] if self._inline else []))]
        return sum(c[0] for c in counts), sum(c[1] for c in counts), sum(c[2] for c in counts)

    def start(self) -> None:
        """Begin to receive. Raises HostError."""
        try:
            for lane in self._lanes:
                thread = threading.Thread(target=partial(self._receive, lane), name=lane.name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as e:  # "can't start new thread", without an errno
            self.close()
            raise HostError("EAGAIN: no thread for a page channel; raise the limit of processes (ulimit -u)") from e

    def wait_round(self, number: int, timeout: float) -> None:
        """Until every channel has brought the END mark of that round.

        Raises MigrationError as soon as one fails that has not, or when nothing has come for ``timeout`` seconds: the
        word that a round is over comes by another way, and overtakes what is on these. What a channel does behind that
        mark is nothing to this round.
        """
        with self._changed:
            before = self.received
            while not self._changed.wait_for(lambda: self._cancelled or self._verdict(number) is not None, timeout):
                if self.received == before:
                    break
                before = self.received
            if self._cancelled:
                raise MigrationCancelled("cancelled")
            verdict = self._verdict(number)
            if isinstance(verdict, Exception):
                raise verdict
            if verdict is None:
                late = ", ".join(lane.name for lane in self._lanes if lane.round < number)
                raise MigrationError(f"round {number} of the pages does not arrive; nothing in {timeout:g} s: {late}")

    def receive_inline(self, channel: PageChannel) -> int:
        """Receive one round from ``channel`` here and now, its END mark included, and nothing behind it; its number.

        Raises MigrationError.
        """
        if self._inline is None or self._inline.channel is not channel:
            self._inline = self._lane("the main channel", channel, RECORD.size)
        return self._inline.receive_round(milliseconds(channel.timeout))

    def finish(self) -> None:
        """All has come: what comes from here on is not taken in. Wakes nobody, and waits for nobody, unlike `close`."""
        self._flow.cancel()

    def cancel(self) -> None:
        """Whoever receives or waits ends with MigrationCancelled, at once. Any thread."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
        self._flow.cancel()
        for lane in self._lanes:
            lane.interrupt()

    def close(self) -> None:
        """End it. When this returns, guest memory is not touched any more. Closing twice is allowed."""
        self.cancel()
        while self._threads:
            self._threads.pop().join()

    def _lane(self, name: str, channel: PageChannel, ahead: int = AHEAD) -> _Lane:
        unpacker = Unpacker() if self._compression == "zstd" else None
        return _Lane(name, channel, self._memory, self._flow, unpacker, ahead)

    def _verdict(self, number: int) -> Exception | bool | None:
        """True if that round is here, why it will not be, or None while that is open."""
        late = [lane for lane in self._lanes if lane.round < number]
        return next((lane.failure for lane in late if lane.failure is not None), None if late else True)

    def _receive(self, lane: _Lane) -> None:
        try:
            while True:
                number = lane.receive_round(milliseconds(math.inf))
                if trace_end:
                    trace_end(lane.name, number)
                with self._changed:
                    self._changed.notify_all()
        except Exception as e:  # noqa: BLE001  whoever waits raises it
            with self._changed:
                lane.failure = e
                self._changed.notify_all()
            self._on_failure(e)


class _Lane:
    """One channel, and what has come over it. ``round`` is the last one that has ended, -1 for none; ``failure`` is
    why nothing more comes.
    """

    def __init__(
        self, name: str, channel: PageChannel, memory: GuestMemory, flow: Flow, unpacker: Unpacker | None, ahead: int
    ) -> None:
        self.name, self.channel, self.round = name, channel, -1
        self.failure: Exception | None = None
        self._memory, self._flow, self._unpacker = memory, flow, unpacker
        # The C side has the addresses alone: these keep what they point to.
        self._blocks = ffi.new(
            "struct kvmpy_ram[]",
            [(ffi.cast("char *", block.hva), block.gpa, block.size) for block in memory.blocks],
        )
        self._ahead = ffi.new("char[]", ahead)
        self._intake: Any = ffi.new(
            "struct kvmpy_intake *",
            {"blocks": self._blocks, "count": len(memory.blocks), "ahead": self._ahead, "room": ahead},
        )
        # Room for a batch, as it comes and unpacked.
        self._came = memoryview(bytearray(MOST_BATCH if unpacker else 0))
        self._unpacked = memoryview(bytearray(MOST_BATCH if unpacker else 0))
        if unpacker is not None:
            self._native = self._intake.zstd = unpacker.native(self._unpacked, self._came)

    def counts(self) -> tuple[int, int, int]:
        """(pages, zero pages, bytes). Any thread."""
        intake = self._intake
        return intake.data_pages + intake.zero_pages, intake.zero_pages, intake.bytes

    def interrupt(self) -> None:
        """Wake the thread that receives, where the flow being cancelled does not."""
        if self.channel.raw_fd is None:
            self.channel.shutdown()

    def receive_round(self, idle: int) -> int:
        """Until an END mark has come; its number. ``idle`` is the timeout between records, in milliseconds."""
        while True:
            kind = self._next(idle)
            if kind == END:
                return self._end(self._intake.gpa)
            self._receive_batch(kind)

    def _next(self, idle: int) -> int:
        """Move pages until a record comes that is not one page run's; its kind."""
        fd = self.channel.raw_fd
        if fd is None:
            return self._next_by_call()
        timeout = milliseconds(self.channel.timeout)
        kind = self._check(lib.kvmpy_intake_run(self._intake, self._flow.c, fd, timeout, idle))
        if not kind:
            raise MigrationError(f"{self.name}: the other side has closed it")
        return kind

    def _next_by_call(self) -> int:
        """The same where bytes do not pass as they are. A run of pages outside a batch is allowed, and slow."""
        intake, channel = self._intake, self.channel
        while True:
            timeout, channel.timeout = channel.timeout, IDLE
            try:
                header = channel.receive(RECORD.size)
            finally:
                channel.timeout = timeout
            if self._flow.cancelled:
                raise MigrationCancelled(f"{self.name}: cancelled")
            kind = self._check(lib.kvmpy_intake_header(intake, header))
            if kind not in (DATA, ZERO):
                return kind
            size = intake.pages * PAGE if kind == DATA else 0
            if size:
                channel.receive_into(self._memory.view(intake.gpa, size))
                intake.data_pages += intake.pages
            self._advance(size)

    def _receive_batch(self, kind: int) -> None:
        intake, size, length = self._intake, self._intake.gpa, self._intake.pages
        if kind == ZSTD and self._unpacker is None:
            raise StreamError(f"{self._place()}: a packed batch, where none was agreed")
        if not self._came:
            self._came = memoryview(bytearray(MOST_BATCH))
        batch = self._came[:length]
        fd = self.channel.raw_fd
        if fd is None:
            self.channel.receive_into(batch)
        else:
            timeout = milliseconds(self.channel.timeout)
            self._check(lib.kvmpy_intake_read(intake, self._flow.c, fd, ffi.from_buffer(batch), length, timeout))
        if kind == ZSTD and self._unpacker is not None:
            batch = self._unpack(self._unpacker, batch, size)
        self._check(lib.kvmpy_intake_apply(intake, self._flow.c, ffi.from_buffer(batch), size))
        self._advance(length)

    def _unpack(self, unpacker: Unpacker, packed: memoryview, size: int) -> memoryview:
        batch = self._unpacked[:size]
        try:
            unpacker.unpack(packed, batch)
        except StreamError as e:
            raise StreamError(f"{self._place()}: {e}") from e
        return batch

    def _end(self, number: int) -> int:
        if (self.round >= 0 and number != self.round + 1) or number >= 1 << 32:
            raise StreamError(f"{self._place()}: the end of round {number}, after round {self.round}")
        self._advance(0)
        self.round = number
        return number

    def _advance(self, size: int) -> None:
        """A record with ``size`` bytes behind it is done."""
        self._intake.offset += RECORD.size + size
        self._intake.bytes += RECORD.size + size

    def _check(self, result: int) -> int:
        if result == -errno.EBADMSG and self._intake.fault == lib.KVMPY_FAULT_PACKED and self._unpacker is not None:
            self._unpack(self._unpacker, self._came[: self._intake.pages], self._intake.gpa)
        if result == -errno.EBADMSG and self._intake.fault:
            raise StreamError(f"{self._place()}: {self._fault()}")
        if result < 0:
            raise failure(self.name, result, self.channel.timeout)
        return result

    def _place(self) -> str:
        inner = f" and {self._intake.inner:#x} of its batch" if self._intake.inner else ""
        return f"{self.name}: at byte {self._intake.offset:#x}{inner}"

    def _fault(self) -> str:
        intake = self._intake
        match intake.fault:
            case lib.KVMPY_FAULT_KIND:
                return f"no record of kind {intake.kind} belongs there"
            case lib.KVMPY_FAULT_COUNT:
                return f"a record of kind {intake.kind} must not count {intake.pages} (of {intake.gpa:#x})"
            case lib.KVMPY_FAULT_ALIGNMENT:
                return f"{intake.gpa:#x} is not the beginning of a page"
            case lib.KVMPY_FAULT_RANGE:
                return f"{intake.gpa:#x}+{intake.pages * PAGE:#x} is not RAM of this machine"
            case _:
                return "the stream is cut off"
