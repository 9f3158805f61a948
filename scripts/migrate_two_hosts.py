"""A guest goes from one host to another and back, for everybody to see: on two emulated hosts, by docs/migration.md.

What is typed on a host is shown with its name, and then what it says. A third station on the wire pings the guest ten
times a second all the while. The reports, with their pictures, are put into the directory that is named (default: .).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from scripts.lab.errors import LabError
from scripts.lab.hardware import STATION
from scripts.lab.host import EmulatedHost
from scripts.lab.pair import NAMES, SHARED_DISK, HostPair
from scripts.lab.process import Process

GUEST: Final = "10.77.0.50"
CONFIG: Final = "examples/migration.toml"
PATIENCE: Final = 600.0


def main(arguments: Sequence[str]) -> int:
    """Show it; 0 where the guest went there and back."""
    directory = Path(arguments[0] if arguments else ".")
    print("starting two emulated hosts ...", flush=True)
    with HostPair() as pair:
        print(f"both up after {pair.boot_seconds:.0f} s: {NAMES[0]} and {NAMES[1]}, one wire, one disk, ssh\n")
        first, second = pair.hosts
        show(first, f"dd if=.lab/guest/root.img of={SHARED_DISK} bs=1M oflag=direct status=none")
        show(first, f"kvmpy run {CONFIG} --detach")
        show(first, f"until busybox ping -q -c 1 -W 1 {GUEST} >/dev/null; do sleep 1; done")
        ping = ["ip", "netns", "exec", STATION, "busybox", "ping", "-i", "0.1", GUEST]
        pings = first.spawn(ping)
        pings.expect("seq=")
        for host, target in ((first, NAMES[1]), (second, NAMES[0])):
            go(host, target, directory)
        show(first, "kvmpy ps")
        tell_pings(pings)
        show(first, "kvmpy stop web1")
    return 0


def go(host: EmulatedHost, target: str, directory: Path) -> None:
    """Migrate to ``target``, and say how that went."""
    name = f"to-{target}"
    reports = " ".join(f"--report /run/{name}.{kind}" for kind in ("html", "svg", "json"))
    show(host, f"kvmpy migrate web1 ssh://{target} --dry-run")
    show(host, f"kvmpy migrate web1 ssh://{target} {reports}")
    for kind in ("html", "svg", "json"):
        text = host.run(["cat", f"/run/{name}.{kind}"], check=True).stdout
        (directory / f"{name}.{kind}").write_text(text)
    told = json.loads((directory / f"{name}.json").read_text())
    print(f"blackout {told['blackout-ms']:.0f} ms; its picture is {directory / f'{name}.html'}\n", flush=True)


def show(host: EmulatedHost, command: str) -> None:
    """Run a command on a host as if somebody typed it there. Raises LabError where it fails."""
    name = "host2" if host.hardware and host.hardware.number == 2 else "host1"
    print(f"{name}$ {command}", flush=True)
    process = host.spawn(["bash", "-c", command], sink=lambda _, data: (sys.stdout.write(data.decode()), None)[1])
    if code := process.wait(PATIENCE):
        raise LabError(f"{name}: {command}: ended with {code}\n{host.console_tail()}")
    sys.stdout.flush()


def tell_pings(pings: Process) -> None:
    """What the station saw: answers, and the most in a row that were missing."""
    pings.signal(2)
    pings.wait()
    numbers = [int(number) for number in re.findall(r"seq=(\d+)", pings.output)]
    missing = max(later - earlier - 1 for earlier, later in pairwise(numbers))
    print(f"of {numbers[-1] + 1} pings at 0.1 s {len(numbers)} were answered; at most {missing} in a row were not")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
