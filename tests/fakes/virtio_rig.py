"""A virtio device without a bus: a loop that runs when told, a transport that takes notes, and a driver for it all.

loop, memory = ManualLoop(), guest_memory(1 << 20)
device = Rng("rng0", memory, loop)
guest = Guest(device, memory)
guest.start()
head = guest.queues[0].offer(writable=[64])
guest.kick(0)
assert guest.queues[0].used() == [(head, 64)]
assert guest.transport.interrupts == [0]
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any, Final

from kvmpy.abi.virtio import Feature, Status, feature_mask
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.host.eventfd import EventFd
from kvmpy.memory import GuestMemory
from tests.fakes.loop import poll
from tests.fakes.virtio_driver import RingDriver

RING_FEATURES: Final = feature_mask(Feature.INDIRECT_DESC, Feature.EVENT_IDX)
Callback = Callable[[], object]


class ManualLoop:
    """A `kvmpy.devices.virtio.device.Loop` in the test's own thread."""

    def __init__(self) -> None:
        self.watched: dict[int, tuple[Callback | None, Callback | None]] = {}
        self.posted: list[Callback] = []

    def watch(self, fd: int, *, readable: Callback | None = None, writable: Callback | None = None) -> None:
        self.watched[fd] = (readable, writable)

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def post(self, call: Callback) -> None:
        self.posted.append(call)

    def once(self) -> bool:
        """Call back for whatever is ready now; False if nothing was."""
        posted, self.posted = self.posted, []
        for call in posted:
            call()
        poller = select.poll()
        for fd, (readable, writable) in self.watched.items():
            poller.register(fd, (select.POLLIN if readable else 0) | (select.POLLOUT if writable else 0))
        ready = poller.poll(0)
        for fd, events in ready:
            for index, mask in enumerate((select.POLLIN | select.POLLHUP | select.POLLERR, select.POLLOUT)):
                callback = self.watched.get(fd, (None, None))[index]
                if callback is not None and events & mask:
                    callback()
        return bool(posted or ready)

    def run(self, most: int = 1000) -> None:
        """Until nothing is ready. A loop that never comes to rest fails the test."""
        for _ in range(most):
            if not self.once():
                return
        raise AssertionError("the loop never comes to rest")


class Doorbell:
    """One that is open while it is in its transport's list."""

    def __init__(self, owner: FakeTransport, index: int) -> None:
        self._owner, self._index = owner, index

    def close(self) -> None:
        self._owner.doorbells.pop(self._index, None)


class FakeTransport:
    """A `kvmpy.devices.virtio.transport.Transport`: ``interrupts`` has queue numbers, ``config_interrupts`` counts."""

    def __init__(self) -> None:
        self.interrupts: list[int] = []
        self.config_interrupts = 0
        self.doorbells: dict[int, EventFd] = {}
        self.calls: dict[int, EventFd] = {}
        self.refuses: Exception | None = None

    def interrupt_queue(self, index: int) -> None:
        self.interrupts.append(index)

    def interrupt_config(self) -> None:
        self.config_interrupts += 1

    def call_event(self, index: int) -> int:
        """An eventfd of its own for each queue; `take` counts what was signalled on it too."""
        return self.calls.setdefault(index, EventFd()).fd

    def doorbell(self, index: int, kick: EventFd) -> Doorbell:
        if self.refuses is not None:
            raise self.refuses
        assert index not in self.doorbells
        self.doorbells[index] = kick
        return Doorbell(self, index)

    def take(self) -> list[int]:
        """Queues that have interrupted since the last call, whoever did it for them."""
        taken, self.interrupts = self.interrupts, []
        return taken + [index for index, event in self.calls.items() if event.take()]

    def close(self) -> None:
        for event in self.calls.values():
            event.close()


class Guest:
    """A driver for ``device``, past any bus. ``queues`` are its rings, once it has been started."""

    def __init__(
        self, device: VirtioDevice[Any], memory: GuestMemory, *, gpa: int = 0x1000, room: int = 4096, size: int = 0
    ) -> None:
        """``gpa`` is where the rings begin; ``size`` is that of every queue, 0 for each one's largest."""
        self.device, self.memory, self.gpa, self.room, self.size = device, memory, gpa, room, size
        self.transport = FakeTransport()
        self.queues: list[RingDriver] = []
        self.broken: list[str] = []
        device.transport = self.transport
        device.on_broken = self.broken.append
        device.resume()

    def start(self, features: int | None = None, enable: set[int] | None = None, *, go: bool = True) -> None:
        """Reset, negotiate ``features`` (all, if None), set the queues in ``enable`` up (all, if None), and `go`."""
        wanted = self.device.features if features is None else features | feature_mask(Feature.VERSION_1)
        self.reset()
        with self.device.lock:
            self.device.write_status(Status.ACKNOWLEDGE)
            self.device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
            self.device.write_features(0, wanted & 0xFFFF_FFFF)
            self.device.write_features(1, wanted >> 32)
            self.device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
            assert self.device.virtio.status & Status.FEATURES_OK
            self._set_up_queues(wanted, enable)
        if go:
            self.go()

    def reset(self) -> None:
        """Reset the device, and wait until it says that it is."""
        with self.device.lock:
            self.device.write_status(0)
        poll(lambda: self.status() == 0)

    def go(self) -> None:
        """Say that the driver is ready."""
        with self.device.lock:
            self.device.write_status(self.device.virtio.status | Status.DRIVER_OK)

    def _set_up_queues(self, features: int, enable: set[int] | None) -> None:
        self.queues, gpa = [], self.gpa
        for index, queue in enumerate(self.device.queues):
            driver = RingDriver(
                self.memory,
                gpa,
                self.size or queue.max_size,
                event_idx=bool(features >> Feature.EVENT_IDX & 1),
                indirect=bool(features >> Feature.INDIRECT_DESC & 1),
                room=self.room,
            )
            gpa = driver.end
            if enable is None or index in enable:
                driver.configure(queue.state)
            self.queues.append(driver)

    def kick(self, index: int, *, run: bool = True) -> None:
        """Notify if the device wants that, and let a ManualLoop come to rest."""
        if self.queues[index].needs_kick():
            self.transport.doorbells[index].signal()
        if run and isinstance(self.device.io, ManualLoop):
            self.device.io.run()

    def status(self) -> int:
        """The device's status as it reads, as a call: mypy believes that an attribute stays what an assert said."""
        return self.device.status

    def close(self) -> None:
        self.device.close()
        self.transport.close()
