"""A Debian guest under load goes from one process to another on one host, and back; and what may go wrong with that."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from tests.lab import tables
from tests.lab.guest import FROM_DISK, Guest, root_disk
from tests.lab.journey import MAC, SLACK_MS, SLOW, Load, Pings, blackout_there, clock_error, pinged, report

BRIDGE, HOST, GUEST = "kvbr9", "10.77.9.1", "10.77.9.2"
WORDS: Final = f"{FROM_DISK} address={GUEST}/24"
STREAM: Final = "/run/stream.sock"
SAVED: Final = "/scratch/saved.state"

pytestmark = pytest.mark.timeout(1500)  # many guests' boots, on a busy machine


class Yard:
    """A bridge of the host's, a disk, and machines that a guest can be in: all have the same, but for name and tap."""

    def __init__(self, host: EmulatedHost, root: str) -> None:
        self.host, self._root = host, root

    @contextmanager
    def machine(self, name: str, options: str = "") -> Iterator[Guest]:
        config = (
            tables.root_ports("rp1", "rp2")
            + tables.disk("root", self._root)
            + tables.nic("net0", f"tap-{name}", BRIDGE, bus="rp1", mac=MAC)
            + tables.rng("rng0", bus="rp2")
        )
        with Guest(self.host, name, tables=config, words=WORDS, options=options) as guest:
            yield guest

    @contextmanager
    def waiting(self, name: str, options: str = "") -> Iterator[Guest]:
        """One that waits for its guest."""
        with self.machine(name, f"--incoming unix:{STREAM} {options}") as guest:
            guest.await_listening()
            yield guest

    def migrate(self, name: str, *options: str) -> tuple[int, str]:
        """The exit code of `kvmpy migrate`, and what it said."""
        done = self.host.run(["kvmpy", "migrate", name, f"unix:{STREAM}", *options], timeout=SLOW)
        print(done.stderr)
        return done.returncode, done.stderr + done.stdout


