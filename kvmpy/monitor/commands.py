"""Every command that can be said to a running machine. Names and fields are QEMU's where QEMU has the command."""

from __future__ import annotations

from typing import Final

from kvmpy.monitor import (
    descriptors,
    devices,
    failover,
    human,
    lifecycle,
    migration,
    pci,
    ports,
    queries,
    session_commands,
)
from kvmpy.monitor.table import Command

COMMANDS: Final[dict[str, Command]] = {
    command.name: command
    for command in (
        session_commands.qmp_capabilities,
        queries.query_version,
        queries.query_commands,
        session_commands.query_qmp_schema,
        queries.query_name,
        queries.query_status,
        queries.query_cpus_fast,
        queries.query_kvm,
        queries.query_machine,
        queries.query_config,
        pci.query_pci,
        ports.query_root_ports,
        failover.query_failover,
        lifecycle.stop,
        lifecycle.cont,
        lifecycle.system_powerdown,
        lifecycle.system_reset,
        lifecycle.quit_,
        devices.device_add,
        devices.device_del,
        devices.netdev_add,
        devices.netdev_del,
        devices.set_link,
        devices.announce_self,
        migration.migrate,
        migration.migrate_incoming,
        migration.migrate_cancel,
        migration.query_migrate,
        migration.migrate_check,
        migration.migrate_set_parameters,
        migration.query_migrate_parameters,
        migration.migrate_set_capabilities,
        migration.query_migrate_capabilities,
        descriptors.getfd,
        descriptors.closefd,
        descriptors.add_fd,
        descriptors.remove_fd,
        descriptors.query_fdsets,
        human.human_monitor_command,
        session_commands.trace,
    )
}
