"""A virtio console as its driver sees it: nothing is lost or piles up, whoever is slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.virtio.console import BUDGET, PIECE, ConsoleFeature, ConsoleState, Port, VirtioConsole
from kvmpy.host.console import Console
from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.blk_rig import HeardTransport
from tests.fakes.host import Screen
from tests.fakes.loop import running
from tests.fakes.virtio_driver import RingDriver, guest_memory
from tests.fakes.virtio_rig import Guest, ManualLoop

TEXT = bytes(32 + n % 95 for n in range(200_000))


class FarEnd(Screen):
    """A backend: a Screen, and input that waits until the guest takes it."""

    def __init__(self, room_left: int | None = None) -> None:
        super().__init__(room_left)
        self.waiting = b""
        self.offers = 0
        self.receive: Callable[[bytes], int] = len
        self.post: Callable[[Callable[[], object]], None] = lambda call: None

    def write(self, data: bytes) -> None:
        assert self.room()
        assert data
        self.take(data)

    def offer(self) -> None:
        self.offers += 1
        self.post(self.deliver)

    def deliver(self) -> None:
        self.waiting = self.waiting[self.receive(self.waiting) :]

    def type(self, data: bytes) -> None:
        self.waiting += data
        self.deliver()


class Rig:
    """A console and its driver, live."""

    def __init__(self, room_left: int | None = None) -> None:
        self.memory, self.loop, self.far = guest_memory(4 << 20), ManualLoop(), FarEnd(room_left)
        self.device = VirtioConsole("con0/virtio-console", self.memory, self.loop, self.far, "pty")
        self.far.receive, self.far.post = self.device.receive, self.loop.post
        self.guest = Guest(self.device, self.memory, room=PIECE * 6, size=16)
        self.guest.start()
        self.loop.run()

    @property
    def rx(self) -> RingDriver:
        return self.guest.queues[Port.RECEIVE]

    @property
    def tx(self) -> RingDriver:
        return self.guest.queues[Port.TRANSMIT]

    def send(self, *parts: bytes, run: bool = True) -> int:
        head = self.tx.offer(readable=list(parts))
        self.guest.kick(Port.TRANSMIT, run=run)
        return head

    def lend(self, *sizes: int) -> int:
        head = self.rx.offer(writable=list(sizes))
        self.guest.kick(Port.RECEIVE)
        return head

    def received(self) -> bytes:
        return b"".join(self.rx.content(head)[:written] for head, written in self.rx.used())

    def room(self, size: int | None) -> None:
        self.far.room_left = size
        self.device.drained()
        self.loop.run()

    def move(self) -> None:
        """Pause it, carry its state elsewhere, and go on there."""
        self.device.pause()
        section = save(self.device.state)
        with self.device.lock:
            self.device.state = load(ConsoleState, section)
            self.device.post_load()
        self.device.resume()
        self.loop.run()

    def close(self) -> None:
        self.guest.close()
        backing = self.memory.blocks[0].backing
        self.memory.close()
        backing.view.release()  # a BufferError if anybody still held guest memory


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


# Output


def test_output_arrives_in_order_and_its_buffers_come_back(rig: Rig) -> None:
    heads = [rig.send(b"hello, ", b"", b"world"), rig.send(b"\n")]
    assert rig.far.text == b"hello, world\n"
    assert rig.tx.used() == [(head, 0) for head in heads]
    assert set(rig.guest.transport.take()) == {Port.TRANSMIT}


def test_output_waits_for_room_in_the_middle_of_a_buffer(rig: Rig) -> None:
    rig.far.room_left = PIECE
    head = rig.send(TEXT[:6000], TEXT[6000:20000])
    assert rig.far.text == TEXT[: len(rig.far.text)]
    assert len(rig.far.text) < 20000
    assert rig.tx.used() == []
    rig.room(None)
    assert rig.far.text == TEXT[:20000]
    assert rig.tx.used() == [(head, 0)]


def test_output_that_waits_is_neither_lost_nor_repeated_by_a_move(rig: Rig) -> None:
    rig.far.room_left = PIECE
    heads = [rig.send(TEXT[:5000], TEXT[5000:15000]), rig.send(TEXT[15000:16000])]
    assert rig.device.state.sent
    rig.move()
    rig.room(PIECE)
    rig.move()
    rig.room(None)
    assert rig.far.text == TEXT[:16000]
    assert rig.tx.used() == [(head, 0) for head in heads]
    assert rig.device.state.sent == 0


def test_state_that_says_more_is_out_than_there_is_ends_the_buffer(rig: Rig) -> None:
    rig.far.room_left = 0
    head = rig.send(b"short")
    rig.device.pause()
    rig.device.state.sent = 2**32 - 1
    rig.device.resume()
    rig.room(None)
    assert rig.tx.used() == [(head, 0)]
    assert rig.far.text == b""


def test_reset_forgets_output_that_waits(rig: Rig) -> None:
    rig.far.room_left = PIECE
    rig.send(TEXT[:20000])
    rig.guest.start()
    rig.room(None)
    before = rig.far.text
    rig.send(b"new")
    assert rig.far.text == before + b"new"


def test_talkative_guest_is_heard_in_turns(rig: Rig) -> None:
    for start in range(0, 16 * 20000, 20000):
        rig.tx.offer(readable=[bytes(20000)] if start else [TEXT[:20000]])
    rig.guest.kick(Port.TRANSMIT, run=False)
    rig.loop.once()
    assert len(rig.far.text) <= BUDGET + PIECE
    rig.loop.run()
    assert len(rig.far.text) == 16 * 20000


def test_requests_without_a_byte_are_taken_in_turns_too(rig: Rig) -> None:
    heads = [rig.tx.offer(writable=[1]) for _ in range(16)]
    rig.guest.kick(Port.TRANSMIT)
    assert rig.tx.used() == [(head, 0) for head in heads]


def test_emergency_byte_needs_no_rings(rig: Rig) -> None:
    rig.guest.device.write_status(0)
    rig.device.config_write(8, 4, 0x1241)
    rig.device.config_write(8, 1, 0x42)
    assert rig.far.text == b"AB"
    assert rig.device.features >> ConsoleFeature.EMERG_WRITE & 1


def test_emergency_byte_is_dropped_where_there_is_no_room(rig: Rig) -> None:
    rig.far.room_left = 0
    rig.device.config_write(8, 4, 0x41)
    assert rig.far.text == b""


def test_rest_of_the_configuration_is_not_writable(rig: Rig) -> None:
    for offset in (0, 1, 4, 7, 9, 12, 4095):
        rig.device.config_write(offset, 4, 0x41414141)
    assert rig.far.text == b""
    assert rig.device.config_read(0, 8) == 0


# Input


def test_input_fills_the_drivers_buffers(rig: Rig) -> None:
    head = rig.lend(3, 2)
    rig.far.type(b"abcdefg")
    assert rig.rx.used() == [(head, 5)]
    assert rig.rx.content(head) == b"abcde"
    assert rig.far.waiting == b"fg"
    assert set(rig.guest.transport.take()) == {Port.RECEIVE}


def test_input_that_waits_is_asked_for_when_there_are_buffers(rig: Rig) -> None:
    rig.far.type(b"typed early")
    assert rig.far.waiting == b"typed early"
    rig.lend(4)
    rig.lend(100)
    assert rig.received() == b"typed early"
    assert rig.far.waiting == b""


def test_backend_is_not_asked_again_and_again_when_nothing_waits(rig: Rig) -> None:
    rig.lend(100)
    rig.far.type(b"x")
    before = rig.far.offers
    for _ in range(5):
        rig.lend(100)
    assert rig.far.offers == before


def test_input_waits_over_a_pause_and_a_reset(rig: Rig) -> None:
    rig.lend(100)
    rig.device.pause()
    rig.far.type(b"while paused")
    assert rig.far.waiting == b"while paused"
    rig.device.resume()
    rig.loop.run()
    assert rig.received() == b"while paused"
    rig.device.write_status(0)
    rig.far.type(b"while reset")
    rig.guest.start()
    rig.lend(100)
    assert rig.received() == b"while reset"


def test_buffer_that_cannot_be_written_breaks_the_device(rig: Rig) -> None:
    rig.rx.offer(readable=[b"?"])
    rig.guest.kick(Port.RECEIVE)
    rig.far.type(b"x")
    assert len(rig.guest.broken) == 1
    assert rig.far.waiting == b"x"
    rig.guest.start()
    rig.lend(10)
    assert rig.received() == b"x"


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(0, 9000)),
            st.tuples(st.just("room"), st.integers(0, 6000)),
            st.tuples(st.just("type"), st.integers(0, 300)),
            st.tuples(st.just("lend"), st.integers(1, 300)),
            st.tuples(st.just("move"), st.just(0)),
        ),
        max_size=30,
    )
)
@settings(max_examples=count(15, 1000), deadline=None)
def test_whatever_the_order_every_byte_arrives_once(steps: list[tuple[str, int]]) -> None:
    rig = Rig(room_left=0)
    sent = typed = 0
    received = b""
    for step, size in steps:
        match step:
            case "send" if rig.tx.free:
                rig.send(TEXT[sent : sent + size])
                sent += size
            case "lend" if rig.rx.free:
                rig.lend(size)
            case "type":
                rig.far.type(TEXT[typed : typed + size])
                typed += size
            case "room":
                rig.room(size)
            case "move":
                rig.move()
        received += rig.received()
        rig.tx.used()
        assert rig.far.text == TEXT[: len(rig.far.text)]
    rig.room(None)
    while rig.far.waiting:
        rig.lend(300)
        received += rig.received()
    assert rig.far.text == TEXT[:sent]
    assert received == TEXT[:typed]
    rig.tx.used()
    assert rig.tx.outstanding == set()
    rig.close()


def test_operator_is_shown_where_it_ends(rig: Rig) -> None:
    assert rig.device.info()["chardev"] == "pty"


def test_real_console_is_a_backend(tmp_path: Path) -> None:
    memory = guest_memory(1 << 20)
    with running("io") as io:
        console = Console(io)
        console.open_file(str(tmp_path / "out.txt"))
        device = VirtioConsole("con0/virtio-console", memory, io, console, "file")
        console.connect(device.receive, device.drained)
        guest = Guest(device, memory, size=8)
        guest.transport = device.transport = transport = HeardTransport()
        guest.start()
        guest.queues[Port.TRANSMIT].offer(readable=[b"to the ", b"file\n"])
        guest.kick(Port.TRANSMIT)
        transport.heard.wait()
        guest.close()
        console.close()
    assert (tmp_path / "out.txt").read_bytes() == b"to the file\n"
