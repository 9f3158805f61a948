"""virtio-net as a driver and an operator see it: what it offers, its link, its pairs, and who moves the frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from kvmpy.abi import tun
from kvmpy.abi.virtio import Feature, Status, feature_mask
from kvmpy.devices.vhost import VhostNet
from kvmpy.devices.virtio import net_frames
from kvmpy.devices.virtio.net import Lender, VirtioNet
from kvmpy.devices.virtio.net_control import Class
from kvmpy.devices.virtio.net_state import NetFeature, NetState
from kvmpy.devices.virtio.queue import Virtqueue
from kvmpy.errors import GuestError, HostError
from kvmpy.state import load, save
from tests.fakes.loop import open_descriptors
from tests.fakes.net_rig import CONTROLLED, ERR, MAC, MERGEABLE, OK, PLAIN, RAM, RX, TX, NetRig, net_rig
from tests.fakes.tap import HEADER, FakeTap, SilentTap
from tests.fakes.virtio_driver import guest_memory
from tests.fakes.virtio_rig import ManualLoop

FRAME = bytes(range(200))
BUFFER = 1526
MULTI = CONTROLLED | feature_mask(NetFeature.MQ)


class FakeVhost:
    """A Lender that does nothing with what it has; ``log`` is what it was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.taken: dict[int, tuple[Virtqueue, Virtqueue]] = {}
        self.calls: dict[int, list[int]] = {}
        self.refuses: Exception | None = None

    def features(self) -> int:
        return feature_mask(NetFeature.MRG_RXBUF, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.VERSION_1)

    def lent(self, pair: int) -> bool:
        return pair in self.taken

    def take(
        self,
        pair: int,
        device: VirtioNet,
        rx: Virtqueue,
        tx: Virtqueue,
        *,
        tap: int,
        calls: Sequence[int],
        features: int,
    ) -> None:
        assert not rx.running
        assert not tx.running
        assert pair not in self.taken
        if self.refuses is not None:
            raise self.refuses
        self.log.append(f"take {pair}")
        self.taken[pair], self.calls[pair] = (rx, tx), list(calls)

    def give_back(self, pair: int) -> None:
        if pair in self.taken:
            self.log.append(f"give back {pair}")
            del self.taken[pair]

    def set_call(self, pair: int, calls: Sequence[int]) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.calls[pair] = list(calls)


@pytest.fixture
def rig() -> Iterator[NetRig]:
    with net_rig() as rig:
        yield rig


@pytest.fixture
def pairs() -> Iterator[NetRig]:
    """Three pairs of queues."""
    with net_rig(pairs=3) as rig:
        yield rig


@pytest.fixture
def vhost() -> FakeVhost:
    return FakeVhost()


@pytest.fixture
def lent(vhost: FakeVhost) -> Iterator[NetRig]:
    """A device whose rings the kernel takes."""
    with net_rig(pairs=2, vhost=vhost) as rig:
        yield rig


def offered(tap: FakeTap, *, mtu: int | None = None, vhost: Lender | None = None) -> set[int]:
    net = VirtioNet("net1", guest_memory(4096), ManualLoop(), tap, MAC, mtu=mtu, vhost=vhost)
    features = net.features
    net.close()
    tap.close()
    return {number for number in range(64) if features >> number & 1}


# What it offers


def test_it_offers_all_that_does_not_depend_on_anything() -> None:
    assert {0, 1, 5, 15, 16, 17, 18, 19, 20, 21, 23, 2, 28, 29, 32} <= offered(FakeTap())


def test_segmentation_is_offered_as_the_tap_can_do_it() -> None:
    everything, without_uso = {7, 8, 9, 11, 12, 13, 54, 55, 56}, {7, 8, 9, 11, 12, 13}
    tso = tun.TUN_F_CSUM | tun.TUN_F_TSO4 | tun.TUN_F_TSO6 | tun.TUN_F_TSO_ECN
    assert offered(FakeTap()) & everything == everything
    assert offered(FakeTap(offloads=tso)) & everything == without_uso
    assert offered(FakeTap(offloads=0)) & (everything | {1}) == set()


