"""`kvmpy cpu-baseline`: what this host's processor can give a guest, and what several hosts' can."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from kvmpy.kvm import cpu_baseline
from kvmpy.kvm.cpu_model import CpuDescription, describe_host
from kvmpy.kvm.cpuid import guest_cpuid
from kvmpy.kvm.system import System
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm import Vm
from kvmpy.machine import layout


def cpu_baseline_command(args: argparse.Namespace) -> int:
    """Describe this host, or intersect the hosts in the files; to standard output, or a file."""
    if args.host:
        found = cpu_baseline.intersection([(path, cpu_baseline.read(path)) for path in args.host])
    else:
        found = this_host()
    if args.output is None:
        sys.stdout.write(cpu_baseline.text(found))
    else:
        cpu_baseline.write(args.output, found)
    return 0


def this_host() -> CpuDescription:
    """What a VM made for the purpose says. Raises HostError."""
    with ExitStack() as resources:
        system = resources.enter_context(System())
        system.require()
        vm = Vm(system)
        resources.callback(vm.close)
        vm.create_irqchip(tss=layout.TSS.base, identity_map=layout.IDENTITY_MAP.base)
        vcpu = Vcpu(vm, 0)
        resources.callback(vcpu.close)
        tsc_deadline = bool(system.check("KVM_CAP_TSC_DEADLINE_TIMER"))
        vcpu.set_cpuid(guest_cpuid(system.supported_cpuid(), 0, 1, tsc_deadline=tsc_deadline))
        return describe_host(vcpu)
