"""Announcing network devices: which, how often, and that it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
import pytest

from kvmpy.errors import CommandError
from kvmpy.host.reactor import Reactor
from kvmpy.machine.announce import MOST, Announcer, Rounds
from tests.fakes.loop import Inbox, running, settle

AT_ONCE: Final = Rounds(initial=0, most=0, rounds=3, step=0)
LATER: Final = Rounds(initial=100_000, most=100_000, rounds=2, step=0)


class Nic:
    """Notes what it is asked."""

    def __init__(self, name: str, asked: Inbox[str]) -> None:
        self._name, self._asked = name, asked

    def announce(self) -> bool:
        self._asked.put(f"{self._name} guest")
        return False

    def announce_from_here(self) -> bool:
        self._asked.put(f"{self._name} rarp")
        return True


class Rig:
    """Two network devices, each with a netdev."""

    def __init__(self, control: Reactor) -> None:
        self.control = control
        self.asked: Inbox[str] = Inbox()
        self.nics = {name: Nic(name, self.asked) for name in ("net1", "net2")}
        self.nics |= {"hostnet1": self.nics["net1"], "hostnet2": self.nics["net2"]}
        self.announcer = Announcer(control, lambda: self.nics)

    def start(self, rounds: Rounds, names: list[str] | None = None, id_: str = "") -> None:
        """In the control thread, as the machine does it."""
        refused: list[CommandError] = []

        def begin() -> None:
            try:
                self.announcer.start(rounds, names, id_)
            except CommandError as e:
                refused.append(e)

        self.control.post(begin)
        settle(self.control)
        for e in refused:
            raise e


@pytest.fixture
def rig() -> Iterator[Rig]:
    with running("control") as control:
        yield Rig(control)


@pytest.mark.parametrize(
    ("rounds", "waits"),
    [
        (Rounds(initial=50, most=550, rounds=5, step=100), [0.05, 0.15, 0.25, 0.35]),
        (Rounds(initial=50, most=100, rounds=4, step=100), [0.05, 0.1, 0.1]),
        (Rounds(initial=100, most=50, rounds=2, step=0), [0.05]),
    ],
    ids=["QEMU's own", "no longer than the longest", "the longest is shorter than the first"],
)
def test_waits_grow_up_to_the_longest(rounds: Rounds, waits: list[float]) -> None:
    assert [rounds.wait(done) for done in range(1, rounds.rounds)] == waits


def test_each_round_announces_each_device_once_though_it_has_two_names(rig: Rig) -> None:
    rig.start(AT_ONCE)
    assert rig.asked.wait(12) == ["net1 rarp", "net1 guest", "net2 rarp", "net2 guest"] * 3


def test_only_the_named_devices_are_announced(rig: Rig) -> None:
    rig.start(AT_ONCE, ["net2", "hostnet2"])
    assert rig.asked.wait(6) == ["net2 rarp", "net2 guest"] * 3


def test_a_name_that_is_nobodys_is_refused_and_nothing_is_announced(rig: Rig) -> None:
    with pytest.raises(CommandError, match="Device 'net9' not found") as refused:
        rig.start(AT_ONCE, ["net1", "net9"])
    assert refused.value.kind == "DeviceNotFound"
    assert rig.asked.items == []


def test_a_device_that_has_gone_between_two_rounds_is_left_out(rig: Rig) -> None:
    rig.start(Rounds(initial=0, most=0, rounds=1_000_000, step=0), ["net1", "net2"])
    rig.asked.wait(4)
    rig.control.post(lambda: rig.nics.pop("net1"))
    settle(rig.control)
    before = len(rig.asked.wait(1))
    assert "net2 rarp" in rig.asked.wait(before + 4)[before:]
    rig.control.post(rig.announcer.stop)
    settle(rig.control)
    assert not any(said.startswith("net1") for said in rig.asked.items[before:])


def test_the_same_id_replaces_what_goes_on_and_no_rounds_end_it(rig: Rig) -> None:
    rig.start(LATER, ["net1"], "a")
    rig.start(LATER, ["net2"], "a")
    assert rig.asked.wait(4) == ["net1 rarp", "net1 guest", "net2 rarp", "net2 guest"]
    assert len(rig.announcer._running) == 1
    rig.start(msgspec.structs.replace(LATER, rounds=0), None, "a")
    assert rig.announcer._running == {}
    assert rig.control._armed == {}


def test_there_are_no_more_at_once_than_the_bound(rig: Rig) -> None:
    for number in range(MOST):
        rig.start(LATER, ["net1"], str(number))
    with pytest.raises(CommandError, match=f"{MOST} announcements go on already"):
        rig.start(LATER, ["net1"], "another")
    rig.start(LATER, ["net1"], "0")


def test_stop_ends_all(rig: Rig) -> None:
    rig.start(LATER, None, "a")
    rig.start(LATER, None, "b")
    rig.control.post(rig.announcer.stop)
    settle(rig.control)
    assert (rig.announcer._running, rig.control._armed) == ({}, {})


def test_what_is_done_is_forgotten(rig: Rig) -> None:
    rig.start(AT_ONCE)
    rig.asked.wait(12)
    settle(rig.control)
    assert rig.announcer._running == {}
