"""All of a Linux guest's state but RAM goes through `save` and `load` into a second machine, and the guest goes on."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.kernels import CHECKOUT

BLACKOUT: Final = 5
# Seconds. A line comes late on a busy machine, and what is not carried over is wrong by all of the blackout.
PRECISE: Final = 1.0


@pytest.fixture(scope="module")
def moved(host: EmulatedHost) -> dict[str, Any]:
    """What the guest said before and after."""
    boot = CHECKOUT / ".lab/guest/cloud"
    done = host.run(
        [
            *("python", "-m", "tests.lab.programs.relocate", "examples/demo.toml", str(BLACKOUT)),
            *("machine.cpus=1", "machine.memory=256MiB"),
            *(f"boot.kernel={boot}/vmlinux", f"boot.initrd={boot}/initrd.img"),
            "boot.cmdline=console=ttyS0 quiet panic=-1 mitigations=off mode=shell",
        ],
        timeout=500,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def started(ticks: list[dict[str, float]]) -> float:
    """When the guest was booted, by its uptime; of many lines, the one that came soonest."""
    return min(tick["host"] - tick["uptime"] for tick in ticks)


def time_of_day_at_boot(ticks: list[dict[str, float]]) -> float:
    """What the guest holds it for, which may be half a second off the host's; `date` says the last whole second."""
    return max(tick["date"] - tick["uptime"] for tick in ticks)


def test_the_guest_goes_on_and_the_machine_can_be_reset(moved: dict[str, Any]) -> None:
    before, after = moved["before"], moved["after"]
    assert moved["problems"] == []
    assert moved["up"].endswith("clocksource=kvm-clock")
    assert after[0]["uptime"] - before[-1]["uptime"] > BLACKOUT
    assert moved["state"] == "running"


def test_the_guests_clocks_have_gone_on_over_the_blackout(moved: dict[str, Any]) -> None:
    before, after = moved["before"], moved["after"]
    assert started(after) == pytest.approx(started(before), abs=PRECISE)
    assert time_of_day_at_boot(after) == pytest.approx(time_of_day_at_boot(before), abs=2 * PRECISE)
