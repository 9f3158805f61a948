"""Network devices on real taps, served by a real io thread: what one host sends reaches the other, and is the same.

Two network namespaces are two hosts, each with a tap and a device on it; the drivers of the two devices are one, which
sends on the one what it gets from the other. So the kernel's own TCP is on both ends, with its checksums left undone
and its segments of 64 KiB, and checks that nothing is lost, repeated or changed.
"""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kvmpy.abi.virtio import feature_mask
from kvmpy.devices.virtio.net import VirtioNet
from kvmpy.devices.virtio.net_control import Class
from kvmpy.devices.virtio.net_frames import LARGEST
from kvmpy.devices.virtio.net_state import NetFeature
from kvmpy.host.reactor import Reactor
from kvmpy.host.tap import Tap
from tests.counts import count
from tests.fakes.loop import BOUND, each, running, settle
from tests.fakes.net_rig import MAC, MERGEABLE, RX, TX
from tests.fakes.tap import HEADER
from tests.fakes.virtio_driver import guest_memory
from tests.fakes.virtio_rig import Guest
from tests.host.conftest import Namespace
from tests.host.test_tap import EXPERIMENT, NAME, OTHER, Network, frame

SEGMENTED = feature_mask(
    NetFeature.CSUM,
    NetFeature.GUEST_CSUM,
    NetFeature.HOST_TSO4,
    NetFeature.GUEST_TSO4,
    NetFeature.HOST_ECN,
    NetFeature.GUEST_ECN,
)
CONTROL = feature_mask(NetFeature.CTRL_VQ, NetFeature.CTRL_RX, NetFeature.MQ)
RING = 64
ROOM = 68 << 10  # a frame of any size in one chain
PIECE = 4096  # of the buffers that are lent for receiving


class Host:
    """A network namespace with a tap, a device on it, and a driver."""

    def __init__(self, netns: Namespace, loop: Reactor, queues: int = 1) -> None:
        self.netns, self.loop = netns, loop
        self.tap = Tap.open(NAME, queues, netns=netns.path)
        self.tap.set_up()
        self.memory = guest_memory((3 * queues + 1) * RING * ROOM)
        self.net = VirtioNet("net1", self.memory, loop, self.tap, MAC)
        self.guest = Guest(self.net, self.memory, size=RING, room=ROOM)

    def lend(self, size: int = PIECE, queue: int = RX) -> None:
        """Offer every free descriptor for receiving."""
        ring = self.guest.queues[queue]
        while ring.free:
            ring.offer(writable=[size], publish=False)
        ring.publish()
        self.guest.kick(queue)

    def received(self, queue: int = RX) -> list[bytes]:
        """Frames that have come, each with its header."""
        ring, frames = self.guest.queues[queue], []
        used = iter(ring.used())
        for head, written in used:
            data = ring.content(head)[:written]
            for _ in range(int.from_bytes(data[10:12], "little") - 1):
                head, written = next(used)
                data += ring.content(head)[:written]
            frames.append(data)
        return frames

    def send(self, frames: list[bytes], queue: int = TX) -> list[bytes]:
        """Offer frames for sending, as many as there is room for; returns the others."""
        ring = self.guest.queues[queue]
        ring.used()
        now = min(len(frames), len(ring.free))
        for data in frames[:now]:
            ring.offer([data], publish=False)
        ring.publish()
        self.guest.kick(queue)
        return frames[now:]

    def close(self) -> None:
        self.guest.close()
        self.tap.close()
        self.memory.close()


@pytest.fixture
def loop() -> Iterator[Reactor]:
    with running("io") as loop:
        yield loop


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as resources:
        yield resources


@pytest.fixture
def host(netns: Namespace, loop: Reactor, resources: ExitStack) -> Host:
    host = Host(netns, loop)
    resources.callback(host.close)
    return host


@pytest.fixture
def network(netns: Namespace, host: Host, resources: ExitStack) -> Network:
    network = Network(netns, NAME)
    resources.callback(network.socket.close)
    return network


