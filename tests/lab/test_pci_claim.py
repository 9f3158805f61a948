"""Functions of a real kernel's sysfs: taken from their drivers, given back, also after a crash."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.process import Process
from tests.lab.nics import NicHost

MAC: Final = "52:54:00:6f:55:cc"
SLOW: Final = 300

# What a machine does at its start and its end: ADDRESS [MAC VLAN]
MACHINE: Final = """
import sys
from contextlib import ExitStack
from kvmpy.errors import HostError
from kvmpy.host.network import Network
from kvmpy.host.pci import HostFunction, recover
from kvmpy.host.rundir import RuntimeDirectory
address, *settings = sys.argv[1:]
with ExitStack() as stack:
    directory, network = RuntimeDirectory("web1"), Network("web1")
    stack.callback(directory.close)
    stack.callback(network.close)
    recover(directory.path)
    try:
        function = HostFunction.claim(address, directory.path)
        stack.callback(function.close)
        if settings:
            function.assign(network, mac=settings[0], vlan=int(settings[1]))
        print("claimed", function.group, "helper", network.pid, flush=True)
        sys.stdin.read()
    except HostError as e:
        print(e)
"""
HOLDER: Final = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); sys.stdin.read()"


def machine(host: EmulatedHost, *arguments: str) -> Process:
    return host.spawn(["python", "-c", MACHINE, *arguments])


def claimed(process: Process) -> int:
    """Wait until it has its function; returns the helper's process, 0 for none."""
    return int(process.expect(re.compile(r"claimed \d+ helper (\d+)"), SLOW)[1])


def refusal(host: EmulatedHost, *arguments: str) -> str:
    process = machine(host, *arguments)
    assert process.wait(SLOW) == 0
    return process.output.strip()


def end(process: Process) -> None:
    process.close_stdin()
    assert process.wait(SLOW) == 0
    assert "claimed" in process.output


@contextmanager
def holding(host: EmulatedHost, path: str) -> Iterator[None]:
    holder = host.spawn(["python", "-I", "-S", "-c", HOLDER, path])
    holder.expect("open")
    yield
    holder.close_stdin()
    holder.wait()


def vf(host: NicHost, number: int) -> tuple[str, int]:
    """MAC and VLAN of a virtual function, as `ip` shows them."""
    shown = json.loads(host.run(["ip", "-json", "link", "show", host.uplink], check=True).stdout)
    (found,) = (entry for entry in shown[0]["vfinfo_list"] if entry["vf"] == number)
    vlans: list[dict[str, Any]] = found.get("vlan_list", [])
    return found["address"], vlans[0].get("vlan", 0) if vlans else 0


def is_as_before(host: NicHost, address: str, driver: str) -> bool:
    return (host.driver(address), host.override(address)) == (driver, "")


def test_function_that_cannot_be_reset_stays_the_hosts_and_the_doctor_says_the_same(e1000e_host: NicHost) -> None:
    host = e1000e_host
    uplink = host.run(["readlink", "-f", f"/sys/class/net/{host.uplink}/device"], check=True).stdout.split("/")[-2]
    said = refusal(host, uplink)
    assert said.startswith(f"{uplink}: cannot be reset: ")
    assert is_as_before(host, uplink, "virtio-pci")
    assert host.run(["cat", f"/sys/class/net/{host.uplink}/operstate"], check=True).stdout.strip() == "up"
    doctor = host.run(["kvmpy", "doctor", "--device", uplink])
    assert doctor.returncode == 1
    assert f"fail  {said.partition(';')[0]}\n" in doctor.stdout
    assert f"warn  {host.uplink}: is up and is a port of br0: the host uses the function\n" in doctor.stdout
    assert "can be passed through" not in doctor.stdout


def test_doctor_sees_an_interface_that_is_in_another_network_namespace(e1000e_host: NicHost) -> None:
    found = 'for d in /sys/bus/pci/devices/*/virtio*/net; do [ -n "$(ls $d)" ] || echo $d; done'
    (station,) = e1000e_host.run(["sh", "-c", found], check=True).stdout.split()
    address = station.split("/")[5]
    doctor = e1000e_host.run(["kvmpy", "doctor", "--device", address])
    assert f"warn  {address}: has a network interface in another network namespace" in doctor.stdout


def test_interface_that_the_host_has_up_is_named_when_it_is_taken(e1000e_host: NicHost) -> None:
    function = e1000e_host.functions[0]
    (name,) = e1000e_host.run(["ls", f"/sys/bus/pci/devices/{function}/net"], check=True).stdout.split()
    e1000e_host.run(["ip", "link", "set", name, "up"], check=True)
    process = machine(e1000e_host, function)
    claimed(process)
    assert f"{function}: is taken from the host, though {name} is up" in process.output
    end(process)
    assert is_as_before(e1000e_host, function, "e1000e")


def test_virtual_function_is_taken_with_its_settings_and_given_back(igb_host: NicHost) -> None:
    function = igb_host.functions[1]
    before = [vf(igb_host, number) for number in (0, 1)]
    process = machine(igb_host, function, MAC, "7")
    claimed(process)
    assert igb_host.driver(function) == "vfio-pci"
    assert vf(igb_host, 1) == (MAC, 7)
    assert vf(igb_host, 0) == before[0]
    end(process)
    assert is_as_before(igb_host, function, "igbvf")
    assert [vf(igb_host, number) for number in (0, 1)] == before
    assert igb_host.run(["ls", "/run/kvmpy"]).stdout == ""


