"""`python -m bench.boot`: Debian's kernel from power-on to /init, beside QEMU's q35 and microvm, in an emulated host.

The stamps are the host kernel's own: of the start of the VMM's process, of its first entry into the guest, which is
power-on, and of two instructions of the guest's that its KVM sees, where /init begins and where it is ready. The guest
has one vCPU, a serial line, and no disk or network. From power-on to /init QEMU's firmware runs and loads the kernel,
which kvmpy has loaded before; so both together are measured too. A bzImage unpacks itself in the guest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Final

from bench import watch
from bench.figures import Stack
from bench.linux import MICROVM, Q35, KvmpyGuest, Machine, QemuGuest, shared_host
from bench.program import main
from bench.rows import KVMPY, Pair, Row, alternately
from scripts.lab.host import EmulatedHost
from tests.lab.guest import Guest

IMAGES: Final = {"bzImage": "vmlinuz", "vmlinux": "vmlinux"}
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
NAME: Final = "boot"
LEFT_OUT: Final = ("boot of a bzImage, and beside microvm",)
START, TO_INIT, BOTH = "process start to first KVM_RUN", "power-on to /init", "process start to /init"
FIRMWARE, KERNEL, INIT = "before the kernel's clock", "kernel", "init"
PARTS: Final = (START, FIRMWARE, KERNEL, INIT)
SHOWN: Final = (TO_INIT, BOTH, START)
BINARY: Final = "qemu-system-x86_64"


def boot(host: EmulatedHost, program: str, begin: Callable[[], Guest]) -> dict[str, float]:
    """Boot once; how long each phase took, in seconds."""
    watch.watch_boot(host, program)
    with begin() as guest:
        uptime = float(guest.wait_shell()[3])
        stamps = watch.boot_stamps(host)
    return phases(stamps, uptime)


def phases(stamps: dict[str, float], uptime: float) -> dict[str, float]:
    """Of a boot whose guest had been up for ``uptime`` by its own clock when it was ready."""
    started, run, init, ready = (stamps[name] for name in (watch.STARTED, watch.RUN, "/init", "ready"))
    kernel = max(ready - uptime, run)
    return {
        START: run - started,
        FIRMWARE: kernel - run,
        KERNEL: init - kernel,
        INIT: ready - init,
        TO_INIT: init - run,
        BOTH: init - started,
    }


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    with shared_host() as host:
        for name in ("vmlinux",) if quick else IMAGES:
            machine = Machine(NAME, IMAGES[name])
            ways = {KVMPY: partial(boot, host, "kvmpy", partial(KvmpyGuest, host, machine))}
            for kind in (Q35,) if quick else (Q35, MICROVM):
                ways[kind] = partial(boot, host, BINARY, partial(QemuGuest, host, machine, kind))
            rows += _rows(name, alternately(ways, QUICK_ROUNDS if quick else ROUNDS))
    return rows


def _rows(image: str, found: Mapping[str, Mapping[str, list[float]]]) -> list[Row]:
    rows = []
    for kind in list(found)[1:]:
        for what in SHOWN:
            has_budget = (what, kind) == (TO_INIT, Q35)
            pair = Pair(
                f"{what}, {image}" + f", {kind}" * (kind != Q35),
                found[KVMPY][what],
                found[kind][what],
                budget="boot" if has_budget else None,
                peer_name=f"QEMU {kind}",
                figure=_figure(image, found) if has_budget else None,
            )
            rows.append(pair.row())
    return rows


def _figure(image: str, found: Mapping[str, Mapping[str, list[float]]]) -> Stack:
    bars = {who: {part: median(each[part]) for part in PARTS} for who, each in found.items()}
    return Stack(f"From process start to the guest's shell, {image}", "s", bars)


if __name__ == "__main__":
    main(NAME, measure)
