"""Taps on the real kernel: what is created vanishes, what was there stays, and what is set is so."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from kvmpy.abi import tun
from kvmpy.errors import HostError, IoctlError
from kvmpy.host.tap import OFFLOADS, TSO, USO, Tap, acceptable
from tests.counts import count
from tests.fakes.loop import BOUND, open_descriptors
from tests.fakes.net_rig import MAC
from tests.fakes.tap import HEADER
from tests.host.conftest import Namespace

NAME = "tap-kvmpy"
OTHER = bytes.fromhex("525400999999")
GROUP = bytes.fromhex("01005e000001")
BROADCAST = b"\xff" * 6
EXPERIMENT = 0x88B5  # an ethertype for local experiments: nothing else sends it


def frame(to: bytes, text: bytes) -> bytes:
    return (to + MAC + EXPERIMENT.to_bytes(2, "big") + text).ljust(60, b"\0")


class Network:
    """The host's side of a tap: it sends frames into it and sees those that come out."""

    def __init__(self, netns: Namespace, name: str) -> None:
        self.socket = netns.run(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EXPERIMENT)))
        self.socket.bind((name, EXPERIMENT))
        self.socket.settimeout(BOUND)

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)

    def sees(self) -> bytes:
        return self.socket.recv(1 << 16)


def comes(fd: int) -> bytes:
    """The next of our frames from a tap queue, with its header; the kernel has things to say too."""
    while select.select([fd], [], [], BOUND)[0]:
        data = os.read(fd, 1 << 17)
        if data[24:26] == EXPERIMENT.to_bytes(2, "big"):
            return data
    raise AssertionError("no frame came")


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as resources:
        yield resources


@pytest.fixture
def tap(netns: Namespace, resources: ExitStack) -> Tap:
    """A tap of our own, up."""
    tap = Tap.open(NAME, netns=netns.path)
    resources.callback(tap.close)
    tap.set_up()
    return tap


@pytest.fixture
def network(netns: Namespace, tap: Tap, resources: ExitStack) -> Network:
    network = Network(netns, tap.name)
    resources.callback(network.socket.close)
    return network


# Coming and going


def test_tap_that_is_not_there_is_created_and_vanishes_with_us(netns: Namespace) -> None:
    tap = Tap.open(NAME, netns=netns.path)
    assert (tap.created, netns.interfaces()) == (True, [NAME])
    tap.close()
    tap.close()
    assert netns.interfaces() == []


def test_tap_that_we_create_has_an_address_above_those_of_hardware(netns: Namespace) -> None:
    one, two = Tap.open(NAME, netns=netns.path), Tap.open("other", netns=netns.path)
    shown = [netns.ip("-o", "link", "show", name).split("link/ether ")[1][:17] for name in (NAME, "other")]
    one.close()
    two.close()
    assert [mac[:3] for mac in shown] == ["fe:", "fe:"]
    assert shown[0] != shown[1]


def shown(netns: Namespace) -> str:
    """What stays as it was: whoever attaches chooses the header, and being up chooses the queueing discipline."""
    return re.sub(r"qdisc \w+|vnet_hdr \w+", "", netns.ip("-d", "link", "show", NAME))


def test_tap_that_was_there_is_left_as_it_was(netns: Namespace) -> None:
    netns.ip("tuntap", "add", "dev", NAME, "mode", "tap", "user", "1234")
    before = shown(netns)
    tap = Tap.open(NAME, netns=netns.path)
    tap.set_mtu(9000)
    tap.set_up()
    tap.set_offload(tap.offloads)
    tap.set_filter([MAC])
    assert (tap.created, tap.interface.mtu, tap.interface.up) == (False, 9000, True)
    tap.close()
    assert shown(netns) == before
    again = Tap.open(NAME, netns=netns.path)
    assert again.interface.offloading() == (False, False)
    again.close()


def test_descriptors_do_not_block_and_are_not_inherited(tap: Tap) -> None:
    assert fcntl.fcntl(tap.fds[0], fcntl.F_GETFL) & os.O_NONBLOCK
    assert not os.get_inheritable(tap.fds[0])


@pytest.mark.parametrize("queues", [1, 4])
def test_nothing_is_left_of_many_taps(netns: Namespace, queues: int) -> None:
    before = open_descriptors()
    for _ in range(count(32, 128)):
        tap = Tap.open(NAME, queues, netns=netns.path)
        tap.set_up()
        tap.close()
    assert netns.interfaces() == []
    assert open_descriptors() == before


