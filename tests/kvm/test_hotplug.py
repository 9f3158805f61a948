"""device_add and its kin on a machine that runs: what they do, what they refuse, and that a failure leaves nothing."""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.config.schema import load
from kvmpy.devices.pci import slot
from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.virtio.blk import VirtioBlk
from kvmpy.errors import CommandError
from kvmpy.kvm.system import System
from kvmpy.machine.inventory import Plugged
from kvmpy.machine.machine import Machine
from kvmpy.monitor.ports import SpareInfo, root_ports, spare
from tests.counts import count
from tests.fakes.hotplug_guest import HotplugGuest
from tests.fakes.loop import Inbox
from tests.fakes.pvh_kernel import HALT, SMALL_MACHINE, pvh_kernel

BOUND: Final = 20.0
MACHINE: Final = f"""\
{SMALL_MACHINE}[[root_port]]
id = "root1"
power_controller = false
[[root_port]]
id = "root2"
power_controller = false
[[root_port]]
id = "root3"
[[netdev]]
id = "hostnet1"
type = "tap"
ifname = "tap-none"
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
cache = "writeback"
[[drive]]
id = "gone"
path = "gone.raw"
format = "raw"
[[device]]
driver = "virtio-rng-pci"
id = "rng0"
[[device]]
driver = "virtio-rng-pci"
id = "rng3"
bus = "root3"
"""
RNG: Final = {"driver": "virtio-rng-pci", "id": "rng1", "bus": "root1"}
BLK: Final = {"driver": "virtio-blk-pci", "id": "vd1", "drive": "disk0", "bus": "root2"}


class Rig:
    """A machine with a spinning vCPU, and a guest's side for each of its ports."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.events: Inbox[tuple[str, dict[str, Any]]] = Inbox()
        machine.listeners.append(lambda event, data, _: self.events.put((event, data)))
        board = machine.board
        self.guests = {
            name: HotplugGuest(board.mmio, board.memory, port, number)
            for number, (name, port) in enumerate(board.ports.items(), 1)
        }
        for guest in self.guests.values():
            guest.bind()
            guest.serve()

    def add(self, table: dict[str, Any]) -> None:
        self.machine.device_add(table)
        self.guests[table["bus"]].serve()

    def remove(self, name: str, bus: str) -> None:
        before = self.deleted().count(name)
        self.machine.device_del(name)
        self.guests[bus].serve()
        self.events.wait_until(lambda _: self.deleted().count(name) == before + 1)

    def deleted(self) -> list[str]:
        return [data["device"] for event, data in self.events.items if event == "DEVICE_DELETED"]

    def refused(self, table: dict[str, Any]) -> str:
        with pytest.raises(CommandError) as refused:
            self.machine.device_add(table)
        return str(refused.value)

    def windows(self) -> tuple[object, ...]:
        board = self.machine.board
        routes = tuple(board.vm.routing.messages.items())
        return board.mmio.windows, board.pio.windows, len(routes), board.devices


@contextmanager
def started(config: Path, *overrides: str) -> Iterator[Rig]:
    with Machine(load(config, overrides)) as machine:
        machine.start()
        yield Rig(machine)


@pytest.fixture
def config(system: System, tmp_path: Path) -> Path:
    (tmp_path / "kernel").write_bytes(pvh_kernel(HALT))
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "m.toml").write_text(MACHINE)
    return tmp_path / "m.toml"


@pytest.fixture
def rig(config: Path) -> Iterator[Rig]:
    with started(config) as rig:
        yield rig


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waits between two presses of a button: this guest is as fast as can be."""
    monkeypatch.setattr(slot, "PRESS_INTERVAL", 0.0)


def footprint() -> tuple[list[str], list[str]]:
    open_now = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    return (
        sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in open_now),
        sorted(thread.name for thread in threading.enumerate()),
    )


def test_a_device_is_added_used_and_removed(rig: Rig) -> None:
    rig.add(BLK)
    driver = rig.guests["root2"].driver
    assert driver is not None
    head = driver.submit(0, [(8).to_bytes(4, "little") + bytes(12)], [20, 1])
    deadline = time.monotonic() + BOUND
    while not (used := driver.queues[0].used()) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert used == [(head, 21)]
    assert driver.queues[0].content(head)[:5] == b"disk0"
    assert set(rig.machine.board.by_id) == {"rng0", "rng3", "vd1"}
    rig.remove("vd1", "root2")
    assert set(rig.machine.board.by_id) == {"rng0", "rng3"}
    assert rig.events.items[-1] == ("DEVICE_DELETED", {"device": "vd1", "path": "/machine/peripheral/vd1"})


