"""`python -m bench.linux_memory`: what a VMM takes beside a Linux guest's RAM, kvmpy and QEMU on one emulated host.

The proportional set sizes of all mappings of the process and its helpers, but for the guest's RAM. Both guests have a
disk and a network device by vhost-net, and are idle in their shells; both kernels are bzImages, for of a vmlinux QEMU
keeps the whole file mapped. What is shared with other processes counts by its share, and the lab's agent shares
Python's own pages with kvmpy: the RSS counts those wholly.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Final

from bench import watch
from bench.budgets import MEMORY_MIB
from bench.linux import MEMORY_MIB as RAM_MIB
from bench.linux import Disk, KvmpyGuest, LinuxGuest, Machine, Nic, QemuGuest, bridge, shared_host
from bench.program import main
from bench.rows import KVMPY, QEMU, Pair, Row, alternately
from scripts.lab.host import EmulatedHost
from scripts.lab.images import make
from tests.lab.guest import FROM_DISK, root_disk

NAME: Final = "linux_memory"
LEFT_OUT: Final = ("memory beside Linux guests",)
ROUNDS: Final = 3
UNIT: Final = "MiB"
BRIDGE: Final = "br-memory"
WHAT: Final = "beside a Linux guest's RAM"


def take(host: EmulatedHost, who: str) -> Mapping[str, float]:
    """Of one guest, which is gone then: its PSS and RSS."""
    name = f"mem-{who.lower()}"
    with ExitStack() as stack:
        root = stack.enter_context(root_disk(host, make(), name))
        nics = [Nic("net", BRIDGE, "52:54:00:00:02:01")]
        machine = Machine(name, "vmlinuz", words=FROM_DISK, disks=[Disk("root", root)], nics=nics)
        guest: LinuxGuest = KvmpyGuest(host, machine) if who == KVMPY else QemuGuest(host, machine)
        stack.enter_context(guest)
        guest.wait_shell()
        guest.type("ip link set eth0 up; cat /bin/* >/dev/null; sleep 1")
        return watch.beside(host, watch.pid_of(host, guest.pid_file), RAM_MIB << 10)._asdict()


def measure(quick: bool) -> list[Row]:
    """None of it is quick: guests are booted for it."""
    if quick:
        return []
    with shared_host() as host, bridge(host, BRIDGE):
        return rows(alternately({who: partial(take, host, who) for who in (KVMPY, QEMU)}, ROUNDS))


def rows(taken: Mapping[str, Mapping[str, list[float]]]) -> list[Row]:
    ours, theirs = taken[KVMPY], taken[QEMU]
    allowed = [MEMORY_MIB] * len(ours["pss"])
    return [
        Pair(f"PSS {WHAT}", ours["pss"], theirs["pss"], UNIT, "memory").row(),
        Pair(f"PSS {WHAT}, allowed", ours["pss"], allowed, UNIT, "memory allowance", peer_name="the limit").row(),
        Pair(f"RSS {WHAT}", ours["rss"], theirs["rss"], UNIT).row(),
    ]


if __name__ == "__main__":
    main(NAME, measure)
