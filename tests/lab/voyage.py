"""A guest with a failover pair that goes from one process of a host to another and back, and what is seen of it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.lab.hardware import STATION, STATION_ADDRESS
from scripts.lab.process import Process
from tests.lab.guest import Guest, poll
from tests.lab.journey import Pings, pinged
from tests.lab.nics import NicHost
from tests.lab.test_failover import ALL_HEARD, ALONE, MAC, PICTURE, PRIMARY, STANDBY, TRIO, pair, primary
from tests.lab.test_network import EVENTS

SEATS: Final = ("one", "two")
GUEST: Final = "10.77.0.50"
STREAM: Final = "/run/voyage.sock"
SLOW: Final = 300.0
MARGIN: Final = 5.0
"""Seconds around a gap: what it does not have is the guest's (docs/failover.md), and long in an emulated host."""


class Events:
    """What a machine tells its monitor's clients, from now on."""

    def __init__(self, host: NicHost, name: str) -> None:
        self.process = host.spawn(["python", "-I", "-S", "-c", EVENTS, f"/run/kvmpy/{name}/qmp.sock"])
        self.process.expect("listening", SLOW)

    def wait(self, event: str, word: str = "") -> None:
        """For the next one, with ``word`` in it."""
        self.process.expect(re.compile(rf'"{event}"[^\n]*"{word}"' if word else f'"{event}"'), SLOW)

    def all(self) -> list[tuple[float, str, dict[str, Any]]]:
        """Each with its time, by the host's clock."""
        lines = [line for line in self.process.output.splitlines() if line.startswith("{") and line.endswith("}")]
        told = [message for message in map(json.loads, lines) if "event" in message]
        return [(_seconds(message["timestamp"]), message["event"], message.get("data", {})) for message in told]

    def names(self) -> list[str]:
        """In their order, those of a migration with its status."""
        return [f"{name} {data['status']}" if name == "MIGRATION" else name for _, name, data in self.all()]

    def at(self, event: str) -> list[float]:
        return [moment for moment, name, _ in self.all() if name == event]


@dataclass
class Journey:
    """A migration that is over."""

    code: int
    said: str
    pings: Pings
    source: Events
    destination: Events | None
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def excused(self) -> list[tuple[float, float]]:
        """When pings may be lost: while the guest stands still, and in the gap of each change of its path."""
        told = [*self.source.all(), *(self.destination.all() if self.destination else ())]
        stops, resumes = ([at for at, name, _ in told if name == wanted] for wanted in ("STOP", "RESUME"))
        spans = [(min(stops), max(resumes))] if stops and resumes else []
        for at, _, data in told:
            if "rx-gap-ms" in data:
                spans.append((at - data["rx-gap-ms"] / 1000, at))
        return spans

    @property
    def unexcused(self) -> list[float]:
        """When those pings were sent that were lost for no good reason."""
        lost = [sent for sent, answered in self.pings.entries if answered is None]
        return [at for at in lost if not any(a - MARGIN <= at <= b + MARGIN for a, b in self.excused)]


