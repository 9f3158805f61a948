"""virtio-pci's common configuration: the registers by which a driver finds and sets up a device (section 4.1.4.3).

Each has one width, and an access of another reads all ones or is ignored; a 64-bit one is also two of 32. The registers
from 0x18 on are those of the queue that was selected. They take nothing once that queue is enabled or the driver is
live: the rings a device is using never move. queue_notify_data and queue_reset belong to features that are not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final, Protocol, Self

from kvmpy.abi.virtio import NO_VECTOR, Status
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.devices.virtio.queue import QueueState
from kvmpy.state import State, u16, u32

COMMON_SIZE: Final = 0x38


class CommonState(State):
    """The selectors, and the vector of the configuration."""

    NAME = "virtio-pci-common"
    VERSION = 1
    device_feature_select: u32 = 0
    driver_feature_select: u32 = 0
    queue_select: u16 = 0
    config_vector: u16 = NO_VECTOR


class Register:
    """A register at ``offset``, ``size`` bytes wide; decorates the method that reads it."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size
        self.read: Callable[[Any], int] = lambda config: 0
        self.write: Callable[[Any, int], object] = lambda config, value: None

    def __call__(self, read: Callable[[Any], int]) -> Self:
        self.read = read
        return self

    def writer(self, write: Callable[[Any, int], object]) -> Callable[[Any, int], object]:
        """Decorates the method that writes it; without one, writes are ignored."""
        self.write = write
        return write


class Owner(Protocol):
    """Whose registers these are: the transport."""

    device: VirtioDevice[Any]

    @property
    def common(self) -> CommonState:
        """What migrates of the registers, beside the device's own state."""

    def valid_vector(self, value: int) -> int:
        """``value`` if the function has such a vector, else NO_VECTOR."""

    def vectors_changed(self) -> None:
        """A queue has another vector now."""

    def write_status(self, value: int) -> None:
        """The driver writes the device status."""


class CommonConfig:
    """struct virtio_pci_common_cfg. The device's lock is held."""

    REGISTERS: ClassVar[dict[tuple[int, int], Register]] = {}

    def __init__(self, owner: Owner) -> None:
        self._owner, self._device = owner, owner.device

    def read(self, offset: int, size: int) -> int:
        """The register at ``offset``, if it has that ``size``; else all ones."""
        register = self.REGISTERS.get((offset, size))
        return (1 << 8 * size) - 1 if register is None else register.read(self)

    def write(self, offset: int, size: int, value: int) -> None:
        """Store ``value`` in the register at ``offset``, if it has that ``size``."""
        if register := self.REGISTERS.get((offset, size)):
            register.write(self, value)

    @property
    def _queue(self) -> QueueState | None:
        """The selected queue, None where there is no such one."""
        queues, index = self._device.virtio.queues, self._owner.common.queue_select
        return queues[index] if 0 <= index < len(queues) else None

    @property
    def _idle_queue(self) -> QueueState | None:
        """The selected queue while it may be set up."""
        queue = self._queue
        live = self._device.virtio.status & (Status.DRIVER_OK | Status.NEEDS_RESET)
        return None if queue is None or queue.enabled or live else queue

    @Register(0x00, 4)
    def device_feature_select(self) -> int:
        return self._owner.common.device_feature_select

    @device_feature_select.writer
    def _select_device_feature(self, value: int) -> None:
        self._owner.common.device_feature_select = value

    @Register(0x04, 4)
    def device_feature(self) -> int:
        return _word(self._device.features, self._owner.common.device_feature_select)

    @Register(0x08, 4)
    def driver_feature_select(self) -> int:
        return self._owner.common.driver_feature_select

    @driver_feature_select.writer
    def _select_driver_feature(self, value: int) -> None:
        self._owner.common.driver_feature_select = value

    @Register(0x0C, 4)
    def driver_feature(self) -> int:
        return _word(self._device.virtio.driver_features, self._owner.common.driver_feature_select)

    @driver_feature.writer
    def _write_driver_feature(self, value: int) -> None:
        self._device.write_features(self._owner.common.driver_feature_select, value)

    @Register(0x10, 2)
    def config_msix_vector(self) -> int:
        return self._owner.common.config_vector

    @config_msix_vector.writer
    def _write_config_vector(self, value: int) -> None:
        self._owner.common.config_vector = self._owner.valid_vector(value)

    @Register(0x12, 2)
    def num_queues(self) -> int:
        return len(self._device.queues)

    @Register(0x14, 1)
    def device_status(self) -> int:
        return self._device.status

    @device_status.writer
    def _write_status(self, value: int) -> None:
        self._owner.write_status(value)

    @Register(0x15, 1)
    def config_generation(self) -> int:
        return self._device.virtio.config_generation

    @Register(0x16, 2)
    def queue_select(self) -> int:
        return self._owner.common.queue_select

    @queue_select.writer
    def _select_queue(self, value: int) -> None:
        self._owner.common.queue_select = value

    @Register(0x18, 2)
    def queue_size(self) -> int:
        queue = self._queue
        return 0 if queue is None else queue.size

    @queue_size.writer
    def _write_queue_size(self, value: int) -> None:
        queue = self._idle_queue
        if queue is not None and not value & value - 1 and 0 < value <= self._largest:
            queue.size = value

    @property
    def _largest(self) -> int:
        return self._device.queues[self._owner.common.queue_select].max_size

    @Register(0x1A, 2)
    def queue_msix_vector(self) -> int:
        queue = self._queue
        return NO_VECTOR if queue is None else queue.vector

    @queue_msix_vector.writer
    def _write_queue_vector(self, value: int) -> None:
        queue = self._queue
        if queue is not None and queue.vector != (vector := self._owner.valid_vector(value)):
            queue.vector = vector
            self._owner.vectors_changed()

    @Register(0x1C, 2)
    def queue_enable(self) -> int:
        queue = self._queue
        return 0 if queue is None else int(queue.enabled)

    @queue_enable.writer
    def _write_queue_enable(self, value: int) -> None:
        queue = self._idle_queue
        if queue is not None and value == 1:
            queue.enabled = True

    @Register(0x1E, 2)
    def queue_notify_off(self) -> int:
        return 0 if self._queue is None else self._owner.common.queue_select


def _word(features: int, select: int) -> int:
    return features >> 32 * select & 0xFFFF_FFFF if select in (0, 1) else 0


def _addresses() -> Iterator[Register]:
    """queue_desc, queue_driver and queue_device, each whole and in halves."""
    for base, field in ((0x20, "desc"), (0x28, "driver"), (0x30, "device")):
        for offset, size in ((0, 8), (0, 4), (4, 4)):
            yield _address(base + offset, size, field, shift=8 * offset)


def _address(offset: int, size: int, field: str, shift: int) -> Register:
    mask = (1 << 8 * size) - 1
    register = Register(offset, size)

    @register
    def read(config: CommonConfig) -> int:
        queue = config._queue
        return 0 if queue is None else getattr(queue, field) >> shift & mask

    @register.writer
    def write(config: CommonConfig, value: int) -> None:
        queue = config._idle_queue
        if queue is not None:
            setattr(queue, field, getattr(queue, field) & ~(mask << shift) | value << shift)

    return register


CommonConfig.REGISTERS = {
    (register.offset, register.size): register
    for register in (*vars(CommonConfig).values(), *_addresses())
    if isinstance(register, Register)
}