def test_mtu_and_pairs_are_offered_where_there_is_something_to_say() -> None:
    assert not offered(FakeTap()) & {NetFeature.MTU, NetFeature.MQ}
    assert NetFeature.MTU in offered(FakeTap(), mtu=9000)
    assert NetFeature.MQ in offered(FakeTap(2))


def test_no_ring_feature_is_offered_that_vhost_lacks() -> None:
    class Old(FakeVhost):
        def features(self) -> int:
            return feature_mask(Feature.VERSION_1, NetFeature.MRG_RXBUF)

    assert not offered(FakeTap(), vhost=Old()) & {Feature.INDIRECT_DESC, Feature.EVENT_IDX}
    assert NetFeature.MQ in offered(FakeTap(2), vhost=Old())


def test_vhost_net_is_a_lender() -> None:
    lender: type[Lender] = VhostNet
    assert lender


def test_configuration_says_who_it_is() -> None:
    with net_rig(pairs=3, mtu=1400) as rig:
        assert rig.net.config() == MAC + b"\x01\x00" + b"\x03\x00" + (1400).to_bytes(2, "little") + bytes(12)
        assert rig.net.config_read(8, 2) == 3
        assert rig.net.config_read(22, 8) == 0


# The tap does as the driver says


def test_tap_gets_the_offloads_that_the_driver_accepted_and_none_after_a_reset(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    assert rig.tap.offload == tun.TUN_F_CSUM | tun.TUN_F_TSO4
    rig.guest.device.reset()
    assert rig.tap.offload == 0


def test_no_frame_passes_the_tap_while_there_is_no_driver(rig: NetRig) -> None:
    assert rig.tap.passes() == ([], False)
    rig.start()
    assert rig.tap.passes() == (None, False)
    rig.guest.device.reset()
    assert rig.tap.passes() == ([], False)


def test_frames_may_come_while_the_machine_is_paused(rig: NetRig) -> None:
    rig.start()
    rig.net.pause()
    assert rig.tap.passes() == (None, False)


def test_frames_for_the_guest_before_are_dropped_by_a_reset(pairs: NetRig) -> None:
    pairs.start(MULTI)
    for queue in range(len(pairs.tap.fds)):
        for _ in range(3):
            pairs.tap.send(FRAME, queue)
    pairs.guest.device.reset()
    dropped = pairs.net.info()["userspace"]["rx-dropped"]
    pairs.start(MULTI)
    pairs.tap.send(b"for the next" * 10)
    pairs.lend(BUFFER, count=4)
    assert (pairs.received(), dropped) == ([b"for the next" * 10], 3 * len(pairs.tap.fds))


def test_a_reset_drops_no_more_than_a_tap_keeps(rig: NetRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_frames, "MOST_DRAINED", 2)
    rig.start()
    for _ in range(3):
        rig.tap.send(FRAME)
    rig.guest.device.reset()
    assert rig.net.info()["userspace"]["rx-dropped"] == 2


def test_tap_that_fails_breaks_the_device_and_a_reset_is_possible(rig: NetRig) -> None:
    rig.tap.refuses = HostError("tap net1: gone")
    rig.start()
    assert rig.guest.status() & Status.NEEDS_RESET
    assert rig.guest.broken == ["tap net1: gone"]
    rig.guest.device.reset()
    assert rig.guest.status() == 0


# The link


def test_link_that_goes_down_is_seen_and_interrupts(rig: NetRig) -> None:
    rig.start()
    generation = rig.net.virtio.config_generation
    rig.net.set_link(up=False)
    assert rig.net.config()[6] == 0
    assert rig.guest.transport.config_interrupts == 1
    assert rig.net.virtio.config_generation != generation
    rig.net.set_link(up=True)
    assert (rig.net.config()[6], rig.guest.transport.config_interrupts) == (1, 2)


def test_link_that_stays_as_it_is_interrupts_nobody(rig: NetRig) -> None:
    rig.start()
    rig.net.set_link(up=True)
    assert rig.guest.transport.config_interrupts == 0


def test_with_the_link_down_nothing_passes_either_way(rig: NetRig) -> None:
    rig.start()
    rig.lend(BUFFER, count=2)
    rig.net.set_link(up=False)
    rig.send(HEADER, FRAME)
    rig.tap.send(FRAME)
    rig.loop.run()
    assert rig.tap.passes() == ([], False)
    assert (len(rig.guest.queues[TX].used()), rig.tap.sent(), rig.received()) == (1, [], [])
    rig.net.set_link(up=True)
    rig.tap.send(b"after" * 20)
    rig.loop.run()
    assert rig.received() == [b"after" * 20]
    assert rig.tap.passes() == (None, False)
    counted = rig.net.info()["userspace"]
    assert (counted["rx-dropped"], counted["tx-dropped"]) == (1, 1)


def test_link_stays_down_through_a_reset(rig: NetRig) -> None:
    rig.net.set_link(up=False)
    rig.start()
    assert rig.net.config()[6] == 0
    rig.tap.send(FRAME)
    rig.lend(BUFFER)
    assert rig.received() == []


def test_command_leaves_the_filter_shut_while_the_link_is_down(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.net.set_link(up=False)
    assert rig.command(Class.RX, 0, b"\0") == OK
    assert rig.tap.passes() == ([], False)
    rig.net.set_link(up=True)
    assert rig.tap.passes() == ([MAC, b"\xff" * 6], False)


# Announcing


def test_announcement_needs_a_driver_that_can(rig: NetRig) -> None:
    assert not rig.net.announce()
    rig.start()
    assert not rig.net.announce()
    assert rig.guest.transport.config_interrupts == 0
    rig.start(CONTROLLED)
    assert rig.net.announce()
    assert (rig.net.config()[6], rig.guest.transport.config_interrupts) == (3, 1)


def test_an_announcement_from_here_is_a_rarp_broadcast_from_the_guests_address(rig: NetRig) -> None:
    rig.start()
    assert rig.net.announce_from_here()
    arp = b"\x00\x01\x08\x00\x06\x04\x00\x03" + (MAC + bytes(4)) * 2  # Ethernet, IPv4, lengths, reverse request
    assert rig.tap.sent() == [HEADER + (b"\xff" * 6 + MAC + b"\x80\x35" + arp).ljust(60, b"\0")]


def test_nothing_is_announced_from_here_with_the_link_down_or_the_tap_full(rig: NetRig) -> None:
    rig.net.set_link(up=False)
    assert not rig.net.announce_from_here()
    assert rig.tap.sent() == []
    rig.net.set_link(up=True)
    rig.tap.stuff()
    assert not rig.net.announce_from_here()


# Pairs of queues


def test_driver_begins_with_one_pair(pairs: NetRig) -> None:
    pairs.start(MULTI)
    assert pairs.tap.queues == 1


def test_driver_uses_the_pairs_it_asks_for(pairs: NetRig) -> None:
    pairs.start(MULTI)
    assert pairs.command(Class.MQ, 0, b"\x03\x00") == OK
    assert pairs.tap.queues == 3
    pairs.lend(BUFFER, queue=4)
    pairs.tap.send(FRAME, queue=2)
    pairs.loop.run()
    assert pairs.received(4) == [FRAME]
    pairs.send(HEADER, FRAME, queue=5)
    assert pairs.tap.sent(2) == [HEADER + FRAME]


def test_driver_leaves_pairs_again(pairs: NetRig) -> None:
    pairs.start(MULTI)
    pairs.command(Class.MQ, 0, b"\x03\x00")
    pairs.lend(BUFFER, queue=4)
    assert pairs.command(Class.MQ, 0, b"\x01\x00") == OK
    assert (pairs.tap.queues, pairs.net.queues[4].in_flight) == (1, 0)
    pairs.tap.send(FRAME, queue=2)
    pairs.loop.run()
    assert pairs.received(4) == []


def test_reset_returns_to_one_pair(pairs: NetRig) -> None:
    pairs.start(MULTI)
    pairs.command(Class.MQ, 0, b"\x02\x00")
    pairs.guest.device.reset()
    assert (pairs.tap.queues, pairs.net.state.pairs) == (1, 1)


@pytest.mark.parametrize("data", [b"\x00\x00", b"\x04\x00", b"\xff\xff", b"\x02", b"\x02\x00\x00"])
def test_pairs_that_there_are_not_are_refused(pairs: NetRig, data: bytes) -> None:
    pairs.start(MULTI)
    assert pairs.command(Class.MQ, 0, data) == ERR
    assert (pairs.tap.queues, pairs.net.state.pairs) == (1, 1)


def test_pairs_whose_queues_are_not_set_up_are_refused(pairs: NetRig) -> None:
    pairs.guest.start(MULTI, enable={0, 1, 2, 6})
    assert pairs.command(Class.MQ, 0, b"\x02\x00") == ERR


def test_pairs_that_the_tap_will_not_attach_are_refused(pairs: NetRig) -> None:
    pairs.start(MULTI)
    pairs.tap.refuses = HostError("no")
    assert pairs.command(Class.MQ, 0, b"\x02\x00") == ERR
    assert pairs.net.state.pairs == 1


def test_control_queue_is_the_third_for_a_driver_of_one_pair(pairs: NetRig) -> None:
    pairs.start(CONTROLLED)
    assert pairs.command(Class.RX, 0, b"\0") == OK
    assert pairs.net.state.rx_mode == 0


def test_state_of_more_pairs_than_there_are_breaks_the_device(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.net.pause()
    rig.net.state.pairs = 2
    rig.net.post_load()
    rig.net.resume()
    assert rig.guest.broken == ["net1: 2 pairs of queues in use, of 1"]


# Moving


def test_what_the_driver_has_set_goes_on_elsewhere() -> None:
    with net_rig(pairs=2) as here, net_rig(pairs=2) as there:
        here.start(MULTI)
        here.command(Class.RX, 0, b"\0")
        here.command(Class.MAC, 1, bytes(5) + b"\7")
        here.command(Class.MQ, 0, b"\2\0")
        here.lend(BUFFER, count=3)
        here.tap.send(FRAME)
        here.loop.run()
        here.net.pause()
        there.net.pause()
        there.net.state = load(NetState, save(here.net.state))
        there.memory.write(0, here.memory.read(0, RAM))
        there.net.post_load()
        there.net.resume()
        assert there.tap.passes() == ([bytes(5) + b"\7", b"\xff" * 6], False)
        assert (there.tap.queues, there.tap.offload) == (2, here.tap.offload)
        there.guest.queues = here.guest.queues
        for ring in here.guest.queues:
            ring.memory = there.memory
        there.tap.send(b"there" * 20)
        there.loop.run()
        assert there.received() == [FRAME, b"there" * 20]
        assert {0, 1, 2, 3, 4} <= set(there.guest.transport.take())


# In the kernel


def test_vhost_has_the_rings_while_the_device_runs(lent: NetRig, vhost: FakeVhost) -> None:
    lent.start(MULTI)
    assert vhost.log == ["take 0"]
    assert vhost.calls[0] == [lent.guest.transport.calls[queue].fd for queue in (RX, TX)]
    assert lent.net.info()["path"] == "vhost"
    lent.net.pause()
    lent.net.resume()
    lent.guest.device.reset()
    assert vhost.log == ["take 0", "give back 0", "take 0", "give back 0"]
    assert lent.net.info()["path"] == "stopped"


def test_kicks_are_the_kernels_while_it_has_the_rings(lent: NetRig, vhost: FakeVhost) -> None:
    lent.start(MULTI)
    lent.guest.queues[TX].offer([HEADER, FRAME])
    lent.guest.transport.doorbells[TX].signal()
    lent.loop.run()
    assert lent.net.queues[TX].kick.take() == 1


def test_control_queue_stays_here(lent: NetRig) -> None:
    lent.start(MULTI)
    assert lent.command(Class.RX, 0, b"\0") == OK


def test_each_pair_is_taken_when_it_comes_into_use(lent: NetRig, vhost: FakeVhost) -> None:
    lent.start(MULTI)
    lent.command(Class.MQ, 0, b"\2\0")
    lent.command(Class.MQ, 0, b"\1\0")
    assert vhost.log == ["take 0", "take 1", "give back 1"]


def test_rings_come_back_while_the_link_is_down(lent: NetRig, vhost: FakeVhost) -> None:
    lent.start(MULTI)
    lent.net.set_link(up=False)
    lent.send(HEADER, FRAME)
    assert len(lent.guest.queues[TX].used()) == 1
    lent.net.set_link(up=True)
    assert vhost.log == ["take 0", "give back 0", "take 0"]


def test_rings_that_the_kernel_refuses_are_served_here(lent: NetRig, vhost: FakeVhost) -> None:
    vhost.refuses = HostError("VHOST_SET_OWNER: ENOMEM")
    lent.start(MULTI)
    lent.send(HEADER, FRAME)
    assert lent.tap.sent() == [HEADER + FRAME]
    assert lent.net.info()["path"] == "userspace"
    assert lent.net.info()["vhost-refused"] == "VHOST_SET_OWNER: ENOMEM"
    assert lent.guest.broken == []


def test_rings_that_are_not_in_memory_break_the_device(lent: NetRig, vhost: FakeVhost) -> None:
    vhost.refuses = GuestError("net1 rx0: a ring is not in RAM")
    lent.start(MULTI)
    assert lent.guest.broken == ["net1 rx0: a ring is not in RAM"]


def test_rings_that_the_driver_left_out_are_not_lent(lent: NetRig, vhost: FakeVhost) -> None:
    lent.guest.start(PLAIN, enable={TX})
    lent.loop.run()
    lent.send(HEADER, FRAME)
    assert (vhost.log, lent.tap.sent()) == ([], [HEADER + FRAME])


def test_new_interrupts_reach_the_kernel(lent: NetRig, vhost: FakeVhost) -> None:
    lent.start(MULTI)
    vhost.calls[0] = []
    lent.net.calls_changed()
    assert vhost.calls == {0: [lent.guest.transport.calls[queue].fd for queue in (RX, TX)]}


def test_interrupts_that_the_kernel_refuses_break_the_device(lent: NetRig, vhost: FakeVhost) -> None:
    lent.start(MULTI)
    vhost.refuses = HostError("no")
    lent.net.calls_changed()
    assert lent.guest.broken == ["no"]


# What an operator sees


def test_info_names_tap_address_link_path_and_queues(rig: NetRig) -> None:
    rig.start(MERGEABLE)
    info = rig.net.info()
    assert (info["netdev"], info["mac"], info["link"]) == ("tap-fake", "52:54:00:12:34:56", "up")
    assert (info["path"], info["vhost-refused"], info["pairs"]) == ("userspace", "", 1)
    assert info["queues"][0] == {"name": "rx0", "size": 8, "enabled": True}
    assert [queue["name"] for queue in info["queues"]] == ["rx0", "tx0", "control"]


def test_pairs_that_the_tap_refuses_to_change_go_on_as_they_were(pairs: NetRig) -> None:
    pairs.start(MULTI)
    assert pairs.command(Class.MQ, 0, b"\2\0") == OK
    pairs.tap.refuses = HostError("TUNSETQUEUE: EIO")
    assert pairs.command(Class.MQ, 0, b"\1\0") == ERR
    pairs.tap.refuses = None
    pairs.lend(BUFFER, queue=2)
    pairs.tap.send(FRAME, queue=1)
    pairs.loop.run()
    assert pairs.received(2) == [FRAME]


def test_frame_that_waits_for_buffers_keeps_the_kernel_out_and_is_delivered(vhost: FakeVhost) -> None:
    with net_rig(vhost=vhost) as rig:
        vhost.refuses = HostError("not yet")
        rig.start(MERGEABLE)
        rig.lend(64)
        rig.tap.send(FRAME)
        rig.loop.run()
        vhost.refuses = None
        rig.guest.device.pause()
        rig.guest.device.resume()
        assert vhost.taken == {}
        rig.lend(BUFFER, count=2)
        rig.loop.run()
        assert rig.received() == [FRAME]
        rig.guest.device.pause()
        rig.guest.device.resume()
        assert list(vhost.taken) == [0]


def test_a_tap_that_refuses_makes_no_device_and_loses_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    tap = SilentTap()
    tap.refuses = HostError("tap tap-fake: TUNSETOFFLOAD: EBADFD")
    with pytest.raises(HostError, match="EBADFD"):
        VirtioNet("net1", guest_memory(RAM), ManualLoop(), tap, MAC)
    assert open_descriptors() == before
