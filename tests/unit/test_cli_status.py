"""What `kvmpy status` says of a device."""

from __future__ import annotations

from typing import Any

import pytest

from kvmpy.cli.control import PRIMARIES, STATES, _show, _show_pair, _show_ports
from kvmpy.devices.failover import PairState
from kvmpy.monitor.ports import RootPortState

NIC: dict[str, Any] = {
    "id": "net1",
    "driver": "virtio-net-pci",
    "address": "00:01.0",
    "status": ["driver_ok"],
    "queues": [{"name": "rx0", "size": 256}],
    "broken": "",
    "link": "up",
}


@pytest.mark.parametrize(
    ("path", "frames", "said"),
    [("vhost", 0, False), ("vhost", 7, True), ("userspace", 0, True)],
    ids=["vhost", "vhost after userspace", "userspace"],
)
def test_frames_that_pass_by_us_are_not_said_to_be_none(
    capsys: pytest.CaptureFixture[str], path: str, frames: int, said: bool
) -> None:
    _show(NIC | {"path": path, "userspace": {"rx-frames": frames, "tx-frames": 0}})
    out = capsys.readouterr().out
    assert f"link up, path {path}" in out
    assert (f"userspace (rx-frames {frames}, tx-frames 0)" in out) == said


def test_a_function_of_the_host_is_shown_with_where_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    function = {
        "bars": {"0": None, "3": 0x1_0000_4000},
        "interrupts": "msix",
        "host": "0000:01:10.0",
        "reset": "flr",
        "broken": None,
    }
    _show({"id": "hostdev0", "driver": "vfio-pci", "address": "01:00.0", **function})
    out = capsys.readouterr().out
    assert out.startswith("  hostdev0: vfio-pci at 01:00.0, the host's 0000:01:10.0\n    ")
    assert "bars (0 not placed, 3 at 0x100004000), interrupts msix, reset flr" in out


def test_a_device_on_a_bus_without_a_number_is_said_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    _show({"id": "rng0", "driver": "virtio-rng-pci", "address": None, "status": [], "queues": [], "broken": None})
    assert "virtio-rng-pci at no address yet" in capsys.readouterr().out


def test_root_ports_are_a_table_with_what_there_is_to_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    ports = [
        {"id": "root1", "slot": 1, "bus": 1, "power-controller": True, "state": "free"},
        {"id": "root-10", "slot": 10, "bus": 2, "power-controller": True, "state": "on", "device": "net1"},
    ]
    _show_ports(ports, {"netdevs": ["hostnet2", "hostnet3"], "drives": []})
    assert capsys.readouterr().out == (
        "  root ports:\n"
        "    root1    slot  1  free\n"
        "    root-10  slot 10  net1: in use\n"
        "  netdevs that no device uses: hostnet2, hostnet3\n"
    )


def test_a_machine_without_root_ports_says_nothing_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    _show_ports([], {"netdevs": ["hostnet1"], "drives": []})
    assert capsys.readouterr().out == ""


def test_every_state_of_a_root_port_has_words() -> None:
    assert {state.value for state in RootPortState} == {"free", *STATES}


def test_r13_a_failover_pair_is_shown_with_its_addresses_and_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    mac = "52:54:00:6f:55:cc"
    pair = {"standby-id": "net1", "standby": True, "negotiated": True, "standby-mac": mac, "path": "standby"}
    _show_pair(pair | {"state": "no-primary"})
    _show_pair(pair | {"primary-id": "hostdev0", "state": "hidden", "error": "EBUSY"})
    _show_pair(pair | {"primary-id": "hostdev0", "state": "plugged", "primary-mac": mac, "path": "primary"})
    assert capsys.readouterr().out == (
        f"  failover pair net1 ({mac}): no primary\n"
        f"  failover pair net1 ({mac}), hostdev0 (no MAC now): hidden: no driver has asked for it\n"
        "    frames take the standby\n"
        "    last error: EBUSY\n"
        f"  failover pair net1 ({mac}), hostdev0 ({mac}): in use\n"
        "    frames take the primary\n"
    )


def test_r13_the_frames_of_a_standby_and_the_last_gap_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    mac = "52:54:00:6f:55:cc"
    pair = {"standby-id": "net1", "standby-mac": mac, "primary-id": "hostdev0", "state": "plugged", "primary-mac": mac}
    counts = {"standby-rx-frames": 5, "standby-tx-frames": 7, "rx-gap-ms": 12.0, "network-error": "eth0: EOPNOTSUPP"}
    _show_pair(pair | {"path": "primary"} | counts)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "    frames take the primary; at its last change frames went nowhere for 12 ms",
        "    over the standby: 5 frames in, 7 out",
        "    the network around it: eth0: EOPNOTSUPP",
    ]


def test_there_are_words_for_every_state_of_a_primary() -> None:
    assert set(PRIMARIES) == {state.value for state in PairState} - {"no-primary"}
