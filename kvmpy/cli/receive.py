"""`kvmpy receive`: what `kvmpy migrate NAME ssh://HOST` runs on HOST. It starts the destination and looks after it.

JSON, an object a line: on standard input what is wanted, on standard output what came of it, with "error" if nothing,
and with "problems" beside it where a machine cannot be made here.

    {"start": Wanted}      makes a directory, starts the machine, which waits there for its guest -> {"pid", "log"}
    {"outcome": seconds}   waits until the machine has ended, or has its guest -> {"status"}: "ended", or the machine's
    {"primaries": seconds} waits until the guest has its failover primaries in use -> {"pairs", "events"}: as
                           query-failover says, and what the machine has told
    {"end": true}          the guest will not come: ends the machine unless it has it -> {"status"}

The machine is detached: it outlives us and the session. The end of the input is that of the session, and with it of
every forwarded connection. Then a machine whose guest is still to come has lost it: it ends by itself, or is ended. One
that has its guest goes on. However it ends, the directory goes.

The status is how the other side gets to know what nobody there can: "ended" is the process' end, seen by the kernel,
of a machine that has not told of its guest's running; of one that has it is "shutdown".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final

import msgspec

from kvmpy.cli.client import Client
from kvmpy.config.writer import toml
from kvmpy.errors import ConfigError, HostError, HostProblems, errno_name
from kvmpy.host import rundir

STREAM: Final = "stream.sock"
CONFIG: Final = "config.toml"
ENDED: Final = "ended"
HAS_RUN: Final = "shutdown"
"""The process has ended, too, but its guest has run in it, and its disks are ahead of what its source has."""
INCOMING: Final = "inmigrate"  # the run state of a machine whose guest is still to come
LINE_MOST: Final = 4 << 20
ORPHAN_SECONDS: Final = 30.0
ENDING_SECONDS: Final = 20.0
POLL_SECONDS: Final = 0.2
IDLE_SECONDS: Final = 5.0  # for the guest's driver to have a primary send


class Wanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be started: a configuration's tables, or a file that is here already, and what to change in it."""

    name: str
    directory: str
    config: dict[str, Any] | None = None
    file: str | None = None
    overrides: list[str] = []
    log: str | None = None


def receive(args: argparse.Namespace) -> int:
    """Do what the other end wants, until it goes."""
    machine = Incoming()
    try:
        while line := sys.stdin.buffer.readline(LINE_MOST):
            answer = _answer(machine, line)
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
                sys.stdout.buffer.flush()
    finally:
        machine.abandon()
    return 0


def _answer(machine: Incoming, line: bytes) -> dict[str, Any]:
    try:
        match json.loads(line):
            case {"start": wanted}:
                return machine.start(msgspec.convert(wanted, Wanted))
            case {"outcome": int() | float() as seconds}:
                return {"status": machine.outcome(seconds)}
            case {"primaries": int() | float() as seconds}:
                return machine.primaries(seconds)
            case {"end": True}:
                return {"status": machine.end()}
    except HostProblems as e:
        return {"error": str(e), "problems": e.problems}
    except (HostError, ConfigError) as e:
        return {"error": str(e)}
    except (ValueError, OSError) as e:
        return {"error": f"kvmpy receive: {e}"}
    return {"error": "kvmpy receive: this version does not know what was asked"}


def _problems(said: str) -> list[str]:
    """Of what `kvmpy run` said before it ended, what it ended for."""
    lines = [line for line in said.splitlines() if line]
    return [line for line in lines if not line.startswith("kvmpy: warning: ")] or lines


