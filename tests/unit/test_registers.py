"""Registers under accesses of any width and alignment, hooks, reset, and content from elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.registers import Field, RegisterBank, RegisterSpace
from kvmpy.state import StateError
from tests.counts import count

EXAMPLES = settings(max_examples=count(15, 3000), deadline=None)
SIZE = 24
BYTE = st.integers(0, 255)
ACCESSES = st.lists(st.tuples(st.integers(-4, SIZE + 4), st.integers(1, 8), st.integers(0, 2**64 - 1)), max_size=12)


@st.composite
def masked_bytes(draw: st.DrawFn) -> tuple[int, int, int]:
    """A byte's reset value, its writable bits and those that ones clear: no bit is both."""
    clear = draw(BYTE)
    return draw(BYTE), draw(BYTE) & ~clear, clear


def space_of(masks: list[tuple[int, int, int]]) -> RegisterSpace:
    space = RegisterSpace(SIZE)
    for offset, (reset, writable, clear) in enumerate(masks):
        space.define(offset, 1, reset=reset, writable=writable, clear=clear)
    return space


@given(st.lists(masked_bytes(), min_size=SIZE, max_size=SIZE), ACCESSES)
@EXAMPLES
def test_each_bit_obeys_its_mask_whatever_the_width_and_alignment(
    masks: list[tuple[int, int, int]], accesses: list[tuple[int, int, int]]
) -> None:
    space, model = space_of(masks), [reset for reset, _, _ in masks]
    for offset, size, value in accesses:
        value &= (1 << 8 * size) - 1
        space.write(offset, size, value)
        if offset >= 0 and offset + size <= SIZE:
            for at, byte in enumerate(value.to_bytes(size, "little"), offset):
                _, writable, clear = masks[at]
                model[at] = (model[at] & ~writable | byte & writable) & ~(byte & clear)
        assert list(space.content) == model


@given(st.lists(masked_bytes(), min_size=SIZE, max_size=SIZE), st.integers(-9, SIZE + 1), st.integers(1, 8))
@EXAMPLES
def test_read_gives_what_is_there_and_all_ones_where_any_byte_is_not(
    masks: list[tuple[int, int, int]], offset: int, size: int
) -> None:
    space = space_of(masks)
    there = space.content[offset : offset + size] if offset >= 0 else b""
    expected = int.from_bytes(there, "little") if len(there) == size else (1 << 8 * size) - 1
    assert space.read(offset, size) == expected


@given(st.lists(masked_bytes(), min_size=SIZE, max_size=SIZE), ACCESSES)
@EXAMPLES
def test_what_a_guest_can_have_written_is_adopted_and_reset_undoes_it(
    masks: list[tuple[int, int, int]], accesses: list[tuple[int, int, int]]
) -> None:
    here, there = space_of(masks), space_of(masks)
    for offset, size, value in accesses:
        here.write(offset, size, value & (1 << 8 * size) - 1)
    there.adopt(bytearray(here.content))
    assert there.content == here.content
    there.reset()
    assert list(there.content) == [reset for reset, _, _ in masks]


PLACES = st.lists(
    st.tuples(st.integers(0, SIZE - 8), st.integers(1, 8)), unique_by=lambda place: place[0], min_size=1, max_size=6
)


@given(PLACES, st.integers(0, SIZE), st.integers(1, 8))
@EXAMPLES
def test_hooks_run_for_each_register_that_an_access_touches_in_their_order_and_for_no_other(
    places: list[tuple[int, int]], offset: int, size: int
) -> None:
    space, seen = RegisterSpace(SIZE), list[tuple[str, int]]()

    def note(kind: str, at: int) -> Callable[..., None]:
        return lambda *_: seen.append((kind, at))

    for at, width in places:
        written, changed, reading = (note(kind, at) for kind in ("written", "changed", "reading"))
        ones = (1 << 8 * width) - 1
        space.define(at, width, writable=ones, written=written, changed=changed, reading=reading)
    inside = offset + size <= SIZE
    touched = [at for at, width in places if inside and at < offset + size and offset < at + width]
    space.read(offset, size)
    assert seen == [("reading", at) for at in touched]
    seen.clear()
    space.write(offset, size, (1 << 8 * size) - 1)
    assert seen == [(kind, at) for at in touched for kind in ("written", "changed")]


@given(st.lists(masked_bytes(), min_size=SIZE, max_size=SIZE), st.integers(0, SIZE - 1), st.integers(0, 7))
@EXAMPLES
def test_content_with_another_constant_bit_is_refused_and_changes_nothing(
    masks: list[tuple[int, int, int]], at: int, bit: int
) -> None:
    space = space_of(masks)
    before = bytes(space.content)
    foreign = bytearray(before)
    foreign[at] ^= 1 << bit
    if (masks[at][1] | masks[at][2]) >> bit & 1:
        space.adopt(foreign)
        assert space.content == foreign
    else:
        with pytest.raises(StateError, match=f"{at:#x}"):
            space.adopt(foreign)
        assert space.content == before


@pytest.mark.parametrize("length", [0, SIZE - 1, SIZE + 1])
def test_content_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(StateError, match=f"{length} bytes of registers, expected {SIZE}"):
        RegisterSpace(SIZE).adopt(bytearray(length))


