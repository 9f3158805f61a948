"""Lends a virtio-net device's rings to /dev/vhost-net and takes them back.

A network device is one device with two workers. While vhost has a pair of rings, frames move between tap and guest
memory in the kernel, and none of it passes here; `give_back` leaves the same QueueStates that the userspace path uses,
so it goes on from there, or another host does.

Five traps:

- Taking the backend off a ring makes the kernel finish what it is at, and signal it. Only then is its base the next
  available index; the next used index is nowhere but in the used ring in guest memory.
- The memory table is how the kernel finds buffers. The rings themselves it reads and writes at host-virtual addresses,
  table or no table: before RAM goes, the rings that lie in it come back.
- vhost polls a kick eventfd and never reads it, so the count is still there for who watches it next: one look too many.
- A ring that the guest broke is reported by a signal on an eventfd, and vhost leaves that ring alone until its next
  kick. The pair is taken back, and the device says that it needs a reset.
- Whether it logs what it writes is two settings: a feature for the buffers, a flag for each used ring; and they are
  lost whenever a pair is lent anew. So whoever lends looks whether there is a log.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from kvmpy.abi import vhost as abi
from kvmpy.abi.virtio import VIRTQ_DESC, VIRTQ_IDX, VIRTQ_RING, VIRTQ_USED_ELEM, Feature, feature_mask
from kvmpy.devices.virtio.device import Loop
from kvmpy.devices.virtio.queue import Virtqueue
from kvmpy.errors import GuestError, IoctlError
from kvmpy.host.vhost import DEVICE, RINGS, Region, Ring, VhostWorker
from kvmpy.memory import GuestMemory, Ram
from kvmpy.pagebits import WriteLog
from kvmpy.trace import Tracepoint

trace_take = Tracepoint("vhost.take", "device pair rx tx features")
trace_give_back = Tracepoint("vhost.give_back", "device pair rx tx")

MRG_RXBUF: Final = 15
# The features that are about rings and headers, which vhost handles instead of the device; all others are the tap's.
# VHOST_NET_F_VIRTIO_NET_HDR is not among them and stays off: the tap reads and writes the header itself.
HANDLED: Final = feature_mask(MRG_RXBUF, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.VERSION_1)


class Owner(Protocol):
    """The device whose rings these are; every VirtioDevice is one."""

    name: str

    @property
    def lock(self) -> threading.RLock:
        """The device's lock."""

    def break_(self, why: str) -> object:
        """The device cannot go on until its driver resets it. Called with the lock held."""


class Loan(NamedTuple):
    """A pair of rings that the kernel works on."""

    device: Owner
    queues: tuple[Virtqueue, Virtqueue]
    features: int

    def lies_in(self, block: Ram) -> bool:
        """Whether a part of a ring is in ``block``; each part is in one block."""
        states = [queue.state for queue in self.queues]
        return any(block.gpa <= gpa < block.end for s in states for gpa in (s.desc, s.driver, s.device))


