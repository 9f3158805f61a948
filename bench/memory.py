"""What a VMM takes beside the guest's memory: PSS by /proc/PID/smaps, of kvmpy and QEMU by turns.

A guest that has written to all of its memory halts; then it is moved, slowly enough to be looked at, and the most that
the source takes meanwhile counts. Guest RAM is the one mapping that is as large as it; all others are summed. A shared
page counts as its share: where other processes of the same VMM run meanwhile, both come out lower, and kvmpy also
beside any other of the same Python, perhaps this one; the RSS counts such pages wholly, and shared libraries that all
have.
"""

from __future__ import annotations

import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

from bench.budgets import MEMORY_MIB
from bench.exits import tsc_khz
from bench.guests import toucher
from bench.moves import MIB, Shape, move, seat
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, alternately
from bench.vmms import Flat, wait_for

MEMORY: Final = 128
SLOWLY: Final = 64 * MIB
"""Bytes a second."""
SETTLE: Final = 1.0
HEAD: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
PSS: Final = re.compile(r"^Pss: +(\d+) kB", re.MULTILINE)
RSS: Final = re.compile(r"^Rss: +(\d+) kB", re.MULTILINE)
ALLOWANCE: Final = "the allowance"


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        ticks = tsc_khz(Path(directory)) * 1000
        taken = alternately(
            {who: partial(turn, who, Path(directory), ticks) for who in (KVMPY, QEMU)},
            2 if quick else 5,
        )
    rows: list[Row] = []
    for when in ("idle", "migrating"):
        ours, theirs = taken[KVMPY][when], taken[QEMU][when]
        budget = "memory" if when == "idle" else None  # the design's is of a steady state
        rows.append(Pair(f"memory: {when}", ours, theirs, "MiB", budget).row())
        allowed = [MEMORY_MIB] * len(ours)
        rows.append(Pair(f"memory: {when}, of 48 MiB", ours, allowed, "MiB", "memory allowance", ALLOWANCE).row())
    rows.append(Pair("memory: idle, RSS", taken[KVMPY]["RSS"], taken[QEMU]["RSS"], "MiB").row())
    return rows


def turn(who: str, directory: Path, ticks: int) -> dict[str, float]:
    """MiB beside guest RAM: of a guest that halts, and the most while it is moved."""
    shape = Shape(MEMORY, bandwidth=SLOWLY)
    flat = Flat(directory / who, toucher(MEMORY, 0, ticks), memory=MEMORY, serial="file")
    flat.forget("idle")
    with seat(who, flat, "idle", shape) as idle:
        wait_for(lambda: b"K" in flat.said("idle"), idle.process, f"{who}: the guest's memory written to")
        time.sleep(SETTLE)
        smaps = Path(f"/proc/{idle.process.pid}/smaps").read_text()
    seen: list[float] = []
    move(who, directory, shape, ticks, lambda pid: seen.append(beside_ram(pid, MEMORY)))
    return {"idle": beside(smaps, MEMORY), "RSS": beside(smaps, MEMORY, RSS), "migrating": max(seen)}


def beside_ram(pid: int, memory: int) -> float:
    return beside(Path(f"/proc/{pid}/smaps").read_text(), memory)


def beside(smaps: str, memory: int, what: re.Pattern[str] = PSS) -> float:
    """MiB of PSS, or of ``what``, of all mappings but guest RAM, which has ``memory`` MiB.

    What lies next to it may be one mapping with it; of those that are as large, RAM is what has most.
    """
    sizes = [int(end, 16) - int(begin, 16) for begin, end in HEAD.findall(smaps)]
    found = [int(kib) for kib in what.findall(smaps)]
    large = [kib for size, kib in zip(sizes, found, strict=True) if size >= memory * MIB]
    if not large:
        raise ValueError(f"no mapping has {memory} MiB")
    return max(sum(found) - max(large), 0) / 1024


if __name__ == "__main__":
    main("memory", measure)
