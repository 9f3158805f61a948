"""Primaries leave for a migration and come back, on real slots with a guest's pciehp: who is asked when, and gets what.

What a migration makes of that is in tests/kvm.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpy.devices.failover import PairState
from kvmpy.devices.pci.express import SlotControl
from kvmpy.errors import CommandError
from tests.fakes.failover_rig import FailoverRig
from tests.fakes.loop import BOUND, open_descriptors, poll
from tests.fakes.pciehp import BLINK, OFF, ON
from tests.fakes.pciehp import State as Guest

FIVE = 5.5
"""More seconds than a guest waits for a second press."""
RELEASED, PLUGGED, DELETED = "FAILOVER_PRIMARY_RELEASED", "FAILOVER_PRIMARY_PLUGGED", "DEVICE_DELETED"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FailoverRig]:
    """A guest with one pair, its primary in use."""
    rig = FailoverRig(tmp_path)
    rig.add_standby()
    rig.add_primary()
    rig.acks()
    rig.pass_()
    assert rig.state() is PairState.PLUGGED
    rig.told()
    yield rig
    rig.close()


def staying(rig: FailoverRig) -> list[str]:
    """Whom a migration waits for."""
    return rig.departure.staying()


def came_back(rig: FailoverRig, seconds: float = 30.0) -> list[str]:
    """Bring them back, while the guest does what it is asked for."""
    thread = rig.stays(seconds)

    def over() -> bool:
        rig.pass_(0.1)
        return not thread.is_alive()

    poll(over)
    return thread.result()


def await_request(rig: FailoverRig, *, state: Guest) -> None:
    """Until the guest is at ``state`` with the primary's slot."""
    rig.settle()
    assert rig.guests["root2"].state is state


def test_r28_r29_a_primary_is_asked_for_and_waited_for_until_the_guest_has_let_it_go(rig: FailoverRig) -> None:
    assert rig.departure.begin()
    rig.settle()
    assert rig.told() == [("UNPLUG_PRIMARY", "primary0")]
    for _ in range(5):
        assert (staying(rig), rig.state()) == (["primary0"], PairState.LEAVING)
        rig.pass_(1.0)
    rig.pass_(2.0)
    assert (staying(rig), rig.state()) == ([], PairState.RELEASED)
    assert (RELEASED, "primary0") in rig.told()
    assert rig.visible() == {"standby0"}
    assert rig.departure.attached() == ("primary0",)


def test_r30_whoever_waits_is_woken_by_the_release(rig: FailoverRig) -> None:
    rig.departure.begin()
    staying(rig)
    woken = select.poll()
    woken.register(rig.departure.fd, select.POLLIN)
    rig.pass_(4.0)
    assert not woken.poll(0)
    rig.pass_(4.0)
    assert woken.poll(0)


def test_r31_all_of_several_are_asked_and_waited_for(rig: FailoverRig) -> None:
    rig.add_standby(1, bus="root3", mac="52:54:00:00:00:02")
    rig.add_primary(1, bus="root4")
    rig.acks(1)
    rig.pass_()
    rig.told()
    rig.guests["root4"].delay = 3.0
    rig.departure.begin()
    assert staying(rig) == ["primary0", "primary1"]
    rig.pass_(7.5)
    assert rig.told("UNPLUG_PRIMARY", RELEASED) == [
        ("UNPLUG_PRIMARY", "primary0"),
        ("UNPLUG_PRIMARY", "primary1"),
        (RELEASED, "primary0"),
    ]
    assert staying(rig) == ["primary1"]
    rig.pass_(3.0)
    assert staying(rig) == []


def test_r32_a_hidden_primary_is_not_asked_for_and_stays_hidden(tmp_path: Path) -> None:
    rig = FailoverRig(tmp_path)
    rig.add_standby()
    rig.add_primary()
    assert not rig.departure.begin()
    rig.acks()
    assert (rig.state(), rig.departure.attached()) == (PairState.HIDDEN, ())
    assert came_back(rig) == []
    rig.pass_()
    assert rig.state() is PairState.PLUGGED
    rig.close()


def test_r33_one_whose_indicator_blinks_is_asked_when_it_does_so_no_more(rig: FailoverRig) -> None:
    guest = rig.guests["root2"]
    guest.command(0x0300, BLINK)
    rig.departure.begin()
    rig.pass_(20.0)
    assert (staying(rig), guest.state) == (["primary0"], Guest.ON)
    guest.command(0x0300, ON)
    rig.pass_(7.0)
    assert staying(rig) == []


def test_r33_one_whose_guest_goes_back_is_asked_again(rig: FailoverRig) -> None:
    guest = rig.guests["root2"]
    rig.departure.begin()
    rig.pass_(2.0)
    assert guest.state is Guest.BLINKING_OFF
    guest._button()  # somebody there presses
    rig.settle()
    assert staying(rig) == ["primary0"]
    rig.pass_(15.0)
    assert staying(rig) == []


