"""What `kvmpy status` says of a device."""

from __future__ import annotations

from typing import Any

import pytest

from kvmpy.cli.control import _show

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
    function = {"bars": {"0": None}, "interrupts": "msix", "host": "0000:01:10.0", "reset": "flr", "broken": None}
    _show({"id": "hostdev0", "driver": "vfio-pci", "address": "01:00.0", **function})
    out = capsys.readouterr().out
    assert out.startswith("  hostdev0: vfio-pci at 01:00.0, the host's 0000:01:10.0\n    ")
    assert "interrupts msix, reset flr" in out


def test_a_device_on_a_bus_without_a_number_is_said_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    _show({"id": "rng0", "driver": "virtio-rng-pci", "address": None, "status": [], "queues": [], "broken": None})
    assert "virtio-rng-pci at no address yet" in capsys.readouterr().out
