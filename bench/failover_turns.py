"""Run on an emulated host: guests with failover pairs go from one process to another and back. Standard library.

    python -m bench.failover_turns ROUNDS PINGER CONTENDERS     prints JSON: by name of each, its turns' figures

They take turns. CONTENDERS is JSON, by name: the guest's "address" and "mac", whether it has a "primary", and two
"seats", between which it goes there and back (seats.py).

A turn's times are those of its events, which the VMMs have stamped by this host's clock, and those at which lines came
from the guest's serial line: it repeats there what its kernel says of the pair. A ping that was answered late is not
lost; "gap" is the longest time between two pings that were answered with lost ones in between.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from bench.seats import PATIENCE, Process

REST = 8.0  # pciehp takes no press while it still blinks, and QEMU does not press again
STATION = "station"
WATCH = "grep -E 'primary slave|Link is Up' /dev/kmsg &"
PICTURE = "for n in /sys/class/net/e*; do m=$(readlink $n/master); echo ${n##*/} $(cat $n/address) ${m##*/}; done"
ENSLAVED, RELEASED, LINK = "primary slave:eth2 registered", "primary slave:eth2 unregistered", "Link is Up"
UNLIMITED = {"max-bandwidth": 1 << 40}  # bytes a second; unless it is told QEMU takes 128 MiB, and kvmpy what there is


class Contender:
    """A guest that goes there and back."""

    def __init__(self, name: str, known: dict[str, Any], pinger: str) -> None:
        self._name, self._known, self._pinger = name, known, pinger
        self._here = 0
        self._source = self._start(0, incoming=False)
        self.turns: list[dict[str, float | None]] = []

    def boot(self) -> None:
        """Wait until it is up, and see that it has a pair."""
        serial = self._source.serial
        serial.wait("KVMPY-GUEST UP")
        serial.type(WATCH)
        if self._known["primary"]:
            wait = "n=0; until [ -e /sys/class/net/eth2/master ] || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done"
            serial.type(wait)
        self._assert_picture(self._source)

    def _start(self, place: int, *, incoming: bool) -> Process:
        side = "destination" if incoming else "source"
        return Process(self._known["seats"][place], side, incoming=incoming)

    def _assert_picture(self, there: Process) -> None:
        mac = self._known["mac"]
        trio = [f"eth0 {mac}", f"eth1 {mac} eth0", *([f"eth2 {mac} eth0"] if self._known["primary"] else ())]
        shown = [line for line in there.serial.type(PICTURE) if re.match(r"eth\d [0-9a-f:]{17}", line)]
        if shown != trio:
            raise SystemExit(f"{self._name}: no pair in the guest, what follows would prove nothing: {shown}")

    def turn(self) -> None:
        """Go to the other seat."""
        source, there = self._source, self._start(1 - self._here, incoming=True)
        pings: dict[str, float] = {}
        with pinged(self._pinger, self._known["address"], pings):
            source.qmp("migrate-set-parameters", **UNLIMITED)
            begun = time.time()
            source.become("source")
            source.qmp("migrate", uri=there.seat["uri"])
            resumed = there.qmp.wait("RESUME", begun)
            source.qmp.wait("MIGRATION completed", begun)
            enslaved = there.serial.wait(ENSLAVED, resumed) if self._known["primary"] else None
            linked = there.serial.wait(LINK, enslaved) if enslaved else None
            time.sleep(REST)
        self._assert_picture(there)
        stopped, told = source.qmp.wait("STOP", begun), source.qmp("query-migrate")
        asked, active = source.qmp.find("MIGRATION wait-unplug", begun), source.qmp.wait("MIGRATION active", begun)
        self.turns.append(
            {
                "blackout": resumed - stopped,
                "told blackout": told.get("blackout-ms", told["downtime"]) / 1000,
                "wait-unplug": active - asked if asked else None,
                "enslaved": enslaved - resumed if enslaved else None,
                "in service": linked - resumed if linked else None,
                "back": linked - stopped if linked else None,
                "in all": resumed - begun,
                **pings,
            }
        )
        told_there = there.qmp("query-migrate")
        print(self._name, self.turns[-1], parts(told), parts(told_there), file=sys.stderr, flush=True)
        source.end()
        self._source, self._here = there, 1 - self._here

    def end(self) -> None:
        self._source.end()


def parts(told: dict[str, Any]) -> dict[str, float]:
    """What a side did and how many ms that took, from when the guest stood still or was there, if it tells."""
    phases = [(phase["name"], phase["start-ms"], phase["ms"]) for phase in told.get("phases") or ()]
    begun = [start for name, start, _ in phases if name in ("stop", "load state")]
    return {name: ms for name, start, ms in phases if begun and start >= begun[0]}


@contextmanager
def pinged(program: str, address: str, seen: dict[str, float]) -> Iterator[None]:
    """Pings, ten a second, from a third station, meanwhile."""
    words = ["ip", "netns", "exec", STATION, sys.executable, "-I", "-S", program, address]
    pinger = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert pinger.stdout
    if not select.select([pinger.stdout], [], [], PATIENCE)[0]:
        pinger.kill()
        raise SystemExit(f"{address}: never answers {STATION}")
    yield
    said, _ = pinger.communicate()
    entries = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    heard = [(number, entry["sent"]) for number, entry in enumerate(entries) if entry["answered"] is not None]
    seen["lost"] = len(entries) - len(heard)
    seen["gap"] = max((b - a for (i, a), (j, b) in pairwise(heard) if j > i + 1), default=0.0)


def main(rounds: str, pinger: str, contenders: str) -> None:
    known: dict[str, dict[str, Any]] = json.loads(contenders)
    guests = {name: Contender(name, each, pinger) for name, each in known.items()}
    for name, guest in guests.items():
        guest.boot()
        print(name, "is up", file=sys.stderr, flush=True)
    for number in range(int(rounds)):
        for guest in list(guests.values())[:: -1 if number % 2 else 1]:
            guest.turn()
    for guest in guests.values():
        guest.end()
    print(json.dumps({name: guest.turns for name, guest in guests.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
