"""The round trip of an exit: a flat guest times its accesses by TSC, in kvmpy and in QEMU by turns.

From before the access to after it, so all of it: the processor's or KVM's part, the VMM's, and the way back. "in the
kernel" is an access that KVM answers itself, the same for either VMM: what is below any VMM, and a check of the method.
With two vCPUs both do the same at once, and wait for each other before the next kind of access. "kvmpy's share" is the
path from KVM_RUN to a device and back, in one process beside a bare loop of KVM_RUN; where the machine can count
instructions, so is what an exit takes of them.
"""

from __future__ import annotations

import logging
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from bench.figures import Curves, distribution
from bench.guests import ACCESSES, loop_of, stopwatch
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, alternately
from bench.vmms import Flat, run
from kvmpy._native import ffi, lib
from kvmpy.config.schema import load
from kvmpy.kvm.exits import PioWrite
from kvmpy.kvm.tsc import khz
from kvmpy.machine import registers
from kvmpy.machine.machine import Machine
from kvmpy.machine.vcpu import Gate, VcpuThread

BUDGETED: Final = ("PIO write", "PIO read", "MMIO write", "MMIO read")
QUANTILES: Final = {"median": 0.5, "p99": 0.99, "p99.9": 0.999}
LOOPS: Final = 20_000
FEW, MANY = 1_000, 101_000
log = logging.getLogger(__name__)

Trips = Mapping[str, Sequence[int]]
"""The round trips of each access, in ticks of the TSC."""


def measure(quick: bool) -> list[Row]:
    """One vCPU, two at once, and kvmpy's share."""
    count, rounds = (2_000, 2) if quick else (8_000, 7)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for cpus in (1, 2):
            rows += round_trips(Path(directory), count, cpus, rounds)
        rows += share(Path(directory), rounds)
        rows += instructions_row(Path(directory), 1 if quick else 3)
    return rows


def round_trips(directory: Path, count: int, cpus: int, rounds: int) -> Iterator[Row]:
    flat = Flat(directory, stopwatch(count, cpus), cpus=cpus, serial="file")
    ticks = tsc_khz(directory) * 1000
    everything: dict[str, dict[str, list[float]]] = {KVMPY: {}, QEMU: {}}

    def turn(who: str, command: list[str]) -> dict[str, float]:
        flat.forget()
        run(command, directory)
        found = split(flat.said(), cpus)
        for access, trips in found.items():
            everything[who].setdefault(access, []).extend(trip / ticks * 1e6 for trip in trips)
        return {f"{access} {name}": value / ticks for access, trips in found.items() for name, value in ranks(trips)}

    taken = alternately({KVMPY: lambda: turn(KVMPY, flat.kvmpy()), QEMU: lambda: turn(QEMU, flat.qemu())}, rounds)
    where = "1 vCPU" if cpus == 1 else f"{cpus} vCPUs at once"
    for access in ACCESSES:
        lines = {who: distribution(each[access]) for who, each in everything.items()}
        title = f"The round trip of a guest's access: {access}, {where}"
        curves = Curves(title, "us", "per cent that take no longer", lines, log_x=True)
        for name in QUANTILES:
            is_budgeted = name == "median" and access in BUDGETED
            yield Pair(
                f"exits: {access}, {where}" + f", {name}" * (name != "median"),
                taken[KVMPY][f"{access} {name}"],
                taken[QEMU][f"{access} {name}"],
                budget="exit" if is_budgeted else None,
                figure=curves if is_budgeted else None,
            ).row()


def split(said: bytes, cpus: int) -> Trips:
    """What the guest has said, of all vCPUs together. Raises ValueError where it has not said all."""
    trips = array("I", said)
    each = len(trips) // (cpus * len(ACCESSES))
    if not each or len(trips) != each * cpus * len(ACCESSES):
        raise ValueError(f"the guest has said {len(trips)} round trips")
    found: dict[str, list[int]] = {name: [] for name in ACCESSES}
    for at in range(cpus * len(ACCESSES)):
        found[list(ACCESSES)[at % len(ACCESSES)]] += trips[at * each : (at + 1) * each]
    return found


