"""Frames between a tap and the guest's memory, where the kernel does not move them itself (vhost).

One system call a frame, straight from or into the guest's buffers: the virtio-net header that the driver sees is the
tap's own. No byte is copied here, but for a frame that turns out larger than what the driver has offered.

Both directions can be stopped from either end, and each must be started again by that end: a queue without chains by
the driver's kick, a tap that is empty or full by the event loop. The loop is level-triggered, so a tap is not watched
while there is nothing to do about it; a driver kicks only when asked, so after asking we look once more.

Receiving has two questions of its own:

- How large is the next frame? A tap does not say, and cuts off what does not fit. So chains are collected for a frame
  like the largest of late, and stay collected for the next one; behind them lies a scratch buffer, so whatever comes is
  read whole. What does not fit is kept until the driver has offered enough, or dropped when its whole ring is.
- Nobody waits for the device for long: after a time slice it has itself called again (its kick), and the others first.
  But not before it has taken a few steps, however slow the host is: the driver is interrupted once for all of them.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from kvmpy.devices.virtio.device import Loop
from kvmpy.devices.virtio.queue import Chain, Virtqueue
from kvmpy.errors import GuestError, errno_name
from kvmpy.trace import Tracepoint

trace_receive = Tracepoint("virtio.net.receive", "queue bytes chains")
trace_send = Tracepoint("virtio.net.send", "queue bytes")
trace_drop = Tracepoint("virtio.net.drop", "queue bytes why")

HEADER_SIZE: Final = 12  # struct virtio_net_hdr_v1 (section 5.1.6)
NUM_BUFFERS: Final = 10  # where in it the number of chains is that a frame takes
FRAMING: Final = 18  # Ethernet's header, and a VLAN tag
LARGEST: Final = HEADER_SIZE + FRAMING + 65535  # with segmentation left to the receiver
SLICE: Final = 0.0002  # seconds of work before the other callbacks of the io thread get a turn
LEAST: Final = 16  # steps that are taken all the same; and in one of them, chains that are collected
DECAY: Final = 64  # with each frame, less room by this part is kept for a large one
MOST_DRAINED: Final = 1024  # frames; a tap keeps 1000 unless told otherwise
MOST_BUFFERS: Final = 512  # collected; with one more chain, of a queue's length, still less than readv's limit of 1024


class Counters(msgspec.Struct):
    """Frames that went this way, and those that did not."""

    rx_frames: int = 0
    rx_dropped: int = 0
    tx_frames: int = 0
    tx_dropped: int = 0


class Wire:
    """A queue of a tap, its descriptor ``fd``, in the event loop: who waits for it. Under the device's lock."""

    def __init__(self, fd: int, loop: Loop) -> None:
        self.fd, self._loop = fd, loop
        self._waiting: tuple[Callable[[], object] | None, Callable[[], object] | None] = (None, None)

    def on_readable(self, callback: Callable[[], object] | None) -> None:
        """Call back while there is a frame to read; None is not any more."""
        self._wait(callback, self._waiting[1])

    def on_writable(self, callback: Callable[[], object] | None) -> None:
        """Call back while a frame would be taken; None is not any more."""
        self._wait(self._waiting[0], callback)

    def _wait(self, readable: Callable[[], object] | None, writable: Callable[[], object] | None) -> None:
        if self._waiting == (readable, writable):
            return
        self._waiting = (readable, writable)
        if readable or writable:
            self._loop.watch(self.fd, readable=readable, writable=writable)
        else:
            self._loop.unwatch(self.fd)


