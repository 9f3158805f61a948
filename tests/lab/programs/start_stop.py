"""Starts and stops a machine again and again in one process, and says how what this process and the host have changed.

start_stop.py CONFIG CYCLES      prints the differences, a line each; none where nothing was left behind
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from kvmpy.config.schema import load
from kvmpy.machine.machine import Machine

PATIENCE = 300.0


def one_cycle(config: str) -> None:
    with Machine(load(config)) as machine:
        machine.start()
        machine.stop()
        assert machine.wait(PATIENCE) is not None


def held() -> Counter[str]:
    """What this process and the host have: descriptors, threads, children, interfaces, locks."""
    deadline = time.monotonic() + PATIENCE
    while len(os.listdir("/proc/self/task")) > threading.active_count() and time.monotonic() < deadline:
        pass  # a thread that was joined is still on its way out of the kernel
    descriptors = Path("/proc/self/fd")
    targets = [os.readlink(f"{descriptors}/{fd}") for fd in os.listdir(descriptors) if Path(descriptors, fd).exists()]
    found = Counter(f"descriptor {target.partition(':[')[0]}" for target in targets)
    found.update(f"thread {thread.name}" for thread in threading.enumerate())
    found.update(f"task {task}" for task in range(len(os.listdir("/proc/self/task"))))
    found.update(f"child {pid}" for pid in Path("/proc/thread-self/children").read_text().split())
    found.update(f"interface {name}" for name in os.listdir("/sys/class/net"))
    found.update(f"lock {line.split(maxsplit=1)[1]}" for line in Path("/proc/locks").read_text().splitlines())
    return found


def main(config: str, cycles: int) -> None:
    one_cycle(config)  # what is made once and kept, such as imports' files, is there now
    before = held()
    for _ in range(cycles):
        one_cycle(config)
    after = held()
    for thing in sorted(before | after):
        if before[thing] != after[thing]:
            print(f"{thing}: {before[thing]} before, {after[thing]} after")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
