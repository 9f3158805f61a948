"""The port of a failover standby: who around it, on this host, is told whether its guest is there.

    port = StandbyPort(network, "/run/kvmpy/web1", "tap-web1", "52:54:00:6f:55:cc")
    problems = port.steer(here=True)        # the guest uses its standby
    problems = port.steer(here=False)       # it has its primary
    port.leave()                            # it is gone, or elsewhere

The network helper does it (`kvmpy.host.fdb`), and takes it back if we are killed. What would outlive that too, entries
at a tap that stays and at a NIC, stands in the runtime directory's journal before: the next start removes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Set

from kvmpy.errors import HostError
from kvmpy.host import pci_journal
from kvmpy.host.network import Network
from kvmpy.host.pci_journal import EntryRecord
from kvmpy.host.warnings import Warnings
from kvmpy.log import Log

log = Log(__name__)


class StandbyPort:
    """The tap ``ifname`` of a standby with the address ``mac``. Any thread; a call takes as long as the helper does."""

    def __init__(self, network: Network, journal_dir: str, ifname: str, mac: str, *, netns: str | None = None) -> None:
        self.ifname, self.mac = ifname, mac
        self._network, self._directory, self._netns = network, journal_dir, netns
        self._lock = threading.Lock()
        self._uplinks: list[str] = []
        self._made: set[str] = set()  # uplinks with an entry of ours
        self._noted: Set[str] | None = None  # those that the journal has
        self._told = self._closed = False
        self._warnings = Warnings(log)

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
            self._warnings.say(problem)
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
        """What it takes of the time in which frames go nowhere is one request."""
        uplinks, problems = self._uplinks, []
        try:
            if self._noted is None:
                self._look()
            uplinks, wanted = self._uplinks, {*self._uplinks, *self._made}
            if self._noted is None or not wanted <= self._noted:
                self._note(wanted)
        except HostError as e:  # the bridge is told all the same, and NICs nothing that could not be undone
            uplinks, problems = [], [str(e)]
        steered = self._network.steer(self.ifname, self.mac, uplinks, here=True, learn=True, netns=self._netns)
        self._made |= set(steered.made)
        if not problems and self._made != self._noted:  # somebody else has an entry there
            self._note(self._made)
        return problems + steered.problems

    def _leave(self, *, learn: bool) -> list[str]:
        asked = self.ifname, self.mac, sorted(self._made)
        problems = self._network.steer(*asked, here=False, learn=learn, netns=self._netns).problems
        if not problems:
            self._made = set()
            if not learn:
                self._look()
            elif self._noted is not None:
                pci_journal.drop_entry(self._directory, self._record(()))
                self._noted = None
        return problems

    def _look(self) -> None:
        """Find out what is to be told when the guest comes here."""
        self._uplinks = self._network.uplinks(self.ifname, netns=self._netns)

    def _note(self, uplinks: Set[str]) -> None:
        pci_journal.put_entry(self._directory, self._record(uplinks))
        self._noted = frozenset(uplinks)

    def _record(self, uplinks: Iterable[str]) -> EntryRecord:
        return EntryRecord(self.ifname, self._netns, self.mac, sorted(uplinks))
