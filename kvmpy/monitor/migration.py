"""Commands that move the machine to another kvmpy, and say how that goes."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvmpy.errors import CommandError
from kvmpy.migration.descriptor import NOTHING, Offer
from kvmpy.migration.parameters import (
    CAPABILITIES,
    Capability,
    Compression,
    Directory,
    Milliseconds,
    Natural,
    OnNoConvergence,
    OnUnplugTimeout,
    Parameters,
    Percentage,
    PrepareMilliseconds,
    Primaries,
    UnplugMilliseconds,
)
from kvmpy.migration.status import Status
from kvmpy.monitor.table import Arguments, Caller, NoArguments, Nothing, Reply, command

Uri = Annotated[str, Meta(max_length=8192)]


class Migrate(Arguments, frozen=True, kw_only=True):
    """Where to."""

    uri: Uri  # tcp:HOST:PORT, unix:PATH, fd:NAME, exec:COMMAND or file:PATH[,offset=N]
    detach: bool = False  # ignored, as QEMU does: the reply comes at once
    resume: bool = False  # refused: there is nothing to resume


class MigrateIncoming(Arguments, frozen=True, kw_only=True):
    """Where from."""

    uri: Uri  # as in migrate


class MigrateCheck(Arguments, frozen=True, kw_only=True):
    """Where to."""

    uri: Uri | None = None  # as in migrate; without it this side alone is asked


class MigrationCheck(Reply, frozen=True, kw_only=True):
    """What a migration would meet with."""

    problems: list[str]  # why it would be refused, by either side; empty: it would not
    warnings: list[str]  # what differs and does no harm until the guest is reset


class MigrationPhase(Reply, frozen=True, kw_only=True, rename="kebab"):
    """A part of it."""

    name: str  # what was done
    start_ms: float  # milliseconds after the migration's begin
    ms: float  # how long


class MigrationRound(Reply, frozen=True, kw_only=True, rename="kebab"):
    """One pass over the pages that were dirty."""

    number: int  # from 1
    start_ms: float  # milliseconds after the migration's begin
    pages: int  # pages sent
    zero_pages: int  # of those, pages that were zero and took next to nothing
    bytes: int  # bytes sent
    ms: float  # how long
    dirty_rate: float  # pages a second that the guest had written before


class MigrationPrepared(Reply, frozen=True, kw_only=True, rename="kebab"):
    """A failover primary of the destination that is reset, with the guest's memory mapped for it, or cannot be used."""

    device_id: str  # its id
    ms: float  # how long that took
    problem: str  # why it cannot be used; empty if it can


class MigrationSide(Reply, frozen=True, kw_only=True, rename="kebab"):
    """What the other side says."""

    phases: list[MigrationPhase]  # what it did
    first_run_ns: int | None = None  # when the guest ran there, in nanoseconds of CLOCK_REALTIME
    first_run_ms: float | None = None  # the same, in milliseconds after the migration's begin


class MigrationStats(Reply, frozen=True, kw_only=True, rename="kebab"):
    """What has become of the guest's RAM."""

    transferred: int  # bytes sent, or received
    remaining: int  # bytes that are dirty now
    total: int  # bytes of RAM
    duplicate: int  # zero pages
    skipped: int = 0  # always 0
    normal: int  # other pages
    normal_bytes: int  # bytes of those
    dirty_pages_rate: int  # pages a second that the guest writes
    mbps: float  # megabits a second in the last round
    dirty_sync_count: int  # rounds
    postcopy_requests: int  # always 0
    page_size: int  # 4096
    multifd_bytes: int  # bytes on page channels
    pages_per_second: int  # in the last round
    precopy_bytes: int  # bytes while the guest ran
    downtime_bytes: int  # bytes while it stood still
    postcopy_bytes: int  # always 0
    dirty_sync_missed_zero_copy: int  # always 0


class MigrationInfo(Reply, frozen=True, kw_only=True, rename="kebab"):
    """The migration that goes on, or the last there was; empty where there was none."""

    status: Status | None = None  # how far it is
    ram: MigrationStats | None = None  # what has become of the guest's RAM
    total_time: int | None = None  # milliseconds since the begin, or until the end
    setup_time: int | None = None  # milliseconds until the first round
    expected_downtime: int | None = None  # milliseconds that the guest would stand still now
    downtime: int | None = None  # milliseconds that it stood still
    cpu_throttle_percentage: int | None = None  # how much its vCPUs sleep
    error_desc: str | None = None  # why it came to nothing
    blocked_reasons: list[str] | None = None  # why the machine cannot be migrated now
    blackout_ms: float | None = None  # from the last instruction here to the first one there (ours)
    stopped_ms: float | None = None  # when the last vCPU stopped, after the begin (ours)
    stopped_ns: int | None = None  # the same, in nanoseconds of CLOCK_REALTIME (ours)
    problems: list[str] | None = None  # each reason of a refusal (ours)
    warnings: list[str] | None = None  # what differs, or is lacking, and is no reason to stay (ours)
    primaries: list[str] | None = None  # what became of failover primaries, where the guest stays here (ours)
    preparing: bool | None = None  # the destination is still preparing failover primaries (ours)
    prepared: list[MigrationPrepared] | None = None  # those that it has prepared, or cannot (ours)
    not_converging: str | None = None  # the guest writes too fast, and what is done about it (ours)
    phases: list[MigrationPhase] | None = None  # what was done when (ours)
    rounds: list[MigrationRound] | None = None  # passes over the dirty pages (ours)
    destination: MigrationSide | None = None  # what that says (ours)
    source: MigrationSide | None = None  # likewise, at the destination (ours)


