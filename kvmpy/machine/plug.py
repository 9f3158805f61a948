"""The devices of [[root_port]] and [[device]]: each table made into a function and put in its place.

Beside build.py the one module that names concrete devices. The root bus has the host bridge at device 0, then the root
ports in their order, then the devices that are on no port: a machine's addresses follow from its configuration.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any, Protocol

from kvmpy.config.schema import Config
from kvmpy.devices.base import Device
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.host_bridge import HostBridge
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.host.reactor import Reactor
from kvmpy.irq import MsiSink
from kvmpy.memory import GuestMemory


class Report(Protocol):
    """Tells whoever listens to the machine of an event. Any thread."""

    def __call__(self, event: str, **data: Any) -> None: ...


class Plugger:
    """Makes the devices of ``config`` and plugs them into ``pci``.

    ``devices`` is the order in which they are reset, and saved: bridges before what is behind them. ``resources`` gives
    everything back, in reverse.
    """

    def __init__(
        self,
        config: Config,
        pci: PciRoot,
        memory: GuestMemory,
        io: Reactor,
        sink: MsiSink,
        report: Report,
        resources: ExitStack,
    ) -> None:
        self.devices: list[Device[Any]] = []
        self.nics: dict[str, Any] = {}
        self._config, self._pci, self._memory, self._io, self._sink = config, pci, memory, io, sink
        self._report, self._resources = report, resources
        self._ports: dict[str, RootPort] = {}
        self._free = itertools.count()

    def plug_all(self) -> None:
        """Raises HostError, located, where this host cannot; what has been made is then in ``resources``."""
        self._on_root_bus(HostBridge("host-bridge"))
        taken = {port.slot for port in self._config.root_port}
        slots = (slot for slot in itertools.count(1) if slot not in taken)
        for port in self._config.root_port:
            self._ports[port.id] = RootPort(port.id, next(slots) if port.slot is None else port.slot, self._sink)
            self._on_root_bus(self._ports[port.id])

    def _on_root_bus(self, function: PciFunction[Any]) -> None:
        self._keep(function)
        self._pci.add(function, next(self._free))

    def _keep(self, device: Device[Any]) -> None:
        self.devices.append(device)
        self._resources.callback(device.close)
