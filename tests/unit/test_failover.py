"""Failover pairs of a machine, against real root ports, slots and virtio-net, with a guest that behaves as pciehp."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.devices.failover import IN_SLOT, PairState
from kvmpy.devices.pci.config import Command
from kvmpy.errors import CommandError, HostError
from kvmpy.machine import steering
from tests.counts import count
from tests.fakes.failover_rig import ALONE, PAIRING, FailoverRig
from tests.fakes.loop import poll

STANDBY = """
[[device]]
driver = "virtio-net-pci"
id = "standby0"
netdev = "hostnet0"
mac = "52:54:00:6f:55:cc"
bus = "root1"
failover = true
"""
PRIMARY = """
[[device]]
driver = "vfio-pci"
id = "primary0"
host = "5e:00.0"
bus = "root2"
failover_pair_id = "standby0"
"""
MAC = "52:54:00:6f:55:cc"
BOTH = {"standby0", "primary0"}


@contextmanager
def made(here: Path, devices: str = "", *, compat: bool = False, incoming: bool = False) -> Iterator[FailoverRig]:
    rig = FailoverRig(here, devices, compat=compat, incoming=incoming)
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[FailoverRig]:
    """Both configured; no driver is there."""
    with made(tmp_path, STANDBY + PRIMARY) as rig:
        yield rig


@pytest.fixture
def plugged(rig: FailoverRig) -> FailoverRig:
    """In use by the guest."""
    rig.acks()
    rig.pass_()
    assert rig.state() is PairState.PLUGGED
    rig.told()
    return rig


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[FailoverRig]:
    with made(tmp_path) as rig:
        yield rig


def drive(rig: FailoverRig, *, on: bool = True) -> None:
    """The guest's driver turns on the primary's bus mastering, or off."""
    rig.pci.config(2, 0).write(0x04, 2, Command.MEMORY | (Command.BUS_MASTER if on else 0))
    rig.settle()


# R52: the reference's own cases, by its names; those that migrate come with migration.


def test_r2_r52_params_error_id(empty: FailoverRig) -> None:
    empty.add_standby()
    table = {"driver": "vfio-pci", "host": "5e:00.0", "bus": "root2", "failover_pair_id": "standby0"}
    with pytest.raises(CommandError, match=r"^Device with failover_pair_id needs to have id$"):
        empty.add(**table)


def test_r3_r52_params_error_pcie(empty: FailoverRig) -> None:
    empty.add_standby()
    with pytest.raises(CommandError, match=r"^Bus 'pcie\.0' does not support hotplugging"):
        empty.add_primary(bus="pcie.0")


def test_r52_params_on(rig: FailoverRig) -> None:
    rig.pass_()
    assert rig.visible() == {"standby0"}


def test_r52_params_on_mismatch(tmp_path: Path) -> None:
    mismatch = PRIMARY.replace("standby0", "standby1")
    with made(tmp_path, STANDBY + mismatch, compat=True) as rig:
        rig.pass_()
        assert rig.visible() == BOTH
        rig.acks()
        rig.pass_()
        assert rig.visible() == BOTH
        assert rig.told("FAILOVER_NEGOTIATED") == [("FAILOVER_NEGOTIATED", "standby0")]


def test_r52_params_off(tmp_path: Path) -> None:
    with made(tmp_path, STANDBY.replace("true", "false") + PRIMARY) as rig:
        rig.pass_()
        assert rig.visible() == BOTH
        rig.acks(features=ALONE)
        rig.pass_()
        assert (rig.visible(), rig.told("FAILOVER_NEGOTIATED")) == (BOTH, [])


def test_r9_r52_params_enabled(rig: FailoverRig) -> None:
    assert rig.visible() == {"standby0"}
    rig.acks()
    rig.pass_()
    assert rig.told("FAILOVER_NEGOTIATED") == [("FAILOVER_NEGOTIATED", "standby0")]
    assert rig.visible() == BOTH


def test_r9_r52_params_guest_off(rig: FailoverRig) -> None:
    rig.acks(features=ALONE)
    rig.pass_()
    assert (rig.visible(), rig.told()) == ({"standby0"}, [])


def test_r52_hotplug_1(tmp_path: Path) -> None:
    with made(tmp_path, STANDBY) as rig:
        rig.acks()
        rig.pass_()
        assert rig.visible() == {"standby0"}
        rig.add_primary()
        rig.pass_()
        assert rig.visible() == BOTH


def test_r52_hotplug_1_reverse(tmp_path: Path) -> None:
    with made(tmp_path, PRIMARY, compat=True) as rig:
        rig.pass_()
        assert rig.visible() == {"primary0"}
        rig.add_standby()
        rig.pass_()
        assert rig.visible() == BOTH
        rig.acks()
        rig.pass_()
        assert rig.visible() == BOTH


def test_r52_hotplug_2(empty: FailoverRig) -> None:
    empty.add_standby()
    empty.acks()
    empty.pass_()
    assert empty.visible() == {"standby0"}
    empty.add_primary()
    empty.pass_()
    assert empty.visible() == BOTH


def test_r52_hotplug_2_reverse(tmp_path: Path) -> None:
    with made(tmp_path, compat=True) as rig:
        rig.add_primary()
        rig.pass_()
        assert rig.visible() == {"primary0"}
        rig.add_standby()
        rig.acks()
        rig.pass_()
        assert rig.visible() == BOTH


# Configuration


@pytest.mark.parametrize(("mac", "failover"), [(True, True), (True, False)])
def test_r1_standby_is_offered_with_failover_alone_and_beside_version_1_and_mac(
    empty: FailoverRig, mac: bool, failover: bool
) -> None:
    empty.add_standby(failover=failover)
    offered = empty.net().features
    assert offered & ALONE == ALONE
    assert bool(offered & PAIRING & ~ALONE) is failover


def test_r1_a_driver_that_takes_standby_without_mac_pairs_nothing(rig: FailoverRig) -> None:
    rig.acks(features=PAIRING & ~(1 << 5))
    assert (rig.state(), rig.told()) == (PairState.HIDDEN, [])


def test_r2_a_primary_without_an_id_is_refused_also_without_its_standby(empty: FailoverRig) -> None:
    with pytest.raises(CommandError, match="needs to have id"):
        empty.add(driver="vfio-pci", host="5e:00.0", bus="root2", failover_pair_id="standby0")


def test_r5_a_second_primary_is_refused_until_the_first_is_deleted(plugged: FailoverRig) -> None:
    second = {"driver": "vfio-pci", "id": "primary1", "host": "5e:00.1", "bus": "root3", "failover_pair_id": "standby0"}
    with pytest.raises(CommandError, match="\"standby0\" is taken by 'primary0', 'primary1' needs another"):
        plugged.add(**second)
    plugged.remove("primary0")
    plugged.pass_()
    assert ("DEVICE_DELETED", "primary0") in plugged.told()
    plugged.add(**second)
    plugged.pass_()
    assert (plugged.state(), plugged.pair().primary_id) == (PairState.PLUGGED, "primary1")


def test_r6_a_primary_with_another_address_is_refused_and_may_have_one_where_macs_are_not_compared(
    tmp_path: Path,
) -> None:
    problem = f"52:54:00:00:00:01 is not that of the standby 'standby0', {MAC}"
    with made(tmp_path, STANDBY) as rig, pytest.raises(CommandError, match=problem):
        rig.add_primary(mac="52:54:00:00:00:01")
    with made(tmp_path, STANDBY, compat=True) as rig:
        rig.add_primary(mac="52:54:00:00:00:01")


def test_r6_a_standby_whose_address_is_not_that_of_a_primary_that_waits_is_refused(empty: FailoverRig) -> None:
    empty.add_primary(mac="52:54:00:00:00:01")
    with pytest.raises(CommandError, match=f"{MAC} is not that of the primary 'primary0', 52:54:00:00:00:01"):
        empty.add_standby(mac=MAC)
    empty.add_standby(mac="52:54:00:00:00:01")


def test_r7_a_primary_without_its_standby_waits_unseen_with_a_warning(
    empty: FailoverRig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        empty.add_primary()
    assert "primary0: is hidden until its standby 'standby0' is added" in caplog.text
    empty.pass_()
    assert (empty.visible(), empty.state()) == (set(), PairState.WAITING)


STEPS: dict[str, Callable[[FailoverRig], object]] = {
    "standby": lambda rig: rig.add_standby(),
    "ack": lambda rig: rig.acks(),
    "primary": lambda rig: rig.add_primary(),
}
ORDERS = [order for order in permutations(STEPS) if order.index("standby") < order.index("ack")]


@pytest.mark.parametrize("order", ORDERS, ids=[" ".join(order) for order in ORDERS])
def test_r8_every_order_of_adding_ends_the_same(empty: FailoverRig, order: tuple[str, ...]) -> None:
    for step in order:
        STEPS[step](empty)
    empty.pass_()
    assert (empty.visible(), empty.state()) == (BOTH, PairState.PLUGGED)


def test_r8_primaries_configured_before_their_standbys_are_hidden_too(tmp_path: Path) -> None:
    with made(tmp_path, PRIMARY + STANDBY) as rig:
        assert (rig.visible(), rig.state()) == ({"standby0"}, PairState.HIDDEN)
        rig.acks()
        rig.pass_()
        assert rig.visible() == BOTH


# Hide and show


def test_r9_a_hidden_primary_is_an_empty_slot_that_reads_all_ones(rig: FailoverRig) -> None:
    port, above = rig.ports["root2"], rig.pci.config(0, 2)
    express = above.capability(0x10)
    assert port.card is None
    assert rig.pci.config(2, 0).read(0, 4) == 0xFFFF_FFFF
    assert not above.read(express + 0x1A, 2) & 0x40, "presence"
    assert not above.read(express + 0x12, 2) & 0x2000, "link active"
    assert not rig.guests["root2"].occupied


def test_r10_the_event_comes_once_for_each_ack_and_before_the_plug(rig: FailoverRig) -> None:
    rig.acks()
    assert rig.state() is PairState.PLUGGING
    rig.pass_()
    assert rig.told() == [("FAILOVER_NEGOTIATED", "standby0"), ("FAILOVER_PRIMARY_PLUGGED", "primary0")]
    rig.acks()
    rig.pass_()
    assert rig.told() == [("FAILOVER_NEGOTIATED", "standby0")], "the guest has it already"


def test_r11_a_driver_without_a_primary_is_an_event_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with made(tmp_path, STANDBY) as rig:
        rig.acks()
        assert rig.told() == [("FAILOVER_NEGOTIATED", "standby0")]
        assert "standby0: the guest waits for a failover primary, and there is none" in caplog.text


def test_r12_a_reset_hides_it_again_and_the_next_driver_gets_it(plugged: FailoverRig) -> None:
    plugged.reset()
    assert (plugged.visible(), plugged.state(), plugged.pair().negotiated) == ({"standby0"}, PairState.HIDDEN, False)
    plugged.pass_()
    assert plugged.visible() == {"standby0"}
    plugged.acks()
    plugged.pass_()
    assert (plugged.visible(), plugged.state()) == (BOTH, PairState.PLUGGED)


def test_r12_an_ack_from_before_a_reset_that_comes_late_shows_nothing(rig: FailoverRig) -> None:
    net = rig.net()
    settle, rig.settle = rig.settle, lambda: None  # type: ignore[method-assign]
    rig.acks()
    assert net.is_standby
    rig.hotplug.pairs.reset()
    with net.lock:
        net.reset()
    rig.settle = settle  # type: ignore[method-assign]
    rig.settle()
    assert (rig.state(), rig.told()) == (PairState.HIDDEN, [])


def test_r12_a_reset_while_the_card_waits_for_its_slot_hides_it(plugged: FailoverRig) -> None:
    plugged.remove("primary0", force=True)
    plugged.add_primary()  # the guest is not done with the one before
    assert plugged.state() is PairState.PLUGGING
    plugged.reset()
    assert (plugged.visible(), plugged.state()) == ({"standby0"}, PairState.HIDDEN)
    assert plugged.ports["root2"].card is None


def test_one_for_whose_reset_nobody_can_wait_is_reported(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    card: Any = rig.cards["primary0"]
    card.is_ready, card.finish_reset = False, lambda: True
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", refuse)
        rig.acks()
    assert rig.state() is PairState.FAILED
    assert "can't start new thread" in str(rig.pair().error)
    assert ("FAILOVER_PRIMARY_FAILED", "primary0") in rig.told()
    card.is_ready = True
    rig.reset()
    rig.acks()
    rig.pass_()
    assert rig.state() is PairState.PLUGGED


def test_r13_the_states_an_operator_is_shown(rig: FailoverRig) -> None:
    seen = [rig.state()]
    rig.acks()
    seen.append(rig.state())
    rig.pass_()
    seen.append(rig.state())
    rig.remove("primary0")
    seen.append(rig.state())
    rig.pass_()
    seen.append(rig.state())
    wanted = (PairState.HIDDEN, PairState.PLUGGING, PairState.PLUGGED, PairState.LEAVING, PairState.NONE)
    assert seen == list(wanted)


def test_any_number_of_pairs_each_by_itself(empty: FailoverRig) -> None:
    for n, (standby, primary) in enumerate((("root1", "root2"), ("root3", "root4"))):
        empty.add_standby(n, standby)
        empty.add_primary(n, primary)
    empty.acks(1)
    empty.pass_()
    assert [empty.state(0), empty.state(1)] == [PairState.HIDDEN, PairState.PLUGGED]
    assert empty.visible() == {"standby0", "standby1", "primary1"}


# Leaving


def test_a_primary_that_is_asked_for_is_released_then_deleted(plugged: FailoverRig) -> None:
    plugged.remove("primary0")
    assert plugged.state() is PairState.LEAVING
    plugged.pass_()
    assert plugged.told() == [("FAILOVER_PRIMARY_RELEASED", "primary0"), ("DEVICE_DELETED", "primary0")]
    plugged.add_primary()
    plugged.pass_()
    assert plugged.state() is PairState.PLUGGED, "the same id again"


def test_a_hidden_primary_is_deleted_without_asking_anybody(rig: FailoverRig) -> None:
    rig.remove("primary0")
    assert rig.told() == [("DEVICE_DELETED", "primary0")]
    assert rig.state() is PairState.NONE
    rig.acks()
    assert rig.told() == [("FAILOVER_NEGOTIATED", "standby0")]


def test_a_hidden_primary_that_the_host_wants_back_is_given_back(rig: FailoverRig) -> None:
    rig.on_unasked(rig.cards["primary0"])
    rig.settle()
    assert rig.told() == [("DEVICE_DELETED", "primary0")]


def test_r23_a_guest_that_ejects_it_by_itself(plugged: FailoverRig) -> None:
    plugged.guests["root2"].write_power(on=False)
    plugged.pass_()
    assert plugged.told() == [("FAILOVER_PRIMARY_RELEASED", "primary0"), ("DEVICE_DELETED", "primary0")]


def test_r25_a_guest_that_cannot_use_it_is_an_event_and_the_pairs_error(rig: FailoverRig) -> None:
    rig.guests["root2"].works = False
    rig.acks()
    rig.pass_()
    assert ("FAILOVER_PRIMARY_FAILED", "primary0") in rig.told()
    assert (rig.state(), "attention indicator" in str(rig.pair().error)) == (PairState.FAILED, True)


def test_a_standby_that_is_unplugged_leaves_the_guest_its_primary(plugged: FailoverRig) -> None:
    plugged.remove("standby0")
    plugged.pass_()
    assert (plugged.visible(), plugged.state()) == ({"primary0"}, PairState.PLUGGED)
    assert plugged.told() == [("DEVICE_DELETED", "standby0")]
    plugged.reset()
    assert (plugged.visible(), plugged.state()) == (set(), PairState.WAITING)
    plugged.add_standby()
    plugged.acks()
    plugged.pass_()
    assert (plugged.visible(), plugged.state()) == (BOTH, PairState.PLUGGED)


def test_r34_a_driver_that_is_unloaded_leaves_the_guest_its_primary(plugged: FailoverRig) -> None:
    plugged.driver_leaves()
    plugged.pass_()
    assert (plugged.visible(), plugged.state(), plugged.pair().negotiated) == (BOTH, PairState.PLUGGED, False)


def test_r42_one_that_came_with_a_move_is_plugged_when_the_machine_runs(tmp_path: Path) -> None:
    with made(tmp_path, STANDBY + PRIMARY, incoming=True) as rig:
        rig.acks()  # as loading its state does
        assert (rig.state(), rig.told()) == (PairState.HIDDEN, [("FAILOVER_NEGOTIATED", "standby0")])
        rig.hotplug.pairs.runs()
        rig.pass_()
        assert (rig.visible(), rig.state()) == (BOTH, PairState.PLUGGED)


def test_r8_nothing_but_a_standby_has_the_id_that_a_primary_waits_for(rig: FailoverRig) -> None:
    rig.add_primary(1, bus="root3")
    with pytest.raises(CommandError, match=r"^Device 'primary1' waits for its standby 'standby1': give this one fail"):
        rig.add_standby(1, bus="root4", failover=False)
    rig.add_standby(1, bus="root4")
    rig.acks(1)
    rig.pass_()
    assert rig.state(1) is PairState.PLUGGED


# R49


def test_r49_the_address_is_the_primarys_only_while_the_guest_drives_it(plugged: FailoverRig) -> None:
    assert (plugged.addresses["primary0"], plugged.pair().path) == ([], "standby")
    drive(plugged)
    assert plugged.addresses["primary0"] == [MAC]
    assert (plugged.pair().path, plugged.pair().primary_mac) == ("primary", MAC)
    drive(plugged, on=False)
    assert plugged.addresses["primary0"] == [MAC, None]
    assert (plugged.pair().path, plugged.pair().primary_mac) == ("standby", None)
    assert plugged.told() == [("FAILOVER_PATH_CHANGED", "standby0")] * 2


@pytest.fixture
def running(plugged: FailoverRig) -> FailoverRig:
    """In use by the guest of a machine that runs, over the standby."""
    plugged.hotplug.pairs.runs()
    plugged.settle()
    assert plugged.switches["standby0"].told == ["here"]
    return plugged


def test_r46_when_the_path_is_the_standbys_again_the_network_hears_of_it(running: FailoverRig) -> None:
    tap = running.net().tap
    drive(running)
    assert tap.sent() == []  # type: ignore[attr-defined]
    drive(running, on=False)
    (frame,) = tap.sent()  # type: ignore[attr-defined]
    assert frame[12 + 6 : 12 + 14] == bytes.fromhex(MAC.replace(":", "")) + b"\x80\x35", "RARP, from the pair's address"


def test_r46_bridge_and_nics_are_told_of_each_path_and_hear_the_guest_after_that(running: FailoverRig) -> None:
    port, tap = running.switches["standby0"], running.net().tap
    drive(running)
    assert (port.told, tap.sent()) == (["here", "not here"], [])  # type: ignore[attr-defined]
    drive(running, on=False)
    assert port.told == ["here", "not here", "here"]
    assert (port.sent, len(tap.sent())) == ([], 1)  # type: ignore[attr-defined]
    assert running.told() == [("FAILOVER_PATH_CHANGED", "standby0")] * 2


def test_r45_the_gap_to_the_standby_is_from_the_bus_masters_end_to_the_rarp(running: FailoverRig) -> None:
    drive(running)
    running.events.clear()
    begun = time.monotonic()
    drive(running, on=False)
    ((event, data),) = running.events
    assert (event, data["path"]) == ("FAILOVER_PATH_CHANGED", "standby")
    assert 0 <= data["rx-gap-ms"] <= (time.monotonic() - begun) * 1000
    assert running.pair().rx_gap_ms == data["rx-gap-ms"]


def test_r45_the_network_hears_of_the_standby_when_the_primary_goes_back_before_its_last_word(
    running: FailoverRig,
) -> None:
    steering: Any = running.cards["primary0"].steering
    carry = steering._carry

    def slow(mac: str | None) -> None:
        carry(mac)
        poll(lambda: steering._closed)  # a PF that takes until the host has the function back

    steering._carry = slow
    running.pci.config(2, 0).write(0x04, 2, Command.MEMORY | Command.BUS_MASTER)
    poll(lambda: running.addresses["primary0"])
    running.hotplug.device_del("primary0", force=True)
    running.control.serve()
    running.settle()
    assert running.told("DEVICE_DELETED") == [("DEVICE_DELETED", "primary0")]
    assert (running.pair().path, running.switches["standby0"].told[-1]) == ("standby", "here")


def test_r46_a_guest_that_has_gone_elsewhere_is_not_announced_from_here(running: FailoverRig) -> None:
    drive(running)
    running.hotplug.pairs.gone()
    running.settle()
    drive(running, on=False)  # and the PF has taken until now
    assert running.net().tap.sent() == []  # type: ignore[attr-defined]
    assert running.switches["standby0"].told[-1] == "nowhere"


def test_r45_the_gap_to_the_primary_ends_when_the_guest_has_an_interrupt_of_it_on(running: FailoverRig) -> None:
    steering = running.cards["primary0"].steering
    steering.receives()
    running.settle()
    assert (running.told(), running.pair().rx_gap_ms) == ([], None), "a guest that does not drive it hears nothing"
    drive(running)
    assert (running.told(), running.pair().rx_gap_ms) == ([("FAILOVER_PATH_CHANGED", "standby0")], None)
    for _ in range(2):
        steering.receives()
        running.settle()
    gap = running.pair().rx_gap_ms
    assert running.events == [
        ("FAILOVER_PRIMARY_RECEIVES", {"device-id": "primary0", "standby-id": "standby0", "rx-gap-ms": gap})
    ]
    drive(running, on=False)
    assert running.pair().rx_gap_ms is not None


def test_the_hook_is_told_of_each_path_what_there_is_to_know(running: FailoverRig) -> None:
    facts = {"PRIMARY": "primary0", "HOST": "0000:5e:00.0", "PF": "enp94s0f0", "VF": "2", "MAC": MAC, "TAP": "tap0"}
    drive(running)
    drive(running, on=False)
    assert running.program.runs == [(path, facts) for path in ("standby", "primary", "standby")]
    running.remove("standby0")
    running.pass_()
    assert running.program.runs[3:] == [("none", facts)]
    assert running.switches["standby0"].told[-1] == "closed"


def test_what_cannot_be_told_is_shown_and_fails_nothing(running: FailoverRig) -> None:
    running.switches["standby0"].problems = ["eth0: EOPNOTSUPP"]
    running.program.fails = "failover_hook: /hook: exit code 3"
    drive(running)
    assert (running.pair().path, running.pair().error) == ("primary", None)
    assert running.pair().network_error == "eth0: EOPNOTSUPP; failover_hook: /hook: exit code 3"
    running.switches["standby0"].problems, running.program.fails = [], ""
    drive(running, on=False)
    assert running.pair().network_error is None


def test_a_guest_that_was_moved_away_is_nowhere_until_it_is_resumed_here(running: FailoverRig) -> None:
    port = running.switches["standby0"]
    for _ in range(2):
        running.hotplug.pairs.gone()
        running.settle()
    assert port.told == ["here", "nowhere"]
    for _ in range(2):
        running.hotplug.pairs.runs()
        running.settle()
    assert port.told == ["here", "nowhere", "here"]
    assert [path for path, _ in running.program.runs] == ["standby", "none", "standby"]


def test_a_standby_that_comes_to_a_machine_that_runs_is_told_of_at_once_else_when_it_does(tmp_path: Path) -> None:
    with made(tmp_path) as rig:
        rig.add_standby()
        assert rig.switches["standby0"].told == []
        rig.hotplug.pairs.runs()
        rig.add_standby(1, bus="root2")
        assert [rig.switches[f"standby{n}"].told for n in range(2)] == [["here"]] * 2


def test_the_standbys_frames_are_the_kernels_count(running: FailoverRig) -> None:
    running.net().tap.counted = (5, 7)  # type: ignore[attr-defined]
    assert (running.pair().standby_rx_frames, running.pair().standby_tx_frames) == (5, 7)


@pytest.mark.parametrize("how", ["release", "reset", "torn out", "slot power"])
def test_r49_whatever_ends_the_guests_use_of_it_ends_its_address(plugged: FailoverRig, how: str) -> None:
    drive(plugged)
    if how == "reset":
        plugged.reset()
    elif how == "slot power":
        plugged.guests["root2"].write_power(on=False)
    else:
        plugged.remove("primary0", force=how == "torn out")
    plugged.pass_()
    assert plugged.addresses["primary0"] == [MAC, None]


def test_r49_an_address_that_cannot_be_moved_is_an_event_and_the_pairs_error(plugged: FailoverRig) -> None:
    plugged.carry_fails = HostError("0000:5e:00.0: EBUSY: the PF is being reset")
    drive(plugged)
    assert plugged.told() == [("FAILOVER_PRIMARY_FAILED", "primary0")]
    assert (plugged.pair().path, plugged.pair().error) == ("standby", "0000:5e:00.0: EBUSY: the PF is being reset")


def test_r45_the_standbys_network_is_told_though_the_nic_keeps_the_address(
    running: FailoverRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "AGAIN", ())
    drive(running)
    assert running.switches["standby0"].told[-1] == "not here"
    running.carry_fails = HostError("0000:5e:00.0: EBUSY: the PF is being reset")
    drive(running, on=False)
    assert running.told()[-1] == ("FAILOVER_PRIMARY_FAILED", "primary0")
    assert running.pair().error == "0000:5e:00.0: EBUSY: the PF is being reset"
    assert running.switches["standby0"].told[-1] == "here"


# Whatever happens

OPERATIONS: dict[str, Callable[[FailoverRig], object]] = {
    "ack": lambda rig: rig.acks(),
    "ack without standby": lambda rig: rig.acks(features=ALONE),
    "unload": lambda rig: rig.driver_leaves(),
    "reset": lambda rig: rig.reset(),
    "add standby": lambda rig: rig.add_standby(),
    "del standby": lambda rig: rig.remove("standby0"),
    "tear out standby": lambda rig: rig.remove("standby0", force=True),
    "add primary": lambda rig: rig.add_primary(),
    "del primary": lambda rig: rig.remove("primary0"),
    "tear out primary": lambda rig: rig.remove("primary0", force=True),
    "drive": drive,
    "a moment": lambda rig: rig.pass_(0.5),
    "time": lambda rig: rig.pass_(),
}


@settings(max_examples=count(20, 3000), deadline=None)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=25))
def test_r8_r9_r12_r49_whatever_happens_the_guest_has_it_only_after_an_ack(names: list[str]) -> None:
    with TemporaryDirectory() as here, made(Path(here)) as rig:
        asked = False  # for by a driver, since the reset
        for name in names:
            if "ack" in name or name == "unload":
                asked = asked or (name == "ack" and "standby0" in rig.board.inventory.plugged)
            with suppress(CommandError, KeyError):  # refused, or there is no such device
                OPERATIONS[name](rig)
            asked = asked and name != "reset"
            card = rig.ports["root2"].card
            assert asked or card is None
            for facts in rig.hotplug.pairs.facts():
                assert (facts.state in IN_SLOT) == (card is not None)
                assert facts.path == "standby" or card is not None
            addresses = rig.addresses.get("primary0") or [None]
            assert card is not None or addresses[-1] is None
        rig.pass_(60)
        assert {facts.state for facts in rig.hotplug.pairs.facts()} <= set(PairState) - {PairState.LEAVING}