class SetParameters(Arguments, frozen=True, kw_only=True, rename="kebab"):
    """What is to change. What is left out stays."""

    announce_initial: Milliseconds | None = None  # milliseconds between the first announcement and the second
    announce_max: Milliseconds | None = None  # the longest wait between two
    announce_rounds: Annotated[int, Meta(ge=0, le=1000)] | None = None  # how many
    announce_step: Milliseconds | None = None  # how much longer each wait is than the one before
    cpu_throttle_initial: Percentage | None = None  # how much vCPUs sleep at first
    cpu_throttle_increment: Percentage | None = None  # how much more each time
    max_cpu_throttle: Percentage | None = None  # how much at most
    tls_creds: Directory | None = None  # the directory with certificates and keys
    tls_hostname: Directory | None = None  # what the destination's certificate must name
    max_bandwidth: Natural | None = None  # bytes a second; 0: no limit
    downtime_limit: Annotated[int, Meta(ge=0, le=2_000_000)] | None = None  # milliseconds
    multifd_channels: Annotated[int, Meta(ge=1, le=64)] | None = None  # connections for pages
    multifd_compression: Compression | None = None  # how pages are sent
    x_on_no_convergence: OnNoConvergence | None = None  # what is done where the guest writes too fast (ours)
    x_checksum: bool | None = None  # compare all RAM at the switchover (ours)
    x_timeout: Annotated[float, Meta(gt=0, le=3600)] | None = None  # seconds for any answer (ours)
    x_insecure: bool | None = None  # let tcp be used without TLS (ours)
    x_unplug_timeout: UnplugMilliseconds | None = None  # milliseconds for the guest to let its primaries go (ours)
    x_on_unplug_timeout: OnUnplugTimeout | None = None  # what is done where it does not (ours)
    x_primaries: Primaries | None = None  # whether the destination must have one for it (ours)
    x_prepare_timeout: PrepareMilliseconds | None = None  # milliseconds that the destination's may be waited for (ours)
    x_release_primaries: bool | None = None  # free them here once the guest runs there (ours)


class CapabilityStatus(Arguments, frozen=True, kw_only=True):
    """A capability, and whether it is on."""

    capability: Capability  # which
    state: bool  # it is on


class SetCapabilities(Arguments, frozen=True, kw_only=True):
    """Which are to be on, and which off. What is left out stays."""

    capabilities: Annotated[list[CapabilityStatus], Meta(max_length=64)]  # the changes


class MigrationCapabilityStatus(Reply, frozen=True, kw_only=True):
    """A capability, and whether it is on."""

    capability: Capability  # which
    state: bool  # it is on


class MigrationParameters(Reply, frozen=True, kw_only=True, rename="kebab"):
    """All parameters as they are."""

    announce_initial: int  # as in migrate-set-parameters, and so on
    announce_max: int  # milliseconds
    announce_rounds: int  # how many
    announce_step: int  # milliseconds
    cpu_throttle_initial: int  # percentage
    cpu_throttle_increment: int  # percentage
    max_cpu_throttle: int  # percentage
    tls_creds: str  # a directory
    tls_hostname: str  # a name
    max_bandwidth: int  # bytes a second; 0: no limit
    downtime_limit: int  # milliseconds
    multifd_channels: int  # connections
    multifd_compression: Compression  # how pages are sent
    x_on_no_convergence: OnNoConvergence  # what is done where the guest writes too fast (ours)
    x_checksum: bool  # all RAM is compared at the switchover (ours)
    x_timeout: float  # seconds (ours)
    x_insecure: bool  # tcp without TLS is allowed (ours)
    x_unplug_timeout: int  # milliseconds (ours)
    x_on_unplug_timeout: OnUnplugTimeout  # what is done where the guest does not let its primaries go (ours)
    x_primaries: Primaries  # whether the destination must have one for it (ours)
    x_prepare_timeout: int  # milliseconds (ours)
    x_release_primaries: bool  # they are freed here once the guest runs there (ours)


