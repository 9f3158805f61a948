"""Who sees a primary, when: the pair's state alone, with nothing behind it."""

from __future__ import annotations

from itertools import permutations

import pytest

from kvmpy.devices.failover import Pair, PairState


class Hands:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def show(self) -> None:
        self.log.append("show")

    def hide(self) -> None:
        self.log.append("hide")

    def negotiated(self, *, primary: bool) -> None:
        self.log.append("negotiated" if primary else "negotiated, no primary")

    def plugged(self) -> None:
        self.log.append("plugged")

    def released(self) -> None:
        self.log.append("released")

    def failed(self, reason: str) -> None:
        self.log.append(f"failed: {reason}")

    def take(self) -> list[str]:
        log, self.log = self.log, []
        return log


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def pair(hands: Hands) -> Pair:
    """With both there, and no driver."""
    pair = Pair(hands)
    pair.standby_came()
    pair.primary_came()
    return pair


@pytest.fixture
def plugged(pair: Pair, hands: Hands) -> Pair:
    """In use by the guest."""
    pair.driver_came()
    pair.used()
    hands.take()
    return pair


def test_r9_a_primary_is_hidden_until_the_driver_has_taken_standby(pair: Pair, hands: Hands) -> None:
    assert (pair.state, hands.log) == (PairState.HIDDEN, [])
    pair.driver_came()
    assert (pair.state, hands.log) == (PairState.PLUGGING, ["negotiated", "show"])
    pair.used()
    assert (pair.state, hands.log[-1]) == (PairState.PLUGGED, "plugged")


def test_r11_a_driver_without_a_primary_is_told_of_one_that_comes_at_once(hands: Hands) -> None:
    pair = Pair(hands)
    pair.standby_came()
    pair.driver_came()
    assert hands.take() == ["negotiated, no primary"]
    pair.primary_came()
    assert (pair.state, hands.log) == (PairState.PLUGGING, ["show"])


def test_r7_a_primary_without_its_standby_waits(hands: Hands) -> None:
    pair = Pair(hands)
    pair.primary_came()
    assert (pair.state, hands.log) == (PairState.WAITING, [])
    pair.standby_came()
    found = [pair.state]
    pair.standby_left()
    assert [*found, pair.state] == [PairState.HIDDEN, PairState.WAITING]


STEPS = {"standby": Pair.standby_came, "driver": Pair.driver_came, "primary": Pair.primary_came}
ORDERS = [order for order in permutations(STEPS) if order.index("standby") < order.index("driver")]


@pytest.mark.parametrize("order", ORDERS, ids=[" ".join(order) for order in ORDERS])
def test_r8_every_order_ends_in_the_same_state(hands: Hands, order: tuple[str, ...]) -> None:
    pair = Pair(hands)
    for step in order:
        STEPS[step](pair)
    assert (pair.state, hands.log.count("show")) == (PairState.PLUGGING, 1)


def test_r12_a_system_reset_hides_it_until_the_next_driver(plugged: Pair, hands: Hands) -> None:
    plugged.reset()
    assert (plugged.state, plugged.acked, hands.take()) == (PairState.HIDDEN, False, ["hide"])
    plugged.driver_came()
    assert hands.log == ["negotiated", "show"]


def test_r12_a_reset_before_the_guest_has_used_it_hides_it_too(pair: Pair, hands: Hands) -> None:
    pair.driver_came()
    hands.take()
    pair.reset()
    assert (pair.state, hands.log) == (PairState.HIDDEN, ["hide"])


def test_a_driver_that_leaves_and_comes_again_changes_nothing_for_the_guests_primary(
    plugged: Pair, hands: Hands
) -> None:
    plugged.driver_left()
    assert (plugged.state, hands.log) == (PairState.PLUGGED, [])
    plugged.driver_came()
    assert (plugged.state, hands.log) == (PairState.PLUGGED, ["negotiated"])


def test_a_standby_that_leaves_leaves_the_guest_its_primary_until_a_reset(plugged: Pair, hands: Hands) -> None:
    plugged.standby_left()
    assert (plugged.state, hands.log) == (PairState.PLUGGED, [])
    plugged.reset()
    assert (plugged.state, hands.log) == (PairState.WAITING, ["hide"])


def test_a_primary_that_came_while_no_driver_was_there_waits_for_one(pair: Pair, hands: Hands) -> None:
    pair.driver_came()
    pair.driver_left()
    pair.released()
    pair.primary_left()
    hands.take()
    pair.primary_came()
    assert (pair.state, hands.log) == (PairState.HIDDEN, [])


def test_r13_a_request_a_refusal_and_a_release_are_states_of_their_own(plugged: Pair, hands: Hands) -> None:
    plugged.asked()
    assert (plugged.state, hands.log) == (PairState.LEAVING, [])
    plugged.kept("not now")
    assert (plugged.state, plugged.error) == (PairState.PLUGGED, "not now")
    plugged.asked()
    plugged.released()
    assert (plugged.state, hands.log) == (PairState.RELEASED, ["released"])
    plugged.primary_left()
    assert (plugged.state, hands.take()) == (PairState.NONE, ["released"])


def test_r25_a_guest_that_cannot_use_it_is_reported_and_may_yet(pair: Pair, hands: Hands) -> None:
    pair.driver_came()
    pair.failed("no driver")
    assert (pair.state, pair.error, hands.log[-1]) == (PairState.FAILED, "no driver", "failed: no driver")
    pair.used()
    assert (pair.state, pair.error, hands.log[-1]) == (PairState.PLUGGED, "", "plugged")


def test_r34_one_that_was_attached_comes_back_whatever_the_driver_is_at(plugged: Pair, hands: Hands) -> None:
    plugged.driver_left()
    plugged.asked()
    plugged.released()
    hands.take()
    plugged.hidden()
    assert (plugged.state, hands.log) == (PairState.HIDDEN, [])
    plugged.want()
    assert (plugged.state, hands.log) == (PairState.PLUGGING, ["show"])


def test_r53_while_held_nothing_becomes_visible_and_what_would_have_comes_after(hands: Hands) -> None:
    pair = Pair(hands, held=True)
    pair.standby_came()
    pair.primary_came()
    pair.driver_came()
    pair.want()
    assert (pair.state, hands.take()) == (PairState.HIDDEN, ["negotiated"])
    pair.let_go()
    assert (pair.state, hands.log) == (PairState.PLUGGING, ["show"])


def test_r53_a_reset_in_the_middle_of_a_request_leaves_it_to_its_slot(plugged: Pair, hands: Hands) -> None:
    plugged.hold()
    plugged.asked()
    plugged.reset()
    assert (plugged.state, hands.log) == (PairState.LEAVING, [])
    plugged.released()
    assert (plugged.state, hands.log) == (PairState.RELEASED, ["released"])


def test_r5_a_second_primary_is_a_mistake_of_ours(pair: Pair) -> None:
    with pytest.raises(ValueError, match="a second primary"):
        pair.primary_came()


def test_what_happens_to_a_primary_that_is_in_no_slot_is_an_echo(pair: Pair, hands: Hands) -> None:
    for call in (pair.used, pair.released, pair.asked, lambda: pair.failed("late"), lambda: pair.kept("late")):
        call()
    assert (pair.state, pair.error, hands.log) == (PairState.HIDDEN, "", [])
