"""One failover pair: what `kvmpy.devices.failover` decides, done to a real slot, and told to listeners.

All of it is the control thread's, but for what is posted to it. A standby, a primary and what the guest does to either
are looked at when the post is served, not as they were when it was made: a reset may have come in between.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

from kvmpy.devices.failover import Pair, PairState
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.errors import HostError
from kvmpy.host.reactor import Reactor
from kvmpy.host.warnings import Warnings
from kvmpy.log import Log
from kvmpy.machine.inventory import Plugged
from kvmpy.machine.standby import Path

if TYPE_CHECKING:
    from kvmpy.devices.vfio.pci import VfioPci
    from kvmpy.devices.virtio.net import VirtioNet
    from kvmpy.machine.steering import Steering

log = Log(__name__)

NOT_RESET: Final = "it has not come out of its reset; see the log, and plug it in anew (device_del, device_add)"
LATE: Final = 15.0
"""Seconds after a primary was taken back in which one that is let go is so because it was asked for before (R38)."""


class Tells(Protocol):
    """The machine, as far as a pair needs it."""

    control: Reactor

    def report(self, event: str, **data: Any) -> None:
        """Tell the listeners of an event."""


class PairFacts(NamedTuple):
    """What an operator is shown of a pair; `kvmpy.monitor.failover` says what each is."""

    standby_id: str
    standby: bool
    negotiated: bool
    primary_id: str | None
    state: PairState
    path: str
    standby_mac: str | None
    primary_mac: str | None
    error: str | None
    network_error: str | None = None
    standby_rx_frames: int | None = None
    standby_tx_frames: int | None = None
    rx_gap_ms: float | None = None


class Pairing:
    """One pair with what it is made of (`kvmpy.devices.failover.Hands`)."""

    def __init__(self, machine: Tells, ports: Mapping[str, RootPort], standby_id: str, *, held: bool) -> None:
        self._machine, self._ports, self.standby_id = machine, ports, standby_id
        self.standby: Plugged | None = None
        self.primary: Plugged | None = None
        self.primary_id: str | None = None
        self.driven = False
        self._is_told = False  # the network, and who listens, that the guest has its frames over the primary
        self.is_leaving = False  # for a migration that goes on
        self.was_out = False  # of its slot, for the last
        self.kept_at: float | None = None  # when the guest, asked no more, had its power indicator on
        self._returns_until = -math.inf
        self.problem = ""  # with the primary's address
        self.acks = 0
        self.steering: Steering | None = None  # of the primary, also when that has gone: its last word is to come
        self.rx_gap_ms: float | None = None  # of the last change of the path, once it is known
        self._warnings = Warnings(log)
        self.pair = Pair(self, held=held)
        self.is_here = False  # the guest runs, and here

    @property
    def is_over(self) -> bool:
        """Neither of the two is there."""
        return self.standby is None and self.primary_id is None

    @property
    def net(self) -> VirtioNet | None:
        """The standby's device."""
        return None if self.standby is None else cast("VirtioNet", self.standby.device)

    @property
    def port(self) -> RootPort:
        """The primary's."""
        assert self.primary is not None
        return self._ports[str(self.primary.table.bus)]

    @property
    def is_hidden(self) -> bool:
        """There is a primary, and it is in no slot."""
        return self.primary is not None and self.port.card is not self.primary.function

    @property
    def returns(self) -> bool:
        """Should the primary be let go now, that is for a migration: it comes back."""
        return time.monotonic() < self._returns_until

    def facts(self) -> PairFacts:
        """What an operator is shown."""
        primary, state = self.primary, self.pair.state
        if primary is not None and state is PairState.PLUGGED and self.port.is_releasing:
            state = PairState.LEAVING  # the host has asked for it
        steering = None if primary is None else primary.steering
        around = None if self.standby is None else self.standby.around
        received, sent = (None if around is None else around.frames()) or (None, None)
        return PairFacts(
            standby_id=self.standby_id,
            standby=self.standby is not None,
            negotiated=self.pair.acked,
            primary_id=self.primary_id,
            state=state,
            path=self.path.value,
            standby_mac=None if self.standby is None else self.standby.mac,
            primary_mac=None if steering is None else steering.fixed or (steering.mac if self.driven else None),
            error=self.problem or self.pair.error or None,
            network_error=None if around is None else around.problem,
            standby_rx_frames=received,
            standby_tx_frames=sent,
            rx_gap_ms=self.rx_gap_ms,
        )

    def look(self) -> None:
        """The standby's driver has come, or gone."""
        if self.net is None:
            return
        acks, self.acks = self.acks, self.net.standby_acks
        if self.acks != acks and self.net.is_standby:
            self.pair.driver_came()
        elif not self.net.is_standby:
            self.pair.driver_left()

    def moved(self, driven: bool, problem: HostError | None) -> None:
        """The primary's address is where the guest wants it, or could not be brought there."""
        if problem is not None:
            self.problem = str(problem)
            self._tell_failed(self.problem)
            around = None if self.standby is None else self.standby.around
            if not driven and around is not None and self.is_here:  # all but that NIC can send to the standby
                around.tell(Path.STANDBY, self._host_facts())
            return
        self.problem, self.driven, self.rx_gap_ms, self._is_told = "", driven, None, driven
        since = 0.0 if self.steering is None else self.steering.since
        if self.standby is None or self.standby.around is None or not self.is_here:
            self._reached(driven, since)
        else:
            self.standby.around.tell(self.path, self._host_facts(), lambda: self._reached(driven, since))

    def forgotten(self) -> None:
        """The host has the primary back, maybe before it could say that the guest does not drive it any more."""
        self.primary_id, self.problem = None, ""
        if self._is_told:
            self.moved(False, None)

    def _reached(self, driven: bool, since: float) -> None:
        """The network knows the path. Also by the thread that has told it."""
        gap = None
        if not driven and (net := self.net) is not None:  # R46: what was for the primary is for the standby now
            if self.is_here:  # else it runs elsewhere by now, and says so there
                net.announce_from_here()
            gap = _milliseconds(time.monotonic() - since)
        self.post(lambda: self._path_changed(driven, gap))

    def _path_changed(self, driven: bool, gap: float | None) -> None:
        report, path = self._machine.report, Path.PRIMARY if driven else Path.STANDBY
        if gap is None:
            report("FAILOVER_PATH_CHANGED", **{"device-id": self.standby_id, "path": path.value})
            return
        if driven is self.driven:
            self.rx_gap_ms = gap
        report("FAILOVER_PATH_CHANGED", **{"device-id": self.standby_id, "path": path.value, "rx-gap-ms": gap})

    def receives(self, gap: float) -> None:
        """The guest can take frames from the primary, to which the network sends them since ``gap`` seconds."""
        if not self.driven:
            return
        self.rx_gap_ms = _milliseconds(gap)
        self._machine.report(
            "FAILOVER_PRIMARY_RECEIVES",
            **{"device-id": str(self.primary_id), "standby-id": self.standby_id, "rx-gap-ms": self.rx_gap_ms},
        )

    def appear(self) -> None:
        """The guest runs here: the network is told, unless it has been."""
        self.is_here = True
        around = None if self.standby is None else self.standby.around
        if around is not None and around.path is not self.path:
            around.tell(self.path, self._host_facts())

    def vanish(self) -> None:
        """The guest runs elsewhere from now on."""
        self.is_here = False
        around = None if self.standby is None else self.standby.around
        if around is not None and around.path is not Path.NOWHERE:
            around.tell(Path.NOWHERE, self._host_facts())

    @property
    def path(self) -> Path:
        """Which way the guest's frames go."""
        return Path.PRIMARY if self.driven else Path.STANDBY

    def _host_facts(self) -> dict[str, str]:
        """Which of the host's functions the primary is, or was last, for the operator's program."""
        facts = {"PRIMARY": self.primary_id or ""}
        if self.steering is not None:
            vf = self.steering.vf
            facts |= {"HOST": self.steering.host, "PF": vf.interface if vf else "", "VF": str(vf.number) if vf else ""}
        return facts

    # For a migration (`kvmpy.machine.departure`)

    def depart(self) -> bool:
        """Show no primary from now on; whether the guest has it, and is to be asked."""
        self.pair.hold()
        if self.primary is None:
            return False
        if self.is_hidden:
            self.pair.withdraw()
            return False
        self.is_leaving, self.was_out = True, False
        if not self.port.is_releasing:  # else it is for good
            self._returns_until = math.inf
        return True

    def ask(self) -> None:
        """Ask the guest for the primary, however often it takes."""
        self.pair.asked()
        if not self.port.is_releasing:
            self.port.request()

    def ask_again(self) -> None:
        """The guest has gone back, which ends a device_del that was under way, too: whoever asked has been told."""
        self._returns_until = math.inf
        self.ask()

    def arrive(self) -> None:
        """Show what is to be shown."""
        self.is_leaving = False
        self.pair.let_go()
        if self.pair.state is PairState.RELEASED and self.primary is not None:  # else the host has it back
            self.pair.hidden()

    def ask_no_more(self) -> None:
        """Have the guest keep the primary, if it still has it."""
        if self.primary is not None and self.pair.state is PairState.LEAVING:
            self.kept_at = None
            self.port.cancel()
            if not self.port.is_retracting:
                self.keep()

    def keep(self) -> None:
        """The guest keeps it, for which it was asked no more."""
        self.kept_at = time.monotonic()
        self.settle()
        self.pair.kept()
        self.plugged()

    def settle(self) -> None:
        """The guest has the primary again."""
        if self._returns_until == math.inf and not self.is_leaving:
            self._returns_until = time.monotonic() + LATE

    def give_up(self) -> None:
        """It does not come back."""
        self._returns_until = -math.inf

    # What the pair has us do

    def show(self) -> None:
        """Plug the primary in, when it is not being reset or prepared any more."""
        assert self.primary is not None
        primary = self.primary
        if getattr(primary.function, "is_ready", True):
            self._insert(primary)
        else:
            finish = cast("VfioPci", primary.function).finish_reset
            waiting = threading.Thread(target=self._when_ready, args=(primary, finish), daemon=True)
            try:
                waiting.start()
            except RuntimeError as e:  # "can't start new thread"
                said = f"it is being reset, and there is no thread to wait for that: {e}"
                self.post(lambda: self._not_ready(primary, said))

    def hide(self) -> None:
        """Take it out of its slot; the machine stands still."""
        self.port.unplug()

    def negotiated(self, *, primary: bool) -> None:
        """A driver has taken STANDBY."""
        self._machine.report("FAILOVER_NEGOTIATED", **{"device-id": self.standby_id})
        if not primary:
            self._warn("the guest waits for a failover primary, and there is none; give one the key failover_pair_id")

    def plugged(self) -> None:
        """The guest has taken the primary into use."""
        self._machine.report(
            "FAILOVER_PRIMARY_PLUGGED", **{"device-id": str(self.primary_id), "standby-id": self.standby_id}
        )

    def released(self) -> None:
        """It is out of its slot."""
        self._machine.report(
            "FAILOVER_PRIMARY_RELEASED", **{"device-id": str(self.primary_id), "standby-id": self.standby_id}
        )

    def failed(self, reason: str) -> None:
        """It cannot be used."""
        self._tell_failed(reason)

    def _when_ready(self, primary: Plugged, finish_reset: Callable[[], bool]) -> None:
        ready = finish_reset()
        self.post(lambda: self._insert(primary) if ready else self._not_ready(primary))

    def _not_ready(self, primary: Plugged, why: str = NOT_RESET) -> None:
        if self.primary is primary:
            self.pair.failed(str(primary.function.info().get("broken") or why))

    def _insert(self, primary: Plugged) -> None:
        if self.primary is not primary or self.pair.state is not PairState.PLUGGING or not self.is_hidden:
            return  # a reset, a migration or its end has come in between
        if primary.steering is not None and self.standby is not None:  # else it keeps what it had of the last
            primary.steering.mac = self.standby.mac
        self.port.insert(primary.function)

    def _warn(self, text: str) -> None:
        self._warnings.say(f"{self.standby_id}: {text}")

    def _tell_failed(self, reason: str) -> None:
        self._warn(f"its primary {self.primary_id}: {reason}")
        self._machine.report(
            "FAILOVER_PRIMARY_FAILED",
            **{"device-id": str(self.primary_id), "standby-id": self.standby_id, "reason": reason},
        )

    def post(self, call: Callable[[], object]) -> None:
        """Have the control thread do it, unless the machine is being closed."""
        with contextlib.suppress(RuntimeError):
            self._machine.control.post(call)


def _milliseconds(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 1)