class Timer(RegisterBank, size=8):
    control = Field(0, 2, reset=0x0100, writable=0x00FF)
    status = Field(2, 1, reset=0x03, clear=0x03, hardware=0x80)
    count = Field(4, 4, hardware=0xFFFF_FFFF)

    def __init__(self, space: RegisterSpace, offset: int = 0, **resets: int) -> None:
        super().__init__(space, offset, **resets)
        self.seen: list[tuple[str, int, int]] = []
        self.ticks = 0

    @control.changed
    def _control_changed(self, old: int, new: int) -> None:
        self.seen.append(("changed", old, new))

    @control.written
    def _control_written(self, old: int, new: int) -> None:
        self.seen.append(("written", old, new))

    @status.changed
    def _status_changed(self, old: int, new: int) -> None:
        self.seen.append(("status", old, self.control))

    @count.reading
    def _reading_count(self) -> None:
        self.count = self.ticks


def test_fields_are_ints_at_their_place_in_the_space() -> None:
    space = RegisterSpace(32)
    timer = Timer(space, 16)
    assert (timer.control, timer.status) == (0x0100, 0x03)
    timer.count = 0x1234_5678
    assert space.read(20, 4) == 0  # the hook looked first
    timer.status |= 0x80
    assert space.content[18] == 0x83


def test_changed_runs_for_changes_only_and_written_for_each_write() -> None:
    timer = Timer(RegisterSpace(8))
    timer.space.write(0, 1, 5)
    timer.space.write(0, 2, 0xFF05)
    timer.space.write(1, 1, 0xFF)
    assert timer.seen == [
        ("written", 0x100, 0x105),
        ("changed", 0x100, 0x105),
        ("written", 0x105, 0x105),
        ("written", 0x105, 0x105),
    ]


def test_hooks_run_after_the_whole_access_is_stored() -> None:
    timer = Timer(RegisterSpace(8))
    timer.space.write(0, 4, 0x0001_0007)
    assert timer.seen[-1] == ("status", 0x03, 0x0107)


def test_what_our_code_sets_calls_no_hook_and_knows_no_mask() -> None:
    timer = Timer(RegisterSpace(8))
    timer.control = 0xABCD
    assert (timer.control, timer.seen) == (0xABCD, [])


def test_reading_hook_runs_before_any_read_that_touches_the_register() -> None:
    timer = Timer(RegisterSpace(8))
    timer.ticks = 0xAABB_CCDD
    assert timer.space.read(5, 1) == 0xCC
    timer.ticks = 0
    assert timer.space.read(0, 4) == 0x0003_0100
    assert timer.count == 0xAABB_CCDD  # the last read was not of it


def test_an_instance_can_have_its_own_constants() -> None:
    timer = Timer(RegisterSpace(8), control=0x0200)
    timer.preset(status=0x02)
    timer.space.write(0, 4, 0xFFFF_FFFF)
    timer.space.reset()
    assert (timer.control, timer.status) == (0x0200, 0x02)


def test_a_subclass_can_override_a_hook_and_a_register() -> None:
    class Wide(Timer):
        control = Field(0, 2, writable=0xFFFF)

        def _status_changed(self, old: int, new: int) -> None:
            self.seen.append(("mine", old, new))

    wide = Wide(RegisterSpace(8))
    wide.space.write(0, 4, 0x0003_FFFF)
    assert (wide.control, wide.seen) == (0xFFFF, [("mine", 3, 0)])


def test_a_declaration_replaces_the_earlier_one_of_its_range() -> None:
    timer = Timer(RegisterSpace(8))
    timer.space.define(0, 2)
    timer.space.write(0, 2, 0xFFFF)
    assert (timer.control, timer.seen) == (0, [])


def test_register_that_is_left_out_is_constant_0_until_it_is_implemented_again() -> None:
    timer = Timer(RegisterSpace(8))
    timer.leave_out("control", "status")
    timer.space.write(0, 4, 0xFFFF_FFFF)
    timer.space.reset()
    assert (timer.space.read(0, 4), timer.seen) == (0, [])
    timer.implement("control")
    timer.space.write(0, 4, 0xFFFF_FFFF)
    assert (timer.space.read(0, 4), len(timer.seen)) == (0x01FF, 2)


def test_mistakes_in_a_declaration_are_found_where_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"Overlap\.second overlaps first"):

        class Overlap(RegisterBank, size=4):
            first = Field(0, 2)
            second = Field(1, 2)

    with pytest.raises(TypeError, match="exceeds the bank"):

        class TooLong(RegisterBank, size=4):
            only = Field(2, 4)

    with pytest.raises(TypeError, match="has no register speed"):
        Timer(RegisterSpace(8), speed=1)
    with pytest.raises(ValueError, match=r"0x8\+0x4 are not in a space of 0x8 bytes"):
        Timer(RegisterSpace(8), 4)
    field = Field(0, 1)
    field.changed(lambda old, new: None)
    with pytest.raises(TypeError, match="two changed hooks"):
        field.changed(lambda old, new: None)
