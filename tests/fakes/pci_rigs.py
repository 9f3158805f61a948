"""PCI functions as `Rig`s: the window is their configuration space."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.host_bridge import HostBridge
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.virtio.pci import VirtioPci
from tests.fakes.interrupts import FakeSink
from tests.fakes.pci import Board, Card, ConfigWindow
from tests.fakes.rig import Parts, Rig
from tests.fakes.vfio import MSIX
from tests.fakes.vfio_rig import NicRig
from tests.fakes.virtio_driver import guest_memory
from tests.fakes.virtio_echo import Echo
from tests.fakes.virtio_rig import ManualLoop

# What a random offset should hit: header and capabilities.
CONFIG = 0x100


def function_rig(parts: Parts, function: PciFunction[Any]) -> Rig:
    rig = parts.rig(function, CONFIG, target=ConfigWindow(function))
    rig.before_save = function.pause
    return rig


def host_bridge(parts: Parts) -> Rig:
    return function_rig(parts, HostBridge("host-bridge"))


def root_port(parts: Parts) -> Rig:
    """One with a card, which the guest can let go and the host can plug in again."""
    board = Board(parts.clock)
    parts.resources.callback(board.close)
    port, _ = board.add_port()
    card = Card()
    port.plug(card)
    rig = function_rig(parts, port)
    rig.beside = (card,)
    rig.go_on = port.resume

    def insert(_: int) -> None:
        if port.card is None:
            port.insert(card)

    def make_alike(there: Rig) -> None:
        other = there.device
        assert isinstance(other, RootPort)
        if port.behind is None:
            other.unplug()

    rig.make_alike = make_alike
    rig.host |= {
        "insert": insert,
        "request": lambda _: port.request(),
        "cancel": lambda _: port.cancel(),
        "tear_out": lambda _: port.tear_out(),
        "pass": lambda value: parts.clock.pass_(value % 100 / 10),
    }
    return rig


def config_ports(parts: Parts) -> Rig:
    board = Board()
    parts.resources.callback(board.close)
    rig = parts.rig(board.root.ports, 8, widest=4)
    rig.beside = (board.host_bridge, board.reset_register)
    return rig


def virtio_pci(parts: Parts) -> Rig:
    """One whose device stays paused: what is looked at is the transport."""
    sink = FakeSink()
    parts.resources.callback(sink.close)
    device = Echo("e0/virtio-echo", guest_memory(1 << 16), ManualLoop())
    parts.resources.callback(device.close)
    function = VirtioPci("e0", device, sink)
    function.intx.wire = parts.line
    rig = function_rig(parts, function)
    rig.beside = (device,)

    def access(value: int) -> None:
        """To the BAR, as its target gets it."""
        at, size = value & 0x3FFF, 1 << (value >> 14 & 3)
        with function.lock:
            function.read(at, size)
            function.write(at, size, value >> 16 & (1 << 8 * size) - 1)

    rig.host["bar"] = access
    rig.host["interrupt"] = lambda value: function.interrupt_queue(value % len(device.queues))
    rig.host["config"] = lambda _: function.interrupt_config()
    return rig


def vfio_pci(parts: Parts) -> Rig:
    """A NIC of a kernel that is a fake one as long as the rig is there."""
    directory = Path(parts.resources.enter_context(TemporaryDirectory()))
    patch = parts.resources.enter_context(pytest.MonkeyPatch.context())
    nic = NicRig(parts.resources, patch, directory)
    nic.function.intx.wire = parts.line
    rig = function_rig(parts, nic.function)

    def signal(value: int) -> None:
        for index, triggers in nic.nic.triggers.items():
            if index <= MSIX:
                nic.nic.signal(index, value % len(triggers))

    def access(value: int) -> None:
        """To a BAR, as its window gets it."""
        bars = list(nic.function.bars.values())
        bar, size = bars[value % len(bars)], 1 << (value >> 3 & 3)
        with nic.function.lock:
            bar.read((value >> 5) % bar.size, size)
            bar.write((value >> 5) % bar.size, size, value >> 16 & (1 << 8 * size) - 1)

    def lose_link(_: int) -> None:
        with nic.function.lock:
            nic.function.bus_reset()
        nic.settle()

    rig.host |= {"signal": signal, "bar": access, "lose_link": lose_link}
    rig.seen = nic.board.sink.take
    return rig
