"""A virtio source of random numbers as its driver sees it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy.devices.virtio.rng import BUDGET, LIMIT, RngState, VirtioRng
from kvmpy.state import load, save
from tests.fakes.virtio_driver import guest_memory
from tests.fakes.virtio_rig import Guest, ManualLoop

ROOM = 2 * LIMIT


@pytest.fixture
def loop() -> ManualLoop:
    return ManualLoop()


@pytest.fixture
def guest(loop: ManualLoop) -> Iterator[Guest]:
    memory = guest_memory(2 << 20)
    guest = Guest(VirtioRng("rng0/virtio-rng", memory, loop), memory, room=ROOM, size=8)
    guest.start()
    yield guest
    guest.close()
    backing = memory.blocks[0].backing
    memory.close()
    backing.view.release()  # a BufferError if anybody still held guest memory


def test_every_buffer_comes_back_full_and_different(guest: Guest) -> None:
    ring = guest.queues[0]
    heads = [ring.offer(writable=[60, 4]) for _ in range(4)]
    guest.kick(0)
    assert ring.used() == [(head, 64) for head in heads]
    contents = {ring.content(head) for head in heads}
    assert len(contents) == 4
    assert not any(content.endswith(bytes(4)) for content in contents)
    assert guest.transport.take() == [0]


def test_request_gets_no_more_than_the_limit(guest: Guest) -> None:
    head = guest.queues[0].offer(writable=[1000, LIMIT, 100])
    guest.kick(0)
    assert guest.queues[0].used() == [(head, LIMIT)]
    assert guest.queues[0].content(head)[LIMIT:] == bytes(1100)


def test_request_with_nothing_to_fill_comes_back_empty(guest: Guest) -> None:
    head = guest.queues[0].offer(readable=[b"?"])
    guest.kick(0)
    assert guest.queues[0].used() == [(head, 0)]


def test_greedy_driver_is_served_in_turns(guest: Guest, loop: ManualLoop) -> None:
    for _ in range(8):
        guest.queues[0].offer(writable=[LIMIT])
    guest.kick(0, run=False)
    loop.once()
    assert len(guest.queues[0].used()) == BUDGET // LIMIT
    loop.run()
    assert len(guest.queues[0].used()) == 8 - BUDGET // LIMIT


def test_broken_ring_stops_it_until_a_reset(guest: Guest) -> None:
    guest.queues[0].put(999)
    guest.queues[0].publish()
    guest.kick(0)
    assert len(guest.broken) == 1
    guest.start()
    head = guest.queues[0].offer(writable=[8])
    guest.kick(0)
    assert guest.queues[0].used() == [(head, 8)]


def test_state_goes_through_a_section_unchanged(guest: Guest) -> None:
    guest.device.pause()
    assert load(RngState, save(guest.device.state)) == guest.device.state
