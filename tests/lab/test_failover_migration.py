"""A guest with a failover pair is migrated on one host: there and back, and whatever may go wrong with that.

One guest goes through all of it: a test begins with the pair whole, wherever the guest is, and ends so. It is booted
anew only after a test that failed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import pairwise

import pytest

from scripts.lab.hardware import PRIMARY_MAC
from scripts.lab.images import Images
from tests.counts import count
from tests.lab.guest import Guest
from tests.lab.nics import NicHost
from tests.lab.test_failover import MAC, PRIMARY
from tests.lab.voyage import SLOW, Events, Journey, Voyage

STATE_FILE = "/scratch/voyage.state"

pytestmark = pytest.mark.timeout(1500)  # many migrations, on a busy machine


class Berth:
    """Keeps the guest from one test to the next."""

    def __init__(self, host: NicHost) -> None:
        self._host = host
        self.voyage: Voyage | None = None

    def board(self) -> Voyage:
        if self.voyage is None:
            self.voyage = Voyage(self._host)
            self.voyage.board()
        return self.voyage

    def leave(self) -> None:
        if self.voyage is not None:
            self.voyage.leave()
            self.voyage = None


@pytest.fixture(scope="module")
def berth(igb_host: NicHost, lab_images: Images) -> Iterator[Berth]:
    berth, drivers = Berth(igb_host), [igb_host.driver(function) for function in igb_host.functions]
    yield berth
    berth.leave()
    assert [igb_host.driver(function) for function in igb_host.functions] == drivers, "the host has them back"


@pytest.fixture
def voyage(berth: Berth, request: pytest.FixtureRequest) -> Iterator[Voyage]:
    """The guest, with its pair."""
    try:
        voyage = berth.board()
        voyage.picture(voyage.trio)
        failures = request.session.testsfailed
        yield voyage
    except BaseException:
        berth.leave()
        raise
    if request.session.testsfailed != failures:
        berth.leave()


def assert_in_order(names: list[str], *wanted: str) -> None:
    """Each is there, after the one before it."""
    places = [names.index(name) for name in wanted]
    assert all(a < b for a, b in pairwise(places)), names


def assert_gone_well(journey: Journey) -> None:
    """R28, R30: what happened in which order; R45: and no ping was lost without a reason."""
    assert_in_order(
        journey.source.names(),
        *("MIGRATION setup", "UNPLUG_PRIMARY", "MIGRATION wait-unplug", "FAILOVER_PRIMARY_RELEASED"),
        *("MIGRATION active", "STOP", "MIGRATION completed"),
    )
    assert journey.destination
    assert_in_order(journey.destination.names(), "FAILOVER_NEGOTIATED", "RESUME", "FAILOVER_PRIMARY_PLUGGED")
    for _, name, data in journey.source.all():
        if name == "UNPLUG_PRIMARY":
            assert data["device-id"] == PRIMARY
    assert journey.unexcused == [], (journey.excused, journey.source.names(), journey.destination.names())


def assert_stayed(journey: Journey) -> None:
    """The guest had its primary all the time: it was asked, and then asked no more."""
    names = journey.source.names()
    assert "FAILOVER_PRIMARY_RELEASED" not in names
    assert "FAILOVER_PATH_CHANGED" not in names
    assert journey.pings.lost == []


def assert_came_back(journey: Journey) -> None:
    """The guest had let its primary go, and has it again."""
    names = journey.source.names()
    assert_in_order(names, "UNPLUG_PRIMARY", "FAILOVER_PRIMARY_RELEASED", "FAILOVER_PRIMARY_PLUGGED")
    assert "DEVICE_DELETED" not in names
    assert journey.unexcused == [], (journey.excused, names)


def test_r28_r45_r47_there_and_back_with_nothing_lost_but_in_the_blackout(voyage: Voyage) -> None:
    for _ in range(2 * count(1, 5)):
        journey = voyage.go()
        told = {name: journey.figures[name] for name in ("total-ms", "blackout-ms")}
        print(told, "lost", len(journey.pings.lost), "gap", journey.pings.gap)
        assert_gone_well(journey)
        found = voyage.pair()
        assert (found["state"], found["path"], found["primary-mac"]) == ("plugged", "primary", MAC)
    voyage.guest.type("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")  # which speaks of its own accord, on each
    before = voyage.guest.type("cat /sys/class/net/eth1/statistics/tx_packets")
    voyage.assert_all_heard()
    assert voyage.guest.type("cat /sys/class/net/eth1/statistics/tx_packets") == before, "R44"


def test_r38_cancelled_at_once_the_guest_never_loses_its_primary(voyage: Voyage) -> None:
    with voyage.going_nowhere() as (command, events, ended):
        events.wait("MIGRATION", "wait-unplug")
        command.signal(signal.SIGINT)
    (journey,) = ended
    assert journey.code == 5, journey.said
    assert_stayed(journey)
    assert_in_order(events.names(), "MIGRATION wait-unplug", "MIGRATION cancelling", "MIGRATION cancelled")


def test_r37_cancelled_while_the_primary_leaves_it_comes_back(voyage: Voyage) -> None:
    with voyage.going_nowhere() as (command, events, ended):
        events.wait("FAILOVER_PATH_CHANGED", "standby")  # the guest's driver has let go; its slot is on
        command.signal(signal.SIGINT)
    (journey,) = ended
    assert journey.code == 5, journey.said
    assert_came_back(journey)
    assert_in_order(events.names(), "MIGRATION wait-unplug", "MIGRATION cancelling", "MIGRATION cancelled")


def test_r40_a_destination_that_dies_while_pages_are_sent_gives_the_guest_its_primary_back(voyage: Voyage) -> None:
    with voyage.going_nowhere("--max-bandwidth", "1MiB") as (_, events, ended):
        events.wait("MIGRATION", "active")
        voyage.kill(voyage.other)
    voyage.sweep(voyage.other)
    (journey,) = ended
    assert journey.code == 1, journey.said
    assert "the guest is here, and running" in journey.said
    assert_came_back(journey)
    voyage.parameters(max_bandwidth=0)


def test_r39_a_guest_that_does_not_answer_keeps_its_primary_and_migrates_later(voyage: Voyage) -> None:
    voyage.parameters(x_unplug_timeout=4000)
    with voyage.waiting() as there:
        command = voyage.migrate()
        with voyage.frozen():
            command.expect("wait-unplug", SLOW)
            command.signal(signal.SIGINT)
            assert command.wait(SLOW) == 5, command.output
        there.process.wait(SLOW)
    voyage.await_state("plugged")
    voyage.picture(voyage.trio)
    voyage.wait_heard()
    voyage.parameters(x_unplug_timeout=30000)
    assert_gone_well(voyage.go())


def test_r33_a_slot_that_blinks_is_asked_again_and_nothing_is_sent_before(voyage: Voyage) -> None:
    with voyage.waiting() as there:
        slot = Slot(voyage.guest)
        slot.blink()
        events = Events(voyage.host, voyage.name)
        command = voyage.migrate()
        events.wait("MIGRATION", "wait-unplug")
        assert voyage.pair()["state"] != "released"
        slot.stay_on()
        assert command.wait(SLOW) == 0, command.output
        assert_in_order(events.names(), "MIGRATION wait-unplug", "FAILOVER_PRIMARY_RELEASED", "MIGRATION active")
        voyage.moved(there)
    voyage.picture(voyage.trio)
    voyage.wait_heard()


class Slot:
    """The primary's slot as the guest can write it: the power indicator, with which a guest says that it is at work."""

    CAPABILITIES, EXPRESS, CONTROL = 0x34, 0x10, 0x18

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._config = f"{guest.type('readlink -f /sys/class/net/eth2/device/..')}/config"
        space = bytes.fromhex("".join(guest.type(f"head -c 256 {self._config} | od -An -v -tx1").split()))
        at = space[self.CAPABILITIES]
        while space[at] != self.EXPRESS:
            at = space[at + 1]
        self._at = at + self.CONTROL + 1  # the byte that has the indicator in its two lowest bits
        self._others = space[self._at] & ~3

    def blink(self) -> None:
        self._write(2)

    def stay_on(self) -> None:
        self._write(1)

    def _write(self, indicator: int) -> None:
        value = f"printf '\\x{self._others | indicator:02x}'"
        self._guest.type(f"{value} | dd of={self._config} bs=1 seek={self._at} conv=notrunc 2>&-")


