"""The driver's side of a split virtqueue, and guest memory for it to live in.

    memory = guest_memory(1 << 20)
    driver = RingDriver(memory, gpa=0x1000, size=8, event_idx=True)
    driver.configure(queue.state)
    queue.start(indirect=True, event_idx=True)
    head = driver.offer(readable=[b"request"], writable=[512])
    ...
    assert driver.used() == [(head, 512)]
    assert driver.content(head) == b"..."

Written from the specification alone (Virtio 1.2, section 2.7): it shares no code with the device's side. It is honest
unless told otherwise: `write_desc`, `put`, and `store` make every kind of broken ring.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from kvmpy._native import ffi
from kvmpy.devices.virtio.queue import QueueState
from kvmpy.memory import GuestMemory, Ram

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4


class Bytes:
    """Backing for RAM: a bytearray."""

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)
        self.view = memoryview(self._bytes)
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(self._bytes)))

    def close(self) -> None:
        """Raises BufferError if anybody still has a view, as unmapping real memory would."""
        self.view.release()
        self._bytes.clear()


def guest_memory(size: int, gpa: int = 0) -> GuestMemory:
    """One block of RAM."""
    memory = GuestMemory()
    memory.add(Ram(gpa, size, Bytes(size)))
    return memory


def unmap(memory: GuestMemory) -> None:
    """Close fake memory. Raises BufferError if anybody still has a view of it."""
    backings = [block.backing for block in memory.blocks]
    memory.close()
    for backing in backings:
        assert isinstance(backing, Bytes)
        backing.close()


class RingDriver:
    """One queue as its driver sees it. ``room`` is the bytes it has for the buffers of one chain.

    With ``indirect`` a chain of more than one descriptor goes into a table of its own (``offer`` can say otherwise).
    """

    def __init__(
        self,
        memory: GuestMemory,
        gpa: int,
        size: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        room: int = 4096,
    ) -> None:
        self.memory, self.size, self.event_idx, self.indirect, self.room = memory, size, event_idx, indirect, room
        self.desc = gpa + -gpa % 16
        self.driver = self.desc + 16 * size
        self.device = self.driver + 4 + 2 * size + 2
        self.device += -self.device % 4
        self._buffers = self.device + 4 + 8 * size + 2
        self._buffers += -self._buffers % 16
        self.end = self._buffers + size * room
        memory.write(self.desc, bytes(self.end - self.desc))
        self.free = list(range(size))
        self._chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        self._content: dict[int, list[bytes]] = {}
        self._avail = self._kicked = self._last_used = 0
        self._wants_interrupts = True

    def configure(self, state: QueueState) -> None:
        """Tell the device where the rings are, as the transport's registers would."""
        state.size, state.enabled = self.size, True
        state.desc, state.driver, state.device = self.desc, self.driver, self.device

    def begin_at(self, state: QueueState, index: int) -> None:
        """As if ``index`` chains had gone there and back already: both sides' indices wrap soon. Before the start."""
        state.last_avail = state.next_used = self._avail = self._kicked = self._last_used = index
        self.publish()
        self.store(self.device + 2, index)
        if self.event_idx:
            self.store(self.device + 4 + 8 * self.size, index)
        self.want_interrupts(wanted=self._wants_interrupts)

    # What every driver does

    def offer(
        self,
        readable: Sequence[bytes] = (),
        writable: Sequence[int] = (),
        *,
        publish: bool = True,
        indirect: bool | None = None,
    ) -> int:
        """Make a chain of buffers available; returns its head. Raises IndexError where descriptors are used up."""
        count = len(readable) + len(writable)
        if indirect is None:
            indirect = self.indirect and count > 1
        if len(self.free) < (1 if indirect else count):
            raise IndexError("no free descriptors")
        taken = [self.free.pop(0) for _ in range(1 if indirect else count)]
        head = taken[0]
        at = slot = self._buffers + head * self.room
        if indirect:
            at += 16 * count
        parts: list[tuple[int, int, int]] = []
        for data in readable:
            self.memory.write(at, data)
            parts.append((at, len(data), 0))
            at += len(data)
        for length in writable:
            parts.append((at, length, WRITE))
            at += length
        assert at <= slot + self.room, "a chain with more bytes than room"
        if indirect:
            for index, (gpa, length, flags) in enumerate(parts):
                last = index == count - 1
                entry = struct.pack("<QIHH", gpa, length, flags | (0 if last else NEXT), 0 if last else index + 1)
                self.memory.write(slot + 16 * index, entry)
            self.write_desc(head, slot, 16 * count, INDIRECT, 0)
        else:
            for index, (gpa, length, flags), following in zip(taken, parts, [*taken[1:], None], strict=True):
                self.write_desc(index, gpa, length, flags | (0 if following is None else NEXT), following or 0)
        self._chains[head] = (taken, [(gpa, length) for gpa, length, flags in parts if flags & WRITE])
        self.put(head)
        if publish:
            self.publish()
        return head

    def publish(self) -> None:
        """Let the device see what has been offered."""
        self.store(self.driver + 2, self._avail)

    def needs_kick(self) -> bool:
        """Whether the device wants to hear of what was published since the last call."""
        old, new, self._kicked = self._kicked, self._avail, self._avail
        if old == new:
            return False
        if self.event_idx:
            event = self.load(self.device + 4 + 8 * self.size)
            return (new - event - 1) % 65536 < (new - old) % 65536
        return not self.load(self.device) & 1

    def used(self) -> list[tuple[int, int]]:
        """(head, bytes written) of each chain that came back since the last call; what it held is in `content`."""
        found = []
        while self._last_used != self.load(self.device + 2):
            at = self.device + 4 + 8 * (self._last_used % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            taken, writable = self._chains.pop(head)  # KeyError: a chain came back that was not out
            self._content[head] = [self.memory.read(gpa, length) for gpa, length in writable]
            self.free.extend(taken)
            self._last_used = (self._last_used + 1) % 65536
            found.append((head, written))
        if self._wants_interrupts:
            self.want_interrupts(wanted=True)
        return found

    def buffers(self, head: int) -> list[bytes]:
        """The writable buffers of a chain that came back, whole."""
        return self._content[head]

    def writable(self, head: int) -> list[tuple[int, int]]:
        """Where the writable buffers of a chain are that has not come back, and their sizes."""
        return self._chains[head][1]

    def content(self, head: int) -> bytes:
        """What the writable buffers of a chain that came back hold, one behind the other."""
        return b"".join(self._content[head])

    def want_interrupts(self, *, wanted: bool) -> bool:
        """Ask for an interrupt with each used chain that `used` has not seen, or for none.

        True if there are some to take already. At first they are wanted.
        """
        self._wants_interrupts = wanted
        if self.event_idx:
            # "None" is an index that has just been passed: it comes up again after all others.
            self.store(self.driver + 4 + 2 * self.size, (self._last_used if wanted else self._last_used - 1) % 65536)
        else:
            self.store(self.driver, 0 if wanted else 1)
        return self.unseen

    @property
    def unseen(self) -> bool:
        """Whether `used` has something to give."""
        return self._last_used != self.load(self.device + 2)

    @property
    def outstanding(self) -> set[int]:
        """Heads of the chains that the device has."""
        return set(self._chains)

    # The parts, for drivers that break the rules

    def write_desc(self, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        """Store a descriptor."""
        self.memory.write(self.desc + 16 * index, struct.pack("<QIHH", gpa, length, flags, following))

    def put(self, head: int) -> None:
        """Write ``head`` into the next entry of the available ring; `publish` shows it."""
        self.store(self.driver + 4 + 2 * (self._avail % self.size), head)
        self._avail = (self._avail + 1) % 65536

    def load(self, gpa: int) -> int:
        """The 16-bit word at ``gpa``."""
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def store(self, gpa: int, value: int) -> None:
        """Set the 16-bit word at ``gpa``."""
        self.memory.write(gpa, value.to_bytes(2, "little"))
