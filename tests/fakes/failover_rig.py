"""Failover pairs on real slots: hot-plug with a fake machine around it, standbys on fake taps, cards as primaries.

A card stands for a passed-through NIC: it is a PCI function with a bus-master bit. Control runs in the test's own
thread, whenever `settle` is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, TypeVar

from kvmpy.abi.virtio import Feature, Status, feature_mask
from kvmpy.config.schema import Config, VfioPci, VirtioNetPci, load, standby_of
from kvmpy.config.schema import Device as DeviceTable
from kvmpy.devices.failover import PairState
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.virtio.net import VirtioNet
from kvmpy.devices.virtio.net_state import NetFeature
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.errors import HostError
from kvmpy.host.pci_function import VirtualFunction
from kvmpy.machine.changes import Change, Changes, at_once
from kvmpy.machine.departure import Departure
from kvmpy.machine.hotplug import HotPlug
from kvmpy.machine.inventory import Inventory, Plugged
from kvmpy.machine.pairing import PairFacts
from kvmpy.machine.standby import StandbyNetwork
from kvmpy.machine.steering import Steering
from kvmpy.monitor.pci import PciDeviceInfo, query_pci
from kvmpy.monitor.table import NoArguments
from tests.fakes.migration import Thread
from tests.fakes.pci import Board, Card
from tests.fakes.pciehp import Pciehp
from tests.fakes.tap import FakeTap
from tests.fakes.virtio_driver import guest_memory
from tests.fakes.virtio_rig import ManualLoop

T = TypeVar("T")
PAIRING: Final = feature_mask(Feature.VERSION_1, NetFeature.MAC, NetFeature.STANDBY)
ALONE: Final = feature_mask(Feature.VERSION_1, NetFeature.MAC)
PORTS: Final = 4
BUTTON: Final = 7.0
"""More seconds than a guest takes over a card that it is asked for."""
HEAD: Final = 'name = "m"\n[boot]\nkernel = "kernel"\n'


class ManualControl:
    """The control thread's loop, run by `serve`; other threads may post."""

    def __init__(self) -> None:
        self._posted: list[Callable[[], object]] = []

    def post(self, call: Callable[[], object]) -> None:
        self._posted.append(call)

    def serve(self) -> None:
        while self._posted:
            self._posted.pop(0)()


class SteeredCard(Card):
    """A card whose bus-master bit steers."""

    def __init__(self, name: str, steering: Steering) -> None:
        super().__init__(name)
        self.steering = steering

    def on_bus_master(self, enabled: bool) -> None:
        super().on_bus_master(enabled)
        self.steering.drive(enabled)


class FakePort:
    """A standby's port: ``told`` is what it was, and the frames that the guest's tap had sent by then."""

    ifname, mac = "tap0", "52:54:00:6f:55:cc"

    def __init__(self, tap: FakeTap) -> None:
        self._tap = tap
        self.told: list[str] = []
        self.sent: list[bytes] = []
        self.problems: list[str] = []

    def steer(self, *, here: bool) -> list[str]:
        self.sent += self._tap.sent()
        self.told.append("here" if here else "not here")
        return self.problems

    def leave(self) -> list[str]:
        self.told.append("nowhere")
        return self.problems

    def close(self) -> None:
        self.told.append("closed")


