"""A split virtqueue, the device's side of it (Virtio 1.2, section 2.7).

    while (chain := queue.pop()) is not None:
        ...fill chain.writable...
        queue.push(chain, written)
    if queue.needs_interrupt():
        ...

The rings lie in guest memory and every word in them is the guest's to choose, at any time. So each descriptor and each
ring entry is copied once and the copy is checked; only payload is handed on as views. What no driver may do (a chain
that never ends, a descriptor beyond the table, an index that jumps) raises QueueError with the queue's state unchanged.

Two sides race without a lock, and three orders make that sound: the available index is loaded before the entries it
covers (acquire), the used index is stored after the entries it covers (release), and between telling the other side
something and looking at what it says there is a full fence (`needs_interrupt`, `set_notification`).

A queue is used by one thread at a time: whoever holds its device's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from kvmpy._native import ffi, lib
from kvmpy.abi.virtio import (
    LARGEST_QUEUE,
    NO_VECTOR,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_IDX,
    VIRTQ_RING,
    VIRTQ_USED_ELEM,
    VIRTQ_USED_F_NO_NOTIFY,
)
from kvmpy.errors import GuestError
from kvmpy.host.eventfd import EventFd
from kvmpy.memory import GuestMemory
from kvmpy.state import State, u16, u64
from kvmpy.trace import Tracepoint

trace_pop = Tracepoint("virtio.pop", "queue head readable writable")
trace_push = Tracepoint("virtio.push", "queue head written")

# In one chain. Far above what drivers send (Linux: 64 KiB a packet, a few MiB a disk request), and low enough that one
# request of a hostile guest, the same megabytes named over and over, cannot keep a thread busy for minutes.
CHAIN_BYTES: Final = 256 << 20

_DESC_SIZE: Final = VIRTQ_DESC.size
_USED_SIZE: Final = VIRTQ_USED_ELEM.size
_read_desc: Final = VIRTQ_DESC.unpack_from
_write_used: Final = VIRTQ_USED_ELEM.pack_into


class QueueError(GuestError):
    """The guest broke a virtqueue: its device stops until the driver resets it."""


class QueueState(State):
    """A virtqueue as the driver set it up, and how far we are. ``desc``, ``driver``, ``device`` are gpas."""

    NAME = "virtqueue"
    VERSION = 1
    size: u16 = 0
    desc: u64 = 0
    driver: u64 = 0
    device: u64 = 0
    enabled: bool = False
    vector: u16 = NO_VECTOR
    last_avail: u16 = 0  # index of the next available entry to take
    next_used: u16 = 0  # index that the next used entry gets


class Chain(msgspec.Struct):
    """One request of the driver: views of guest memory, to be read and to be written. Sizes in bytes.

    What ``readable`` shows may change while it is looked at: copy what is checked before it is used. ``spans`` is where
    the writable buffers are, (gpa, size) of each.
    """

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    readable_size: int
    writable_size: int
    spans: list[tuple[int, int]]


class _Rings:
    """The areas of a queue that is in use: views of guest memory, and pointers to the words both sides race for."""

    def __init__(self, memory: GuestMemory, state: QueueState) -> None:
        size = state.size
        if state.desc % 16 or state.driver % 2 or state.device % 4:
            raise GuestError(f"misaligned: descriptors {state.desc:#x}, rings {state.driver:#x} and {state.device:#x}")
        self.table = memory.view(state.desc, _DESC_SIZE * size)
        self._driver = memory.view(state.driver, VIRTQ_RING + 2 * size + 2)
        self.used = memory.view(state.device, VIRTQ_RING + _USED_SIZE * size + 2)
        self.heads = self._driver[VIRTQ_RING : VIRTQ_RING + 2 * size].cast("H")
        # The pointers below keep nothing alive: they are gone when these two are.
        self._exports: tuple[Any, ...] = (ffi.from_buffer(self._driver), ffi.from_buffer(self.used))
        driver, device = (export + 0 for export in self._exports)
        self.avail_flags, self.avail_idx, self.used_event = driver, driver + VIRTQ_IDX, driver + VIRTQ_RING + 2 * size
        self.used_flags, self.used_idx = device, device + VIRTQ_IDX
        self.avail_event = device + VIRTQ_RING + _USED_SIZE * size
        self.used_gpa = state.device

    def close(self) -> None:
        """Let go of guest memory, or it could not be unmapped."""
        for export in self._exports:
            ffi.release(export)
        for view in (self.table, self.heads, self._driver, self.used):
            view.release()


class Virtqueue:
    """One queue of a device. Between `start` and `stop` it is in use; outside, it has nothing and takes nothing.

    ``kick`` is signalled by the driver's notification. Whoever else works on the rings meanwhile (vhost) stores in
    ``state`` how far it came, between `stop` and `start`.
    """

    def __init__(self, name: str, memory: GuestMemory, max_size: int) -> None:
        if not 0 < max_size <= LARGEST_QUEUE or max_size & max_size - 1:
            raise ValueError(f"{name}: a queue of {max_size}")
        self.name, self.max_size = name, max_size
        self.state = QueueState(size=max_size)
        self.kick = EventFd()
        self._memory = memory
        self._rings: _Rings | None = None
        self._indirect = self._event_idx = False
        self._mask = 0
        self._avail = 0  # the available index as last seen
        self._signalled = 0  # the used index at the last `needs_interrupt`

    @property
    def running(self) -> bool:
        """Whether it is between `start` and `stop`."""
        return self._rings is not None

    @property
    def in_flight(self) -> int:
        """Chains popped and not pushed yet."""
        return self.state.last_avail - self.state.next_used & 0xFFFF

    def start(self, *, indirect: bool, event_idx: bool) -> None:
        """Begin, or go on, where ``state`` says; the two features are the driver's choice. Raises GuestError."""
        self.stop()
        s = self.state
        if not 0 < s.size <= self.max_size or s.size & s.size - 1:
            raise QueueError(f"{self.name}: {s.size} entries, of at most {self.max_size}")
        if self.in_flight > s.size:
            raise QueueError(f"{self.name}: {self.in_flight} chains in flight in a queue of {s.size}")
        try:
            self._rings = _Rings(self._memory, s)
        except GuestError as e:
            raise QueueError(f"{self.name}: {e}") from e
        self._indirect, self._event_idx = indirect, event_idx
        self._mask = s.size - 1
        self._avail, self._signalled = s.last_avail, s.next_used

    def stop(self) -> None:
        """Let go of guest memory. Chains that were popped must have been pushed, or rewound."""
        if self._rings is not None:
            self._rings.close()
            self._rings = None

    def close(self) -> None:
        """Stop, and give the kick eventfd back."""
        self.stop()
        self.kick.close()

    def has_chains(self) -> bool:
        """Whether `pop` has one to give. Raises QueueError."""
        return self._rings is not None and (self._avail != self.state.last_avail or self._look(self._rings))

    def pop(self) -> Chain | None:
        """The next chain the driver has made available, None if there is none. Raises QueueError."""
        rings, s = self._rings, self.state
        if rings is None or (self._avail == s.last_avail and not self._look(rings)):
            return None
        try:
            chain = self._walk(rings, rings.heads[s.last_avail & self._mask])
        except GuestError as e:
            raise QueueError(f"{self.name}: {e}") from e
        s.last_avail = s.last_avail + 1 & 0xFFFF
        if trace_pop:
            trace_pop(self.name, chain.head, chain.readable_size, chain.writable_size)
        return chain

    def rewind(self, count: int) -> None:
        """Un-pop the last ``count`` chains, none of which has been pushed: `pop` gives them again."""
        assert 0 <= count <= self.in_flight
        self.state.last_avail = self.state.last_avail - count & 0xFFFF

    def mark(self, chain: Chain, written: int | None = None) -> None:
        """The first ``written`` bytes of a chain's writable part have been written, or any of it (None).

        `push` does this for what it is told was written; needed where there is more, or nothing is pushed. Any thread.
        """
        log = self._memory.log
        if log is not None:
            left = chain.writable_size if written is None else written
            for gpa, size in chain.spans:
                if left <= 0:
                    break
                log.mark(gpa, min(size, left))
                left -= size

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back to the driver, ``written`` bytes of its writable part filled, from the first on."""
        self.push_all(((chain, written),))

    def push_all(self, done: Iterable[tuple[Chain, int]]) -> None:
        """Give several chains back, in any order; the driver sees all of them at once."""
        rings, s = self._rings, self.state
        if rings is None:
            return
        index = s.next_used
        for chain, written in done:
            assert written <= chain.writable_size
            _write_used(rings.used, VIRTQ_RING + _USED_SIZE * (index & self._mask), chain.head, written)
            index = index + 1 & 0xFFFF
            if self._memory.log is not None:
                self.mark(chain, written)
            if trace_push:
                trace_push(self.name, chain.head, written)
        assert s.last_avail - index & 0xFFFF <= s.size  # each chain is pushed once
        s.next_used = index
        lib.kvmpy_store16(rings.used_idx, index)
        if self._memory.log is not None:
            self._memory.mark(rings.used_gpa, len(rings.used))

    def chains(self) -> Iterator[Chain]:
        """Pop until there is no more, with the driver asked not to kick meanwhile. Raises QueueError.

        Ends after as many chains as the queue is long, though there are more, with our own ``kick`` signalled: a driver
        that offers without end does not hold the thread. Who does not iterate to the end calls `set_notification`.
        """
        left = self.state.size
        self.set_notification(enabled=False)
        while True:
            while (chain := self.pop()) is not None:
                yield chain
                left -= 1
                if not left:
                    self.kick.signal()
                    return
            if not self.set_notification(enabled=True):
                return
            self.set_notification(enabled=False)

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what has been pushed since the last call (sections 2.7.7 and 2.7.10)."""
        rings, new, old = self._rings, self.state.next_used, self._signalled
        if rings is None or new == old:
            return False
        self._signalled = new
        lib.kvmpy_fence()
        if self._event_idx:
            event = lib.kvmpy_load16(rings.used_event)
            return bool((new - event - 1 & 0xFFFF) < (new - old & 0xFFFF))
        return not lib.kvmpy_load16(rings.avail_flags) & VIRTQ_AVAIL_F_NO_INTERRUPT

    def set_notification(self, *, enabled: bool) -> bool:
        """Ask the driver to kick when it offers more, or not to: a hint, it may kick all the same.

        True if there are chains that it will not kick for: look again. Raises QueueError.
        """
        rings = self._rings
        if rings is None:
            return False
        if not self._event_idx:
            lib.kvmpy_store16(rings.used_flags, 0 if enabled else VIRTQ_USED_F_NO_NOTIFY)
        elif enabled:  # switched off it stays behind, and the driver never passes it again
            lib.kvmpy_store16(rings.avail_event, self.state.last_avail)
        if self._memory.log is not None:
            self._memory.mark(rings.used_gpa, len(rings.used))
        if not enabled:
            return False
        lib.kvmpy_fence()
        return self.has_chains()

    def _look(self, rings: _Rings) -> bool:
        """See how many chains there are now. Raises QueueError where there cannot be so many."""
        s = self.state
        avail = lib.kvmpy_load16(rings.avail_idx)
        if (avail - s.last_avail & 0xFFFF) + self.in_flight > s.size:
            raise QueueError(f"{self.name}: available index {avail} after {s.last_avail} in a queue of {s.size}")
        self._avail = avail
        return bool(avail != s.last_avail)

    def _walk(self, rings: _Rings, head: int) -> Chain:
        """Collect the chain that begins at descriptor ``head``. Raises GuestError."""
        buffers: tuple[list[memoryview], list[memoryview]] = ([], [])
        sizes = [0, 0]
        spans: list[tuple[int, int]] = []
        table, count, index, side = rings.table, self.state.size, head, 0
        # No chain is longer than the queue (section 2.7.5.3.1), and that ends a loop. Here: than the queue can be, as
        # drivers shrink queues and send long indirect tables all the same; one more descriptor names the table.
        for _ in range(self.max_size + 1):
            if index >= count:
                raise GuestError(f"descriptor {index} of {count}")
            gpa, size, flags, following = _read_desc(table, _DESC_SIZE * index)
            if flags & VIRTQ_DESC_F_INDIRECT:
                if table is not rings.table or flags & VIRTQ_DESC_F_NEXT:
                    raise GuestError(f"descriptor {index} must not be indirect")
                table, count, index = self._indirect_table(gpa, size), size // _DESC_SIZE, 0
                continue
            before, side = side, 1 if flags & VIRTQ_DESC_F_WRITE else 0
            if side < before:
                raise GuestError(f"descriptor {index} is to be read, after one to be written")
            if size:  # an empty buffer is nowhere
                buffers[side].append(self._memory.view(gpa, size))
                sizes[side] += size
                if side:
                    spans.append((gpa, size))
            if not flags & VIRTQ_DESC_F_NEXT:
                if sum(sizes) > CHAIN_BYTES:
                    raise GuestError(f"a chain of {sum(sizes):#x} bytes")
                return Chain(head, *buffers, sizes[0], sizes[1], spans)
            index = following
        raise GuestError(f"the chain at descriptor {head} is longer than the queue, or never ends")

    def _indirect_table(self, gpa: int, size: int) -> memoryview:
        if not self._indirect:
            raise GuestError("an indirect table, which was not negotiated")
        if not size or size % _DESC_SIZE or size > _DESC_SIZE * self.max_size:
            raise GuestError(f"an indirect table of {size:#x} bytes")
        return self._memory.view(gpa, size)
