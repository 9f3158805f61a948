"""Frames between tap and guest without vhost: none lost, none repeated, and both sides wake each other."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.abi.virtio import Status
from kvmpy.devices.virtio import net_frames
from kvmpy.devices.virtio.net_frames import LARGEST
from kvmpy.devices.virtio.queue import Chain
from tests.counts import count
from tests.fakes.net_rig import CONTROLLED, MERGEABLE, PLAIN, RX, TX, NetRig, net_rig
from tests.fakes.tap import HEADER

FRAME = bytes(range(256)) * 4
BUFFER = 1526  # a frame of the usual MTU, with its header


@pytest.fixture
def rig() -> Iterator[NetRig]:
    with net_rig() as rig:
        yield rig


def counters(rig: NetRig) -> dict[str, int]:
    counted: dict[str, int] = rig.net.info()["userspace"]
    return counted


# From the guest


def test_frame_goes_out_with_the_drivers_header(rig: NetRig) -> None:
    rig.start()
    header = bytes(range(12))
    head = rig.send(header, FRAME)
    assert rig.tap.sent() == [header + FRAME]
    assert rig.guest.queues[TX].used() == [(head, 0)]
    assert rig.guest.transport.take() == [TX]
    assert counters(rig)["tx-frames"] == 1


def test_frame_may_be_in_any_number_of_pieces(rig: NetRig) -> None:
    rig.start()
    rig.send(HEADER[:5], HEADER[5:] + FRAME[:1], FRAME[1:700], FRAME[700:])
    assert rig.tap.sent() == [HEADER + FRAME]


@pytest.mark.parametrize("event_idx", [False, True])
def test_frames_wait_in_order_while_the_tap_is_full(rig: NetRig, event_idx: bool) -> None:
    rig.start(event_idx=event_idx)
    stuffed = rig.tap.stuff()
    for number in range(4):
        rig.send(HEADER, bytes([number]) * 60)
    assert rig.guest.queues[TX].used() == []
    assert len(rig.tap.sent()) == stuffed
    rig.loop.run()
    assert rig.tap.sent() == [HEADER + bytes([number]) * 60 for number in range(4)]
    assert len(rig.guest.queues[TX].used()) == 4


def test_driver_can_send_again_after_the_tap_was_full(rig: NetRig) -> None:
    rig.start()
    rig.tap.stuff()
    rig.send(HEADER, FRAME)
    rig.tap.sent()
    rig.loop.run()
    rig.tap.sent()
    rig.send(HEADER, b"again" * 20)
    assert rig.tap.sent() == [HEADER + b"again" * 20]


def test_frame_that_the_kernel_refuses_is_dropped_and_the_next_one_goes_out(rig: NetRig) -> None:
    rig.tap.near[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    rig.start()
    head = rig.guest.queues[TX].offer([HEADER, *[bytes(1300)] * 3])
    rig.guest.queues[TX].write_desc(head, 0, 1 << 16, 1, rig.guest.queues[TX].load(rig.guest.queues[TX].desc + 14))
    rig.guest.kick(TX)
    rig.send(HEADER, FRAME)
    assert rig.tap.sent() == [HEADER + FRAME]
    assert (counters(rig)["tx-frames"], counters(rig)["tx-dropped"]) == (1, 1)


@pytest.mark.parametrize("pieces", [[], [HEADER[:11]], [HEADER]], ids=["nothing", "half a header", "only a header"])
def test_chain_without_a_frame_is_dropped(rig: NetRig, pieces: list[bytes]) -> None:
    rig.start()
    ring = rig.guest.queues[TX]
    head = ring.offer(pieces, [] if pieces else [64])
    rig.guest.kick(TX)
    assert ring.used() == [(head, 0)]
    assert (rig.tap.sent(), counters(rig)["tx-dropped"]) == ([], 1)


def test_frame_larger_than_any_is_dropped(rig: NetRig) -> None:
    rig.start()
    ring = rig.guest.queues[TX]
    ring.write_desc(0, 0x1000, LARGEST + 1, 0)
    ring.put(0)
    ring.publish()
    rig.guest.kick(TX)
    assert (rig.tap.sent(), counters(rig)["tx-dropped"]) == ([], 1)


def test_other_callbacks_get_their_turn_while_a_ring_is_sent(rig: NetRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_frames, "SLICE", 0.0)
    monkeypatch.setattr(net_frames, "LEAST", 1)
    rig.start()
    for _ in range(4):
        rig.guest.queues[TX].offer([HEADER, FRAME])
    rig.guest.kick(TX, run=False)
    rig.loop.once()
    assert len(rig.tap.sent()) == 1
    rig.loop.run()
    assert len(rig.tap.sent()) == 3


# To the guest


def test_frame_arrives_behind_a_header_that_says_one_buffer(rig: NetRig) -> None:
    rig.start()
    (head,) = rig.lend(BUFFER)
    rig.tap.send(FRAME)
    rig.loop.run()
    assert rig.guest.queues[RX].used() == [(head, 12 + len(FRAME))]
    assert rig.guest.queues[RX].content(head)[: 12 + len(FRAME)] == bytes(10) + b"\x01\x00" + FRAME
    assert rig.guest.transport.take() == [RX]
    assert counters(rig)["rx-frames"] == 1


def test_header_says_one_buffer_without_mergeable_buffers_too(rig: NetRig) -> None:
    rig.start(PLAIN)
    (head,) = rig.lend(BUFFER)
    rig.tap.wires[0].send(b"\xff" * 12 + FRAME)
    rig.loop.run()
    assert rig.guest.queues[RX].used() == [(head, 12 + len(FRAME))]
    assert rig.guest.queues[RX].content(head)[10:12] == b"\x01\x00"


def test_large_frame_is_spread_over_the_chains_that_it_takes(rig: NetRig) -> None:
    rig.start()
    heads = rig.lend(1000, count=6)
    rig.tap.send(FRAME * 3)
    rig.loop.run()
    used = rig.guest.queues[RX].used()
    assert used == [*((head, 1000) for head in heads[:3]), (heads[3], 3 * 1024 + 12 - 3000)]
    assert rig.guest.queues[RX].content(heads[0])[10:12] == b"\x04\x00"
    data = b"".join(rig.guest.queues[RX].content(head)[:written] for head, written in used)
    assert data[12:] == FRAME * 3


def test_frame_and_its_header_may_lie_in_tiny_buffers(rig: NetRig) -> None:
    rig.start()
    rig.lend(3, 8, 4)
    rig.lend(1, 40)
    rig.lend(60)
    rig.tap.send(FRAME[:60])
    rig.loop.run()
    assert rig.received() == [FRAME[:60]]


@pytest.mark.parametrize("features", [PLAIN, MERGEABLE, CONTROLLED], ids=["plain", "mergeable", "with segmentation"])
@pytest.mark.parametrize("event_idx", [False, True])
def test_every_frame_arrives_in_order_when_tap_and_ring_were_both_full(
    rig: NetRig, features: int, event_idx: bool
) -> None:
    rig.start(features, event_idx=event_idx)
    rig.lend(BUFFER)  # then nothing: the ring is empty after one frame
    frames = rig.tap.flood()
    rig.loop.run()
    frames += rig.tap.flood()
    got = rig.received()
    for _ in range(len(frames)):
        rig.lend(BUFFER)
        got += rig.received()
    assert len(frames) > 20
    assert [frame[4:] for frame in got] == [frame[4:] for frame in frames]
    assert sorted(got) == sorted(frames)
    assert counters(rig)["rx-dropped"] == 0


def test_tap_is_not_watched_while_the_ring_is_empty(rig: NetRig) -> None:
    rig.start()
    rig.tap.send(FRAME)
    rig.loop.run()  # comes to rest
    assert rig.tap.fds[0] not in rig.loop.watched
    rig.lend(BUFFER)
    rig.lend(BUFFER)
    assert rig.received() == [FRAME]
    assert rig.tap.fds[0] in rig.loop.watched


def test_frame_that_does_not_fit_yet_waits_and_those_behind_it_too(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(1000, count=2)
    rig.tap.send(FRAME * 4)
    rig.tap.send(b"next" * 20)
    rig.loop.run()
    assert rig.received() == []
    rig.lend(1000, count=2)
    assert rig.received() == []
    rig.lend(1000, count=2)
    assert rig.received() == [FRAME * 4, b"next" * 20]


def test_frame_larger_than_the_whole_ring_is_dropped_and_the_next_one_arrives(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(1000, count=8)
    rig.tap.send(bytes(9000))
    rig.tap.send(FRAME)
    rig.loop.run()
    assert rig.received() == [FRAME]
    assert counters(rig)["rx-dropped"] == 1


def test_frame_larger_than_a_ring_of_chained_buffers_is_dropped_too(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(500, 500, count=4)
    rig.tap.send(bytes(5000))
    rig.tap.send(FRAME)
    rig.loop.run()
    assert rig.received() == [FRAME]


def test_without_mergeable_buffers_a_frame_too_large_for_its_chain_is_dropped(rig: NetRig) -> None:
    rig.start(PLAIN)
    heads = rig.lend(600, count=2)
    rig.tap.send(FRAME)
    rig.tap.send(FRAME[:500])
    rig.loop.run()
    assert rig.guest.queues[RX].used() == [(heads[0], 512)]
    assert counters(rig)["rx-dropped"] == 1


def test_largest_frame_arrives_whole() -> None:
    with net_rig(size=64) as rig:
        rig.start(CONTROLLED)
        rig.lend(2048, count=40)
        rig.tap.send(bytes(65535) + b"end")
        rig.loop.run()
        assert [len(frame) for frame in rig.received()] == [65538]


def test_pause_gives_back_every_chain_that_was_only_collected(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(BUFFER, count=4)
    queue = rig.net.queues[RX]
    assert queue.in_flight == 2  # one is less than a frame with a VLAN tag may take
    rig.net.pause()
    assert (queue.in_flight, queue.state.last_avail) == (0, 0)
    rig.tap.send(FRAME)
    rig.loop.run()
    assert rig.received() == []
    rig.net.resume()
    rig.loop.run()
    assert rig.received() == [FRAME]


def test_frame_that_waits_for_room_survives_a_pause(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(1000)
    rig.tap.send(FRAME * 2)
    rig.loop.run()
    rig.net.pause()
    rig.net.resume()
    rig.lend(1000, count=3)
    assert rig.received() == [FRAME * 2]


def test_frame_that_waits_for_room_does_not_survive_a_reset(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(1000)
    rig.tap.send(FRAME * 2)
    rig.loop.run()
    rig.start(CONTROLLED)
    rig.lend(1000, count=4)
    assert rig.received() == []


def test_sender_that_waits_for_the_tap_goes_on_after_a_pause(rig: NetRig) -> None:
    rig.start()
    rig.tap.stuff()
    rig.send(HEADER, FRAME)
    rig.net.pause()
    assert rig.net.queues[TX].in_flight == 0
    rig.tap.sent()
    rig.net.resume()
    rig.loop.run()
    assert rig.tap.sent() == [HEADER + FRAME]


def test_receive_chain_with_nothing_to_write_breaks_the_device(rig: NetRig) -> None:
    rig.start()
    rig.guest.queues[RX].offer(readable=[b"what"])
    rig.guest.kick(RX)
    assert rig.guest.status() & Status.NEEDS_RESET
    assert "nothing to write" in rig.guest.broken[0]
    rig.start()
    rig.lend(BUFFER)
    rig.tap.send(FRAME)
    rig.loop.run()
    assert rig.received() == [FRAME]


def test_device_comes_to_rest_when_the_interface_is_removed(rig: NetRig) -> None:
    rig.start()
    rig.lend(BUFFER)
    rig.tap.wires[0].close()
    rig.loop.run()
    rig.send(HEADER, FRAME)
    assert len(rig.guest.queues[TX].used()) == 1
    assert counters(rig)["tx-dropped"] == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_driver_that_wants_no_interrupts_gets_none(rig: NetRig, event_idx: bool) -> None:
    rig.start(event_idx=event_idx)
    rig.lend(BUFFER, count=3)
    rig.tap.send(FRAME)
    rig.loop.run()
    rig.received()
    assert rig.guest.transport.take() == [RX]
    rig.guest.queues[RX].want_interrupts(wanted=False)
    rig.tap.send(FRAME)
    rig.loop.run()
    assert (len(rig.received()), rig.guest.transport.take()) == (1, [])


def test_driver_is_not_asked_to_kick_while_its_chains_suffice(rig: NetRig) -> None:
    rig.start(event_idx=False)
    rig.lend(BUFFER)
    rig.guest.queues[RX].offer(writable=[BUFFER])
    assert not rig.guest.queues[RX].needs_kick()


def test_other_callbacks_get_their_turn_while_frames_arrive(rig: NetRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_frames, "SLICE", 0.0)
    monkeypatch.setattr(net_frames, "LEAST", 1)
    rig.start()
    rig.lend(BUFFER, count=5)
    for _ in range(5):
        rig.tap.send(FRAME)
    rounds = []
    while rig.loop.once():
        rounds.append(len(rig.received()))
    assert sum(rounds) == 5
    assert max(rounds) <= 2


@pytest.fixture
def slow() -> Iterator[NetRig]:
    """With a ring as drivers have it, on a host on which every step takes longer than the slice."""
    with pytest.MonkeyPatch.context() as patch, net_rig(size=64) as rig:
        patch.setattr(net_frames, "SLICE", 0.0)
        yield rig


def test_largest_frame_takes_few_turns_on_a_slow_host(slow: NetRig) -> None:
    slow.start(CONTROLLED)
    slow.tap.send(bytes(65535))
    for _ in range(64):
        slow.guest.queues[RX].offer(writable=[BUFFER])
    slow.guest.kick(RX, run=False)
    for _ in range(3):
        slow.loop.once()
    assert [len(frame) for frame in slow.received()] == [65535]


def test_tiny_chains_keep_nobody_waiting_for_long(slow: NetRig) -> None:
    slow.start(MERGEABLE)
    for _ in range(64):
        slow.guest.queues[RX].offer(writable=[1])
    slow.guest.kick(RX, run=False)
    slow.loop.once()
    assert slow.net.queues[RX].in_flight == net_frames.LEAST


@pytest.mark.parametrize("features", [MERGEABLE, CONTROLLED], ids=["mergeable", "with segmentation"])
def test_frames_that_wait_are_one_interrupt_on_a_slow_host(slow: NetRig, features: int) -> None:
    slow.start(features, event_idx=False)
    for _ in range(16):
        slow.tap.send(FRAME)
    for _ in range(32):
        slow.guest.queues[RX].offer(writable=[BUFFER])
    slow.guest.kick(RX)
    assert len(slow.received()) == 16
    assert slow.guest.transport.take() == [RX]


def test_frames_of_the_guest_are_one_interrupt_on_a_slow_host(slow: NetRig) -> None:
    slow.start(event_idx=False)
    for _ in range(16):
        slow.guest.queues[TX].offer([HEADER + FRAME])
    slow.guest.kick(TX)
    assert slow.tap.sent() == [HEADER + FRAME] * 16
    assert slow.guest.transport.take() == [TX]


def test_room_is_kept_for_frames_like_the_largest_of_late(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    rig.lend(1000, count=8)
    queue = rig.net.queues[RX]
    assert queue.in_flight == 2
    rig.tap.send(bytes(4000))
    rig.loop.run()
    rig.received()
    rig.lend(1000, count=5)
    rig.tap.send(bytes(60))
    rig.loop.run()
    assert queue.in_flight == 4
    for _ in range(100):
        rig.tap.send(bytes(60))
        rig.loop.run()
        rig.received()
        rig.lend(1000)
    assert queue.in_flight == 2


def test_ring_that_breaks_while_chains_are_collected_takes_nothing_with_it(rig: NetRig) -> None:
    rig.start(CONTROLLED)
    ring = rig.guest.queues[RX]
    ring.offer(writable=[BUFFER])
    ring.put(300)
    ring.publish()
    rig.guest.kick(RX)
    assert rig.guest.status() & Status.NEEDS_RESET
    assert rig.net.queues[RX].in_flight == 0


def offer_at_the_last_moment(rig: NetRig, index: int, offer: Callable[[], object]) -> None:
    """Have the driver offer one more just before it is asked to kick again: it will not, it was asked not to."""
    queue, waiting = rig.net.queues[index], [offer]
    set_notification = queue.set_notification

    def late(*, enabled: bool) -> bool:
        if enabled and waiting:
            waiting.pop()()
            assert not rig.guest.queues[index].needs_kick()
        return set_notification(enabled=enabled)

    queue.set_notification = late  # type: ignore[method-assign]


@pytest.mark.parametrize("event_idx", [False, True])
def test_chain_offered_while_the_driver_is_asked_to_kick_is_not_missed(rig: NetRig, event_idx: bool) -> None:
    rig.start(event_idx=event_idx)
    offer_at_the_last_moment(rig, RX, lambda: rig.guest.queues[RX].offer(writable=[BUFFER]))
    rig.lend(BUFFER)
    rig.tap.send(FRAME)
    rig.tap.send(FRAME[:100])
    rig.loop.run()
    assert rig.received() == [FRAME, FRAME[:100]]


@pytest.mark.parametrize("event_idx", [False, True])
def test_frame_offered_while_the_driver_is_asked_to_kick_is_not_missed(rig: NetRig, event_idx: bool) -> None:
    rig.start(event_idx=event_idx)
    offer_at_the_last_moment(rig, TX, lambda: rig.guest.queues[TX].offer([HEADER + FRAME]))
    rig.send(HEADER, FRAME)
    assert rig.tap.sent() == [HEADER + FRAME] * 2


def test_driver_sees_all_chains_of_a_frame_at_once(rig: NetRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.start()
    rig.lend(600, count=4)
    published: list[int] = []
    push_all = rig.net.queues[RX].push_all

    def watched(done: Iterable[tuple[Chain, int]]) -> None:
        push_all(done)
        published.append(rig.net.queues[RX].state.next_used)

    monkeypatch.setattr(rig.net.queues[RX], "push_all", watched)
    rig.tap.send(FRAME * 2)
    rig.loop.run()
    assert published == [4]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(60, 3000)),
        st.tuples(st.just("lend"), st.integers(600, 1526)),
        st.tuples(st.sampled_from(["pause", "take"]), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=count(15, 4000), deadline=None)
@given(STEPS, st.booleans(), st.sampled_from([MERGEABLE, CONTROLLED]))
def test_frames_arrive_once_and_in_order_whatever_comes_between(
    steps: list[tuple[str, int]], event_idx: bool, features: int
) -> None:
    with net_rig() as rig:
        rig.start(features, event_idx=event_idx)
        sent: list[bytes] = []
        got: list[bytes] = []
        for step, size in steps:
            if step == "send":
                sent.append(bytes([len(sent)]) * size)
                rig.tap.send(sent[-1])
            elif step == "lend" and rig.guest.queues[RX].free:
                rig.lend(size)
            elif step == "pause":
                rig.net.pause()
                assert rig.net.queues[RX].in_flight == 0
                rig.net.resume()
            rig.loop.run()
            got += rig.received() if step == "take" else []
        for _ in range(4 * len(sent)):
            got += rig.received()
            rig.lend(1000, count=len(rig.guest.queues[RX].free))
        assert got + rig.received() == sent


def test_removed_interface_does_not_spin_when_the_driver_kicks(rig: NetRig) -> None:
    rig.start()
    rig.tap.wires[0].close()
    rig.lend(BUFFER, count=2)
    assert rig.received() == []