def test_namespace_is_entered_for_the_opening_only(netns: Namespace, other_netns: Namespace) -> None:
    here, there = Tap.open(NAME, netns=netns.path), Tap.open(NAME, netns=other_netns.path)
    there.set_mtu(1400)
    assert (here.interface.mtu, there.interface.mtu) == (1500, 1400)
    here.close()
    assert (netns.interfaces(), other_netns.interfaces()) == ([], [NAME])
    there.close()


# What cannot be had


def refusal(netns: Namespace, name: str = NAME, queues: int = 1) -> str:
    before = open_descriptors(), netns.interfaces()
    with pytest.raises(HostError) as caught:
        Tap.open(name, queues, netns=netns.path)
    assert (open_descriptors(), netns.interfaces()) == before
    return str(caught.value)


def test_tap_that_another_program_has_open_is_refused(netns: Namespace) -> None:
    tap = Tap.open(NAME, netns=netns.path)
    assert refusal(netns) == (
        f"tap {NAME}: TUNSETIFF: EBUSY: another program is using it; stop that, or choose another ifname"
    )
    tap.close()


def test_multi_queue_tap_of_another_program_is_refused_and_stays_his(netns: Namespace) -> None:
    tap = Tap.open(NAME, 2, netns=netns.path)
    assert refusal(netns, queues=2) == f"tap {NAME}: another program is using it; stop that, or choose another ifname"
    tap.set_queues(1)
    tap.set_queues(2)
    tap.close()


def test_multi_queue_tap_that_stays_is_refused_while_another_program_has_it(
    netns: Namespace, resources: ExitStack
) -> None:
    netns.ip("tuntap", "add", "dev", NAME, "mode", "tap", "multi_queue", "vnet_hdr")
    tap = Tap.open(NAME, 2, netns=netns.path)
    assert refusal(netns, queues=2) == f"tap {NAME}: another program is using it; stop that, or choose another ifname"
    assert "numqueues 2" in netns.ip("-d", "link", "show", NAME)
    tap.set_up()
    network = Network(netns, NAME)
    resources.callback(network.socket.close)
    os.writev(tap.fds[1], [HEADER, frame(OTHER, b"still here")])
    assert network.sees() == frame(OTHER, b"still here")
    tap.set_queues(1)
    network.send(frame(MAC, b"to the guest"))
    assert comes(tap.fds[0]) == HEADER + frame(MAC, b"to the guest")
    tap.close()
    Tap.open(NAME, 2, netns=netns.path).close()


@pytest.mark.parametrize("header", [[], ["vnet_hdr"]], ids=["without headers", "with headers"])
def test_multi_queue_tap_that_nobody_has_is_attached_whatever_its_header(netns: Namespace, header: list[str]) -> None:
    netns.ip("tuntap", "add", "dev", NAME, "mode", "tap", "multi_queue", *header)
    for _ in range(2):
        tap = Tap.open(NAME, 2, netns=netns.path)
        assert "vnet_hdr on" in netns.ip("-d", "link", "show", NAME)
        tap.close()


def test_tap_of_one_queue_is_refused_for_several(netns: Namespace) -> None:
    netns.ip("tuntap", "add", "dev", NAME, "mode", "tap")
    assert refusal(netns, queues=2) == (
        f"tap {NAME}: TUNSETIFF: EINVAL: it was made with one queue; change queues, or remove it and have it created"
    )


def test_multi_queue_tap_is_refused_for_one_queue(netns: Namespace) -> None:
    netns.ip("tuntap", "add", "dev", NAME, "mode", "tap", "multi_queue")
    assert "EINVAL: it was made with multi_queue; change queues" in refusal(netns)


def test_interface_of_another_kind_is_refused(netns: Namespace) -> None:
    netns.ip("tuntap", "add", "dev", NAME, "mode", "tun")
    assert refusal(netns) == (f"tap {NAME}: TUNSETIFF: EINVAL: it is another kind of interface; choose another ifname")
    assert "another kind of interface" in refusal(netns, "lo")


def test_more_queues_than_the_kernel_has_are_refused(netns: Namespace) -> None:
    assert "E2BIG: more queues than the kernel allows" in refusal(netns, queues=257)


