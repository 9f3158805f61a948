"""Machines with a disk, a tap and a bridge that come and go: nothing of them stays, however they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.kernels import CHECKOUT
from tests.counts import count
from tests.fakes.pvh_kernel import pvh_kernel
from tests.lab import tables

NAME, CONFIG, KERNEL, DISK = "cycle", "/run/cycle.toml", "/run/cycle.elf", "/scratch/cycle.img"
TAP, BRIDGE = "kvcycle", "kvbrcycle"
PROGRAM: Final = Path(__file__).parent / "programs" / "start_stop.py"
SPIN: Final = b"\xeb\xfe"
CYCLES: Final = count(8, 128)
KILLS: Final = count(3, 128)
SECONDS: Final = 300 + 15 * max(CYCLES, KILLS)

HEAD: Final = f"""
[machine]
memory = "16MiB"
[boot]
kernel = "{KERNEL}"
[console]
serial = "null"
"""

# $0 is the moment to kill at: a shell command that succeeds from then on.
KILL: Final = f"""
kvmpy run {CONFIG} >/run/cycle.log 2>&1 & pid=$!
until eval "$0"; do [ -e /proc/$pid/exe ] || {{ cat /run/cycle.log; exit 1; }}; sleep 0.05; done
kill -9 $pid
"""
RUN: Final = f"""
kvmpy run {CONFIG} & pid=$!
until kvmpy status {NAME} >/dev/null 2>&1; do [ -e /proc/$pid/exe ] || exit 1; sleep 0.05; done
kvmpy stop {NAME}
wait $pid
"""
WHILE_MADE: Final = f"[ -e /sys/class/net/{TAP} ]"
WHILE_RUNNING: Final = f"[ -S /run/kvmpy/{NAME}/qmp.sock ]"
STATE: Final = f"ls /sys/class/net /run/kvmpy; busybox pgrep -fl kvmpy; flock -n {DISK} true && echo no lock"


@pytest.fixture
def before(host: EmulatedHost) -> Iterator[str]:
    """The host's state, with everything there for a machine to start."""
    host.write_file(KERNEL, pvh_kernel(SPIN))
    host.write_file(CONFIG, HEAD + tables.disk("disk0", DISK) + tables.nic("net0", TAP, BRIDGE, queues=2, mtu=1400))
    host.run(["sh", "-c", f"mkdir -p /run/kvmpy; truncate -s 1M {DISK}"], check=True)
    yield state(host)
    host.run(["rm", KERNEL, CONFIG, DISK], check=True)


def state(host: EmulatedHost) -> str:
    """Interfaces, machines, processes, and whether the disk is locked."""
    return host.run(["sh", "-c", STATE], check=True).stdout


@pytest.mark.timeout(2 * SECONDS)
def test_a_process_that_starts_and_stops_machines_does_not_grow(host: EmulatedHost, before: str) -> None:
    environment = {"PYTHONPATH": str(CHECKOUT)}
    done = host.run(["python", str(PROGRAM), CONFIG, str(CYCLES)], timeout=SECONDS, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert state(host) == before


@pytest.mark.timeout(2 * SECONDS)
def test_the_next_start_clears_what_a_killed_machine_left(host: EmulatedHost, before: str) -> None:
    for number in range(KILLS):
        host.run(["sh", "-c", KILL, WHILE_MADE if number % 2 else WHILE_RUNNING], timeout=SECONDS, check=True)
    host.run(["sh", "-c", RUN], timeout=SECONDS, check=True)
    assert state(host) == before