class FakeProgram:
    """An operator's: ``runs`` are the path and facts of each."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, dict[str, str]]] = []
        self.fails = ""

    def run(self, standby: str, path: str, facts: Mapping[str, str]) -> None:
        self.runs.append((path, dict(facts)))
        if self.fails:
            raise HostError(self.fails)


class FailoverRig:
    """``events`` is what the machine has reported; ``addresses`` what each primary was given, in order."""

    def __init__(self, directory: Path, devices: str = "", *, compat: bool = False, incoming: bool = False) -> None:
        ports = "".join(f'[[root_port]]\nid = "root{n}"\n' for n in range(1, PORTS + 1))
        netdevs = "".join(f'[[netdev]]\ntype = "tap"\nid = "hostnet{n}"\nifname = "tap{n}"\n' for n in range(2))
        machine = "[machine]\nfailover_compat = true\n" if compat else ""
        (directory / "m.toml").write_text(HEAD + machine + ports + netdevs + devices)
        self.config: Config = load(directory / "m.toml")
        self.resources = ExitStack()
        self.pci, self.memory, self.loop = Board(), guest_memory(1 << 20), ManualLoop()
        self.resources.callback(self.pci.close)
        self.resources.callback(self.memory.close)
        self.control: Any = ManualControl()
        self.io: Any = SimpleNamespace(post=lambda call: call())
        self.is_incoming = incoming
        self.is_running = True
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.addresses: dict[str, list[str | None]] = {}
        self.carry_fails: Exception | None = None
        self.cards: dict[str, SteeredCard] = {}
        self.switches: dict[str, FakePort] = {}
        self.program = FakeProgram()
        self._free = iter(range(PORTS + 1, 32))
        self._thread = threading.current_thread()
        added = [self.pci.add_port(n, n, bus=n) for n in range(1, PORTS + 1)]
        self.ports = {port.name: port for port, _ in added}
        self.guests = {
            port.name: Pciehp(self.pci, config, bus, by_message=False) for bus, (port, config) in enumerate(added, 1)
        }
        inventory = Inventory()
        for table in self.config.device:
            plugged = self.make(table, self.config)
            inventory.add(plugged)
            if table.bus is None:
                self.pci.add(plugged.function, next(self._free))
            elif plugged.standby is None:
                self.ports[table.bus].plug(plugged.function)
        self.board: Any = SimpleNamespace(
            inventory=inventory, ports=self.ports, plugger=self, pci=self.pci.root, require_room=lambda more: None
        )
        self.on_unasked: Callable[[PciFunction[Any]], object] = lambda function: None
        self.hotplug = HotPlug(self)
        for part in inventory.devices:
            part.resume()
        for guest in self.guests.values():
            guest.scan()
            guest.bind()
        self.settle()

    # A `kvmpy.machine.hotplug.Runs`

    def in_control(self, call: Callable[[], T]) -> T:
        """The test's own thread is control's; the calls of others wait for `settle`."""
        if threading.current_thread() is self._thread:
            return call()
        made = Change(at_once(call))
        self.control.post(lambda: Changes(self.control).make(made))
        return made.result()

    def in_turn(self, call: Callable[[], object]) -> None:
        call()

    def require_changeable(self) -> None:
        """It is."""

    def let_accesses_end(self) -> None:
        """There are none."""

    def report(self, event: str, **data: Any) -> None:
        self.events.append((event, data))

    # Its Plugger

    def make(self, table: DeviceTable, config: Config) -> Plugged:
        with ExitStack() as resources:
            if isinstance(table, VfioPci):
                return self._primary(table, config, resources)
            assert isinstance(table, VirtioNetPci)
            tap = FakeTap()
            resources.callback(tap.close)
            mac = str(table.mac or "52:54:00:12:34:56")
            net = VirtioNet(
                f"{table.id}/virtio-net",
                self.memory,
                self.loop,
                tap,
                bytes.fromhex(mac.replace(":", "")),
                standby=table.failover,
            )
            resources.callback(net.close)
            function = VirtioPci(table.id, net, self.pci.sink)
            resources.callback(function.close)
            port = self.switches[table.id] = FakePort(tap)
            around = StandbyNetwork(table.id, port, tap.frames, self.program)
            resources.callback(around.close)
            return Plugged(table, net, function, resources.pop_all(), mac, around=around)

    def _primary(self, table: VfioPci, config: Config, resources: ExitStack) -> Plugged:
        given = self.addresses.setdefault(table.id, [])

        def carry(mac: str | None) -> None:
            if self.carry_fails is not None:
                raise self.carry_fails
            given.append(mac)

        vf = VirtualFunction("0000:5e:00.0", 2, "enp94s0f0")
        steering = Steering(table.id, carry, host=str(table.host), vf=vf)
        resources.callback(steering.close)
        card = self.cards[table.id] = SteeredCard(table.id, steering)
        resources.callback(card.close)
        return Plugged(table, card, card, resources.pop_all(), "", standby_of(config, table), steering)

    # What a test does

    def add(self, **table: object) -> None:
        """device_add."""
        self.hotplug.device_add(dict(table))
        self.settle()

    def add_standby(self, n: int = 0, bus: str = "root1", **more: object) -> None:
        table = {"driver": "virtio-net-pci", "id": f"standby{n}", "netdev": f"hostnet{n}", "bus": bus, "failover": True}
        self.add(**(table | more))

    def add_primary(self, n: int = 0, bus: str = "root2", **more: object) -> None:
        table: Mapping[str, object] = {"driver": "vfio-pci", "id": f"primary{n}", "host": f"5e:00.{n}", "bus": bus}
        self.add(**(dict(table) | {"failover_pair_id": f"standby{n}"} | more))

    def remove(self, name: str, *, force: bool = False) -> None:
        """device_del."""
        self.hotplug.device_del(name, force=force)
        self.settle()

    def acks(self, n: int = 0, features: int = PAIRING) -> None:
        """The standby's driver comes, and takes these features."""
        net = self.net(n)
        with net.lock:
            net.write_status(0)
            net.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
            net.write_features(0, features & 0xFFFF_FFFF)
            net.write_features(1, features >> 32)
            net.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        self.settle()

    @property
    def departure(self) -> Departure:
        return self.hotplug.departure

    def stays(self, seconds: float = 30.0) -> Thread[list[str]]:
        """The migration has come to nothing: its thread brings the primaries back, while time passes."""
        return Thread(lambda: self.departure.come_back(seconds))

    def driver_leaves(self, n: int = 0) -> None:
        with self.net(n).lock:
            self.net(n).write_status(0)
        self.settle()

    def net(self, n: int = 0) -> VirtioNet:
        net = self.board.inventory.plugged[f"standby{n}"].device
        assert isinstance(net, VirtioNet)
        return net

    def settle(self) -> None:
        """Until nothing is to be done any more by control, nor by the threads that work for it."""
        for _ in range(4):
            for thread in threading.enumerate():
                if thread.name.startswith(("unplug-", "steer-", "hook-")):
                    thread.join()
            self.control.serve()
        for guest in self.guests.values():
            guest.run()

    def pass_(self, seconds: float = BUTTON) -> None:
        """Time passes in which the guest does what it has been asked for."""
        end = self.pci.clock.utc() + seconds
        while self.pci.clock.utc() < end:
            self.pci.clock.pass_(0.25)
            self.settle()

    def reset(self) -> None:
        """A system reset, as `Machine._power_cycle` does it."""
        self.hotplug.pairs.reset()
        for port in self.ports.values():
            port.finish()
        for device in self.board.inventory.devices:
            with device.lock:
                device.reset()
        for bus, port in enumerate(self.ports.values(), 1):
            port.reset()
            self.pci.config(0, bus).write(0x18, 4, bus << 16 | bus << 8)
        for name, guest in self.guests.items():
            self.guests[name] = Pciehp(self.pci, guest._above, guest._bus, by_message=False)
            self.guests[name].scan()
            self.guests[name].bind()
        self.settle()

    def visible(self) -> set[str]:
        """What query-pci says there is, but for root ports and the host bridge."""
        caller: Any = SimpleNamespace(machine=SimpleNamespace(board=self.board))
        (bus,) = query_pci.handler(caller, NoArguments())
        found = [each for device in bus.devices for each in _all(device)]
        return {device.qdev_id for device in found} - {*self.ports, ""}

    def pair(self, n: int = 0) -> PairFacts:
        (found,) = (facts for facts in self.hotplug.pairs.facts() if facts.standby_id == f"standby{n}")
        return found

    def state(self, n: int = 0) -> PairState:
        return self.pair(n).state

    def told(self, *events: str) -> list[tuple[str, str]]:
        """Event and device of each of these ``events``, or of all, since the last call."""
        told = [(event, str(data.get("device-id", data.get("device")))) for event, data in self.events]
        self.events.clear()
        return [(event, device) for event, device in told if not events or event in events]

    def close(self) -> None:
        self.settle()
        for plugged in self.board.inventory.plugged.values():
            plugged.resources.close()
        self.hotplug.close()
        self.resources.close()


def _all(device: PciDeviceInfo) -> list[PciDeviceInfo]:
    below = device.pci_bridge.devices if device.pci_bridge is not None else None
    return [device, *(each for child in below or () for each in _all(child))]
