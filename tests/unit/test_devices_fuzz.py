"""Every device under any sequence of accesses: nothing escapes, and migration at any point changes nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import trace
from kvmpy.state import StateError, load, save
from tests.counts import count
from tests.fakes.rig import Rig
from tests.fakes.rigs import RIGS, made

EXAMPLES = settings(max_examples=count(6, 1000), deadline=None)


class Step(NamedTuple):
    """``what`` is read or write through the bus, raw_read or raw_write past it, pass for time, or a host-side entry."""

    what: str
    offset: int
    size: int
    value: int


PASSES = (0.0001, 0.0153, 0.33, 1.07, 61.3, 4000.1)
# Small numbers and single bits find more in registers than any 64-bit number does.
VALUES = st.one_of(
    st.integers(0, 255), st.sampled_from([1 << bit for bit in range(64)]), st.integers(0, 2**64 - 1), st.just(2**64 - 1)
)


def steps(rig: Rig) -> st.SearchStrategy[list[Step]]:
    return steps_of(rig.size, *rig.host)


@cache  # else Hypothesis would look through it anew for every example
def steps_of(size: int, *host: str) -> st.SearchStrategy[list[Step]]:
    accesses = st.sampled_from(["read", "write", "raw_read", "raw_write", "write", "read"])
    others = st.sampled_from(["pass", *host])
    return st.lists(
        st.builds(
            Step,
            st.one_of(accesses, accesses, others),
            st.integers(0, size - 1),
            st.sampled_from([1, 1, 1, 2, 4, 8]),
            VALUES,
        ),
        max_size=40,
    )


def run(rig: Rig, what: Sequence[Step]) -> list[object]:
    """Do all steps; returns what a guest can notice of each."""
    return [(_do(rig, step), rig.line.level, len(rig.power.requests), rig.seen()) for step in what]


def _do(rig: Rig, step: Step) -> int | None:
    what, offset, size, value = step
    match what:
        case "read":
            return _fits(rig.bus.read(offset, size), size)
        case "write":
            rig.bus.write(offset, size, value & (1 << 8 * size) - 1)
        case "raw_read":
            return _fits(rig.target.read(offset, size), size)
        case "raw_write":
            rig.target.write(offset, size, value)
        case "pass":
            rig.clock.pass_(PASSES[value % len(PASSES)])
        case _:
            rig.host[what](value)
    return None


def _fits(value: int, size: int) -> int:
    assert isinstance(value, int)
    assert 0 <= value < 1 << 8 * size
    return int(value)


@contextmanager
def moved(rig: Rig, name: str) -> Iterator[Rig]:
    """The same device on another host, whose clock says the same."""
    rig.before_save()
    with made(name, rig.clock.now_ns) as there:
        there.screen.room_left = rig.screen.room_left
        there.power.requests.extend(rig.power.requests)
        if rig.memory is not None and there.memory is not None:
            there.memory.write(0, rig.memory.view(0, rig.memory.size))
        there.before_save()
        rig.make_alike(there)
        pairs = list(zip((there.device, *there.beside), (rig.device, *rig.beside), strict=True))
        for device, was in pairs:
            device.state = load(type(was.state), save(was.state))
        for device, _ in pairs:
            device.post_load()
        yield there


@pytest.fixture(autouse=True, scope="module")
def every_tracepoint() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = lines.append
    trace.enable("*", sink)
    yield lines
    trace.disable(sink)


@pytest.mark.parametrize("name", RIGS)
@given(data=st.data())
@EXAMPLES
def test_any_sequence_leaves_a_state_that_saves_and_loads_identically(name: str, data: st.DataObject) -> None:
    with made(name) as rig:
        run(rig, data.draw(steps(rig)))
        with moved(rig, name) as there:
            assert save(there.device.state) == save(rig.device.state)
            assert there.line.level == rig.line.level


@pytest.mark.parametrize("name", RIGS)
@given(data=st.data())
@EXAMPLES
def test_loaded_device_behaves_like_the_one_it_was_saved_from(name: str, data: st.DataObject) -> None:
    with made(name) as rig:
        run(rig, data.draw(steps(rig)))
        with moved(rig, name) as there:
            rig.go_on()
            shown = len(rig.screen.text)
            there.go_on()
            afterwards = data.draw(steps(rig))
            assert run(there, afterwards) == run(rig, afterwards)
            assert there.screen.text == rig.screen.text[shown:]


@pytest.mark.parametrize("name", RIGS)
@given(data=st.data())
@EXAMPLES
def test_any_state_that_loads_is_one_the_device_works_with(name: str, data: st.DataObject) -> None:
    with made(name) as rig:
        run(rig, data.draw(steps(rig)))
        rig.before_save()
        section = save(rig.device.state)
        for key in data.draw(st.sets(st.sampled_from([*section["state"], "name"]), max_size=3)) - {"name"}:
            section["state"][key] = data.draw(hostile(section["state"][key]))
        kind = type(rig.device.state)
        try:
            rig.device.state = load(kind, section)
            rig.device.post_load()
        except StateError:
            return
        rig.go_on()
        run(rig, data.draw(steps(rig)))
        rig.before_save()
        assert save(load(kind, save(rig.device.state))) == save(rig.device.state)


@pytest.mark.parametrize("name", RIGS)
def test_reset_gives_a_device_as_at_power_on(name: str) -> None:
    with made(name) as rig, made(name) as fresh:
        rig.device.reset()
        assert save(rig.device.state) == save(fresh.device.state)


def hostile(value: Any) -> st.SearchStrategy[Any]:
    """``value``, something of its type, or (seldom) something else."""
    match value:
        case bool():
            same: st.SearchStrategy[Any] = st.booleans()
        case int():
            edges = [
                sign * (2**bits + by) for bits in (8, 16, 32, 59, 60, 61, 64) for by in (-1, 0) for sign in (1, -1)
            ]
            same = st.integers(0, 255) | st.integers(0, 255) | st.sampled_from(edges)
        case dict():
            return st.sampled_from(sorted(value)).flatmap(
                lambda key: hostile(value[key]).map(lambda v: value | {key: v})
            )
        case list() if value:
            return hostile(value[0]).map(lambda first: [first, *value[1:]])
        case str() if len(value) > 200:
            same = st.builds(flipped, st.just(value), st.integers(0, 0x100), st.integers(1, 255))
        case _:
            same = st.sampled_from(["", "AAAA", "////", "A" * 24, "A" * 172, "/" * 170 + "8="])
    return st.one_of(st.just(value), same, same, same, st.sampled_from([value, value, None, True, -1, 1.5, "x", [[]]]))


def flipped(value: str, at: int, by: int) -> str:
    """Bytes as base64, with one changed."""
    content = bytearray(base64.b64decode(value))
    content[at % len(content)] ^= by
    return base64.b64encode(content).decode()
