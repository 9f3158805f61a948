"""Functions of the host for a machine: found, taken, opened, and given back whatever goes wrong."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from kvmpy.abi import ioctl
from kvmpy.config.schema import VfioPci as VfioPciTable
from kvmpy.config.values import Id, Mac, PciAddress
from kvmpy.devices.pci.config import Command
from kvmpy.devices.vfio.container import Container
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.errors import HostError
from kvmpy.host.memory import Mapping
from kvmpy.host.pci_function import VirtualFunction
from kvmpy.host.reactor import Reactor
from kvmpy.irq import MsiSink
from kvmpy.machine import passthrough
from kvmpy.machine.passthrough import Claims, Passthrough
from kvmpy.memory import GuestMemory, Ram
from tests.fakes.interrupts import FakeSink
from tests.fakes.loop import Inbox, open_descriptors
from tests.fakes.vfio import ADDRESS, ERROR, GROUP, REQUEST, VfioKernel
from tests.fakes.vfio_rig import reset_by

TABLE = VfioPciTable(id=Id("host0"), host=PciAddress(ADDRESS))


class Machine(NamedTuple):
    directory: str
    network: Any
    memory: GuestMemory
    io: Reactor
    sink: MsiSink
    groups: VfioKernel
    report: Any


class Claim:
    """What takes a function from the host's driver; ``taken`` says whether it has it now."""

    group = GROUP

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.assigned: list[tuple[object, str | None, int | None]] = []
        self.carried: list[str | None] = []
        self.vf: VirtualFunction | None = VirtualFunction("0000:5e:00.0", 2, "enp94s0f0")

    def __call__(self, address: str, journal_dir: str) -> Claim:
        assert journal_dir == "/run/kvmpy/m"
        self.taken.append(address)
        return self

    def assign(self, network: object, *, mac: str | None = None, vlan: int | None = None) -> None:
        assert self.taken
        self.assigned.append((network, mac, vlan))

    def carry(self, network: object, mac: str | None) -> None:
        assert self.taken
        self.carried.append(mac)

    def bind(self) -> None:
        """It is bound."""

    def withdraw(self) -> None:
        """The test of `Claims` has what it is for."""

    def close(self) -> None:
        self.taken.pop()


class Rig:
    def __init__(self, resources: ExitStack, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.kernel = VfioKernel(directory)
        monkeypatch.setattr(ioctl, "sys_ioctl", self.kernel)
        monkeypatch.setattr("kvmpy.devices.vfio.device.choose", reset_by("flr"))
        monkeypatch.setattr(passthrough, "Container", lambda memory, groups: Container(memory, groups, str(directory)))
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[VfioPci] = []
        sink, self.io, memory = FakeSink(), Reactor("io"), GuestMemory()
        mapping = Mapping(1 << 20)
        for closing in (mapping.close, memory.close, sink.close, self.io.close, self.kernel.nic.close):
            resources.callback(closing)
        memory.add(Ram(0, 1 << 20, mapping))
        self.claim = Claim()
        machine = Machine("/run/kvmpy/m", "the helper", memory, self.io, sink, self.kernel, self._report)
        self.passthrough = Passthrough(machine, self.claim)

    def _report(self, event: str, **data: Any) -> None:
        self.events.append((event, data))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rig]:
    with ExitStack() as resources:
        yield Rig(resources, monkeypatch, tmp_path)


def test_a_function_is_taken_reset_and_given_back(rig: Rig) -> None:
    with ExitStack() as resources:
        function = rig.passthrough.make(TABLE, resources, rig.asked.append)
        resources.callback(function.close)
        assert rig.claim.taken == [ADDRESS]
        assert rig.kernel.nic.resets == ["function"], "of what the host's driver left in it"
        assert function.name == "host0"
    assert (rig.claim.taken, rig.kernel.maps) == ([], {})


class Function(Claim):
    """One of several: ``said`` is what becomes of all."""

    def __init__(self, name: str, group: int, said: list[str]) -> None:
        super().__init__()
        self.name, self.group, self.said = name, group, said
        said.append(f"take {name}")

    def bind(self) -> None:
        self.said.append(f"bind {self.name}")

    def withdraw(self) -> None:
        self.said.append(f"withdraw {self.name}")

    def close(self) -> None:
        self.said.append(f"give {self.name}")


def test_functions_of_a_group_are_given_back_when_no_device_has_one_any_more() -> None:
    said: list[str] = []
    groups = {"a": 1, "b": 1, "c": 2}
    claims = Claims(lambda address, _: Function(address, groups[address], said))
    a, b, c = (claims.take(address, "") for address in "abc")
    said.clear()
    claims.give_back("a", a)
    assert said == ["withdraw a"], "b has the group open"
    claims.give_back("c", c)
    assert said == ["withdraw a", "give c"]
    said.clear()
    assert claims.take("a", "") is a
    assert said == ["bind a"], "the host may have taken it back meanwhile"
    claims.give_back("b", b)
    said.clear()
    claims.give_back("a", a)
    assert said == ["give b", "give a"]
    assert claims.take("a", "") is not a


