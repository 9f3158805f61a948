"""The port of a failover standby: who around it, on this host, is told whether its guest is there.

    port = StandbyPort(network, "/run/kvmpy/web1", "tap-web1", "52:54:00:6f:55:cc")
    problems = port.steer(here=True)        # the guest uses its standby
    problems = port.steer(here=False)       # it has its primary
    port.leave()                            # it is gone, or elsewhere

The network helper does it (`kvmpy.host.fdb`), and takes it back if we are killed. What would outlive that too, entries
at a tap that stays and at a NIC, stands in the runtime directory's journal before: the next start removes it.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from kvmpy.errors import HostError
from kvmpy.host import pci_journal
from kvmpy.host.network import Network
from kvmpy.host.pci_journal import EntryRecord

log = logging.getLogger(__name__)

MOST_PROBLEMS: Final = 20
"""Different ones that are logged: a guest can bring them about again and again."""


class StandbyPort:
    """The tap ``ifname`` of a standby with the address ``mac``. Any thread; a call takes as long as the helper does."""

    def __init__(self, network: Network, journal_dir: str, ifname: str, mac: str, *, netns: str | None = None) -> None:
        self.ifname, self.mac = ifname, mac
        self._network, self._directory, self._netns = network, journal_dir, netns
        self._lock = threading.Lock()
        self._made: list[str] = []  # uplinks with an entry of ours
        self._noted = self._told = self._closed = False
        self._said: set[str] = set()

    def steer(self, *, here: bool) -> list[str]:
        """The guest takes its frames here from now on, or no longer; returns what could not be told, and logs it."""
        with self._lock:
            if self._closed:
                return []
            self._told = True
            try:
                problems = self._arrive() if here else self._leave(learn=False)
            except HostError as e:
                problems = [str(e)]
        for problem in problems:
            if problem not in self._said and len(self._said) < MOST_PROBLEMS:
                self._said.add(problem)
                log.warning("%s", problem)
        return problems

    def leave(self) -> list[str]:
        """The guest is not here any more: all is as it was before the first `steer`. Returns what is not."""
        with self._lock:
            if not self._told:
                return []
            self._told = False
            try:
                problems = self._leave(learn=True)
            except HostError as e:
                problems = [str(e)]
        for problem in problems:
            log.warning("%s", problem)
        return problems

    def close(self) -> None:
        """`leave`, and tell nobody anything any more."""
        self.leave()
        with self._lock:
            self._closed = True

    def _arrive(self) -> list[str]:
        found = self._network.uplinks(self.ifname, netns=self._netns)
        wanted = sorted({*found, *self._made})
        self._note(wanted)
        steered = self._network.steer(self.ifname, self.mac, found, here=True, learn=True, netns=self._netns)
        made = sorted({*self._made, *steered.made})
        if made != wanted:
            self._note(made)
        self._made = made
        return steered.problems

    def _leave(self, *, learn: bool) -> list[str]:
        asked = self.ifname, self.mac, self._made
        problems = self._network.steer(*asked, here=False, learn=learn, netns=self._netns).problems
        if self._noted and not problems:
            pci_journal.drop_entry(self._directory, self._record([]))
            self._noted, self._made = False, []
        return problems

    def _note(self, uplinks: list[str]) -> None:
        pci_journal.put_entry(self._directory, self._record(uplinks))
        self._noted = True

    def _record(self, uplinks: list[str]) -> EntryRecord:
        return EntryRecord(self.ifname, self._netns, self.mac, uplinks)
