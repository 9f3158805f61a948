"""The simplest virtio device: it copies what it reads to where it may write, and counts what its driver does."""

from __future__ import annotations

from kvmpy.abi.virtio import DeviceId
from kvmpy.devices.virtio.device import Loop, QueueSpec, VirtioDevice, VirtioDeviceState
from kvmpy.devices.virtio.queue import Chain
from kvmpy.memory import GuestMemory
from kvmpy.state import u32


class EchoState(VirtioDeviceState):
    NAME = "virtio-echo"
    VERSION = 1
    scratch: u32 = 0


class Echo(VirtioDevice[EchoState]):
    """Answers with what it is sent. Four bytes of configuration can be written, four are its own."""

    DEVICE_ID = DeviceId.ENTROPY

    def __init__(self, name: str, memory: GuestMemory, io: Loop, queues: int = 2, max_size: int = 8) -> None:
        specs = [QueueSpec(f"echo{index}", max_size) for index in range(queues)]
        super().__init__(name, EchoState(), memory, io, specs, features=0b101)
        self.log: list[str] = []

    def config(self) -> bytes:
        return self.state.scratch.to_bytes(4, "little") + b"echo"

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self.state.scratch = value

    def accepts(self, features: int) -> bool:
        return features & 0b101 != 0b100  # bit 2 needs bit 0

    def serve(self) -> None:
        self.log.append("serve")
        super().serve()

    def withdraw(self) -> None:
        super().withdraw()
        self.log.append("withdraw")

    def calls_changed(self) -> None:
        self.log.append("calls")

    def on_notify(self, index: int) -> None:
        assert self.running
        queue = self.queues[index]
        for chain in queue.chains():
            queue.push(chain, echo(chain))
        self.interrupt(index)


def echo(chain: Chain) -> int:
    """Copy the readable part to the writable one, as far as it goes; returns the number of bytes."""
    data = b"".join(chain.readable)
    done = 0
    for buffer in chain.writable:
        piece = data[done : done + len(buffer)]
        buffer[: len(piece)] = piece
        done += len(piece)
    return done
