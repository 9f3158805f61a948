"""Run on an emulated host: guests with failover pairs go from one process to another and back. Standard library.

    python failover_turns.py ROUNDS PINGER CONTENDERS         prints a line of JSON: by name of each, its turns' figures

They take turns. CONTENDERS is JSON, by name: the guest's "address" and "mac", whether it has a "primary", and two
"seats", between which it goes there and back: each with "command", which starts a VMM there, "incoming", the words that
have it wait for a guest, "uri", where that waits, its sockets "qmp" and "serial", and "hooks": what is run at which
status of the source's or event of the destination's. Nothing is known of the VMM but QMP, which both speak.

A turn's times are those of its events, which the VMMs have stamped by this host's clock, and those at which lines came
from the guest's serial line: it repeats there what its kernel says of the pair. A ping that was answered late is not
lost; "gap" is the longest time between two pings that were answered with lost ones in between.
"""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

PATIENCE = 240.0
REST = 8.0  # pciehp takes no press while it still blinks, and QEMU does not press again
STATION = "station"
WATCH = "grep -E 'primary slave|Link is Up' /dev/kmsg &"
PICTURE = "for n in /sys/class/net/e*; do m=$(readlink $n/master); echo ${n##*/} $(cat $n/address) ${m##*/}; done"
ENSLAVED, RELEASED, LINK = "primary slave:eth2 registered", "primary slave:eth2 unregistered", "Link is Up"
GONE = ("completed", "failed", "cancelled")


class Journal:
    """Lines that come from somewhere, with the time of each, and waits for one of them."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []
        self._news = threading.Condition()

    def add(self, at: float, line: str) -> None:
        with self._news:
            self.lines.append((at, line))
            self._news.notify_all()

    def find(self, text: str, since: float = 0.0) -> float | None:
        return next((at for at, line in self.lines if at >= since and text in line), None)

    def wait(self, text: str, since: float = 0.0) -> float:
        """When the first line with ``text`` came."""
        with self._news:
            if not self._news.wait_for(lambda: self.find(text, since) is not None, PATIENCE):
                raise SystemExit(f"{text!r} never came: {self.lines[-30:]}")
        return self.find(text, since) or 0.0


class Serial(Journal):
    """A guest's serial line."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._socket = connected(path)
        self._marks = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        left = b""
        with suppress(OSError):
            while data := self._socket.recv(4096):
                *lines, left = (left + data).split(b"\n")
                for line in lines:
                    self.add(time.time(), line.decode(errors="replace").strip())

    def type(self, command: str) -> list[str]:
        """What the guest's shell answers. What is typed is echoed, so the marks are not typed as they are printed."""
        self._marks += 1
        begun = len(self.lines)
        end = "" if command.endswith("&") else ";"
        self._socket.sendall(f"{command}{end} echo DONE$(({self._marks}))\n".encode())
        self.wait(f"DONE{self._marks}")
        return [line for _, line in self.lines[begun:]]

    def close(self) -> None:
        self._socket.close()


class Qmp(Journal):
    """A session. Its events are lines: ``STOP``, ``MIGRATION active``."""

    def __init__(self, path: str, on_event: Callable[[str], None]) -> None:
        super().__init__()
        self._socket, self._on_event = connected(path), on_event
        self._file = self._socket.makefile()
        self._answers = Journal()
        self._asked = 0
        self._file.readline()
        threading.Thread(target=self._read, daemon=True).start()
        self("qmp_capabilities")
        self("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._file:
                message = json.loads(line)
                if "event" not in message:
                    self._answers.add(0.0, json.dumps(message))
                    continue
                stamp = message["timestamp"]
                name = f"{message['event']} {message.get('data', {}).get('status', '')}".strip()
                self.add(stamp["seconds"] + stamp["microseconds"] / 1e6, name)
                self._on_event(name)

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._asked += 1
        question = {"execute": command, "arguments": arguments, "id": f"n{self._asked}."}
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        self._answers.wait(f'"n{self._asked}."')
        answer = next(json.loads(line) for _, line in self._answers.lines if f'"n{self._asked}."' in line)
        if "error" in answer:
            raise SystemExit(f"{command} {arguments}: {answer}")
        return answer["return"]


class Process:
    """A VMM in one of a contender's seats."""

    def __init__(self, seat: dict[str, Any], side: str, *, incoming: bool) -> None:
        self.seat, self._hooks, self._side = seat, dict(seat["hooks"]), side
        self.output = open(f"{seat['serial']}.log", "a")  # noqa: SIM115  it is the process's
        words = [*seat["command"], *(seat["incoming"] if incoming else ())]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)
        self.serial = Serial(seat["serial"])
        self.qmp = Qmp(seat["qmp"], self._event)

    def become(self, side: str) -> None:
        self._side = side

    def _event(self, name: str) -> None:
        for words in self._hooks.get(f"{self._side}:{name}", ()):
            subprocess.run(words, check=True)

    def end(self) -> None:
        with suppress(SystemExit, OSError):
            self.qmp("quit")
        self.process.wait(PATIENCE)
        self.serial.close()


