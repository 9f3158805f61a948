"""Virtio devices as `Rig`s: the window is their configuration, the host's entries are what a driver does.

The driver keeps nothing that is not in guest memory, so that it moves with the machine.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from kvmpy.devices.virtio.blk import VirtioBlk
from kvmpy.devices.virtio.console import VirtioConsole
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.devices.virtio.net import VirtioNet
from kvmpy.devices.virtio.rng import VirtioRng
from tests.fakes.disk import FakeDisk
from tests.fakes.host import Screen
from tests.fakes.net_rig import MAC
from tests.fakes.rig import Parts, Rig
from tests.fakes.tap import FakeTap
from tests.fakes.virtio_driver import NEXT, WRITE, RingDriver, guest_memory
from tests.fakes.virtio_rig import Guest, ManualLoop

RAM: Final = 4 << 20
SIZE: Final = 8  # of every queue
ROOM: Final = 512  # for each chain that a RingDriver makes
BUFFERS: Final = 2 << 20  # where the buffers of `Driver.offer` are
READABLE: Final = (0, 2, 16, 64, 1000, 10_000)
WRITABLE: Final = (0, 1, 64, 513)


class DeviceConfig:
    """A device's configuration as a `kvmpy.bus.Target`."""

    def __init__(self, device: VirtioDevice[Any]) -> None:
        self.name, self.lock, self._device = device.name, device.lock, device

    def read(self, offset: int, size: int) -> int:
        return self._device.config_read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.config_write(offset, size, value)


class VirtioRig(Rig):
    """``guest`` drives the device, or `offer` and the others do, each with one number."""

    guest: Guest
    device: VirtioDevice[Any]
    settle: Callable[[], object]

    def start(self, value: int) -> None:
        """Reset it, and begin with half of its features, or all."""
        device = self.device
        self.guest.start(device.features & value if value & 1 else None)
        self.settle()

    def offer(self, value: int) -> None:
        """Make a chain of up to two buffers available, and kick."""
        device, index = self.device, value % len(self.device.queues)
        state = device.queues[index].state
        if not state.enabled or state.size != SIZE:
            return
        driver = RingDriver.__new__(RingDriver)  # the helpers alone: the ring is there already
        driver.memory, driver.desc = self.guest.memory, state.desc
        readable, writable = READABLE[value >> 4 & 7 if value >> 4 & 7 < 6 else 2], WRITABLE[value >> 7 & 3]
        avail = driver.load(state.driver + 2)
        head = 2 * (avail % (SIZE // 2))
        at = BUFFERS + 0x8000 * (SIZE * index + head)
        driver.memory.write(at, struct.pack("<IIQ", value >> 9 & 15, 0, value >> 13 & 255))
        parts = [(size, flags) for size, flags in ((readable, 0), (writable, WRITE)) if size]
        for step, (size, flags) in enumerate(parts):
            more = step + 1 < len(parts)
            driver.write_desc(head + step, at + 0x4000 * step, size, flags | (NEXT if more else 0), head + 1)
        driver.store(state.driver + 4 + 2 * (avail % SIZE), head)
        driver.store(state.driver + 2, (avail + 1) % 65536)
        device.queues[index].kick.signal()
        self.settle()

    def scribble(self, value: int) -> None:
        """Two bytes somewhere in the rings."""
        self.guest.memory.write(0x1000 + value % 0x400, (value >> 16 & 0xFFFF).to_bytes(2, "little"))

    def status(self, value: int) -> None:
        with self.device.lock:
            self.device.write_status(value & 0xFF)
        self.settle()

    def registers(self) -> object:
        """What the driver sees beside what it reads: how far each ring is, and the status."""
        v = self.device.virtio
        return v.status, [(queue.last_avail, queue.next_used) for queue in v.queues]

    def pause(self) -> None:
        self.settle()
        self.device.pause()

    def resume(self) -> None:
        self.device.resume()
        self.settle()


def virtio_rig(parts: Parts, device: VirtioDevice[Any], settle: Callable[[], object]) -> Rig:
    target = DeviceConfig(device)
    plain = parts.rig(device, 0x40, target=target)
    rig = VirtioRig(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    rig.settle = settle
    rig.memory = device.memory
    rig.guest = Guest(device, device.memory, room=ROOM, size=SIZE)
    parts.resources.callback(rig.guest.close)
    rig.host |= {"start": rig.start, "offer": rig.offer, "offers": rig.offer, "status": rig.status}
    rig.host["scribble"] = rig.scribble
    rig.before_save, rig.go_on, rig.seen = rig.pause, rig.resume, rig.registers
    return rig


def blk(parts: Parts) -> Rig:
    """Its requests are done at once, by whoever waits for them."""
    memory, loop = guest_memory(RAM), ManualLoop()
    device = VirtioBlk("vd0/virtio-blk", memory, loop, FakeDisk(), serial="disk0", queues=2, workers=0)

    def settle() -> None:
        loop.run()
        while device._under_way:
            device._work_once()
            loop.run()

    rig = virtio_rig(parts, device, settle)
    parts.resources.callback(settle)  # or a test that fails would wait for ever
    return rig


def rng(parts: Parts) -> Rig:
    memory, loop = guest_memory(RAM), ManualLoop()
    return virtio_rig(parts, VirtioRng("rng0/virtio-rng", memory, loop), loop.run)


class Terminal:
    """A screen as a console's backend; nobody types."""

    def __init__(self, screen: Screen) -> None:
        self.write, self.room = screen.take, screen.room

    def offer(self) -> None:
        """There is nothing."""


def console(parts: Parts) -> Rig:
    memory, loop = guest_memory(RAM), ManualLoop()
    device = VirtioConsole("con0/virtio-console", memory, loop, Terminal(parts.screen), "null")
    rig = virtio_rig(parts, device, loop.run)

    def drain(value: int) -> None:
        parts.screen.room_left = value % 5000
        device.drained()

    rig.host["receive"] = lambda value: device.receive(bytes(value % 200))
    rig.host["drained"] = drain
    return rig


def net(parts: Parts) -> Rig:
    memory, loop, tap = guest_memory(RAM), ManualLoop(), FakeTap()
    device = VirtioNet("net0/virtio-net", memory, loop, tap, MAC, mtu=1400)

    def settle() -> None:
        loop.run()
        tap.sent()
        loop.run()

    rig = virtio_rig(parts, device, settle)
    parts.resources.callback(tap.close)
    rig.host["link"] = lambda value: device.set_link(up=bool(value & 1))
    rig.host["announce"] = lambda _: device.announce()
    return rig