def test_r40_a_device_del_that_the_guest_has_refused_meanwhile_is_over(rig: FailoverRig) -> None:
    guest = rig.guests["root2"]
    rig.remove("primary0")
    rig.pass_(2.0)
    rig.departure.begin()
    assert guest.state is Guest.BLINKING_OFF
    guest._button()
    rig.settle()
    assert rig.told("DEVICE_UNPLUG_GUEST_ERROR") == [("DEVICE_UNPLUG_GUEST_ERROR", "primary0")]
    rig.pass_(15.0)
    assert (staying(rig), rig.state()) == ([], PairState.RELEASED)
    assert came_back(rig) == ["primary0 is plugged in again"]
    assert rig.told(DELETED) == []
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r36_one_that_is_torn_out_is_away_at_once_and_comes_back_like_the_others(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(1.0)
    rig.departure.tear_out()
    rig.settle()
    assert (staying(rig), rig.visible()) == ([], {"standby0"})
    assert came_back(rig) == ["primary0 is plugged in again"]
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r38_taken_back_within_four_seconds_the_guest_never_loses_it(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(3.5)
    began = time.monotonic()
    assert came_back(rig) == ["primary0 has stayed with the guest"]
    assert time.monotonic() - began >= 0.5, "the indicator alone proves nothing"
    rig.pass_()
    assert (rig.state(), rig.visible()) == (PairState.PLUGGED, {"standby0", "primary0"})
    assert rig.guests["root2"].cards[-1] == "cancelled"
    assert rig.told(RELEASED, DELETED, PLUGGED) == [(PLUGGED, "primary0")]


def test_r37_taken_back_later_it_is_let_go_and_plugged_in_again(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(4.5)
    assert came_back(rig) == ["primary0 is plugged in again"]
    rig.pass_()
    assert (rig.state(), rig.visible()) == (PairState.PLUGGED, {"standby0", "primary0"})
    assert rig.told(RELEASED, DELETED, PLUGGED) == [(RELEASED, "primary0"), (PLUGGED, "primary0")]


def test_r40_one_that_was_away_is_on_its_way_back_when_that_is_said(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_()
    assert came_back(rig) == ["primary0 is plugged in again"]
    rig.pass_()
    assert rig.told(PLUGGED, DELETED) == [(PLUGGED, "primary0")]


def test_one_that_comes_back_where_its_standby_was_unplugged_has_its_address_still(rig: FailoverRig) -> None:
    address = rig.pair().standby_mac
    rig.cards["primary0"].steering.drive(True)
    rig.settle()
    rig.remove("standby0")
    rig.pass_()
    rig.departure.begin()
    rig.cards["primary0"].steering.drive(False)
    rig.pass_()
    assert came_back(rig) == ["primary0 is plugged in again"]
    rig.cards["primary0"].steering.drive(True)
    rig.settle()
    assert rig.addresses["primary0"] == [address, None, address]


def test_r39_a_guest_that_answers_when_nobody_waits_any_more_keeps_it(rig: FailoverRig) -> None:
    guest = rig.guests["root2"]
    rig.departure.begin()
    guest._bound = False  # it stands still
    rig.settle()
    (said,) = came_back(rig, seconds=0.2)
    assert said.startswith("primary0 is still in its slot: the guest has not answered")
    guest._bound = True
    rig.pass_(20.0)
    assert (guest.cards[-1], rig.state(), rig.pair().error) == ("cancelled", PairState.PLUGGED, None)
    rig.departure.begin()
    rig.pass_()
    assert staying(rig) == []


def test_r38_a_late_release_is_plugged_in_again(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(3.5)
    assert came_back(rig) == ["primary0 has stayed with the guest"]
    rig.guests["root2"].write_power(on=False)
    rig.pass_()
    assert (rig.state(), rig.visible()) == (PairState.PLUGGED, {"standby0", "primary0"})
    assert (DELETED, "primary0") not in rig.told()


def test_r23_after_that_a_guest_may_eject_it_for_good(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.departure.begin()
    rig.pass_(3.5)
    came_back(rig)
    later = time.monotonic() + 15.5
    monkeypatch.setattr("kvmpy.machine.pairing.time.monotonic", lambda: later)
    rig.guests["root2"].write_power(on=False)
    rig.pass_()
    assert (DELETED, "primary0") in rig.told()
    assert not rig.departure.begin(), "the next migration does not wait"


def test_r34_one_whose_standby_has_no_driver_leaves_and_comes_back_all_the_same(rig: FailoverRig) -> None:
    rig.driver_leaves()
    assert rig.departure.begin()
    rig.pass_()
    assert (staying(rig), rig.departure.attached()) == ([], ("primary0",))
    assert came_back(rig) == ["primary0 is plugged in again"]


def test_r34_where_it_goes_it_is_seen_whatever_the_driver_says(tmp_path: Path) -> None:
    rig = FailoverRig(tmp_path, incoming=True)
    rig.hotplug.pairs._held = True
    rig.add_standby()
    rig.add_primary()
    assert rig.departure.expect(("primary0", "primary7")) == ["primary7"]
    assert rig.state() is PairState.HIDDEN
    rig.hotplug.pairs.runs()
    rig.pass_()
    assert rig.state() is PairState.PLUGGED
    rig.close()


def test_r53_a_driver_that_comes_meanwhile_sees_it_afterwards(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_()
    rig.driver_leaves()
    rig.acks()
    rig.pass_()
    assert (rig.state(), rig.visible()) == (PairState.RELEASED, {"standby0"})
    came_back(rig)
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r53_a_reset_meanwhile_is_a_release_and_the_next_driver_gets_it_when_all_is_over(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(2.0)
    rig.reset()
    assert (staying(rig), rig.departure.attached()) == ([], ())
    rig.hotplug.pairs.runs()
    rig.acks()
    assert rig.visible() == {"standby0"}
    came_back(rig)
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r53_a_guest_that_goes_back_just_before_its_reset_gets_it_when_a_driver_asks(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(2.0)
    guest = rig.guests["root2"]
    assert guest.state is Guest.BLINKING_OFF
    guest._button()  # it goes back, and is reset before anybody has looked
    rig.reset()
    rig.pass_()
    assert (staying(rig), rig.departure.attached()) == ([], ()), "no driver asks for it where it goes"


def test_one_that_was_let_go_late_just_before_the_next_migration_comes_back_after_a_reset(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_(3.5)
    assert came_back(rig) == ["primary0 has stayed with the guest"]
    rig.guests["root2"].command(0x0700, OFF | SlotControl.POWER_OFF)  # and nobody has looked yet
    assert not rig.departure.begin()
    rig.settle()
    assert rig.state() is PairState.RELEASED
    rig.reset()
    came_back(rig)
    assert rig.state() is PairState.HIDDEN
    rig.acks()
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r53_one_that_was_about_to_come_waits(rig: FailoverRig) -> None:
    card: Any = rig.cards["primary0"]
    was_reset = threading.Event()
    card.is_ready, card.finish_reset = False, lambda: was_reset.wait(BOUND)
    rig.reset()
    rig.acks()
    assert rig.state() is PairState.PLUGGING
    assert not rig.departure.begin()
    was_reset.set()
    card.is_ready = True
    rig.pass_(0.5)
    assert rig.visible() == {"standby0"}
    came_back(rig)
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r41_a_guest_that_is_let_go_on_here_has_it_again(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_()
    staying(rig)
    rig.departure.gone()
    assert (rig.state(), rig.told(DELETED)) == (PairState.RELEASED, [])
    rig.hotplug.pairs.runs()
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r50_one_that_is_to_be_released_is_the_hosts_again(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_()
    rig.departure.gone()
    rig.departure.release()
    rig.settle()
    assert rig.told(DELETED) == [(DELETED, "primary0")]
    assert rig.state() is PairState.NONE


def test_one_may_be_given_up_while_it_is_waited_for(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.require_changeable = _busy  # type: ignore[method-assign]
    rig.remove("primary0")
    with pytest.raises(CommandError, match="migrated"):
        rig.remove("standby0")
    assert staying(rig) == ["primary0"]
    rig.pass_()
    assert (staying(rig), rig.state()) == ([], PairState.NONE)
    assert rig.told(DELETED) == [(DELETED, "primary0")]
    assert came_back(rig) == []


def test_one_that_is_out_may_be_given_up_too(rig: FailoverRig) -> None:
    rig.departure.begin()
    rig.pass_()
    rig.remove("primary0")
    assert rig.told(DELETED) == [(DELETED, "primary0")]


def test_a_machine_that_ends_keeps_nobody_waiting(rig: FailoverRig) -> None:
    rig.guests["root2"].delay = 600.0
    rig.departure.begin()
    rig.pass_(6.0)
    thread = rig.stays(600.0)
    poll(lambda: bool(rig.control.serve()) or rig.state() is PairState.LEAVING)
    rig.departure.abandon()
    end = time.monotonic() + BOUND
    while thread.is_alive():
        assert time.monotonic() < end
        rig.settle()
    assert rig.guests["root2"].log[-1] & OFF == BLINK


def test_a_machine_that_has_ended_before_its_guest_is_asked_keeps_nobody_waiting(rig: FailoverRig) -> None:
    rig.guests["root2"]._bound = False  # it stands still, for good
    rig.departure.abandon()
    rig.departure.begin()
    rig.settle()
    (said,) = came_back(rig, seconds=600.0)
    assert said.startswith("primary0 is still in its slot")


def test_one_whose_machine_is_closed_meanwhile_leaves_no_descriptor(rig: FailoverRig) -> None:
    before = open_descriptors()
    rig.departure.begin()
    rig.in_control = _closed  # type: ignore[method-assign]
    with pytest.raises(CommandError, match="closed"):
        rig.departure.come_back(30.0)
    assert open_descriptors() == before
    del rig.in_control


def _busy() -> None:
    raise CommandError("the machine is being migrated")


def _closed(call: Any) -> Any:
    raise CommandError("the machine has been closed")