def ranks(trips: Sequence[int]) -> Iterator[tuple[str, int]]:
    ordered = sorted(trips)
    for name, part in QUANTILES.items():
        yield name, ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def tsc_khz(directory: Path) -> int:
    with machine(directory, b"\xf4") as idle:
        return khz(idle.board.vcpus[0]) or 1


def machine(directory: Path, code: bytes) -> Machine:
    """One in this process, not started."""
    flat = Flat(directory / "here", code)
    return Machine(load(flat.config()))


def share(directory: Path, rounds: int) -> list[Row]:
    """What of an exit kvmpy takes, by the thread that would run the vCPU."""
    with machine(directory, loop_of(ACCESSES["PIO write, a device"])) as here:
        vcpu = here.board.vcpus[0]
        registers.enter(vcpu, here.boot.load(here.board.memory))
        thread = VcpuThread(vcpu, Gate(), here.board.pio, here.board.mmio, lambda *_: None)
        vcpu.enter()
        assert isinstance(vcpu.exit(), PioWrite)

        def loop(step: Callable[[], object]) -> dict[str, float]:
            stamps = array("q", bytes(8 * (LOOPS + 1)))
            for number in range(LOOPS + 1):
                stamps[number] = time.perf_counter_ns()
                step()
            return {"seconds": median(after - before for before, after in pairwise(stamps)) / 1e9}

        taken = alternately(
            {
                KVMPY: lambda: loop(thread.step),
                "KVM_RUN alone": lambda: loop(partial(lib.kvmpy_ioctl, vcpu.fd, lib.KVM_RUN, ffi.NULL)),
            },
            rounds,
        )
    whole, alone = taken[KVMPY]["seconds"], taken["KVM_RUN alone"]["seconds"]
    note = f"so kvmpy's share is {100 * (1 - sum(alone) / sum(whole)):.0f} per cent"
    return [
        Pair("exits: PIO write, a device, in one process", whole, alone, peer_name="KVM_RUN alone", note=note).row()
    ]


def instructions_row(directory: Path, rounds: int) -> list[Row]:
    """Instructions of user space for an exit, from the slope between few and many; none where perf cannot count."""
    try:
        instructions(["true"], directory)
    except (RuntimeError, FileNotFoundError) as e:
        log.warning("exits: instructions are left out: %s", e)
        return []
    found: dict[str, list[float]] = {KVMPY: [], QEMU: []}
    for _ in range(rounds):
        for who in found:
            counts = []
            for number in (FEW, MANY):
                flat = Flat(directory, loop_of(ACCESSES["PIO write"], number))
                counts.append(instructions(flat.kvmpy() if who == KVMPY else flat.qemu(), directory))
            found[who].append((counts[1] - counts[0]) / (MANY - FEW))
    return [Pair("exits: instructions for a PIO write", found[KVMPY], found[QEMU], "instructions").row()]


def instructions(command: Sequence[str], directory: Path) -> int:
    """Those of a whole run. Raises RuntimeError where it fails or perf cannot count, FileNotFoundError without perf."""
    counts = directory / "instructions"
    run(["perf", "stat", "-x", ",", "-e", "instructions:u", "-o", str(counts), *command], directory)
    count = counted(counts.read_text())
    if count is None:
        raise RuntimeError("perf counts no instructions here")
    return count


def counted(said: str) -> int | None:
    """What perf has counted, by its line of comma-separated values; None where it cannot."""
    lines = [line.split(",") for line in said.splitlines() if "instructions" in line]
    return int(lines[0][0]) if lines and lines[0][0].isdigit() else None


if __name__ == "__main__":
    main("exits", measure)
