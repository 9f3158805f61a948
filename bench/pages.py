"""`python -m bench.pages`: the page pump beside what a copy and a plain send of the same memory take, on loopback TCP.

All in one process and in turns, so both ends share this machine's processors: the ratios count, not the seconds.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Final

from kvmpy.host.memory import Mapping
from kvmpy.memory import GuestMemory, Ram
from kvmpy.migration.checksum import checksums
from kvmpy.migration.dirty import DirtyPages
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.pages import PageSender
from tests.fakes.page_channel import FakeChannel

SIZE: Final = 256 << 20
ZEROS: Final = 1 << 30
REPETITIONS: Final = 7
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


def main() -> None:
    with ExitStack() as stack:
        source, destination = guest(stack, SIZE), guest(stack, SIZE)
        blank, blank_too = guest(stack, ZEROS), guest(stack, ZEROS)
        block = os.urandom(MIB)
        for at in range(0, SIZE, MIB):
            source.write(at, block)
        destination.write(0, source.view(0, SIZE))
        ways: dict[str, tuple[int, Callable[[], float]]] = {
            "memcpy": (SIZE, lambda: copy(source, destination)),
            "sendall and recv_into": (SIZE, lambda: plain_send(source, destination)),
            "pump, 1 channel": (SIZE, lambda: pump(source, destination, 1)),
            "pump, 2 channels": (SIZE, lambda: pump(source, destination, 2)),
            "pump, every other page": (SIZE // 2, lambda: pump(source, destination, 1, 2)),
            "pump, by way of a copy": (SIZE, lambda: pump(source, destination, 1, sealed=True)),
            "pump, untouched memory": (ZEROS, lambda: pump(blank, blank_too, 1)),
            "checksums": (SIZE, lambda: seconds(lambda: checksums(source))),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPETITIONS):
            for name, (_, way) in ways.items():
                times[name].append(way())
    report({name: size / median(times[name]) for name, (size, _) in ways.items()})


def report(rates: dict[str, float], peers: Sequence[str] = ("memcpy", "sendall and recv_into")) -> None:
    print(f"{'':26}{'MiB/s':>8}" + "".join(f"  of {peer}" for peer in peers))
    for name, rate in rates.items():
        ratios = "".join(f"{rate / rates[peer]:{len(peer) + 5}.2f}" for peer in peers)
        print(f"{name:26}{rate / MIB:8.0f}{ratios}")


if __name__ == "__main__":
    main()