def until(host: Host, done: Callable[[], bool]) -> None:
    """Wait for the io thread's work."""
    for _ in range(1000):
        if done():
            return
        settle(host.loop)
    raise AssertionError("it never comes")


def gather(host: Host, got: list[bytes], enough: int) -> None:
    """Add the frames of the experiment to ``got``, without headers, until they are ``enough``, lending all the time."""

    def come() -> bool:
        came = [data[12:] for data in host.received()]
        got.extend(data for data in came if data[12:14] == EXPERIMENT.to_bytes(2, "big"))
        host.lend()
        return len(got) >= enough

    until(host, come)


def test_every_frame_to_the_guest_arrives_once_and_in_order(host: Host, network: Network) -> None:
    host.guest.start(MERGEABLE)
    chance, sent = random.Random(1), 0
    got: list[bytes] = []
    while sent < count(2000, 50_000):
        for _ in range(chance.randrange(150)):  # fewer than a tap holds, often more than the ring
            network.send(frame(MAC, b"%d" % sent))
            sent += 1
        host.lend(chance.choice((100, 1526)))
        gather(host, got, sent)
    assert got == [frame(MAC, b"%d" % number) for number in range(sent)]


def test_every_frame_from_the_guest_arrives_once_and_in_order(host: Host, network: Network) -> None:
    host.guest.start(MERGEABLE)
    for first in range(0, count(2000, 50_000), 50):  # fewer than a socket holds
        frames = [frame(OTHER, b"%d" % number) for number in range(first, first + 50)]
        assert host.send([HEADER + data for data in frames]) == []
        assert [network.sees() for _ in frames] == frames


def test_broken_header_costs_that_frame_alone(host: Host, network: Network) -> None:
    host.guest.start(MERGEABLE)
    host.send([b"\xff" * 12 + frame(OTHER, b"broken"), HEADER + frame(OTHER, b"whole")])
    assert network.sees() == frame(OTHER, b"whole")
    assert host.net.info()["userspace"]["tx-dropped"] == 1


def test_kernel_drops_what_the_driver_did_not_ask_for(host: Host, network: Network) -> None:
    network.send(frame(MAC, b"too early"))
    host.guest.start(MERGEABLE | CONTROL & ~feature_mask(NetFeature.MQ))
    control = host.guest.queues[2]
    control.offer([bytes((Class.RX, 0)), b"\0"], [1])
    host.guest.kick(2)
    until(host, lambda: bool(control.used()))
    host.lend()
    network.send(frame(OTHER, b"another's"))
    network.send(frame(MAC, b"ours"))
    got: list[bytes] = []
    gather(host, got, 1)
    assert got == [frame(MAC, b"ours")]


def test_link_that_is_down_costs_the_host_nothing(host: Host, network: Network) -> None:
    host.guest.start(MERGEABLE)
    host.lend()
    host.net.set_link(up=False)
    settle(host.loop)
    before = host.net.info()["userspace"]["rx-dropped"]  # what the kernel itself had sent, a router solicitation say
    for _ in range(100):
        network.send(frame(MAC, b"lost"))
    settle(host.loop)
    assert host.net.info()["userspace"]["rx-dropped"] == before
    host.net.set_link(up=True)
    network.send(frame(MAC, b"back"))
    got: list[bytes] = []
    gather(host, got, 1)
    assert got == [frame(MAC, b"back")]


class Cable:
    """Carries frames between two hosts' drivers, in a thread of its own. ``segments`` counts frames above an MTU."""

    def __init__(self, one: Host, other: Host) -> None:
        self._ends = ((one, other), (other, one))
        self._waiting: dict[int, list[bytes]] = {0: [], 1: []}
        self._ending = threading.Event()
        self.segments = 0
        self._thread = threading.Thread(target=self._carry, name="cable")
        for host, _ in self._ends:
            host.guest.start(MERGEABLE | SEGMENTED)

    def _carry(self) -> None:
        idle = False
        while not self._ending.wait(0.0005 if idle else 0):  # spinning would keep the GIL from the io thread
            idle = True
            for index, (source, target) in enumerate(self._ends):
                frames = source.received()
                idle = idle and not frames
                source.lend()
                self.segments += sum(len(frame) > 2000 for frame in frames)
                # As it came, but how many buffers it took is no driver's to say.
                self._waiting[index] += [frame[:10] + b"\0\0" + frame[12:] for frame in frames]
                self._waiting[index] = target.send(self._waiting[index])

    def __enter__(self) -> Cable:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


