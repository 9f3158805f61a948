"""query-failover: the failover pairs, and what became of each one's primary."""

from __future__ import annotations

from enum import Enum

from kvmpy.devices.failover import PairState
from kvmpy.machine.machine import Machine
from kvmpy.monitor.table import Caller, NoArguments, Reply, command


class FailoverPath(Enum):
    """Which of the two the guest's frames take."""

    PRIMARY = "primary"
    STANDBY = "standby"


class FailoverInfo(Reply, frozen=True, kw_only=True, rename="kebab"):
    """A failover pair.

    `no-primary`: there is none. `waiting-for-standby`: the primary is hidden, for no device has the id that it names.
    `hidden`: the guest has not asked for it (VIRTIO_NET_F_STANDBY). `plugging`: it is in its slot, and the guest has
    not turned that on yet. `plugged`: the guest uses it. `unplug-requested`: the guest has been asked to let it go.
    `released`: it is out of its slot, and the host is not done with it. `failed`: `error` says what with.
    """

    standby_id: str  # the id that the primary names
    standby: bool  # there is such a device
    negotiated: bool  # its driver in the guest knows of pairs
    primary_id: str | None = None  # the primary's id
    state: PairState  # what becomes of the primary
    path: FailoverPath  # the primary while the guest has it do DMA
    standby_mac: str | None = None  # the pair's address
    primary_mac: str | None = None  # the address that the primary has now; none while nobody drives a VF
    error: str | None = None  # why the primary could not be used, or given back, last
    network_error: str | None = None  # what around the standby could not be told of the path: bridge, NICs, or the hook
    standby_rx_frames: int | None = None  # frames that the host has sent to the standby, whoever they were for
    standby_tx_frames: int | None = None  # frames that came from it: the guest's, and kvmpy's announcements
    rx_gap_ms: float | None = None  # of the last change of the path: for how long frames went nowhere, once it is known


@command("query-failover", NoArguments, list[FailoverInfo], ours=True)
def query_failover(caller: Caller, _: NoArguments) -> list[FailoverInfo]:
    """List the failover pairs: their devices, how far each primary is, and which way frames go."""
    return failover_pairs(caller.machine)


def failover_pairs(machine: Machine) -> list[FailoverInfo]:
    """The same, for other queries."""
    return [
        FailoverInfo(**{**facts._asdict(), "path": FailoverPath(facts.path)})  # the fields' names are the same
        for facts in machine.pairs
    ]
