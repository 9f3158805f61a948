"""The hardware of emulated hosts: what tests of passthrough rely on."""

from __future__ import annotations

import pytest

from scripts.lab.hardware import BRIDGE, BRIDGE_ADDRESS, STATION_ADDRESS
from tests.lab.nics import DEVICES, NicHost


@pytest.fixture(params=["igb", "e1000e"])
def nic_host(request: pytest.FixtureRequest) -> NicHost:
    host: NicHost = request.getfixturevalue(f"{request.param}_host")
    return host


def test_interrupts_are_remapped(nic_host: NicHost) -> None:
    assert "IRQ remapping" in nic_host.run(["sh", "-c", "dmesg | grep DMAR-IR"], check=True).stdout
    assert "IR-PCI-MSI" in nic_host.run(["cat", "/proc/interrupts"]).stdout


def test_bridge_and_station_are_on_one_wire(nic_host: NicHost) -> None:
    assert f"master {BRIDGE}" in nic_host.run(["ip", "link", "show", nic_host.uplink], check=True).stdout
    for source, target in ((nic_host.station, BRIDGE_ADDRESS), (lambda *c: nic_host.run(c), STATION_ADDRESS)):
        assert source("busybox", "ping", "-q", "-c", "2", "-W", "20", target).returncode == 0


def test_each_virtual_function_has_a_group_and_a_driver_of_its_own(igb_host: NicHost) -> None:
    first, second = igb_host.functions
    assert igb_host.group(first) != igb_host.group(second)
    assert [igb_host.driver(function) for function in (first, second)] == ["igbvf", "igbvf"]
    dmesg = igb_host.run(["dmesg"]).stdout
    assert "reset state" not in dmesg, "the virtual functions do not hear from their PF"


def test_virtual_function_takes_the_address_that_its_pf_was_given(igb_host: NicHost) -> None:
    first, mac = igb_host.functions[0], "52:54:00:6f:55:cc"
    igb_host.run(["ip", "link", "set", igb_host.uplink, "vf", "0", "mac", mac], check=True)
    igb_host.bind(first, "vfio-pci")
    igb_host.bind(first, "igbvf")
    assert igb_host.run(["sh", "-c", f"cat {DEVICES}/{first}/net/*/address"], check=True).stdout.strip() == mac
    igb_host.run(["ip", "link", "set", igb_host.uplink, "vf", "0", "mac", "00:00:00:00:00:00"], check=True)


def test_whole_nics_have_groups_of_their_own_unless_they_share_a_slot(e1000e_host: NicHost) -> None:
    first, second, third, fourth = (e1000e_host.group(function) for function in e1000e_host.functions)
    assert len({first, second, third}) == 3
    assert third == fourth
    assert {e1000e_host.driver(function) for function in e1000e_host.functions} == {"e1000e"}


def test_function_can_be_bound_to_vfio_pci_and_back(nic_host: NicHost) -> None:
    function = nic_host.functions[0]
    before = nic_host.driver(function)
    nic_host.bind(function, "vfio-pci")
    assert nic_host.driver(function) == "vfio-pci"
    assert nic_host.run(["test", "-c", f"/dev/vfio/{nic_host.group(function)}"]).returncode == 0
    nic_host.bind(function, before)
    assert nic_host.driver(function) == before
    assert nic_host.override(function) == ""
