"""Functions of the host's PCI bus for the guest: taken from the host, opened, and made into devices.

All of them share one container, in which the guest's RAM is mapped for DMA while there is any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from kvmpy.config.schema import VfioPci as VfioPciTable
from kvmpy.devices.vfio.container import Container, GroupListener
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.errors import HostError
from kvmpy.host.pci import HostFunction
from kvmpy.host.pci_function import SysfsFunction, VirtualFunction
from kvmpy.host.reactor import Reactor
from kvmpy.host.tree import read
from kvmpy.irq import MsiSink
from kvmpy.log import Log
from kvmpy.machine.steering import Steering
from kvmpy.memory import GuestMemory

if TYPE_CHECKING:
    from kvmpy.host.network import Network


log = Log(__name__)

ETHERNET: Final = 0x0200


class Surroundings(Protocol):
    """What a passed-through function needs of the machine: part of `kvmpy.machine.plug.Host`."""

    @property
    def directory(self) -> str: ...
    @property
    def network(self) -> Network | None: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def io(self) -> Reactor: ...
    @property
    def sink(self) -> MsiSink: ...
    @property
    def groups(self) -> GroupListener: ...
    @property
    def report(self) -> Callable[..., None]: ...


class Claimed(Protocol):
    """A function of the host that is ours until `close`: `kvmpy.host.pci.HostFunction` is one."""

    @property
    def group(self) -> int: ...

    @property
    def vf(self) -> VirtualFunction | None: ...

    def assign(self, network: Network, *, mac: str | None = None, vlan: int | None = None) -> None: ...

    def carry(self, network: Network, mac: str | None) -> None: ...

    def bind(self) -> None: ...

    def withdraw(self) -> None: ...

    def close(self) -> None: ...


class Claims:
    """The functions that one machine has of the host.

    The kernel gives none back to a driver of the host's while its IOMMU group is open here for another (EBUSY; up to
    5.18 it stops, with a BUG): one that leaves before stays ours, though no device's, until the last of its group does.
    """

    def __init__(self, claim: Callable[[str, str], Claimed]) -> None:
        self._claim = claim
        self._lock = threading.Lock()
        self._used: dict[int, int] = {}  # by group, how many are some device's
        self._unused: dict[str, Claimed] = {}

    def take(self, address: str, directory: str) -> Claimed:
        """Have that function for a device, until `give_back`. Raises HostError."""
        with self._lock:
            if address in self._unused:
                self._unused[address].bind()  # the host may have taken it back meanwhile
                claimed = self._unused.pop(address)
            else:
                claimed = self._claim(address, directory)
            self._used[claimed.group] = self._used.get(claimed.group, 0) + 1
        return claimed

    def give_back(self, address: str, claimed: Claimed) -> None:
        """No device has it any more, and its descriptor is closed."""
        with self._lock:
            self._unused[address] = claimed
            self._used[claimed.group] -= 1
            if self._used[claimed.group]:
                try:
                    claimed.withdraw()
                except HostError as e:
                    log.warning("%s; that is tried again when all of its IOMMU group is given back", e)
                return
            leaving = [name for name, unused in self._unused.items() if unused.group == claimed.group]
            with ExitStack() as closing:  # what one fails with keeps no other from going
                for name in reversed(leaving):
                    closing.callback(self._unused.pop(name).close)


class Passthrough:
    """Makes the passed-through functions of one machine."""

    def __init__(self, host: Surroundings, claim: Callable[[str, str], Claimed] = HostFunction.claim) -> None:
        """``claim`` takes a function from the host's driver, and notes in a directory how to give it back."""
        self._host, self._claims = host, Claims(claim)
        self._container = Container(host.memory, host.groups)
        self.steerings: dict[str, Steering] = {}

    def make(
        self,
        table: VfioPciTable,
        resources: ExitStack,
        ask: Callable[[VfioPci], object],
        standby: str | None = None,
        *,
        prepared: bool = True,
    ) -> VfioPci:
        """The function of ``table``, reset, and all RAM mapped: seconds. By a thread that no vCPU waits for.

        Not ``prepared`` it is only checked, and pins nothing before its `prepare`.

        With ``standby``, the id of a device, it is that one's primary: `steering` has what gives it its address.
        ``ask`` asks the guest to let it go, when the host wants it back: by the io thread.
        `close` of it is the caller's; what ``resources`` gets is to be closed after that. Raises HostError, beginning
        with the key it concerns, with nothing left behind.
        """
        name, host = str(table.id), self._host
        try:
            with ExitStack() as undo:
                address = None if standby is None else self._address(str(table.host))
                claimed = self._claims.take(str(table.host), host.directory)
                undo.callback(self._claims.give_back, str(table.host), claimed)
                mac = None if standby is not None or table.mac is None else str(table.mac)
                if mac is not None or table.vlan is not None:
                    claimed.assign(self._network, mac=mac, vlan=table.vlan)
                steering = None if standby is None else self._steer(name, str(table.host), claimed, address)
                if steering is not None:
                    undo.callback(steering.close)
                device = VfioDevice(str(table.host), claimed.group, self._container)
                with ExitStack() as failed:
                    failed.callback(device.close)
                    if prepared:
                        device.map_memory()
                        device.reset()
                    if standby is not None and (kind := device.config.ids.class_code >> 8) != ETHERNET:
                        raise HostError(
                            f"is of class {kind:#06x}, and a failover primary is an Ethernet device, 0x0200"
                        )
                    function = VfioPci(name, device, host.sink, host.io, rombar=table.rombar, prepared=prepared)
                    failed.pop_all()
                resources.push(undo.pop_all())
                if steering is not None:
                    function.on_driven = steering.drive
                    function.on_receiving = steering.receives
                    function.blocks_migration = None  # it leaves before
                    self.steerings[name] = steering
        except HostError as e:
            raise HostError(f"device.{name}.host: {e}") from e
        function.on_broken = lambda why: host.report("DEVICE_BROKEN", device=name, reason=why)

        def wanted_back() -> None:
            host.report("DEVICE_WANTED_BACK", device=name, host=str(table.host))
            ask(function)

        function.on_wanted_back = wanted_back
        return function

    @property
    def _network(self) -> Network:
        assert self._host.network is not None, "build.py makes one for this"
        return self._host.network

    @staticmethod
    def _address(host: str) -> str | None:
        """What a NIC has for an address, as long as the host's driver has it; None where it has none, or several."""
        function = SysfsFunction(host)
        ports = function.interfaces()
        return read(f"{function.path}/net/{ports[0]}/address") or None if len(ports) == 1 else None

    def _steer(self, name: str, host: str, claimed: Claimed, address: str | None) -> Steering:
        """What gives a primary its address; a virtual function has none from here on (R49)."""
        if claimed.vf is None:
            return Steering(name, None, fixed=address, host=host)
        network = self._network
        claimed.carry(network, None)
        return Steering(name, partial(claimed.carry, network), host=host, vf=claimed.vf)