def test_r34_without_its_driver_the_primary_leaves_and_comes_back_and_a_reset_makes_the_pair_whole(
    voyage: Voyage,
) -> None:
    voyage.guest.type("rmmod virtio_net", SLOW)
    with voyage.waiting() as there:
        source, destination = Events(voyage.host, voyage.name), Events(voyage.host, voyage.other)
        command = voyage.migrate()
        assert command.wait(SLOW) == 0, command.output
        assert_in_order(
            source.names(), "MIGRATION wait-unplug", "FAILOVER_PRIMARY_RELEASED", "MIGRATION active", "STOP"
        )
        destination.wait("FAILOVER_PRIMARY_PLUGGED", PRIMARY)
        voyage.moved(there)
    voyage.guest.type("until [ -e /sys/class/net/eth* ]; do sleep 0.1; done", SLOW)  # all names are free again
    assert voyage.guest.type("cat /sys/class/net/*/address").split() == [MAC, "00:00:00:00:00:00"]
    voyage.guest.kvmpy("reset", voyage.name)
    voyage.guest.wait_shell()
    voyage.picture(voyage.trio)
    voyage.wait_heard()
    assert_gone_well(voyage.go())


def test_r41_resumed_by_force_where_it_was_it_has_its_primary_again(voyage: Voyage) -> None:
    left, seat = voyage.guest, voyage.here
    voyage.go(keep=True)
    voyage.host.run(["kvmpy", "stop", voyage.name], check=True)
    voyage.guest.process.wait(SLOW)
    voyage.guest, voyage.here = left, seat
    voyage.host.run(["kvmpy", "resume", "--force", voyage.name], timeout=SLOW, check=True)
    voyage.await_state("plugged")
    voyage.picture(voyage.trio)
    voyage.wait_heard()
    assert voyage.pair()["path"] == "primary"  # the tests below have it migrate once more