@pytest.fixture
def hosts(netns: Namespace, other_netns: Namespace, loop: Reactor, resources: ExitStack) -> tuple[Host, Host]:
    """10.0.0.1 and 10.0.0.2."""
    made = []
    for number, namespace in enumerate((netns, other_netns), 1):
        made.append(host := Host(namespace, loop))
        resources.callback(host.close)
        namespace.ip("address", "add", f"10.0.0.{number}/24", "dev", NAME)
    return made[0], made[1]


def test_tcp_runs_over_it_with_segments_left_whole(hosts: tuple[Host, Host]) -> None:
    data = random.Random(2).randbytes(count(16, 200) << 20)
    with Cable(*hosts) as cable, hosts[1].netns.run(lambda: socket.create_server(("10.0.0.2", 7))) as server:
        server.settimeout(BOUND)
        client = hosts[0].netns.run(lambda: socket.create_connection(("10.0.0.2", 7), BOUND))
        # The host's default may pace by the round trip, which here is the interpreter's switch interval.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        client.settimeout(None)  # the receiver's bounds this too
        sender = threading.Thread(target=each(lambda: client.sendall(data), client.close))
        sender.start()
        got, peer = hashlib.sha256(), server.accept()[0]
        peer.settimeout(BOUND)
        while piece := peer.recv(1 << 20):
            got.update(piece)
        sender.join()
        peer.close()
    assert got.digest() == hashlib.sha256(data).digest()
    assert cable.segments > 100
    assert hosts[0].net.info()["userspace"]["rx-dropped"] == 0


def test_pairs_share_the_frames(netns: Namespace, loop: Reactor, resources: ExitStack) -> None:
    host = Host(netns, loop, queues=2)
    resources.callback(host.close)
    netns.ip("address", "add", "10.0.0.1/24", "dev", NAME)
    netns.ip("neighbour", "add", "10.0.0.2", "lladdr", MAC.hex(":"), "dev", NAME)
    host.guest.start(MERGEABLE | CONTROL)
    control = host.guest.queues[4]
    control.offer([bytes((Class.MQ, 0)), b"\2\0"], [1])
    host.guest.kick(4)
    until(host, lambda: bool(control.used()))
    for queue in (0, 2):
        host.lend(1526, queue)
    for _ in range(40):  # each from a port of its own
        with netns.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.sendto(b"hello", ("10.0.0.2", 9))
    got: dict[int, int] = {0: 0, 2: 0}

    def collect() -> bool:
        for queue in got:
            got[queue] += sum(b"hello" in data for data in host.received(queue))
        return sum(got.values()) == 40

    until(host, collect)
    assert min(got.values()) > 0


def test_large_frame_fits_the_largest_that_is_expected() -> None:
    assert LARGEST <= ROOM


def test_a_bridge_learns_from_an_announcement_where_the_guest_is(host: Host, netns: Namespace) -> None:
    netns.ip("link", "add", "br0", "type", "bridge")
    netns.ip("link", "set", "br0", "up")
    netns.ip("link", "set", NAME, "master", "br0")

    def learned() -> bool:
        command = ["bridge", "fdb", "show", "dynamic", "brport", NAME]
        shown = netns.run(lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        return MAC.hex(":") in shown

    assert not learned()
    until(host, lambda: "forwarding" in netns.ip("-d", "link", "show", NAME))
    assert host.net.announce_from_here()
    until(host, learned)
