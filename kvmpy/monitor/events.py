"""What the monitor tells its clients of its own accord: each event's name, fields and meaning, declared once.

The machine reports them by name (`Machine.report`); a test compares what it says with what is declared here. From the
declarations follow query-qmp-schema and docs/qmp.md. Fields of events that QEMU has are QEMU's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from kvmpy.migration.status import Status
from kvmpy.monitor.table import Reply


class Event(Reply, frozen=True, kw_only=True):
    """The data of an event; its docstring says what has happened. ``NAME`` is the event's."""

    NAME = ""
    OURS = False


class ShutdownCause(Enum):
    """Why a machine was reset, or ended."""

    GUEST_RESET = "guest-reset"
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_PANIC = "guest-panic"
    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_QMP_SYSTEM_RESET = "host-qmp-system-reset"
    HOST_SIGNAL = "host-signal"
    HOST_ERROR = "host-error"


class PanicAction(Enum):
    """What follows from a panic."""

    POWEROFF = "poweroff"


class Stop(Event, frozen=True, kw_only=True):
    """The vCPUs and devices stand still; ``timestamp`` is when the last vCPU did."""

    NAME = "STOP"


class Resume(Event, frozen=True, kw_only=True):
    """They go on; ``timestamp`` is when the first vCPU went."""

    NAME = "RESUME"


class Reset(Event, frozen=True, kw_only=True):
    """The machine has been reset."""

    NAME = "RESET"
    guest: bool  # the guest asked for it
    reason: ShutdownCause  # why


class Shutdown(Event, frozen=True, kw_only=True):
    """The machine has ended; its process follows."""

    NAME = "SHUTDOWN"
    guest: bool  # the guest did it
    reason: ShutdownCause  # why


class Powerdown(Event, frozen=True, kw_only=True):
    """The power button has been pressed."""

    NAME = "POWERDOWN"


class GuestPanicked(Event, frozen=True, kw_only=True):
    """The guest's kernel has panicked."""

    NAME = "GUEST_PANICKED"
    action: PanicAction  # what follows


class DeviceDeleted(Event, frozen=True, kw_only=True):
    """A device is unplugged, and its id free again."""

    NAME = "DEVICE_DELETED"
    device: str | None = None  # its id
    path: str  # QEMU's path of it: /machine/peripheral/ID


class DeviceUnplugGuestError(Event, frozen=True, kw_only=True):
    """The guest has refused to let go of a device, or has failed to: it stays."""

    NAME = "DEVICE_UNPLUG_GUEST_ERROR"
    device: str | None = None  # its id
    path: str  # QEMU's path of it: /machine/peripheral/ID
    reason: str | None = None  # what was seen (ours)


class DevicePlugGuestError(Event, frozen=True, kw_only=True):
    """The guest has not taken a device into use that was plugged in."""

    NAME = "DEVICE_PLUG_GUEST_ERROR"
    OURS = True
    device: str  # its id
    path: str  # as in DEVICE_DELETED
    reason: str  # what was seen


class DeviceBroken(Event, frozen=True, kw_only=True):
    """A device has stopped until its driver resets it: the guest broke its rules, or the host failed it.

    Told once a second for each device, the last always, as are both guest errors.
    """

    NAME = "DEVICE_BROKEN"
    OURS = True
    device: str  # its id
    reason: str  # what happened


class DeviceWantedBack(Event, frozen=True, kw_only=True):
    """The host waits for a passed-through function, and the guest has been asked to let the device go.

    DEVICE_DELETED follows if the guest does. Where it does not, or the device has no `bus`, whoever waits on the host
    goes on waiting: until `device_del` with `force`, or the machine's end.
    """

    NAME = "DEVICE_WANTED_BACK"
    OURS = True
    device: str  # its id
    host: str  # the function's address on the host


class FailoverNegotiated(Event, frozen=True, kw_only=True, rename="kebab"):
    """A guest's driver knows that its network device is the standby of a pair, and is about to be given the primary.

    Told once a second for each device, the last always, as are the events of primaries.
    """

    NAME = "FAILOVER_NEGOTIATED"
    device_id: str  # the standby's id


