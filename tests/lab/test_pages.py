"""The pages for operators: each of their commands works, in its order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.lab.host import EmulatedHost

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("operating", ['"status": "running"', "demo: paused"]),
        ("networking", ["alias kvmpy:web1:", "192.0.2.1/24"]),
        ("hotplug", ["vd1", "net1"]),
        ("devices", ["vd0: virtio-blk-pci at 01:00.0, in use", "queues: requests0 256, requests1 256"]),
    ],
)
def test_a_pages_commands_work_in_their_order(host: EmulatedHost, page: str, said: list[str]) -> None:
    commands = re.findall(r"^\$ (.*)$", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    script = "\n".join(["set -ex", *commands])
    done = host.run(["bash", "-c", script], timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [text for text in said if text not in done.stdout] == []
    assert "has not powered off in time" not in done.stderr
    assert host.run(["ls", "/run/kvmpy"], check=True).stdout == ""
