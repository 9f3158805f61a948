"""Pings an address ten times a second until it is told to end, and says what came back: a line of JSON for each ping.

Started in an emulated host with ``python -I -S``. Stamps are CLOCK_REALTIME in seconds; "answered" is null for a ping
that got no answer. A ping is answered late rather than lost where somebody kept it: so those that are missing in the
end are waited for.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

PERIOD = 0.1
LAST_SECONDS = 5.0
ECHO_REQUEST, ECHO_REPLY = 8, 0


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    folded: int = total + (total >> 16)
    return ~folded & 0xFFFF


def request(number: int) -> bytes:
    body = struct.pack("!HH", os.getpid() & 0xFFFF, number & 0xFFFF) + b"kvmpy pinger"
    return struct.pack("!BBH", ECHO_REQUEST, 0, checksum(struct.pack("!BBH", ECHO_REQUEST, 0, 0) + body)) + body


def main(address: str) -> None:
    sent: list[float] = []
    answered: dict[int, float] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as wire:
        begun, ending = time.time(), 0.0
        while not ending or (len(answered) < len(sent) and time.time() < ending):
            due = begun + len(sent) * PERIOD
            if not ending and time.time() >= due:
                wire.sendto(request(len(sent)), (address, 0))
                sent.append(time.time())
                due += PERIOD
            readable, _, _ = select.select([wire, *([] if ending else [sys.stdin])], [], [], max(0, due - time.time()))
            if wire in readable:
                take(wire.recv(2048), answered)
                if len(answered) == 1 and not ending:
                    print("answered", flush=True)
            elif readable:
                ending = time.time() + LAST_SECONDS
    for number, moment in enumerate(sent):
        print(json.dumps({"sent": moment, "answered": answered.get(number)}))


def take(packet: bytes, answered: dict[int, float]) -> None:
    """Note an answer of ours, the first to each ping."""
    header = (packet[0] & 15) * 4
    kind, _, _, process, number = struct.unpack_from("!BBHHH", packet, header)
    if kind == ECHO_REPLY and process == os.getpid() & 0xFFFF:
        answered.setdefault(number, time.time())


if __name__ == "__main__":
    main(sys.argv[1])
