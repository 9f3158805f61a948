"""Functions of the host: what is in the way of passing one through, how it is taken, and that it is given back."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import HostError
from kvmpy.host import pci, pci_journal
from kvmpy.host.network import Network, VfChange, VfSettings
from kvmpy.host.passable import obstacles
from kvmpy.host.pci import HostFunction, recover
from kvmpy.host.pci_function import SysfsFunction, VirtualFunction, parse_address
from kvmpy.host.pci_journal import Record, VfRecord
from kvmpy.host.pci_reset import find_reset
from tests.fakes.sysfs import BRIDGE, FakeSysfs

NIC, OTHER, PF, VF = "0000:03:00.0", "0000:03:00.1", "0000:5e:00.0", "0000:5e:10.2"
MAC, ZEROS = "52:54:00:6f:55:cc", "00:00:00:00:00:00"
UNSET = "(null)"


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSysfs:
    """A host with a NIC alone in its group, and a virtual function."""
    monkeypatch.setattr("kvmpy.host.pci.RELEASE_LIMIT", 0.1)
    fake = FakeSysfs(tmp_path, monkeypatch)
    fake.add(NIC, group=12, driver="e1000e")
    pf = fake.add(PF, group=7, driver="igb")
    (pf / "net/enp94s0f0").mkdir(parents=True)
    fake.add_vf(VF, PF, 1, group=8)
    return fake


@pytest.fixture
def run(tmp_path: Path) -> str:
    """The machine's runtime directory."""
    directory = tmp_path / "run/web1"
    directory.mkdir(parents=True)
    return str(directory)


def claim(sysfs: FakeSysfs, run: str, address: str = NIC) -> HostFunction:
    return HostFunction.claim(address, run, sysfs.host)


