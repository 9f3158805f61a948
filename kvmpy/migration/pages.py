"""Sending the pages of RAM, in rounds, over one channel or several (`kvmpy.migration.records`).

The work is C, without the GIL: it looks for dirty pages, takes them out of KVM's log, tells those that are zero, and
sends the others from guest memory itself. Python does a few calls for each block and channel, or for each batch.

A page goes over the channel that its address says, always, so an old copy never overtakes a newer one. A channel has a
thread of its own in each round, the first channel the caller's; but a round of few pages is sent by the caller alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from kvmpy._native import ffi, lib
from kvmpy.errors import HostError, IoctlError, MigrationCancelled
from kvmpy.migration.dirty import BlockPages, DirtyPages
from kvmpy.migration.records import (
    BATCH,
    END,
    MOST_BATCH,
    MOST_CHANNELS,
    RECORD,
    ZSTD,
    Flow,
    PageChannel,
    failure,
    milliseconds,
)
from kvmpy.migration.zstd import Packer
from kvmpy.trace import Tracepoint

trace_round = Tracepoint("migration.round", "number pages zero_pages bytes ms")

COMPRESSIONS: Final = ("none", "zstd")
PACKED: Final = 128 << 10
"""Bytes of a batch that the pump packs: they stay in a processor's cache from one step to the next, on both sides."""
FEW: Final = 256
"""Pages that are sent sooner than threads for them can be had: such is the round for which a guest stands still."""


class RoundStats(msgspec.Struct, frozen=True):
    """What one round moved. ``pages`` includes ``zero_pages``; ``bytes`` are those on the channels."""

    number: int
    pages: int
    zero_pages: int
    bytes: int
    seconds: float
    dirty_rate: float  # pages a second that became dirty, in the time before the round; 0 where that is not known


class PageSender:
    """Sends rounds of pages. One thread calls `send_round`; any thread `cancel`, ``max_bandwidth`` and `sent`."""

    def __init__(self, channels: Sequence[PageChannel], *, max_bandwidth: int = 0, compression: str = "none") -> None:
        """``max_bandwidth`` is bytes a second of all channels together, 0 for no limit; ``compression`` one of
        COMPRESSIONS. Raises HostError where there is no zstd.
        """
        if not 1 <= len(channels) <= MOST_CHANNELS or compression not in COMPRESSIONS:
            raise ValueError(f"{len(channels)} page channels, compression {compression}")
        self._flow = Flow(max_bandwidth)
        self._is_cancelled = False
        self._lanes = [
            _Lane(index, len(channels), channel, self._flow, Packer() if compression == "zstd" else None)
            for index, channel in enumerate(channels)
        ]

    @property
    def max_bandwidth(self) -> int:
        """Bytes a second of all channels together, 0 for no limit; holds for what is sent from now on."""
        return self._flow.rate

    @max_bandwidth.setter
    def max_bandwidth(self, rate: int) -> None:
        self._flow.rate = rate

    @property
    def sent(self) -> tuple[int, int, int]:
        """(pages, zero pages among them, bytes) in all rounds, and so far in the one under way."""
        counts = [lane.counts() for lane in self._lanes]
        return sum(c[0] for c in counts), sum(c[1] for c in counts), sum(c[2] for c in counts)

    def send_round(self, dirty: DirtyPages, number: int) -> RoundStats:
        """Send the pages in ``dirty`` as they are now, and take them out of it; then an END mark on every channel.

        Raises MigrationError, HostError: then pages may have left the log and not arrived, and it is over.
        """
        began, before = time.monotonic(), self.sent
        make = _one_by_one if dirty.count() <= FEW else _together
        make([(lane.name, partial(lane.send, dirty.blocks, number)) for lane in self._lanes], self._fail)
        seconds = time.monotonic() - began
        pages, zeros, size = (after - earlier for after, earlier in zip(self.sent, before, strict=True))
        stats = RoundStats(number, pages, zeros, size, seconds, dirty.rate)
        dirty.clear()
        if trace_round:
            trace_round(number, pages, zeros, size, int(seconds * 1000))
        return stats

    def cancel(self) -> None:
        """End a round under way, and every later one, at once, with MigrationCancelled. Any thread."""
        self._is_cancelled = True
        self._stop()

    def _stop(self) -> None:
        self._flow.cancel()
        for lane in self._lanes:
            lane.interrupt()

    def _fail(self, e: Exception) -> Exception:
        """One lane has failed: the others need not go on. What is to be told of it."""
        self._stop()
        return MigrationCancelled("cancelled") if self._is_cancelled else e


