"""`python -m bench.disk`: a guest's disk beside QEMU's, whose back ends are aio=threads and aio=io_uring, in one host.

Both guests run all the time and take turns; QEMU's has a disk for either back end. fio in the guest reads and writes
them with direct I/O, and so does either VMM the files, which lie on an emulated disk of the host's. What fio found is
written to the disk itself, for the guest's serial line would take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, NamedTuple

from bench.linux import Disk, KvmpyGuest, LinuxGuest, Machine, QemuGuest, shared_host
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, alternately
from scripts.lab import fio
from scripts.lab.host import EmulatedHost
from scripts.lab.images import make
from tests.lab.guest import FROM_DISK, root_disk

NAME: Final = "disk"
LEFT_OUT: Final = ("disks of Linux guests",)
BACKENDS: Final = ("threads", "io_uring")
DATA_MIB: Final = 64
REPORT_BYTES: Final = 1 << 20
ROUNDS: Final = 5
SECONDS: Final = 3
SLOW: Final = 240.0


class Job(NamedTuple):
    """What fio does; ``unit`` is that of its figure."""

    name: str
    options: str
    unit: str


JOBS: Final = (
    Job("random reads of 4 KiB, 16 at once", "--rw=randread --bs=4k --iodepth=16", "1/s"),
    Job("random writes of 4 KiB, 16 at once", "--rw=randwrite --bs=4k --iodepth=16", "1/s"),
    Job("random reads of 4 KiB, one at a time", "--rw=randread --bs=4k --iodepth=1", "1/s"),
    Job("sequential reads of 256 KiB, 4 at once", "--rw=read --bs=256k --iodepth=4", "B/s"),
    Job("sequential writes of 256 KiB, 4 at once", "--rw=write --bs=256k --iodepth=4", "B/s"),
)


def command(device: str, jobs: tuple[Job, ...]) -> str:
    """What is typed in the guest: all jobs, one after the other, and the report onto the disk."""
    common = f"--filename={device} --direct=1 --ioengine=libaio --thread --runtime={SECONDS} --time_based --stonewall"
    words = " ".join(f"--name=j{number} {job.options}" for number, job in enumerate(jobs))
    run = f"{fio.WHERE}/fio --eta=never --output-format=json --output=/tmp/report {common} {words}"
    return f"{run} && dd if=/tmp/report of={device} conv=fsync 2>/dev/null; echo $?"


def figures(report: Mapping[str, Any], jobs: tuple[Job, ...]) -> dict[str, float]:
    """Of fio's report: by name of each job, accesses or bytes in a second."""
    found = {}
    for job, said in zip(jobs, report["jobs"], strict=True):
        if said["error"]:
            raise ValueError(f"fio: {job.name}: error {said['error']}")
        way = said["write" if "write" in job.options else "read"]
        found[job.name] = float(way["iops"] if job.unit == "1/s" else way["bw_bytes"])
    return found


def first_document(text: str) -> Any:
    """The JSON that ``text`` begins with, whatever follows."""
    return json.JSONDecoder().raw_decode(text.lstrip())[0]


def run(host: EmulatedHost, guest: LinuxGuest, device: str, path: str, jobs: tuple[Job, ...]) -> dict[str, float]:
    """One turn of all jobs on the disk that is ``device`` in the guest and ``path`` on the host."""
    said = guest.type(command(device, jobs), SLOW)
    if said != "0":
        raise ValueError(f"fio in the guest: {said}")
    words = ["sh", "-c", f"head -c {REPORT_BYTES} {path} | tr -d '\\000'"]
    return figures(first_document(host.run(words, check=True).stdout), jobs)


def begin(host: EmulatedHost, stack: ExitStack, who: str) -> tuple[LinuxGuest, dict[str, str]]:
    """Start a guest and mount fio; returns it, and the files of its disks by back end, in the guest's order."""
    name = f"disk-{who.lower()}"
    root = stack.enter_context(root_disk(host, make(), name))
    backends = BACKENDS if who == QEMU else ("",)
    paths = {aio: f"/scratch/{name}-{aio}.img" for aio in backends}
    making = [f"cp --sparse=always {fio.make()} /scratch/{name}-fio.img"]
    making += [f"dd if=/dev/zero of={path} bs=1M count={DATA_MIB} conv=fsync" for path in paths.values()]
    host.run(["sh", "-ec", "; ".join(making)], timeout=SLOW, check=True)
    disks = [Disk("root", root), Disk("fio", f"/scratch/{name}-fio.img")]
    disks += [Disk(f"data{number}", path, aio or "threads") for number, (aio, path) in enumerate(paths.items())]
    machine = Machine(name, words=FROM_DISK, disks=disks)
    guest: LinuxGuest = KvmpyGuest(host, machine) if who == KVMPY else QemuGuest(host, machine)
    stack.enter_context(guest)
    guest.wait_shell()
    guest.type(f"mount -t ext4 /dev/vdb {fio.WHERE}")
    return guest, paths


def measure(quick: bool) -> list[Row]:
    """None of it is quick: fio takes its time to start in a guest."""
    return [] if quick else rows(JOBS)


def rows(jobs: tuple[Job, ...]) -> list[Row]:
    ways = {}
    with shared_host() as host, ExitStack() as stack:
        for who in (KVMPY, QEMU):
            guest, paths = begin(host, stack, who)
            for letter, (aio, path) in zip("cd", paths.items(), strict=False):
                ways[f"{who} {aio}".strip()] = partial(run, host, guest, f"/dev/vd{letter}", path, jobs)
        found = alternately(ways, ROUNDS)
    return [
        Pair(f"{job.name}, {aio}", found[KVMPY][job.name], found[f"{QEMU} {aio}"][job.name], job.unit).row()
        for job in jobs
        for aio in BACKENDS
    ]


if __name__ == "__main__":
    main(NAME, measure)
