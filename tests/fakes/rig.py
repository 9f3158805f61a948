"""One device on a bus of its own, with everything it needs faked; `tests.fakes.rigs` has them all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from kvmpy.bus import Bus, Target
from kvmpy.devices.base import Device
from kvmpy.devices.i8042 import I8042
from kvmpy.memory import GuestMemory
from tests.fakes.host import Clock, Line, Screen, Switch


@dataclass
class Rig:
    """``host`` are the device's host-side entries, each made to take one number; ``size`` is that of its window.

    ``target`` is what the bus has there. ``beside`` and ``memory`` move to another host with the device, between
    ``before_save`` and ``go_on``, which is then called on both hosts; ``make_alike`` has the other host's rig made of
    the same parts first. ``seen`` is what the guest can notice without an access.
    """

    device: Device[Any]
    target: Target
    size: int
    bus: Bus
    clock: Clock
    line: Line
    power: Switch
    screen: Screen
    host: dict[str, Callable[[int], object]] = field(default_factory=dict)
    beside: tuple[Device[Any], ...] = ()
    memory: GuestMemory | None = None
    before_save: Callable[[], object] = lambda: None
    go_on: Callable[[], object] = lambda: None
    make_alike: Callable[[Rig], object] = lambda there: None
    seen: Callable[[], object] = lambda: None


class Parts:
    """The fakes of one rig. ``resources`` gives back what they hold of the host."""

    def __init__(self, resources: ExitStack, now_ns: int | None = None) -> None:
        self.resources = resources
        self.clock, self.line, self.power, self.screen = Clock(), Line(), Switch(), Screen(20)
        if now_ns is not None:
            self.clock.now_ns = now_ns

    def rig(self, device: Device[Any], size: int, widest: int = 8, target: Target | None = None) -> Rig:
        """``target`` is the device itself unless given."""
        bus = Bus("bus")
        if isinstance(device, I8042):
            bus.map(0, 1, device.data_port, widest=1)
            bus.map(4, 1, device.command_port, widest=1)
        else:
            bus.map(0, size, target or device, widest)
        rig = Rig(device, target or device, size, bus, self.clock, self.line, self.power, self.screen)
        rig.before_save = device.pause
        rig.host["reset"] = lambda _: device.reset()
        rig.host["post_load"] = lambda _: device.post_load()
        return rig