class _Lane:
    """One channel, and what has gone over it."""

    def __init__(self, index: int, count: int, channel: PageChannel, flow: Flow, packer: Packer | None) -> None:
        self.name = f"page channel {index}"
        self._index, self._count = index, count
        self._channel, self._flow, self._packer = channel, flow, packer
        # What came before, and the sweep under way: one attribute, so that another thread sees both or neither.
        self._progress: tuple[tuple[int, int, int], Any] = (0, 0, 0), None
        # Room for a record, and a batch behind it.
        batch = MOST_BATCH if channel.raw_fd is None else PACKED if packer else 0
        self._buffer = bytearray(RECORD.size + batch if batch else 0)
        self._packed = memoryview(bytearray(RECORD.size + batch if packer else 0))
        self._native = packer.native(self._buffer, self._packed, PACKED) if packer else None

    def counts(self) -> tuple[int, int, int]:
        """(pages, zero pages, bytes). Any thread."""
        (pages, zeros, size), sweep = self._progress
        if sweep is None:
            return pages, zeros, size
        return pages + sweep.data_pages + sweep.zero_pages, zeros + sweep.zero_pages, size + sweep.bytes

    def interrupt(self) -> None:
        """Wake the thread that sends, where the flow being cancelled does not."""
        if self._channel.raw_fd is None:
            self._channel.shutdown()

    def send(self, blocks: Sequence[BlockPages], number: int) -> None:
        """Our pages of all blocks, and the END mark."""
        for pages in blocks:
            if pages.bits.count():
                sweep = self._new_sweep(pages)
                self._progress = self._progress[0], sweep
                try:
                    self._send_memory(sweep) if self._channel.raw_fd is not None else self._send_batches(sweep)
                finally:
                    self._progress = self.counts(), None
        self._write(RECORD.pack(number, 0, END))
        total, zeros, size = self.counts()
        self._progress = (total, zeros, size + RECORD.size), None

    def _new_sweep(self, pages: BlockPages) -> Any:
        clear = pages.to_clear
        return ffi.new(
            "struct kvmpy_sweep *",
            {
                "memory": ffi.cast("char *", pages.block.hva),
                "gpa": pages.block.gpa,
                "pages": pages.bits.size,
                "bits": pages.bits.words,
                "channel": self._index,
                "channels": self._count,
                "vm": -1 if clear is None else clear.vm_fd,
                "slot": 0 if clear is None else clear.slot,
            },
        )

    def _send_memory(self, sweep: Any) -> None:
        fd, timeout = self._channel.raw_fd, milliseconds(self._channel.timeout)
        if self._native is None:
            result = lib.kvmpy_sweep_send(sweep, self._flow.c, fd, timeout)
        else:
            result = lib.kvmpy_sweep_pack(sweep, self._flow.c, self._native, fd, timeout)
        self._check(result, sweep)

    def _send_batches(self, sweep: Any) -> None:
        view = memoryview(self._buffer)
        with ffi.from_buffer(self._buffer) as start:
            batch = start + RECORD.size
            while size := self._check(lib.kvmpy_sweep_copy(sweep, self._flow.c, batch, MOST_BATCH), sweep):
                data = self._framed(view, size)
                self._write(data)
                sweep.bytes += len(data)

    def _framed(self, view: memoryview, size: int) -> memoryview:
        """The batch of ``size`` bytes in our buffer with its record before it; packed, where that makes it smaller."""
        end = RECORD.size + size
        if self._packer is not None:
            packed = self._packer.pack(view[RECORD.size : end], self._packed[RECORD.size : end - 1])
            if packed:
                RECORD.pack_into(self._packed, 0, size, packed, ZSTD)
                return self._packed[: RECORD.size + packed]
        RECORD.pack_into(view, 0, size, size, BATCH)
        return view[:end]

    def _write(self, data: memoryview | bytes) -> None:
        self._check(lib.kvmpy_flow_pace(self._flow.c, len(data)))
        fd = self._channel.raw_fd
        if fd is None:
            self._channel.send(data)
        else:
            timeout = milliseconds(self._channel.timeout)
            self._check(lib.kvmpy_flow_write(self._flow.c, fd, ffi.from_buffer(data), len(data), timeout))

    def _check(self, result: int, sweep: Any = None) -> int:
        if result >= 0:
            return result
        if sweep is not None and sweep.clear_failed:
            raise IoctlError("KVM_CLEAR_DIRTY_LOG", -result)
        raise failure(self.name, result, self._channel.timeout)


def _one_by_one(calls: Sequence[tuple[str, Callable[[], None]]], failed: Callable[[Exception], Exception]) -> None:
    """Make calls one after another. Raises what ``failed`` says of the first failure."""
    for _, call in calls:
        try:
            call()
        except Exception as e:  # noqa: BLE001  raised again
            raise failed(e) from None


def _together(calls: Sequence[tuple[str, Callable[[], None]]], failed: Callable[[Exception], Exception]) -> None:
    """Make named calls at the same time, the first in this thread. Raises what ``failed`` says of the first failure,
    when all have ended.
    """
    failures: list[Exception] = []

    def make(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as e:  # noqa: BLE001  raised below
            failures.append(failed(e))

    threads = [threading.Thread(target=make, args=(call,), name=name, daemon=True) for name, call in calls[1:]]
    started = 0
    try:
        for thread in threads:
            thread.start()
            started += 1
    except RuntimeError:  # "can't start new thread", without an errno
        failures.append(
            failed(HostError("EAGAIN: no thread for a page channel; raise the limit of processes (ulimit -u)"))
        )
    else:
        make(calls[0][1])
    for thread in threads[:started]:
        thread.join()
    if failures:
        failure = failures[0]
        failures.clear()  # or the list and the traceback hold each other
        try:
            raise failure
        finally:
            del failure
