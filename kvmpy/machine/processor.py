"""The guest's processor: the host's, or a baseline that a fleet of hosts shares (docs/cpu-baseline.md)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import msgspec

from kvmpy.config.schema import Config
from kvmpy.errors import ConfigError, HostError, IoctlError
from kvmpy.kvm.cpuid import Leaf, guest_cpuid
from kvmpy.kvm.system import System
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm import Vm

if TYPE_CHECKING:
    from kvmpy.kvm.cpu_model import CpuDescription

KEY: Final = "machine.cpu"


def baseline(config: Config) -> CpuDescription | None:
    """The baseline that the configuration names. Raises ConfigError where its file cannot be used."""
    if config.machine.cpu.is_host:
        return None
    from kvmpy.kvm import cpu_baseline

    try:
        return cpu_baseline.read(config.machine.cpu)
    except HostError as e:
        raise ConfigError(config.place(KEY, str(e))) from e


def table(cpu: CpuDescription | None, system: System) -> Sequence[Leaf]:
    """The CPUID that the guest's is made from."""
    return system.supported_cpuid() if cpu is None else cpu.cpuid


def build_vcpus(config: Config, cpu: CpuDescription | None, vm: Vm, resources: ExitStack) -> tuple[Vcpu, ...]:
    """The vCPUs with their CPUID. Raises ConfigError for all that the host lacks of the baseline, HostError."""
    count, supported = config.machine.cpus, vm.system.supported_cpuid()
    tsc_deadline = bool(vm.system.check("KVM_CAP_TSC_DEADLINE_TIMER"))
    vcpus = []
    for index in range(count):
        vcpu = Vcpu(vm, index)
        resources.callback(vcpu.close)
        vcpu.set_cpuid(guest_cpuid(supported, index, count, tsc_deadline=tsc_deadline))
        vcpus.append(vcpu)
    if cpu is not None:
        _adopt(config, cpu, vcpus)
    return tuple(vcpus)


def _adopt(config: Config, cpu: CpuDescription, vcpus: list[Vcpu]) -> None:
    from kvmpy.kvm.cpu_baseline import NAMED
    from kvmpy.kvm.cpu_model import adopt, describe_host, differences
    from kvmpy.state import StateError

    ours = msgspec.structs.replace(cpu, tsc_khz=0)  # the guest starts here: it gets this host's
    problems = differences(ours, describe_host(vcpus[0], len(vcpus)), NAMED)
    if problems:
        raise ConfigError(*(config.place(KEY, f"{config.machine.cpu}: {problem}") for problem in problems))
    try:
        adopt(vcpus, cpu)
    except (StateError, IoctlError) as e:
        raise HostError(config.place(KEY, f"{config.machine.cpu}: {e}")) from e
