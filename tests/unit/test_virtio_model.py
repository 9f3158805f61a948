"""A driver model against queue and transport, in any order: no chain is lost or repeated, and nobody waits in vain.

Then the other kind of driver: rings full of anything, registers accessed anyhow. At worst it breaks its own device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmpy import trace
from kvmpy.abi.virtio import Status
from kvmpy.devices.virtio.pci import BAR_SIZE, VirtioPci, VirtioPciState
from kvmpy.devices.virtio.queue import Chain, QueueState, Virtqueue
from kvmpy.state import StateError, load, save
from tests.counts import count
from tests.fakes.pci import Board
from tests.fakes.virtio_driver import INDIRECT, NEXT, WRITE, RingDriver, guest_memory, unmap
from tests.fakes.virtio_echo import Echo, EchoState
from tests.fakes.virtio_pci_driver import BAR, MSIX, PciGuest, Reg
from tests.fakes.virtio_rig import Guest, ManualLoop

RAM = 1 << 20
LIVE = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
RUNS = settings(max_examples=count(20, 1000), stateful_step_count=50, deadline=None)
EXAMPLES = settings(max_examples=count(20, 2000), deadline=None)


@pytest.fixture(autouse=True, scope="module")
def every_tracepoint() -> Iterator[None]:
    lines: list[str] = []
    trace.enable("virtio.*", lines.append)
    yield
    trace.disable(lines.append)


buffers = st.tuples(
    st.lists(st.binary(max_size=9), max_size=3), st.lists(st.integers(0, 9), max_size=3), st.booleans()
).filter(lambda parts: parts[0] or parts[1])


class Offer(NamedTuple):
    """A chain as the driver made it."""

    head: int
    readable: bytes
    writable: int


class QueueModel(RuleBasedStateMachine):
    """Both sides of one queue in one thread, each step of either whenever it pleases.

    A side that has asked to be told, looked once more, and seen nothing is asleep. Whatever comes then must wake it.
    """

    @initialize(
        event_idx=st.booleans(),
        size=st.sampled_from([1, 2, 4, 8]),
        start=st.sampled_from([0, 0xFFFC, 0xFFFE, 0xFFFF, 0x7FFF]),
    )
    def begin(self, event_idx: bool, size: int, start: int) -> None:
        self.event_idx = event_idx
        self.memory = guest_memory(1 << 16)
        self.driver = RingDriver(self.memory, 0x1000, size, event_idx=event_idx, room=512)
        self.queue = Virtqueue("queue", self.memory, 8)
        self.driver.configure(self.queue.state)
        self.driver.begin_at(self.queue.state, start)
        self.start()
        self.offered: list[Offer] = []  # not yet published
        self.available: list[Offer] = []
        self.popped: list[tuple[Offer, Chain]] = []  # in flight
        self.rewindable = 0  # how many of them, from the last
        self.used: list[tuple[int, int, bytes]] = []  # pushed, and not seen by the driver
        self.device_asleep = self.driver_asleep = True
        self.kicked = self.interrupted = False

    def start(self) -> None:
        self.queue.start(indirect=True, event_idx=self.event_idx)

    # The driver

    @rule(parts=buffers, publish=st.booleans())
    def offer(self, parts: tuple[list[bytes], list[int], bool], publish: bool) -> None:
        readable, writable, indirect = parts
        try:
            head = self.driver.offer(readable, writable, publish=False, indirect=indirect)
        except IndexError:
            return
        self.offered.append(Offer(head, b"".join(readable), sum(writable)))
        if publish:
            self.publish()

    @rule()
    def publish(self) -> None:
        self.driver.publish()
        self.available += self.offered
        self.offered = []
        self.kicked |= self.driver.needs_kick()

    @rule()
    def take_used(self) -> None:
        got = [(head, written, self.driver.content(head)[:written]) for head, written in self.driver.used()]
        assert got == self.used
        self.used = []
        if self.driver_asleep:
            self.interrupted = False

    @rule()
    def driver_sleeps(self) -> None:
        self.interrupted = False
        more = self.driver.want_interrupts(wanted=True)
        assert more == bool(self.used)
        self.driver_asleep = not more

    @rule()
    def driver_stays_awake(self) -> None:
        self.driver.want_interrupts(wanted=False)
        self.driver_asleep = False

    # The device

    @rule(most=st.integers(1, 8))
    def pop(self, most: int) -> None:
        for _ in range(max(1, min(most, len(self.available)))):
            self.pop_one()

    def pop_one(self) -> None:
        assert self.queue.has_chains() == bool(self.available)
        chain = self.queue.pop()
        if not self.available:
            assert chain is None
            return
        assert chain is not None
        offer = self.available.pop(0)
        assert Offer(chain.head, b"".join(chain.readable), sum(map(len, chain.writable))) == offer
        assert (chain.readable_size, chain.writable_size) == (len(offer.readable), offer.writable)
        self.popped.append((offer, chain))
        self.rewindable += 1

    @rule(data=st.data(), everything=st.booleans())
    def push(self, data: st.DataObject, everything: bool) -> None:
        which = range(len(self.popped))
        subset = st.lists(st.sampled_from(which), unique=True) if which else st.just([])
        chosen = list(which) if everything else data.draw(subset)
        done = []
        for index in chosen:
            offer, chain = self.popped[index]
            written = data.draw(st.integers(0, offer.writable))
            content = bytes((index + at) % 256 for at in range(written))
            self._fill(chain, content)
            done.append((chain, written))
            self.used.append((offer.head, written, content))
        if chosen:
            self.rewindable = min(self.rewindable, len(self.popped) - 1 - max(chosen))
        self.popped = [entry for index, entry in enumerate(self.popped) if index not in chosen]
        self.queue.push_all(done)
        self.interrupted |= self.queue.needs_interrupt()

    def _fill(self, chain: Chain, content: bytes) -> None:
        for buffer in chain.writable:
            piece, content = content[: len(buffer)], content[len(buffer) :]
            buffer[: len(piece)] = piece

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        self._rewind(data.draw(st.integers(0, self.rewindable)))

    def _rewind(self, number: int) -> None:
        self.queue.rewind(number)
        kept = len(self.popped) - number
        self.available[:0] = [offer for offer, _ in self.popped[kept:]]
        self.popped = self.popped[:kept]
        self.rewindable -= number
        self.device_asleep &= not number  # it knows of these

    @rule()
    def device_sleeps(self) -> None:
        self.kicked = False
        more = self.queue.set_notification(enabled=True)
        assert more == bool(self.available)
        self.device_asleep = not more

    @rule()
    def device_stays_awake(self) -> None:
        self.queue.set_notification(enabled=False)
        self.device_asleep = False

    @rule()
    def move(self) -> None:
        """All that another device, or vhost, gets of it is the state."""
        for offer, chain in self.popped[: len(self.popped) - self.rewindable]:
            self.queue.push(chain, 0)
            self.used.append((offer.head, 0, b""))
        self.interrupted |= self.queue.needs_interrupt()
        self.popped = self.popped[len(self.popped) - self.rewindable :]
        self._rewind(self.rewindable)
        self.queue.close()
        state = load(QueueState, save(self.queue.state))
        self.queue = Virtqueue("queue", self.memory, 8)
        self.queue.state = state
        self.start()
        self.device_asleep = False

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        assert self.kicked or not (self.device_asleep and self.available)
        assert self.interrupted or not (self.driver_asleep and self.used)

    def teardown(self) -> None:
        self.popped = []
        self.queue.close()
        unmap(self.memory)


def test_queue_and_driver_in_any_order() -> None:
    run_state_machine_as_test(QueueModel, settings=RUNS)  # type: ignore[no-untyped-call]


class DeviceModel(RuleBasedStateMachine):
    """A device on its bus, and a driver that sleeps until it is interrupted.

    Whenever all is at rest, everything offered has come back, and the driver has been told.
    """

    @initialize(msix=st.booleans(), features=st.sampled_from([0, 1 << 28, 1 << 29, 3 << 28]))
    def begin(self, msix: bool, features: int) -> None:
        self.msix, self.features = msix, features
        self.memory, self.loop = guest_memory(RAM), ManualLoop()
        self.paused = False
        self.machine()
        self.reset()

    def machine(self) -> None:
        self.board = Board()
        self.device = Echo("echo0/virtio-echo", self.memory, self.loop, max_size=4)
        self.guest = PciGuest(self.board, VirtioPci("echo0", self.device, self.board.sink), self.memory)

    @rule()
    def reset(self) -> None:
        self.guest.start(self.features, msix=self.msix)
        self.guest.broken.clear()
        self.guest.interrupts()
        self.broken = False
        self.expected: list[dict[int, bytes]] = [{}, {}]
        self.vectors = {1: {0}, 2: {1}}  # which queues each of them has been for
        self.told: set[int] = set()  # queues the driver has been interrupted for since it last looked

    @rule(index=st.integers(0, 1), data=st.binary(min_size=1, max_size=6), kick=st.booleans())
    def offer(self, index: int, data: bytes, kick: bool) -> None:
        try:
            head = self.guest.queues[index].offer([data], [len(data)])
        except IndexError:
            return
        self.expected[index][head] = data
        if kick:
            self.kick(index)

    def kick(self, index: int) -> None:
        if self.guest.queues[index].needs_kick():
            self.guest.ring(index)

    @rule()
    def the_loop_turns(self) -> None:
        self.loop.once()

    @rule(index=st.integers(0, 1))
    def take(self, index: int) -> None:
        self.listen()
        ring = self.guest.queues[index]
        for head, written in ring.used():
            assert ring.content(head) == self.expected[index].pop(head)
            assert written == len(ring.content(head))
        self.told.discard(index)

    def listen(self) -> None:
        """Handle interrupts as they come: which queue was it?"""
        for vector in self.guest.interrupts():
            self.told |= self.vectors.get(vector, set())
        if self.guest.intx():
            self.told |= {0, 1} if self.guest.read_isr() & 1 else set()

    @rule()
    def pause(self) -> None:
        self.device.pause()
        self.paused = True

    @rule()
    def resume(self) -> None:
        self.device.resume()
        self.paused = False

    @rule(masked=st.booleans())
    def mask(self, masked: bool) -> None:
        if self.msix:
            self.guest.config.write(self.guest.config.capability(MSIX) + 2, 2, 0xC000 if masked else 0x8000)

    @rule(vector=st.sampled_from([1, 2]))
    def map_a_queue_elsewhere(self, vector: int) -> None:
        if self.msix:
            self.guest.select(0)
            self.guest.put(Reg.QUEUE_VECTOR, vector)
            self.vectors[vector].add(0)

    @rule(place=st.integers(0, 3))
    def move_the_bar(self, place: int) -> None:
        self.guest.move_bar(BAR + place * BAR_SIZE)

    @rule(index=st.integers(0, 1))
    def break_the_ring(self, index: int) -> None:
        ring = self.guest.queues[index]
        ring.store(ring.driver + 2, ring.load(ring.driver + 2) + 99 & 0xFFFF)
        self.guest.ring(index)
        self.broken = True

    @precondition(lambda self: not self.broken)
    @rule()
    def migrate(self) -> None:
        self.device.pause()
        self.guest.function.pause()
        self.listen()
        sections = save(self.device.state), save(self.guest.function.state)
        here, place = self.guest, self.guest.bar
        here.close()
        self.board.close()
        self.machine()
        self.guest.queues = here.queues
        self.guest.move_bar(place)
        self.device.pause()
        self.device.state = load(EchoState, sections[0])
        self.device.post_load()
        self.guest.function.state = load(VirtioPciState, sections[1])
        self.guest.function.post_load()
        assert (save(self.device.state), save(self.guest.function.state)) == sections
        if not self.paused:
            self.device.resume()

    @precondition(lambda self: not self.broken and not self.paused)
    @rule()
    def come_to_rest(self) -> None:
        """Every kick that is due, every event, every interrupt."""
        for index in (0, 1):
            self.kick(index)
        self.loop.run()
        self.mask(masked=False)
        self.listen()
        for index in (0, 1):
            assert index in self.told or not self.guest.queues[index].unseen
            self.take(index)
        assert self.expected == [{}, {}]

    @invariant()
    def only_a_broken_ring_breaks_it(self) -> None:
        assert self.broken or not self.guest.broken

    def teardown(self) -> None:
        self.guest.close()
        self.board.close()
        unmap(self.memory)


def test_device_and_driver_in_any_order() -> None:
    run_state_machine_as_test(DeviceModel, settings=RUNS)  # type: ignore[no-untyped-call]


# Drivers that mean no good

WORDS = st.integers(0, 0xFFFF)
# Buffers, the rings themselves (a device that writes its own ring), the end of RAM, nowhere, and round the end.
ADDRESSES = st.one_of(
    st.integers(0x8000, 0x9000),
    st.integers(0xFF0, 0x1200),
    st.integers(RAM - 40, RAM + 8),
    st.integers(2**64 - 40, 2**64 - 1),
)
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([16, 32, 48, 128, 144, 0xFFFF_FFFF, 0x8000_0000, RAM]))
FLAGS = st.one_of(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT]), WORDS)
DESCRIPTORS = st.lists(st.tuples(ADDRESSES, LENGTHS, FLAGS, st.integers(0, 9) | WORDS), max_size=8)


@given(
    table=DESCRIPTORS,
    indirect=DESCRIPTORS,
    heads=st.lists(st.integers(0, 9) | WORDS, max_size=8),
    avail=st.integers(0, 9) | WORDS,
    features=st.sampled_from([0, 1 << 28, 1 << 29, 3 << 28]),
    noise=st.lists(st.tuples(st.integers(0x1000, 0x1100), WORDS), max_size=4),
)
@EXAMPLES
def test_any_ring_is_served_or_breaks_its_device_until_reset(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    avail: int,
    features: int,
    noise: list[tuple[int, int]],
) -> None:
    memory, loop = guest_memory(RAM), ManualLoop()
    guest = Guest(Echo("echo", memory, loop), memory)
    guest.start(features)
    loop.run()
    ring = guest.queues[0]
    for index, entry in enumerate(table):
        ring.write_desc(index, *entry)
    for index, entry in enumerate(indirect):
        RingDriver.write_desc(ring, 0, *entry)
        memory.write(0x8000 + 16 * index, memory.read(ring.desc, 16))
    for index, entry in enumerate(table[:1]):
        ring.write_desc(index, *entry)
    for head in heads:
        ring.put(head)
    ring.store(ring.driver + 2, avail)
    guest.transport.doorbells[0].signal()
    for gpa, word in [*noise, (0x1000, 0)]:
        loop.once()
        ring.store(gpa, word)
    assert guest.status() in (LIVE, LIVE | Status.NEEDS_RESET)
    assert len(guest.broken) == bool(guest.status() & Status.NEEDS_RESET)
    guest.start()
    head = guest.queues[0].offer([b"hello"], [5])
    guest.kick(0)
    assert guest.queues[0].used() == [(head, 5)]
    guest.close()
    unmap(memory)


class Access(NamedTuple):
    """``where`` is the BAR, configuration space, or the loop (which just turns)."""

    where: str
    offset: int
    size: int
    value: int | None  # None is a read


OFFSETS = st.one_of(
    st.sampled_from([offset for offset, _ in (reg.value for reg in Reg)]),
    st.integers(0, 0x3F),
    st.sampled_from([0x1000, 0x1001, 0x2000, 0x2FFC, 0x3000, 0x3004, 0x3008, 0x3FFC, 0x4000, 0x400C, 0x7000, 0x7FF8]),
    st.integers(0, BAR_SIZE - 1),
)
VALUES = st.one_of(st.integers(0, 15), st.sampled_from([1 << bit for bit in range(64)]), st.integers(0, 2**64 - 1))
ACCESSES = st.lists(
    st.builds(
        Access,
        st.sampled_from(["bar", "bar", "bar", "config", "loop"]),
        OFFSETS,
        st.sampled_from([1, 2, 4, 8]),
        st.none() | VALUES,
    ),
    max_size=60,
)


@given(accesses=ACCESSES, live=st.booleans(), msix=st.booleans())
@EXAMPLES
def test_any_access_is_survived_and_leaves_a_state_that_loads(accesses: list[Access], live: bool, msix: bool) -> None:
    memory, loop, board = guest_memory(RAM), ManualLoop(), Board()
    device = Echo("echo0/virtio-echo", memory, loop)
    guest = PciGuest(board, VirtioPci("echo0", device, board.sink), memory)
    guest.start(msix=msix, go=live)
    for where, offset, size, value in accesses:
        base = {"bar": guest.bar, "config": guest.config.base}.get(where)
        if base is None:
            loop.once()
        elif value is None:
            assert (
                0
                <= board.mmio.read(base + offset % 0x1000 if where == "config" else base + offset, size)
                < 1 << 8 * size
            )
        else:
            address = base + offset % 0x1000 if where == "config" else base + offset
            board.mmio.write(address, size, value & (1 << 8 * size) - 1)
    guest.function.pause()
    for kind, state in ((EchoState, device.state), (VirtioPciState, guest.function.state)):
        assert save(load(kind, save(state))) == save(state)
    guest.move_bar(BAR)
    guest.config.enable()
    guest.start()
    loop.run()
    head = guest.queues[0].offer([b"hello"], [5])
    guest.kick(0)
    assert guest.queues[0].used() == [(head, 5)]
    guest.close()
    board.close()
    unmap(memory)


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "size": WORDS | st.sampled_from([1, 2, 4, 8]),
            "desc": ADDRESSES,
            "driver": ADDRESSES,
            "device": ADDRESSES,
            "vector": WORDS,
            "last_avail": WORDS | st.integers(0, 9),
            "next_used": WORDS | st.integers(0, 9),
            "enabled": st.booleans() | st.integers(0, 1),
        },
    ),
    status=st.integers(-1, 256) | st.just(15),
)
@EXAMPLES
def test_any_state_is_refused_or_at_worst_a_broken_device(fields: dict[str, object], status: int) -> None:
    memory, loop = guest_memory(RAM), ManualLoop()
    guest = Guest(Echo("echo", memory, loop), memory)
    guest.start()
    guest.device.pause()
    section = save(guest.device.state)
    section["state"]["virtio"]["status"] = status
    section["state"]["virtio"]["queues"][0].update(fields)
    try:
        guest.device.state = load(EchoState, section)
    except StateError:
        pass
    else:
        guest.device.post_load()
    guest.device.resume()
    for _ in range(4):
        loop.once()
    assert save(load(EchoState, save(guest.device.state))) == save(guest.device.state)
    guest.start()
    head = guest.queues[0].offer([b"hello"], [5])
    guest.kick(0)
    assert guest.queues[0].used() == [(head, 5)]
    guest.close()
    unmap(memory)