class UnplugPrimary(Event, frozen=True, kw_only=True, rename="kebab"):
    """For a migration the guest is asked to let a failover primary go; FAILOVER_PRIMARY_RELEASED says that it has."""

    NAME = "UNPLUG_PRIMARY"
    device_id: str  # the primary's id


class FailoverPrimaryPlugged(Event, frozen=True, kw_only=True, rename="kebab"):
    """The guest has a failover primary in use: one that has come, which its driver is about to find beside its standby,
    or one that it was asked for by a migration that came to nothing, and has kept.
    """

    NAME = "FAILOVER_PRIMARY_PLUGGED"
    OURS = True
    device_id: str  # the primary's id
    standby_id: str  # its standby's


class FailoverPrimaryReleased(Event, frozen=True, kw_only=True, rename="kebab"):
    """A failover primary is out of its slot, because the guest has let it go or it was taken away."""

    NAME = "FAILOVER_PRIMARY_RELEASED"
    OURS = True
    device_id: str  # the primary's id
    standby_id: str  # its standby's


class FailoverPrimaryFailed(Event, frozen=True, kw_only=True, rename="kebab"):
    """A failover primary cannot be used, or its address could not be moved: the standby goes on."""

    NAME = "FAILOVER_PRIMARY_FAILED"
    OURS = True
    device_id: str  # the primary's id
    standby_id: str  # its standby's
    reason: str  # what went wrong


class FailoverPathChanged(Event, frozen=True, kw_only=True, rename="kebab"):
    """What is sent to a pair's address reaches its other device from now on: the guest has the primary do DMA, or not.

    The network has learned of it, as far as that is the host's: the PF of a virtual function holds that to the address,
    or does not any more, bridge and NICs know whether the guest is at its tap, and if so a RARP has been sent.

    `rx-gap-ms` is how long that took, from the moment at which the guest ceased to drive its primary: what was sent to
    it meanwhile went nowhere. To the primary there is none yet: FAILOVER_PRIMARY_RECEIVES.
    """

    NAME = "FAILOVER_PATH_CHANGED"
    OURS = True
    device_id: str  # the standby's id
    path: str  # "primary" or "standby"
    rx_gap_ms: float | None = None  # to the standby: for how long frames went nowhere


class FailoverPrimaryReceives(Event, frozen=True, kw_only=True, rename="kebab"):
    """The guest has an interrupt of its primary on, as its driver does when it can take frames, once a path change.

    Since the network sends them there, for `rx-gap-ms`, they went nowhere, but for what of that time passed before the
    guest had put its primary below net_failover: until then it heard its standby.
    """

    NAME = "FAILOVER_PRIMARY_RECEIVES"
    OURS = True
    device_id: str  # the primary's id
    standby_id: str  # its standby's
    rx_gap_ms: float  # from the address's being there until now


class Migration(Event, frozen=True, kw_only=True):
    """A migration has come further; not sent where the capability `events` is off."""

    NAME = "MIGRATION"
    status: Status  # how far it is


class MigrationPass(Event, frozen=True, kw_only=True, rename={"pass_": "pass"}):
    """A pass over the pages that are dirty begins; likewise. The last, while the guest stands still, is told later."""

    NAME = "MIGRATION_PASS"
    pass_: int  # its number, from 1


class MigrationNotConverging(Event, frozen=True, kw_only=True):
    """The guest writes faster than its pages can be sent."""

    NAME = "MIGRATION_NOT_CONVERGING"
    OURS = True
    reason: str  # how fast, and what is done about it


class Traced(Event, frozen=True, kw_only=True):
    """What the tracepoints saw that this session asked for with `trace`."""

    NAME = "TRACE"
    OURS = True
    lines: list[str]  # in their order
    dropped: int  # how many came faster than they could be sent, before these


EVENTS: Final = (
    *(Stop, Resume, Reset, Shutdown, Powerdown, GuestPanicked),
    *(DeviceDeleted, DeviceUnplugGuestError, DevicePlugGuestError, DeviceBroken, DeviceWantedBack),
    *(FailoverNegotiated, UnplugPrimary, FailoverPrimaryPlugged, FailoverPrimaryReleased),
    *(FailoverPrimaryFailed, FailoverPathChanged, FailoverPrimaryReceives),
    *(Migration, MigrationPass, MigrationNotConverging),
    Traced,
)
