"""A failover pair on a whole machine: what its start, its resets and its end make of it. The NIC is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.config.schema import load
from kvmpy.devices.failover import PairState
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from kvmpy.machine.pairing import PairFacts
from kvmpy.monitor.ports import root_ports
from tests.fakes.failover_host import FailoverHost, NicGuest
from tests.fakes.loop import Inbox, poll
from tests.fakes.pvh_kernel import HALT, SMALL_MACHINE, pvh_kernel
from tests.fakes.vfio import ADDRESS
from tests.fakes.virtio_rig import Guest

MAC = "52:54:00:6f:55:cc"
PAIR = f"""\
{SMALL_MACHINE}[[root_port]]
id = "root1"
power_controller = false
[[root_port]]
id = "root2"
[[netdev]]
type = "tap"
id = "hostnet1"
ifname = "tap-m"
vhost = false
[[device]]
driver = "vfio-pci"
id = "hostdev0"
host = "{ADDRESS}"
bus = "root1"
failover_pair_id = "net1"
[[device]]
driver = "virtio-net-pci"
id = "net1"
netdev = "hostnet1"
mac = "{MAC}"
bus = "root2"
failover = true
"""


class Rig:
    def __init__(self, machine: Machine, host: FailoverHost) -> None:
        self.machine, self.claim, self.kernel = machine, host.claims[ADDRESS], host.kernel
        self.events: Inbox[tuple[str, dict[str, Any]]] = Inbox()
        machine.listeners.append(lambda event, data, _: self.events.put((event, data)))
        self.boot()

    def boot(self) -> None:
        """A kernel has come up as far as binding pciehp."""
        self.nic = NicGuest.of(self.machine, "root1")
        self.nic.bind()
        self.nic.serve()

    def ack(self) -> None:
        """The standby's driver comes."""
        device: Any = self.machine.board.by_id["net1"]
        transport = device.transport
        guest = Guest(device, self.machine.board.memory, gpa=0x80_0000)
        device.transport = transport
        guest.start(enable=set(), go=False)
        self.wait(lambda pair: pair.state in (PairState.PLUGGING, PairState.PLUGGED))
        self.nic.serve()

    def pair(self) -> PairFacts:
        (found,) = self.machine.in_control(lambda: self.machine.pairs)
        return found

    def wait(self, wanted: Any) -> PairFacts:
        poll(lambda: wanted(self.pair()))
        return self.pair()

    def told(self, event: str) -> int:
        return [name for name, _ in self.events.items].count(event)


@pytest.fixture
def rig(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    host = FailoverHost(tmp_path, monkeypatch)
    (tmp_path / "m.toml").write_text(PAIR)
    (tmp_path / "kernel").write_bytes(pvh_kernel(HALT))
    with ExitStack() as stack:
        stack.callback(host.close)
        machine = stack.enter_context(Machine(load(tmp_path / "m.toml")))
        machine.start()
        yield Rig(machine, host)


def test_r9_r10_a_primary_is_prepared_at_the_start_and_hidden_until_its_driver_has_come(rig: Rig) -> None:
    assert (rig.claim.taken, rig.kernel.nics[ADDRESS].resets, bool(rig.kernel.maps)) == (True, ["function"], True)
    assert rig.machine.board.ports["root1"].card is None
    assert next(port.state.value for port in root_ports(rig.machine)) == "hidden"
    assert rig.claim.carried == [None]
    rig.ack()
    pair = rig.wait(lambda pair: pair.state is PairState.PLUGGED and pair.path == "primary")
    assert (pair.standby_mac, pair.primary_mac, pair.error) == (MAC, MAC, None)
    assert rig.claim.carried == [None, MAC]
    rig.events.wait_until(lambda _: rig.told("FAILOVER_PATH_CHANGED") == 1)  # when the network knows it too
    assert [rig.told(f"FAILOVER_{what}") for what in ("NEGOTIATED", "PRIMARY_PLUGGED", "PATH_CHANGED")] == [1, 1, 1]


@pytest.mark.parametrize("times", [1, 3])
def test_r12_r49_a_system_reset_hides_it_and_takes_its_address(rig: Rig, times: int) -> None:
    for boot in range(1, times + 1):
        rig.ack()
        rig.wait(lambda pair: pair.path == "primary")
        rig.machine.reset()
        pair = rig.wait(lambda pair: pair.path == "standby")
        assert (pair.state, pair.negotiated, pair.primary_mac) == (PairState.HIDDEN, False, None)
        assert rig.machine.board.ports["root1"].card is None
        poll(lambda: len(rig.claim.carried) == 2 * boot + 1)  # noqa: B023
        assert rig.claim.carried == [None, *[MAC, None] * boot]
        rig.boot()
        assert rig.machine.board.ports["root1"].card is None
    assert rig.told("FAILOVER_NEGOTIATED") == times


def test_r11_a_primary_that_is_asked_for_goes_back_to_the_host_and_comes_again(rig: Rig) -> None:
    rig.ack()
    rig.wait(lambda pair: pair.path == "primary")
    rig.machine.device_del("hostdev0")
    rig.nic.serve()
    rig.events.wait_until(lambda _: rig.told("DEVICE_DELETED") == 1)
    assert (rig.claim.taken, rig.told("FAILOVER_PRIMARY_RELEASED")) == (False, 1)
    assert rig.pair().state is PairState.NONE
    table = {"driver": "vfio-pci", "id": "hostdev0", "host": ADDRESS, "bus": "root1", "failover_pair_id": "net1"}
    rig.machine.device_add(table)
    rig.nic.serve()
    rig.wait(lambda pair: pair.state is PairState.PLUGGED and pair.path == "primary")


def test_r36_a_guest_that_is_stopped_is_let_go_on_before_a_migration(rig: Rig) -> None:
    assert rig.machine.handoff.blockers() == []
    rig.ack()
    rig.wait(lambda pair: pair.path == "primary")
    rig.machine.pause()
    (reason,) = rig.machine.handoff.blockers()
    assert reason == "device hostdev0: a guest that is stopped does not let it go; cont first"


def test_r27_the_window_of_its_port_has_room_for_it(rig: Rig) -> None:
    function: Any = rig.machine.board.inventory.plugged["hostdev0"].function
    port = rig.machine.board.ports["root1"].header
    wide = [bar.size for bar in function.bars.values() if bar.kind.registers == 2]
    assert len(port.prefetchable) >= sum(wide) > 0