def crashed(run: str) -> None:
    """Make the journal a process's that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    path = Path(run, "pci.json")
    if path.exists():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": process.pid}))


# Addresses


@pytest.mark.parametrize("text", ["5e:00.2", "0000:5e:00.2", "0000:5E:00.2"])
def test_domain_and_case_of_an_address_can_be_left_out(text: str) -> None:
    assert parse_address(text) == "0000:5e:00.2"


@pytest.mark.parametrize("text", ["", "5e:00", "5e:20.0", "5e:00.8", "../5e:00.2", "0000:5e:00.2\n", "0000:5e:00.2/.."])
def test_what_is_no_address_makes_no_path(text: str) -> None:
    with pytest.raises(HostError, match="expected a PCI address"):
        SysfsFunction(text)


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except HostError:
        return
    assert "/" not in address


# Claimed and given back


def test_claimed_function_is_vfio_pcis_and_then_its_drivers_again(sysfs: FakeSysfs, run: str) -> None:
    function = claim(sysfs, run, "03:00.0")
    assert (function.address, function.group) == (NIC, 12)
    assert sysfs.state(NIC) == ("vfio-pci", "vfio-pci")
    function.close()
    function.close()
    assert sysfs.state(NIC) == ("e1000e", UNSET)
    assert os.listdir(run) == []


def test_function_without_a_driver_has_none_again(sysfs: FakeSysfs, run: str) -> None:
    sysfs.add("0000:04:00.0", group=13)
    claim(sysfs, run, "0000:04:00.0").close()
    assert sysfs.state("0000:04:00.0") == ("", UNSET)


def test_override_of_the_operators_is_kept(sysfs: FakeSysfs, run: str) -> None:
    (sysfs.devices / NIC / "driver_override").write_text("e1000e\n")
    claim(sysfs, run).close()
    assert sysfs.state(NIC) == ("e1000e", "e1000e")


def test_function_that_was_bound_to_vfio_pci_stays_so(sysfs: FakeSysfs, run: str) -> None:
    sysfs.write(str(sysfs.devices / NIC / "driver_override"), "vfio-pci")
    sysfs.write(str(sysfs.devices / NIC / "driver/unbind"), NIC)
    sysfs.write(str(sysfs.drivers / "vfio-pci/bind"), NIC)
    del sysfs.writes[:]
    claim(sysfs, run).close()
    assert sysfs.writes == []
    assert sysfs.state(NIC) == ("vfio-pci", "vfio-pci")


def test_function_that_somebody_took_meanwhile_is_left_to_them(sysfs: FakeSysfs, run: str) -> None:
    function = claim(sysfs, run)
    sysfs.write(str(sysfs.devices / NIC / "driver/unbind"), NIC)
    sysfs.write(str(sysfs.devices / NIC / "driver_override"), "igb")
    sysfs.write(str(sysfs.drivers / "igb/bind"), NIC)
    function.close()
    assert sysfs.state(NIC) == ("igb", "igb")


def test_interface_that_the_host_has_up_is_not_taken_without_a_word(
    sysfs: FakeSysfs, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    interface = sysfs.add_interface(NIC, "eth3")
    claim(sysfs, run).close()
    assert caplog.messages == [], "it was down"
    (interface / "flags").write_text("0x1003\n")
    (interface / "master").symlink_to(sysfs.add_interface(PF, "br0"))
    claim(sysfs, run).close()
    assert caplog.messages == [
        f"{NIC}: is taken from the host, though eth3 is up and is a port of br0: the host uses the function"
    ]


def test_two_functions_are_given_back_one_by_one(sysfs: FakeSysfs, run: str) -> None:
    first, second = claim(sysfs, run, NIC), claim(sysfs, run, VF)
    first.close()
    assert (sysfs.driver(NIC), sysfs.driver(VF)) == ("e1000e", "vfio-pci")
    assert pci_journal.find(run, VF) == Record(VF, rebound=True, driver="igbvf")
    second.close()
    assert os.listdir(run) == []


def test_function_is_claimed_once(sysfs: FakeSysfs, run: str, tmp_path: Path) -> None:
    function = claim(sysfs, run)
    with pytest.raises(HostError, match=f"^{NIC}: a machine of kvmpy's has it; stop that first"):
        claim(sysfs, str(tmp_path))
    assert sysfs.driver(NIC) == "vfio-pci"
    function.close()
    claim(sysfs, run).close()


# Refused


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENODEV, errno.EBUSY])
def test_function_that_vfio_pci_does_not_take_is_given_back(sysfs: FakeSysfs, run: str, number: int) -> None:
    sysfs.refuse["vfio-pci"] = number
    with pytest.raises(HostError, match=f"^{NIC}: .*vfio-pci/bind: {errno.errorcode[number]}"):
        claim(sysfs, run)
    assert sysfs.state(NIC) == ("e1000e", UNSET)
    assert os.listdir(run) == []


def _shared(sysfs: FakeSysfs) -> None:
    sysfs.add(OTHER, group=12, driver="e1000e")


def _no_remapping(sysfs: FakeSysfs) -> None:
    (sysfs.proc / "interrupts").write_text("  1:  5  IO-APIC   1-edge  i8042\n")


def _bridge(sysfs: FakeSysfs) -> None:
    (sysfs.devices / NIC / "class").write_text(f"{BRIDGE:#x}\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda sysfs: (sysfs.devices / NIC / "config").unlink(), "there is no such PCI function; lspci"),
        (_bridge, "is a bridge; choose"),
        (lambda sysfs: (sysfs.devices / NIC / "iommu_group").unlink(), "is not behind an IOMMU; switch VT-d"),
        (_no_remapping, "the IOMMU does not remap interrupts; .*allow_unsafe_interrupts=1"),
        (_shared, r"shares IOMMU group 12 with 0000:03:00\.1 \(e1000e\); give those up"),
        (
            lambda sysfs: (sysfs.drivers / "vfio-pci").rename(sysfs.sys / "gone"),
            "no driver vfio-pci; modprobe vfio-pci",
        ),
        (lambda sysfs: (sysfs.devices / NIC / "sriov_numvfs").write_text("2\n"), "has 2 virtual functions, .*write 0"),
    ],
)
def test_obstacle_is_named_with_its_remedy_and_nothing_is_changed(
    sysfs: FakeSysfs, run: str, spoil: Callable[[FakeSysfs], object], message: str
) -> None:
    spoil(sysfs)
    with pytest.raises(HostError, match=f"^{NIC}: .*{message}"):
        claim(sysfs, run)
    assert sysfs.writes == []
    assert os.listdir(run) == []


CONVENTIONAL, UNDER = "0000:00:05.0", "0000:02:00.0"
NO_METHOD = "cannot be reset: the kernel has no method for it"


@pytest.mark.parametrize(
    ("address", "methods", "message"),
    [
        (CONVENTIONAL, "", f"{NO_METHOD}, and there is no bridge above it"),
        (CONVENTIONAL, "pm", "cannot be reset: the kernel's method for it, pm, is not sure to, and there is no bridge"),
        (UNDER, "", f"{NO_METHOD}, and a reset of its bus would hit 0000:02:00.1 too"),
    ],
)
def test_function_that_no_reset_clears_stays_its_drivers(
    sysfs: FakeSysfs, run: str, address: str, methods: str, message: str
) -> None:
    sysfs.add("0000:00:01.0", group=14, driver="pcieport", kind=BRIDGE)
    sysfs.add("0000:02:00.1", group=15, below="0000:00:01.0")
    below = "0000:00:01.0" if address == UNDER else ""
    sysfs.add(address, group=16, driver="e1000e", methods=methods, below=below)
    with pytest.raises(HostError, match=rf"^{address}: {message}.*; passed through it could leak one guest's data"):
        claim(sysfs, run, address)
    assert (sysfs.writes, sysfs.driver(address)) == ([], "e1000e")


@pytest.mark.parametrize(
    ("methods", "expected"), [("pm", "bus"), ("", "bus"), ("bus", "bus"), ("flr pm", "flr"), ("af_flr", "af_flr")]
)
def test_function_alone_on_a_bus_below_a_bridge_is_reset_with_that_at_the_least(
    sysfs: FakeSysfs, methods: str, expected: str
) -> None:
    sysfs.add("0000:00:01.0", driver="pcieport", kind=BRIDGE)
    sysfs.add(UNDER, group=16, methods=methods, below="0000:00:01.0")
    function = SysfsFunction(UNDER, sysfs.host)
    assert find_reset(function) == (expected, "")
    assert list(obstacles(function)) == []


def test_kernel_that_does_not_say_how_it_resets_is_asked_when_the_function_is_open(sysfs: FakeSysfs) -> None:
    (sysfs.add(CONVENTIONAL, group=16, methods="") / "reset").touch()
    assert list(obstacles(SysfsFunction(CONVENTIONAL, sysfs.host))) == []


@pytest.mark.parametrize("driver", ["", "vfio-pci", "pcieport", "mlx5_vfio_pci"])
def test_member_of_the_group_that_the_host_does_not_drive_is_no_obstacle(sysfs: FakeSysfs, driver: str) -> None:
    if driver not in ("", "vfio-pci"):
        sysfs.add_driver(driver)
    sysfs.add(OTHER, group=12, driver=driver)
    assert list(obstacles(SysfsFunction(NIC, sysfs.host))) == []


def test_missing_remapping_is_no_obstacle_where_the_administrator_says_so(sysfs: FakeSysfs) -> None:
    _no_remapping(sysfs)
    parameters = sysfs.sys / "module/vfio_iommu_type1/parameters"
    parameters.mkdir(parents=True)
    (parameters / "allow_unsafe_interrupts").write_text("Y\n")
    assert list(obstacles(SysfsFunction(NIC, sysfs.host))) == []


# After a crash


class Crash(BaseException):
    pass


@pytest.mark.parametrize("step", range(6))
def test_next_start_gives_back_what_a_crash_at_any_step_left(
    sysfs: FakeSysfs, run: str, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def die_later(path: str, text: str) -> None:
        if len(sysfs.writes) >= step:
            raise Crash
        sysfs.write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr("kvmpy.host.pci_function.sysfs_write", die_later)
        try:
            claim(sysfs, run).close()
        except Crash:
            assert step < 6
    crashed(run)
    recover(run, sysfs.host)
    assert sysfs.state(NIC) == ("e1000e", UNSET)
    assert os.listdir(run) == []


def test_start_leaves_alone_what_a_living_process_has(
    sysfs: FakeSysfs, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    function = claim(sysfs, run)
    recover(run, sysfs.host)
    assert caplog.messages == []
    assert sysfs.driver(NIC) == "vfio-pci"
    function.close()


def test_leftover_of_an_earlier_boot_is_forgotten(sysfs: FakeSysfs, run: str) -> None:
    pci_journal.put(run, Record(NIC, rebound=True, driver="igb"))
    path = Path(run, "pci.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another"}))
    crashed(run)
    recover(run, sysfs.host)
    assert sysfs.writes == []
    assert os.listdir(run) == []


def test_leftover_that_another_machine_has_by_now_is_not_taken_away(
    sysfs: FakeSysfs, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.close(claim(sysfs, run)._lock)  # as the end of its process does
    crashed(run)
    other = HostFunction.claim(NIC, str(tmp_path), sysfs.host)
    recover(run, sysfs.host)
    assert sysfs.driver(NIC) == "vfio-pci"
    assert "a machine of kvmpy's has it" in caplog.text
    other.close()
    recover(run, sysfs.host)
    assert sysfs.state(NIC) == ("e1000e", UNSET)


def test_function_whose_driver_is_gone_is_kept_for_the_next_start(
    sysfs: FakeSysfs, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    function = claim(sysfs, run)
    (sysfs.drivers / "e1000e").rename(sysfs.sys / "unloaded")
    function.close()
    assert f"{NIC}: the kernel has no driver e1000e; modprobe e1000e" in caplog.text
    (sysfs.sys / "unloaded").rename(sysfs.drivers / "e1000e")
    crashed(run)
    recover(run, sysfs.host)
    assert sysfs.state(NIC) == ("e1000e", UNSET)
    assert os.listdir(run) == []


def test_function_that_could_not_be_given_back_is_when_it_was_claimed_again(sysfs: FakeSysfs, run: str) -> None:
    function = claim(sysfs, run)
    (sysfs.drivers / "e1000e").rename(sysfs.sys / "unloaded")
    function.close()
    again = claim(sysfs, run)
    (sysfs.sys / "unloaded").rename(sysfs.drivers / "e1000e")
    again.close()
    assert sysfs.state(NIC) == ("e1000e", UNSET)
    assert os.listdir(run) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        *(
            b'{"boot": "", "machine": "", "pid": 1, "started": 1, "records": [%b]}' % record
            for record in (b'{"address": "../../x"}', b'{"address": "0000:03:00.0", "driver": "../x"}', b"{}")
        ),
    ],
)
def test_journal_that_kvmpy_did_not_write_is_named_and_changes_nothing(
    sysfs: FakeSysfs, run: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    Path(run, "pci.json").write_bytes(content)
    recover(run, sysfs.host)
    assert "pci.json: is not what kvmpy wrote" in caplog.text
    assert sysfs.writes == []


def test_journal_that_is_a_link_is_not_followed(sysfs: FakeSysfs, run: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    Path(run, "pci.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match=r"pci\.json: ELOOP"):
        claim(sysfs, run)
    assert sysfs.driver(NIC) == "e1000e"


def test_a_machine_without_a_runtime_directory_has_one_while_it_has_a_function(
    sysfs: FakeSysfs, tmp_path: Path
) -> None:
    """That of `kvmpy run` has one always; a program's may not."""
    directory = tmp_path / "base/m"
    first, second = claim(sysfs, str(directory)), claim(sysfs, str(directory), VF)
    assert stat.S_IMODE(directory.stat().st_mode) & 0o027 == 0
    assert (directory / "pci.json").exists()
    first.close()
    assert (directory / "pci.json").exists()
    second.close()
    assert not directory.exists()
    again = claim(sysfs, str(directory))
    again.close()
    assert not directory.exists()


