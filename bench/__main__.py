"""`make bench`: what a flat guest can tell of kvmpy beside Debian's QEMU, alternately on the same kernel and KVM.

Two figures: the round trip of a port write that userspace answers, as the slope between a guest that makes few and one
that makes many, and the time from process start to the power-off of a guest that does nothing else. The second
includes QEMU's firmware, which kvmpy has none of. Writes bench/results/latest.json too.
"""

from __future__ import annotations

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

REPETITIONS: Final = 7
FEW, MANY = 1, 20_000
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
    if not shutil.which("qemu-system-x86_64"):
        print("bench: needs qemu-system-x86_64", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        few, many = (_kernel(Path(directory), writes) for writes in (FEW, MANY))
        times: dict[tuple[str, Path], list[float]] = {}
        for _ in range(REPETITIONS):
            for kernel in (few, many):
                for who, command in (("kvmpy", _kvmpy(kernel)), ("qemu", _qemu(kernel))):
                    times.setdefault((who, kernel), []).append(_seconds(command))
    start = {who: median(times[who, few]) for who in ("kvmpy", "qemu")}
    exits = {who: (median(times[who, many]) - start[who]) / (MANY - FEW) for who in start}
    rows = [
        Row("PIO write exit, round trip", exits["kvmpy"], exits["qemu"], exits["kvmpy"] / exits["qemu"], 1.25),
        Row("process start to power-off", start["kvmpy"], start["qemu"], start["kvmpy"] / start["qemu"], None),
    ]
    print(f"{'':<30} {'kvmpy':>12} {'QEMU':>12} {'ratio':>8} {'budget':>8}  verdict")
    for row in rows:
        budget = "-" if row.budget is None else f"{row.budget:.2f}"
        print(
            f"{row.name:<30} {row.kvmpy * 1e6:>9.1f} us {row.peer * 1e6:>9.1f} us {row.ratio:>8.3f} {budget:>8}"
            f"  {row.verdict}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([{**row._asdict(), "verdict": row.verdict} for row in rows], indent=2) + "\n")
    return 0


def _kernel(directory: Path, writes: int) -> Path:
    """A guest that writes a port that often, then powers off, as either VMM's ACPI wants it."""
    code = (
        b"\x66\xba\x80\x00"  # mov dx, 0x80
        + b"\xb9"
        + writes.to_bytes(4, "little")  # mov ecx, writes
        + b"\xee\xe2\xfd"  # again: out dx, al; loop again
        + b"\x66\xba\x04\x06"  # mov dx, 0x604
        + b"\x66\xb8\x00\x34\x66\xef"  # mov ax, 0x3400; out dx, ax: kvmpy's S5
        + b"\x66\xb8\x00\x20\x66\xef"  # mov ax, 0x2000; out dx, ax: q35's S5
        + b"\xeb\xfe"
    )
    path = directory / f"kernel-{writes}"
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