class Contender:
    """A guest that goes there and back."""

    def __init__(self, name: str, known: dict[str, Any], pinger: str) -> None:
        self._name, self._known, self._pinger = name, known, pinger
        self._here = 0
        self._source = self._start(0, incoming=False)
        self.turns: list[dict[str, float | None]] = []

    def boot(self) -> None:
        """Wait until it is up, and see that it has a pair."""
        serial = self._source.serial
        serial.wait("KVMPY-GUEST UP")
        serial.type(WATCH)
        if self._known["primary"]:
            wait = "n=0; until [ -e /sys/class/net/eth2/master ] || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done"
            serial.type(wait)
        self._assert_picture(self._source)

    def _start(self, place: int, *, incoming: bool) -> Process:
        side = "destination" if incoming else "source"
        return Process(self._known["seats"][place], side, incoming=incoming)

    def _assert_picture(self, there: Process) -> None:
        mac = self._known["mac"]
        trio = [f"eth0 {mac}", f"eth1 {mac} eth0", *([f"eth2 {mac} eth0"] if self._known["primary"] else ())]
        shown = [line for line in there.serial.type(PICTURE) if re.match(r"eth\d [0-9a-f:]{17}", line)]
        if shown != trio:
            raise SystemExit(f"{self._name}: no pair in the guest, what follows would prove nothing: {shown}")

    def turn(self) -> None:
        """Go to the other seat."""
        source, there = self._source, self._start(1 - self._here, incoming=True)
        pings: dict[str, float] = {}
        with pinged(self._pinger, self._known["address"], pings):
            begun = time.time()
            source.become("source")
            source.qmp("migrate", uri=there.seat["uri"])
            resumed = there.qmp.wait("RESUME", begun)
            source.qmp.wait("MIGRATION completed", begun)
            enslaved = there.serial.wait(ENSLAVED, resumed) if self._known["primary"] else None
            linked = there.serial.wait(LINK, enslaved) if enslaved else None
            time.sleep(REST)
        self._assert_picture(there)
        stopped, told = source.qmp.wait("STOP", begun), source.qmp("query-migrate")
        asked, active = source.qmp.find("MIGRATION wait-unplug", begun), source.qmp.wait("MIGRATION active", begun)
        self.turns.append(
            {
                "blackout": resumed - stopped,
                "told blackout": told.get("blackout-ms", told["downtime"]) / 1000,
                "wait-unplug": active - asked if asked else None,
                "enslaved": enslaved - resumed if enslaved else None,
                "in service": linked - resumed if linked else None,
                "back": linked - stopped if linked else None,
                "in all": resumed - begun,
                **pings,
            }
        )
        print(self._name, self.turns[-1], parts(told), file=sys.stderr, flush=True)
        source.end()
        self._source, self._here = there, 1 - self._here

    def end(self) -> None:
        self._source.end()


def parts(told: dict[str, Any]) -> dict[str, float]:
    """What the source did while the guest stood still, in ms, where it tells."""
    begun = [phase["start-ms"] for phase in told.get("phases", ()) if phase["name"] == "stop"]
    return {phase["name"]: phase["ms"] for phase in told.get("phases", ()) if begun and phase["start-ms"] >= begun[0]}


@contextmanager
def pinged(program: str, address: str, seen: dict[str, float]) -> Iterator[None]:
    """Pings, ten a second, from a third station, meanwhile."""
    words = ["ip", "netns", "exec", STATION, sys.executable, "-I", "-S", program, address]
    pinger = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert pinger.stdout
    if not select.select([pinger.stdout], [], [], PATIENCE)[0]:
        pinger.kill()
        raise SystemExit(f"{address}: never answers {STATION}")
    yield
    said, _ = pinger.communicate()
    entries = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    heard = [(number, entry["sent"]) for number, entry in enumerate(entries) if entry["answered"] is not None]
    seen["lost"] = len(entries) - len(heard)
    seen["gap"] = max((b - a for (i, a), (j, b) in pairwise(heard) if j > i + 1), default=0.0)


def connected(path: str) -> socket.socket:
    """To a socket that a process is about to make."""
    deadline = time.time() + PATIENCE
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
        except OSError:
            client.close()
            if time.time() > deadline:
                raise
            time.sleep(0.05)
        else:
            return client


def main(rounds: str, pinger: str, contenders: str) -> None:
    known: dict[str, dict[str, Any]] = json.loads(contenders)
    guests = {name: Contender(name, each, pinger) for name, each in known.items()}
    for name, guest in guests.items():
        guest.boot()
        print(name, "is up", file=sys.stderr, flush=True)
    for _ in range(int(rounds)):
        for guest in guests.values():
            guest.turn()
    for guest in guests.values():
        guest.end()
    print(json.dumps({name: guest.turns for name, guest in guests.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