class Voyage:
    """The guest, and the two seats that it can be in: processes "one" and "two", each with a function of the host's."""

    def __init__(self, host: NicHost, *, mac: str = MAC, driver: str = "igbvf") -> None:
        self.host, self.mac, self._driver = host, mac, driver
        self.here = 0
        self._stack = ExitStack()
        self._config = pair(host.functions[0]).replace("tap-pair", "tap-one").replace(MAC, mac)
        self.words = f"modules=virtio_pci,virtio_net,{driver} address={GUEST}/24"
        self.trio, self.alone = (
            [line.replace(MAC, mac).replace("igbvf", driver) for line in lines] for lines in (TRIO, ALONE)
        )

    # Machines

    def board(self) -> None:
        """Boot the guest in the first seat."""
        self.guest = self._stack.enter_context(self.machine(0))
        self.guest.wait_shell()
        self.picture(self.trio)
        self.wait_heard()

    def leave(self) -> None:
        """End it, wherever it is."""
        self._stack.close()
        for name in SEATS:
            self.host.run(
                ["sh", "-c", f"kvmpy stop {name} 2>&-; rm -rf /run/kvmpy/{name}; ip link del tap-{name} 2>&-"]
            )

    @property
    def name(self) -> str:
        """Of the process that the guest is in."""
        return SEATS[self.here]

    @property
    def other(self) -> str:
        return SEATS[1 - self.here]

    def machine(self, seat: int, options: str = "", *, primary: bool = True) -> Guest:
        """One seat differs from the other in its tap and in its function, which are the host's business."""
        own = f"--set netdev.tap-{STANDBY}.ifname=tap-{SEATS[seat]}"
        config = self._config
        if primary:
            own += f" --set device.{PRIMARY}.host={self.host.functions[seat]}"
        else:
            config = config[: config.index('[[device]]\ndriver = "vfio-pci"')]
        return Guest(
            self.host, SEATS[seat], kernel="generic", tables=config, words=self.words, options=f"{own} {options}"
        )

    @contextmanager
    def waiting(self, *, primary: bool = True) -> Iterator[Guest]:
        """The other seat, which waits for the guest; it ends unless the guest has come."""
        self.host.run(["rm", "-f", STREAM], check=True)
        with self._seated(f"--incoming unix:{STREAM}", primary=primary) as there:
            there.await_listening()
            yield there

    @contextmanager
    def restored(self, path: str) -> Iterator[Guest]:
        """The other seat, which has the guest from a file."""
        with self._seated(f"--incoming file:{path}") as there:
            there.await_status("running")
            yield there

    @contextmanager
    def _seated(self, options: str, *, primary: bool = True) -> Iterator[Guest]:
        with ExitStack() as stack:
            there = stack.enter_context(self.machine(1 - self.here, options, primary=primary))
            yield there
            if self.guest is there:
                self._stack.push(stack.pop_all())

    def parameters(self, **words: object) -> None:
        """For migrations from where the guest is now."""
        self.qmp("migrate-set-parameters", *(f"{key.replace('_', '-')}={value}" for key, value in words.items()))

    def qmp(self, command: str, *words: str) -> Any:
        """Of the machine that has the guest."""
        return self.guest.qmp(command, *words)

    # Migrations

    def migrate(self, *options: str) -> Process:
        return self.host.spawn(["kvmpy", "migrate", self.name, f"unix:{STREAM}", *options])

    def moved(self, there: Guest) -> None:
        """The guest is in the other seat now."""
        assert self.guest.wait_end() == 0
        self.guest, self.here = there, 1 - self.here

    def go(self, *options: str, keep: bool = False) -> Journey:
        """To the other seat, pinged meanwhile; its pair is there again, and heard."""
        seen: list[Pings] = []
        self.picture(self.trio)
        report = f"/run/{self.name}.json"
        with self.waiting() as there:
            source, destination = Events(self.host, self.name), Events(self.host, self.other)
            with pinged(self.host, GUEST, seen, netns=STATION):
                command = self.migrate("--report", report, *(["--keep"] if keep else ()), *options)
                code = command.wait(SLOW)
                assert code == 0, command.output
                destination.wait("FAILOVER_PRIMARY_PLUGGED", PRIMARY)
                self._picture_of(there, self.trio)
                self._wait_heard(there)
            if keep:
                self.guest = there
                self.here = 1 - self.here
            else:
                self.moved(there)
        journey = Journey(code, command.output, seen[0], source, destination)
        journey.figures = json.loads(self.host.run(["cat", report], check=True).stdout)
        return journey

    @contextmanager
    def going_nowhere(self, *options: str) -> Iterator[tuple[Process, Events, list[Journey]]]:
        """Begin to migrate, pinged meanwhile. Whatever is done about it: the guest stays, and has its pair."""
        seen: list[Pings] = []
        ended: list[Journey] = []
        self.picture(self.trio)
        with self.waiting() as there:
            events = Events(self.host, self.name)
            with pinged(self.host, GUEST, seen, netns=STATION):
                command = self.migrate(*options)
                yield command, events, ended
                code = command.wait(SLOW)
                self.await_state("plugged")
                self.picture(self.trio)
                self.wait_heard()
            there.process.wait(SLOW)
        ended.append(Journey(code, command.output, seen[0], events, None))

    # What the guest has

    def picture(self, trio: list[str]) -> None:
        """Wait until the guest has these interfaces."""
        self._picture_of(self.guest, trio)

    def _picture_of(self, guest: Guest, trio: list[str]) -> None:
        there = f"[ $(ls -d /sys/class/net/e* | wc -l) = {len(trio)} ]"
        enslaved = " && [ -e /sys/class/net/eth2/master ]" if trio is self.trio else ""
        guest.type(f"n=0; until {{ {there}{enslaved}; }} || [ $n = 1500 ]; do sleep 0.1; n=$((n + 1)); done", SLOW)
        assert guest.type(PICTURE, SLOW).splitlines() == trio

    def wait_heard(self) -> None:
        """Between the moment that a primary is taken in and that its link is up the guest hears nothing."""
        self._wait_heard(self.guest)

    def _wait_heard(self, guest: Guest) -> None:
        heard = f"n=0; until busybox ping -c 1 -W 2 {STATION_ADDRESS} >&- || [ $n = 120 ]; do n=$((n + 1)); done"
        assert guest.type(f"{heard}; [ $n != 120 ]; echo $?", SLOW) == "0"

    def assert_all_heard(self) -> None:
        said = self.guest.type(f"busybox ping -q -i 0.2 -c 10 -W 20 {STATION_ADDRESS} | grep loss", SLOW)
        assert said == ALL_HEARD

    def pair(self) -> dict[str, Any]:
        (found,) = self.qmp("query-failover")
        assert isinstance(found, dict)
        return found

    def give(self, function: str) -> None:
        """Plug in a primary."""
        self.qmp("device_add", *(f"{key}={value}" for key, value in primary(function).items()))
        self.await_state("plugged")

    def await_state(self, state: str) -> None:
        """Of the pair, as the machine has it."""
        poll(lambda: bool(self.pair()["state"] == state))

    def await_prepared(self) -> None:
        """The destination has told the machine that it has prepared its primary."""
        poll(lambda: '"prepared"' in json.dumps(self.qmp("query-migrate")))

    # Threads of the machine

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The vCPUs stand still, and the rest of the process goes on: the freezer of a threaded cgroup."""
        pid = self.guest.status()["pid"]
        threads = [cpu["thread-id"] for cpu in self.qmp("query-cpus-fast")]
        at = "/sys/fs/cgroup/voyage"
        mounted = "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup"
        make = f"{mounted}; mkdir -p {at}/vcpus; echo {pid} >{at}/cgroup.procs"
        move = "; ".join(f"echo {thread} >{at}/vcpus/cgroup.threads" for thread in threads)
        freeze = f"echo 1 >{at}/vcpus/cgroup.freeze; until grep -q 'frozen 1' {at}/vcpus/cgroup.events; do :; done"
        self.host.run(["sh", "-ec", f"{make}; echo threaded >{at}/vcpus/cgroup.type; {move}; {freeze}"], check=True)
        try:
            yield
        finally:
            self.host.run(["sh", "-ec", f"echo 0 >{at}/vcpus/cgroup.freeze; echo {pid} >/sys/fs/cgroup/cgroup.procs"])
            self.host.run(["sh", "-c", f"rmdir {at}/vcpus {at}"])

    def kill(self, name: str) -> None:
        """SIGKILL, and what it leaves."""
        self.host.run(["sh", "-c", f"kill -{signal.SIGKILL} $(cat /run/kvmpy/{name}/pid)"], check=True)

    def sweep(self, name: str) -> None:
        """What a killed process has left."""
        self.host.run(["sh", "-c", f"rm -rf /run/kvmpy/{name}; ip link delete tap-{name}"])


def _seconds(stamp: dict[str, int]) -> float:
    return stamp["seconds"] + stamp["microseconds"] / 1e6