class Sender:
    """From a transmit queue to the tap. ``wake`` calls `run`, under the lock and only while it may."""

    def __init__(self, queue: Virtqueue, wire: Wire, counters: Counters, wake: Callable[[], object]) -> None:
        self._queue, self._wire, self._counters, self._wake = queue, wire, counters, wake
        self._link_up = True

    def start(self, *, link_up: bool) -> None:
        """Send from now on what `run` finds, or with the link down, swallow it."""
        self._link_up = link_up

    def stop(self) -> None:
        """Wait for nothing any more."""
        self._wire.on_writable(None)

    def run(self) -> None:
        """Send until the queue is empty, the tap full, or the time slice over."""
        queue, deadline = self._queue, time.monotonic() + SLICE
        self._wire.on_writable(None)
        queue.set_notification(enabled=False)
        for steps in itertools.count(1):
            chain = queue.pop()
            if chain is None:
                if not queue.set_notification(enabled=True):
                    return
                queue.set_notification(enabled=False)
            elif self._send(chain):
                queue.push(chain, 0)
            else:
                queue.rewind(1)
                self._wire.on_writable(self._wake)
                return
            if steps % LEAST == 0 and time.monotonic() > deadline:
                queue.kick.signal()
                return

    def _send(self, chain: Chain) -> bool:
        """Write the frame in ``chain``, or drop it; False if the tap is full."""
        size = chain.readable_size
        if not self._link_up:
            self._drop(size, "link down")
        elif not HEADER_SIZE < size <= LARGEST:
            self._drop(size, "no frame")
        else:
            try:
                os.writev(self._wire.fd, chain.readable)
            except BlockingIOError:
                return False
            except OSError as e:  # the kernel refuses the header, or the interface is down
                self._drop(size, errno_name(e.errno or 0))
            else:
                self._counters.tx_frames += 1
                if trace_send:
                    trace_send(self._queue.name, size)
        return True

    def _drop(self, size: int, why: str) -> None:
        self._counters.tx_dropped += 1
        if trace_drop:
            trace_drop(self._queue.name, size, why)


