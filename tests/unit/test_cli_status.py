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
