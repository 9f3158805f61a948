"""What an emulated host says of a VMM that runs on it: trace events of its KVM, processor time, and memory.

All by the host's own means, so that they are the same for every VMM, and none of them has a word in it of the VMM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from scripts.lab.host import EmulatedHost
from scripts.lab.images import STAMP_LEAF

TRACING: Final = "/sys/kernel/tracing"
EVENTS: Final = f"{TRACING}/events"
ALIGNMENT_KIB: Final = 4096
TICKS: Final = 100  # clock ticks in a second, sysconf(_SC_CLK_TCK)
EVENT: Final = re.compile(r"^.+-\d+ +\[\d+\] \S+ +(?P<at>[\d.]+): (?P<name>\w+): ?(?P<rest>.*)$")
CPUID: Final = re.compile(r"func ([0-9a-f]+) ")
HIST: Final = re.compile(r"\{ common_pid: +(\d+) \} hitcount: +(\d+)")
STARTED, RUN, STAMPS = "started", "first KVM_RUN", {STAMP_LEAF | 0x41: "/init", STAMP_LEAF | 0x42: "ready"}


def mount(host: EmulatedHost) -> None:
    host.run(["sh", "-c", f"mountpoint -q {TRACING} || mount -t tracefs none {TRACING}"], check=True)


def watch_boot(host: EmulatedHost, program: str) -> None:
    """From now on stamp the start of ``program``, its first entry into a guest, and the guest's own stamps.

    Only the first entry: from the first exit on, those that follow are not looked at.
    """
    lines = [
        f"cd {EVENTS}",
        "echo mono >../trace_clock",
        f"echo 'filename ~ \"*/{program}\"' >sched/sched_process_exec/filter",
        f"echo 'function >= {STAMP_LEAF} && function <= {STAMP_LEAF | 0xFF}' >kvm/kvm_cpuid/filter",
        "echo '!disable_event:kvm:kvm_entry' >kvm/kvm_exit/trigger 2>/dev/null || :",
        "echo 0 >kvm/kvm_entry/enable",
        "echo >../trace",
        "echo 'disable_event:kvm:kvm_entry:1' >kvm/kvm_exit/trigger",
        "for event in sched/sched_process_exec kvm/kvm_cpuid kvm/kvm_entry; do echo 1 >$event/enable; done",
    ]
    host.run(["sh", "-ec", "\n".join(lines)], check=True)


def boot_stamps(host: EmulatedHost) -> dict[str, float]:
    """When each was first seen since `watch_boot`, in seconds."""
    return read_stamps(host.run(["cat", f"{TRACING}/trace"], check=True).stdout.splitlines())


def read_stamps(lines: Iterable[str]) -> dict[str, float]:
    """The same from the lines of a trace."""
    stamps: dict[str, float] = {}
    for found in filter(None, map(EVENT.match, lines)):
        at = float(found["at"])
        match found["name"]:
            case "sched_process_exec":
                stamps.setdefault(STARTED, at)
            case "kvm_entry":
                stamps.setdefault(RUN, at)
            case "kvm_cpuid" if leaf := CPUID.match(found["rest"]):
                stamps.setdefault(STAMPS[int(leaf[1], 16)], at)
    return stamps


def count_exits(host: EmulatedHost) -> None:
    """From now on count the exits to userspace."""
    trigger = f"{EVENTS}/kvm/kvm_userspace_exit/trigger"
    lines = f"echo '!hist:keys=common_pid' >{trigger} 2>/dev/null; echo 'hist:keys=common_pid' >{trigger}"
    host.run(["sh", "-c", lines], check=True)


def exits(host: EmulatedHost, pid: int) -> int:
    """How many a VMM's vCPUs have had since `count_exits`."""
    show = f"cat {EVENTS}/kvm/kvm_userspace_exit/hist; echo threads; ls /proc/{pid}/task"
    counts, _, threads = host.run(["sh", "-ec", show], check=True).stdout.partition("threads\n")
    return sum_exits(counts, frozenset(map(int, threads.split())))


def sum_exits(histogram: str, threads: frozenset[int]) -> int:
    """Those of ``threads`` in a histogram of the tracepoint. Raises ValueError where that has not counted."""
    if "[active]" not in histogram:
        raise ValueError("the exits to userspace were not counted")
    return sum(int(count) for thread, count in HIST.findall(histogram) if int(thread) in threads)


class Processor(NamedTuple):
    """Processor time that a VMM has had beside its vCPUs, in seconds, and when that was read."""

    at: float
    own: float


def processor(host: EmulatedHost, pid: int) -> Processor:
    """Of the process without its vCPUs' threads, and of the kernel's threads that work for it, called vhost-PID.

    To take only the guest's time from a vCPU's would not do: the kernel counts that by ticks, and all of a thread's by
    its clock, so a guest had more than the thread that it was in.
    """
    vhost = f"for p in $(pgrep -x vhost-{pid}); do cat /proc/$p/stat; done"
    find = f"cat /proc/uptime /proc/{pid}/stat; {vhost}; echo; cat /proc/{pid}/task/*/stat || :"  # one may just end
    return read_processor(host.run(["sh", "-ec", find], check=True).stdout)


def read_processor(text: str) -> Processor:
    """From /proc/uptime, lines of /proc/PID/stat, and after an empty line those of the VMM's threads.

    Raises ValueError where none of these has run a guest.
    """
    whole, _, threads = text.partition("\n\n")
    uptime, *processes = whole.splitlines()
    vcpus = [ticks for ticks, guest in map(_ticks, threads.splitlines()) if guest]
    if not vcpus:
        raise ValueError("no thread of the VMM has run a guest")
    own = sum(ticks for ticks, _ in map(_ticks, processes)) - sum(vcpus)
    return Processor(float(uptime.split()[0]), own / TICKS)


def _ticks(stat: str) -> tuple[int, int]:
    """What a process or a thread has had, and what of it a guest."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]), int(fields[40])


def pid_of(host: EmulatedHost, pid_file: str) -> int:
    return int(host.run(["cat", pid_file], check=True).stdout.split()[0])


def family(host: EmulatedHost, pid: int) -> list[int]:
    """A process and its descendants: a VMM may have helpers."""
    walk = f"walk() {{ echo $1; for c in $(pgrep -P $1); do walk $c; done; }}; walk {pid}"
    return [int(line) for line in host.run(["sh", "-c", walk], check=True).stdout.split()]


class Memory(NamedTuple):
    """MiB: what is shared counts by its share, or wholly."""

    pss: float
    rss: float


def beside(host: EmulatedHost, pid: int, ram_kib: int) -> Memory:
    """What a VMM and its helpers take beside the guest's RAM."""
    found = [
        sum_memory(host.run(["cat", f"/proc/{number}/smaps"], check=True).stdout, ram_kib)
        for number in family(host, pid)
    ]
    return Memory(*(sum(part) for part in zip(*found, strict=True)))


def sum_memory(smaps: str, ram_kib: int) -> Memory:
    """Of a process, without the guest's RAM, which may be mapped with something more to align it; a helper has none."""
    sizes, pss, rss = (_column(name, smaps) for name in ("Size", "Pss", "Rss"))
    is_ram = [ram_kib <= size < ram_kib + ALIGNMENT_KIB for size in sizes]
    return Memory(*(sum(kib for kib, ram in zip(each, is_ram, strict=True) if not ram) / 1024 for each in (pss, rss)))


def _column(name: str, smaps: str) -> list[int]:
    return list(map(int, re.findall(rf"^{name}: +(\d+) kB", smaps, re.MULTILINE)))