class Resident:
    """A guest for several tests: it is in one of the yard's machines, "one" or "two"."""

    def __init__(self, yard: Yard) -> None:
        self.yard, self.name, self.other = yard, "one", "two"
        self._stack = ExitStack()
        self.guest = self._stack.enter_context(yard.machine(self.name))
        self.guest.wait_shell()

    @contextmanager
    def going(self, options: str = "") -> Iterator[Guest]:
        """The other machine waits for it; it ends unless the guest has come."""
        with ExitStack() as stack:
            there = stack.enter_context(self.yard.waiting(self.other, options))
            yield there
            if self.guest is there:
                self._stack.push(stack.pop_all())

    def moved(self, there: Guest) -> None:
        assert self.guest.wait_end() == 0
        self.guest, self.name, self.other = there, self.other, self.name

    def leave(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def yard(host: EmulatedHost, lab_images: Images) -> Iterator[Yard]:
    # Of an address of its own: else it would have a port's, and another's when that goes.
    link = f"ip link add {BRIDGE} address 02:00:00:00:09:01 type bridge"
    script = f"{link} && ip address add {HOST}/24 dev {BRIDGE} && ip link set {BRIDGE} up"
    host.run(["sh", "-c", script], check=True)
    with root_disk(host, lab_images, "migration") as root:
        yield Yard(host, root)
    host.run(["ip", "link", "delete", BRIDGE], check=True)
    assert host.run(["ls", "-A", "/run/kvmpy"]).stdout == ""


@pytest.fixture(scope="module")
def berth(yard: Yard) -> Iterator[list[Resident]]:
    """Has the resident from one test to the next."""
    berth: list[Resident] = []
    yield berth
    for resident in berth:
        resident.leave()


@pytest.fixture
def resident(yard: Yard, berth: list[Resident], request: pytest.FixtureRequest) -> Iterator[Resident]:
    """Booted anew only after a test that failed."""
    if not berth:
        berth.append(Resident(yard))
    failures = request.session.testsfailed
    yield berth[0]
    if berth and request.session.testsfailed != failures:
        berth.pop().leave()


def test_a_guest_under_load_goes_to_another_process_and_back(yard: Yard) -> None:
    with yard.machine("one") as first:
        first.wait_shell()
        load = Load(first, yard.host, HOST)
        load.start(3600)
        with yard.waiting("two") as second:
            there = go(yard, "one", second)
            assert first.wait_end() == 0
            load.assert_whole(second)
            assert clock_error(second, yard.host) <= 1
            with yard.waiting("one") as third:
                back = go(yard, "two", third)
                assert second.wait_end() == 0
                load.assert_whole(third)
                assert clock_error(third, yard.host) <= 1
                load.stop(third)
    print("there", there, "back", back)


def go(yard: Yard, name: str, to: Guest) -> dict[str, float]:
    """Migrate, with all that is known of how it went; nothing but the blackout is lost to a peer."""
    seen: list[Pings] = []
    path = f"/run/{name}.json"
    with pinged(yard.host, GUEST, seen):
        code, said = yard.migrate(name, "--report", path, "--downtime-limit", "1500")
        assert code == 0, said
        assert to.type("echo here", SLOW) == "here"
    figures = report(yard.host, path) | {"gap-ms": seen[0].gap * 1000, "lost": len(seen[0].lost)}
    figures["blackout-there-ms"] = blackout_there(yard.host, to.name)
    print(figures)
    assert abs(figures["blackout-there-ms"] - figures["blackout-ms"]) < 1000, "the two sides do not agree"
    assert seen[0].longest_loss == len(seen[0].lost), "pings were lost in more than one place"
    assert figures["gap-ms"] <= figures["blackout-ms"] + SLACK_MS
    return figures


def test_a_dry_run_says_all_that_is_in_the_way_of_both_sides_and_the_destination_goes_on_waiting(
    resident: Resident,
) -> None:
    with resident.going("--set machine.cpus=2 --set device.root.serial=S1") as there:
        code, said = resident.yard.migrate(resident.name, "--dry-run")
        assert code == 4, said
        assert "machine.cpus: the source has 1, the destination 2" in said
        assert there.status()["status"] == "inmigrate"
        assert resident.guest.status()["status"] == "running"


def test_a_destination_that_dies_leaves_the_guest_where_it_was(resident: Resident) -> None:
    yard, other = resident.yard, resident.other
    with resident.going() as there:
        slow = yard.host.spawn(["kvmpy", "migrate", resident.name, f"unix:{STREAM}", "--max-bandwidth", "2MiB"])
        slow.expect("active", SLOW)
        yard.host.run(["sh", "-c", f"kill -9 $(cat /run/kvmpy/{other}/pid)"], check=True)
        assert slow.wait(SLOW) == 1, slow.output
        assert "the guest is here, and running" in slow.output
        assert resident.guest.type("echo here") == "here"
        there.process.wait(SLOW)
    yard.host.run(["sh", "-c", f"rm -rf /run/kvmpy/{other}; ip link delete tap-{other}"])


def test_a_cancelled_migration_leaves_the_guest_where_it_was_and_a_later_one_succeeds(resident: Resident) -> None:
    yard = resident.yard
    with resident.going() as there:
        slow = yard.host.spawn(["kvmpy", "migrate", resident.name, f"unix:{STREAM}", "--max-bandwidth", "2MiB"])
        slow.expect("active", SLOW)
        slow.signal(signal.SIGINT)
        assert slow.wait(SLOW) == 5, slow.output
        assert "cancelled; the guest is here, and running" in slow.output
        assert resident.guest.type("echo here") == "here"
        assert there.wait_end() == 1
    with resident.going() as there:
        assert yard.migrate(resident.name, "--max-bandwidth", "1GiB")[0] == 0
        assert there.type("echo there", SLOW) == "there"
        resident.moved(there)


def test_a_machine_that_is_saved_goes_on_from_the_file(resident: Resident, berth: list[Resident]) -> None:
    yard, guest = resident.yard, resident.guest
    assert guest.type("echo remember >/tmp/note; sync; echo done") == "done"
    yard.host.run(["kvmpy", "save", resident.name, SAVED], timeout=SLOW, check=True)
    assert guest.wait_end() == 0
    with yard.machine(resident.name, f"--incoming file:{SAVED}") as again:
        again.await_status("running")
        assert again.type("cat /tmp/note", SLOW) == "remember"
        assert clock_error(again, yard.host) <= 1
    yard.host.run(["rm", SAVED], check=True)
    berth.pop().leave()  # it has ended
