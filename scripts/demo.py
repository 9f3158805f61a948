"""What kvmpy is for, for everybody to see: a guest whose NIC is passed through goes from one host to another.

Two emulated hosts are started, whole machines in software, each with NICs to pass through and a bridge on one wire.
The guest has a failover pair: a NIC of its host, and a virtio-net device that stands by. `kvmpy migrate` moves it. The
guest pings a third station all the while, and that the guest; what is typed on a host is shown with the host's name. At
the end there is the timeline, in words and as a picture, which is all that stays, in the directory that is named.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvmpy.migration.page import page
from kvmpy.migration.picture import draw
from kvmpy.migration.report import Timeline, from_json, to_json
from scripts.draw_migration import with_pings
from scripts.lab.errors import LabError
from scripts.lab.hardware import PRIMARY_MAC, STATION, STATION_ADDRESS
from scripts.lab.host import EmulatedHost
from scripts.lab.images import SOURCES
from scripts.lab.nics import functions
from scripts.lab.pair import NAMES, HostPair
from scripts.lab.process import Process
from scripts.migrate_two_hosts import show

CONFIG: Final = "examples/failover.toml"
MACHINE, PRIMARY, STANDBY = "pair1", "hostdev0", "net1"
ADDRESS: Final = "10.77.0.50"
PATIENCE: Final = 600.0
PROMPT: Final = "guest# "
REPORT: Final = "/run/demo.json"
DOWNTIME_MS: Final = 1500
"""What an emulated host can do without slowing the guest down; on a real one the default is five times less."""


class Nics(NamedTuple):
    """What is passed through: in words, the guest's driver for it, and the pair's address where the NIC decides it."""

    words: str
    driver: str
    mac: str | None = None


HARDWARE: Final = {
    "igb": Nics("an 82576 NIC with two virtual functions", "igbvf"),
    "e1000e": Nics("82574 NICs", "e1000e", PRIMARY_MAC),
}


def main(arguments: list[str] | None = None) -> int:
    """Show it; 0 where the guest has arrived."""
    parser = argparse.ArgumentParser(prog="scripts.demo", description="Show a guest with a failover pair migrate.")
    parser.add_argument("directory", type=Path, nargs="?", default=Path(), help="for the picture (default: .)")
    parser.add_argument("--hardware", choices=HARDWARE, default="igb", help="what is passed through (default: igb)")
    options = parser.parse_args(arguments)
    nics = HARDWARE[options.hardware]
    say(f"Two hosts. This machine plays them, in software, so everything is slow; each has {nics.words}.")
    with HostPair(options.hardware) as pair:
        print(f"Both are up after {pair.boot_seconds:.0f} s: {' and '.join(NAMES)}, on one wire, with ssh.", flush=True)
        line = Demo(pair, nics).play()
    say("What happened, in seconds from `kvmpy migrate` on:")
    print("\n".join(story(line)))
    for name, text in (("html", page(line)), ("svg", draw(line)), ("json", to_json(line).decode())):
        (options.directory / f"demo.{name}").write_text(text)
    say(f"The same as a picture: {options.directory / 'demo.html'} (and .svg, .json). The hosts are gone.")
    return 0 if line.status == "completed" else 1


def say(words: str) -> None:
    """What a person is told."""
    print(f"\n=== {words}\n", flush=True)


class Demo:
    """The guest on its two hosts."""

    def __init__(self, pair: HostPair, nics: Nics) -> None:
        self._pair, self._nics = pair, nics
        self._here, self._there = functions(pair.first)[0], functions(pair.second)[1]

    def play(self) -> Timeline:
        """All of it; returns the timeline."""
        first, second = self._pair.hosts
        say(f"A guest. Function {self._here} of {NAMES[0]} is its primary; a tap on br0 stands by.")
        show(first, f"kvmpy run {CONFIG} --detach {self._options()}")
        pings = self._ping()
        show(first, f"kvmpy status {MACHINE} | grep -A 2 failover")
        self._type(first, f"busybox ping -i 0.1 {STATION_ADDRESS} >/pings &")
        say(f"The guest goes to {NAMES[1]}, where function {self._there} waits. Nothing in it is set up for that.")
        options = f"--set device.{PRIMARY}.host={self._there} --downtime-limit {DOWNTIME_MS} --report {REPORT}"
        show(first, f"kvmpy migrate {MACHINE} ssh://{NAMES[1]} {options}")
        show(second, f"kvmpy status {MACHINE} | grep -A 2 failover")
        own = re.search(r"\d+ packets transmitted.*loss", self._type(second, "kill -INT $!; wait $!; tail -n 3 /pings"))
        line = self._timeline(pings)
        print(f"\nThe guest's own pings of the station: {own[0] if own else 'not to be read'}")
        show(second, f"kvmpy stop {MACHINE}")
        return line

    def _options(self) -> str:
        """What another NIC than the example's takes."""
        said = [f"--set device.{PRIMARY}.host={self._here}"]
        if self._nics.mac:
            said.append(f"--set device.{STANDBY}.mac={self._nics.mac}")
            said.append(f"--set 'boot.cmdline={self._command_line()}'")
        return " ".join(said)

    def _command_line(self) -> str:
        modules = f"modules=button,evdev,virtio_pci,virtio_net,{self._nics.driver}"
        return f"console=ttyS0 quiet panic=-1 mitigations=off {modules} address={ADDRESS}/24"

    def _ping(self) -> Process:
        """The station pings the guest, which boots."""
        begun = time.monotonic()
        pings = self._pair.first.spawn(
            ["ip", "netns", "exec", STATION, "python", "-I", "-S", str(SOURCES / "pinger.py"), ADDRESS]
        )
        pings.expect("answered", PATIENCE)
        print(f"The guest answers after {time.monotonic() - begun:.0f} s: a station pings it ten times a second.")
        return pings

    def _type(self, host: EmulatedHost, command: str) -> str:
        """Type a command into the guest's shell, as by `kvmpy console`; returns what it printed."""
        console = host.spawn(["kvmpy", "console", MACHINE], tty=True)
        console.expect("attached", PATIENCE)
        console.send("\n")
        console.expect(PROMPT, PATIENCE)
        print(f"{PROMPT}{command}", flush=True)
        console.send(f"{command}\n")
        console.expect("\n", PATIENCE)
        said = console.expect(PROMPT, PATIENCE).string
        console.signal(15)
        console.wait()
        return said

    def _timeline(self, pings: Process) -> Timeline:
        pings.close_stdin()
        pings.wait(PATIENCE)
        report = self._pair.first.run(["cat", REPORT], check=True).stdout
        try:
            return with_pings(from_json(report.encode()), pings.output)
        except ValueError as e:
            raise LabError(str(e)) from e


