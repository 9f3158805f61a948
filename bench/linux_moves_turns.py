"""Run on an emulated host: Linux guests go from one process to another and back. Standard library.

    python -m bench.linux_moves_turns ROUNDS CONTENDERS      prints JSON: by name of each and load, its turns' figures

They take turns. CONTENDERS is JSON, by name: the guest's two seats (seats.py). A guest has FILLED MiB of a file in its
memory, and writes that anew meanwhile, or does nothing. "blackout" is from STOP on the source to RESUME on the
destination, "total" from `migrate` to that, by the events' own stamps; "rate" is what the source says that it has sent,
in bytes, by the time from when pages began to travel until it was done.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from bench.seats import Process

FILLED = 48  # MiB
# A MiB at a time, some ten in a second, which is less than what an emulated host can move.
FILL = f"head -c 1048576 /bin/busybox >/tmp/m; n=0; while [ $n -lt {FILLED} ]; do cat /tmp/m; n=$((n+1)); done >/tmp/f"
WRITE = (
    f"while :; do n=0; while [ $n -lt {FILLED} ]; do"
    " dd if=/tmp/m of=/tmp/f bs=1M seek=$n conv=notrunc 2>/dev/null; n=$((n+1)); sleep 0.1; done; done &"
)
LOADS = {"idle": "", "dirtying": WRITE}
STOP_LOAD = "kill %1; true"
DOWNTIME_MS = 300
PARAMETERS = {"max-bandwidth": 1 << 40, "downtime-limit": DOWNTIME_MS}


class Guest:
    """One that goes there and back."""

    def __init__(self, name: str, seats: list[dict[str, Any]]) -> None:
        self._name, self._seats, self._here = name, seats, 0
        self._source = Process(seats[0], "source", incoming=False)
        self.turns: dict[str, list[dict[str, float]]] = {load: [] for load in LOADS}

    def boot(self) -> None:
        serial = self._source.serial
        serial.wait("KVMPY-GUEST UP")
        serial.type("mount -t tmpfs none /tmp 2>/dev/null || mkdir /tmp; mount -t tmpfs -o size=90% none /tmp")
        serial.type(FILL)

    def turn(self, load: str) -> None:
        """Go to the other seat under a load."""
        source, there = self._source, Process(self._seats[1 - self._here], "destination", incoming=True)
        if LOADS[load]:
            source.serial.type(LOADS[load])
            time.sleep(2)  # a guest that has been writing for a while
        source.qmp("migrate-set-parameters", **PARAMETERS)
        begun = time.time()
        source.qmp("migrate", uri=there.seat["uri"])
        resumed, completed = there.qmp.wait("RESUME", begun), source.qmp.wait("MIGRATION completed", begun)
        active, stopped = source.qmp.wait("MIGRATION active", begun), source.qmp.wait("STOP", begun)
        ram = source.qmp("query-migrate")["ram"]
        figures = {
            "blackout": resumed - stopped,
            "total": resumed - begun,
            "rate": ram["transferred"] / (completed - active),
            "sent": float(ram["transferred"]),
        }
        if LOADS[load]:
            there.serial.type(STOP_LOAD)
        there.serial.type("cmp -n 1048576 /tmp/m /tmp/f || exit")
        self.turns[load].append(figures)
        print(self._name, load, figures, file=sys.stderr, flush=True)
        source.end()
        self._source, self._here = there, 1 - self._here

    def end(self) -> None:
        self._source.end()


def main(rounds: str, contenders: str) -> None:
    known: dict[str, list[dict[str, Any]]] = json.loads(contenders)
    guests = {name: Guest(name, seats) for name, seats in known.items()}
    for guest in guests.values():
        guest.boot()
    for number in range(int(rounds)):
        order = list(guests.values())
        for load in LOADS:
            for guest in order[:: -1 if number % 2 else 1]:
                guest.turn(load)
    for guest in guests.values():
        guest.end()
    print(json.dumps({name: guest.turns for name, guest in guests.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
