"""virtio-blk: a disk of 512-byte sectors over one or more queues of requests (Virtio 1.2, section 5.2).

The disk takes its time, and neither the io thread nor a vCPU may wait for it. So the io thread only pops requests and
passes them on; ``WORKERS`` threads carry them out without any lock, and take the device's lock for the moment it takes
to give a request back. A queue bounds how many are under way: a driver that offers more breaks the device.

A disk that hangs holds up nobody but its own guest (docs/adr/0013). `withdraw` waits for nothing: what is under way is
given back as it comes, and before the last has the device does not run again. After a reset or a break it ends unheard,
a generation too old, and what no worker has begun is not done at all. Only `pause` and `close` wait, on a condition of
the device's lock, which lets go of it meanwhile.

Writes are durable when the driver believes so (section 5.2.6.2): a flush is fdatasync, begun after it was asked for;
and while the cache is "writethrough", each write is followed by one before the driver hears of it.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from enum import IntEnum
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from kvmpy.abi.virtio import DeviceId, feature_mask
from kvmpy.devices.virtio.blk_request import (
    ID_SIZE,
    MOST_DISCARDED,
    MOST_RANGES,
    MOST_ZEROED,
    Answer,
    Disk,
    Kind,
    Request,
    carry_out,
)
from kvmpy.devices.virtio.device import Loop, QueueSpec, VirtioDevice, VirtioDeviceState
from kvmpy.devices.virtio.queue import Chain
from kvmpy.errors import GuestError, HostError, errno_name, refusal
from kvmpy.host.image import SECTOR
from kvmpy.log import Log
from kvmpy.memory import GuestMemory
from kvmpy.trace import Tracepoint

log = Log(__name__)

trace_request = Tracepoint("virtio.blk", "device kind sector size answer")

# Threads a disk: how many requests the host sees at once. More would wait for Python, not for the disk.
WORKERS: Final = 8
QUEUE_SIZE: Final = 256
# A request's buffers; its header and status are two more in the same table.
SEGMENTS: Final = QUEUE_SIZE - 2
# Requests that the io thread takes in one go, before others' events have their turn.
BATCH: Final = 16
# Seconds after which a wait for the disk is worth a word; the next one comes after twice as long.
PATIENCE: Final = 5.0

# struct virtio_blk_config, as far as it is used: capacity, size_max, seg_max, geometry, blk_size, topology (exponent of
# the physical block, offset, least and best size), writeback, num_queues, and the limits of discards and zeroes.
_CONFIG: Final = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")
_WRITEBACK: Final = 32  # its offset there


class BlkFeature(IntEnum):
    """Numbers of the feature bits (section 5.2.3)."""

    SEG_MAX = 2
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14


class BlkState(VirtioDeviceState):
    NAME = "virtio-blk"
    VERSION = 1
    writeback: bool | None = None  # the driver's choice of the cache, once it has made one


class Job(NamedTuple):
    """A chain of queue number ``queue``, for a worker. If it writes, and ``durable``, a flush comes before its end.

    It is heard of while ``generation`` is the device's.
    """

    queue: int
    chain: Chain
    durable: bool
    generation: int


class VirtioBlk(VirtioDevice[BlkState]):
    """A disk. ``serial`` is what the guest reads as its serial number, of which 20 bytes count.

    The disk stays its maker's, who closes it after this device.
    """

    DEVICE_ID = DeviceId.BLOCK
    FEATURES = BlkFeature

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        io: Loop,
        disk: Disk,
        *,
        serial: str,
        queues: int = 1,
        workers: int = WORKERS,
    ) -> None:
        specs = [QueueSpec(f"requests{index}", QUEUE_SIZE) for index in range(queues)]
        super().__init__(name, BlkState(), memory, io, specs, _features(disk, queues))
        self.disk = disk
        self._serial = serial.encode()[:ID_SIZE].ljust(ID_SIZE, b"\0")
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._to_start = [
            threading.Thread(target=self._work, name=f"blk-{name.partition('/')[0]}-{number}", daemon=True)
            for number in range(workers)
        ]
        self._workers: list[threading.Thread] = []
        self._idle = threading.Condition(self.lock)
        self._under_way = 0  # of any generation
        self._generation = 0
        self._counts: Counter[str] = Counter()
        self._reported: set[tuple[str, int]] = set()

    @property
    def writeback(self) -> bool:
        """Whether the driver takes a write for volatile until it has flushed."""
        if self.state.writeback is not None and self.acked(BlkFeature.CONFIG_WCE):
            return self.state.writeback
        return self.acked(BlkFeature.FLUSH)

    def config(self) -> bytes:
        geometry, writable = self.disk.geometry, not self.disk.readonly
        blocks = geometry.physical_block_size // geometry.block_size
        return _CONFIG.pack(
            self.disk.sectors,
            0,
            SEGMENTS,
            geometry.block_size,
            blocks.bit_length() - 1,
            0,
            blocks,
            0,
            self.writeback,
            len(self.queues),
            MOST_DISCARDED * geometry.can_unmap,
            MOST_RANGES * geometry.can_unmap,
            geometry.discard_granularity // SECTOR * geometry.can_unmap,
            MOST_ZEROED * writable,
            MOST_RANGES * writable,
            geometry.can_unmap,
        )

    def config_write(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (_WRITEBACK, 1) and self.acked(BlkFeature.CONFIG_WCE):
            self.state.writeback = bool(value)

    def on_notify(self, index: int) -> None:
        queue = self.queues[index]
        for taken, chain in enumerate(queue.chains(), 1):
            self._under_way += 1
            self._jobs.put(Job(index, chain, not self.writeback, self._generation))
            if taken == BATCH:
                queue.kick.signal()
                break

    # The life cycle: no request outlives what it belongs to

    @property
    def busy(self) -> bool:
        return self._under_way > 0

    def disown(self) -> None:
        self._generation += 1

    def begin_pause(self) -> bool:
        super().pause()
        return not self.busy

    def pause(self) -> None:
        super().pause()
        with self.lock:
            self._wait()

    def resume(self) -> None:
        self._start_workers()
        super().resume()

    def close(self) -> None:
        super().close()
        with self.lock:
            self._wait()
        for _ in self._workers:
            self._jobs.put(None)
        while self._workers:
            self._workers.pop().join()

    @property
    def is_durable(self) -> bool:
        return self.disk.readonly

    def make_durable(self) -> None:
        try:
            if not self.is_durable:
                self.disk.flush()
        except OSError as e:
            said = refusal(e.errno, "what was written may not be there for others")
            raise HostError(f"{self.name}: {self.disk.path}: {said}") from e

    def hand_over(self) -> None:
        self.disk.unlock()

    def take_over(self) -> None:
        self.disk.lock()

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "size": self.disk.sectors * SECTOR,
            "readonly": self.disk.readonly,
            "block-size": self.disk.geometry.block_size,
            "serial": self._serial.rstrip(b"\0").decode(errors="replace"),
        }

    def info(self) -> dict[str, Any]:
        with self.lock:
            return super().info() | {
                "file": self.disk.path,
                "size": self.disk.sectors * SECTOR,
                "readonly": self.disk.readonly,
                "cache": "none" if self.disk.direct else "writeback",
                "under-way": self._under_way,
                "requests": dict(self._counts),
            }

    def _start_workers(self) -> None:
        try:
            while self._to_start:
                self._to_start[-1].start()
                self._workers.append(self._to_start.pop())
        except RuntimeError as e:  # "can't start new thread", without an errno
            raise HostError(
                f"{self.name}: EAGAIN: no thread for the disk; "
                "raise the limit of processes (ulimit -u, or pids.max of the cgroup)"
            ) from e

    def _wait(self) -> None:
        """Until nothing is under way. Lets go of the lock meanwhile."""
        patience = PATIENCE
        while not self._idle.wait_for(lambda: not self._under_way, patience):
            log.warning("%s: %s does not answer: %d requests are not done", self.name, self.disk.path, self._under_way)
            patience *= 2

    # The workers

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Do one job; False where there will be no more."""
        if (job := self._jobs.get()) is None:
            return False
        try:
            if job.generation == self._generation:
                request = Request.of(job.chain)
                self._complete(job, request, self._carry_out(request, durable=job.durable))
        except GuestError as e:
            self.break_(f"{self.name}: {e}")
        finally:
            with self.lock:
                self._under_way -= 1
                if not self._under_way:
                    if not self.running:
                        self.settled()
                    self._idle.notify_all()
        return True

    def _carry_out(self, request: Request, *, durable: bool) -> Answer:
        try:
            offered = [kind for kind, feature in _KIND_FEATURES.items() if self.acked(feature)]
            answer = carry_out(request, self.disk, offered, self._serial)
            if durable and answer is Answer.OK and request.kind in (Kind.OUT, Kind.WRITE_ZEROES):
                self.disk.flush()
        except OSError as e:
            self._report(request.name, e.errno or 0)
            answer = Answer.IOERR
        except Exception:  # a bug of ours: the driver waits all the same
            log.exception("%s: a request failed", self.name)
            answer = Answer.IOERR
        if trace_request:
            size = request.readable_size or request.writable_size
            trace_request(self.name, request.name, request.sector, size, answer.name)
        return answer

    def _complete(self, job: Job, request: Request, answer: Answer) -> None:
        with self.lock:
            self._counts[request.name] += 1
            self._counts["failed"] += answer is not Answer.OK
            awaited = job.generation == self._generation
            if awaited:
                request.status[0] = answer
            # All of it: a read that fails may have filled a part, and so has one whose device was reset or broke since.
            self.queues[job.queue].mark(job.chain)
            if awaited:
                self.queues[job.queue].push(job.chain, request.written(answer))
                self.interrupt(job.queue)

    def _report(self, what: str, number: int) -> None:
        """Tell the operator once of each kind of error: the guest drives this, and hears of every one."""
        if (what, number) not in self._reported:
            self._reported.add((what, number))
            log.warning(
                "%s: %s: %s: %s; the guest sees an I/O error; said once",
                self.name,
                self.disk.path,
                what,
                errno_name(number),
            )


_KIND_FEATURES: Final = {Kind.DISCARD: BlkFeature.DISCARD, Kind.WRITE_ZEROES: BlkFeature.WRITE_ZEROES}


def _features(disk: Disk, queues: int) -> int:
    features = [BlkFeature.SEG_MAX, BlkFeature.BLK_SIZE, BlkFeature.TOPOLOGY, BlkFeature.FLUSH]
    features += [BlkFeature.RO] if disk.readonly else [BlkFeature.CONFIG_WCE, BlkFeature.WRITE_ZEROES]
    if disk.geometry.can_unmap:
        features.append(BlkFeature.DISCARD)
    if queues > 1:
        features.append(BlkFeature.MQ)
    return feature_mask(*features)