class Receiver:
    """From the tap to a receive queue. ``wake`` calls `run`, under the lock and only while it may; ``scratch`` may be
    shared by all who run under that lock.

    ``_chains`` have been popped, have ``_room`` bytes in ``_buffers``, and wait for a frame; `stop` gives them back.
    ``_held`` is a frame that did not fit in; it is as if it were still in the tap, so it outlives `stop`.
    """

    def __init__(
        self, queue: Virtqueue, wire: Wire, counters: Counters, wake: Callable[[], object], scratch: memoryview
    ) -> None:
        self._queue, self._wire, self._counters, self._wake = queue, wire, counters, wake
        self._scratch = scratch
        self._chains: deque[Chain] = deque()
        self._buffers: list[memoryview] = []
        self._room = 0
        self._held: bytes | None = None
        self._link_up = self._mergeable = self._is_collecting = False
        self._usual = self._largest = self._expected = LARGEST

    def start(self, *, link_up: bool, mergeable: bool, usual: int, largest: int) -> None:
        """Receive from now on; with the link down, swallow frames.

        They have up to ``usual`` bytes where the host has cut them, and up to ``largest`` as a rule.
        """
        self._link_up, self._mergeable = link_up, mergeable
        self._usual = self._expected = usual  # a larger one is seen soon enough
        self._largest = largest
        if not link_up:
            self.forget()

    def stop(self) -> None:
        """Give back what was collected, and wait for nothing any more."""
        self._wire.on_readable(None)
        self._queue.rewind(len(self._chains))
        self._chains.clear()
        self._buffers.clear()
        self._room = 0

    @property
    def holding(self) -> bool:
        """Whether a frame is held."""
        return self._held is not None

    def forget(self) -> None:
        """Drop the frame that is held."""
        if self._held is not None:
            self._drop(len(self._held), "reset, or link down")
            self._held = None

    def drain(self) -> None:
        """Drop what is in the tap, which lets nothing more in; not for ever, should it do so."""
        for _ in range(MOST_DRAINED):
            try:
                size = os.readv(self._wire.fd, [self._scratch])
            except OSError:  # empty, or gone
                return
            if size <= HEADER_SIZE:
                return
            self._drop(size, "reset")

    def run(self) -> None:
        """Receive until the tap is empty, the driver's chains are used up, or the time slice is over."""
        deadline = time.monotonic() + SLICE
        if self._link_up:
            self._queue.set_notification(enabled=False)
        step = self._receive if self._link_up else self._discard
        for steps in itertools.count(1):
            self._is_collecting = False
            if not step():
                return
            if (self._is_collecting or steps % LEAST == 0) and time.monotonic() > deadline:
                self._queue.kick.signal()
                return

    def _receive(self) -> bool:
        """Move one frame, or take a step towards it; False if that has to wait for the tap or the driver."""
        self._is_collecting = self._collect()
        if self._is_collecting:
            return True
        if not self._chains:
            return self._wait_for_driver()
        if self._held is not None:
            return self._deliver_held(self._held)
        if (size := self._read([*self._buffers, self._scratch])) is None:
            return False
        if size > self._expected:
            self._expected = min(size, self._largest)
        elif self._expected > self._usual:
            self._expected = max(size, self._expected - self._expected // DECAY, self._usual)
        if size <= self._room:
            self._deliver(size)
            return True
        for chain in self._chains:  # filled for nothing
            self._queue.mark(chain)
        if self._mergeable:
            self._held = b"".join([*self._buffers, self._scratch[: size - self._room]])
        else:
            self._drop(size, "larger than the chain")
        return True

    def _discard(self) -> bool:
        if (size := self._read([self._scratch])) is None:
            return False
        self._drop(size, "link down")
        return True

    def _read(self, buffers: Sequence[memoryview]) -> int | None:
        """Read a frame; None if there is none: then the tap is watched, unless it is gone."""
        try:
            size = os.readv(self._wire.fd, buffers)
        except BlockingIOError:
            self._wire.on_readable(self._wake)
            return None
        except OSError:
            size = 0
        if size <= HEADER_SIZE:  # somebody has removed the interface
            self._wire.on_readable(None)
            return None
        return size

    def _collect(self) -> bool:
        """Pop chains for the next frame, as far as there are any; True if there is more to do than one step's.

        Without mergeable buffers a frame goes into one chain, whatever its size.
        """
        wanted = 1 if not self._mergeable else self._expected if self._held is None else len(self._held)
        for _ in range(LEAST):
            if self._room >= wanted or len(self._buffers) >= MOST_BUFFERS or (chain := self._queue.pop()) is None:
                return False
            self._chains.append(chain)
            if not chain.writable_size:
                raise GuestError(f"{self._queue.name}: a chain with nothing to write")
            self._buffers += chain.writable
            self._room += chain.writable_size
        return True

    def _wait_for_driver(self) -> bool:
        """Have the driver kick; True if it has offered more meanwhile."""
        self._wire.on_readable(None)
        if not self._queue.set_notification(enabled=True):
            return False
        self._queue.set_notification(enabled=False)
        return True

    def _deliver_held(self, frame: bytes) -> bool:
        if len(frame) > self._room:
            # Each descriptor carries a buffer: with as many as it has, the driver cannot offer more.
            buffers = sum(len(chain.readable) + len(chain.writable) for chain in self._chains)
            if buffers < min(self._queue.state.size, MOST_BUFFERS):
                return self._wait_for_driver()
            self._drop(len(frame), "larger than the ring")
        else:
            _scatter(frame, self._buffers)
            self._deliver(len(frame))
        self._held = None
        return True

    def _deliver(self, size: int) -> None:
        """Give the driver the chains in which a frame of ``size`` bytes lies, all at once."""
        done: list[tuple[Chain, int]] = []
        buffers, left = 0, size
        while left:
            chain = self._chains.popleft()
            done.append((chain, written := min(left, chain.writable_size)))
            left -= written
            buffers += len(chain.writable)
            self._room -= chain.writable_size
        _store(self._buffers, NUM_BUFFERS, len(done).to_bytes(2, "little"))
        del self._buffers[:buffers]
        self._queue.push_all(done)
        self._counters.rx_frames += 1
        if trace_receive:
            trace_receive(self._queue.name, size, len(done))

    def _drop(self, size: int, why: str) -> None:
        self._counters.rx_dropped += 1
        if trace_drop:
            trace_drop(self._queue.name, size, why)


def _store(buffers: Sequence[memoryview], offset: int, data: bytes) -> None:
    """Write ``data`` at ``offset`` of the bytes that ``buffers`` are together."""
    for buffer in buffers:
        if offset < len(buffer):
            piece = data[: len(buffer) - offset]
            buffer[offset : offset + len(piece)] = piece
            data = data[len(piece) :]
            if not data:
                return
        offset = max(offset - len(buffer), 0)


def _scatter(data: bytes, buffers: Sequence[memoryview]) -> None:
    """Write ``data`` into ``buffers``, which are large enough."""
    view = memoryview(data)
    for buffer in buffers:
        piece = view[: len(buffer)]
        buffer[: len(piece)] = piece
        view = view[len(piece) :]
