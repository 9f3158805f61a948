"""The devices of [[root_port]] and [[device]]: each table made into a function and put in its place.

Beside build.py the one module that names concrete devices. The root bus has the host bridge at device 0, then the root
ports in their order, then the devices that are on no port: a machine's addresses follow from its configuration.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, assert_never

from kvmpy.config.schema import (
    Cache,
    Config,
    VfioPci,
    VirtioBlkPci,
    VirtioNetPci,
    VirtioRngPci,
    VirtioSerialPci,
)
from kvmpy.config.schema import Device as DeviceTable
from kvmpy.devices.base import Device
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.host_bridge import HostBridge
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.errors import HostError
from kvmpy.host.console import Console
from kvmpy.host.reactor import Reactor
from kvmpy.irq import MsiSink
from kvmpy.machine.check import located, placed
from kvmpy.memory import GuestMemory

# What a machine has none of is not imported: it would start later for nothing.
if TYPE_CHECKING:
    from kvmpy.devices.vfio.container import GroupListener
    from kvmpy.devices.vhost import VhostNet
    from kvmpy.devices.virtio.blk import VirtioBlk
    from kvmpy.devices.virtio.console import VirtioConsole
    from kvmpy.devices.virtio.device import VirtioDevice
    from kvmpy.devices.virtio.net import VirtioNet
    from kvmpy.devices.virtio.rng import VirtioRng
    from kvmpy.host.network import Network
    from kvmpy.machine.passthrough import Passthrough

log = logging.getLogger(__name__)

MAC_PREFIX: Final = bytes.fromhex("525400")  # locally administered; QEMU's begin so too


class Report(Protocol):
    """Tells whoever listens to the machine of an event. Any thread."""

    def __call__(self, event: str, **data: Any) -> None: ...


class Host(NamedTuple):
    """What devices are given of the machine around them; ``network`` where one of them needs it.

    ``groups`` is KVM, as far as it must know of devices passed through; ``directory`` the machine's runtime directory.
    """

    memory: GuestMemory
    io: Reactor
    sink: MsiSink
    network: Network | None
    report: Report
    groups: GroupListener
    directory: str


class Plugger:
    """Makes the devices of ``config`` and plugs them into ``pci``; ``resources`` gives everything back, in reverse.

    ``devices`` is the order in which they are reset, and saved: bridges before what is behind them. ``by_id`` has those
    of [[device]], ``nics`` its network devices by their id and by their netdev's.
    """

    def __init__(self, config: Config, pci: PciRoot, host: Host, resources: ExitStack) -> None:
        self.devices: list[Device[Any]] = []
        self.by_id: dict[str, Device[Any]] = {}
        self.nics: dict[str, VirtioNet] = {}
        self._config, self._pci, self._host, self._resources = config, pci, host, resources
        self._ports: dict[str, RootPort] = {}
        self._free = itertools.count()
        self._passthrough: Passthrough | None = None

    def plug_all(self) -> None:
        """Raises HostError, with its place in the configuration, where this host cannot."""
        self._on_root_bus(HostBridge("host-bridge"))
        taken = {port.slot for port in self._config.root_port}
        slots = (slot for slot in itertools.count(1) if slot not in taken)
        for port in self._config.root_port:
            self._ports[port.id] = RootPort(port.id, next(slots) if port.slot is None else port.slot, self._host.sink)
            self._on_root_bus(self._ports[port.id])
        for table in self._config.device:
            self._plug(table)

    def _plug(self, table: DeviceTable) -> None:
        function = self._vfio(table) if isinstance(table, VfioPci) else self._virtio_pci(table)
        if table.bus is None:
            self._on_root_bus(function)
        else:
            self._keep(function)
            self._ports[table.bus].plug(function)

    def _virtio_pci(self, table: DeviceTable) -> PciFunction[Any]:
        from kvmpy.devices.virtio.pci import VirtioPci

        device = self._make(table)
        device.on_broken = lambda why: self._host.report("DEVICE_BROKEN", device=table.id, reason=why)
        self._keep(device)
        with self._located(f"device.{table.id}"):
            function = VirtioPci(table.id, device, self._host.sink)
        self.by_id[table.id] = device
        return function

    def _vfio(self, table: VfioPci) -> PciFunction[Any]:
        from kvmpy.machine.passthrough import Passthrough

        if self._passthrough is None:
            self._passthrough = Passthrough(self._host)
        with self._located():
            function = self._passthrough.make(table, self._resources)
        self.by_id[table.id] = function
        return function

    def _make(self, table: DeviceTable) -> VirtioDevice[Any]:
        match table:
            case VirtioNetPci():
                return self._net(table)
            case VirtioBlkPci():
                return self._blk(table)
            case VirtioRngPci():
                return self._rng(table)
            case VirtioSerialPci():
                return self._console(table)
            case VfioPci():
                raise AssertionError("is no virtio device")
            case other:
                assert_never(other)

    def _net(self, table: VirtioNetPci) -> VirtioNet:
        from kvmpy.devices.virtio.net import VirtioNet
        from kvmpy.host.tap import Tap
        from kvmpy.host.visit import inside

        netdev = next(netdev for netdev in self._config.netdev if netdev.id == table.netdev)
        # Plain strings: the types of the configuration go no deeper.
        ifname, bridge, netns = (
            value and str(value) for value in (netdev.ifname, netdev.bridge, netdev.netns and netdev.netns.path)
        )
        with self._located(f"netdev.{netdev.id}.netns"):
            inside(netns, lambda: None)  # or its absence would be the interface's fault
        with self._located(f"netdev.{netdev.id}.ifname"):
            tap = Tap.open(str(ifname), netdev.queues, netns=netns)
            self._resources.callback(tap.close)
            if bridge is None:
                if table.host_mtu is not None:
                    tap.set_mtu(table.host_mtu)
                tap.set_up()
        if bridge is not None:
            assert self._host.network is not None
            with self._located():
                self._host.network.attach(netdev.id, str(ifname), bridge=bridge, mtu=table.host_mtu, netns=netns)
        with self._located(f"netdev.{netdev.id}.vhost"):
            vhost = self._vhost(netdev.id, netdev.vhost, netdev.queues)
        mac = bytes.fromhex(table.mac.replace(":", "")) if table.mac else self._chosen_mac(table.id)
        net = VirtioNet(
            f"{table.id}/virtio-net", self._host.memory, self._host.io, tap, mac, mtu=table.host_mtu, vhost=vhost
        )
        self.nics[table.id] = self.nics[netdev.id] = net
        return net

    def _vhost(self, netdev: str, wanted: bool | None, pairs: int) -> VhostNet | None:
        from kvmpy.devices.vhost import VhostNet

        if wanted is False:
            return None
        try:
            vhost = VhostNet(self._host.memory, self._host.io, pairs)
        except HostError as e:
            if wanted:
                raise
            log.info("netdev %s: frames pass through kvmpy, not the kernel: %s", netdev, e)
            return None
        self._resources.callback(vhost.close)
        return vhost

    def _blk(self, table: VirtioBlkPci) -> VirtioBlk:
        from kvmpy.devices.virtio.blk import VirtioBlk
        from kvmpy.host.disk import Disk

        drive = next(drive for drive in self._config.drive if drive.id == table.drive)
        with self._located(f"drive.{drive.id}.path"):
            disk = Disk.open(drive.path, readonly=drive.readonly, direct=drive.cache is Cache.NONE)
        self._resources.callback(disk.close)
        serial, name = table.serial or drive.id, f"{table.id}/virtio-blk"
        return VirtioBlk(name, self._host.memory, self._host.io, disk, serial=serial, queues=table.num_queues)

    def _rng(self, table: VirtioRngPci) -> VirtioRng:
        from kvmpy.devices.virtio.rng import VirtioRng

        return VirtioRng(f"{table.id}/virtio-rng", self._host.memory, self._host.io)

    def _console(self, table: VirtioSerialPci) -> VirtioConsole:
        from kvmpy.devices.virtio.console import VirtioConsole

        console = Console(self._host.io)
        self._resources.callback(console.close)
        try:
            place = console.open(table.chardev.kind, table.chardev.path)
        except HostError as e:
            raise located(self._config, f"device.{table.id}.chardev", e) from e
        device = VirtioConsole(
            f"{table.id}/virtio-console", self._host.memory, self._host.io, console, place or str(table.chardev)
        )
        console.connect(device.receive, device.drained)
        return device

    def _chosen_mac(self, device: str) -> bytes:
        """Always the same for a device of a machine, and hardly another's."""
        return MAC_PREFIX + hashlib.sha256(f"{self._config.name}/{device}".encode()).digest()[:3]

    def _on_root_bus(self, function: PciFunction[Any]) -> None:
        self._keep(function)
        self._pci.add(function, next(self._free))

    def _keep(self, device: Device[Any]) -> None:
        self.devices.append(device)
        self._resources.callback(device.close)

    @contextmanager
    def _located(self, key: str = "") -> Iterator[None]:
        """Put the place of ``key``, or of the key that the error begins with, before an error."""
        try:
            yield
        except HostError as e:
            raise HostError(placed(self._config, f"{key}: {e}" if key else str(e))) from e
