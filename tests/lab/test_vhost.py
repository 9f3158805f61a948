"""vhost on the real /dev/vhost-net of an emulated host: each test of two programs, run there by pytest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.kernels import CHECKOUT
from tests.counts import count

PROGRAMS: Final = [Path(__file__).parent / "programs" / f"vhost_{name}.py" for name in ("traffic", "log")]
TESTS: Final = [name for each in PROGRAMS for name in re.findall(r"^def (test_\w+)", each.read_text(), re.MULTILINE)]
SECONDS: Final = count(500, 2000)


@pytest.fixture(scope="module")
def report(host: EmulatedHost) -> str:
    """What pytest printed in the host."""
    paths = [str(each.relative_to(CHECKOUT)) for each in PROGRAMS]
    done = host.run(["pytest", "--tb=short", "-rA", "--durations=0", *paths], timeout=SECONDS)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", TESTS)
def test_on_a_real_vhost(report: str, name: str) -> None:
    outcomes = set(re.findall(rf"^(PASSED|FAILED|ERROR|SKIPPED) .*::{name}\b", report, re.MULTILINE))
    assert outcomes == {"PASSED"}, report
