"""Network devices and disks that come and go on a whole machine: whatever they take of the host, they give back."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.config.schema import load
from kvmpy.devices.pci import slot
from kvmpy.errors import CommandError
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from tests.conftest import skip_or_fail
from tests.counts import count
from tests.fakes.pvh_kernel import SMALL_MACHINE, SPIN, pvh_kernel
from tests.host.conftest import Namespace
from tests.host.test_machine import footprint, is_locked
from tests.kvm.test_hotplug import BLK, Rig

CYCLES: Final = count(15, soak=600)
GROWTH_MIB: Final = 8
"""Of resident memory, over all cycles: one device left behind each time would be ten times that."""
MACHINE: Final = f"""\
{SMALL_MACHINE}[[root_port]]
id = "root1"
power_controller = false
[[root_port]]
id = "root2"
power_controller = false
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
cache = "writeback"
"""


@pytest.fixture
def rig(netns: Namespace, tmp_path: Path) -> Iterator[Rig]:
    try:
        System().close()
    except Exception as e:  # noqa: BLE001  whatever it is, there is no KVM
        skip_or_fail("kvm", str(e))
    (tmp_path / "m.toml").write_text(MACHINE)
    (tmp_path / "kernel").write_bytes(pvh_kernel(SPIN))
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    with Machine(load(tmp_path / "m.toml")) as machine:
        machine.start()
        yield Rig(machine)


def netdev(netns: Namespace, **more: str) -> dict[str, Any]:
    return {"type": "tap", "id": "hostnet1", "ifname": "tap-m", "netns": netns.path, "bridge": "br-m", **more}


NET: Final = {"driver": "virtio-net-pci", "id": "net1", "netdev": "hostnet1", "bus": "root1"}


def test_a_network_device_joins_its_bridge_and_leaves_it(rig: Rig, netns: Namespace) -> None:
    rig.machine.netdev_add(netdev(netns))
    assert netns.interfaces() == []
    rig.add(NET)
    assert netns.interfaces() == ["br-m", "tap-m"]
    assert set(rig.machine.board.nics) == {"net1", "hostnet1"}
    rig.machine.set_link("net1", up=False)
    with pytest.raises(CommandError, match="Device 'hostnet1' is in use by 'net1'"):
        rig.machine.netdev_del("hostnet1")
    rig.remove("net1", "root1")
    assert netns.interfaces() == []
    assert not rig.machine.board.nics
    rig.machine.netdev_del("hostnet1")
    with pytest.raises(CommandError, match="can't find value 'hostnet1'"):
        rig.machine.device_add(NET)


def test_a_bridge_stays_as_long_as_another_device_is_in_it(rig: Rig, netns: Namespace) -> None:
    rig.machine.netdev_add(netdev(netns))
    rig.machine.netdev_add(netdev(netns, id="hostnet2", ifname="tap-n"))
    rig.add(NET)
    rig.add(NET | {"id": "net2", "netdev": "hostnet2", "bus": "root2"})
    rig.remove("net1", "root1")
    assert netns.interfaces() == ["br-m", "tap-n"]
    rig.remove("net2", "root2")
    assert netns.interfaces() == []


def test_an_interface_and_a_bridge_that_were_there_are_as_they_were(rig: Rig, netns: Namespace) -> None:
    netns.ip("tuntap", "add", "tap-m", "mode", "tap")
    netns.ip("link", "add", "br-m", "type", "bridge")
    netns.ip("link", "set", "br-m", "up")
    before = netns.ip("-brief", "link", "show", "tap-m")
    rig.machine.netdev_add(netdev(netns))
    rig.add(NET)
    assert "tap-m" in netns.ip("link", "show", "master", "br-m")
    rig.remove("net1", "root1")
    assert netns.interfaces() == ["br-m", "tap-m"]
    assert netns.ip("link", "show", "master", "br-m") == ""
    assert netns.ip("-brief", "link", "show", "tap-m") == before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"netns": "/nowhere"}, "netdev.hostnet1.netns: "),
        ({"bridge": "lo"}, "netdev.hostnet1.bridge: lo: is a network interface of another kind"),
        ({"ifname": "lo"}, "netdev.hostnet1.ifname: "),
    ],
)
def test_a_network_device_that_the_host_refuses_leaves_nothing(
    rig: Rig, netns: Namespace, change: dict[str, Any], why: str
) -> None:
    rig.machine.netdev_add(netdev(netns, id="other"))
    rig.add(NET | {"netdev": "other"})  # so that the helper is there
    rig.remove("net1", "root1")
    before, inside = footprint(), rig.windows()
    rig.machine.netdev_add(netdev(netns) | {"ifname": "tap-n"} | change)
    assert rig.refused(NET).startswith(why)
    assert (footprint(), rig.windows(), netns.interfaces()) == (before, inside, [])


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.timeout(count(120, 3000))
def test_six_hundred_network_devices_and_disks_leave_nothing_behind(
    rig: Rig, netns: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "PRESS_INTERVAL", 0.0)  # the guest here is as fast as can be

    def cycle() -> None:
        rig.machine.netdev_add(netdev(netns))
        rig.add(NET)
        rig.add(BLK)
        assert is_locked(tmp_path / "disk.raw")
        rig.remove("vd1", "root2")
        rig.remove("net1", "root1")
        rig.machine.netdev_del("hostnet1")

    for _ in range(5):
        cycle()
    before, inside, memory = footprint(), rig.windows(), resident()
    for _ in range(CYCLES):
        cycle()
    assert footprint() == before
    assert rig.windows() == inside
    assert netns.interfaces() == []
    assert not is_locked(tmp_path / "disk.raw")
    assert resident() - memory < GROWTH_MIB << 20
