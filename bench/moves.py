"""One migration of a flat guest over loopback TCP from one process to another of the same VMM, kvmpy's or QEMU's.

Either is commanded by QMP in the same way, with the same parameters: as much bandwidth as there is, the downtime limit
that both have by default, and throttling of a guest that writes too fast. The blackout is from the event STOP of the
source to RESUME of the destination, which both stamp by this machine's clock, the total from the command on. QEMU's
RESUME is from before its devices go on, and its vCPUs; kvmpy's has the time when the first vCPU went.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.guests import toucher
from bench.qmp import POLL, Qmp
from bench.rows import KVMPY
from bench.vmms import WITH_US, Flat, running, wait_for

MIB: Final = 1 << 20
UNLIMITED: Final = 1 << 40
"""Bytes a second."""
OVER: Final = ("completed", "failed", "cancelled")
WARM: Final = """
import mmap, sys
with mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
"""
REPORTED: Final = 16
"""One part in so many of what is free is offered to the hypervisor at a time."""
Watcher = Callable[[int], object]


class Shape(NamedTuple):
    """What is moved how. ``dirty`` is MiB that the guest writes in a second, a word in each page."""

    memory: int = 256
    dirty: int = 0
    channels: int = 1
    credentials: str = ""
    compression: str = "none"
    bandwidth: int = UNLIMITED


class Sample(NamedTuple):
    """So many bytes sent at a time, in seconds after the command."""

    at: float
    sent: int


class Moved(NamedTuple):
    """What came of it: seconds, bytes, and the progress; ``parts`` is the blackout's, where the VMM tells."""

    total: float
    blackout: float
    sent: int
    samples: list[Sample]
    parts: Mapping[str, float]

    @property
    def rate(self) -> float:
        return self.sent / self.total


class Seat(NamedTuple):
    """A VMM that runs the guest, or waits for it."""

    qmp: Qmp
    process: subprocess.Popen[bytes]


def move(who: str, directory: Path, shape: Shape, ticks: int, watch: Watcher = lambda pid: None) -> Moved:
    """Boot the guest here, wait until its memory has been written to, and move it; ``watch`` is given the source's pid.

    ``ticks`` is what its TSC counts in a second. Raises RuntimeError where the migration fails.
    """
    code = toucher(shape.memory, shape.dirty * 256, ticks)
    flat = Flat(directory / who, code, memory=shape.memory, serial="file")
    flat.forget("here")
    with ExitStack() as stack:
        source = stack.enter_context(seat(who, flat, "here", shape))
        there = stack.enter_context(seat(who, flat, "there", shape, incoming=True))
        wait_for(lambda: b"K" in flat.said("here"), source.process, f"{who}: the guest's memory written to")
        uri = f"tcp:localhost:{free_port()}"
        for each in (there, source):
            prepare(who, each.qmp, shape)
        there.qmp("migrate-incoming", uri=uri)
        warm(shape.memory)
        began = time.time()
        source.qmp("migrate", uri=uri)
        samples = list(followed(source, began, watch))
        info = source.qmp("query-migrate")
        if info["status"] != "completed":
            raise RuntimeError(f"{who}: {info}")
        stopped, runs = source.qmp.wait("STOP"), there.qmp.wait("RESUME")
        return Moved(runs - began, runs - stopped, sent(info), samples, parts(info))


@contextmanager
def seat(who: str, flat: Flat, name: str, shape: Shape, *, incoming: bool = False) -> Iterator[Seat]:
    qmp = flat.directory / name / "qmp.sock" if who == KVMPY else flat.directory / f"{name}.qmp"
    qmp.unlink(missing_ok=True)
    if who == KVMPY:
        tls = ("--set", f"migration.tls-creds={shape.credentials}") if shape.credentials else ()
        command = flat.kvmpy(*(("--incoming", "defer") if incoming else ()), *tls, name=name)
    else:
        end = "server" if incoming else "client"
        tls = ("-object", f"tls-creds-x509,id=tls0,dir={shape.credentials},endpoint={end},verify-peer=on")
        words = ("-qmp", f"unix:{qmp},server=on,wait=off", *(tls if shape.credentials else ()))
        command = flat.qemu(*words, *(("-incoming", "defer") if incoming else ()), name=name)
    with running([*WITH_US, *command], flat.directory) as process:
        wait_for(qmp.exists, process, f"{who}: its monitor")
        session = Qmp(qmp)
        try:
            yield Seat(session, process)
        finally:
            session.close()


def warm(mib: int) -> None:
    """Touch as much memory as the destination is going to, and what may be taken back meanwhile; and give it back.

    This machine's own may be a hypervisor's, who has to find it when it is first used: that took from 0.05 to 0.7 s for
    256 MiB. And it takes back what is free: every two seconds the kernel offers it a sixteenth, what was freed last
    before the rest (mm/page_reporting.c), and without that much more every third migration took four times as long, of
    either VMM. In a process of its own, which is the one that is killed where there is not enough.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    size = mib * MIB + free // REPORTED
    subprocess.run([sys.executable, "-c", WARM, str(size)], check=True)


def prepare(who: str, qmp: Qmp, shape: Shape) -> None:
    """Capabilities and parameters, the same on both sides."""
    is_multifd = shape.channels > 1 or shape.compression != "none" or who == KVMPY
    states = {"events": True, "multifd": is_multifd, "auto-converge": True, "return-path": True}
    qmp("migrate-set-capabilities", capabilities=[{"capability": c, "state": s} for c, s in states.items()])
    parameters: dict[str, Any] = {"max_bandwidth": shape.bandwidth, "downtime_limit": 300}
    if is_multifd:
        parameters |= {"multifd_channels": shape.channels, "multifd_compression": shape.compression}
    if who == KVMPY:
        parameters |= {"x_insecure": not shape.credentials}
    elif shape.credentials:
        parameters |= {"tls_creds": "tls0"}
    qmp("migrate-set-parameters", **parameters)


def followed(source: Seat, began: float, watch: Watcher) -> Iterator[Sample]:
    """How much has been sent when, until it is over."""
    while (info := source.qmp("query-migrate")).get("status") not in OVER:
        yield Sample(time.time() - began, sent(info))
        watch(source.process.pid)
        time.sleep(POLL)


def sent(info: Mapping[str, Any]) -> int:
    """Bytes, whatever they went through."""
    return int(info["ram"]["transferred"]) if "ram" in info else 0


def parts(info: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of the phases of the blackout, by what each is called; kvmpy alone tells them."""
    stopped = info.get("stopped-ms")
    if stopped is None or "phases" not in info:
        return {}
    inside = [phase for phase in info["phases"] if phase["start-ms"] + phase["ms"] > stopped]
    return {phase["name"]: phase["start-ms"] + phase["ms"] - max(phase["start-ms"], stopped) for phase in inside}


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port