def test_killed_machines_function_is_given_back_by_its_next_start(igb_host: NicHost) -> None:
    first, second = igb_host.functions
    mac, _ = vf(igb_host, 0)
    process = machine(igb_host, first, MAC, "0")
    claimed(process)
    process.signal(signal.SIGKILL)
    process.wait()
    igb_host.run(["sh", "-c", f"until ip link show {igb_host.uplink} | grep -q 'vf 0 .*{mac}'; do sleep 0.1; done"])
    assert igb_host.driver(first) == "vfio-pci"
    successor = machine(igb_host, second)
    claimed(successor)
    assert is_as_before(igb_host, first, "igbvf")
    end(successor)
    assert is_as_before(igb_host, second, "igbvf")


def test_next_start_puts_the_settings_back_where_the_helper_was_killed_too(igb_host: NicHost) -> None:
    first, second = igb_host.functions
    before = vf(igb_host, 0)
    process = machine(igb_host, first, MAC, "9")
    helper = claimed(process)
    igb_host.run(["kill", "-STOP", str(helper)], check=True)
    process.signal(signal.SIGKILL)
    process.wait()
    igb_host.run(["kill", "-KILL", str(helper)], check=True)
    assert vf(igb_host, 0) == (MAC, 9)
    successor = machine(igb_host, second)
    claimed(successor)
    assert vf(igb_host, 0) == before
    assert is_as_before(igb_host, first, "igbvf")
    end(successor)


def test_function_whose_group_another_process_has_open_is_refused_with_its_name(igb_host: NicHost) -> None:
    function = igb_host.functions[0]
    igb_host.bind(function, "vfio-pci")
    node = f"/dev/vfio/{igb_host.group(function)}"
    with holding(igb_host, node):
        message = refusal(igb_host, function)
    assert re.fullmatch(rf"{function}: {node}: EBUSY: in use by python \(pid \d+\); stop that first", message)
    assert igb_host.driver(function) == "vfio-pci"
    igb_host.bind(function, "igbvf")


def test_function_is_refused_to_a_second_machine(igb_host: NicHost) -> None:
    function = igb_host.functions[0]
    process = machine(igb_host, function)
    claimed(process)
    other = igb_host.spawn(["python", "-c", MACHINE.replace("web1", "web2"), function])
    other.wait(SLOW)
    assert f"{function}: a machine of kvmpy's has it" in other.output
    end(process)
    assert is_as_before(igb_host, function, "igbvf")


def test_pf_that_has_virtual_functions_is_refused(igb_host: NicHost) -> None:
    assert refusal(igb_host, "01:00.0").startswith("0000:01:00.0: has 2 virtual functions")


def test_whole_nic_is_taken_and_given_back(e1000e_host: NicHost) -> None:
    function = e1000e_host.functions[0]
    process = machine(e1000e_host, function)
    claimed(process)
    assert e1000e_host.driver(function) == "vfio-pci"
    end(process)
    assert is_as_before(e1000e_host, function, "e1000e")


def test_whole_nic_takes_no_settings_and_is_given_back(e1000e_host: NicHost) -> None:
    function = e1000e_host.functions[0]
    assert "it is no virtual function" in refusal(e1000e_host, function, MAC, "0")
    assert is_as_before(e1000e_host, function, "e1000e")


def test_shared_group_is_refused_with_the_member_named_and_then_for_what_a_reset_would_hit(
    e1000e_host: NicHost,
) -> None:
    _, _, third, fourth = e1000e_host.functions
    group = e1000e_host.group(third)
    expected = f"{third}: shares IOMMU group {group} with {fourth} (e1000e); give those up too"
    assert refusal(e1000e_host, third).startswith(expected)
    assert is_as_before(e1000e_host, third, "e1000e")
    e1000e_host.bind(fourth, "vfio-pci")
    try:
        said = refusal(e1000e_host, third)
    finally:
        e1000e_host.bind(fourth, "e1000e")
    assert re.match(rf"{third}: cannot be reset: .* a reset of its bus would hit {fourth} too; ", said)
    assert is_as_before(e1000e_host, third, "e1000e")


def test_without_an_iommu_nothing_can_be_passed_through(host: EmulatedHost) -> None:
    message = refusal(host, "00:03.0")
    assert message.startswith("0000:00:03.0: is not behind an IOMMU; switch VT-d or AMD-Vi on in the firmware")


def test_doctor_knows_hosts_that_can_pass_functions_through_from_those_that_cannot(
    host: EmulatedHost, igb_host: NicHost
) -> None:
    names = ("vfio-pci", "IOMMU", "interrupt remapping")
    findings = json.loads(igb_host.run(["kvmpy", "doctor", "--json"]).stdout)
    assert {entry["what"]: entry["verdict"] for entry in findings if entry["what"] in names} == dict.fromkeys(
        names, "ok"
    )
    findings = json.loads(host.run(["kvmpy", "doctor", "--json"]).stdout)
    assert [entry["verdict"] for entry in findings if entry["what"] == "IOMMU"] == ["warn"]


@pytest.mark.parametrize("index", [0, 2])
def test_doctor_says_of_a_function_whether_it_can_be_passed_through(e1000e_host: NicHost, index: int) -> None:
    function = e1000e_host.functions[index]
    done = e1000e_host.run(["kvmpy", "doctor", "--device", function])
    if index == 0:
        assert f"ok    {function}: can be passed through" in done.stdout
        assert done.returncode == 0
    else:
        assert f"fail  {function}: shares IOMMU group" in done.stdout
        assert done.returncode == 1
