"""`make bench`: what a flat guest can tell of kvmpy beside Debian's QEMU, alternately on the same kernel and KVM.

The round trips of accesses that userspace answers, as the slope between a guest that makes few and one that makes many,
and the time from process start to the power-off of a guest that does next to nothing. The last includes QEMU's
firmware, which kvmpy has none of. Writes bench/results/latest.json too.

In an emulated host, where an exit takes a hundred times as long and all of kvmpy's code is dearer still (what it costs
a Linux guest there is what tests/lab shows): python -m scripts.lab run -- python -m bench --many 1000 --repetitions 3
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from tests.fakes.pvh_kernel import pvh_kernel

FEW: Final = 1
ACCESSES: Final = {
    "PIO write exit": b"\x66\xba\x80\x00\xee",  # mov dx, 0x80; out dx, al
    "PCI config read by ports": (  # two exits
        b"\xb8\x00\x00\x00\x80\x66\xba\xf8\x0c\xef"  # mov eax, 0x80000000; mov dx, 0xcf8; out dx, eax
        b"\xb2\xfc\xed"  # mov dl, 0xfc; in eax, dx
    ),
    "PCI config read by ECAM": b"\xa1\x00\x00\x00\xb0",  # mov eax, [0xb0000000]: there in either VMM
}
"""What a guest does that often. 00:00.0 is a host bridge in either VMM."""
BUDGET: Final = 1.25
RESULTS: Final = Path(__file__).parent / "results" / "latest.json"
CONFIG: Final = '[boot]\nkernel = "{kernel}"\n[machine]\nmemory = "32MiB"\n[console]\nserial = "null"\n'


class Row(NamedTuple):
    """Seconds of kvmpy and of its peer (medians), their ratio, and what it may be (a budget); None: not set."""

    name: str
    kvmpy: float
    peer: float
    ratio: float
    budget: float | None

    @property
    def verdict(self) -> str:
        return "-" if self.budget is None else "met" if self.ratio <= self.budget else "missed"


def main() -> int:
    """Measure and print; returns the exit code."""
    options = _options()
    if not shutil.which("qemu-system-x86_64"):
        print("bench: needs qemu-system-x86_64", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        kernels = {(name, n): _kernel(Path(directory), name, n) for name in ACCESSES for n in (FEW, options.many)}
        times: dict[tuple[str, str, int], list[float]] = {}
        for _ in range(options.repetitions):
            for (name, n), kernel in kernels.items():
                for who, command in (("kvmpy", _kvmpy(kernel)), ("qemu", _qemu(kernel))):
                    times.setdefault((who, name, n), []).append(_seconds(command))
    taken = {run: median(seconds) for run, seconds in times.items()}
    rows = [_row(name, taken, options.many) for name in ACCESSES]
    start = {who: median(taken[who, name, FEW] for name in ACCESSES) for who in ("kvmpy", "qemu")}
    rows.append(Row("process start to power-off", start["kvmpy"], start["qemu"], start["kvmpy"] / start["qemu"], None))
    _report(rows)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure kvmpy beside QEMU with a flat guest.")
    parser.add_argument("--many", type=int, default=20_000, metavar="N", help="accesses of a guest that makes many")
    parser.add_argument("--repetitions", type=int, default=7, metavar="N", help="runs, of which the median is taken")
    return parser.parse_args()


def _row(name: str, taken: dict[tuple[str, str, int], float], many: int) -> Row:
    kvmpy, qemu = ((taken[who, name, many] - taken[who, name, FEW]) / (many - FEW) for who in ("kvmpy", "qemu"))
    return Row(name, kvmpy, qemu, kvmpy / qemu, BUDGET)


def _report(rows: Sequence[Row]) -> None:
    print(f"{'':<30} {'kvmpy':>12} {'QEMU':>12} {'ratio':>8} {'budget':>8}  verdict")
    for row in rows:
        budget = "-" if row.budget is None else f"{row.budget:.2f}"
        print(
            f"{row.name:<30} {row.kvmpy * 1e6:>9.1f} us {row.peer * 1e6:>9.1f} us {row.ratio:>8.3f} {budget:>8}"
            f"  {row.verdict}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([{**row._asdict(), "verdict": row.verdict} for row in rows], indent=2) + "\n")


def _kernel(directory: Path, name: str, count: int) -> Path:
    """A guest that makes the access ``name`` that often, then powers off, as either VMM's ACPI wants it."""
    access = ACCESSES[name]
    code = (
        b"\xb9"
        + count.to_bytes(4, "little")  # mov ecx, count
        + access
        + bytes((0xE2, -(len(access) + 2) & 0xFF))  # loop to the access
        + b"\x66\xba\x04\x06"  # mov dx, 0x604
        + b"\x66\xb8\x00\x34\x66\xef"  # mov ax, 0x3400; out dx, ax: kvmpy's S5
        + b"\x66\xb8\x00\x20\x66\xef"  # mov ax, 0x2000; out dx, ax: q35's S5
        + b"\xeb\xfe"
    )
    path = directory / f"{name.replace(' ', '-')}-{count}"
    path.write_bytes(pvh_kernel(code))
    path.with_suffix(".toml").write_text(CONFIG.format(kernel=path.name))
    return path


def _kvmpy(kernel: Path) -> Sequence[str]:
    return (str(Path(sys.executable).with_name("kvmpy")), "run", str(kernel.with_suffix(".toml")))


def _qemu(kernel: Path) -> Sequence[str]:
    machine = ("-accel", "kvm", "-M", "q35", "-m", "32", "-nodefaults", "-display", "none", "-no-reboot")
    return ("qemu-system-x86_64", *machine, "-kernel", str(kernel))


def _seconds(command: Sequence[str]) -> float:
    begin = time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120)
    return time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