def test_a_device_of_the_configuration_leaves_and_its_like_comes_back(rig: Rig) -> None:
    guest = rig.guests["root3"]
    rig.machine.device_del("rng3")
    guest.serve()
    rig.events.wait()
    assert rig.deleted() == ["rng3"]
    rig.machine.device_add(RNG | {"id": "rng3", "bus": "root3"})
    deadline = time.monotonic() + BOUND
    while guest.driver is None and time.monotonic() < deadline:  # the guard after power off
        guest.serve()
        time.sleep(0.01)
    assert guest.driver is not None


@pytest.mark.timeout(count(120, 1200))
def test_adding_and_removing_leaves_nothing_behind(rig: Rig, hurried: None) -> None:
    """Disks, consoles and sources of random numbers, one after the other and several at a time."""
    serial = {"driver": "virtio-serial-pci", "id": "con1", "bus": "root1", "chardev": "pty"}
    for table in (RNG, BLK, serial):
        rig.add(table)
        rig.remove(str(table["id"]), str(table["bus"]))
    before, inside = footprint(), rig.windows()
    for turn in range(count(8, soak=600)):
        rig.add(BLK)
        rig.add(RNG if turn % 2 else serial)
        rig.remove("vd1", "root2")
        rig.remove("rng1" if turn % 2 else "con1", "root1")
    assert footprint() == before
    assert rig.windows() == inside


def test_a_device_can_be_removed_with_an_answer_due_and_added_again_at_once(rig: Rig, hurried: None) -> None:
    for _ in range(count(5, soak=100)):
        rig.add(BLK)
        driver = rig.guests["root2"].driver
        assert driver is not None
        for _ in range(4):
            driver.submit(0, [bytes(16)], [512, 1])
        rig.remove("vd1", "root2")


def test_a_device_that_would_have_no_room_at_a_reboot_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    plugger = rig.machine.board.plugger
    make = plugger.make

    def large(table: Any, config: Any) -> Plugged:
        plugged = make(table, config)
        plugged.function.add_bar(2, 2 << 30, BarKind.MEM64_PREFETCHABLE, plugged.function)
        return plugged

    monkeypatch.setattr(plugger, "make", large)
    before = footprint()
    said = rig.refused(RNG)
    assert said.startswith("Device 'rng1': a guest that reboots has no room for it: root3: the window for what is")
    assert footprint() == before
    monkeypatch.undo()
    rig.machine.request_reset()
    rig.events.wait_until(lambda items: "RESET" in [event for event, _ in items])
    rig.machine.device_add(RNG)


def test_a_device_is_taken_away_by_force(rig: Rig) -> None:
    rig.add(RNG)
    rig.guests["root1"].obeys = False
    rig.machine.device_del("rng1")
    rig.guests["root1"].serve()
    with pytest.raises(CommandError, match="Device rng1 is already in the process of unplug"):
        rig.machine.device_del("rng1")
    assert rig.deleted() == []
    rig.machine.device_del("rng1", force=True)
    rig.events.wait_until(lambda _: rig.deleted() == ["rng1"])
    rig.guests["root1"].serve()
    rig.add(RNG)


def test_r23_a_guest_ejects_by_itself(rig: Rig) -> None:
    rig.add(RNG)
    rig.guests["root1"].let_go()
    rig.events.wait_until(lambda _: rig.deleted() == ["rng1"])


def test_a_guest_that_keeps_its_device_is_reported(rig: Rig) -> None:
    rig.add(RNG)
    rig.guests["root1"].obeys = False
    rig.machine.device_del("rng1")
    rig.guests["root1"].refuse()
    ((event, data),) = rig.events.wait()
    assert (event, data["device"], data["path"]) == ("DEVICE_UNPLUG_GUEST_ERROR", "rng1", "/machine/peripheral/rng1")
    assert "power indicator" in data["reason"]
    rig.machine.device_del("rng1")


