"""Where results go: `latest.json`, a list of rows; the same as a table; the figures; and what they were taken on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.rows import KVMPY, Row

RESULTS: Final = Path(__file__).parent / "results"
ROWS, TABLE, FACTS, FIGURES = "latest.json", "latest.txt", "facts.json", "figures.json"
SCALES: Final = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "bit/s": ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")),
    "B/s": ((float(1 << 30), "GiB/s"), (float(1 << 20), "MiB/s"), (1024.0, "KiB/s")),
}


def write(rows: Sequence[Row], facts: Mapping[str, str], directory: Path = RESULTS) -> None:
    """Replace what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ROWS).write_text(json.dumps([as_json(row) for row in rows], indent=2, allow_nan=False) + "\n")
    (directory / TABLE).write_text("\n".join([*facts_text(facts), "", *table(rows)]) + "\n")
    (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    figures = {row.name: row.figure for row in rows if row.figure}
    (directory / FIGURES).write_bytes(msgspec.json.encode(figures))


def as_json(row: Row) -> dict[str, Any]:
    """Without its figure, and with its verdict; what is no number is null."""
    fields = msgspec.to_builtins(row) | {"verdict": row.verdict}
    del fields["figure"]
    return {name: _numbers(value) for name, value in fields.items()}


def _numbers(value: Any) -> Any:
    """The same without what JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts_text(facts: Mapping[str, str]) -> list[str]:
    return [f"{name + ':':<10} {text}" for name, text in facts.items()]


def table(rows: Sequence[Row]) -> list[str]:
    """As lines of text, a row each, with what there is to say of it."""
    width = max([len(row.name) for row in rows] + [24])
    lines = [f"{'':<{width}} {KVMPY:>12} {'peer':>12} {'ratio':>7} {'quartiles':>15} {'budget':>8}  verdict"]
    for row in rows:
        low_high = "" if row.spread is None else f"{row.spread[0]:.3f}-{row.spread[1]:.3f}"
        lines.append(
            f"{row.name:<{width}} {figure(row.kvmpy, row.unit):>12} {figure(row.peer, row.unit):>12} {row.ratio:>7.3f}"
            f" {low_high:>15} {budget(row):>8}  {row.verdict:<7} {beside(row)}".rstrip()
        )
    return lines


def budget(row: Row) -> str:
    return "-" if row.budget is None else f"{row.bound} {row.budget:g}"


def beside(row: Row) -> str:
    """Who the peer is where it is not QEMU, and what there is to say."""
    peer = "" if row.peer_name == "QEMU" else f"beside {row.peer_name}"
    return "; ".join(filter(None, (peer, row.note)))


def figure(value: float, unit: str) -> str:
    """A number and its unit, as one would say it."""
    for factor, name in SCALES.get(unit, ()):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {name}" if abs(value) < 1000 * factor else f"{value / factor:.0f} {name}"
    return f"{value:.4g} {unit}".rstrip()
