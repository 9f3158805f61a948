"""Commands that plug devices in and pull them out, and that concern network devices."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from kvmpy.config.schema import Tap, VfioPci, VirtioBlkPci, VirtioNetPci, VirtioRngPci, VirtioSerialPci
from kvmpy.machine.announce import Rounds
from kvmpy.monitor.table import Arguments, Caller, Nothing, command, table_command

Milliseconds = Annotated[int, Meta(ge=0, le=100_000)]


class DeviceDel(Arguments, frozen=True, kw_only=True):
    """Which device is to leave, and whether the guest is asked."""

    id: str  # the device's id
    force: bool = False  # pull it without asking the guest, a surprise removal (ours)


class NetdevDel(Arguments, frozen=True, kw_only=True):
    """Which netdev is to go."""

    id: str  # the netdev's id


class SetLink(Arguments, frozen=True, kw_only=True):
    """Which cable, and whether it is plugged in."""

    name: str  # the network device's id, or its netdev's
    up: bool  # it is plugged in


class AnnounceSelf(Arguments, frozen=True, kw_only=True):
    """When, and which devices."""

    initial: Milliseconds  # milliseconds between the first round and the second
    max: Milliseconds  # the longest wait between two rounds
    rounds: Annotated[int, Meta(ge=0, le=1000)]  # how many times; 0 ends what goes on under the same id
    step: Milliseconds  # how much longer each wait is than the one before
    interfaces: Annotated[list[str], Meta(max_length=1000)] | None = None  # network devices by id; default: all
    id: str = ""  # a name for this announcement: another with that name replaces it


@table_command("device_add", VirtioNetPci, VfioPci, VirtioBlkPci, VirtioRngPci, VirtioSerialPci)
def device_add(caller: Caller, table: dict[str, Any]) -> Nothing:
    """Plug a device into a free root port, as the table `[[device]]` would: the keys are the same.

    The reply says that the device is in its slot. The guest takes a moment to find it there.
    """
    caller.machine.device_add(table)
    return Nothing()


@command("device_del", DeviceDel, Nothing, slow=True)
def device_del(caller: Caller, arguments: DeviceDel) -> Nothing:
    """Ask the guest to let go of a device that is on a root port. DEVICE_DELETED says that it has, and is unplugged.

    With `force` too the reply comes before that: wait for DEVICE_DELETED until the host has back what the device used.
    """
    caller.machine.device_del(arguments.id, force=arguments.force)
    return Nothing()


@table_command("netdev_add", Tap)
def netdev_add(caller: Caller, table: dict[str, Any]) -> Nothing:
    """Make a netdev, for a device that is to come, as the table `[[netdev]]` would: the keys are the same."""
    caller.machine.netdev_add(table)
    return Nothing()


@command("netdev_del", NetdevDel, Nothing, slow=True)
def netdev_del(caller: Caller, arguments: NetdevDel) -> Nothing:
    """Take a netdev away that no device uses."""
    caller.machine.netdev_del(arguments.id)
    return Nothing()


@command("set_link", SetLink, Nothing)
def set_link(caller: Caller, arguments: SetLink) -> Nothing:
    """Plug a network device's cable in, or pull it."""
    caller.machine.set_link(arguments.name, up=arguments.up)
    return Nothing()


@command("announce-self", AnnounceSelf, Nothing)
def announce_self(caller: Caller, arguments: AnnounceSelf) -> Nothing:
    """Have the network learn where the guest is now.

    Each round sends a frame (RARP) of each network device into its network as if the guest had, and asks the guest to
    speak itself where its driver can. Devices that are passed through are the guest's own affair.
    """
    a = arguments
    caller.machine.announce(Rounds(a.initial, a.max, a.rounds, a.step), nics=a.interfaces, id=a.id)
    return Nothing()
