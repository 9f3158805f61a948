"""GuestMemory: one check for every address a guest can name; listeners know exactly what is there."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmpy.errors import GuestError, HostError
from kvmpy.host.memory import Mapping
from kvmpy.memory import GuestMemory, Ram
from tests.counts import count

EXAMPLES = count(20, 5000)


class Bytes:
    """Backing that knows where it would be."""

    def __init__(self, size: int, hva: int = 0x7F00_0000_0000) -> None:
        self.hva, self._bytes = hva, bytearray(size)

    @property
    def view(self) -> memoryview:
        return memoryview(self._bytes)


class Notes:
    """A listener's notes; refuses the block at ``refused``."""

    def __init__(self, name: str, log: list[str], refused: int = -1) -> None:
        self.name, self.log, self.refused = name, log, refused

    def ram_added(self, block: Ram) -> None:
        if block.gpa == self.refused:
            raise HostError(f"{self.name} refuses")
        self.log.append(f"{self.name} + {block.gpa:#x}")

    def ram_removed(self, block: Ram) -> None:
        self.log.append(f"{self.name} - {block.gpa:#x}")


LOW, HIGH = Ram(0x1000, 0x100, Bytes(0x100)), Ram(1 << 32, 0x80, Bytes(0x100), offset=0x80)


def make() -> GuestMemory:
    """Two blocks that touch nothing, and a third right behind the first."""
    memory = GuestMemory()
    memory.add(Ram(0x1000, 0x100, Bytes(0x100)))
    memory.add(Ram(1 << 32, 0x80, Bytes(0x100), offset=0x80))
    memory.add(Ram(0x1100, 0x100, Bytes(0x100)))
    return memory


def in_one_block(gpa: int, size: int) -> bool:
    return size >= 0 and any(
        start <= gpa and gpa + size <= end
        for start, end in ((0x1000, 0x1100), (0x1100, 0x1200), (1 << 32, (1 << 32) + 0x80))
    )


edges = st.sampled_from([0, 0x1000, 0x1100, 0x1200, 1 << 32, (1 << 32) + 0x80, 1 << 63, 1 << 64])
addresses = st.one_of(st.integers(-(1 << 65), 1 << 65), st.builds(int.__add__, edges, st.integers(-300, 300)))
sizes = st.one_of(st.integers(-(1 << 65), 1 << 65), st.integers(-2, 0x210))


@settings(max_examples=EXAMPLES)
@given(addresses, sizes)
@example(0x1000, 0x101)
@example(0x10FF, 2)
@example((1 << 32) + 0x7F, 2)
@example(0xFFF, 1)
@example(0x1200, 0)
def test_access_is_given_exactly_where_one_block_holds_it_all(gpa: int, size: int) -> None:
    memory = make()
    if in_one_block(gpa, size):
        assert len(memory.view(gpa, size)) == size
    else:
        with pytest.raises(GuestError, match=r"guest memory .* is not RAM"):
            memory.view(gpa, size)


def test_refusal_names_the_access() -> None:
    with pytest.raises(GuestError, match=r"^guest memory 0x10f8\+0x10 is not RAM$"):
        make().read(0x10F8, 0x10)


@settings(max_examples=EXAMPLES)
@given(addresses, st.binary(max_size=0x110))
def test_write_stores_all_or_nothing(gpa: int, data: bytes) -> None:
    memory = make()
    before = [bytes(block.view) for block in memory.blocks]
    if in_one_block(gpa, len(data)):
        memory.write(gpa, data)
        assert memory.read(gpa, len(data)) == data
    else:
        with pytest.raises(GuestError):
            memory.write(gpa, data)
        assert [bytes(block.view) for block in memory.blocks] == before


def test_read_is_a_copy_and_view_is_the_guest_itself() -> None:
    memory = make()
    copy, view = memory.read(0x1000, 1), memory.view(0x1000, 1)
    memory.write(0x1000, b"x")
    assert (copy, bytes(view)) == (b"\0", b"x")


