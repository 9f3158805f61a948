"""virtio-rng: the driver lends buffers, and gets them back full of random bytes (Virtio 1.2, section 5.4)."""

from __future__ import annotations

import os
from typing import Final

from kvmpy.abi.virtio import DeviceId
from kvmpy.devices.virtio.device import Loop, QueueSpec, VirtioDevice, VirtioDeviceState
from kvmpy.devices.virtio.queue import Chain
from kvmpy.memory import GuestMemory

# Bytes that one request gets, however many it has room for: drivers ask for 64 or so, and cope with fewer.
LIMIT: Final = 64 * 1024
# Bytes made in one go, before others' events have their turn.
BUDGET: Final = 4 * LIMIT


class RngState(VirtioDeviceState):
    NAME = "virtio-rng"
    VERSION = 1


class VirtioRng(VirtioDevice[RngState]):
    """The host kernel's random numbers. They do not run out, and nothing about them is worth carrying along."""

    DEVICE_ID = DeviceId.ENTROPY

    def __init__(self, name: str, memory: GuestMemory, io: Loop) -> None:
        super().__init__(name, RngState(), memory, io, [QueueSpec("requests", 64)])

    def on_notify(self, index: int) -> None:
        queue, left = self.queues[index], BUDGET
        for chain in queue.chains():
            written = _fill(chain)
            queue.push(chain, written)
            left -= written
            if left <= 0:
                queue.kick.signal()
                break
        self.interrupt(index)


def _fill(chain: Chain) -> int:
    written = 0
    for buffer in chain.writable:
        size = min(len(buffer), LIMIT - written)
        buffer[:size] = os.urandom(size)
        written += size
    return written
