"""The port of a failover standby: what it asks of the network helper, and writes down before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvmpy.errors import HostError
from kvmpy.host import pci, pci_journal
from kvmpy.host.network import Network, Steered
from kvmpy.host.pci_journal import EntryRecord, Record
from kvmpy.host.standby_port import StandbyPort

MAC, TAP = "52:54:00:6f:55:cc", "tap-web1"


class FakeNetwork(Network):
    """The helper: ``asked`` of it; ``foreign`` are uplinks that have an entry of somebody else's."""

    def __init__(self, run: str) -> None:
        super().__init__("web1")
        self.run = run
        self.found = ["eth0", "eth1"]
        self.foreign: set[str] = set()
        self.entries: set[str] = set()
        self.asked: list[tuple[bool, bool]] = []
        self.noted: list[list[str]] = []
        self.problems: list[str] = []
        self.fails = False

    def uplinks(self, ifname: str, *, netns: str | None = None) -> list[str]:
        assert (ifname, netns) == (TAP, "/run/netns/blue")
        return self.found

    def steer(
        self, ifname: str, mac: str, uplinks: list[str], *, here: bool, learn: bool, netns: str | None = None
    ) -> Steered:
        if self.fails:
            raise HostError("the network helper, process 5, failed")
        assert (ifname, mac, netns) == (TAP, MAC, "/run/netns/blue")
        self.asked.append((here, learn))
        self.noted.append(noted(self.run))
        made = [name for name in uplinks if here and name not in self.foreign | self.entries]
        self.entries = self.entries | set(made) if here else self.entries - set(uplinks)
        return Steered(self.problems, made)


def noted(run: str) -> list[str]:
    journal = pci_journal.load(run)
    return [name for entry in journal.entries for name in entry.uplinks] if journal else []


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run/web1").mkdir(mode=0o750)
    return str(tmp_path / "run/web1")


@pytest.fixture
def network(run: str) -> FakeNetwork:
    return FakeNetwork(run)


@pytest.fixture
def port(network: FakeNetwork, run: str) -> StandbyPort:
    return StandbyPort(network, run, TAP, MAC, netns="/run/netns/blue")


def test_entries_are_written_down_before_they_are_made_and_until_the_end(
    network: FakeNetwork, port: StandbyPort, run: str
) -> None:
    assert port.steer(here=True) == []
    assert (network.noted, network.entries) == ([["eth0", "eth1"]], {"eth0", "eth1"})
    assert port.steer(here=False) == []
    assert (network.noted[1], network.entries) == (["eth0", "eth1"], set())
    assert network.asked == [(True, True), (False, False)]
    port.close()
    assert os.listdir(run) == []


def test_r45_the_bridge_is_told_though_nothing_can_be_written_down(
    network: FakeNetwork, port: StandbyPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise HostError("pci.json: ENOSPC")

    monkeypatch.setattr(pci_journal, "put_entry", full)
    assert port.steer(here=True) == ["pci.json: ENOSPC"]
    assert (network.asked, network.entries) == ([(True, True)], set()), "nothing that a crash would leave"


def test_r45_the_way_back_to_the_standby_is_one_request(network: FakeNetwork, port: StandbyPort) -> None:
    port.steer(here=True)
    port.steer(here=False)
    looked, network.found = network.found, []  # what it would be told if it looked again
    port.steer(here=True)
    assert network.entries == set(looked)


def test_an_uplink_that_came_since_is_told_too(network: FakeNetwork, port: StandbyPort, run: str) -> None:
    port.steer(here=True)
    network.found = ["eth0", "eth1", "eth2"]
    port.steer(here=False)
    port.steer(here=True)
    assert (network.entries, network.noted[-1]) == ({"eth0", "eth1", "eth2"}, ["eth0", "eth1", "eth2"])


def test_what_somebody_else_made_is_not_written_down_for_long_and_stays(
    network: FakeNetwork, port: StandbyPort, run: str
) -> None:
    network.foreign = {"eth1"}
    for _ in range(2):
        port.steer(here=True)
        assert noted(run) == ["eth0"]
        port.steer(here=False)
        assert network.entries == set()
    port.close()
    assert os.listdir(run) == []


def test_the_end_undoes_all_once_and_nothing_is_told_after(network: FakeNetwork, port: StandbyPort, run: str) -> None:
    port.steer(here=False)
    port.close()
    assert network.asked == [(False, False), (False, True)], "the bridge learns again"
    port.close()
    assert port.steer(here=True) == []
    assert len(network.asked) == 2
    assert os.listdir(run) == []


def test_one_that_was_never_told_anything_has_nothing_to_undo(network: FakeNetwork, port: StandbyPort) -> None:
    port.close()
    assert network.asked == []


def test_a_problem_is_returned_each_time_and_logged_once(
    network: FakeNetwork, port: StandbyPort, caplog: pytest.LogCaptureFixture
) -> None:
    network.problems = ["eth0: EOPNOTSUPP"]
    for here in (True, False, True):
        assert port.steer(here=here) == ["eth0: EOPNOTSUPP"]
    assert caplog.messages == ["eth0: EOPNOTSUPP"]


def test_a_helper_that_fails_leaves_what_may_be_there_in_the_journal(
    network: FakeNetwork, port: StandbyPort, run: str
) -> None:
    port.steer(here=True)
    network.fails = True
    assert port.steer(here=False) == ["the network helper, process 5, failed"]
    port.close()
    assert noted(run) == ["eth0", "eth1"]
    network.fails = False


def test_functions_and_entries_share_the_journal(network: FakeNetwork, port: StandbyPort, run: str) -> None:
    pci_journal.put(run, Record("0000:5e:00.2", rebound=True, driver="igbvf"))
    port.steer(here=True)
    pci_journal.drop(run, "0000:5e:00.2")
    assert noted(run) == ["eth0", "eth1"]
    port.close()
    assert os.listdir(run) == []


def test_the_next_start_removes_what_a_crash_left(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Helper(FakeNetwork):
        def __init__(self, machine: str) -> None:
            super().__init__(run)
            assert machine == "web1"

        def steer(self, *arguments: Any, **more: Any) -> Steered:
            asked.append((*arguments, *more.items()))
            return Steered([], [])

    monkeypatch.setattr(pci, "Network", Helper)
    pci_journal.put_entry(run, EntryRecord(TAP, None, MAC, ["eth0"]))
    pci.recover(run)
    assert asked == [], "its process runs"
    monkeypatch.setattr(pci_journal.Journal, "alive", lambda journal: False)
    pci.recover(run)
    assert asked == [(TAP, MAC, ["eth0"], ("here", False), ("learn", True), ("netns", None))]
    assert os.listdir(run) == []
