"""`python -m bench.linux_moves`: how a Linux guest of 256 MiB migrates between two processes of a host, beside QEMU's.

There and back, by turns, over a unix socket and one connection, as either VMM does it without being told more; the
limit of QEMU's rate, which is 1 GiB in eight seconds, is lifted. The host has one processor, which both ends and the
guest share, so a rate is what a byte costs all of them. linux_moves_turns.py says what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench.linux import MEMORY_MIB, Machine, answer, qemu, shared_host
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row
from scripts.lab.host import EmulatedHost

NAME: Final = "linux_moves"
LEFT_OUT: Final = ("migration of a Linux guest, more than once",)
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
TURN_SECONDS: Final = 300.0
FIGURES: Final = {
    "rate": ("B/s", "migration rate"),
    "total": ("s", "migration time"),
    "blackout": ("s", "migration blackout"),
}
CONFIG: Final = """\
[machine]
memory = "{memory}MiB"
[boot]
kernel = "{boot}/vmlinux"
initrd = "{boot}/initrd.img"
cmdline = "{line}"
[console]
serial = "unix:{serial}"
"""


def seats(host: EmulatedHost, who: str) -> list[dict[str, Any]]:
    """The two that a guest has."""
    return [(_kvmpy if who == KVMPY else _qemu)(host, f"move-{who.lower()}{number}") for number in range(2)]


def _kvmpy(host: EmulatedHost, name: str) -> dict[str, Any]:
    file, serial, uri = f"/run/{name}.toml", f"/run/{name}.serial", f"unix:/run/{name}.stream"
    machine = Machine(name)
    known = {"memory": MEMORY_MIB, "boot": machine.boot, "line": machine.command_line, "serial": serial}
    host.write_file(file, CONFIG.format(**known))
    words = {"command": ["kvmpy", "run", file, "--name", name], "incoming": ["--incoming", uri]}
    return words | {"qmp": f"/run/kvmpy/{name}/qmp.sock", "serial": serial, "uri": uri, "hooks": {}}


def _qemu(_: EmulatedHost, name: str) -> dict[str, Any]:
    at, uri = f"/run/{name}", f"unix:/run/{name}.stream"
    sockets = ("-serial", f"unix:{at}.serial,server=on,wait=off", "-qmp", f"unix:{at}.qmp,server=on,wait=off")
    words = {"command": [*qemu(Machine(name)), *sockets], "incoming": ["-incoming", uri]}
    return words | {"qmp": f"{at}.qmp", "serial": f"{at}.serial", "uri": uri, "hooks": {}}


def turns(rounds: int) -> Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]:
    """By who and load, each turn's figures."""
    with shared_host() as host:
        known = {who: seats(host, who) for who in (KVMPY, QEMU)}
        words = ["-m", "bench.linux_moves_turns", str(rounds), json.dumps(known)]
        found: dict[str, dict[str, list[dict[str, float]]]] = answer(host, words, 4 * (rounds + 1) * TURN_SECONDS)
        return found


def measure(quick: bool) -> list[Row]:
    found = turns(QUICK_ROUNDS if quick else ROUNDS)
    rows = []
    for load in found[KVMPY]:
        for what, (unit, budget) in FIGURES.items():
            ours, theirs = ([turn[what] for turn in found[who][load]] for who in (KVMPY, QEMU))
            rows.append(Pair(f"migration of Linux, {load}: {what}", ours, theirs, unit, budget).row())
    return rows


if __name__ == "__main__":
    main(NAME, measure)
