"""A root port's slot beside Linux's driver for it: plug, unplug, and every rule of native hot-plug.

The numbers are those of the project's requirements for slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.port_registers import RootPortState
from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.pci import Board, Card, open_windows
from tests.fakes.pciehp import CONTROL, LINK_STATUS, LINK_UP, STATUS, WIPE, Pciehp, State

EXAMPLES = settings(max_examples=count(25, 5000), deadline=None)
CARD_ID, NOTHING = 0x1041_1AF4, 0xFFFF_FFFF
BUTTON, PDC, PRESENT, DLLSC = 0x01, 0x08, 0x40, 0x100
POWER_OFF, HPIE, DLLSCE = 0x400, 0x20, 0x1000
MEMORY, PREFETCHABLE = range(0xC000_0000, 0xC100_0000), range(1 << 36, (1 << 36) + (1 << 30))


class Rig:
    """A port at bus 5 and its guest; what the port says in ``released``, ``failed`` and ``refused``."""

    def __init__(self, *, power_controller: bool = True, by_message: bool = True) -> None:
        self.board = Board()
        self.port, self.above = self.board.add_port(bus=5, power_controller=power_controller)
        open_windows(self.above, MEMORY, PREFETCHABLE)
        self.guest = Pciehp(self.board, self.above, 5, by_message=by_message)
        self.card = Card(bars={0: (0x1000, BarKind.MEM32)})
        self.released: list[str] = []
        self.refused: list[str] = []
        self.failed: list[tuple[str, str]] = []
        self.port.on_released = self._released
        self.port.on_refused = lambda function: self.refused.append(function.name)
        self.port.on_failed = lambda function, reason: self.failed.append((function.name, reason))
        self.presses: list[float] = []
        push = self.port.press

        def press() -> None:
            self.presses.append(self.now())
            # A guest that answers only after the request was taken back is told so at once.
            taking_back = self.cancelling or self.port.is_retracting
            assert self.slot(CONTROL) & 0x300 != 0x200 or taking_back, "pressed while the indicator blinks"
            if taking_back:
                self.taken_back.append(self.now())
            push()

        self.cancelling = False
        self.taken_back: list[float] = []
        self.port.press = press  # type: ignore[method-assign]

    def _released(self, function: PciFunction[Any]) -> None:
        assert function is not self.port.card
        assert self.board.config(5, 0).read(0, 4) == NOTHING
        self.released.append(function.name)

    def now(self) -> float:
        return self.board.clock.utc()

    def slot(self, register: int) -> int:
        return self.guest.read(register)

    def events(self) -> int:
        return self.slot(STATUS) & ~PRESENT

    def answer(self) -> int:
        return self.board.config(5, 0).read(0, 4)

    def messages(self) -> int:
        return len(self.board.sink.take())

    def booted(self, *, card: bool = False) -> Rig:
        """A guest that is up; ``card``: with the card from power-on on."""
        if card:
            self.port.plug(self.card)
        self.guest.scan()
        self.guest.bind()
        self.guest.pass_(1)
        return self

    def plugged(self) -> Rig:
        self.booted().port.insert(self.card)
        self.guest.pass_(10)
        assert self.guest.cards == ["on"]
        return self

    def close(self) -> None:
        self.board.close()


@pytest.fixture(params=[True, False], ids=["power controller", "no power controller"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(power_controller=request.param)
    yield rig
    rig.close()


def test_r14_status_has_what_pciehp_enables_and_no_more(rig: Rig) -> None:
    rig.booted()
    assert rig.slot(CONTROL) & 0x18FF == DLLSCE | HPIE | 0x01 | 0xC0  # no command completed: it is not implemented
    assert rig.slot(LINK_STATUS) & 0x3F0
    assert not rig.slot(LINK_STATUS) & 0x800, "a link in training"


def test_r15_a_plug_is_one_message_without_the_button_from_a_card_that_answers(rig: Rig) -> None:
    rig.booted()
    seen: list[tuple[int, int]] = []
    vector = rig.board.sink.vectors[0]
    signal = vector.signal

    def noted() -> None:
        seen.append((rig.slot(STATUS), rig.card.config_read(0, 4)))
        signal()

    vector.signal = noted  # type: ignore[method-assign]
    rig.port.insert(rig.card)
    assert seen == [(PDC | DLLSC | PRESENT, CARD_ID)]
    assert rig.messages() == 1
    assert rig.slot(LINK_STATUS) & LINK_UP
    assert rig.presses == []


def test_r15_a_card_in_a_slot_with_power_can_be_read_before_it_is_announced() -> None:
    rig = Rig(power_controller=False).booted()
    rig.port.insert(rig.card)
    assert rig.answer() == CARD_ID
    rig.close()


def test_a_slot_without_power_shows_its_card_and_the_card_answers_once_it_has_power() -> None:
    rig = Rig().booted()
    rig.port.insert(rig.card)
    assert (rig.answer(), rig.slot(LINK_STATUS) & LINK_UP) == (NOTHING, LINK_UP)
    rig.guest.command(POWER_OFF, 0)
    assert (rig.answer(), rig.slot(LINK_STATUS) & LINK_UP) == (CARD_ID, LINK_UP)
    rig.close()


def test_a_plugged_card_is_found_and_used(rig: Rig) -> None:
    rig.plugged()
    assert (rig.guest.found, rig.guest.state, rig.answer()) == (True, State.ON, CARD_ID)
    expected = [0x12E1, 0x11E1]  # blinking, on
    assert rig.guest.log[-len(expected) :] == expected
    assert rig.events() == 0


@pytest.mark.parametrize("wipe", [WIPE, 0xFFFF, PDC | BUTTON])
def test_r16_events_are_not_lost_by_wiping_the_register(rig: Rig, wipe: int) -> None:
    rig.port.insert(rig.card)
    rig.guest.write(STATUS, wipe)
    assert rig.events() == PDC | DLLSC
    rig.above.write(rig.above.capability(0x10) + STATUS, 1, 0xFF)
    assert rig.events() == PDC | DLLSC
    rig.above.write(rig.above.capability(0x10) + CONTROL, 4, WIPE << 16 | rig.slot(CONTROL))
    assert rig.events() == PDC | DLLSC
    rig.guest.write(STATUS, PDC)
    assert rig.events() == DLLSC
    rig.guest.write(STATUS, DLLSC)
    assert rig.events() == 0


def test_r17_a_message_is_sent_when_the_first_event_comes_and_not_with_the_next(rig: Rig) -> None:
    rig.booted(card=True)
    assert rig.messages() == 0
    rig.port.request()
    assert rig.messages() == 1
    rig.port.tear_out()
    assert rig.messages() == 0
    rig.guest.write(STATUS, BUTTON)
    assert rig.messages() == 0
    rig.guest.write(STATUS, rig.events())
    rig.guest.command(0x700, 0x700)
    rig.board.clock.pass_(1.2)
    assert rig.messages() == 0
    rig.port.insert(rig.card)
    assert rig.messages() == 1


def test_r17_a_message_is_sent_when_interrupts_are_switched_on_with_an_event_there(rig: Rig) -> None:
    rig.booted()
    rig.guest.command(HPIE, 0)
    rig.port.insert(rig.card)
    assert rig.messages() == 0
    rig.guest.command(HPIE, HPIE)
    assert rig.messages() == 1
    rig.guest.command(0, 0)
    assert rig.messages() == 0
    rig.guest.command(DLLSCE, 0)
    rig.guest.command(DLLSCE, DLLSCE)
    assert rig.messages() == 1


def test_r17_a_masked_message_waits_and_goes_with_its_events(rig: Rig) -> None:
    rig.booted()
    mask, pending = rig.above.capability(0x05) + 0x10, rig.above.capability(0x05) + 0x14
    rig.above.write(mask, 4, 1)
    rig.port.insert(rig.card)
    assert (rig.messages(), rig.above.read(pending, 4)) == (0, 1)
    rig.guest.write(STATUS, rig.events())
    assert rig.above.read(pending, 4) == 0
    rig.above.write(mask, 4, 0)
    assert rig.messages() == 0
    rig.above.write(mask, 4, 1)
    rig.port.tear_out()
    rig.above.write(mask, 4, 0)
    assert rig.messages() == 1


def test_r17_without_messages_the_interrupt_line_is_high_while_there_are_events() -> None:
    lineful = Rig(by_message=False).booted()
    line = lineful.board.lines[1]  # INTA of device 1
    lineful.port.insert(lineful.card)
    assert line.high()
    assert lineful.above.read(0x06, 2) & 0x08
    lineful.guest.write(STATUS, PDC)
    assert line.high()
    lineful.guest.write(STATUS, DLLSC)
    assert not line.high()
    lineful.guest.pass_(1)
    assert lineful.messages() == 0
    lineful.close()


def test_r18_no_command_is_ever_said_to_be_completed(rig: Rig) -> None:
    rig.plugged()
    rig.port.request()
    for _ in range(80):
        rig.guest.pass_(0.1)
        assert not rig.slot(STATUS) & 0x10
    assert rig.released == ["card"]


def test_r19_the_guest_lets_go_of_a_card_that_it_is_asked_for(rig: Rig) -> None:
    rig.plugged()
    rig.port.request()
    assert (rig.released, rig.port.is_releasing) == ([], True)
    rig.guest.pass_(4.9)
    assert (rig.guest.found, rig.released) == (True, [])
    rig.guest.pass_(0.3)
    assert not rig.guest.found
    assert rig.released == ([] if rig.guest.has_power_controller else ["card"])
    rig.guest.pass_(1)
    assert rig.released == ["card"]
    assert (rig.slot(STATUS) & PRESENT, rig.slot(LINK_STATUS) & LINK_UP) == (0, 0)
    assert (len(rig.presses), rig.port.card, rig.guest.cards) == (1, None, ["on", "off"])


STEPS_OFF = [
    ([0x02C0, 0x06C0, 0x07C0], 2),  # as pciehp does
    ([0x05C0, 0x07C0], 1),  # power off, then the indicator
    ([0x03C0, 0x07C0], 1),  # the indicator, then power
    ([0x07C0], 0),  # both at once
]


@pytest.mark.parametrize(("writes", "last"), STEPS_OFF)
def test_r19_a_card_leaves_exactly_when_power_and_indicator_are_off(writes: list[int], last: int) -> None:
    rig = Rig().booted(card=True)
    for index, value in enumerate(writes):
        rig.guest.write(CONTROL, value)
        assert rig.released == (["card"] if index >= last else [])
    rig.close()


@pytest.mark.parametrize(("writes", "last"), [([0x02C0, 0x03C0], 1), ([0x03C0], 0), ([0x06C0, 0x07C0], 1)])
def test_r19_without_a_power_controller_the_indicator_says_it_alone(writes: list[int], last: int) -> None:
    rig = Rig(power_controller=False).booted(card=True)
    for index, value in enumerate(writes):
        rig.guest.write(CONTROL, value)
        assert rig.slot(CONTROL) & POWER_OFF == 0
        assert rig.released == (["card"] if index >= last else [])
    rig.close()


def test_r20_a_request_while_the_card_is_being_powered_waits_and_is_made_then(rig: Rig) -> None:
    rig.guest.delay = 7.0
    rig.booted().port.insert(rig.card)
    rig.guest.pass_(0.05)
    assert rig.slot(CONTROL) & 0x300 == 0x200, "it blinks"
    rig.port.request()
    rig.guest.pass_(6)
    assert (rig.presses, rig.guest.found) == ([], False)
    rig.guest.pass_(2)
    assert rig.guest.found
    assert len(rig.presses) == 1
    rig.guest.pass_(15)
    assert rig.released == ["card"]


def test_r20_no_two_presses_in_five_seconds_and_a_lost_one_is_repeated(rig: Rig) -> None:
    rig.booted(card=True)
    rig.guest.command(HPIE, 0)
    rig.port.request()
    rig.board.clock.pass_(4.9)
    assert len(rig.presses) == 1
    rig.guest.write(STATUS, BUTTON)  # seen, and nothing done
    rig.board.clock.pass_(0.2)
    assert (len(rig.presses), rig.events()) == (2, BUTTON)
    rig.board.clock.pass_(100)
    assert len(rig.presses) == 22
    assert min(b - a for a, b in zip(rig.presses, rig.presses[1:], strict=False)) >= 5.0


def test_r20_a_new_request_keeps_its_distance_to_the_last_ones_press(rig: Rig) -> None:
    rig.booted(card=True)
    rig.port.request()
    rig.port.cancel()
    rig.board.clock.pass_(1)
    rig.port.request()
    assert len(rig.presses) == 1
    rig.board.clock.pass_(4.1)
    assert len(rig.presses) == 2


def test_r20_a_press_that_comes_while_the_guest_boots_is_not_lost(rig: Rig) -> None:
    rig.port.plug(rig.card)
    rig.port.request()
    rig.guest.scan()
    rig.guest.pass_(3)
    rig.guest.bind()
    rig.guest.pass_(8)
    assert rig.released == ["card"]
    assert len(rig.presses) == 1


def test_r20_the_machine_paused_no_time_passes_and_nothing_is_pressed(rig: Rig) -> None:
    rig.plugged()
    rig.port.pause()
    rig.port.request()
    rig.board.clock.pass_(100)
    assert rig.presses == []
    rig.port.resume()
    assert len(rig.presses) == 1
    rig.guest.write(STATUS, BUTTON)  # the guest has seen it, and is about to blink
    rig.messages()
    rig.port.pause()
    rig.board.clock.pass_(100)
    rig.port.resume()
    rig.board.clock.pass_(4.9)
    assert len(rig.presses) == 1


def test_r38_a_second_press_in_time_has_the_guest_keep_its_card(rig: Rig) -> None:
    rig.plugged()
    rig.port.request()
    rig.guest.pass_(3.5)
    rig.cancelling = True
    assert rig.port.cancel()
    rig.guest.pass_(30)
    assert (rig.guest.found, rig.guest.state, rig.released, rig.refused) == (True, State.ON, [], [])
    assert rig.guest.cards == ["on", "cancelled"]
    assert len(rig.presses) == 2


def test_r38_a_second_press_is_not_made_when_it_may_be_too_late(rig: Rig) -> None:
    rig.plugged()
    assert not rig.port.cancel(), "nothing was asked"
    rig.port.request()
    rig.guest.pass_(4.1)
    assert not rig.port.cancel()
    rig.guest.pass_(10)
    assert (rig.released, len(rig.presses)) == (["card"], 1)


def test_a_guest_that_goes_back_on_it_keeps_its_card_and_is_not_asked_again(rig: Rig) -> None:
    rig.plugged()
    rig.port.request()
    rig.guest.pass_(1)
    assert rig.slot(CONTROL) & 0x300 == 0x200
    rig.guest.command(0x300, 0x100)
    assert (rig.refused, rig.port.is_releasing) == (["card"], False)
    rig.board.clock.pass_(60)
    assert len(rig.presses) == 1


def test_r21_no_card_appears_between_power_off_and_indicator_off() -> None:
    rig = Rig().plugged()
    other = Card("other")
    rig.guest.command(POWER_OFF, POWER_OFF)
    rig.port.tear_out()
    rig.port.insert(other)
    assert (rig.port.info()["behind"], rig.port.card) == (None, other)
    rig.board.clock.pass_(29)
    assert rig.port.info()["behind"] is None
    rig.guest.command(0x300, 0x300)
    assert rig.port.info()["behind"] == "other"
    rig.close()


def test_r21_nor_while_a_guest_without_power_writes_other_indicators() -> None:
    rig = Rig().plugged()
    rig.guest.write(CONTROL, rig.slot(CONTROL) & ~0x300 | POWER_OFF)  # a reserved value
    rig.port.tear_out()
    rig.port.insert(Card("other"))
    rig.board.clock.pass_(29)
    assert not rig.slot(STATUS) & PRESENT
    rig.board.clock.pass_(2)
    assert rig.slot(STATUS) & PRESENT
    rig.close()


def test_r21_nor_within_a_second_of_power_off() -> None:
    rig = Rig().plugged()
    rig.guest.write(CONTROL, rig.slot(CONTROL) | 0x700)
    assert rig.released == ["card"]
    rig.port.insert(Card("other"))
    rig.board.clock.pass_(1.0)
    assert not rig.slot(STATUS) & PRESENT
    rig.board.clock.pass_(0.2)
    assert rig.slot(STATUS) & PRESENT
    rig.close()


def test_r21_a_card_that_waits_leaves_as_it_came(rig: Rig) -> None:
    rig = Rig().plugged()
    rig.guest.write(CONTROL, rig.slot(CONTROL) | 0x700)
    rig.guest.write(STATUS, rig.events())
    rig.port.insert(Card("other"))
    rig.port.request()
    assert (rig.released, rig.port.card, rig.events()) == (["card", "other"], None, 0)
    rig.port.insert(Card("third"))
    rig.port.tear_out()
    assert (rig.released, rig.port.card, rig.events()) == (["card", "other", "third"], None, 0)
    rig.close()


def test_a_card_plugged_right_after_another_has_left_is_used(rig: Rig) -> None:
    rig.plugged()
    rig.port.on_released = lambda function: rig.released.append(function.name)
    for round_ in range(5):
        rig.port.request()
        while len(rig.released) <= round_:
            rig.guest.pass_(0.01)
        rig.port.insert(Card(f"card{round_}"))
        rig.guest.pass_(5)
        assert rig.guest.state is State.ON
    assert rig.guest.cards == ["on", *["off", "on"] * 5]


def test_r23_a_guest_that_ejects_by_itself_is_followed(rig: Rig) -> None:
    rig.plugged()
    rig.guest.write_power(on=False)
    rig.guest.pass_(2)
    assert (rig.released, rig.presses, rig.guest.cards) == (["card"], [], ["on", "off"])


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.15])
def test_a_card_that_comes_right_after_one_was_torn_out_stays(rig: Rig, seconds: float) -> None:
    rig.plugged()
    rig.guest.delay = 0.1
    rig.port.tear_out()
    rig.guest.pass_(seconds)
    second = Card("second", bars={0: (0x1000, BarKind.MEM32)})
    rig.port.insert(second)
    rig.guest.pass_(30)
    assert (rig.released, rig.port.behind, rig.guest.found) == (["card"], second, True)


def test_a_card_that_comes_while_two_others_were_torn_out_stays(rig: Rig) -> None:
    rig.plugged()
    rig.guest.delay = 3
    for name in ("second", "third"):
        rig.port.tear_out()
        rig.guest.pass_(1)
        rig.port.insert(Card(name))
    rig.guest.pass_(30)
    assert (rig.released, rig.guest.found) == (["card", "second"], True)


def test_a_card_is_shown_to_a_guest_that_takes_very_long_over_the_last_one_and_stays(rig: Rig) -> None:
    rig.plugged()
    rig.guest.delay = 40
    rig.port.tear_out()
    second = Card("second")
    rig.port.insert(second)
    rig.port.pause()
    rig.board.clock.pass_(100)
    rig.port.resume()
    rig.guest.pass_(29)
    assert not rig.slot(STATUS) & PRESENT
    rig.guest.pass_(2)
    assert rig.slot(STATUS) & PRESENT
    rig.guest.pass_(60)
    assert (rig.released, rig.port.behind, rig.guest.found) == (["card"], second, True)
    rig.port.request()
    rig.guest.pass_(60)
    assert rig.released == ["card", "second"]


def test_a_button_pressed_for_a_card_that_was_torn_out_is_not_for_the_next(rig: Rig) -> None:
    rig.port.plug(rig.card)
    rig.port.request()
    assert (len(rig.presses), rig.events()) == (1, BUTTON)
    rig.port.tear_out()
    second = Card("second")
    rig.port.insert(second)
    assert not rig.events() & BUTTON
    rig.guest.scan()
    rig.guest.bind()
    rig.guest.pass_(20)
    assert (rig.released, rig.guest.found) == (["card"], True)


def test_a_card_torn_out_while_the_guest_boots_keeps_no_other_waiting(rig: Rig) -> None:
    rig.port.plug(rig.card)
    rig.guest.scan()
    rig.port.tear_out()
    rig.guest.bind()
    rig.guest.pass_(5)
    rig.port.insert(Card("second"))
    rig.guest.pass_(20)
    assert rig.slot(STATUS) & PRESENT
    assert (rig.guest.found, rig.released) == (True, ["card"])


@pytest.mark.parametrize("moment", ["before the scan", "after the scan", "with the driver"])
@pytest.mark.parametrize("button", [False, True])
def test_r24_a_card_plugged_while_the_guest_boots_ends_present(rig: Rig, moment: str, button: bool) -> None:
    if moment == "before the scan":
        rig.port.insert(rig.card)
    rig.guest.scan()
    if moment == "after the scan":
        rig.port.insert(rig.card)
    rig.guest.bind()
    if moment == "with the driver":
        rig.port.insert(rig.card)
    rig.guest.pass_(20)
    assert (rig.guest.found, rig.guest.state, rig.released) == (True, State.ON, [])
    if button:
        rig.port.request()
        rig.guest.pass_(20)
        assert rig.released == ["card"]


def test_r25_a_card_that_the_guest_cannot_use_is_reported_and_stays(rig: Rig) -> None:
    rig.guest.works = False
    rig.booted().port.insert(rig.card)
    rig.guest.pass_(5)
    ((name, reason),) = rig.failed
    assert name == "card"
    assert "attention indicator" in reason
    assert (rig.released, rig.port.behind) == ([], rig.card)
    rig.guest.write_power(on=True)
    rig.guest.pass_(5)
    assert (len(rig.failed), rig.released) == (2, [])
    rig.guest.works = True
    rig.guest.write_power(on=True)
    rig.guest.pass_(5)
    assert rig.guest.found


def test_r25_a_card_that_is_not_used_leaves_at_once_when_asked(rig: Rig) -> None:
    rig.guest.works = False
    rig.booted().port.insert(rig.card)
    rig.guest.pass_(5)
    rig.port.request()
    assert (rig.released, rig.presses) == (["card"], [])


def test_a_card_that_the_guest_never_gave_power_leaves_at_once_when_asked() -> None:
    rig = Rig()
    rig.port.insert(rig.card)
    rig.port.request()
    assert (rig.released, rig.presses) == (["card"], [])
    rig.booted().guest.pass_(10)
    assert rig.guest.cards == []
    rig.close()


def test_r26_a_card_that_leaves_does_nothing_more_from_the_first_moment_on(rig: Rig) -> None:
    rig.plugged()
    config = rig.board.config(5, 0)
    config.place(0, MEMORY.start)
    config.enable()
    assert rig.card.bars[0].address == MEMORY.start
    order: list[str] = []
    rig.card.on_bus_master = lambda enabled: order.append(f"bus master {enabled}, slot {rig.port.behind is not None}")  # type: ignore[method-assign]
    rig.port.on_released = lambda function: order.append(
        f"released, mapped {function.bars[0].address}, answers {rig.answer() != NOTHING}, {rig.events():#x}"
    )
    rig.port.tear_out()
    assert order == ["bus master False, slot True", "released, mapped None, answers False, 0x108"]


@pytest.mark.parametrize("zero", [True, False])
def test_what_was_torn_out_reads_as_its_kind_says_until_the_slot_is_off(rig: Rig, zero: bool) -> None:
    rig.card.ZERO_WHEN_TORN_OUT = zero  # type: ignore[misc]  # of this card, not of its class
    rig.plugged()
    config = rig.board.config(5, 0)
    config.place(0, MEMORY.start)
    config.enable()

    def register() -> int:
        return rig.board.mmio.read(MEMORY.start + 0x14, 1)

    assert register() == 0x14
    rig.port.tear_out()
    assert register() == (0 if zero else 0xFF)
    assert config.read(0, 4) == NOTHING
    rig.guest.pass_(5)
    assert register() == 0xFF
    rig.port.insert(rig.card)
    rig.guest.pass_(5)
    config.place(0, MEMORY.start)
    config.enable()
    assert register() == 0x14


@pytest.mark.parametrize("end", ["insert", "reset"])
def test_nothing_is_left_of_a_card_that_was_torn_out_once_another_comes_or_all_is_reset(rig: Rig, end: str) -> None:
    rig.card.ZERO_WHEN_TORN_OUT = True  # type: ignore[misc]  # of this card, not of its class
    rig.plugged()
    config = rig.board.config(5, 0)
    config.place(0, MEMORY.start)
    config.enable()
    rig.port.tear_out()
    assert rig.board.mmio.read(MEMORY.start, 1) == 0
    if end == "insert":
        rig.port.insert(rig.card)
        rig.guest.pass_(10)
    else:
        with rig.port.lock:
            rig.port.reset()
    assert rig.board.mmio.read(MEMORY.start, 1) == 0xFF


def test_surprise_removal_is_one_message(rig: Rig) -> None:
    rig.plugged()
    rig.messages()
    rig.port.tear_out()
    assert (rig.events(), rig.messages(), rig.released) == (PDC | DLLSC, 1, ["card"])


def test_a_guest_is_told_of_a_surprise_and_can_have_the_card_again(rig: Rig) -> None:
    rig.plugged()
    rig.port.tear_out()
    rig.guest.pass_(5)
    assert (rig.guest.cards, rig.guest.state) == (["on", "surprise", "off"], State.OFF)
    rig.port.insert(rig.card)
    rig.guest.pass_(5)
    assert (rig.guest.found, rig.released) == (True, ["card"])


def test_a_press_for_a_card_that_was_torn_out_is_not_for_the_next_one() -> None:
    rig = Rig(power_controller=False)
    rig.port.insert(rig.card)
    rig.guest.pass_(5)
    rig.guest.scan()
    rig.guest.bind()  # and at work at once: it has missed how the card came, and takes it for another one
    rig.port.request()
    rig.guest.pass_(0)
    rig.port.tear_out()
    rig.port.insert(Card("next"))
    rig.guest.pass_(60)
    assert (rig.presses, rig.released, rig.guest.found) == ([1_700_000_005.0], ["card"], True)
    rig.close()


def test_r53_a_reset_completes_a_request(rig: Rig) -> None:
    rig.plugged()
    rig.port.request()
    rig.port.pause()
    rig.port.finish()
    with rig.port.lock:
        rig.port.reset()
    assert (rig.released, rig.port.card) == (["card"], None)
    empty = 0x07C0 if rig.guest.has_power_controller else 0x03C0
    assert (rig.slot(CONTROL), rig.slot(STATUS)) == (empty, 0)


def test_after_a_reset_no_card_waits_for_what_the_guest_owed_before(rig: Rig) -> None:
    rig.plugged()
    rig.port.tear_out()
    rig.port.finish()
    with rig.port.lock:
        rig.port.reset()
    rig.port.insert(Card("second"))
    assert rig.slot(STATUS) & PRESENT


def test_a_reset_has_a_hot_plugged_card_present_from_power_on_on(rig: Rig) -> None:
    rig.booted().port.insert(rig.card)
    rig.port.finish()
    with rig.port.lock:
        rig.port.reset()
    assert (rig.slot(CONTROL), rig.slot(STATUS)) == (0x01C0, PRESENT)
    assert rig.slot(LINK_STATUS) & LINK_UP


def test_a_reset_shows_a_card_that_waits() -> None:
    rig = Rig().plugged()
    rig.guest.write(CONTROL, rig.slot(CONTROL) | 0x700)
    other = Card("other")
    rig.port.insert(other)
    rig.port.finish()
    with rig.port.lock:
        rig.port.reset()
    assert (rig.port.behind, rig.slot(CONTROL), rig.slot(STATUS)) == (other, 0x01C0, PRESENT)
    rig.close()


@pytest.mark.parametrize("seconds", [0.0, 0.05, 1.0])
def test_a_plug_goes_on_where_it_was_after_a_move(rig: Rig, seconds: float) -> None:
    there = Rig(power_controller=rig.guest.has_power_controller)
    rig.booted().port.insert(rig.card)
    rig.guest.pass_(seconds)
    if seconds < 0.1:
        assert not rig.guest.found
    rig.port.pause()
    rig.card.pause()
    there.port.pause()
    there.port.plug(there.card)
    there.card.state = load(type(rig.card.state), save(rig.card.state))
    there.port.state = load(RootPortState, save(rig.port.state))
    there.card.post_load()
    there.port.post_load()
    assert save(there.port.state) == save(rig.port.state)
    there.port.resume()
    there.board.clock.pass_(rig.now() - there.now())
    rig.guest._board, rig.guest._above = there.board, there.above
    there.board.sink.delivered.extend(rig.board.sink.take())  # an interrupt controller moves too
    rig.guest.pass_(10)
    assert (rig.guest.found, rig.guest.state) == (True, State.ON)
    assert (rig.guest.read(CONTROL) & 0x700, rig.guest.read(STATUS)) == (0x100, PRESENT)
    rig.close()
    there.close()


ACTIONS = st.one_of(
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.01, 0.2, 1.0, 1.2, 4.0, 5.0, 7.0])),
    st.tuples(st.just("insert"), st.just(0.0)),
    st.tuples(st.sampled_from(["request", "cancel", "tear_out", "bind", "eject", "works", "fails"]), st.just(0.0)),
)
WRITES = st.tuples(st.sampled_from([CONTROL, STATUS, 0x10]), st.integers(0, 0xFFFF))


class Campaign:
    """Anything in any order; what must always hold is checked all the time."""

    def __init__(self, *, power_controller: bool) -> None:
        self.rig = Rig(power_controller=power_controller)
        self.inserted: list[str] = []
        self.asked: set[str] = set()  # every card that somebody wanted gone
        self.power_off_at = -100.0
        self.owed = False  # power went off with a card there
        show = self.rig.port.show

        def checked() -> None:
            control = self.rig.port.express.slot_control
            if self.owed and control & POWER_OFF and self.rig.now() - self.power_off_at < 30:
                assert control & 0x300 == 0x300, "a plug between power off and indicator off"
            assert self.rig.now() - self.power_off_at >= 1.1 - 1e-6, "a plug while the guest does not look"
            show()

        self.rig.port.show = checked  # type: ignore[method-assign]
        written = self.rig.port.express.on_slot

        def note(old: int, new: int) -> None:
            if new & ~old & POWER_OFF:
                self.power_off_at = self.rig.now()
                self.owed = power_controller and self.rig.port.behind is not None
            written(old, new)

        self.rig.port.express.on_slot = note

    def do(self, action: str, value: float) -> None:
        rig, guest = self.rig, self.rig.guest
        if action in ("request", "tear_out", "eject") and rig.port.card is not None:
            self.asked.add(rig.port.card.name)
        match action:
            case "pass":
                guest.pass_(value)
            case "insert" if rig.port.card is None:
                self.inserted.append(f"card{len(self.inserted)}")
                rig.port.insert(Card(self.inserted[-1]))
            case "request" | "tear_out":
                getattr(rig.port, action)()
            case "cancel":
                rig.cancelling = True
                rig.port.cancel()
                rig.cancelling = False
            case "bind" if not guest._bound:
                guest.scan()
                guest.bind()
            case "eject" if guest.idle and guest._bound:
                guest.write_power(on=False)
            case "works" | "fails":
                guest.works = action == "works"
        self.check()

    def check(self) -> None:
        rig = self.rig
        card = rig.port.card
        there = [] if card is None else [card.name]
        assert sorted(rig.released + there) == sorted(self.inserted), "released exactly once"
        assert bool(rig.slot(STATUS) & PRESENT) is (rig.port.behind is not None)
        gaps = {b: b - a for a, b in zip(rig.presses, rig.presses[1:], strict=False)}
        assert all(gap >= 5.0 or press in rig.taken_back for press, gap in gaps.items())


@given(st.lists(ACTIONS, max_size=40), st.booleans())
@EXAMPLES
def test_r20_any_plugs_and_requests_beside_a_driver_keep_every_rule(
    actions: list[tuple[str, float]], power_controller: bool
) -> None:
    campaign = Campaign(power_controller=power_controller)
    for action, value in actions:
        campaign.do(action, value)
    rig = campaign.rig
    if not rig.guest._bound:
        campaign.do("bind", 0)
    rig.guest.works = True
    rig.guest.pass_(60)
    campaign.check()
    assert set(rig.released) <= campaign.asked, "a card has gone that nobody wanted gone"
    assert rig.port.card is rig.port.behind, "a card waits for ever"
    if rig.port.card is not None and not rig.failed and not rig.refused:
        assert rig.guest.found or rig.slot(CONTROL) & 0x300 == 0x300
    rig.port.request()
    rig.guest.pass_(60)
    assert rig.port.card is None or rig.refused
    campaign.check()
    rig.close()


@given(st.lists(st.one_of(ACTIONS, st.tuples(st.just("write"), WRITES)), max_size=40), st.booleans())
@EXAMPLES
def test_r20_no_guest_gets_a_slot_to_break_a_rule(actions: list[tuple[str, Any]], power_controller: bool) -> None:
    """The guest writes what it likes; the driver is there too, and may despair."""
    campaign = Campaign(power_controller=power_controller)
    rig = campaign.rig
    for action, value in actions:
        if action == "write":
            rig.guest.write(*value)
            campaign.check()
        elif action == "pass":
            rig.board.clock.pass_(value)
            campaign.check()
        elif action not in ("bind", "eject"):
            campaign.do(action, value)
    rig.port.tear_out()
    assert rig.port.card is None
    campaign.check()
    rig.close()
