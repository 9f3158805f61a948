"""virtio-console with one port: the guest's hvc0 (Virtio 1.2, section 5.3, without MULTIPORT and SIZE).

Nothing is lost in either direction, and nothing piles up. Output that the backend has no room for stays where the
driver put it; of a long buffer, the state says how much is out. Input that the driver has no buffers for stays with the
backend, which hears when there are some. An emergency write is one byte through the configuration, for a guest whose
rings are not there: that one is dropped where there is no room.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, Protocol

from kvmpy.abi.virtio import DeviceId, feature_mask
from kvmpy.devices.virtio.device import Loop, QueueSpec, VirtioDevice, VirtioDeviceState
from kvmpy.devices.virtio.queue import Chain, QueueError
from kvmpy.memory import GuestMemory
from kvmpy.state import u32
from kvmpy.trace import Tracepoint

trace_lost = Tracepoint("virtio.console_lost", "device value")

QUEUE_SIZE: Final = 64
# Bytes handed to the backend at a time, between two looks at its room, and in one go before others have their turn.
PIECE: Final = 4096
BUDGET: Final = 16 * 1024
# What a piece, or a request, counts for at least in that budget.
LEAST: Final = 256

CONFIG_SIZE: Final = 12  # struct virtio_console_config: le16 cols, le16 rows, le32 max_nr_ports, le32 emerg_wr
EMERGENCY: Final = 8


class ConsoleFeature(IntEnum):
    """Numbers of the feature bits (section 5.3.3)."""

    EMERG_WRITE = 2


class Port(IntEnum):
    """The queues of port 0."""

    RECEIVE = 0
    TRANSMIT = 1


class Backend(Protocol):
    """The far end; a `kvmpy.host.console.Console`. Any thread; nothing blocks."""

    def write(self, data: bytes) -> None:
        """The guest sent ``data``, and there was room."""

    def room(self) -> bool:
        """Whether it takes some more; `VirtioConsole.drained` follows a no."""

    def offer(self) -> None:
        """The guest takes input: give `VirtioConsole.receive` what there is, soon, from another stack."""


class ConsoleState(VirtioDeviceState):
    NAME = "virtio-console"
    VERSION = 1
    sent: u32 = 0  # bytes of the next request to transmit that are out already


class VirtioConsole(VirtioDevice[ConsoleState]):
    """A console; ``place`` says where it ends, for an operator."""

    DEVICE_ID = DeviceId.CONSOLE
    FEATURES = ConsoleFeature

    def __init__(self, name: str, memory: GuestMemory, io: Loop, backend: Backend, place: str) -> None:
        specs = [QueueSpec(port.name.lower(), QUEUE_SIZE) for port in Port]
        super().__init__(name, ConsoleState(), memory, io, specs, feature_mask(ConsoleFeature.EMERG_WRITE))
        self._backend, self._place = backend, place
        self._sending: Chain | None = None
        self._refused = True

    def receive(self, data: bytes) -> int:
        """Take what fits of the host's input and return how many bytes that was; the rest stays with the caller."""
        with self.lock:
            left = [data]
            self._refused = True
            self.guarded(lambda: self._receive(left))
            return len(data) - len(left[0])

    def drained(self) -> None:
        """The host takes output again."""
        self.guarded(self._transmit)

    def on_notify(self, index: int) -> None:
        if index == Port.TRANSMIT:
            self._transmit()
        elif self._refused:
            self._refused = False
            self._backend.offer()

    def serve(self) -> None:
        self._refused = True  # elsewhere, perhaps
        super().serve()

    def withdraw(self) -> None:
        super().withdraw()
        if self._sending is not None:
            self.queues[Port.TRANSMIT].rewind(1)
            self._sending = None

    def config(self) -> bytes:
        return bytes(CONFIG_SIZE)

    def config_write(self, offset: int, size: int, value: int) -> None:
        if offset == EMERGENCY:
            if self._backend.room():
                self._backend.write(bytes((value & 0xFF,)))
            elif trace_lost:
                trace_lost(self.name, value & 0xFF)

    def info(self) -> dict[str, Any]:
        return super().info() | {"chardev": self._place}

    def _receive(self, left: list[bytes]) -> None:
        """Put what is ``left`` into the driver's buffers. Raises GuestError."""
        queue = self.queues[Port.RECEIVE]
        while left[0]:
            if (chain := queue.pop()) is None:
                if queue.set_notification(enabled=True):
                    continue
                break
            if not chain.writable_size:
                raise QueueError(f"{queue.name}: a buffer that cannot be written")
            written = 0
            for buffer in chain.writable:
                piece = left[0][: len(buffer)]
                buffer[: len(piece)] = piece
                left[0] = left[0][len(piece) :]
                written += len(piece)
            queue.push(chain, written)
        self._refused = bool(left[0])
        self.interrupt(Port.RECEIVE)

    def _transmit(self) -> None:
        """Send while there is room. Raises GuestError."""
        queue, s, budget = self.queues[Port.TRANSMIT], self.state, BUDGET
        while self._backend.room():
            if budget <= 0:
                queue.kick.signal()
                break
            if self._sending is None and (chain := queue.pop()) is not None:
                self._sending = chain
                budget -= LEAST
            if self._sending is None:
                if queue.set_notification(enabled=True):
                    continue
                break
            if piece := _cut(self._sending, s.sent):
                self._backend.write(piece)
                s.sent += len(piece)
                budget -= max(len(piece), LEAST)
            else:
                queue.push(self._sending, 0)
                self._sending, s.sent = None, 0
        self.interrupt(Port.TRANSMIT)


def _cut(chain: Chain, at: int) -> bytes:
    """A copy of what a chain sends from ``at`` on, a piece of it."""
    for buffer in chain.readable:
        if at < len(buffer):
            return bytes(buffer[at : at + PIECE])
        at -= len(buffer)
    return b""
