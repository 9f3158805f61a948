"""What a guest of the lab goes through while it is migrated, and how one sees that it has lost nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from scripts.lab.host import EmulatedHost
from scripts.lab.images import SOURCES
from scripts.lab.process import Process
from tests.lab.guest import Guest

PINGER: Final = SOURCES / "pinger.py"
SLOW: Final = 300.0
SLACK_MS: Final = 5_000
"""What a busy machine may take from a guest's going on to its being told, or to a peer's hearing the guest again."""
MAC: Final = "52:54:00:6f:55:cc"

# Each as one line, for the guest's shell. What is written is read again: lost or torn writes are seen.
WRITE_MEMORY: Final = (
    "while :; do head -c 200000 /dev/urandom >/tmp/a; cp /tmp/a /tmp/b; cmp /tmp/a /tmp/b || echo torn >>/tmp/bad; "
    "echo >>/tmp/rounds; sleep 0.5; done &"
)
WRITE_DISK: Final = "n=0; while :; do n=$((n+1)); echo $n >>/journal; sync; sleep 0.5; done &"


class Load:
    """A guest under load: memory and disk are written, and a TCP connection is kept busy."""

    def __init__(self, guest: Guest, peer: EmulatedHost, address: str, *, netns: str = "") -> None:
        """``address`` is that of an iperf3 which is started on ``peer``, in its namespace ``netns`` if that is said."""
        self.guest, self._address = guest, address
        prefix = ["ip", "netns", "exec", netns] if netns else []
        self.server = peer.spawn([*prefix, "iperf3", "-s", "-1", "--forceflush", "-i", "1", "-f", "k"])
        self.server.expect("listening")

    def start(self, seconds: int) -> None:
        self.guest.type("dmesg -c >/dev/null")  # what was said of the boot
        self.guest.type(WRITE_MEMORY)
        self.guest.type(WRITE_DISK)
        self.guest.type(f"iperf3 -c {self._address} -t {seconds} -b 1M -i 0 >/tmp/iperf 2>&1 &")
        self.await_traffic()

    def await_traffic(self) -> None:
        """Until something has come over the one connection, from now on."""
        seen = len(self.server.output)
        deadline = time.monotonic() + SLOW
        while not any(_kilobits(line) for line in self.server.output[seen:].splitlines()[1:-1]):
            assert time.monotonic() < deadline, self.server.output
            assert self.server.returncode is None, self.server.output
            self.server.expect("\n", SLOW)

    def assert_whole(self, guest: Guest) -> None:
        """Everything has gone on in ``guest``, and nothing was lost or torn."""
        before = guest.type("wc -l </tmp/rounds; tail -n 1 /journal", SLOW).split()
        self.await_traffic()
        after = guest.type("wc -l </tmp/rounds; tail -n 1 /journal", SLOW).split()
        assert all(int(b) < int(a) for b, a in zip(before, after, strict=True)), (before, after)
        assert guest.type("cat /tmp/bad") == "cat: can't open '/tmp/bad': No such file or directory"

    def stop(self, guest: Guest) -> None:
        """End it, and look at the disk: each line of the journal is there once, and in its order."""
        guest.type("kill $(jobs -p); wait", SLOW)
        guest.type("sync; echo 3 >/proc/sys/vm/drop_caches", SLOW)
        lines = 'awk \'NR != $1 { print "line", NR, "is", $1 }\' /journal | head -n 3; wc -l </journal'
        written = guest.type(lines, SLOW)
        assert written.isdecimal(), written
        said = guest.type("dmesg | grep -i -e error -e 'call trace' -e stall -e remount")
        assert said == "", said
        self.server.signal(15)
        self.server.wait()


def _kilobits(line: str) -> float:
    """What a line of iperf3's says was received in its second."""
    words = line.split()
    return float(words[words.index("Kbits/sec") - 1]) if "Kbits/sec" in words else 0.0


@dataclass(frozen=True)
class Pings:
    """What a pinger saw: when each was sent, and answered."""

    entries: tuple[tuple[float, float | None], ...]

    @property
    def gap(self) -> float:
        """The longest time, in seconds, from a ping that was answered to the next one that was, with losses between.

        By when they were sent: a guest whose vCPUs are slowed down answers late, and has lost nothing.
        """
        moments = [(number, sent) for number, (sent, answered) in enumerate(self.entries) if answered is not None]
        return max((b - a for (i, a), (j, b) in pairwise(moments) if j > i + 1), default=0.0)

    @property
    def pause(self) -> float:
        """The longest time, in seconds, in which none was sent: what the pinger may have missed of a gap."""
        return max((b - a for (a, _), (b, _) in pairwise(self.entries)), default=0.0)

    @property
    def lost(self) -> list[int]:
        return [number for number, (_, answered) in enumerate(self.entries) if answered is None]

    @property
    def longest_loss(self) -> int:
        """How many were lost in a row."""
        longest = run = 0
        for _, answered in self.entries:
            run = 0 if answered is not None else run + 1
            longest = max(longest, run)
        return longest


class Pinger:
    """Ten pings a second, from outside the guest's own bridge where there is such a place."""

    def __init__(self, host: EmulatedHost, address: str, *, netns: str = "") -> None:
        prefix = ["ip", "netns", "exec", netns] if netns else []
        self._process: Process = host.spawn([*prefix, "python", "-I", "-S", str(PINGER), address])
        self._process.expect("answered", SLOW)

    def stop(self) -> Pings:
        self._process.close_stdin()
        assert self._process.wait(SLOW) == 0
        lines = [json.loads(line) for line in self._process.output.splitlines() if line.startswith("{")]
        return Pings(tuple((line["sent"], line["answered"]) for line in lines))


@contextmanager
def pinged(host: EmulatedHost, address: str, seen: list[Pings], *, netns: str = "") -> Iterator[None]:
    """Ping meanwhile; what was seen is put into ``seen``."""
    pinger = Pinger(host, address, netns=netns)
    try:
        yield
    finally:
        seen.append(pinger.stop())


def clock_error(guest: Guest, host: EmulatedHost) -> float:
    """By how many seconds the guest's clock is wrong, at least; both have whole seconds."""
    before = int(host.run(["date", "+%s"], check=True).stdout)
    there = int(guest.type("date +%s"))
    after = int(host.run(["date", "+%s"], check=True).stdout)
    return max(0, before - there - 1, there - after - 1)


def blackout_there(host: EmulatedHost, name: str) -> float:
    """Milliseconds, as the destination knows it: by the clocks of both hosts."""
    said = json.loads(host.run(["kvmpy", "qmp", name, "query-migrate"], check=True).stdout)
    assert said["status"] == "completed"
    return float(said["blackout-ms"])


def report(host: EmulatedHost, path: str) -> dict[str, float]:
    """The figures of a report that was written on ``host``."""
    told = json.loads(host.run(["cat", path], check=True).stdout)
    figures = ("total-ms", "blackout-ms", "transferred-bytes", "unaccounted-ms")
    return {name: told[name] for name in figures}
