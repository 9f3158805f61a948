"""A Debian guest under load goes from one process to another on one host, and back; and what may go wrong with that."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
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
    def waiting(self, name: str, uri: str = f"unix:{STREAM}") -> Iterator[Guest]:
        """One that waits for its guest."""
        with self.machine(name, f"--incoming {uri}") as guest:
            self.await_status(name, "inmigrate")
            yield guest

    def await_status(self, name: str, status: str) -> None:
        script = f'until kvmpy ps | grep -q "^{name} .* {status} "; do sleep 0.2; done'
        self.host.run(["sh", "-c", script], timeout=SLOW, check=True)

    def status(self, name: str) -> str:
        found: str = json.loads(self.host.run(["kvmpy", "status", "--json", name], check=True).stdout)["status"]
        return found

    def migrate(self, name: str, *options: str, uri: str = f"unix:{STREAM}") -> tuple[int, str]:
        """The exit code of `kvmpy migrate`, and what it said."""
        done = self.host.run(["kvmpy", "migrate", name, uri, *options], timeout=SLOW)
        print(done.stderr)
        return done.returncode, done.stderr + done.stdout


@pytest.fixture
def yard(host: EmulatedHost, lab_images: Images) -> Iterator[Yard]:
    # Of an address of its own: else it would have a port's, and another's when that goes.
    link = f"ip link add {BRIDGE} address 02:00:00:00:09:01 type bridge"
    script = f"{link} && ip address add {HOST}/24 dev {BRIDGE} && ip link set {BRIDGE} up"
    host.run(["sh", "-c", script], check=True)
    with root_disk(host, lab_images, "migration") as root:
        yield Yard(host, root)
    host.run(["ip", "link", "delete", BRIDGE], check=True)
    assert host.run(["ls", "-A", "/run/kvmpy"]).stdout == ""


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
    assert abs(figures["blackout-there-ms"] - figures["blackout-ms"]) < SLACK_MS, "the two sides do not agree"
    assert seen[0].longest_loss == len(seen[0].lost), "pings were lost in more than one place"
    assert figures["gap-ms"] <= figures["blackout-ms"] + SLACK_MS
    return figures


def test_a_cancelled_migration_leaves_the_guest_where_it_was_and_a_later_one_succeeds(yard: Yard) -> None:
    with yard.machine("one") as first:
        first.wait_shell()
        with yard.waiting("two") as second:
            slow = yard.host.spawn(["kvmpy", "migrate", "one", f"unix:{STREAM}", "--max-bandwidth", "2MiB"])
            slow.expect("active", SLOW)
            slow.signal(signal.SIGINT)
            assert slow.wait(SLOW) == 5, slow.output
            assert "cancelled; the guest is here, and running" in slow.output
            assert first.type("echo here") == "here"
            assert second.wait_end() == 1
        with yard.waiting("two") as second:
            assert yard.migrate("one", "--max-bandwidth", "1GiB")[0] == 0
            assert second.type("echo there", SLOW) == "there"


def test_a_destination_that_dies_leaves_the_guest_where_it_was(yard: Yard) -> None:
    with yard.machine("one") as first:
        first.wait_shell()
        with yard.waiting("two") as second:
            slow = yard.host.spawn(["kvmpy", "migrate", "one", f"unix:{STREAM}", "--max-bandwidth", "2MiB"])
            slow.expect("active", SLOW)
            yard.host.run(["sh", "-c", "kill -9 $(cat /run/kvmpy/two/pid)"], check=True)
            assert slow.wait(SLOW) == 1, slow.output
            assert "the guest is here, and running" in slow.output
            assert first.type("echo here") == "here"
            second.process.wait(SLOW)
        yard.host.run(["sh", "-c", "rm -rf /run/kvmpy/two; ip link delete tap-two"])


def test_a_dry_run_says_all_that_is_in_the_way_of_both_sides_and_the_destination_goes_on_waiting(yard: Yard) -> None:
    with yard.machine("one", "--set machine.cpus=2 --set device.root.serial=S1") as first, yard.waiting("two"):
        first.wait_shell()
        code, said = yard.migrate("one", "--dry-run")
        assert code == 4, said
        assert "machine.cpus: the source has 2, the destination 1" in said
        assert yard.status("two") == "inmigrate"
        assert yard.status("one") == "running"


def test_a_machine_that_is_saved_goes_on_from_the_file(yard: Yard) -> None:
    with yard.machine("one") as first:
        first.wait_shell()
        assert first.type("echo remember >/tmp/note; sync; echo done") == "done"
        yard.host.run(["kvmpy", "save", "one", SAVED], timeout=SLOW, check=True)
        assert first.wait_end() == 0
    with yard.machine("one", f"--incoming file:{SAVED}") as again:
        yard.await_status("one", "running")
        assert again.type("cat /tmp/note", SLOW) == "remember"
        assert clock_error(again, yard.host) <= 1
    yard.host.run(["rm", SAVED], check=True)
