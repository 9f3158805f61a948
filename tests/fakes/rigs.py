"""Every device on a bus of its own, with everything it needs faked: for tests about all of them.

with made("serial") as rig:
    rig.bus.write(0, 1, 0x41)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from kvmpy.devices.acpi_pm import WINDOW_SIZE, AcpiPm
from kvmpy.devices.cmos import Cmos
from kvmpy.devices.debug_port import DebugPort
from kvmpy.devices.i8042 import I8042
from kvmpy.devices.pvpanic import Pvpanic
from kvmpy.devices.reset_register import ResetRegister
from kvmpy.devices.serial import Serial16550
from tests.fakes import pci_rigs, virtio_rigs
from tests.fakes.rig import Parts, Rig


def _serial(parts: Parts) -> Rig:
    serial = Serial16550("com1", parts.line, parts.screen.take, room=parts.screen.room)
    serial.resume()
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
    "host_bridge": pci_rigs.host_bridge,
    "root_port": pci_rigs.root_port,
    "config_ports": pci_rigs.config_ports,
    "virtio_pci": pci_rigs.virtio_pci,
    "vfio_pci": pci_rigs.vfio_pci,
    "virtio_net": virtio_rigs.net,
    "virtio_blk": virtio_rigs.blk,
    "virtio_rng": virtio_rigs.rng,
    "virtio_console": virtio_rigs.console,
}


@contextmanager
def made(name: str, now_ns: int | None = None) -> Iterator[Rig]:
    """A new one, closed at the end."""
    with ExitStack() as resources:
        yield RIGS[name](Parts(resources, now_ns))
