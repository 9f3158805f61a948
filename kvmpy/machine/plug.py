"""The devices of [[root_port]] and [[device]]: each table made into a function and put in its place.

Beside build.py the one module that names concrete devices. The root bus has the host bridge at device 0, then the root
ports in their order, then the devices that are on no port: a machine's addresses follow from its configuration.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, assert_never, cast

import msgspec

from kvmpy.config.schema import (
    Cache,
    Config,
    VfioPci,
    VirtioBlkPci,
    VirtioNetPci,
    VirtioRngPci,
    VirtioSerialPci,
    standby_of,
)
from kvmpy.config.schema import Device as DeviceTable
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.host_bridge import HostBridge
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.devices.pci.slot import MakeTimer
from kvmpy.errors import HostError, KvmpyError, Problems
from kvmpy.host.console import Console
from kvmpy.host.reactor import Reactor
from kvmpy.host.rundir import RuntimeDirectory
from kvmpy.irq import MsiSink
from kvmpy.log import Log
from kvmpy.machine.check import located, placed
from kvmpy.machine.inventory import Inventory, Plugged
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
    from kvmpy.host.hook import Hook
    from kvmpy.host.network import Network
    from kvmpy.host.tap import Tap
    from kvmpy.machine.passthrough import Passthrough
    from kvmpy.machine.standby import StandbyNetwork
    from kvmpy.machine.steering import Steering

log = Log(__name__)

MAC_PREFIX: Final = bytes.fromhex("525400")  # locally administered; QEMU's begin so too


class Report(Protocol):
    """Tells whoever listens to the machine of an event. Any thread."""

    def __call__(self, event: str, **data: Any) -> None: ...


class Host(msgspec.Struct, frozen=True):
    """What devices are given of the machine around them; ``network`` where a device may need it.

    ``timer`` makes timers of the control thread, and ``now`` is the time that they keep. ``groups`` is KVM, as far as
    it must know of devices passed through; ``directory`` the machine's runtime directory, ``named`` whether somebody
    has locked its name already. ``hook`` is the operator's program for changes of a failover pair's path.
    """

    memory: GuestMemory
    io: Reactor
    sink: MsiSink
    network: Network | None
    report: Report
    timer: MakeTimer
    groups: GroupListener
    directory: str
    now: Callable[[], float] = time.monotonic
    named: bool = False
    hook: Hook | None = None


def give_back(name: str, close: Callable[[], object]) -> None:
    """Have device ``name`` give back what it has of the host; a failure is logged, and keeps nobody from going on."""
    try:
        close()
    except (KvmpyError, OSError) as e:
        log.error("%s: not all that it had of the host could be given back: %s", name, e)
    except Exception:
        log.exception("%s: failed to give back what it had of the host", name)


class Plugger:
    """Makes the devices of ``config`` and plugs them into ``pci``, before the machine runs; later it only makes them.

    ``resources`` gives everything back, in reverse; ``inventory`` gets it all. ``ports`` are the root ports by id.
    ``on_unasked`` is told, by the io thread, of a function that the host wants back and that is in no slot.
    ``lacking`` are the failover primaries that a machine which waits for a guest could not be given, and why.
    """

    def __init__(self, config: Config, pci: PciRoot, host: Host, inventory: Inventory, resources: ExitStack) -> None:
        self.ports: dict[str, RootPort] = {}
        self.on_unasked: Callable[[PciFunction[Any]], object] = lambda function: None
        self._config, self._pci, self._host, self._inventory, self._resources = config, pci, host, inventory, resources
        self._free = itertools.count()
        self._ending = False
        self.lacking: dict[str, str] = {}
        self._passthrough: Passthrough | None = None
        self._name: RuntimeDirectory | None = None
        own = [(kind, str(entry.id)) for kind in ("device", "netdev", "drive") for entry in getattr(config, kind)]
        self._own = frozenset(own)

    def plug_all(self, *, incoming: bool = False) -> None:
        """With ``incoming`` disks are another machine's still, and not locked; primaries are only checked.

        Nor is one that cannot be had a reason not to wait for its guest: the migration decides whether it can do
        without. Raises HostError, with its place in the configuration, where this host cannot: of all devices, what
        each lacks.
        """
        self._on_root_bus(HostBridge("host-bridge"))
        taken = {port.slot for port in self._config.root_port}
        slots = (slot for slot in itertools.count(1) if slot not in taken)
        for port in self._config.root_port:
            number = next(slots) if port.slot is None else port.slot
            sink, timer, now = self._host.sink, self._host.timer, self._host.now
            self.ports[port.id] = RootPort(port.id, number, sink, timer, now, power_controller=port.power_controller)
            self._on_root_bus(self.ports[port.id])
        self._resources.callback(self._close)
        problems = Problems()
        for table in self._config.device:
            with problems.noted():
                try:
                    self._plug(self.make(table, self._config, incoming=incoming))
                except HostError as e:
                    if not incoming or standby_of(self._config, table) is None:
                        raise
                    self.lacking[str(table.id)] = str(e)
                    log.warning("%s: the guest that comes cannot have this primary", e)
        problems.raise_all()

    def _plug(self, plugged: Plugged) -> None:
        self._inventory.add(plugged)
        if plugged.table.bus is None:
            self._pci.add(plugged.function, next(self._free))
        elif plugged.standby is None:  # else it is hidden: kvmpy.machine.pairs plugs it in
            self.ports[plugged.table.bus].plug(plugged.function)

    def make(self, table: DeviceTable, config: Config, *, incoming: bool = False) -> Plugged:
        """The device of ``table``, plugged in nowhere; ``config`` has its netdev or drive. Any thread, one at a time.

        ``incoming`` is as in `plug_all`.

        Raises HostError, with nothing taken.
        """
        with ExitStack() as resources:
            if isinstance(table, VfioPci):
                return self._vfio(table, config, resources, incoming=incoming)
            device, function = self._virtio_pci(table, config, resources, locked=not incoming)
            resources.callback(function.close)
            if not isinstance(table, VirtioNetPci):
                return Plugged(table, device, function, resources.pop_all())
            mac = self.mac_of(table)
            around = self._around(table, config, mac, cast("VirtioNet", device)) if table.failover else None
            if around is not None:
                resources.callback(around.close)
            return Plugged(table, device, function, resources.pop_all(), mac, around=around)

    def _around(self, table: VirtioNetPci, config: Config, mac: str, device: VirtioNet) -> StandbyNetwork | None:
        """Who is told where the guest of a standby is: its bridge, the NICs there, and the operator's program."""
        from kvmpy.machine.standby import StandbyNetwork

        if (network := self._host.network) is None:  # without root ports there is no primary
            return None
        self._take_name()
        netdev = next(netdev for netdev in config.netdev if netdev.id == table.netdev)
        netns = None if netdev.netns is None else str(netdev.netns.path)
        tap, host = cast("Tap", device.tap), self._host
        return StandbyNetwork.of(str(table.id), tap, mac, network, host.directory, netns, host.hook)

    def _virtio_pci(
        self, table: DeviceTable, config: Config, resources: ExitStack, *, locked: bool
    ) -> tuple[VirtioDevice[Any], PciFunction[Any]]:
        from kvmpy.devices.virtio.pci import VirtioPci

        device = self._make(table, config, resources, locked=locked)
        device.on_broken = lambda why: self._host.report("DEVICE_BROKEN", device=table.id, reason=why)
        resources.callback(device.close)
        with self._located(f"device.{table.id}"):
            return device, VirtioPci(table.id, device, self._host.sink)

    def _vfio(self, table: VfioPci, config: Config, resources: ExitStack, *, incoming: bool) -> Plugged:
        from kvmpy.machine.passthrough import Passthrough

        if self._passthrough is None:
            self._take_name()
            self._passthrough = Passthrough(self._host)
        standby = standby_of(config, table)
        with self._located():
            function = self._passthrough.make(
                table,
                resources,
                lambda function: self._ask_for(function, table.bus),
                standby,
                prepared=not incoming or standby is None,
            )
        resources.callback(function.close)
        steering = self._passthrough.steerings.pop(str(table.id), None)
        partner = next((other for other in config.device if other.id == standby), None)
        if isinstance(partner, VirtioNetPci) and steering is not None:
            self._require_alike(config, partner, table, steering)
        return Plugged(table, function, function, resources.pop_all(), "", standby, steering)

    def mac_of(self, table: VirtioNetPci) -> str:
        """Its address, as text."""
        return str(table.mac) if table.mac else self._chosen_mac(table.id).hex(":")

    def _require_alike(self, config: Config, standby: VirtioNetPci, primary: VfioPci, steering: Steering) -> None:
        """R6, where the host knows the address that a NIC of its own has: raises HostError."""
        if config.machine.failover_compat or steering.fixed in (None, mac := self.mac_of(standby)):
            return
        problem = (
            f"has the address {steering.fixed}, and its standby '{standby.id}' {mac}: a guest pairs by the address"
        )
        with self._located(f"device.{primary.id}.host"):
            raise HostError(f'{primary.host}: {problem}; give the standby mac = "{steering.fixed}"')

    def _take_name(self) -> None:
        """What a machine does to the host's functions and NICs is in a journal, which has one writer: who has the name.

        `kvmpy run` has it anyway. A program's machine takes it with its first passed-through function, and then gives
        back what an earlier one of that name left; without such a function nothing of it outlives its process.
        """
        from kvmpy.host.pci import recover

        if self._host.named or self._name is not None:
            return
        try:
            self._name = RuntimeDirectory(self._config.name)
        except HostError as e:
            raise (located(self._config, "", e) if str(e).startswith("name:") else e) from e
        recover(self._name.path)

    def _ask_for(self, function: PciFunction[Any], bus: str | None) -> None:
        """The host wants ``function`` back: ask the guest for it, if it can be asked."""
        port = None if bus is None else self.ports[bus]
        if port is not None and port.card is not function:
            self.on_unasked(function)
        elif port is not None and not port.is_releasing:
            port.request()

    def _make(self, table: DeviceTable, config: Config, resources: ExitStack, *, locked: bool) -> VirtioDevice[Any]:
        match table:
            case VirtioNetPci():
                return self._net(table, config, resources)
            case VirtioBlkPci():
                return self._blk(table, config, resources, locked=locked)
            case VirtioRngPci():
                return self._rng(table)
            case VirtioSerialPci():
                return self._console(table, resources)
            case VfioPci():
                raise AssertionError("is no virtio device")
            case other:
                assert_never(other)

    def _net(self, table: VirtioNetPci, config: Config, resources: ExitStack) -> VirtioNet:
        from kvmpy.devices.virtio.net import VirtioNet
        from kvmpy.host.tap import Tap
        from kvmpy.host.visit import inside

        for other in self._inventory.plugged.values():  # a primary that came first
            if isinstance(other.table, VfioPci) and other.standby == table.id and other.steering is not None:
                self._require_alike(config, table, other.table, other.steering)
        netdev = next(netdev for netdev in config.netdev if netdev.id == table.netdev)
        # Plain strings: the types of the configuration go no deeper.
        ifname, bridge, netns = (
            value and str(value) for value in (netdev.ifname, netdev.bridge, netdev.netns and netdev.netns.path)
        )
        with self._located(f"netdev.{netdev.id}.netns"):
            inside(netns, lambda: None)  # or its absence would be the interface's fault
        with self._located(f"netdev.{netdev.id}.ifname"):
            tap = Tap.open(str(ifname), netdev.queues, netns=netns)
            resources.callback(tap.close)
            if bridge is None:
                if table.host_mtu is not None:
                    tap.set_mtu(table.host_mtu)
                tap.set_up()
        if bridge is not None:
            assert self._host.network is not None
            with self._located():
                self._host.network.attach(netdev.id, str(ifname), bridge=bridge, mtu=table.host_mtu, netns=netns)
            resources.callback(self._detach, str(ifname), netns)
        with self._located(f"netdev.{netdev.id}.vhost"):
            vhost = self._vhost(netdev.id, netdev.vhost, netdev.queues, resources)
        mac = bytes.fromhex(self.mac_of(table).replace(":", ""))
        name, mtu, standby = f"{table.id}/virtio-net", table.host_mtu, table.failover
        return VirtioNet(name, self._host.memory, self._host.io, tap, mac, mtu=mtu, vhost=vhost, standby=standby)

    def _detach(self, ifname: str, netns: str | None) -> None:
        """Out of its bridge; at the machine's end the helper does that for all of them."""
        if not self._ending and self._host.network is not None:
            self._host.network.detach(ifname, netns=netns)

    def _vhost(self, netdev: str, wanted: bool | None, pairs: int, resources: ExitStack) -> VhostNet | None:
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
        resources.callback(vhost.close)
        return vhost

    def _blk(self, table: VirtioBlkPci, config: Config, resources: ExitStack, *, locked: bool) -> VirtioBlk:
        from kvmpy.devices.virtio.blk import VirtioBlk
        from kvmpy.host.disk import Disk

        drive = next(drive for drive in config.drive if drive.id == table.drive)
        with self._located(f"drive.{drive.id}.path"):
            disk = Disk(drive.path, readonly=drive.readonly, direct=drive.cache is Cache.NONE, locked=locked)
        resources.callback(disk.close)
        serial, name = table.serial or drive.id, f"{table.id}/virtio-blk"
        return VirtioBlk(name, self._host.memory, self._host.io, disk, serial=serial, queues=table.num_queues)

    def _rng(self, table: VirtioRngPci) -> VirtioRng:
        from kvmpy.devices.virtio.rng import VirtioRng

        return VirtioRng(f"{table.id}/virtio-rng", self._host.memory, self._host.io)

    def _console(self, table: VirtioSerialPci, resources: ExitStack) -> VirtioConsole:
        from kvmpy.devices.virtio.console import VirtioConsole

        console = Console(self._host.io)
        resources.callback(self._in_io, console.close)
        try:
            place = console.open(table.chardev.kind, table.chardev.path)
        except HostError as e:
            raise self._placed(f"device.{table.id}.chardev", e) from e
        device = VirtioConsole(
            f"{table.id}/virtio-console", self._host.memory, self._host.io, console, place or str(table.chardev)
        )
        console.connect(device.receive, device.drained)
        return device

    def _in_io(self, call: Callable[[], object]) -> None:
        """Have the io thread make a call, and wait for it; while it does not run, make it here."""
        made = threading.Event()

        def make() -> None:
            try:
                call()
            finally:
                made.set()

        if self._host.io.thread is not None:
            with suppress(RuntimeError):  # it has ended
                self._host.io.post(make)
                made.wait()
        if not made.is_set():
            make()

    def _chosen_mac(self, device: str) -> bytes:
        """Always the same for a device of a machine, and hardly another's."""
        import hashlib  # with the network device: it takes longer than all of PCI

        return MAC_PREFIX + hashlib.sha256(f"{self._config.name}/{device}".encode()).digest()[:3]

    def _on_root_bus(self, function: PciFunction[Any]) -> None:
        self._inventory.fix([function])
        self._resources.callback(function.close)
        self._pci.add(function, next(self._free))

    def _close(self) -> None:
        """All that is plugged in gives back what it has of the host: the last first, but what has to wait after all."""
        self._ending = True
        last_first = reversed(list(self._inventory.plugged.items()))
        for name, plugged in sorted(last_first, key=lambda item: not item[1].device.begin_pause()):
            give_back(name, plugged.resources.close)
        if self._name is not None:
            self._name.close()

    @contextmanager
    def _located(self, key: str = "") -> Iterator[None]:
        """Put the place of ``key``, or of the key that the error begins with, before an error."""
        try:
            yield
        except HostError as e:
            problem = f"{key}: {e}" if key else str(e)
            raise HostError(placed(self._config, problem) if self._is_own(problem) else problem) from e

    def _placed(self, key: str, e: HostError) -> HostError:
        return located(self._config, key, e) if self._is_own(key) else HostError(f"{key}: {e}")

    def _is_own(self, problem: str) -> bool:
        """Whether what a message begins with is a key of the configuration's, and was not added since."""
        kind, _, rest = problem.partition(":")[0].partition(".")
        return not {(kind, rest), (kind, rest.rpartition(".")[0])}.isdisjoint(self._own)  # an id may have dots
