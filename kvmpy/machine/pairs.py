"""All failover pairs of a machine: which of them a device, a function or an event concerns. By the control thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvmpy.config.schema import VirtioNetPci
from kvmpy.devices.failover import PairState
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.log import Log
from kvmpy.machine.inventory import Plugged
from kvmpy.machine.pairing import PairFacts, Pairing, Tells

log = Log(__name__)


class Pairs:
    """All pairs of a machine, by the ids of their standbys. With ``held`` none is shown before `runs`.

    ``on_change`` is told when one has become another.
    """

    def __init__(self, machine: Tells, ports: Mapping[str, RootPort], *, held: bool) -> None:
        self._machine, self._ports, self._held = machine, ports, held
        self._is_departing = False
        self._pairings: dict[str, Pairing] = {}
        self._runs = False
        self.on_change: Callable[[], object] = lambda: None

    def facts(self) -> list[PairFacts]:
        """What an operator is shown of each."""
        return [self._pairings[name].facts() for name in sorted(self._pairings)]

    def came(self, plugged: Plugged) -> bool:
        """One more device; True if it is a primary, which is plugged in when its time comes."""
        table = plugged.table
        if plugged.standby is not None:
            pairing = self._pairing(plugged.standby)
            pairing.primary, pairing.primary_id, pairing.problem = plugged, str(table.id), ""
            if plugged.steering is not None:
                steering = pairing.steering = plugged.steering
                steering.on_change = lambda driven, problem: pairing.post(lambda: pairing.moved(driven, problem))
                steering.on_receiving = lambda when: pairing.post(lambda: pairing.receives(when - steering.carried))
            pairing.pair.primary_came()
            if pairing.pair.state is PairState.WAITING:
                log.warning("%s: is hidden until its standby '%s' is added", table.id, plugged.standby)
            return True
        if isinstance(table, VirtioNetPci) and table.failover:
            pairing = self._pairing(str(table.id))
            pairing.standby, pairing.acks = plugged, 0
            device: Any = plugged.device
            device.on_standby = lambda: pairing.post(pairing.look)
            pairing.pair.standby_came()
            pairing.look()
            if self._runs:
                pairing.appear()
        return False

    def left(self, plugged: Plugged) -> None:
        """A device is out of its slot; of a primary, `forgotten` follows."""
        if plugged.standby is not None:
            pairing = self._pairings[plugged.standby]
            if pairing.pair.state in (PairState.HIDDEN, PairState.WAITING):
                pairing.pair.primary_left()
            else:
                pairing.pair.released()
            pairing.primary, pairing.driven = None, False
            self.on_change()
        elif (found := self._pairings.get(str(plugged.table.id))) is not None and found.standby is plugged:
            found.standby = None
            found.pair.standby_left()
            self._forget(found)

    def forgotten(self, name: str) -> None:
        """The host has back what the device of that id had."""
        for pairing in list(self._pairings.values()):
            if pairing.primary_id == name and pairing.primary is None:
                pairing.forgotten()
                pairing.pair.primary_left()
                self._forget(pairing)

    def asked(self, function: PciFunction[Any]) -> None:
        """The guest is about to be asked for a function, which does not come back."""
        for pairing in self._of(function):
            pairing.give_up()
            pairing.pair.asked()

    def used(self, function: PciFunction[Any]) -> None:
        """The guest has taken a function into use."""
        for pairing in self._of(function):
            if not pairing.is_hidden:
                pairing.settle()
                pairing.pair.used()
                self.on_change()

    def refused(self, function: PciFunction[Any], reason: str) -> None:
        """The guest was asked for it, and keeps it: for a migration it is asked again."""
        for pairing in self._of(function):
            if pairing.is_hidden:
                continue  # it has left since, as by a reset
            pairing.pair.kept(reason)
            if pairing.is_leaving:
                pairing.ask_again()
            self.on_change()

    def kept(self, function: PciFunction[Any]) -> None:
        """The guest keeps it, for which it was asked no more."""
        for pairing in self._of(function):
            if not pairing.is_hidden:
                pairing.keep()
                self.on_change()

    def returns(self, function: PciFunction[Any]) -> bool:
        """It is out of its slot, for a migration. False where it is out for good, which is `left`."""
        for pairing in self._of(function):
            if pairing.returns and pairing.is_hidden and not getattr(function, "is_wanted_back", False):
                pairing.driven, pairing.was_out = False, True
                pairing.pair.released(returns=True)
                self.on_change()
                return True
        return False

    def failed(self, function: PciFunction[Any], reason: str) -> None:
        """The guest cannot use it."""
        for pairing in self._of(function):
            if not pairing.is_hidden:
                pairing.pair.failed(reason)
                self.on_change()

    def is_hidden(self, plugged: Plugged) -> bool:
        """It is a primary in no slot, so that no guest is to be asked for it."""
        return plugged.standby is not None and self._pairings[plugged.standby].is_hidden

    def left_behind(self) -> list[Plugged]:
        """The primaries that are in no slot after `gone`; none once the machine runs again."""
        found = [pairing.primary for pairing in self._pairings.values() if self._held and pairing.is_hidden]
        return [primary for primary in found if primary is not None]

    def reset(self) -> None:
        """A system reset: every primary is hidden again. The machine stands still.

        One that the guest is asked for has left with that, whatever the guest was about to make of it.
        """
        for pairing in self._pairings.values():
            pairing.driven = False
            was_asked = pairing.pair.state is PairState.LEAVING
            if not (pairing.is_leaving or was_asked):
                pairing.give_up()
            pairing.pair.reset()
            if was_asked:
                pairing.port.tear_out()
        self.on_change()

    def runs(self) -> None:
        """The guest runs here: what came with a move may be shown (R42), or was to go with one (R41)."""
        self._runs = True
        for pairing in self._pairings.values():
            pairing.appear()
        if self._held and not self._is_departing:
            self.arrive()

    # For a migration

    def depart(self) -> list[Pairing]:
        """Show none until `arrive`, or until the machine runs after `gone`; returns those that the guest has."""
        self._held = self._is_departing = True
        return [pairing for pairing in self._pairings.values() if pairing.depart()]

    def arrive(self) -> None:
        """Show what is to be shown."""
        self._held = self._is_departing = False
        for pairing in self._pairings.values():
            pairing.arrive()

    def gone(self) -> None:
        """The guest runs elsewhere, or may, until the machine runs again: so has what left, and so do its frames."""
        self._is_departing = self._runs = False
        for pairing in self._pairings.values():
            pairing.vanish()

    def is_leaving(self, plugged: Plugged) -> bool:
        """It is a primary that is asked for, or out of its slot already, for a migration."""
        return plugged.standby is not None and self._pairings[plugged.standby].is_leaving

    def give_up(self, plugged: Plugged) -> None:
        """If it is a primary, it does not come back."""
        if plugged.standby is not None:
            self._pairings[plugged.standby].give_up()

    def wanted(self) -> tuple[str, ...]:
        """The ids of the primaries that are to come whatever the guest's driver says."""
        return tuple(str(pairing.primary_id) for pairing in self._pairings.values() if pairing.pair.wanted)

    def want(self, primaries: tuple[str, ...]) -> list[str]:
        """Have the guest see these as soon as it runs; returns those that are not here."""
        here = {pairing.primary_id: pairing for pairing in self._pairings.values() if pairing.primary is not None}
        for name in primaries:
            if name in here:
                here[name].pair.want()
        return [name for name in primaries if name not in here]

    def _pairing(self, standby: str) -> Pairing:
        if standby not in self._pairings:
            self._pairings[standby] = Pairing(self._machine, self._ports, standby, held=self._held)
        return self._pairings[standby]

    def _forget(self, pairing: Pairing) -> None:
        if pairing.is_over:
            self._pairings.pop(pairing.standby_id, None)

    def _of(self, function: PciFunction[Any]) -> list[Pairing]:
        """The pairing whose primary it is, if there is one."""
        primaries = [(pairing.primary, pairing) for pairing in self._pairings.values()]
        return [pairing for primary, pairing in primaries if primary is not None and primary.function is function]