class Incoming:
    """The machine that waits for its guest, and what was made for it."""

    def __init__(self) -> None:
        self._directory = ""
        self._process = -1  # a pidfd
        self._running: rundir.Running | None = None
        self._listener: Client | None = None  # from before the guest comes: what is told then is not missed

    def start(self, wanted: Wanted) -> dict[str, Any]:
        """Start it. Raises HostError, with what it said, where it does not get so far as to wait."""
        if self._directory:
            raise HostError("kvmpy receive: it has been started")
        try:
            os.mkdir(wanted.directory, 0o700)
        except OSError as e:
            raise HostError(f"{wanted.directory}: {errno_name(e.errno or 0)}: it cannot be made") from e
        self._directory = wanted.directory
        try:
            started = subprocess.run(self._command(wanted), stdin=subprocess.DEVNULL, capture_output=True, check=False)
            said = started.stderr.decode(errors="replace").strip()
            if started.returncode:
                raise HostProblems(*(_problems(said) or [f"kvmpy run ended with {started.returncode}"]))
            self._find(wanted.name)
        except BaseException:
            with contextlib.suppress(HostError):
                self.end()  # what waits by now would wait for ever
            self._clean_up()
            raise
        assert self._running
        return {"pid": self._running.pid, "said": said}

    def outcome(self, seconds: float) -> str:
        """Wait so long for it to have its guest, or to end; returns its status."""
        end = time.monotonic() + seconds
        while (status := self._status()) == INCOMING and time.monotonic() < end:
            self._pause()
        if status == ENDED:
            status = HAS_RUN if self._has_run() else ENDED
            self._clean_up()
        return status

    def primaries(self, seconds: float) -> dict[str, Any]:
        """Wait so long for the guest to take its primaries into use; returns its pairs, and what was told."""
        if self._listener is None:
            raise HostError("kvmpy receive: nobody listens to the machine any more")
        end = time.monotonic() + seconds
        while True:
            pairs = self._listener("query-failover")
            if not any(map(_is_on_its_way, pairs)):
                end = min(end, time.monotonic() + IDLE_SECONDS)
                if not any(map(_is_idle, pairs)):
                    break
            if time.monotonic() >= end:
                break
            self._listener.listen(POLL_SECONDS)
        return {"pairs": pairs, "events": list(self._listener.seen)}

    def end(self) -> str:
        """End it, unless it has its guest."""
        if (status := self._status()) == INCOMING:
            assert self._running
            with contextlib.suppress(HostError), Client(self._running) as client:  # it may have ended by itself
                client.quit()
            status = self._status()
        self._clean_up()
        return status

    def abandon(self) -> None:
        """Nobody is there any more to say how it went on."""
        if self._directory:
            with contextlib.suppress(HostError):
                self.outcome(ORPHAN_SECONDS)
                self.end()
            self._clean_up()

    def _command(self, wanted: Wanted) -> list[str]:
        path = wanted.file
        if path is None:
            path = os.path.join(wanted.directory, CONFIG)
            with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(toml(wanted.config or {}))
        overrides = [word for override in wanted.overrides for word in ("--set", override)]
        uri = f"unix:{os.path.join(wanted.directory, STREAM)}"
        log = ["--log", wanted.log] if wanted.log else []
        return [
            *(sys.executable, "-m", "kvmpy", "run", path, "--name", wanted.name, *overrides),
            *("--incoming", uri, "--detach", *log),
        ]

    def _find(self, name: str) -> None:
        self._running = rundir.find(name)
        if self._running is None:
            raise HostError(f"{name}: it has ended already; see its log")
        self._process = os.pidfd_open(self._running.pid)
        self._listener = Client(self._running)

    def _status(self) -> str:
        """What it is doing. Raises HostError where it does not say, nor end, for too long: it may be about to end."""
        patience = time.monotonic() + ENDING_SECONDS
        while self._running is not None and not self._has_ended():
            try:
                with Client(self._running) as client:
                    return str(client("query-status")["status"])
            except HostError:
                if time.monotonic() > patience:
                    raise
            self._pause()
        return ENDED

    def _has_ended(self) -> bool:
        return bool(select.select([self._process], [], [], 0)[0])

    def _has_run(self) -> bool:
        """Whether it told of its guest's running before it ended."""
        if self._listener is None:
            return False
        with contextlib.suppress(HostError):  # it has hung up
            for event in chain(tuple(self._listener.seen), self._listener.events()):
                if event.get("event") == "RESUME":
                    return True
        return False

    def _pause(self) -> None:
        select.select([self._process], [], [], POLL_SECONDS)

    def _clean_up(self) -> None:
        """Remove what was made for the start; a machine that runs has read it."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = ""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._process >= 0:
            os.close(self._process)
            self._process = -1
            self._running = None


def _is_on_its_way(pair: Mapping[str, Any]) -> bool:
    """The guest is about to have the pair's primary."""
    hidden = pair["state"] == "hidden" and pair["negotiated"]
    return hidden or pair["state"] in ("plugging", "released", "unplug-requested")


def _is_idle(pair: Mapping[str, Any]) -> bool:
    """The guest has the pair's primary, and does not use it."""
    return bool(pair["state"] == "plugged" and pair["path"] != "primary")
