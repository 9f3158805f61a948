"""A Debian guest under load goes from one host to another and back: by TLS, and by ssh; a third station looks on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from scripts.lab.hardware import BRIDGE, STATION, STATION_ADDRESS
from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from scripts.lab.kernels import CHECKOUT
from scripts.lab.pair import NAMES, SHARED_DISK, HostPair
from tests.lab import tables
from tests.lab.guest import FROM_DISK, Attached, Guest
from tests.lab.journey import MAC, SLACK_MS, SLOW, Load, Pings, blackout_there, clock_error, pinged, report

NAME, GUEST, PORT = "mover", "10.77.0.50", 4444
CREDENTIALS, STRANGERS = "/run/credentials", "/run/strangers"
WORDS: Final = f"{FROM_DISK} address={GUEST}/24"
CONFIG: Final = (
    tables.root_ports("rp1", "rp2")
    + tables.disk("root", SHARED_DISK)
    + tables.nic("net0", "tap-mover", BRIDGE, bus="rp1", mac=MAC)
    + tables.rng("rng0", bus="rp2")
)
LEFT: Final = (
    "ls -A /run/kvmpy 2>&-; ls -d /tmp/kvmpy-* 2>&-; ip -brief link | grep tap; busybox pgrep -fl 'kvmpy (run|receive)'"
)

pytestmark = pytest.mark.timeout(1500)  # many guests' boots, on a busy machine


def machine(host: EmulatedHost, options: str = "") -> Guest:
    return Guest(host, NAME, tables=CONFIG, words=WORDS, options=options)


def waiting(host: EmulatedHost, uri: str, options: str = "") -> Guest:
    """One that waits for its guest."""
    guest = machine(host, f"--incoming {uri} {options}")
    guest.await_listening()
    return guest


def migrate(host: EmulatedHost, *words: str, code: int = 0) -> str:
    """What `kvmpy migrate` says, on ``host``."""
    done = host.run(["kvmpy", "migrate", NAME, *words], timeout=SLOW)
    print(f"{done.stdout}{done.stderr}")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def pair(two_hosts: HostPair, lab_images: Images) -> Iterator[HostPair]:
    """With a root disk that both have; nothing is left on either."""
    fill = f"dd if={lab_images.guest_root} of={SHARED_DISK} bs=1M oflag=direct status=none"
    two_hosts.first.run(["sh", "-c", fill], check=True)
    before = [host.run(["sh", "-c", LEFT]).stdout for host in two_hosts.hosts]
    yield two_hosts
    for host in two_hosts.hosts:
        host.run(["sh", "-c", f"kvmpy stop {NAME} 2>/dev/null; rm -rf /var/log/kvmpy"])
    assert [host.run(["sh", "-c", LEFT]).stdout for host in two_hosts.hosts] == before


def journey(pair: HostPair, here: int, uri: str, *options: str) -> dict[str, float]:
    """Go from host number ``here`` to ``uri``; what both sides, and a pinger outside of both, saw must agree."""
    source, destination, watcher = pair.hosts[here], pair.hosts[1 - here], pair.first
    seen: list[Pings] = []
    with pinged(watcher, GUEST, seen, netns=STATION):
        # Longer than the default: a busy machine converges without slowing the guest down for long.
        reports = "--report", "/run/journey.json", "--report", "/run/journey.svg"
        migrate(source, uri, *reports, "--downtime-limit", "1500", *options)
        # Frames to it go where it is now.
        watcher.run([*station("busybox", "ping", "-q", "-c", "5", "-W", "20"), GUEST], timeout=SLOW, check=True)
    figures = report(source, "/run/journey.json") | {"gap-ms": seen[0].gap * 1000, "lost": float(len(seen[0].lost))}
    figures["blackout-there-ms"] = blackout_there(destination, NAME)
    print(figures)
    assert abs(figures["blackout-there-ms"] - figures["blackout-ms"]) < 1000, "the two sides do not agree"
    assert seen[0].longest_loss == len(seen[0].lost), "pings were lost in more than one place"
    seen_ms = figures["gap-ms"] + 1000 * seen[0].pause + 500
    assert seen_ms > figures["blackout-ms"], "the guest answered while it is said to have stood still"
    assert figures["gap-ms"] < figures["blackout-ms"] + SLACK_MS, "it was deaf for much longer than it stood still"
    return figures


def station(*command: str) -> list[str]:
    return ["ip", "netns", "exec", STATION, *command]


@contextmanager
def certificates(pair: HostPair, directory: str) -> Iterator[None]:
    """A CA of its own, and on each host its directory, at ``directory``."""
    names = [f"{name},{address}" for name, address in zip(NAMES, pair.addresses, strict=True)]
    script = [str(CHECKOUT / "scripts/migration-certificates"), f"{directory}.ca", *names]
    pair.first.run(script, check=True)
    pair.first.run(["cp", "-r", f"{directory}.ca/{NAMES[0]}", directory], check=True)
    pair.first.run(["scp", "-qr", f"{directory}.ca/{NAMES[1]}", f"{NAMES[1]}:{directory}"], timeout=SLOW, check=True)
    try:
        yield
    finally:
        for host in pair.hosts:
            host.run(["rm", "-rf", directory, f"{directory}.ca"], check=True)


def test_a_guest_under_load_goes_there_by_tls_and_back_by_ssh(pair: HostPair) -> None:
    uri = f"tcp:{pair.addresses[1]}:{PORT}"
    tls = f"--set migration.tls-creds={CREDENTIALS}"
    with certificates(pair, CREDENTIALS), machine(pair.first) as first:
        first.wait_shell()
        load = Load(first, pair.first, STATION_ADDRESS, netns=STATION)
        load.start(3600)
        with waiting(pair.second, uri, tls) as second:
            there = journey(pair, 0, uri, "--tls-creds", CREDENTIALS)
            assert first.wait_end() == 0
            load.assert_whole(second)
            assert clock_error(second, pair.second) <= 1
            back = journey(pair, 1, f"ssh://{NAMES[0]}")
            assert second.wait_end() == 0
        with Attached(pair.first, NAME) as third:
            load.assert_whole(third)
            assert clock_error(third, pair.first) <= 1
            load.stop(third)
    print("there", there, "back", back)


def test_a_certificate_of_another_ca_is_refused_with_the_reason_on_both_sides_and_the_guest_stays(
    pair: HostPair,
) -> None:
    uri = f"tcp:{pair.addresses[1]}:{PORT}"
    with certificates(pair, CREDENTIALS), certificates(pair, STRANGERS), machine(pair.first) as first:
        first.wait_shell()
        with waiting(pair.second, uri, f"--set migration.tls-creds={STRANGERS}") as second:
            said = migrate(pair.first, uri, "--tls-creds", CREDENTIALS, code=1)
            assert "certificate" in said
            assert "the guest is here, and running" in said
            second.process.expect("certificate", SLOW)
            assert first.type("echo here") == "here"
            # The destination goes on waiting for a source with the right one.
            migrate(pair.first, uri, "--tls-creds", STRANGERS)
            assert second.type("echo there", SLOW) == "there"


def test_ssh_cleans_up_on_both_hosts_where_nothing_comes_of_it(pair: HostPair) -> None:
    here, there = pair.hosts
    before = there.run(["sh", "-c", LEFT]).stdout
    with machine(here) as first:
        first.wait_shell()
        target = f"ssh://{NAMES[1]}"
        assert "can migrate to" in migrate(here, target, "--dry-run")
        assert there.run(["sh", "-c", LEFT]).stdout == before
        said = migrate(here, target, "--set", "machine.cpus=2", "--dry-run", code=4)
        assert "machine.cpus: the source has 1, the destination 2" in said
        said = migrate(here, target, "--set", "machine.cpus=2", code=1)
        assert "machine.cpus: the source has 1, the destination 2" in said
        assert there.run(["sh", "-c", LEFT]).stdout == before
        said = migrate(here, target, "--set", "boot.kernel=/nowhere", code=1)
        assert f"{target}: kvmpy: " in said
        assert "/nowhere" in said
        lacking = (
            "--set",
            "boot.kernel=/nowhere",
            "--set",
            "drive.root.path=/no/disk",
            "--set",
            "netdev.tap-net0.ifname=br0",
        )
        said = migrate(here, target, *lacking, "--dry-run", code=4)
        assert all(f"{target}: kvmpy: " in line for line in said.splitlines()[:3])
        assert all(word in said for word in ("/nowhere: ", "/no/disk: ENOENT", "br0: ", "mover cannot migrate to"))
        said = migrate(here, target, "--remote-kvmpy", "/nowhere/kvmpy", code=1)
        assert "ssh with 127; give the path of kvmpy there with --remote-kvmpy" in said
        assert there.run(["sh", "-c", LEFT]).stdout == before
        assert here.run(["sh", "-c", "ls -d /tmp/kvmpy-*"]).stdout == ""
        assert first.type("echo here") == "here"
        assert first.status()["status"] == "running"