class VhostNet:
    """The rings of one network device, lent to the kernel pair by pair (a `MemoryListener`, and a `LogFollower`).

    `take`, `give_back` and `set_call` are called with the device's lock held. Ours is a leaf: no other is taken under
    it.
    """

    def __init__(self, memory: GuestMemory, io: Loop, pairs: int, path: str = DEVICE) -> None:
        """Raises HostError where there is no vhost-net."""
        self._memory, self._io = memory, io
        self._lock = threading.Lock()
        self._blocks: list[Ram] = []
        self._workers: list[VhostWorker] = []
        self._loans: list[Loan | None] = [None] * pairs
        self._features = HANDLED
        self._log: WriteLog | None = None
        try:
            for pair in range(pairs):
                self._workers.append(worker := VhostWorker(path))
                self._features &= worker.features()
                for index, event in enumerate(worker.errors):
                    io.watch(event.fd, readable=functools.partial(self._ring_broken, pair, index))
            memory.listen(self)
            memory.follow_log(self)
        except BaseException:
            self.close()
            raise

    def features(self) -> int:
        """Those of the `HANDLED` virtio features that this kernel can handle. A device offers no others of them."""
        return self._features

    def lent(self, pair: int) -> bool:
        """Whether the kernel has the rings of ``pair`` now."""
        return self._loans[pair] is not None

    def take(
        self, pair: int, device: Owner, rx: Virtqueue, tx: Virtqueue, *, tap: int, calls: Sequence[int], features: int
    ) -> None:
        """Let the kernel serve two stopped queues, from where their states say, with the tap queue ``tap``.

        ``calls`` are the eventfds it signals when it has used buffers of ``rx`` and ``tx``, -1 for none; ``features``
        is what the driver chose. Raises GuestError for a ring that is not in RAM, HostError where the kernel will not:
        then the queues are as if they had not been lent.
        """
        worker, queues = self._workers[pair], (rx, tx)
        with self._lock:
            assert self._loans[pair] is None
            rings = [self._ring(queue) for queue in queues]
            started: list[Virtqueue] = []
            features &= self._features
            try:
                worker.set_features(features | (self._log is not None) << abi.F_LOG_ALL)
                for index, (ring, queue, call) in enumerate(zip(rings, queues, calls, strict=True)):
                    worker.set_up(index, ring, kick=queue.kick.fd, call=call, logged=self._log is not None)
                for index, queue in enumerate(queues):
                    worker.start(index, tap)
                    started.append(queue)
            except BaseException:
                self._stop(worker, started)
                raise
            self._loans[pair] = Loan(device, queues, features)
        if trace_take:
            trace_take(device.name, pair, rx.state.last_avail, tx.state.last_avail, features)
        for queue in queues:
            queue.kick.signal()  # for what was offered before vhost listened

    def give_back(self, pair: int) -> None:
        """When this returns the kernel touches neither rings nor buffers, and the queues' states say how far it came.

        All that it used it has signalled. The queues are the caller's to start; allowed where nothing is lent.
        """
        with self._lock:
            loan, self._loans[pair] = self._loans[pair], None
            if loan is None:
                return
            self._stop(self._workers[pair], loan.queues)
        if trace_give_back:
            trace_give_back(loan.device.name, pair, *(queue.state.last_avail for queue in loan.queues))

    def set_call(self, pair: int, calls: Sequence[int]) -> None:
        """Signal other eventfds from now on, each once at once: for what may have gone to the one before.

        Raises HostError. Nothing to do where nothing is lent: `take` is given them.
        """
        with self._lock:
            if self._loans[pair] is None:
                return
            for index, call in enumerate(calls):
                self._workers[pair].set_call(index, call)
                if call >= 0:
                    os.eventfd_write(call, 1)

    def ram_added(self, block: Ram) -> None:
        """Raises IoctlError where the kernel takes no more blocks; its table is the one of before then."""
        try:
            with self._lock:
                self._blocks.append(block)
                for worker in self._workers:
                    worker.set_memory(self._regions())
        except IoctlError:
            self.ram_removed(block)
            raise

    def ram_removed(self, block: Ram) -> None:
        """A device with a ring in ``block`` gets its rings back, and is broken."""
        with self._lock:
            self._blocks.remove(block)
            failed = [pair for pair, worker in enumerate(self._workers) if not worker.shrink_memory(self._regions())]
        for pair, loan in enumerate(self._loans):
            if loan is not None and (pair in failed or loan.lies_in(block)):
                self._break(pair, loan, "vhost: memory is taken away that its rings need")

    def log_started(self, log: WriteLog) -> None:
        """Pairs that are lent, and those that will be, note there what the kernel writes. Raises HostError."""
        try:
            with self._lock:
                self._log = log
                for worker, loan in zip(self._workers, self._loans, strict=True):
                    if worker.fd >= 0:
                        worker.set_log(log.address)
                    if loan is not None:
                        rings = [self._ring(queue) for queue in loan.queues]
                        worker.change_logging(loan.features, rings, enabled=True)
        except BaseException:
            self.log_stopped()
            raise

    def log_stopped(self) -> None:
        """A pair that the kernel does not stop to log for is taken back, and its device is broken."""
        failed: list[tuple[int, Loan]] = []
        with self._lock:
            self._log = None
            for pair, loan in enumerate(self._loans):
                if loan is not None:
                    rings = [self._ring(queue) for queue in loan.queues]
                    if not self._workers[pair].stop_logging(loan.features, rings):
                        failed.append((pair, loan))
        for pair, loan in failed:
            self._break(pair, loan, "vhost: the kernel does not stop to log what it writes")

    def close(self) -> None:
        """Take back what is lent and close every descriptor; closing twice is allowed."""
        self._memory.unfollow_log(self)
        for pair, loan in enumerate(self._loans):
            if loan is not None:
                with loan.device.lock:
                    self.give_back(pair)
        with self._lock:
            for worker in self._workers:
                for event in worker.errors:
                    self._io.unwatch(event.fd)
                worker.close()
        self._memory.unlisten(self)  # last: who is closed has nothing to tell the kernel of each block

    def _ring_broken(self, pair: int, index: int) -> None:
        """The kernel says so, in the io thread."""
        if (loan := self._loans[pair]) is not None:
            with loan.device.lock:
                # What was reported of an earlier loan has been taken when that was given back.
                if self._loans[pair] is loan and self._workers[pair].errors[index].take():
                    self._break(pair, loan, f"vhost: the {RINGS[index]} ring of queue pair {pair} is broken")

    def _break(self, pair: int, loan: Loan, why: str) -> None:
        with loan.device.lock:
            if self._loans[pair] is loan:  # not given back while we waited
                self.give_back(pair)
                loan.device.break_(why)

    def _stop(self, worker: VhostWorker, queues: Sequence[Virtqueue]) -> None:
        """Have the worker stop, and note how far it came in ``queues``, the first of which it had."""
        bases = worker.stop()
        for index, queue in enumerate(queues):
            state = queue.state
            state.next_used = int.from_bytes(self._memory.read(state.device + VIRTQ_IDX, 2), "little")
            # A worker that had to be closed says nothing, but the kernel keeps no chain that it has not used.
            state.last_avail = bases[index] if bases else state.next_used

    def _regions(self) -> list[Region]:
        return [Region(block.gpa, block.size, block.hva) for block in self._blocks]

    def _ring(self, queue: Virtqueue) -> Ring:
        """A queue as the kernel is told of it. Raises GuestError where a part is misaligned or not all in RAM."""
        s = queue.state
        return Ring(
            size=s.size,
            base=s.last_avail,
            desc=self._hva(queue, s.desc, VIRTQ_DESC.size * s.size, 16),
            avail=self._hva(queue, s.driver, VIRTQ_RING + 2 * s.size + 2, 2),
            used=self._hva(queue, s.device, VIRTQ_RING + VIRTQ_USED_ELEM.size * s.size + 2, 4),
            used_gpa=s.device,
        )

    def _hva(self, queue: Virtqueue, gpa: int, size: int, alignment: int) -> int:
        for block in self._blocks:
            if block.gpa <= gpa and gpa + size <= block.end and not gpa % alignment:
                return block.hva + gpa - block.gpa
        raise GuestError(f"{queue.name}: a ring at {gpa:#x}+{size:#x} is misaligned or not in RAM")
