"""Each legacy device on a bus of its own, with everything it needs faked: for tests about all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kvmpy.bus import Bus
from kvmpy.devices.acpi_pm import WINDOW_SIZE, AcpiPm
from kvmpy.devices.base import Device
from kvmpy.devices.cmos import Cmos
from kvmpy.devices.debug_port import DebugPort
from kvmpy.devices.i8042 import I8042
from kvmpy.devices.pvpanic import Pvpanic
from kvmpy.devices.reset_register import ResetRegister
from kvmpy.devices.serial import Serial16550
from tests.fakes.host import Clock, Line, Screen, Switch


@dataclass
class Rig:
    """``host`` are the device's host-side entries, each made to take one number; ``size`` is that of its window."""

    device: Device[Any]
    size: int
    bus: Bus
    clock: Clock
    line: Line
    power: Switch
    screen: Screen
    host: dict[str, Callable[[int], object]] = field(default_factory=dict)
    before_save: Callable[[], object] = lambda: None


class Parts:
    """The fakes of one rig."""

    def __init__(self, now_ns: int | None = None) -> None:
        self.clock, self.line, self.power, self.screen = Clock(), Line(), Switch(), Screen(20)
        if now_ns is not None:
            self.clock.now_ns = now_ns

    def rig(self, device: Device[Any], size: int, widest: int = 8) -> Rig:
        bus = Bus("bus")
        if isinstance(device, I8042):
            bus.map(0, 1, device.data_port, widest=1)
            bus.map(4, 1, device.command_port, widest=1)
        else:
            bus.map(0, size, device, widest)
        rig = Rig(device, size, bus, self.clock, self.line, self.power, self.screen)
        rig.host["reset"] = lambda _: device.reset()
        rig.host["post_load"] = lambda _: device.post_load()
        return rig


def _serial(parts: Parts) -> Rig:
    serial = Serial16550("com1", parts.line, parts.screen.take, room=parts.screen.room)
    rig = parts.rig(serial, 8, widest=1)

    def drain(count: int) -> None:
        parts.screen.room_left = count % 32
        serial.drained()

    rig.host["receive"] = lambda count: serial.receive(bytes(count % 40))
    rig.host["drained"] = drain
    return rig


def _cmos(parts: Parts) -> Rig:
    low, high = 512 << 20, 1 << 30
    cmos = Cmos("rtc", parts.line, parts.clock.timer, parts.clock.utc, low_memory=low, high_memory=high)
    rig = parts.rig(cmos, 2, widest=1)
    rig.host["on_timer"] = lambda _: cmos.on_timer()
    return rig


def _acpi_pm(parts: Parts) -> Rig:
    pm = AcpiPm("acpi-pm", parts.line, parts.power, parts.clock.ns)
    rig = parts.rig(pm, WINDOW_SIZE)
    rig.host["press"] = lambda _: pm.press_power_button()
    rig.host["advance"] = pm.advance
    rig.before_save = pm.settle
    return rig


RIGS: Final[dict[str, Callable[[Parts], Rig]]] = {
    "serial": _serial,
    "cmos": _cmos,
    "acpi_pm": _acpi_pm,
    "i8042": lambda parts: parts.rig(I8042("i8042", parts.power), 5),
    "reset_register": lambda parts: parts.rig(ResetRegister("reset", parts.power), 1, widest=1),
    "pvpanic": lambda parts: parts.rig(Pvpanic("pvpanic", parts.power), 1, widest=1),
    "debug_port": lambda parts: parts.rig(DebugPort("debug", parts.clock.ns), 1, widest=1),
}