def test_a_runtime_directory_that_was_there_stays(sysfs: FakeSysfs, run: str, tmp_path: Path) -> None:
    claim(sysfs, run).close()
    assert os.listdir(run) == []
    made = claim(sysfs, str(tmp_path / "m"))
    (tmp_path / "m/another").touch()
    made.close()
    assert os.listdir(tmp_path / "m") == ["another"]


def test_a_runtime_directory_goes_with_a_journal_that_cannot_be_written(
    sysfs: FakeSysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pci_journal, "PCI_JOURNAL_NEW", "no/such/directory")
    with pytest.raises(HostError, match="ENOENT: cannot be written"):
        claim(sysfs, str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()
    assert sysfs.driver(NIC) == "e1000e"


def test_a_runtime_directory_that_strangers_can_write_to_is_refused(sysfs: FakeSysfs, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(HostError, match="only its owner"):
        claim(sysfs, str(base / "m"))
    assert sysfs.driver(NIC) == "e1000e"
    assert not (base / "m").exists()


# Virtual functions


class FakeNetwork(Network):
    """Holds the settings of one virtual function; refuses where told to."""

    def __init__(self) -> None:
        super().__init__("web1")
        self.settings = VfSettings(mac=ZEROS)
        self.refuses = False

    def set_vf(self, interface: str, number: int, *, mac: str | None = None, vlan: int | None = None) -> VfChange:
        assert (interface, number) == ("enp94s0f0", 1)
        before = self.settings
        if (mac or vlan) and self.refuses:
            raise HostError("enp94s0f0: virtual function 1: EINVAL")
        self.settings = VfSettings(mac=mac or before.mac, vlan=before.vlan if vlan is None else vlan)
        return VfChange(before=before, after=self.settings)

    def put_vf_back(self, interface: str, number: int, change: VfChange) -> None:
        if self.settings == change.after:
            self.settings = change.before


def test_virtual_function_knows_its_pf(sysfs: FakeSysfs) -> None:
    assert SysfsFunction(VF, sysfs.host).virtual_function() == VirtualFunction(PF, 1, "enp94s0f0")
    assert SysfsFunction(NIC, sysfs.host).virtual_function() is None


def test_representor_is_not_taken_for_the_pfs_interface(sysfs: FakeSysfs) -> None:
    for name, port in (("eth0", "pf0vf1"), ("enp94s0f0", "p0")):
        directory = sysfs.devices / PF / "net" / name
        directory.mkdir(exist_ok=True)
        (directory / "phys_port_name").write_text(f"{port}\n")
    assert SysfsFunction(PF, sysfs.host).interfaces() == ["enp94s0f0"]


def test_assigned_settings_are_written_down_before_they_are_made_and_undone(sysfs: FakeSysfs, run: str) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    function.assign(network, mac=MAC, vlan=7)
    change = VfChange(before=VfSettings(mac=ZEROS), after=VfSettings(mac=MAC, vlan=7))
    assert network.settings == change.after
    noted = pci_journal.find(run, VF)
    assert noted is not None
    assert noted.vf == VfRecord("enp94s0f0", 1, change)
    function.close()
    assert network.settings == change.before
    assert os.listdir(run) == []


def test_assigned_anew_the_first_settings_are_still_what_is_put_back(sysfs: FakeSysfs, run: str) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    function.assign(network, mac=MAC)
    function.assign(network, vlan=9)
    assert network.settings == VfSettings(mac=ZEROS, vlan=9)
    function.close()
    assert network.settings == VfSettings(mac=ZEROS)


def test_settings_that_the_pf_refuses_leave_the_function_claimed_and_no_trace(sysfs: FakeSysfs, run: str) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    network.refuses = True
    with pytest.raises(HostError, match=f"^{VF}: enp94s0f0: virtual function 1: EINVAL"):
        function.assign(network, mac=MAC)
    assert pci_journal.find(run, VF) == Record(VF, rebound=True, driver="igbvf")
    function.close()
    assert sysfs.state(VF) == ("igbvf", UNSET)


def test_function_is_given_back_even_where_its_settings_cannot_be_put_back(
    sysfs: FakeSysfs, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    function.assign(network, mac=MAC)

    def fail(*_: object) -> None:
        raise HostError("the network helper, process 5, failed")

    monkeypatch.setattr(network, "put_vf_back", fail)
    function.close()
    assert sysfs.state(VF) == ("igbvf", UNSET)
    assert "the network helper, process 5, failed; the next start" in caplog.text
    noted = pci_journal.find(run, VF)
    assert noted is not None
    assert (noted.rebound, noted.vf is not None) == (False, True)


def test_function_that_is_no_virtual_one_takes_no_settings(sysfs: FakeSysfs, run: str) -> None:
    function = claim(sysfs, run)
    with pytest.raises(HostError, match=f"^{NIC}: MAC and VLAN cannot be set: it is no virtual function"):
        function.assign(FakeNetwork(), mac=MAC)
    function.close()


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_r49_an_address_is_taken_away_though_that_cannot_be_written_down(
    sysfs: FakeSysfs, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise HostError("pci.json: ENOSPC")

    network, function = FakeNetwork(), claim(sysfs, run, VF)
    function.carry(network, MAC)
    with monkeypatch.context() as patch:
        patch.setattr(pci_journal, "put", full)
        function.carry(network, None)
        assert network.settings == VfSettings(mac=ZEROS)
        assert "pci.json: ENOSPC" in caplog.text
        with pytest.raises(HostError, match="ENOSPC"):
            function.carry(network, MAC)
    function.close()
    assert network.settings == VfSettings(mac=ZEROS)
    assert os.listdir(run) == []


def test_settings_that_the_next_start_cannot_put_back_stay_written_down(
    sysfs: FakeSysfs, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    function.carry(network, MAC)
    os.close(function._lock)  # as the end of its process does
    crashed(run)

    def busy(*_: object) -> None:
        raise HostError("enp94s0f0: virtual function 1: EBUSY")

    monkeypatch.setattr(pci, "Network", lambda machine: network)
    with monkeypatch.context() as patch:
        patch.setattr(network, "put_vf_back", busy)
        recover(run, sysfs.host)
    assert "EBUSY; left over from process" in caplog.text
    assert sysfs.state(VF) == ("igbvf", UNSET)
    recover(run, sysfs.host)
    assert network.settings == VfSettings(mac=ZEROS)
    assert os.listdir(run) == []


def test_r49_an_address_that_comes_and_goes_is_the_first_again_in_the_end(sysfs: FakeSysfs, run: str) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    network.settings = first = VfSettings(mac="52:54:00:00:00:99")
    seen = []
    for mac in (None, MAC, None, MAC):
        function.carry(network, mac)
        noted = pci_journal.find(run, VF)
        assert noted is not None
        assert noted.vf == VfRecord("enp94s0f0", 1, VfChange(before=first, after=network.settings))
        seen.append(network.settings.mac)
    assert seen == [ZEROS, MAC, ZEROS, MAC]
    function.close()
    assert network.settings == first
    assert os.listdir(run) == []


def test_r49_an_address_that_is_refused_leaves_the_one_before_and_its_note(sysfs: FakeSysfs, run: str) -> None:
    network, function = FakeNetwork(), claim(sysfs, run, VF)
    network.settings = first = VfSettings(mac="52:54:00:00:00:99")
    function.carry(network, MAC)
    network.refuses = True
    with pytest.raises(HostError, match=f"^{VF}: enp94s0f0: virtual function 1: EINVAL$"):
        function.carry(network, "52:54:00:00:00:98")
    assert network.settings.mac == MAC
    function.close()
    assert network.settings == first


def test_r49_what_is_no_virtual_function_carries_its_own_address(sysfs: FakeSysfs, run: str) -> None:
    function = claim(sysfs, run, NIC)
    with pytest.raises(HostError, match="its address cannot be set: it is no virtual function"):
        function.carry(FakeNetwork(), MAC)
    function.close()
