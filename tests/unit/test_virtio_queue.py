"""Virtqueues: a request goes there and back, whatever the ring looks like, and a broken ring is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvmpy.devices.virtio.queue import CHAIN_BYTES, Chain, QueueError, Virtqueue
from kvmpy.memory import GuestMemory
from tests.fakes.virtio_driver import INDIRECT, NEXT, WRITE, Bytes, RingDriver, guest_memory, unmap

SIZE = 8
RAM = 1 << 20


class Pair:
    """A queue and its driver."""

    def __init__(self, memory: GuestMemory, *, event_idx: bool = False, indirect: bool = False) -> None:
        self.event_idx, self.indirect = event_idx, indirect
        self.driver = RingDriver(memory, 0x1000, SIZE, event_idx=event_idx, indirect=indirect)
        self.queue = Virtqueue("net rx", memory, SIZE)
        self.driver.configure(self.queue.state)
        self.start()

    def start(self) -> None:
        self.queue.start(indirect=True, event_idx=self.event_idx)

    def pop(self) -> Chain:
        chain = self.queue.pop()
        assert chain is not None
        return chain


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = guest_memory(RAM)
    yield memory
    unmap(memory)


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def event_idx(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def pair(memory: GuestMemory, event_idx: bool) -> Iterator[Pair]:
    pair = Pair(memory, event_idx=event_idx)
    yield pair
    pair.queue.close()


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_goes_there_and_back(pair: Pair, indirect: bool) -> None:
    head = pair.driver.offer([b"head", b"", b"er"], [0, 3, 5], indirect=indirect)
    chain = pair.pop()
    assert (chain.head, chain.readable_size, chain.writable_size) == (head, 6, 8)
    assert b"".join(chain.readable) == b"header"
    chain.writable[0][:], chain.writable[1][:] = b"abc", b"defgh"
    pair.queue.push(chain, 7)
    assert pair.driver.used() == [(head, 7)]
    assert pair.driver.content(head) == b"abcdefgh"


def test_direct_descriptors_may_come_before_an_indirect_table(pair: Pair, memory: GuestMemory) -> None:
    memory.write(0x8000, (0x9000).to_bytes(8, "little") + (4).to_bytes(4, "little") + bytes(4))
    pair.driver.write_desc(0, 0xA000, 2, NEXT, 1)
    # WRITE says nothing here: the table is read, whatever its buffers are for.
    pair.driver.write_desc(1, 0x8000, 16, INDIRECT | WRITE)
    pair.driver.put(0)
    pair.driver.publish()
    assert [len(view) for view in pair.pop().readable] == [2, 4]


def test_an_empty_queue_has_nothing(pair: Pair) -> None:
    assert pair.queue.pop() is None
    assert not pair.queue.has_chains()


def test_a_stopped_queue_has_nothing_and_takes_nothing(pair: Pair) -> None:
    pair.driver.offer([b"x"])
    pair.driver.offer([b"y"])
    chain = pair.pop()
    pair.queue.stop()
    assert pair.queue.pop() is None
    assert not pair.queue.has_chains()
    assert not pair.queue.set_notification(enabled=True)
    pair.queue.push(chain, 0)
    assert not pair.queue.needs_interrupt()
    assert pair.driver.used() == []


def test_chains_come_back_in_any_order(pair: Pair) -> None:
    heads = [pair.driver.offer([bytes([i])]) for i in range(3)]
    first, second, third = (pair.pop() for _ in range(3))
    pair.queue.push_all([(third, 0), (first, 0)])
    pair.queue.push(second, 0)
    assert [head for head, _ in pair.driver.used()] == [heads[2], heads[0], heads[1]]


def test_rewound_chains_are_popped_again(pair: Pair) -> None:
    heads = [pair.driver.offer([b"x"]) for _ in range(3)]
    popped = [pair.pop() for _ in range(3)]
    pair.queue.push(popped[0], 0)
    pair.queue.rewind(2)
    assert pair.queue.has_chains()
    assert [pair.pop().head for _ in range(2)] == heads[1:]


def test_it_goes_on_where_the_state_says(pair: Pair, memory: GuestMemory) -> None:
    pair.driver.offer([b"x"])
    pair.queue.push(pair.pop(), 0)
    second = pair.driver.offer([b"y"])
    pair.queue.stop()
    pair.start()
    assert pair.pop().head == second


def test_indices_wrap(pair: Pair) -> None:
    pair.queue.stop()
    pair.driver.begin_at(pair.queue.state, 0xFFE0)
    pair.start()
    for _ in range(8):
        heads = [pair.driver.offer([b"x"]) for _ in range(8)]
        assert [pair.pop().head for _ in range(8)] == heads
        pair.queue.rewind(8)
        for chain in pair.queue.chains():
            pair.queue.push(chain, 0)
        assert pair.queue.needs_interrupt()
        pair.queue.kick.take()
        pair.driver.used()


def test_chains_stops_after_a_queueful_and_kicks_itself(pair: Pair) -> None:
    seen = 0
    pair.driver.offer([b"x"])
    for chain in pair.queue.chains():
        seen += 1
        pair.queue.push(chain, 0)
        pair.driver.used()
        pair.driver.offer([b"x"])
    assert seen == SIZE
    assert pair.queue.kick.take() == 1


def test_chains_leaves_kicks_on_when_it_has_seen_all(pair: Pair) -> None:
    pair.driver.offer([b"x"])
    assert pair.driver.needs_kick()
    for chain in pair.queue.chains():
        pair.driver.offer([b"y"])  # into the gap: found without a kick
        assert pair.driver.needs_kick() is False
        pair.queue.push(chain, 0)
        break
    assert pair.queue.set_notification(enabled=True)
    assert len(list(pair.queue.chains())) == 1
    pair.driver.offer([b"z"])
    assert pair.driver.needs_kick()


def test_no_interrupt_while_the_driver_wants_none(pair: Pair) -> None:
    pair.driver.want_interrupts(wanted=False)
    pair.driver.offer([b"x"])
    pair.queue.push(pair.pop(), 0)
    assert not pair.queue.needs_interrupt()
    assert pair.driver.want_interrupts(wanted=True)
    pair.driver.used()
    pair.driver.want_interrupts(wanted=True)
    pair.driver.offer([b"x"])
    pair.queue.push(pair.pop(), 0)
    assert pair.queue.needs_interrupt()
    assert not pair.queue.needs_interrupt()


def test_a_batch_is_one_interrupt(pair: Pair) -> None:
    for _ in range(5):
        pair.driver.offer([b"x"])
    pair.queue.push_all([(pair.pop(), 0) for _ in range(5)])
    assert pair.queue.needs_interrupt()
    assert not pair.queue.needs_interrupt()
    pair.driver.used()
    pair.driver.offer([b"x"])
    pair.queue.push(pair.pop(), 0)
    assert pair.queue.needs_interrupt()


def test_with_event_index_the_driver_hears_of_what_it_waits_for_and_no_more(memory: GuestMemory) -> None:
    pair = Pair(memory, event_idx=True)
    for _ in range(3):
        pair.driver.offer([b"x"])
    heard = []
    for _ in range(3):
        pair.queue.push(pair.pop(), 0)
        heard.append(pair.queue.needs_interrupt())
    assert heard == [True, False, False]
    pair.queue.close()


def test_the_first_interrupt_after_a_move_is_not_lost_where_indices_wrap(memory: GuestMemory) -> None:
    pair = Pair(memory, event_idx=True)
    pair.driver.begin_at(pair.queue.state, 0xFFFF)
    pair.start()
    pair.driver.offer([b"x"])
    pair.queue.push(pair.pop(), 0)
    assert pair.queue.needs_interrupt()
    pair.queue.close()


# Broken rings: each is refused, and the queue is as before.


def looping(driver: RingDriver) -> None:
    driver.write_desc(0, 0x8000, 4, NEXT, 1)
    driver.write_desc(1, 0x8000, 4, NEXT, 0)
    driver.put(0)


def next_beyond_the_table(driver: RingDriver) -> None:
    driver.write_desc(0, 0x8000, 4, NEXT, SIZE)
    driver.put(0)


def head_beyond_the_table(driver: RingDriver) -> None:
    driver.put(SIZE)


def read_after_write(driver: RingDriver) -> None:
    driver.write_desc(0, 0x8000, 4, NEXT | WRITE, 1)
    driver.write_desc(1, 0x8000, 4, 0)
    driver.put(0)


def outside_ram(driver: RingDriver) -> None:
    driver.write_desc(0, RAM - 4, 5, 0)
    driver.put(0)


def wrapping(driver: RingDriver) -> None:
    driver.write_desc(0, 2**64 - 4, 8, 0)
    driver.put(0)


def far_too_long(driver: RingDriver) -> None:
    driver.write_desc(0, 0x8000, 0xFFFF_FFFF, WRITE)
    driver.put(0)


def table(driver: RingDriver, *entries: tuple[int, int, int, int], size: int | None = None, flags: int = 0) -> None:
    for index, (gpa, length, entry_flags, following) in enumerate(entries):
        entry = b"".join(
            value.to_bytes(width, "little")
            for value, width in ((gpa, 8), (length, 4), (entry_flags, 2), (following, 2))
        )
        driver.memory.write(0x8000 + 16 * index, entry)
    driver.write_desc(0, 0x8000, 16 * len(entries) if size is None else size, INDIRECT | flags, 1)
    driver.put(0)


def table_outside_ram(driver: RingDriver) -> None:
    driver.write_desc(0, RAM, 16, INDIRECT)
    driver.put(0)


DIRECT: list[Callable[[RingDriver], None]] = [
    looping,
    next_beyond_the_table,
    head_beyond_the_table,
    read_after_write,
    outside_ram,
    wrapping,
    far_too_long,
    table_outside_ram,
]
TABLES: dict[str, Callable[[RingDriver], None]] = {
    "looping": lambda driver: table(driver, (0x9000, 4, NEXT, 0)),
    "nested": lambda driver: table(driver, (0x9000, 16, INDIRECT, 0)),
    "next beyond": lambda driver: table(driver, (0x9000, 4, NEXT, 1)),
    "empty": lambda driver: table(driver, size=0),
    "no multiple of 16": lambda driver: table(driver, (0x9000, 4, 0, 0), size=17),
    "longer than the queue": lambda driver: table(driver, (0x9000, 4, 0, 0), size=16 * SIZE + 16),
    "with a next": lambda driver: table(driver, (0x9000, 4, 0, 0), flags=NEXT),
    "read after write": lambda driver: table(driver, (0x9000, 4, NEXT | WRITE, 1), (0x9000, 4, 0, 0)),
}


@pytest.mark.parametrize("break_it", [*DIRECT, *(pytest.param(call, id=name) for name, call in TABLES.items())])
def test_a_broken_chain_is_refused(pair: Pair, break_it: Callable[[RingDriver], None]) -> None:
    break_it(pair.driver)
    pair.driver.publish()
    with pytest.raises(QueueError, match=r"^net rx: "):
        pair.queue.pop()
    assert (pair.queue.state.last_avail, pair.queue.state.next_used) == (0, 0)


def test_an_indirect_table_that_was_not_negotiated_is_refused(pair: Pair) -> None:
    pair.queue.start(indirect=False, event_idx=False)
    table(pair.driver, (0x9000, 4, 0, 0))
    pair.driver.publish()
    with pytest.raises(QueueError, match="not negotiated"):
        pair.queue.pop()


def test_the_same_megabytes_over_and_over_are_refused() -> None:
    memory = guest_memory(CHAIN_BYTES // 4)
    pair = Pair(memory)
    for index in range(4):
        pair.driver.write_desc(index, 0, CHAIN_BYTES // 4, NEXT if index < 3 else 0, index + 1)
    pair.driver.put(0)
    pair.driver.publish()
    assert pair.pop().readable_size == CHAIN_BYTES
    pair.queue.rewind(1)
    pair.driver.write_desc(3, 0, CHAIN_BYTES // 4, NEXT, 4)
    pair.driver.write_desc(4, 0, 1, 0)
    with pytest.raises(QueueError, match="a chain of 0x10000001 bytes"):
        pair.queue.pop()
    pair.queue.close()


@pytest.mark.parametrize("avail", [SIZE + 1, 0xFFFF, 0x8000])
def test_an_available_index_that_jumps_is_refused(pair: Pair, avail: int) -> None:
    pair.driver.store(pair.driver.driver + 2, avail)
    with pytest.raises(QueueError, match="available index"):
        pair.queue.pop()
    with pytest.raises(QueueError, match="available index"):
        pair.queue.set_notification(enabled=True)


def test_an_available_index_that_goes_back_is_refused(pair: Pair) -> None:
    for _ in range(3):
        pair.driver.offer([b"x"])
        pair.pop()
    pair.driver.store(pair.driver.driver + 2, 1)
    with pytest.raises(QueueError, match="available index"):
        pair.queue.pop()


def test_more_chains_in_flight_than_descriptors_are_refused(pair: Pair) -> None:
    for _ in range(SIZE):
        pair.driver.put(0)
    pair.driver.publish()
    for _ in range(SIZE):
        pair.pop()
    pair.driver.put(0)
    pair.driver.publish()
    with pytest.raises(QueueError, match="available index"):
        pair.queue.pop()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", 3),
        ("size", 2 * SIZE),
        ("desc", 8),
        ("driver", 1),
        ("device", 2),
        ("desc", RAM - 16),
        ("driver", RAM - 2),
        ("device", 2**64 - 4),
        ("last_avail", SIZE + 1),
        ("next_used", 1),
    ],
)
def test_a_state_no_driver_can_have_set_up_is_refused(pair: Pair, field: str, value: int) -> None:
    setattr(pair.queue.state, field, value)
    with pytest.raises(QueueError, match=r"^net rx: "):
        pair.start()
    assert not pair.queue.running


def test_nothing_of_guest_memory_is_held_once_stopped(event_idx: bool) -> None:
    memory = guest_memory(RAM)
    pair = Pair(memory, event_idx=event_idx)
    pair.driver.offer([b"x"])
    backing = memory.blocks[0].backing
    assert isinstance(backing, Bytes)
    memory.close()
    with pytest.raises(BufferError):
        backing.close()
    pair.queue.close()
    backing.close()