def test_block_begins_at_its_offset_of_the_backing() -> None:
    backing = Bytes(0x100, hva=0x7000_0000)
    memory = GuestMemory()
    memory.add(Ram(0x8000, 0x40, backing, offset=0x20))
    memory.write(0x8000, b"begin")
    assert bytes(backing.view[0x20:0x25]) == b"begin"
    assert memory.blocks[0].hva == 0x7000_0020


def test_size_is_that_of_all_blocks_which_are_listed_by_address() -> None:
    memory = make()
    assert memory.size == 0x280
    assert [block.gpa for block in memory.blocks] == [0x1000, 0x1100, 1 << 32]


@pytest.mark.parametrize(("gpa", "size"), [(0x1000, 0x100), (0xFFF, 2), (0x11FF, 1), (0, 0x10_0000), (0x1080, 1)])
def test_overlapping_block_is_refused_and_nobody_is_told(gpa: int, size: int) -> None:
    memory, log = make(), list[str]()
    memory.listen(Notes("kvm", log))
    log.clear()
    with pytest.raises(ValueError, match=rf"RAM at {gpa:#x}\+{size:#x} overlaps the block at"):
        memory.add(Ram(gpa, size, Bytes(size)))
    assert log == []
    assert memory.size == 0x280


def test_listener_hears_of_blocks_there_are_and_of_those_that_come() -> None:
    memory, log = GuestMemory(), list[str]()
    memory.add(LOW)
    memory.listen(Notes("kvm", log))
    memory.add(HIGH)
    assert log == ["kvm + 0x1000", "kvm + 0x100000000"]


def test_block_that_one_listener_refuses_is_forgotten_by_the_others_and_is_no_ram() -> None:
    memory, log = GuestMemory(), list[str]()
    memory.listen(Notes("kvm", log))
    memory.listen(Notes("vhost", log))
    memory.listen(Notes("vfio", log, refused=0x1000))
    with pytest.raises(HostError, match="vfio refuses"):
        memory.add(LOW)
    assert log == ["kvm + 0x1000", "vhost + 0x1000", "vhost - 0x1000", "kvm - 0x1000"]
    with pytest.raises(GuestError):
        memory.read(0x1000, 1)
    memory.add(HIGH)


def test_listener_that_refuses_a_block_there_is_forgets_the_rest_and_hears_no_more() -> None:
    memory, log = GuestMemory(), list[str]()
    memory.add(LOW)
    memory.add(HIGH)
    with pytest.raises(HostError, match="vfio refuses"):
        memory.listen(Notes("vfio", log, refused=HIGH.gpa))
    assert log == ["vfio + 0x1000", "vfio - 0x1000"]
    memory.close()
    assert log == ["vfio + 0x1000", "vfio - 0x1000"]


def test_close_tells_everybody_in_reverse() -> None:
    memory, log = GuestMemory(), list[str]()
    memory.listen(Notes("kvm", log))
    memory.listen(Notes("vhost", log))
    memory.add(LOW)
    memory.add(HIGH)
    log.clear()
    memory.close()
    memory.close()
    assert log == ["vhost - 0x100000000", "kvm - 0x100000000", "vhost - 0x1000", "kvm - 0x1000"]


def test_close_lets_the_backing_be_unmapped() -> None:
    mapping = Mapping(1 << 20)
    memory = GuestMemory()
    memory.add(Ram(0, 1 << 19, mapping))
    memory.add(Ram(1 << 32, 1 << 19, mapping, offset=1 << 19))
    memory.write(0, b"x")
    memory.close()
    mapping.close()
    with pytest.raises(GuestError):
        memory.read(0, 1)


def test_who_listens_no_more_has_been_told_that_everything_goes_and_hears_nothing_else() -> None:
    log: list[str] = []
    memory = make()
    first, second = Notes("a", log), Notes("b", log)
    memory.listen(first)
    memory.listen(second)
    log.clear()
    memory.unlisten(first)
    assert log == ["a - 0x100000000", "a - 0x1100", "a - 0x1000"]
    log.clear()
    memory.unlisten(first)
    memory.add(Ram(0x2000, 0x100, Bytes(0x100)))
    assert log == ["b + 0x2000"]