def test_r25_a_guest_that_cannot_use_a_device_is_reported(rig: Rig) -> None:
    rig.guests["root1"].works = False
    rig.add(RNG)
    ((event, data),) = rig.events.wait()
    assert (event, data["device"], data["path"]) == ("DEVICE_PLUG_GUEST_ERROR", "rng1", "/machine/peripheral/rng1")
    assert "attention indicator" in data["reason"]


def ports(rig: Rig) -> dict[str, tuple[str, str | None]]:
    return {port.id: (port.state.value, port.device) for port in root_ports(rig.machine)}


def test_an_operator_sees_which_ports_are_free_and_what_goes_on_at_the_others(rig: Rig) -> None:
    guest = rig.guests["root1"]
    assert ports(rig) == {"root1": ("free", None), "root2": ("free", None), "root3": ("on", "rng3")}
    rig.machine.device_add(RNG)
    assert ports(rig)["root1"] == ("off", "rng1")
    guest._indicate(0x200)
    assert ports(rig)["root1"] == ("working", "rng1")
    guest.serve()
    assert ports(rig)["root1"] == ("on", "rng1")
    guest.obeys = False
    rig.machine.device_del("rng1")
    assert ports(rig)["root1"] == ("asked", "rng1")
    guest.let_go()
    rig.events.wait_until(lambda _: rig.deleted() == ["rng1"])
    assert ports(rig)["root1"] == ("free", None)
    assert [(port.slot, port.bus, port.power_controller) for port in root_ports(rig.machine)] == [
        (1, 1, False),
        (2, 2, False),
        (3, 3, True),
    ]


def test_an_operator_sees_what_no_device_uses(rig: Rig) -> None:
    assert spare(rig.machine.current_config()) == SpareInfo(netdevs=["hostnet1"], drives=["disk0", "gone"])
    rig.machine.netdev_add({"type": "tap", "id": "hostnet2", "ifname": "tap-none2"})
    rig.add(BLK)
    assert spare(rig.machine.current_config()) == SpareInfo(netdevs=["hostnet1", "hostnet2"], drives=["gone"])
    rig.machine.netdev_del("hostnet1")
    assert spare(rig.machine.current_config()).netdevs == ["hostnet2"]


def fails(call: Callable[[], object]) -> None:
    with pytest.raises(CommandError):
        call()


@contextmanager
def descriptors_left(most: int) -> Iterator[None]:
    """This process may open ``most`` more; the descriptors that it has have no gaps."""
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    fillers = [os.dup(0) for _ in range(max(used) - len(used) + 1)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)