@pytest.mark.parametrize("name", ["", "sixteen-letters!", "a/b", "a b", "tap%d", "..", "a:1", "tap\x07", "äöüäöüäö"])
def test_name_that_no_interface_can_have_is_refused(netns: Namespace, name: str) -> None:
    assert "a name has 1 to 15 bytes" in refusal(netns, name)


def test_missing_namespace_is_named() -> None:
    with pytest.raises(HostError, match="network namespace /run/netns/kvmpy-none: ENOENT"):
        Tap.open(NAME, netns="kvmpy-none")


def test_want_of_rights_is_said_with_what_to_do(netns: Namespace) -> None:
    code = f"from kvmpy.host.tap import Tap\ntry: Tap({NAME!r})\nexcept Exception as e: print(type(e).__name__, e)"
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", code]
    said = netns.run(lambda: subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert said == (
        f"HostError tap {NAME}: TUNSETIFF: EPERM: needs CAP_NET_ADMIN to create it, or to be the user it was made for: "
        "run as root\n"
    )


# What is set


def test_mtu_is_set_and_read_back(tap: Tap, netns: Namespace) -> None:
    tap.set_mtu(9000)
    assert "mtu 9000" in netns.ip("link", "show", NAME)
    with pytest.raises(HostError, match=f"^{NAME}: MTU 70000: SIOCSIFMTU: EINVAL: the interface cannot have it$"):
        tap.set_mtu(70000)


def test_offloads_are_as_ethtool_shows_them(tap: Tap, netns: Namespace) -> None:
    features = ("tx-checksumming", "tcp-segmentation-offload", "tx-tcp6-segmentation", "tx-udp-segmentation")

    def shown() -> list[str]:
        output = netns.run(lambda: subprocess.check_output(["ethtool", "-k", NAME], text=True))
        found = dict(line.strip().split(": ", 1) for line in output.splitlines()[1:] if ": " in line)
        return [found[feature].split()[0] for feature in features]

    assert shown() == ["off", "off", "off", "off"]
    assert tap.set_offload(tun.TUN_F_CSUM | tun.TUN_F_TSO4) == tun.TUN_F_CSUM | tun.TUN_F_TSO4
    assert shown() == ["on", "on", "off", "off"]
    assert tap.set_offload(tap.offloads) == tap.offloads
    assert shown() == ["on", "on", "on", "on" if tap.offloads & USO else "off"]
    assert tap.set_offload(0) == 0
    assert shown() == ["off", "off", "off", "off"]


def test_host_that_segments_frames_itself_is_no_error(tap: Tap, netns: Namespace) -> None:
    netns.run(lambda: subprocess.run(["ethtool", "-K", NAME, "sg", "off"], check=True, stdout=subprocess.DEVNULL))
    tap.set_offload(tap.offloads)
    assert tap.interface.offloading() == (True, False)


def test_offloads_of_a_tap_that_has_another_name_now_are_set(netns: Namespace, resources: ExitStack) -> None:
    tap = Tap.open(NAME, netns=netns.path)
    resources.callback(tap.close)
    netns.ip("link", "set", NAME, "name", "renamed")
    tap.set_offload(tap.offloads)
    shown = netns.run(lambda: subprocess.check_output(["ethtool", "-k", "renamed"], text=True))
    assert "tcp-segmentation-offload: on" in shown


def test_offload_that_is_on_and_was_not_asked_for_is_an_error(tap: Tap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap.interface, "offloading", lambda: (True, True))
    with pytest.raises(HostError, match=r"checksum and TCP offload are \(True, True\) after 0x1 was set"):
        tap.set_offload(tun.TUN_F_CSUM)


def test_kernel_has_all_offloads_or_those_of_old(tap: Tap) -> None:
    assert tap.offloads in OFFLOADS[:2]


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (TSO, 0),
        (tun.TUN_F_CSUM | tun.TUN_F_TSO_ECN, tun.TUN_F_CSUM),
        (tun.TUN_F_CSUM | tun.TUN_F_USO4, tun.TUN_F_CSUM),
        (OFFLOADS[0], OFFLOADS[0]),
    ],
)
def test_offloads_that_the_kernel_does_not_take_alone_are_left_out(tap: Tap, wanted: int, taken: int) -> None:
    assert acceptable(wanted) == taken
    assert tap.set_offload(wanted) == taken & tap.offloads