def test_r43_a_destination_without_a_primary_is_refused_before_the_guest_is_asked(voyage: Voyage) -> None:
    with voyage.waiting(primary=False) as there:
        events = Events(voyage.host, voyage.name)
        command = voyage.migrate()
        assert command.wait(SLOW) == 1, command.output
        assert f"device {PRIMARY}: is a failover primary, and the destination has none" in command.output
        assert "UNPLUG_PRIMARY" not in events.names()
        assert "MIGRATION wait-unplug" not in events.names()
        there.process.wait(SLOW)
    voyage.picture(voyage.trio)
    assert voyage.pair()["state"] == "plugged"


def test_a_primary_that_the_host_takes_back_meanwhile_leaves_the_guest_its_standby(voyage: Voyage) -> None:
    function = voyage.host.functions[1 - voyage.here]
    with voyage.waiting() as there:
        command = voyage.migrate()
        voyage.await_prepared()  # before that the guest would keep its own
        unbind = voyage.host.spawn(["sh", "-c", f"echo {function} >/sys/bus/pci/drivers/vfio-pci/unbind"])
        unbind.wait(SLOW)
        assert command.wait(SLOW) == 0, command.output
        voyage.moved(there)
    voyage.picture(voyage.alone)
    voyage.wait_heard()
    assert voyage.pair()["path"] == "standby"
    voyage.host.bind(function, "igbvf")  # what the host wanted it for
    voyage.give(function)
    voyage.picture(voyage.trio)
    voyage.wait_heard()


def test_r43_r50_arrived_without_a_primary_it_is_given_the_one_that_the_source_has_freed(voyage: Voyage) -> None:
    left, freed = voyage.guest, voyage.host.functions[voyage.here]
    events = Events(voyage.host, voyage.name)
    with voyage.waiting(primary=False) as there:
        arrival = Events(voyage.host, voyage.other)
        command = voyage.migrate("--primaries", "best-effort", "--release-primaries", "--keep")
        assert command.wait(SLOW) == 0, command.output
        events.wait("DEVICE_DELETED", PRIMARY)
        assert voyage.host.driver(freed) == "igbvf", "R50: the host has it, while the source is still there"
        assert_in_order(arrival.names(), "FAILOVER_NEGOTIATED", "RESUME", "MIGRATION completed")
        voyage.guest, voyage.here = there, 1 - voyage.here
    voyage.picture(voyage.alone)
    voyage.wait_heard()
    assert (voyage.pair()["state"], voyage.pair()["path"]) == ("no-primary", "standby")
    voyage.give(freed)
    arrival.wait("FAILOVER_PATH_CHANGED", "primary")
    voyage.picture(voyage.trio)
    voyage.wait_heard()
    assert (voyage.pair()["path"], voyage.pair()["primary-mac"]) == ("primary", MAC)
    voyage.host.run(["kvmpy", "stop", voyage.other], check=True)
    left.process.wait(SLOW)
    voyage.qmp("device_del", f"id={PRIMARY}")  # the tests below have each seat use its own
    arrival.wait("DEVICE_DELETED", PRIMARY)
    voyage.give(voyage.host.functions[voyage.here])
    voyage.picture(voyage.trio)
    voyage.wait_heard()


