"""Migrations of flat guests over loopback, kvmpy's and QEMU's by turns: rate, total time and blackout.

Guests of several sizes that stand still or write, at several rates, one and four channels, plain, TLS and zstd. Beside
the rates stand what a copy of memory and a bare socket reach in the same turn: both ends of these, too, share this
machine's processors. A guest's pages have a word each that is not zero, so that all travel.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from bench import pages
from bench.exits import tsc_khz
from bench.figures import Curves, Figure, Stack
from bench.guests import extents
from bench.moves import MIB, Moved, Shape, move
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, Way, alternately
from kvmpy.host.memory import available_memory
from tests.fakes.certificates import Authority

log = logging.getLogger(__name__)

COPY, SOCKET = pages.COPY, pages.SOCKET
ROUNDS, QUICK = 5, 2
SHORT, SHORT_ROUNDS = 256, 11  # MiB: what takes a tenth of a second takes it more or less, so more turns decide
LARGEST, SPARE = 8192, 1024  # MiB, which both sides have, and which this machine is to have left
FIGURES: Final = {
    "rate": ("B/s", "migration rate"),
    "total": ("s", "migration time"),
    "blackout": ("s", "migration blackout"),
}
IDLE: Final = "256 MiB idle"
DIRTIED: Final = "256 MiB, 64 MiB/s dirtied"
DRAWN: Final = (IDLE, DIRTIED, "8 GiB, 64 MiB/s dirtied")
SIZES: Final = {256: "256 MiB", 1024: "1 GiB", 4096: "4 GiB", LARGEST: "8 GiB"}
RATES: Final = {" idle": 0, ", 64 MiB/s dirtied": 64}
OTHERWISE: Final = (IDLE, DIRTIED, "4 GiB idle")
"""What is moved by several channels, TLS and zstd, too."""
LEFT_OUT: Final = (
    "migration: more than one channel, TLS, zstd, guests of more than 256 MiB or that write 16 or 256 MiB/s",
)


def shapes(quick: bool, credentials: str) -> Mapping[str, Shape]:
    """What is moved, by its name in the table."""
    if quick:
        return {IDLE: Shape(), DIRTIED: Shape(dirty=64)}
    otherwise = {
        ", 4 channels": Shape(channels=4),
        ", TLS": Shape(credentials=credentials),
        ", zstd, 2 channels": Shape(channels=2, compression="zstd"),
    }
    found = {f"256 MiB, {rate} MiB/s dirtied": Shape(dirty=rate) for rate in (16, 256)}
    for memory, size in SIZES.items():
        plain = {f"{size}{what}": Shape(memory, dirty=rate) for what, rate in RATES.items()}
        needed, available = 2 * memory + SPARE, available_memory() // MIB
        if available < needed:
            names = " and ".join(plain)
            log.warning("migration: %s are left out: both sides need %d MiB, there are %d", names, needed, available)
            continue
        found |= plain
        for name in [name for name in plain if name in OTHERWISE]:
            for how, shape in otherwise.items():
                found[f"{name}{how}"] = shape._replace(memory=memory, dirty=plain[name].dirty)
    return found


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    kept: dict[str, dict[str, list[Moved]]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        ticks = tsc_khz(directory) * 1000
        bounds = limits(stack)
        for what, shape in shapes(quick, Authority().credentials(directory / "tls")).items():
            moves: dict[str, list[Moved]] = {KVMPY: [], QEMU: []}

            def turn(who: str, shape: Shape = shape, moves: dict[str, list[Moved]] = moves) -> Mapping[str, float]:
                done = move(who, directory, shape, ticks)
                moves[who].append(done)
                return {"rate": rate(shape, done), "total": done.total, "blackout": done.blackout}

            ways = {who: partial(turn, who) for who in (KVMPY, QEMU)}
            full = SHORT_ROUNDS if shape.memory <= SHORT else ROUNDS
            taken = alternately({**ways, **bounds}, QUICK if quick else full)
            rows += rows_of(what, taken, moves)
            kept[what] = moves
    return rows + list(growth(kept))


def rate(shape: Shape, done: Moved) -> float:
    """Bytes of memory in a second: those that were sent, or where they were packed those that the guest has written."""
    if shape.compression == "none":
        return done.rate
    return sum(mib for _, mib in extents(shape.memory)) * MIB / done.total


def limits(stack: ExitStack) -> Mapping[str, Way]:
    """What bounds a rate: a copy of as much memory, and a send of it that does nothing else."""
    source, there = pages.guest(stack, pages.SIZE), pages.guest(stack, pages.SIZE)
    source.write(0, b"\x01" * pages.SIZE)
    there.write(0, source.view(0, pages.SIZE))
    return {
        COPY: pages.rate(pages.SIZE, lambda: pages.copy(source, there)),
        SOCKET: pages.rate(pages.SIZE, lambda: pages.plain_send(source, there)),
    }


def rows_of(
    what: str, taken: Mapping[str, Mapping[str, list[float]]], moves: Mapping[str, Sequence[Moved]]
) -> Iterator[Row]:
    for figure, (unit, budget) in FIGURES.items():
        yield Pair(
            f"migration: {what}, {figure}",
            taken[KVMPY][figure],
            taken[QEMU][figure],
            unit,
            budget,
            figure=drawn(figure, what, moves) if what in DRAWN else None,
        ).row()
    for peer in (COPY, SOCKET):
        yield Pair(
            f"migration: {what}, rate of a {peer}", taken[KVMPY]["rate"], taken[peer]["rate"], "B/s", peer_name=peer
        ).row()


def drawn(figure: str, what: str, moves: Mapping[str, Sequence[Moved]]) -> Figure | None:
    if figure == "rate":
        return throughput(what, moves)
    return blackout(what, moves) if figure == "blackout" else None


def throughput(what: str, moves: Mapping[str, Sequence[Moved]]) -> Curves:
    """What was sent since the sample before, of the last run of each."""
    lines = {}
    for who, done in moves.items():
        samples = done[-1].samples
        lines[who] = [
            (after.at, (after.sent - before.sent) / MIB / (after.at - before.at)) for before, after in pairwise(samples)
        ]
    return Curves(f"Throughput of a migration: {what}", "s", "MiB/s", lines)


def blackout(what: str, moves: Mapping[str, Sequence[Moved]]) -> Stack:
    """The parts of it that kvmpy tells, and what is left; of QEMU's nothing is told."""
    bars = {}
    for who, done in moves.items():
        typical = sorted(done, key=lambda each: each.blackout)[len(done) // 2]
        told = dict(typical.parts)
        rest = typical.blackout * 1000 - sum(told.values())
        bars[who] = told | {"the rest" if told else "STOP to RESUME": max(rest, 0.0)}
    return Stack(f"Where the blackout goes: {what}", "ms", bars)


def growth(kept: Mapping[str, Mapping[str, Sequence[Moved]]]) -> Iterator[Row]:
    """How much more the larger guest, and the one that writes more, takes, of kvmpy and QEMU."""
    names = {"8 GiB idle": "from 256 MiB to 8 GiB", "256 MiB, 256 MiB/s dirtied": "from idle to 256 MiB/s dirtied"}
    for larger, text in names.items():
        if larger not in kept:
            continue
        for figure in ("total", "blackout"):
            grown = {}
            for who, done in kept[larger].items():
                base = median(getattr(each, figure) for each in kept[IDLE][who])
                grown[who] = [getattr(each, figure) / base for each in done]
            yield Pair(f"migration: growth of {figure} {text}", grown[KVMPY], grown[QEMU], "times").row()


if __name__ == "__main__":
    main("migration", measure)