def test_queues_are_attached_and_detached(netns: Namespace) -> None:
    tap = Tap.open(NAME, 3, netns=netns.path)
    for in_use in (3, 1, 2, 3, 2):
        tap.set_queues(in_use)
        assert f"numqueues {in_use} numdisabled {3 - in_use}" in netns.ip("-d", "link", "show", NAME)
    with pytest.raises(ValueError, match="4 of 3 queues"):
        tap.set_queues(4)
    tap.close()
    assert netns.interfaces() == []


@pytest.mark.parametrize(("before", "wanted"), [(1, 4), (4, 1)])
def test_queues_are_as_before_where_one_cannot_be_had(
    netns: Namespace, resources: ExitStack, monkeypatch: pytest.MonkeyPatch, before: int, wanted: int
) -> None:
    tap = Tap.open(NAME, 4, netns=netns.path)
    resources.callback(tap.close)
    tap.set_queues(before)
    request, calls = tun.TUNSETQUEUE, iter(range(10))

    def refuse_the_second(fd: int, argument: tun.Ifreq) -> None:
        if next(calls) == 1:
            raise IoctlError("TUNSETQUEUE", errno.ENOMEM)
        request(fd, argument)

    with monkeypatch.context() as patch:
        patch.setattr(tun, "TUNSETQUEUE", refuse_the_second)
        with pytest.raises(HostError, match=f"^tap {NAME}: TUNSETQUEUE: ENOMEM"):
            tap.set_queues(wanted)
    assert f"numqueues {before} numdisabled {4 - before}" in netns.ip("-d", "link", "show", NAME)
    tap.set_queues(wanted)
    assert f"numqueues {wanted} numdisabled {4 - wanted}" in netns.ip("-d", "link", "show", NAME)


def test_what_may_wait_in_the_host_can_be_bounded(tap: Tap) -> None:
    tap.set_sndbuf(1 << 20)
    assert tap.sndbuf == 1 << 20


# Frames


def test_frames_pass_both_ways_behind_a_header(tap: Tap, network: Network) -> None:
    network.send(frame(MAC, b"to the guest"))
    assert comes(tap.fds[0]) == HEADER + frame(MAC, b"to the guest")
    os.writev(tap.fds[0], [HEADER, frame(OTHER, b"from the guest")])
    assert network.sees() == frame(OTHER, b"from the guest")


@pytest.mark.parametrize("header", [b"\xff" * 12, b"\x01\x00" + bytes(4) + b"\xff\xff\xff\xff" + bytes(2)])
def test_kernel_refuses_a_broken_header(tap: Tap, header: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.writev(tap.fds[0], [header, frame(OTHER, b"what")])


@pytest.mark.parametrize(
    ("addresses", "all_multicast", "passes"),
    [
        (None, False, [MAC, OTHER, GROUP, BROADCAST]),
        ([], False, []),
        ([MAC], False, [MAC]),
        ([BROADCAST, MAC], False, [MAC, BROADCAST]),
        ([MAC], True, [MAC, GROUP, BROADCAST]),
        ([], True, [GROUP, BROADCAST]),
        ([GROUP, *(bytes([2, 0, 0, 0, 0, n]) for n in range(7)), MAC], False, [MAC, GROUP]),
        ([*(bytes([2, 0, 0, 0, 0, n]) for n in range(9))], False, [MAC, OTHER, GROUP, BROADCAST]),
    ],
    ids=["all", "none", "unicast", "broadcast", "all multicast", "only multicast", "eight exact", "too many"],
)
def test_filter_lets_pass_what_it_names(
    tap: Tap, network: Network, addresses: list[bytes] | None, all_multicast: bool, passes: list[bytes]
) -> None:
    tap.set_filter(addresses, all_multicast=all_multicast)
    for to in (MAC, OTHER, GROUP, BROADCAST):
        network.send(frame(to, b"filtered?"))
    tap.set_filter(None)
    network.send(frame(OTHER, b"end"))
    came = []
    while (data := comes(tap.fds[0])[12:]) != frame(OTHER, b"end"):
        came.append(data[:6])
    assert came == passes


def test_tap_that_somebody_removes_says_so(tap: Tap, netns: Namespace) -> None:
    netns.ip("link", "delete", NAME)
    with pytest.raises(HostError, match=f"^tap {NAME}: TUNSETOFFLOAD: EBADFD: the interface has been removed$"):
        tap.set_offload(0)