def test_r25_a_card_that_the_guest_cannot_power_on_is_reported_and_comes_when_it_can(voyage: Voyage) -> None:
    port = Port(voyage.guest)
    with voyage.waiting() as there:
        source, destination = Events(voyage.host, voyage.name), Events(voyage.host, voyage.other)
        port.misdirect_when_empty()
        command = voyage.migrate()
        assert command.wait(SLOW) == 0, command.output
        assert_in_order(source.names(), "FAILOVER_PRIMARY_RELEASED", "MIGRATION active", "MIGRATION completed")
        destination.wait("DEVICE_PLUG_GUEST_ERROR", PRIMARY)
        destination.wait("FAILOVER_PRIMARY_FAILED", PRIMARY)
        voyage.moved(there)
    found = voyage.pair()
    assert (found["state"], found["path"]) == ("failed", "standby")
    assert found["error"]
    voyage.picture(voyage.alone)
    voyage.wait_heard()
    port.mend(voyage.guest)
    destination.wait("FAILOVER_PRIMARY_PLUGGED", PRIMARY)
    voyage.picture(voyage.trio)
    voyage.wait_heard()
    assert_gone_well(voyage.go())


class Port:
    """The primary's root port as the guest can break it: nothing behind it answers at the number that it expects."""

    SECONDARY_BUS = 0x19

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._function, port = guest.type(
            "d=$(readlink -f /sys/class/net/eth2/device); echo $d; echo ${d%/*}"
        ).splitlines()
        self._config = f"{port}/config"
        self._number = int(
            guest.type(f"dd if={self._config} bs=1 skip={self.SECONDARY_BUS} count=1 2>&- | od -An -tu1")
        )

    def misdirect_when_empty(self) -> None:
        """Once the guest has let the card go, and so before it is shown another."""
        self._guest.type(f"((while [ -e {self._function} ]; do sleep 0.1; done; {self._write(0x7F)}) &)")

    def mend(self, guest: Guest) -> None:
        """Have the slot turned on again, and find its card."""
        guest.type(f"{self._write(self._number)}; echo 1 >/sys/bus/pci/slots/1/power", SLOW)

    def _write(self, number: int) -> str:
        return f"printf '\\x{number:02x}' | dd of={self._config} bs=1 seek={self.SECONDARY_BUS} conv=notrunc 2>&-"


def test_a_primary_without_its_driver_waits_for_one_and_the_guest_works_over_its_standby(voyage: Voyage) -> None:
    voyage.guest.type("rmmod igbvf", SLOW)
    with voyage.waiting() as there:
        source, destination = Events(voyage.host, voyage.name), Events(voyage.host, voyage.other)
        command = voyage.migrate()
        assert command.wait(SLOW) == 0, command.output
        assert_in_order(source.names(), "UNPLUG_PRIMARY", "FAILOVER_PRIMARY_RELEASED", "MIGRATION active", "STOP")
        destination.wait("FAILOVER_PRIMARY_PLUGGED", PRIMARY)
        voyage.moved(there)
    voyage.picture(voyage.alone)
    voyage.wait_heard()
    assert (voyage.pair()["state"], voyage.pair()["path"]) == ("plugged", "standby")
    voyage.guest.type("insmod /lib/modules/igbvf.ko", SLOW)
    destination.wait("FAILOVER_PATH_CHANGED", "primary")
    voyage.picture(voyage.trio)
    voyage.wait_heard()


def test_r48_saved_into_a_file_it_goes_on_from_there_with_its_pair(voyage: Voyage) -> None:
    events = Events(voyage.host, voyage.name)
    voyage.guest.type("echo remember >/note")
    voyage.host.run(["kvmpy", "save", voyage.name, STATE_FILE], timeout=SLOW, check=True)
    assert_in_order(events.names(), "UNPLUG_PRIMARY", "MIGRATION wait-unplug", "FAILOVER_PRIMARY_RELEASED", "STOP")
    with voyage.restored(STATE_FILE) as there:
        voyage.moved(there)
    voyage.await_state("plugged")
    voyage.picture(voyage.trio)
    voyage.wait_heard()
    assert voyage.guest.type("cat /note") == "remember"
    voyage.host.run(["rm", STATE_FILE], check=True)


def test_r47_with_whole_nics_there_and_back(e1000e_host: NicHost, lab_images: Images) -> None:
    voyage = Voyage(e1000e_host, mac=PRIMARY_MAC, driver="e1000e")
    try:
        voyage.board()
        for _ in range(2 * count(1, 5)):
            assert_gone_well(voyage.go())
            assert voyage.pair()["path"] == "primary"
    finally:
        voyage.leave()
