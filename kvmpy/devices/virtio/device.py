"""What every virtio device shares: status, features, queues, and the life between them (Virtio 1.2, sections 2 and 3).

    class Rng(VirtioDevice[RngState]):
        DEVICE_ID = DeviceId.ENTROPY

        def __init__(self, name: str, memory: GuestMemory, io: Loop) -> None:
            super().__init__(name, RngState(), memory, io, [QueueSpec("requests", 64)])

        def on_notify(self, index: int) -> None:
            queue = self.queues[index]
            for chain in queue.chains():
                queue.push(chain, fill(chain.writable))
            self.interrupt(index)

A device runs from DRIVER_OK until reset, with pauses: `serve` begins that, `withdraw` ends it. Both are called with the
lock held, as is every handler, and a handler runs only while the device does. So once `withdraw` has returned nothing
of the device takes from a ring, and nothing that an event loop dispatched before comes too late.

Neither waits for the host. A device whose chains the host still works on then is `busy` (docs/adr/0013): it gives them
back as they come, unless a reset or a break has come in between, and until the last has it does not run. A driver that
resets it reads a status other than 0 until then (sections 2.4 and 4.1.4.3), so that it frees no buffer too early.

What a driver may not do raises GuestError in a handler and breaks the device, as does a host that fails it: the status
says DEVICE_NEEDS_RESET, `on_broken` is told, and a reset by the driver makes it work again. Nothing else stops. So does
an exception that nobody foresaw: that is a bug of ours, and a device that went on would meet it at every turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import IntEnum
from functools import partial
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Protocol, TypeVar

from msgspec import Meta

from kvmpy.abi.virtio import DeviceId, Feature, Status, feature_mask
from kvmpy.devices.base import Closable, Device
from kvmpy.devices.virtio.queue import QueueState, Virtqueue
from kvmpy.devices.virtio.transport import Transport, Unplugged
from kvmpy.errors import GuestError, HostError, errno_name
from kvmpy.log import Log
from kvmpy.memory import GuestMemory
from kvmpy.state import State, part, u8, u64
from kvmpy.trace import Tracepoint

log = Log(__name__)

trace_status = Tracepoint("virtio.status", "device written status")
trace_notify = Tracepoint("virtio.notify", "device queue")
trace_interrupt = Tracepoint("virtio.interrupt", "device queue")
trace_broken = Tracepoint("virtio.broken", "device why")

# What the queues can do, for every device.
RING_FEATURES: Final = feature_mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
# The order in which a driver sets the bits (section 3.1.1).
STEPS: Final = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)
MOST_QUEUES: Final = 1024
# A handler that fails unforeseen is a bug of ours that the guest may be able to drive: say it this often.
BUGS_LOGGED: Final = 10


class VirtioState(State):
    """What the driver has set up, whatever the transport."""

    NAME = "virtio"
    VERSION = 1
    status: u8 = 0
    driver_features: u64 = 0
    config_generation: u8 = 0
    queues: Annotated[list[QueueState], Meta(max_length=MOST_QUEUES)] = []


class VirtioDeviceState(State):
    """Base of the state of a kind of device: ``class RngState(VirtioDeviceState): NAME = "virtio-rng"``."""

    virtio: VirtioState = part(VirtioState)


V = TypeVar("V", bound=VirtioDeviceState)


class QueueSpec(NamedTuple):
    """One queue of a kind of device; ``max_size`` is a power of two."""

    name: str
    max_size: int


class Loop(Protocol):
    """The event loop that serves a device, the `io` thread's: a `kvmpy.host.reactor.Reactor`."""

    def watch(
        self, fd: int, *, readable: Callable[[], object] | None = None, writable: Callable[[], object] | None = None
    ) -> None:
        """Call back while ``fd`` is ready; replaces what was watched for it."""

    def unwatch(self, fd: int) -> None:
        """Stop; a callback under way in another thread may still be finishing."""

    def post(self, call: Callable[[], object]) -> None:
        """Run ``call`` in the loop's thread, soon."""