@command("migrate", Migrate, Nothing, slow=True)
def migrate(caller: Caller, arguments: Migrate) -> Nothing:
    """Begin to move the machine to another kvmpy, which waits for it (`kvmpy run --incoming`).

    MIGRATION events and `query-migrate` say what comes of it. Whatever fails before the hand-over, the guest goes on
    here. Once it is over the machine is `postmigrate`: `quit` ends it, and `cont` needs `force`.
    """
    if arguments.resume:
        raise CommandError("Cannot resume: there is no postcopy migration that was paused")
    caller.migrations().migrate(arguments.uri, _taken(caller, arguments.uri))
    return Nothing()


@command("migrate-incoming", MigrateIncoming, Nothing, slow=True)
def migrate_incoming(caller: Caller, arguments: MigrateIncoming) -> Nothing:
    """Have a machine that was started with `--incoming defer` wait for the one that comes."""
    caller.migrations().incoming(arguments.uri, _taken(caller, arguments.uri))
    return Nothing()


@command("migrate_cancel", NoArguments, Nothing)
def migrate_cancel(caller: Caller, _: NoArguments) -> Nothing:
    """End the migration that goes on: the guest goes on here. Nothing happens if there is none.

    The reply comes at once, and the MIGRATION event `cancelled` when all is as before. Refused once the guest has been
    handed over.
    """
    if (migrations := caller.migrations_if_any()) is not None:
        migrations.cancel()
    return Nothing()


@command("query-migrate", NoArguments, MigrationInfo)
def query_migrate(caller: Caller, _: NoArguments) -> MigrationInfo:
    """Say how far the migration is, or how the last one ended."""
    migrations = caller.migrations_if_any()
    info = MigrationInfo() if migrations is None else msgspec.convert(migrations.progress.info(), MigrationInfo)
    if reasons := caller.machine.handoff.blockers():
        return msgspec.structs.replace(info, blocked_reasons=reasons)
    return info


@command("x-migrate-check", MigrateCheck, MigrationCheck, ours=True, slow=True)
def migrate_check(caller: Caller, arguments: MigrateCheck) -> MigrationCheck:
    """Say whether the machine could be moved there now: everything that either side would refuse it for.

    The destination goes on waiting. A file or a command cannot be asked.
    """
    if arguments.uri is None:
        return MigrationCheck(problems=caller.machine.handoff.blockers(), warnings=[])
    findings = caller.migrations().check(arguments.uri, _taken(caller, arguments.uri))
    return MigrationCheck(problems=findings.problems, warnings=findings.warnings)


@command("migrate-set-parameters", SetParameters, Nothing, slow=True)
def migrate_set_parameters(caller: Caller, arguments: SetParameters) -> Nothing:
    """Change how migrations go: bandwidth, downtime and throttling also of the one that goes on."""
    changes = {name: value for name, value in msgspec.structs.asdict(arguments).items() if value is not None}
    caller.migrations().set_parameters(**changes)
    return Nothing()


@command("query-migrate-parameters", NoArguments, MigrationParameters)
def query_migrate_parameters(caller: Caller, _: NoArguments) -> MigrationParameters:
    """Say how migrations go."""
    migrations = caller.migrations_if_any()
    parameters = Parameters() if migrations is None else migrations.parameters
    return MigrationParameters(**msgspec.structs.asdict(parameters))


@command("migrate-set-capabilities", SetCapabilities, Nothing, slow=True)
def migrate_set_capabilities(caller: Caller, arguments: SetCapabilities) -> Nothing:
    """Turn capabilities on and off, while nothing is being migrated."""
    for each in arguments.capabilities:
        caller.migrations().set_capability(each.capability, state=each.state)
    return Nothing()


@command("query-migrate-capabilities", NoArguments, list[MigrationCapabilityStatus])
def query_migrate_capabilities(caller: Caller, _: NoArguments) -> list[MigrationCapabilityStatus]:
    """Say which capabilities are on."""
    migrations = caller.migrations_if_any()
    capabilities = CAPABILITIES if migrations is None else migrations.capabilities
    return [MigrationCapabilityStatus(capability=each, state=state) for each, state in capabilities.items()]


def _taken(caller: Caller, uri: str) -> Offer:
    """The descriptor that a migration needs: it is the migration's from now on, even if the session ends.

    Raises CommandError where the session has no such.
    """
    kind, _, name = uri.partition(":")
    if kind != "fd" or name.isdecimal():
        return NOTHING
    try:
        return Offer(caller.descriptors.take(name))
    except KeyError as e:
        raise CommandError(f"File descriptor named '{name}' has not been found") from e