@pytest.mark.parametrize(
    "request_name", ["VFIO_GROUP_GET_DEVICE_FD", "VFIO_DEVICE_RESET", "VFIO_DEVICE_SET_IRQS", "VFIO_IOMMU_MAP_DMA"]
)
def test_whatever_fails_is_located_and_undone(rig: Rig, request_name: str) -> None:
    before = open_descriptors()
    rig.kernel.fail(request_name, errno.EIO)
    with ExitStack() as resources:
        with pytest.raises(HostError, match=rf"^device\.host0\.host: .*{request_name}: EIO"):
            rig.passthrough.make(TABLE, resources, rig.asked.append)
        assert (rig.claim.taken, rig.kernel.maps) == ([], {})
        rig.kernel.nic.close()
        assert open_descriptors() == before
    rig.kernel.recover(request_name)
    with ExitStack() as resources:
        resources.callback(rig.passthrough.make(TABLE, resources, rig.asked.append).close)


def test_what_the_host_says_of_a_device_becomes_an_event(rig: Rig) -> None:
    with ExitStack() as resources:
        function = rig.passthrough.make(TABLE, resources, rig.asked.append)
        resources.callback(function.close)
        rig.kernel.nic.signal(REQUEST)
        rig.kernel.nic.signal(ERROR)
        rig.io.start()
        rig.io.stop()
    assert rig.asked == [function], "to leave the guest"
    reasons = [data.pop("reason") for _, data in rig.events if "reason" in data]
    assert "AER" in reasons[0]
    assert sorted(rig.events, key=str) == [
        ("DEVICE_BROKEN", {"device": "host0"}),
        ("DEVICE_WANTED_BACK", {"device": "host0", "host": ADDRESS}),
    ]


def test_a_virtual_function_is_given_its_address_and_network_before_it_is_opened(rig: Rig) -> None:
    table = msgspec.structs.replace(TABLE, mac=Mac("52:54:00:12:34:56"), vlan=7)
    with ExitStack() as resources:
        resources.callback(rig.passthrough.make(table, resources, rig.asked.append).close)
        resources.callback(rig.passthrough.make(TABLE, resources, rig.asked.append).close)
    assert rig.claim.assigned == [("the helper", "52:54:00:12:34:56", 7)], "and no other is touched"


# Primaries of failover pairs


def primary(rig: Rig, resources: ExitStack) -> VfioPci:
    function = rig.passthrough.make(TABLE, resources, rig.asked.append, "net1")
    resources.callback(function.close)
    return function


def test_r10_a_primary_is_open_reset_and_mapped_before_any_guest_has_it(rig: Rig) -> None:
    with ExitStack() as resources:
        assert primary(rig, resources).is_ready
        assert rig.kernel.nic.resets == ["function"]
        assert rig.kernel.maps


def test_r43_a_primary_of_a_machine_that_waits_is_open_and_pins_nothing_before_it_is_prepared(rig: Rig) -> None:
    with ExitStack() as resources:
        function = rig.passthrough.make(TABLE, resources, rig.asked.append, "net1", prepared=False)
        resources.callback(function.close)
        assert (rig.kernel.nic.resets, rig.kernel.maps, rig.claim.carried) == ([], {}, [None])
        assert "host0" in rig.passthrough.steerings
        done: Inbox[bool] = Inbox()
        function.prepare(lambda: done.put(function.is_ready))
        assert done.wait() == [True]
        assert (rig.kernel.nic.resets, len(rig.kernel.maps)) == (["function"], 1)
    assert rig.kernel.maps == {}


def test_r49_a_prepared_primary_has_no_address_and_gets_it_with_its_bus_master_bit(rig: Rig) -> None:
    with ExitStack() as resources:
        function = primary(rig, resources)
        steering = rig.passthrough.steerings["host0"]
        steering.mac = "52:54:00:6f:55:cc"
        moved: Inbox[bool] = Inbox()
        steering.on_change = lambda driven, problem: moved.put(driven)
        assert rig.claim.carried == [None]
        function.config_write(4, 2, Command.BUS_MASTER)
        moved.wait(1)
        assert rig.claim.carried == [None, "52:54:00:6f:55:cc"]
        assert (steering.host, steering.vf) == (str(TABLE.host), rig.claim.vf)
        heard: Inbox[float] = Inbox()
        steering.on_receiving = heard.put
        function.on_receiving()
        heard.wait(1)
        with function.lock:
            function.release()
        assert moved.wait(2) == [True, False]
        assert rig.claim.carried == [None, "52:54:00:6f:55:cc", None]
    assert rig.claim.taken == []


def test_r49_a_nic_that_is_no_virtual_function_keeps_its_address(rig: Rig) -> None:
    rig.claim.vf = None
    with ExitStack() as resources:
        function = primary(rig, resources)
        told: list[bool] = []
        rig.passthrough.steerings["host0"].on_change = lambda driven, problem: told.append(driven)
        function.config_write(4, 2, Command.BUS_MASTER)
        assert (rig.claim.carried, told) == ([], [True])


def test_r4_a_primary_that_is_no_ethernet_device_is_refused_while_hidden(rig: Rig) -> None:
    rig.kernel.nic.config[0x09:0x0C] = (0x01_0802).to_bytes(3, "little")
    with ExitStack() as resources:
        why = r"^device\.host0\.host: .*is of class 0x0108, and a failover primary is an Ethernet device, 0x0200"
        with pytest.raises(HostError, match=why):
            primary(rig, resources)
        assert (rig.claim.taken, rig.kernel.maps) == ([], {})


def test_a_primary_is_in_no_migrations_way(rig: Rig) -> None:
    with ExitStack() as resources:
        assert primary(rig, resources).blocks_migration is None
