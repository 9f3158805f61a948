"""docs/operating.md: each of its commands works, in its order."""

from __future__ import annotations

import re
from pathlib import Path

from scripts.lab.host import EmulatedHost

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"


def test_the_pages_commands_work_in_their_order(host: EmulatedHost) -> None:
    commands = re.findall(r"^\$ (.*)$", PAGE.read_text(), re.MULTILINE)
    script = "\n".join(["set -ex", *commands])
    done = host.run(["bash", "-c", script], timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"status": "running"' in done.stdout
    assert "demo: paused" in done.stdout
    assert "has not powered off in time" not in done.stderr
    assert host.run(["ls", "/run/kvmpy"], check=True).stdout == ""
