"""Flat guests: a few bytes of real-mode code at 0x1000 with a page of RAM or two, on the real kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kvmpy.abi import kvm as abi
from kvmpy.errors import HostError
from kvmpy.host.memory import Mapping
from kvmpy.kvm.exits import Exit
from kvmpy.kvm.system import System
from kvmpy.kvm.vcpu import Vcpu, accept_kicks
from kvmpy.kvm.vm import MemorySlots, Vm
from kvmpy.memory import GuestMemory, Ram
from tests.conftest import skip_or_fail

CODE = 0x1000
RAM_SIZE = 0x20_0000


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    try:
        opened = System()
        opened.require()
    except HostError as e:
        skip_or_fail("kvm", str(e))
    accept_kicks()
    with opened:
        yield opened


class FlatGuest:
    """A VM with 2 MiB of RAM and one vCPU in real mode at CODE."""

    def __init__(self, system: System, resources: ExitStack, *, irqchip: bool) -> None:
        self.vm = Vm(system)
        resources.callback(self.vm.close)
        mapping = Mapping(RAM_SIZE)
        resources.callback(mapping.close)
        self.memory = GuestMemory()
        resources.callback(self.memory.close)
        self.memory.listen(MemorySlots(self.vm))
        self.memory.add(Ram(0, RAM_SIZE, mapping))
        if irqchip:
            self.vm.create_irqchip(tss=0xFEFF_D000, identity_map=0xFEFF_C000)
        self.vcpu = Vcpu(self.vm, 0)
        resources.callback(self.vcpu.close)

    def load(self, code: bytes) -> Vcpu:
        """Put ``code`` at CODE and point the vCPU at it: real mode, flat, a stack below the code."""
        self.memory.write(CODE, code)
        sregs = self.vcpu.sregs
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base, segment.selector = 0, 0
        self.vcpu.sregs = sregs
        self.vcpu.regs = abi.Regs.new(rip=CODE, rflags=2, rsp=CODE)
        return self.vcpu


def run(vcpu: Vcpu) -> Exit:
    """Enter the guest until it exits; as what."""
    vcpu.enter()
    return vcpu.exit()


MakeGuest = Callable[..., FlatGuest]


@pytest.fixture
def make_guest(system: System) -> Iterator[MakeGuest]:
    """``make_guest(irqchip=False)``: a FlatGuest that is closed after the test."""
    with ExitStack() as resources:

        def make(*, irqchip: bool = False) -> FlatGuest:
            return FlatGuest(system, resources, irqchip=irqchip)

        yield make
