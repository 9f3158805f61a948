"""Commands that ask what the machine is and does."""

from __future__ import annotations

import os
from typing import Any

from kvmpy import __version__
from kvmpy.config.writer import tables
from kvmpy.machine.runstate import RunState
from kvmpy.monitor.failover import FailoverInfo, failover_pairs
from kvmpy.monitor.ports import RootPortInfo, SpareInfo, root_ports, spare
from kvmpy.monitor.table import Caller, NoArguments, Reply, command


class VersionTriple(Reply, frozen=True, kw_only=True):
    """Three numbers."""

    major: int  # the first
    minor: int  # the second
    micro: int  # the third


class VersionInfo(Reply, frozen=True, kw_only=True):
    """QMP's version block."""

    qemu: VersionTriple  # the QEMU whose words these are: what clients look at to know what there may be
    package: str  # who we are: kvmpy and its version


class CommandInfo(Reply, frozen=True, kw_only=True):
    """A command's name."""

    name: str  # what `execute` says


class NameInfo(Reply, frozen=True, kw_only=True):
    """The machine's name."""

    name: str  # that of the configuration, or what `kvmpy run --name` said


class StatusInfo(Reply, frozen=True, kw_only=True):
    """What the machine is doing."""

    running: bool  # the vCPUs run
    status: RunState  # what it is doing, in QEMU's words


class CpuInfoFast(Reply, frozen=True, kw_only=True, rename="kebab"):
    """A vCPU."""

    cpu_index: int  # its number, from 0
    qom_path: str  # a name for it that QEMU's clients compare
    thread_id: int  # the host's thread, such as for taskset
    target: str  # x86_64


class KvmInfo(Reply, frozen=True, kw_only=True):
    """Whether KVM runs the guest."""

    enabled: bool  # always
    present: bool  # always


class Exits(Reply, frozen=True, kw_only=True):
    """How often the vCPUs have left the guest since the start."""

    pio: int  # for a port
    mmio: int  # for an address without memory
    other: int  # for anything else


class ConfigInfo(Reply, frozen=True, kw_only=True):
    """The configuration as it would be written now."""

    config: dict[str, Any]  # the keys of the file, with absolute paths, and what was hot-plugged since the start


class MachineInfo(Reply, frozen=True, kw_only=True, rename="kebab"):
    """What `kvmpy status` shows."""

    name: str  # the machine's name
    pid: int  # kvmpy's process
    status: RunState  # as in query-status
    cpus: int  # how many vCPUs
    memory: int  # bytes of RAM
    kernel: str  # what was booted
    serial: str  # where the serial line ends
    power_button_enabled: bool  # the guest listens to its power button
    exits: Exits  # how often the vCPUs have left the guest
    devices: list[dict[str, Any]]  # those of the configuration: id, driver, PCI address, and what each says of itself
    root_ports: list[RootPortInfo]  # as in query-root-ports
    failover: list[FailoverInfo]  # as in query-failover
    spare: SpareInfo  # what of the configuration no device uses
    device_faults: int  # how often a device's code has failed


def version() -> VersionInfo:
    """What the greeting has, too."""
    return VersionInfo(qemu=VersionTriple(major=10, minor=0, micro=0), package=f"kvmpy {__version__}")


@command("query-version", NoArguments, VersionInfo)
def query_version(caller: Caller, _: NoArguments) -> VersionInfo:
    """Say which version this is."""
    return version()


@command("query-commands", NoArguments, list[CommandInfo])
def query_commands(caller: Caller, _: NoArguments) -> list[CommandInfo]:
    """List all commands."""
    return [CommandInfo(name=name) for name in sorted(caller.commands)]


@command("query-name", NoArguments, NameInfo)
def query_name(caller: Caller, _: NoArguments) -> NameInfo:
    """Say the machine's name."""
    return NameInfo(name=caller.machine.name)


@command("query-status", NoArguments, StatusInfo)
def query_status(caller: Caller, _: NoArguments) -> StatusInfo:
    """Say whether the machine runs."""
    return StatusInfo(running=caller.machine.state is RunState.RUNNING, status=caller.machine.state)


@command("query-cpus-fast", NoArguments, list[CpuInfoFast])
def query_cpus_fast(caller: Caller, _: NoArguments) -> list[CpuInfoFast]:
    """List the vCPUs and their threads."""
    return [
        CpuInfoFast(
            cpu_index=thread.vcpu.index,
            qom_path=f"/machine/cpu[{thread.vcpu.index}]",
            thread_id=thread.native_id or 0,
            target="x86_64",
        )
        for thread in caller.machine.threads
    ]


@command("query-kvm", NoArguments, KvmInfo)
def query_kvm(caller: Caller, _: NoArguments) -> KvmInfo:
    """Say that KVM runs the guest: there is no other way here."""
    return KvmInfo(enabled=True, present=True)


@command("query-machine", NoArguments, MachineInfo, ours=True)
def query_machine(caller: Caller, _: NoArguments) -> MachineInfo:
    """Say what `kvmpy status` shows."""
    machine, threads = caller.machine, caller.machine.threads
    return MachineInfo(
        name=machine.name,
        pid=os.getpid(),
        status=machine.state,
        cpus=len(machine.board.vcpus),
        memory=machine.board.memory.size,
        kernel=machine.boot.description,
        serial=machine.pty or str(machine.config.console.serial),
        power_button_enabled=machine.board.acpi_pm.power_button_enabled,
        exits=Exits(
            pio=sum(thread.vcpu.pio_exits for thread in threads),
            mmio=sum(thread.vcpu.mmio_exits for thread in threads),
            other=sum(thread.other_exits for thread in threads),
        ),
        devices=_devices(caller),
        root_ports=root_ports(machine),
        failover=failover_pairs(machine),
        spare=spare(machine.current_config()),
        device_faults=sum(thread.faults for thread in threads),
    )


@command("query-config", NoArguments, ConfigInfo, ours=True)
def query_config(caller: Caller, _: NoArguments) -> ConfigInfo:
    """Say with which configuration another kvmpy would make this machine as it is now."""
    return ConfigInfo(config=tables(caller.machine.current_config()))


def _devices(caller: Caller) -> list[dict[str, Any]]:
    machine = caller.machine
    places = {f.name: f"{bus:02x}:{device:02x}.{number:x}" for bus, device, number, f in machine.board.pci.functions()}
    return [
        {"id": name, "driver": plugged.driver, "address": places.get(name), **plugged.device.info()}
        for name, plugged in machine.board.inventory.plugged.items()
    ]
