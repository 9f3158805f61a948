"""Every way that a hand-over can go, explored: at no point do both sides run, and who may take the guest back can.

The model is two of kvmpy's own state machines, a wire each way that loses nothing until it is cut, and whatever can
befall them: either side dies, either direction is cut, a side gives up (an error, a cancel, a time limit) whenever its
machine lets it, and somebody at the console forces the source to go on. Messages that are under way when a wire is cut
may arrive or not: each is lost, or not, on its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from kvmpy.migration.handover import DESTINATION, SOURCE, Destination, Event, Handover, Source


class World(NamedTuple):
    """Everything there is. A wire is the messages under way, or None once it is cut."""

    source: Source = Source.OWNER
    destination: Destination = Destination.LOADING
    source_lives: bool = True
    destination_lives: bool = True
    there: tuple[str, ...] | None = ()
    back: tuple[str, ...] | None = ()
    forced: bool = False
    one_way: bool = False

    @property
    def source_runs(self) -> bool:
        return self.source_lives and self.source.may_run

    @property
    def destination_runs(self) -> bool:
        return self.destination_lives and self.destination.may_run


def source_on(world: World, event: Event, *said: str) -> World:
    phase = Handover(SOURCE, world.source).on(event)
    there = None if world.there is None else world.there + said
    return world._replace(source=phase, there=there)


def destination_on(world: World, event: Event, *said: str) -> World:
    phase = Handover(DESTINATION, world.destination).on(event)
    back = None if world.back is None or world.one_way else world.back + said
    return world._replace(destination=phase, back=back)


def source_steps(w: World) -> Iterator[World]:
    """What the source does of its own accord, or on what it hears."""
    match w.source:
        case Source.OWNER:
            yield source_on(w, Event.SENT, "state")
        case Source.OFFERED if w.one_way:
            yield source_on(w, Event.READY)
        case Source.AGREED:
            yield source_on(w, Event.GO, "go")
        case Source.COMMITTED if w.one_way:
            yield source_on(w, Event.STARTED)
    if (w.source, Event.FAILED) in SOURCE:
        yield source_on(w, Event.FAILED)._replace(there=None, back=None)  # it hangs up
    if (w.source, Event.FORCED) in SOURCE:
        yield source_on(w, Event.FORCED)._replace(forced=True)
    if w.back:
        heard, rest = w.back[0], w.back[1:]
        event = {"ready": Event.READY, "started": Event.STARTED, "refused": Event.REFUSED}.get(heard, Event.FAILED)
        if heard == "failed" and w.source is Source.COMMITTED:
            event = Event.REFUSED  # it gave up before GO could reach it
        if (w.source, event) in SOURCE:
            yield source_on(w._replace(back=rest), event)


def destination_steps(w: World) -> Iterator[World]:
    """The same of the destination."""
    if w.there:
        heard, rest = w.there[0], w.there[1:]
        if heard == "state" and w.destination is Destination.LOADING:
            yield destination_on(w._replace(there=rest), Event.READY, "ready")
        if heard == "go" and w.destination is Destination.OFFERED:
            yield destination_on(w._replace(there=rest), Event.GO)
    if w.destination is Destination.TAKING:
        yield destination_on(w, Event.STARTED, "started")
        yield destination_on(w, Event.FAILED, "refused")
    elif (w.destination, Event.FAILED) in DESTINATION:
        yield destination_on(w, Event.FAILED)._replace(there=None, back=None)
        yield destination_on(w, Event.FAILED, "failed")._replace(there=None)


def misfortunes(w: World) -> Iterator[World]:
    """What befalls them: a death hangs up, too, but what was said before may still arrive."""
    if w.source_lives:
        yield w._replace(source_lives=False)
        yield w._replace(source_lives=False, there=None, back=None)
    if w.destination_lives:
        yield w._replace(destination_lives=False)
        yield w._replace(destination_lives=False, there=None, back=None)
    if w.there is not None:
        yield w._replace(there=None)
        yield from (w._replace(there=w.there[:n]) for n in range(len(w.there)))
    if w.back is not None:
        yield w._replace(back=None)
        yield from (w._replace(back=w.back[:n]) for n in range(len(w.back)))


def steps(w: World) -> Iterator[World]:
    if w.source_lives:
        yield from source_steps(w)
    if w.destination_lives:
        yield from destination_steps(w)
    yield from misfortunes(w)


def explore(start: World, follow: Callable[[World], Iterator[World]] = steps) -> set[World]:
    seen, todo = {start}, deque([start])
    while todo:
        for world in follow(todo.popleft()):
            if world not in seen:
                seen.add(world)
                todo.append(world)
    return seen


@pytest.fixture(scope="module", params=[False, True], ids=["answers", "one way"])
def worlds(request: pytest.FixtureRequest) -> set[World]:
    """Every world that can come about."""
    return explore(World(one_way=request.param))


def test_never_do_both_run_unless_somebody_forced_it(worlds: set[World]) -> None:
    assert not [w for w in worlds if w.source_runs and w.destination_runs and not w.forced]


def test_one_that_is_forced_while_the_other_side_is_dead_runs_alone(worlds: set[World]) -> None:
    """Who forces must know that the destination runs no vCPU and never will: then still only one runs."""
    rightly = [w for w in worlds if not w.destination_lives and (w.source, Event.FORCED) in SOURCE and w.source_lives]
    assert rightly
    for start in rightly:
        assert not [w for w in explore(source_on(start, Event.FORCED)) if w.source_runs and w.destination_runs]


def test_before_go_the_source_can_take_the_guest_back_by_itself(worlds: set[World]) -> None:
    before = {w.source for w in worlds if w.source.may_cancel}
    assert before == {Source.OWNER, Source.OFFERED, Source.AGREED}
    assert {Handover(SOURCE, phase).on(Event.FAILED) for phase in before} == {Source.KEPT}
    assert all(phase.may_run for phase in before | {Source.KEPT})


def test_a_source_that_took_the_guest_back_is_the_only_one_ever_after(worlds: set[World]) -> None:
    kept = [w for w in worlds if w.source is Source.KEPT and not w.forced and w.source_lives]
    assert kept
    assert not [w for start in kept for w in explore(start) if w.destination_runs and not w.forced]


def test_after_go_without_an_answer_only_force_lets_the_source_run(worlds: set[World]) -> None:
    silent = [w for w in worlds if w.source is Source.UNKNOWN and not w.forced]
    assert silent
    later = {w for start in silent for w in explore(start)}
    assert not [w for w in later if w.source_runs and not w.forced]


def test_the_destination_runs_only_once_go_was_sent(worlds: set[World]) -> None:
    ran = {w.source for w in worlds if w.destination is Destination.OWNER and not w.forced}
    assert ran <= {Source.COMMITTED, Source.GONE, Source.UNKNOWN}


def test_a_refusal_is_proof(worlds: set[World]) -> None:
    refused = [w for w in worlds if w.destination is Destination.REFUSING]
    assert refused
    assert not [w for start in refused for w in explore(start) if w.destination_runs]


def test_without_misfortune_the_guest_ends_at_the_destination_or_stays() -> None:
    def orderly(w: World) -> Iterator[World]:
        for world in (*source_steps(w), *destination_steps(w)):
            if not world.forced:
                yield world

    ends = [w for w in explore(World(), orderly) if not list(orderly(w))]
    assert {w.source for w in ends} == {Source.GONE, Source.KEPT, Source.UNKNOWN}
    assert all(w.destination is Destination.OWNER for w in ends if w.source is Source.GONE)


def test_what_the_table_does_not_have_is_a_bug_that_is_seen() -> None:
    with pytest.raises(AssertionError, match="GO while OWNER"):
        Handover(SOURCE, Source.OWNER).on(Event.GO)