class VirtioDevice(Device[V]):
    """A virtio device of some kind; subclasses say which. Made paused, as every device.

    ``features`` are the bits it offers, ``running`` says whether its queues may be touched, ``broken`` why they may not
    be any more. ``on_broken`` is called with that reason, once, under the lock: it may only post.
    """

    DEVICE_ID: ClassVar[DeviceId]
    FEATURES: ClassVar[type[IntEnum]] = Feature
    """The numbers of the feature bits that only this kind of device has."""

    def __init__(
        self, name: str, state: V, memory: GuestMemory, io: Loop, queues: Sequence[QueueSpec], features: int = 0
    ) -> None:
        super().__init__(name, state)
        self.memory, self.io = memory, io
        self.features = features | RING_FEATURES
        self.queues: list[Virtqueue] = []
        with ExitStack() as rollback:
            for spec in queues:
                self.queues.append(Virtqueue(f"{name} {spec.name}", memory, spec.max_size))
                rollback.callback(self.queues[-1].close)
            rollback.pop_all()
        self.transport: Transport = Unplugged()
        self.on_broken: Callable[[str], object] = lambda why: None
        self.running = False
        self.broken: str | None = None
        self._bugs = 0
        self._paused = True
        self._bus_master = True
        self._stopping = False
        self._moved = False
        self._doorbells: list[Closable] = []
        self._watched: set[int] = set()
        self._adopt_queues()

    # For subclasses to override

    def config_read(self, offset: int, size: int) -> int:
        """``size`` bytes at ``offset`` of the device's configuration; zeros behind its end."""
        return int.from_bytes(self.config()[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The driver writes to the device's configuration; ignored where nothing is writable."""

    def config(self) -> bytes:
        """The device's configuration as the driver reads it now."""
        return b""

    def accepts(self, features: int) -> bool:
        """Whether the driver may have exactly these ``features``, all of them offered."""
        return True

    def agreed(self) -> None:
        """The driver has chosen its features for good (FEATURES_OK), until it resets the device."""

    def serve(self) -> None:
        """Use the queues from now on. By default: `on_notify` for each kick of a queue that is running, and once now.

        Raises GuestError or HostError; what was begun is then withdrawn.
        """
        for index, queue in enumerate(self.queues):
            if queue.running:
                self.watch_queue(index)

    def withdraw(self) -> None:
        """Once this returns, nothing is popped; each chain popped has been pushed or rewound, or keeps us `busy`."""
        for index in tuple(self._watched):
            self.unwatch_queue(index)

    @property
    def busy(self) -> bool:
        """The host still works on chains that were popped, and may touch the guest's memory; `settled` follows."""
        return False

    def disown(self) -> None:
        """Those chains are not given back any more: the driver has reset the device, or has to."""

    def on_notify(self, index: int) -> None:
        """The driver kicked queue ``index``, which may have chains. May raise GuestError or HostError."""

    def calls_changed(self) -> None:
        """`Transport.call_event` would answer otherwise now."""

    # For subclasses to use

    @property
    def virtio(self) -> VirtioState:
        """The shared part of the state."""
        return self.state.virtio

    def acked(self, number: int) -> bool:
        """Whether the driver has accepted feature ``number``."""
        return bool(self.virtio.driver_features >> number & 1)

    def start_queue(self, index: int) -> None:
        """Begin with a queue where its state says, or again after somebody else (vhost) had it. Raises GuestError."""
        indirect, event_idx = self.acked(Feature.INDIRECT_DESC), self.acked(Feature.EVENT_IDX)
        self.queues[index].start(indirect=indirect, event_idx=event_idx)

    def watch_queue(self, index: int) -> None:
        """Call `on_notify` for each kick of a queue from now on, and once now."""
        self._watched.add(index)
        kick = self.queues[index].kick
        self.io.watch(kick.fd, readable=partial(self._kicked, index))
        kick.signal()

    def unwatch_queue(self, index: int) -> None:
        """Stop that."""
        self._watched.discard(index)
        self.io.unwatch(self.queues[index].kick.fd)

    def guarded(self, call: Callable[[], object]) -> None:
        """``call``, with the lock held, if the device is running: for what an event loop calls back. Any thread.

        Whatever it raises breaks the device.
        """
        with self.lock:
            if self.running:
                try:
                    call()
                except Exception as e:  # noqa: BLE001  `failed` says it
                    self.failed(e)

    def interrupt(self, index: int) -> None:
        """Tell the driver of what has been pushed to a queue, if it wants to know."""
        if self.queues[index].needs_interrupt():
            if trace_interrupt:
                trace_interrupt(self.name, index)
            self.transport.interrupt_queue(index)

    def config_changed(self) -> None:
        """Tell the driver that the configuration reads otherwise now. Any thread."""
        with self.lock:
            self.virtio.config_generation = self.virtio.config_generation + 1 & 0xFF
            if self.virtio.status & Status.DRIVER_OK:
                self.transport.interrupt_config()

    def settled(self) -> None:
        """It is not `busy` any more, nor running. With the lock."""
        self._end_queues()
        self._update()

    def failed(self, e: Exception) -> None:
        """`break_` because of ``e``; if neither guest nor host is to blame, it is logged as a bug. Any thread."""
        match e:
            case GuestError() | HostError():
                why = str(e)
            case OSError():
                why = f"{self.name}: {errno_name(e.errno or 0)}: {e.strerror}"
            case _:
                why = f"{self.name}: {e!r}"
                self._bugs += 1
                if self._bugs <= BUGS_LOGGED:
                    log.error("%s: failed, and needs a reset by its driver", self.name, exc_info=e)
        self.break_(why)

    def break_(self, why: str) -> None:
        """The device cannot go on until the driver resets it. Any thread; nothing happens where it is not in use."""
        with self.lock:
            v = self.virtio
            if v.status & (Status.DRIVER_OK | Status.NEEDS_RESET) != Status.DRIVER_OK:
                return
            v.status |= Status.NEEDS_RESET
            self.broken = why
            if trace_broken:
                trace_broken(self.name, why)
            self._update()
            self.transport.interrupt_config()
            self.on_broken(why)

    # For the transport, with the lock held

    @property
    def status(self) -> int:
        """The device status as the driver reads it."""
        return Status.NEEDS_RESET if self._resetting else self.virtio.status

    def write_features(self, word: int, value: int) -> None:
        """The driver accepts 32 ``features`` bits; only until it has said that these are all, and of two words."""
        v = self.virtio
        if word in (0, 1) and not v.status & Status.FEATURES_OK:
            v.driver_features = v.driver_features & ~(0xFFFF_FFFF << 32 * word) | value << 32 * word

    def write_status(self, value: int) -> None:
        """The driver sets status bits, or resets the device with none."""
        v = self.virtio
        if value and not self._resetting:
            for step in STEPS:
                if not v.status & step:
                    if not value & step or v.status & Status.FAILED or not self._allows(step):
                        break
                    v.status |= step
                    if step is Status.FEATURES_OK:
                        self.agreed()
            v.status |= value & Status.FAILED
            self._update()
        elif not value:
            self.reset()
        if trace_status:
            trace_status(self.name, value, self.virtio.status)

    def notify(self, index: int) -> None:
        """The driver's notification of queue ``index``, where it did not reach ``kick`` by itself."""
        if 0 <= index < len(self.queues):
            self.queues[index].kick.signal()

    def set_bus_master(self, *, enabled: bool) -> None:
        """Whether the bus lets the device reach memory; where there is no such bus, it does."""
        self._bus_master = enabled
        self._update()

    # The life cycle

    def reset(self) -> None:
        """Back to power-on, by the driver or with the machine."""
        self._stop()
        self.disown()
        self._end_queues()
        self._close_doorbells()
        super().reset()
        self._moved = False

    def post_load(self) -> None:
        self._stop()
        self._end_queues()
        self.broken = None
        self._adopt_queues()
        self._moved = True
        self._update()

    def pause(self) -> None:
        with self.lock:
            self._paused = True
            self._update()

    def resume(self) -> None:
        with self.lock:
            self._paused = False
            self._update()

    def close(self) -> None:
        with self.lock:
            self._paused = True
            self._update()
            self.disown()
            self._close_doorbells()
            for queue in self.queues:
                queue.close()

    def facts(self) -> dict[str, Any]:
        return {"kind": self.DEVICE_ID.name.lower(), "queues": [queue.max_size for queue in self.queues]}

    def negotiated(self) -> tuple[list[str], list[str]]:
        in_use = self.virtio.driver_features if self.virtio.status & Status.FEATURES_OK else 0
        return self._names(self.features), self._names(in_use)

    def info(self) -> dict[str, Any]:
        with self.lock:
            v = self.virtio
            return {
                "kind": self.DEVICE_ID.name.lower(),
                "status": [bit.name.lower() for bit in Status if v.status & bit],
                "broken": self.broken,
                "features": f"{v.driver_features:#x}",
                "queues": [
                    {"name": queue.name.removeprefix(f"{self.name} "), "size": queue.state.size}
                    for queue in self.queues
                    if queue.state.enabled
                ],
            }

    def _names(self, features: int) -> list[str]:
        known = {int(bit): bit.name for kind in (Feature, self.FEATURES) for bit in kind}
        return [known.get(n, f"bit {n}") for n in range(64) if features >> n & 1]

    def _allows(self, step: Status) -> bool:
        features = self.virtio.driver_features
        return step is not Status.FEATURES_OK or (
            not features & ~self.features and self.acked(Feature.VERSION_1) and self.accepts(features)
        )

    @property
    def _resetting(self) -> bool:
        """The driver has reset it, and may not believe that yet."""
        return self.busy and not self.virtio.status

    def _adopt_queues(self) -> None:
        """Take the queues' states from ours. They come from elsewhere: too few or too many break the device."""
        v = self.virtio
        if len(v.queues) != len(self.queues):
            if v.queues:
                v.status |= Status.NEEDS_RESET
                self.broken = f"{self.name}: a state of {len(v.queues)} queues, and the device has {len(self.queues)}"
            v.queues = [QueueState(size=queue.max_size) for queue in self.queues]
        for queue, state in zip(self.queues, v.queues, strict=True):
            queue.state = state

    def _update(self) -> None:
        """Run exactly while the driver is there, memory can be reached, nobody paused us, and nothing is broken."""
        if self._stopping:
            return  # whoever stops it looks again afterwards
        if self.running and not self._is_wanted():
            self._stop()
        if not self.running and not self.busy and self._is_wanted():
            self._start()

    def _is_wanted(self) -> bool:
        in_use = self.virtio.status & (Status.DRIVER_OK | Status.NEEDS_RESET) == Status.DRIVER_OK
        return in_use and self._bus_master and not self._paused

    def _start(self) -> None:
        try:
            if self.virtio.driver_features & ~self.features:
                raise GuestError(f"{self.name}: features {self.virtio.driver_features:#x} of {self.features:#x}")
            started = [index for index, queue in enumerate(self.queues) if queue.state.enabled]
            for index in started:
                self.start_queue(index)
            if not self._doorbells:
                for index in started:
                    self._doorbells.append(self.transport.doorbell(index, self.queues[index].kick))
            self.running = True
            self.serve()
        except Exception as e:  # noqa: BLE001  `failed` says it
            self.failed(e)
            self._stop()  # queues that had begun, where it was not running yet
            return
        if self._moved:
            self._signal_all(started)

    def _signal_all(self, indices: Sequence[int]) -> None:
        """After a move: what was signalled and not delivered did not come along."""
        self._moved = False
        for index in indices:
            self.transport.interrupt_queue(index)
        self.transport.interrupt_config()

    def _stop(self) -> None:
        if self.running:
            self.running, self._stopping = False, True
            try:
                self.withdraw()
            except Exception as e:  # noqa: BLE001  `failed` says it
                self.failed(e)
            finally:
                self._stopping = False
        if self.broken is not None:
            self.disown()
        if self.broken is not None or not self.busy:
            self._end_queues()

    def _end_queues(self) -> None:
        for queue in self.queues:
            queue.stop()

    def _close_doorbells(self) -> None:
        while self._doorbells:
            self._doorbells.pop().close()

    def _kicked(self, index: int) -> None:
        with self.lock:
            if index in self._watched:  # else somebody else's by now: the kick is his to take
                self.queues[index].kick.take()
                if trace_notify:
                    trace_notify(self.name, index)
                self.guarded(partial(self.on_notify, index))
