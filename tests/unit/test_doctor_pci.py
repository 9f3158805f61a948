"""What the doctor says of passing PCI functions through."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.cli.doctor_pci import examine_device, passthrough
from kvmpy.cli.finding import FAIL, OK, WARN, Finding
from kvmpy.errors import HostError
from tests.fakes.sysfs import FakeSysfs

NIC, PF, VF = "0000:03:00.0", "0000:5e:00.0", "0000:5e:10.2"


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSysfs:
    fake = FakeSysfs(tmp_path, monkeypatch)
    (fake.dev / "vfio/vfio").touch()
    fake.add(NIC, group=12, driver="e1000e", methods="pm")
    fake.add(PF, group=7, driver="igb")
    (fake.add_vf(VF, PF, 1, group=8) / "reset_method").write_text("flr pm\n")
    return fake


def found(sysfs: FakeSysfs, address: str | None = None) -> dict[str, Finding]:
    findings = passthrough(sysfs.host) if address is None else examine_device(address, sysfs.host)
    return {finding.what: finding for finding in findings}


def test_host_with_everything_is_in_order(sysfs: FakeSysfs) -> None:
    findings = found(sysfs)
    assert {name for name, finding in findings.items() if finding.verdict != OK} <= {"locked memory"}
    assert findings["IOMMU"].found == "3 functions in 3 groups"
    assert findings["interrupt remapping"].found == "on"


def test_missing_remapping_is_said_with_both_remedies_and_not_where_it_is_allowed(sysfs: FakeSysfs) -> None:
    (sysfs.proc / "interrupts").write_text("  1:  5  IO-APIC   1-edge  i8042\n")
    finding = found(sysfs)["interrupt remapping"]
    assert finding.verdict == WARN
    assert "firmware" in finding.remedy
    assert "allow_unsafe_interrupts=1" in finding.remedy
    parameters = sysfs.sys / "module/vfio_iommu_type1/parameters"
    parameters.mkdir(parents=True)
    (parameters / "allow_unsafe_interrupts").write_text("Y\n")
    assert found(sysfs)["interrupt remapping"].verdict == OK


def test_missing_driver_is_said_with_its_module(sysfs: FakeSysfs) -> None:
    (sysfs.drivers / "vfio-pci").rename(sysfs.sys / "gone")
    finding = found(sysfs)["vfio-pci"]
    assert (finding.verdict, finding.remedy.partition(",")[0]) == (WARN, "modprobe vfio-pci")


def test_function_that_can_be_passed_through_is_said_to(sysfs: FakeSysfs) -> None:
    findings = found(sysfs, "5e:10.2")
    assert findings[VF].found == "can be passed through; IOMMU group 8, igbvf"
    assert findings["reset"] == Finding("reset", OK, "flr")
    assert FAIL not in {finding.verdict for finding in findings.values()}


def test_each_obstacle_of_a_function_is_a_failure_with_a_remedy(sysfs: FakeSysfs) -> None:
    sysfs.add("0000:03:00.1", group=12, driver="e1000e")
    (sysfs.proc / "interrupts").write_text("")
    failed = [finding for finding in examine_device(NIC, sysfs.host) if finding.verdict == FAIL]
    assert [finding.found for finding in failed] == [
        "the IOMMU does not remap interrupts",
        "shares IOMMU group 12 with 0000:03:00.1 (e1000e)",
        "cannot be reset: the kernel's method for it, pm, is not sure to, "
        "and there is no bridge above it that could reset its bus",
    ]
    assert all(finding.remedy for finding in failed)


def test_function_that_is_not_there_is_a_failure_and_a_mistyped_one_an_error(sysfs: FakeSysfs) -> None:
    assert found(sysfs, "0000:09:00.0")["0000:09:00.0"].verdict == FAIL
    with pytest.raises(HostError, match="expected a PCI address"):
        found(sysfs, "eth0")


@pytest.mark.parametrize("methods", ["pm", ""])
def test_function_that_a_start_refuses_for_want_of_a_reset_is_not_said_to_be_fit(
    sysfs: FakeSysfs, methods: str
) -> None:
    sysfs.add("0000:00:05.0", group=20, driver="e1000", methods=methods)
    findings = found(sysfs, "0000:00:05.0")
    assert findings["0000:00:05.0"].verdict == FAIL
    assert "cannot be reset" in findings["0000:00:05.0"].found
    assert "reset" not in findings


def test_reset_that_an_old_kernel_does_not_name_is_a_doubt(sysfs: FakeSysfs) -> None:
    (sysfs.add("0000:00:05.0", group=20, methods="") / "reset").touch()
    findings = found(sysfs, "0000:00:05.0")
    assert (findings["0000:00:05.0"].verdict, findings["reset"].verdict) == (OK, WARN)


@pytest.mark.parametrize("place", ["net", "virtio3/net"])
def test_interface_that_the_host_uses_is_pointed_out(sysfs: FakeSysfs, place: str) -> None:
    interface = sysfs.add_interface(VF, "eth3", place=place)
    assert "eth3" not in found(sysfs, VF)
    (interface / "flags").write_text("0x1003\n")
    assert found(sysfs, VF)["eth3"] == Finding(
        "eth3", WARN, "is up: the host uses the function", "see that the host does without it (ip link set eth3 down)"
    )
    (interface / "master").symlink_to(sysfs.add_interface(NIC, "br0"))
    assert found(sysfs, VF)["eth3"].found == "is up and is a port of br0: the host uses the function"


@pytest.mark.parametrize("place", ["net", "virtio3/net"])
def test_interface_in_another_network_namespace_is_pointed_out(sysfs: FakeSysfs, place: str) -> None:
    (sysfs.devices / VF / place).mkdir(parents=True)
    warned = [finding.found for finding in examine_device(VF, sysfs.host) if finding.what == VF]
    assert warned[-1] == "has a network interface in another network namespace, which may use it"


def test_virtual_function_whose_pf_has_no_interface_keeps_its_address(sysfs: FakeSysfs) -> None:
    assert found(sysfs, VF)["MAC and VLAN"].verdict == WARN
    (sysfs.devices / PF / "net/enp94s0f0").mkdir(parents=True)
    assert found(sysfs, VF)["MAC and VLAN"].found == f"virtual function 1 of {PF}, set through enp94s0f0"
