"""What is plugged into a machine. The control thread changes it, while the machine runs; any thread reads it.

Whoever reads gets tuples and mappings that stay as they are: a change puts new ones in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from kvmpy.config.schema import Device as DeviceTable
from kvmpy.devices.base import Device
from kvmpy.devices.pci.function import PciFunction

if TYPE_CHECKING:
    from kvmpy.devices.virtio.net import VirtioNet
    from kvmpy.machine.standby import StandbyNetwork
    from kvmpy.machine.steering import Steering


class Plugged(msgspec.Struct, frozen=True):
    """A device of the configuration: its table, its function, and what it has of the host.

    ``device`` is what is behind the function: one that is all of the device is that itself. ``mac`` is a network
    device's address, ``standby`` the id of the device that a failover primary is paired with, and ``steering`` what
    gives such a one its address; ``around`` is what a failover standby's network is told by.
    """

    table: DeviceTable
    device: Device[Any]
    function: PciFunction[Any]
    resources: ExitStack = msgspec.field(default_factory=ExitStack)
    mac: str = ""
    standby: str | None = None
    steering: Steering | None = None
    around: StandbyNetwork | None = None

    @property
    def driver(self) -> str:
        """The name of its model."""
        return str(self.table.__struct_config__.tag)

    @property
    def parts(self) -> tuple[Device[Any], ...]:
        """What is reset and saved of it, in this order."""
        return (self.function,) if self.device is self.function else (self.device, self.function)


class Inventory:
    """``fixed`` are the devices that stay, and come first; ``plugged`` the others, by their ids.

    ``devices`` is the order in which all are reset, and saved: bridges before what is behind them; ``moving`` are those
    that go with the guest in a migration, all but failover primaries, which are in no slot then. ``nics`` has network
    devices by their id and by their netdev's.
    """

    def __init__(self) -> None:
        self.fixed: tuple[Device[Any], ...] = ()
        self.plugged: Mapping[str, Plugged] = {}
        self.devices: tuple[Device[Any], ...] = ()
        self.moving: tuple[Device[Any], ...] = ()
        self.by_id: Mapping[str, Device[Any]] = {}
        self.nics: Mapping[str, VirtioNet] = {}

    def fix(self, devices: Sequence[Device[Any]]) -> None:
        """These are there for good."""
        self.fixed += tuple(devices)
        self._publish(self.plugged)

    def add(self, plugged: Plugged) -> None:
        """One more."""
        self._publish({**self.plugged, str(plugged.table.id): plugged})

    def remove(self, plugged: Plugged) -> None:
        """One less."""
        self._publish({name: other for name, other in self.plugged.items() if other is not plugged})

    def _publish(self, plugged: Mapping[str, Plugged]) -> None:
        self.plugged = MappingProxyType(dict(plugged))
        self.devices = (*self.fixed, *(part for each in plugged.values() for part in each.parts))
        self.moving = (
            *self.fixed,
            *(part for each in plugged.values() if each.standby is None for part in each.parts),
        )
        self.by_id = MappingProxyType({name: each.device for name, each in plugged.items()})
        nics: dict[str, Any] = {}
        for name, each in plugged.items():
            if (netdev := getattr(each.table, "netdev", None)) is not None:
                nics[name] = nics[str(netdev)] = each.device
        self.nics = MappingProxyType(nics)
