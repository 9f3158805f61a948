"""A PCI function of the host that this machine has for itself: taken from its driver, given to vfio-pci, given back.

    function = HostFunction.claim("0000:5e:00.2", "/run/kvmpy/web1")
    function.assign(network, mac="52:54:00:6f:55:cc")       # a virtual function, through its PF
    function.close()                                        # its driver has it back, its PF's settings are as before

What is changed stands in the runtime directory's journal before: `recover` gives back what a crash has left. A function
that was bound to vfio-pci already stays so, for somebody wants that. Other machines of kvmpy's see by a lock that it is
taken, everybody else by its group, which the kernel opens for one at a time.

A driver gives a function up, or takes it, in its own time, which can be seconds. So all of this belongs where a machine
is built, or in the thread of a device_add: never in the control thread, and in no vCPU's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Final, Self

import msgspec

from kvmpy.errors import HostError
from kvmpy.host import pci_journal
from kvmpy.host.network import Network, VfChange
from kvmpy.host.passable import Obstacle, group_in_use, is_vfio, obstacles
from kvmpy.host.pci_function import VFIO_PCI, SysfsFunction, VirtualFunction
from kvmpy.host.pci_journal import EntryRecord, Record, VfRecord
from kvmpy.host.pci_use import uses
from kvmpy.host.tree import Host
from kvmpy.log import Log

log = Log(__name__)

HOST: Final = Host()
TAKEN: Final = Obstacle("a machine of kvmpy's has it", "stop that first (kvmpy ps)", passing=True)
NO_MAC: Final = "00:00:00:00:00:00"
# Seconds in which a process that was killed has closed what it had open; its guest's memory is unpinned first.
RELEASE_LIMIT: Final = 5.0
RELEASE_POLL: Final = 0.02


class HostFunction:
    """The function at ``address``, bound to vfio-pci and ours until `close`. One thread at a time.

    ``group`` is its IOMMU group; ``vf`` says whose virtual function it is, None where it is none.
    """

    def __init__(self, function: SysfsFunction, group: int, lock: int, journal_dir: str, record: Record) -> None:
        """See `claim`."""
        self.address, self.group = function.address, group
        self.vf: VirtualFunction | None = function.virtual_function()
        self._function, self._lock = function, lock
        self._directory, self._record = journal_dir, record
        self._network: Network | None = None

    @classmethod
    def claim(cls, address: str, journal_dir: str, host: Host = HOST) -> Self:
        """Take the function from its driver. ``journal_dir`` is the machine's runtime directory.

        Raises HostError, which begins with the address, with everything as it was.
        """
        function = SysfsFunction(address, host)
        lock = _lock(function, obstacles)
        try:
            # What a crash left, and could not be given back since, is still to be given back.
            record = pci_journal.find(journal_dir, function.address) or Record(function.address)
            group = function.group
            assert group is not None  # else there was an obstacle
            claimed = cls(function, group, lock, journal_dir, record)
            claimed.bind()
        except BaseException:
            os.close(lock)
            raise
        return claimed

    def assign(self, network: Network, *, mac: str | None = None, vlan: int | None = None) -> None:
        """Have its PF hold it to a MAC, and to a VLAN, until `withdraw` or `close`; None leaves one as it was.

        Raises HostError, with everything as it was.
        """
        if self.vf is None or not self.vf.interface:
            raise HostError(f"{self.address}: MAC and VLAN cannot be set: {self._why_not}; leave them out")
        interface, number = self.vf.interface, self.vf.number
        self._network = network
        self.withdraw()
        try:
            now = network.set_vf(interface, number).after
            wanted = msgspec.structs.replace(now, mac=mac or now.mac)
            if vlan is not None:
                wanted = msgspec.structs.replace(wanted, vlan=vlan, qos=0)
            self._note(vf=VfRecord(interface, number, VfChange(before=now, after=wanted)))
            network.set_vf(interface, number, mac=mac, vlan=vlan)
        except HostError as e:
            self._note(vf=None)
            raise HostError(f"{self.address}: {e}") from e

    def carry(self, network: Network, mac: str | None) -> None:
        """Have its PF deliver what is for ``mac`` to it, or with None nothing that is for one address, until `close`.

        That puts back what there was before the first time. Raises HostError, with everything as it was.
        """
        if self.vf is None or not self.vf.interface:
            raise HostError(f"{self.address}: its address cannot be set: {self._why_not}")
        interface, number, earlier = self.vf.interface, self.vf.number, self._record.vf
        self._network = network
        try:
            now = network.set_vf(interface, number).after
            wanted = msgspec.structs.replace(now, mac=mac or NO_MAC)
            before = earlier.change.before if earlier else now
            record = VfRecord(interface, number, VfChange(before=before, after=wanted))
            try:
                self._note(vf=record)
            except HostError as e:
                if mac is not None:
                    raise
                log.warning("%s: %s", self.address, e)  # that it is taken away matters more
                self._record = msgspec.structs.replace(self._record, vf=record)
            network.set_vf(interface, number, mac=wanted.mac)
        except HostError as e:
            with contextlib.suppress(HostError):
                self._note(vf=earlier)
            raise HostError(f"{self.address}: {e}") from e

    @property
    def _why_not(self) -> str:
        return "its PF has no network interface here" if self.vf else "it is no virtual function"

    def withdraw(self) -> None:
        """Undo `assign`, as far as nobody else has changed it since. Raises HostError."""
        if (vf := self._record.vf) and self._network:
            self._network.put_vf_back(vf.interface, vf.number, vf.change)
            self._note(vf=None)

    def close(self) -> None:
        """Give it back; what cannot be is logged, and left to the next start. Closing twice is allowed.

        Whatever was opened of it is closed before: the kernel waits for that.
        """
        if self._lock < 0:
            return
        try:
            for undo in (self.withdraw, self._unbind):
                try:
                    undo()
                except HostError as e:
                    log.warning("%s; the next start of this machine tries it again", e)
        finally:
            os.close(self._lock)
            self._lock = -1

    def bind(self) -> None:
        """Bind it to vfio-pci unless it is bound so. Raises HostError, with everything as it was."""
        function = self._function
        if is_vfio(function.driver):
            return
        for use in uses(function):
            subject = "" if use.what == self.address else f"{use.what} "
            log.warning("%s: is taken from the host, though %s%s", self.address, subject, use.how)
        # Of one that could not be given back since, the record says what it had before that.
        driver, override = function.driver or self._record.driver, function.override
        if self._record.rebound and override == VFIO_PCI:
            override = self._record.override
        self._note(rebound=True, driver=driver, override=override)
        try:
            function.set_override(VFIO_PCI)
            function.unbind()
            function.bind(VFIO_PCI)
            if obstacle := next(group_in_use(function), None):
                raise HostError(f"{self.address}: {obstacle}")
        except BaseException:  # a signal that ends us among them
            with contextlib.suppress(HostError):  # what cannot be given back stays in the journal
                self._unbind()
            raise

    def _unbind(self) -> None:
        """Undo `bind`. Raises HostError."""
        _give_back(self._function, self._record)
        self._note(rebound=False, driver="", override="")

    def _note(self, **changes: object) -> None:
        """Write down what is about to be changed, or has been put back."""
        record = msgspec.structs.replace(self._record, **changes)
        if record.rebound or record.vf:
            pci_journal.put(self._directory, record)
        else:
            pci_journal.drop(self._directory, self.address)
        self._record = record


def recover(journal_dir: str, host: Host = HOST) -> None:
    """Give back what an earlier process of this machine left; what cannot be is logged, and stays in the journal."""
    try:
        journal = pci_journal.load(journal_dir)
        if journal is None or journal.alive():
            return
        for record in journal.records:
            try:
                if journal.from_this_boot():
                    _recover(record, journal.machine, host)
                pci_journal.drop(journal_dir, record.address)
            except HostError as e:
                log.warning("%s; left over from process %d", e, journal.pid)
        for entry in journal.entries:
            if journal.from_this_boot():
                _remove_entry(entry, journal.machine)
            pci_journal.drop_entry(journal_dir, entry)
    except HostError as e:
        log.warning("%s", e)


def _recover(record: Record, machine: str, host: Host) -> None:
    """Give one function back, but not away from whoever has it by now. Raises HostError."""
    function = SysfsFunction(record.address, host)
    if not function.exists():
        return
    lock = _lock(function, group_in_use if is_vfio(function.driver) else lambda _: iter(()))
    try:
        try:
            if record.vf:
                _put_vf_back(record.vf, machine)
        finally:
            _give_back(function, record)
    finally:
        os.close(lock)
    log.info("%s: given back to %s", function.address, record.driver or "no driver")


def _put_vf_back(vf: VfRecord, machine: str) -> None:
    """Put the settings of a virtual function back. Raises HostError."""
    with closing(Network(machine)) as network:
        network.put_vf_back(vf.interface, vf.number, vf.change)


def _remove_entry(entry: EntryRecord, machine: str) -> None:
    """Have NICs forget the guest of a standby; where that fails there is mostly none of that name any more."""
    with closing(Network(machine)) as network:
        try:
            asked = entry.ifname, entry.mac, entry.uplinks
            problems = network.steer(*asked, here=False, learn=True, netns=entry.netns).problems
        except HostError as e:
            problems = [str(e)]
    for problem in problems:
        log.warning("%s", problem)


def _lock(function: SysfsFunction, in_the_way: Callable[[SysfsFunction], Iterator[Obstacle]]) -> int:
    """Lock it once nothing is in the way; what a process that was killed leaves there passes. Raises HostError."""
    deadline = time.monotonic() + RELEASE_LIMIT
    while True:
        obstacle = next(in_the_way(function), None)
        if obstacle is None:
            if (lock := function.lock()) is not None:
                return lock
            obstacle = TAKEN
        if not obstacle.passing or time.monotonic() > deadline:
            raise HostError(f"{function.address}: {obstacle}")
        time.sleep(RELEASE_POLL)


def _give_back(function: SysfsFunction, record: Record) -> None:
    """Make it what ``record`` says it was, unless somebody else has it by now. Raises HostError."""
    if not record.rebound or not function.exists():
        return
    if function.driver == VFIO_PCI:
        function.unbind()
    if function.override == VFIO_PCI:
        function.set_override(record.override)
    if record.driver and not function.driver:
        function.bind(record.driver)