def story(line: Timeline) -> Iterator[str]:
    """The timeline in words."""
    told: list[tuple[float, str]] = []
    for wait in line.waits:
        if wait.what == "leaves":
            told.append((wait.start_ms, f"the guest is asked to let {wait.device_id} go"))
            if wait.end_ms is not None:
                told.append((wait.end_ms, f"it has let {wait.device_id} go; now its memory is sent"))
        elif wait.end_ms is not None:
            told.append((wait.end_ms, f"it has the other host's NIC, {wait.device_id} there, in use"))
    told += [(stretch.start_ms, f"its frames take the {stretch.path}") for stretch in line.paths[1:]]
    told += [
        (gap.end_ms, f"(for the last {gap.end_ms - gap.start_ms:.0f} ms frames for it went nowhere)")
        for gap in line.gaps
    ]
    if line.stopped_ms is not None and line.runs_ms is not None:
        told.append((line.stopped_ms, "it stands still"))
        told.append((line.runs_ms, f"it runs there: the blackout was {line.blackout_ms:.0f} ms"))
    for ms, words in sorted(told, key=lambda entry: round(entry[0])):
        yield f"{ms / 1000:8.2f}  {words}"
    if line.pings:
        yield f"\nOf the station's pings: {line.pings.summary()}."


if __name__ == "__main__":
    sys.exit(main())