@contextmanager
def as_in_a_vmm() -> Iterator[None]:
    """Nobody collects circles; what is there now is frozen."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


SERIAL: Final = {"driver": "virtio-serial-pci", "id": "con1", "bus": "root1", "chardev": "pty"}


@pytest.mark.parametrize(
    ("table", "left"),
    [
        *((table, left) for table in (BLK, SERIAL) for left in range(3)),
        *((RNG, left) for left in range(2)),
        (RNG | {"id": "rng0"}, 100),
        (BLK | {"drive": "gone"}, 100),
        (RNG | {"driver": "no-such"}, 100),
        (BLK | {"num-queues": "many"}, 100),
    ],
    ids=str,
)
def test_a_device_that_cannot_be_added_leaves_no_object_behind(rig: Rig, table: dict[str, Any], left: int) -> None:
    def attempt() -> None:
        fails(lambda: rig.machine.device_add(table))
        fails(lambda: rig.machine.device_del("no-such"))

    with as_in_a_vmm(), descriptors_left(left):
        for _ in range(3):  # what the first ones leave is there for good, or is what the next one collects
            attempt()
        before = len(gc.get_objects())
        for _ in range(20):
            attempt()
        assert len(gc.get_objects()) - before < 20  # none, but for what other threads are just at


def test_r53_a_reset_completes_an_unplug(rig: Rig) -> None:
    rig.add(RNG)
    rig.guests["root1"].obeys = False
    rig.machine.device_del("rng1")
    rig.machine.reset()
    rig.events.wait_until(lambda _: rig.deleted() == ["rng1"])
    assert rig.machine.board.ports["root1"].card is None
    rig.machine.device_add(RNG)


def test_a_reset_keeps_a_device_that_was_added_and_firmware_places_it(rig: Rig) -> None:
    rig.add(RNG)
    rig.machine.reset()
    functions = {function.name: bus for bus, _, _, function in rig.machine.board.pci.functions()}
    assert functions["rng1"] == 1
    function = rig.machine.board.inventory.plugged["rng1"].function
    assert all(bar.address is not None for bar in function.bars.values())


def test_a_paused_machine_takes_devices_and_its_guest_sees_them_later(rig: Rig) -> None:
    rig.machine.pause()
    rig.machine.device_add(RNG)
    rig.machine.device_del("rng3")
    rig.machine.resume()
    for bus in ("root1", "root3"):
        rig.guests[bus].serve()
    assert rig.guests["root1"].driver is not None
    rig.events.wait_until(lambda _: rig.deleted() == ["rng3"])


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"id": "x", "bus": "root1"}, "Parameter 'driver' is missing"),
        ({"driver": 5}, "Invalid parameter type for 'driver', expected: string"),
        (
            RNG | {"driver": "virtio-rgn-pci"},
            "'virtio-rgn-pci' is not a valid device model name (did you mean 'virtio-rng-pci'?)",
        ),
        ({"driver": "virtio-rng-pci", "bus": "root1"}, "Parameter 'id' is missing"),
        (RNG | {"id": "rng0"}, "Duplicate device ID 'rng0'"),
        (RNG | {"id": "root2"}, "Duplicate device ID 'root2'"),
        (RNG | {"id": "-"}, "Property 'virtio-rng-pci.id': "),
        ({"driver": "virtio-rng-pci", "id": "x"}, "Bus 'pcie.0' does not support hotplugging; say which root port"),
        (RNG | {"bus": "pcie.0"}, "Bus 'pcie.0' does not support hotplugging"),
        (RNG | {"bus": "root9"}, "Bus 'root9' not found (did you mean 'root3'?)"),
        (RNG | {"bus": "root3"}, "Bus 'root3' is full: 'rng3' is plugged into it"),
        (BLK | {"drive": "disk1"}, "Property 'virtio-blk-pci.drive' can't find value 'disk1' (did you mean 'disk0'?)"),
        (BLK | {"drive": "gone"}, "drive.gone.path: "),
        ({k: v for k, v in BLK.items() if k != "drive"}, "Parameter 'drive' is missing"),
        (
            BLK | {"num_queues": 2},
            "Property 'virtio-blk-pci.num_queues' not found (did you mean 'num-queues'?)",
        ),
        (BLK | {"num-queues": 0}, "Property 'virtio-blk-pci.num-queues': expected "),
        (BLK | {"num-queues": "many"}, "Property 'virtio-blk-pci.num-queues': expected an integer"),
        (BLK | {"num-queues": []}, "Property 'virtio-blk-pci.num-queues': expected an integer"),
        ({"driver": "virtio-net-pci", "id": "n", "bus": "root1", "netdev": "hostnet2"}, "can't find value 'hostnet2'"),
        (
            {"driver": "vfio-pci", "host": "5e:00.2", "bus": "root1", "failover_pair_id": "n"},
            "Device with failover_pair_id needs to have id",
        ),
        (RNG | {"id": "x" * 5000}, "Property 'virtio-rng-pci.id': "),
    ],
)
def test_a_device_that_cannot_be_is_refused_and_leaves_nothing(rig: Rig, table: dict[str, Any], why: str) -> None:
    before, inside = footprint(), rig.windows()
    said = rig.refused(table)
    assert why in said
    assert len(said) < 500
    assert (footprint(), rig.windows()) == (before, inside)
    rig.add(RNG)


def test_flags_and_numbers_may_be_text_as_in_qmp(rig: Rig) -> None:
    rig.add(BLK | {"num-queues": "2"})
    device = rig.machine.board.by_id["vd1"]
    assert isinstance(device, VirtioBlk)
    assert len(device.queues) == 2


def test_what_is_in_use_is_refused_until_its_user_has_left(rig: Rig) -> None:
    rig.add(BLK)
    other = BLK | {"id": "vd2", "bus": "root1"}
    assert rig.refused(other) == "Property 'virtio-blk-pci.drive' can't take value 'disk0', it's in use by 'vd1'"
    assert rig.refused(RNG | {"bus": "root2"}) == "Bus 'root2' is full: 'vd1' is plugged into it"
    assert rig.refused(BLK) == "Duplicate device ID 'vd1'"
    rig.remove("vd1", "root2")
    rig.add(other)


@pytest.mark.parametrize(
    ("name", "why", "kind"),
    [
        ("rng0", "Bus 'pcie.0' does not support hotplugging", "GenericError"),
        ("root1", "Bus 'pcie.0' does not support hotplugging", "GenericError"),
        ("nobody", "Device 'nobody' not found", "DeviceNotFound"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_unplugged_is_refused(rig: Rig, name: str, why: str, kind: str, force: bool) -> None:
    with pytest.raises(CommandError, match=why) as refused:
        rig.machine.device_del(name, force=force)
    assert refused.value.kind == kind


def test_netdevs_come_and_go(rig: Rig) -> None:
    machine, tap = rig.machine, {"type": "tap", "id": "hostnet2", "ifname": "tap-other", "vhost": "off"}
    machine.netdev_add(tap)
    with pytest.raises(CommandError, match="Duplicate ID 'hostnet2' for netdev"):
        machine.netdev_add(tap)
    with pytest.raises(CommandError, match=r"Parameter 'ifname': .tap-other. is taken by .hostnet2."):
        machine.netdev_add(tap | {"id": "hostnet3"})
    machine.netdev_del("hostnet2")
    machine.netdev_add(tap)
    machine.netdev_del("hostnet1")
    with pytest.raises(CommandError, match="Device 'hostnet1' not found") as refused:
        machine.netdev_del("hostnet1")
    assert refused.value.kind == "DeviceNotFound"


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"id": "n"}, "Parameter 'type' is missing"),
        ({"type": "user", "id": "n"}, "Parameter 'type' does not accept value 'user'"),
        ({"type": "tap", "id": "n"}, "Parameter 'ifname' is missing"),
        ({"type": "tap", "ifname": "t"}, "Parameter 'id' is missing"),
        ({"type": "tap", "id": "n", "ifname": "t", "vhosts": True}, "Parameter 'vhosts' not found"),
        ({"type": "tap", "id": "n", "ifname": "t", "vhost": "maybe"}, "Parameter 'vhost': expected true or false"),
    ],
)
def test_a_netdev_that_cannot_be_is_refused(rig: Rig, table: dict[str, Any], why: str) -> None:
    with pytest.raises(CommandError, match=why):
        rig.machine.netdev_add(table)


def test_a_machine_without_root_ports_takes_nothing(config: Path) -> None:
    with started(config, "root_port=[]", "device=[{driver='virtio-rng-pci',id='rng0'}]") as rig:
        assert rig.refused(RNG) == "Bus 'root1' not found; the machine has no root ports"
        del_ = "Bus 'pcie.0' does not support hotplugging"
        assert rig.refused({"driver": "virtio-rng-pci", "id": "x"}) == f"{del_}; the machine has no root ports"
        with pytest.raises(CommandError, match=del_):
            rig.machine.device_del("rng0")
        with pytest.raises(CommandError, match="Device 'x' not found"):
            rig.machine.device_del("x")


def test_a_machine_that_has_not_begun_or_has_ended_takes_nothing(config: Path) -> None:
    with Machine(load(config)) as machine:
        before = footprint()
        with pytest.raises(CommandError, match="has not been started"):
            machine.device_add(BLK)
        assert footprint() == before
        machine.start()
        machine.stop()
        with pytest.raises(CommandError, match="not running"):
            machine.device_add(BLK)
        with pytest.raises(CommandError, match="not running"):
            machine.device_del("rng3")
    with pytest.raises(CommandError, match="closed"):
        machine.device_add(BLK)


def test_a_machine_is_closed_while_devices_come_and_go(config: Path) -> None:
    Machine(load(config)).close()
    before = footprint()
    for turn in range(count(5, soak=200)):
        with started(config) as rig:
            stop = threading.Event()

            def churn(rig: Rig = rig, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    try:
                        rig.machine.device_add(BLK)
                        rig.machine.device_del("vd1", force=True)
                    except CommandError:
                        pass

            thread = threading.Thread(target=churn)
            thread.start()
            time.sleep(turn % 10 * 0.01)
            rig.machine.close()
            stop.set()
            thread.join()
    assert footprint() == before
