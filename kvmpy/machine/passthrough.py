"""Functions of the host's PCI bus for the guest: taken from the host, opened, and made into devices.

All of them share one container, in which the guest's RAM is mapped for DMA while there is any.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from kvmpy.config.schema import VfioPci as VfioPciTable
from kvmpy.devices.vfio.container import Container, GroupListener
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.errors import HostError
from kvmpy.host.pci import HostFunction
from kvmpy.host.reactor import Reactor
from kvmpy.irq import MsiSink
from kvmpy.memory import GuestMemory

if TYPE_CHECKING:
    from kvmpy.host.network import Network


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

    def assign(self, network: Network, *, mac: str | None = None, vlan: int | None = None) -> None: ...

    def close(self) -> None: ...


class Passthrough:
    """Makes the passed-through functions of one machine."""

    def __init__(self, host: Surroundings, claim: Callable[[str, str], Claimed] = HostFunction.claim) -> None:
        """``claim`` takes a function from the host's driver, and notes in a directory how to give it back."""
        self._host, self._claim = host, claim
        self._container = Container(host.memory, host.groups)

    def make(self, table: VfioPciTable, resources: ExitStack, ask: Callable[[VfioPci], object]) -> VfioPci:
        """The function of ``table``, reset, and all RAM mapped: seconds. By a thread that no vCPU waits for.

        ``ask`` asks the guest to let it go, when the host wants it back: by the io thread.
        `close` of it is the caller's; what ``resources`` gets is to be closed after that. Raises HostError, beginning
        with the key it concerns, with nothing left behind.
        """
        name, host = str(table.id), self._host
        try:
            with ExitStack() as undo:
                claimed = self._claim(str(table.host), host.directory)
                undo.callback(claimed.close)
                if table.mac is not None or table.vlan is not None:
                    assert host.network is not None, "build.py makes one for this"
                    claimed.assign(host.network, mac=table.mac and str(table.mac), vlan=table.vlan)
                device = VfioDevice(str(table.host), claimed.group, self._container)
                with ExitStack() as failed:
                    failed.callback(device.close)
                    device.reset()
                    function = VfioPci(name, device, host.sink, host.io, rombar=table.rombar)
                    failed.pop_all()
                resources.push(undo.pop_all())
        except HostError as e:
            raise HostError(f"device.{name}.host: {e}") from e
        function.on_broken = lambda why: host.report("DEVICE_BROKEN", device=name, reason=why)

        def wanted_back() -> None:
            host.report("DEVICE_WANTED_BACK", device=name, host=str(table.host))
            ask(function)

        function.on_wanted_back = wanted_back
        return function
