"""Run on an emulated host beside a guest, of kvmpy's or QEMU's: how long a plug and an unplug take. Standard library.

    python plug_times.py ROUNDS BRIDGE CONTENDERS         prints a line of JSON

CONTENDERS is JSON, by name of each: its QMP "socket", the tables "net" and "blk" for device_add, and the file "disk".
The guest's side is `GUEST_LOOP` of hotplug.py: once a network device is there it gives it an address and pings; once a
disk is there it writes to it. A network device is usable when its first echo request arrives on BRIDGE, a disk when its
file has changed; both are gone when DEVICE_DELETED comes. Each turn waits until the guest has seen that too.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

POLL = 0.005
PATIENCE = 120.0
REST = 3.0  # a guest polls, and pciehp may still be at work
ETH_P_IP = 0x0800


class Qmp:
    """One session."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(path)
        self._lines = self._socket.makefile()
        self._events: list[dict[str, Any]] = []
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, name: str, **arguments: Any) -> None:
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline())):
            self._events.append(answer)
        if "error" in answer:
            raise SystemExit(f"{name} {arguments}: {answer}")

    def wait_deleted(self, name: str) -> None:
        while True:
            event = self._events.pop(0) if self._events else json.loads(self._lines.readline())
            if event.get("event") == "DEVICE_DELETED" and event["data"].get("device") == name:
                return


def pinged(bridge: str) -> Callable[[], None]:
    """A wait for the next echo request on ``bridge``."""
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
    frames.bind((bridge, ETH_P_IP))
    frames.settimeout(PATIENCE)

    def wait() -> None:
        with frames:
            while True:
                frame = frames.recv(2048)
                if frame[23] == 1 and frame[34] == 8:
                    return

    return wait


def written(path: str) -> Callable[[], None]:
    """A wait for a change of the beginning of ``path``."""

    def head() -> bytes:
        with open(path, "rb") as file:
            return file.read(512)

    before = head()

    def wait() -> None:
        end = time.monotonic() + PATIENCE
        while head() == before:
            if time.monotonic() > end:
                raise SystemExit(f"{path}: never written")
            time.sleep(POLL)

    return wait


def turn(qmp: Qmp, bridge: str, tables: dict[str, Any], times: dict[str, list[float]]) -> None:
    """A network device and a disk come and go, once each."""
    for kind, ready in (("net", pinged(bridge)), ("blk", written(tables["disk"]))):
        table = tables[kind]
        begin = time.monotonic()
        qmp("device_add", **table)
        answered = time.monotonic()
        ready()
        used = time.monotonic()
        times.setdefault(f"{kind} asked", []).append(answered - begin)
        times.setdefault(f"{kind} in", []).append(used - answered)
        times.setdefault(f"{kind} usable", []).append(used - begin)
        time.sleep(REST)
        begin = time.monotonic()
        qmp("device_del", id=table["id"])
        qmp.wait_deleted(table["id"])
        times.setdefault(f"{kind} out", []).append(time.monotonic() - begin)
        time.sleep(REST)


def main(rounds: str, bridge: str, contenders: str) -> None:
    known: dict[str, dict[str, Any]] = json.loads(contenders)
    times: dict[str, dict[str, list[float]]] = {who: {} for who in known}
    sessions = {path: Qmp(path) for path in {tables["socket"] for tables in known.values()}}
    for number in range(int(rounds)):
        for who, tables in list(known.items())[:: -1 if number % 2 else 1]:
            turn(sessions[tables["socket"]], bridge, tables, times[who])
            print(who, {what: round(each[-1], 3) for what, each in times[who].items()}, file=sys.stderr)
    print(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
