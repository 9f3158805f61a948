"""Announcing a machine's network devices: after a move, switches still send its frames to where it was.

Each round, for each device, a frame of the guest's is put into its network, and the guest's own driver is asked to
speak where it can (VIRTIO_NET_F_GUEST_ANNOUNCE). Frames get lost, so there are several rounds, ever further apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import msgspec

from kvmpy.errors import CommandError
from kvmpy.host.reactor import Reactor

# Announcements that go on at once, each under an id of its own.
MOST: Final = 16


class Nic(Protocol):
    """A network device: `kvmpy.devices.virtio.net.VirtioNet`."""

    def announce(self) -> bool:
        """Have the guest say where it is; False if its driver cannot."""

    def announce_from_here(self) -> bool:
        """Say it for the guest; False if nobody would hear it."""


class Rounds(msgspec.Struct, frozen=True):
    """``rounds`` announcements, with waits that begin at ``initial`` ms and grow by ``step`` ms, up to ``most`` ms."""

    initial: int
    most: int
    rounds: int
    step: int

    def wait(self, done: int) -> float:
        """Seconds to wait after ``done`` rounds."""
        return max(0, min(self.initial + (done - 1) * self.step, self.most)) / 1000


class Announcer:
    """Announces ``nics()``, by their name and by their netdev's. The control thread's."""

    def __init__(self, control: Reactor, nics: Callable[[], Mapping[str, Nic]]) -> None:
        self._control, self._nics = control, nics
        self._running: dict[str, _Announcement] = {}

    def start(self, rounds: Rounds, names: Sequence[str] | None, id_: str) -> None:
        """Announce now, and then as ``rounds`` says; None is all devices, those that come later too.

        Raises CommandError where a name is nobody's, or too much goes on already.
        """
        for name in names or ():
            if name not in self._nics():
                raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
        if id_ in self._running:
            self._running.pop(id_).timer.cancel()
        elif len(self._running) >= MOST:
            raise CommandError(f"{len(self._running)} announcements go on already; wait, or use an id that does")
        if rounds.rounds > 0:
            each, end = partial(self._announce, names), partial(self._running.pop, id_, None)
            self._running[id_] = _Announcement(self._control, rounds, each, end)
            self._running[id_].next()

    def stop(self) -> None:
        """Announce nothing more."""
        while self._running:
            self._running.popitem()[1].timer.cancel()

    def _announce(self, names: Sequence[str] | None) -> None:
        """Once; a device that has gone is left out."""
        nics = self._nics()
        wanted = nics.values() if names is None else [nics[name] for name in names if name in nics]
        for nic in {id(nic): nic for nic in wanted}.values():  # each has two names
            nic.announce_from_here()
            nic.announce()


class _Announcement:
    """One that goes on: ``each`` is a round, ``end`` what follows the last."""

    def __init__(self, control: Reactor, rounds: Rounds, each: Callable[[], object], end: Callable[[], object]) -> None:
        self._rounds, self._each, self._end = rounds, each, end
        self._done = 0
        self.timer = control.timer(self.next)

    def next(self) -> None:
        """A round, and when the next one is."""
        self._done += 1
        if self._done < self._rounds.rounds:
            self.timer.arm(self._rounds.wait(self._done))
        else:
            self._end()
        self._each()
