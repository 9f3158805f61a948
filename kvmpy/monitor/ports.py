"""query-root-ports: where devices can be plugged in, and what of the configuration is there to be used."""

from __future__ import annotations

from enum import Enum

from kvmpy.config.schema import Config
from kvmpy.machine.machine import Machine
from kvmpy.monitor.table import Caller, NoArguments, Reply, command


class RootPortState(Enum):
    """What goes on at a root port's slot."""

    FREE = "free"
    HIDDEN = "hidden"
    WAITING = "waiting"
    OFF = "off"
    WORKING = "working"
    ON = "on"
    ASKED = "asked"
    LEAVING = "leaving"


class RootPortInfo(Reply, frozen=True, kw_only=True, rename="kebab"):
    """A root port, and the device that has it.

    `free`: device_add can have it. `hidden`: its failover primary is not in it yet. `waiting`: its device is shown to
    the guest when that is done with the one before. `off`: the guest has not turned the slot on, or could not use the
    device. `working`: the power indicator blinks, as the guest takes the device into use or lets it go. `on`: the guest
    uses it. `asked`: device_del waits for the guest. `leaving`: the device is out of the slot, and the host is not done
    with it; DEVICE_DELETED follows.
    """

    id: str  # what a device's `bus` says
    slot: int  # its physical slot, as in the guest's /sys/bus/pci/slots
    bus: int  # the number that the guest has given the bus behind it; 0: none yet
    power_controller: bool  # the guest switches its power
    state: RootPortState  # what goes on there
    device: str | None = None  # the id of the device that has it


class SpareInfo(Reply, frozen=True, kw_only=True):
    """What `device_add` can use, by id."""

    netdevs: list[str]  # that no device uses
    drives: list[str]  # that no device uses


@command("query-root-ports", NoArguments, list[RootPortInfo], ours=True)
def query_root_ports(caller: Caller, _: NoArguments) -> list[RootPortInfo]:
    """List the root ports: which are free, and what goes on at the others."""
    return root_ports(caller.machine)


def root_ports(machine: Machine) -> list[RootPortInfo]:
    """The same, for other queries."""
    config = machine.current_config()
    hidden = {
        str(plugged.table.bus)
        for plugged in machine.board.inventory.plugged.values()
        if plugged.standby is not None and machine.board.ports[str(plugged.table.bus)].card is None
    }
    taken = {str(device.bus): str(device.id) for device in config.device if device.bus is not None}
    return [
        RootPortInfo(
            id=name,
            slot=port.slot,
            bus=port.header.secondary,
            power_controller=bool(port.express.has_power_controller),
            state=_state(port.phase.value, taken=name in taken, hidden=name in hidden),
            device=taken.get(name),
        )
        for name, port in machine.board.ports.items()
    ]


def spare(config: Config) -> SpareInfo:
    """What no device of ``config`` uses."""
    used = {str(getattr(device, key, None)) for device in config.device for key in ("netdev", "drive")}
    return SpareInfo(
        netdevs=[str(netdev.id) for netdev in config.netdev if str(netdev.id) not in used],
        drives=[str(drive.id) for drive in config.drive if str(drive.id) not in used],
    )


def _state(phase: str, *, taken: bool, hidden: bool) -> RootPortState:
    if hidden:
        return RootPortState.HIDDEN
    if phase == "empty":
        return RootPortState.LEAVING if taken else RootPortState.FREE
    return RootPortState(phase)
