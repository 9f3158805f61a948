"""From the start of a VMM's process to the guest's first instruction, by phase, of kvmpy and QEMU by turns.

Both are run with the same few lines preloaded (stamps.c), which stamp the first call of each of a few ioctls that
either has to make, with one clock: they open /dev/kvm, make a VM, its first vCPU, and run it. What there is before the
first of them, an interpreter's start and imports, is most of kvmpy's; the modules that take longest are said. QEMU's
firmware comes later: it is not in these times.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from bench import installed
from bench.figures import Stack
from bench.guests import POWER_OFF
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, alternately
from bench.vmms import Flat, environment, running, wait_for

SHIM: Final = Path(__file__).with_name("stamps.c")
MICROVM: Final = "QEMU microvm"
PHASES: Final = {
    "loaded": "program loaded",
    "kvm": "until /dev/kvm is open",
    "vm": "until there is a VM",
    "vcpu": "until it has a vCPU",
    "run": "until that runs",
}
"""The stamps in their order, and what goes before each."""
POLL: Final = 0.002
IMPORT: Final = re.compile(r"import time:\s*(\d+) \|\s*\d+ \| (.*)")
SLOWEST: Final = 8


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shim = built(directory)
        flat = Flat(directory, POWER_OFF)
        ways = {KVMPY: flat.kvmpy(), QEMU: flat.qemu(), MICROVM: flat.qemu(machine="microvm")}
        taken = alternately(
            {who: partial(phases, command, directory, shim) for who, command in ways.items()},
            5 if quick else 15,
        )
        modules = imports(flat.kvmpy(), directory)
    whole = {who: [sum(run) for run in zip(*each.values(), strict=True)] for who, each in taken.items()}
    bars = {who: {phase: median(values) * 1000 for phase, values in each.items()} for who, each in taken.items()}
    stack = Stack("From process start to the first KVM_RUN", "ms", bars)
    rows = [
        Pair("start: to first KVM_RUN", whole[KVMPY], whole[QEMU], budget="start", figure=stack, note=modules).row()
    ]
    rows.append(Pair("start: to first KVM_RUN, microvm", whole[KVMPY], whole[MICROVM], peer_name=MICROVM).row())
    return rows + [Pair(f"start: {phase}", taken[KVMPY][phase], taken[QEMU][phase]).row() for phase in taken[KVMPY]]


def built(directory: Path) -> Path:
    """The shared object that is preloaded."""
    path = directory / "stamps.so"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(path), str(SHIM)], check=True)
    return path


def phases(command: Sequence[str], directory: Path, shim: Path) -> Mapping[str, float]:
    """Seconds of each phase of one start."""
    stamps = directory / "stamps"
    stamps.unlink(missing_ok=True)
    words = ["env", f"LD_PRELOAD={shim}", f"KVMPY_BENCH_STAMPS={stamps}", *command]
    began = time.monotonic_ns()
    with running(words, directory) as process:
        wait_for(lambda: stamps.exists() and "run" in read(stamps.read_text()), process, f"{command[0]}: a guest", POLL)
    return between(began, read(stamps.read_text()))


def read(text: str) -> Mapping[str, int]:
    """The last of each stamp in whole lines: env is preloaded, too, until it becomes the program."""
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {name: int(ns) for name, ns in lines}


def between(began: int, stamps: Mapping[str, int]) -> Mapping[str, float]:
    """Raises KeyError where a stamp is missing."""
    moments = [began, *(stamps[name] for name in PHASES)]
    spans = [(after - before) / 1e9 for before, after in pairwise(moments)]
    return dict(zip(PHASES.values(), spans, strict=True))


def imports(command: Sequence[str], directory: Path) -> str:
    """Which modules take longest to import, by themselves, of all that a machine needs."""
    words = [str(installed.environment() / "python"), "-X", "importtime", *command]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(directory), check=True)
    return slowest(done.stderr)


def slowest(said: str) -> str:
    """From what -X importtime says, microseconds and a name a line."""
    found = [(int(us), name.strip()) for us, name in IMPORT.findall(said)]
    longest = ", ".join(f"{name} {us / 1000:.1f}" for us, name in sorted(found, reverse=True)[:SLOWEST])
    return f"imports: {len(found)} modules in {sum(us for us, _ in found) / 1000:.0f} ms, most in {longest}"


if __name__ == "__main__":
    main("start", measure)
