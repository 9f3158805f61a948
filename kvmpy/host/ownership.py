"""Whose a link is: a mark in its alias, which lives and dies with the link and which `ip link` shows.

    kvmpy:web1:4711:83542        a bridge that machine web1 made; process 4711, started at tick 83542, runs it
    kvmpy:web1:4711:83542:...    an interface that it changed; what follows says how it was before

The process, and when it started, tell a machine that runs from one that crashed: the number may be another's by now.
Whoever wants such a link for good clears the alias, and kvmpy leaves it alone.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple, Self

PREFIX: Final = "kvmpy:"
# linux/if.h: IFALIASZ, less the terminating zero
LONGEST: Final = 255
LEARNED: Final = "l"
# States of a process that has ended, in /proc/PID/stat (man 5 proc): nothing of it runs any more
ENDED: Final = ("Z", "X")


class Before(NamedTuple):
    """An interface as it was: the index of its master (0 for none), its MTU, whether it was up, and its alias.

    ``learned``: its bridge learned addresses from it, which kvmpy has turned off.
    """

    master: int
    mtu: int
    up: bool
    alias: str
    learned: bool = False

    def __str__(self) -> str:
        return f"{self.master},{self.mtu},{int(self.up)}{LEARNED if self.learned else ''},{self.alias}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What `__str__` made, else None."""
        master, mtu, up, alias = (*text.split(",", 3), "", "", "", "")[:4]
        learned = up.endswith(LEARNED)
        up = up.removesuffix(LEARNED)
        if not (master.isdecimal() and mtu.isdecimal() and up in ("0", "1")):
            return None
        return cls(int(master), int(mtu), up == "1", alias, learned)


class Mark(NamedTuple):
    """The owner of a link. Two marks are the same owner's where they are equal without ``before``."""

    machine: str
    pid: int
    started: int
    before: Before | None = None

    @property
    def text(self) -> str:
        """The alias."""
        owner = f"{PREFIX}{self.machine}:{self.pid}:{self.started}"
        return owner if self.before is None else f"{owner}:{self.before}"

    @property
    def owner(self) -> Self:
        """The mark of what was made, not changed."""
        return self._replace(before=None)

    @classmethod
    def parse(cls, alias: str) -> Self | None:
        """The mark in ``alias``; None where it is not kvmpy's."""
        if not alias.startswith(PREFIX):
            return None
        machine, pid, started, before = (*alias.removeprefix(PREFIX).split(":", 3), "", "", "", "")[:4]
        if not (machine and pid.isdecimal() and started.isdecimal()):
            return None
        return cls(machine, int(pid), int(started), Before.parse(before))

    def alive(self) -> bool:
        """Whether the owner runs. What cannot be found out counts as alive."""
        try:
            return process_start(self.pid) == self.started
        except ProcessLookupError:
            return False
        except OSError:
            return True


def process_start(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot. Raises ProcessLookupError where it has ended."""
    os.kill(pid, 0)  # an answer even where /proc hides other users' processes
    with open(f"/proc/{pid}/stat") as file:
        state, *fields = file.read().rpartition(")")[2].split()
    if state in ENDED:
        raise ProcessLookupError(pid)
    return int(fields[18])
