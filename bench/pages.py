"""The page pump of a migration beside what a copy and a plain send of the same memory take, on loopback TCP.

All in one process and in turns, so both ends share this machine's processors: the ratios count, not the seconds.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from bench.program import main
from bench.rows import Pair, Row, Way, alternately
from kvmpy.host.memory import Mapping
from kvmpy.memory import GuestMemory, Ram
from kvmpy.migration.checksum import checksums
from kvmpy.migration.dirty import DirtyPages
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.pages import PageSender
from tests.fakes.page_channel import FakeChannel

SIZE: Final = 256 << 20
ZEROS: Final = 1 << 30
REPETITIONS, QUICK = 7, 3
COPY, SOCKET = "memcpy", "bare socket"
MIB: Final = 1 << 20


def tcp_pairs(stack: ExitStack, count: int, *, sealed: bool = False) -> tuple[list[FakeChannel], list[FakeChannel]]:
    """Both ends of connections over loopback."""
    ours, theirs = [], []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(count):
            ours.append(stack.enter_context(socket.create_connection(server.getsockname())))
            theirs.append(stack.enter_context(server.accept()[0]))
    for end in (*ours, *theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return [FakeChannel(end, sealed=sealed) for end in ours], [FakeChannel(end, sealed=sealed) for end in theirs]


def guest(stack: ExitStack, size: int) -> GuestMemory:
    mapping = Mapping(size)
    stack.callback(mapping.close)
    memory = GuestMemory()
    stack.callback(memory.close)
    memory.add(Ram(0, size, mapping))
    return memory


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def copy(source: GuestMemory, destination: GuestMemory) -> float:
    return seconds(lambda: destination.write(0, source.view(0, SIZE)))


def plain_send(source: GuestMemory, destination: GuestMemory) -> float:
    with ExitStack() as stack:
        (ours,), (theirs,) = tcp_pairs(stack, 1)
        view = destination.view(0, SIZE)
        receiver = threading.Thread(target=theirs.receive_into, args=(view,))

        def move() -> None:
            receiver.start()
            ours.send(source.view(0, SIZE))
            receiver.join()

        return seconds(move)


def pump(
    source: GuestMemory, destination: GuestMemory, channels: int, every: int = 1, *, sealed: bool = False
) -> float:
    """``every`` is 1 for all pages, else every so many."""
    with ExitStack() as stack:
        ours, theirs = tcp_pairs(stack, channels, sealed=sealed)
        receiver = PageReceiver(destination, theirs)
        stack.callback(receiver.close)
        receiver.start()
        sender, dirty = PageSender(ours), DirtyPages(source)
        bits = dirty.blocks[0].bits
        if every == 1:
            bits.fill()
        else:
            for page in range(0, bits.size, every):
                bits.set(page, 1)

        def move() -> None:
            sender.send_round(dirty, 1)
            receiver.wait_round(1, 600)

        return seconds(move)


def measure(quick: bool) -> list[Row]:
    """Bytes per second, beside a copy, and beside a socket that both ends do nothing but fill and drain."""
    with ExitStack() as stack:
        source, destination = guest(stack, SIZE), guest(stack, SIZE)
        blank, blank_too = guest(stack, ZEROS), guest(stack, ZEROS)
        block = os.urandom(MIB)
        for at in range(0, SIZE, MIB):
            source.write(at, block)
        destination.write(0, source.view(0, SIZE))
        ways: dict[str, tuple[int, Callable[[], float]]] = {
            COPY: (SIZE, lambda: copy(source, destination)),
            SOCKET: (SIZE, lambda: plain_send(source, destination)),
            "1 channel": (SIZE, lambda: pump(source, destination, 1)),
            "2 channels": (SIZE, lambda: pump(source, destination, 2)),
            "every other page": (SIZE // 2, lambda: pump(source, destination, 1, 2)),
            "by way of a copy": (SIZE, lambda: pump(source, destination, 1, sealed=True)),
            "untouched memory": (ZEROS, lambda: pump(blank, blank_too, 1)),
            "checksums": (SIZE, lambda: seconds(lambda: checksums(source))),
        }
        taken = alternately({name: rate(*way) for name, way in ways.items()}, QUICK if quick else REPETITIONS)
    rates = {name: each["rate"] for name, each in taken.items()}
    return [
        Pair(f"page pump: {name}, of a {peer}", rates[name], rates[peer], "B/s", peer_name=peer).row()
        for name in rates
        if name not in (COPY, SOCKET)
        for peer in (COPY, SOCKET)
    ]


def rate(size: int, way: Callable[[], float]) -> Way:
    return lambda: {"rate": size / way()}


if __name__ == "__main__":
    main("pages", measure)
