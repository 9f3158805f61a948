"""What a virtio device needs of the bus it is on; virtio-pci is the one there is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

from kvmpy.devices.base import Closable
from kvmpy.host.eventfd import EventFd


class Transport(Protocol):
    """How a device reaches its driver. All under the device's lock."""

    def interrupt_queue(self, index: int) -> None:
        """Tell the driver that queue ``index`` has used chains for it."""

    def interrupt_config(self) -> None:
        """Tell the driver that the configuration or the status has changed."""

    def call_event(self, index: int) -> int:
        """The eventfd (its descriptor) whose signal is `interrupt_queue`, for the kernel to use; -1 if it has none."""

    def doorbell(self, index: int, kick: EventFd) -> Closable:
        """Let the driver's notification of queue ``index`` signal ``kick`` without an exit. Raises HostError."""


class Unplugged:
    """The Transport of a device that is on no bus yet."""

    def interrupt_queue(self, index: int) -> None:
        """Nobody is there."""

    def interrupt_config(self) -> None:
        """Nobody is there."""

    def call_event(self, index: int) -> int:
        """None."""
        return -1

    def doorbell(self, index: int, kick: EventFd) -> Closable:
        """Nobody rings."""
        return ExitStack()
