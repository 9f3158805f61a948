"""A machine's state as sections, each under a name: the machine itself, its vCPUs, what KVM has of it, its devices.

Saving, with every vCPU parked and every device paused, changes nothing. The order is that of the hardware: what a vCPU
has taken in is with the vCPU, and what it has not is with the controllers, which are read after it.

Loading is for a machine that has never run, and takes hostile input: a section of no device, one too many or one too
few is refused, as is whatever a device cannot have been. What follows is a machine that must not run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from kvmpy.errors import IncompatibleError
from kvmpy.kvm import tsc, vcpu_state, vm_state
from kvmpy.kvm.vcpu_registers import VcpuRegisters
from kvmpy.kvm.vm_state import VmState
from kvmpy.machine.machine import Machine
from kvmpy.migration.messages import Frame, Message, Section, Sections, TooMuchError, decode
from kvmpy.migration.wire import NEWEST
from kvmpy.state import State, StateError, load, save, u64

States = dict[str, dict[str, Any]]
MACHINE = "machine"
VM = "vm"
REHEARSALS: Final = 3
"""The first is slow, and of the others one may meet with a host that is busy otherwise: the shortest counts."""


class MachineState(State):
    """What is of no part of it: whether it runs where it goes, and when it stopped (CLOCK_REALTIME, in ns)."""

    NAME = "machine"
    running: bool = True
    stopped_ns: u64 = 0


def save_machine(machine: Machine, state: MachineState) -> States:
    """All of ``machine``, which stands still, by name and in the order to load it. Raises HostError."""
    vcpus = {_vcpu(index): save(vcpu_state.save(vcpu)) for index, vcpu in enumerate(machine.board.vcpus)}
    vm = {VM: save(vm_state.save_vm(machine.board.vm))}
    return {MACHINE: save(state)} | vcpus | vm | save_devices(machine)


def save_devices(machine: Machine) -> States:
    """Every device by its name, in the order in which they are loaded."""
    found = {}
    for device in machine.board.moving:
        with device.lock:
            found[str(device.name)] = save(device.state)
    return found


def load_machine(machine: Machine, sections: Mapping[str, Mapping[str, Any]]) -> MachineState:
    """Go on where ``sections`` stopped. Raises StateError, IncompatibleError or HostError."""
    check_names(machine, sections)
    board = machine.board
    state = load(MachineState, sections[MACHINE])
    registers = [load(VcpuRegisters, sections[_vcpu(index)]) for index in range(len(board.vcpus))]
    vm = load(VmState, sections[VM])
    for vcpu, each in zip(board.vcpus, registers, strict=True):
        vcpu_state.load(vcpu, each)
    tsc.load_tsc(board.vcpus, registers)
    vm_state.load_interrupts(board.vm, vm.interrupts)
    load_devices(machine, sections)
    for device in machine.board.moving:
        device.advance(max(0, time.time_ns() - state.stopped_ns))
    vm_state.load_clock(board.vm, vm.clock)
    return state


def load_devices(machine: Machine, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Every device's state, in their order, and then all routes of their interrupts at once. Raises StateError."""
    with machine.board.vm.routing.batch():
        for device in machine.board.moving:
            with device.lock:
                try:
                    device.state = load(type(device.state), sections[device.name])
                    device.post_load()
                except StateError as e:
                    raise StateError(f"device {device.name}: {e}") from e


def frames(states: States, version: int = NEWEST) -> list[Frame]:
    """One of all of them where that has room, and the other side knows of it; else one each. Raises MigrationError."""
    sections = tuple(Section(device=name, section=each) for name, each in states.items())
    if version >= Sections.SINCE:
        with suppress(TooMuchError):
            return [Frame.of(Sections(sections=sections), version)]
    return [Frame.of(each, version) for each in sections]


def states_in(message: Message) -> tuple[Section, ...]:
    """Those that came in a frame."""
    assert isinstance(message, Section | Sections)
    return (message,) if isinstance(message, Section) else message.sections


def rehearse(machine: Machine) -> int:
    """Load into ``machine``, which has never run, what it saves itself: it is as it was then, and what is done for the
    first time takes longer. Returns how long it takes after that, from the frames on, in ns. Raises as `load_machine`.
    """
    took = []
    for _ in range(REHEARSALS):
        sections = save_machine(machine, MachineState(stopped_ns=time.time_ns()))
        came = frames(sections)
        start = time.monotonic_ns()
        states = [each for frame in came for each in states_in(decode(*frame))]
        load_machine(machine, {each.device: each.section for each in states})
        took.append(time.monotonic_ns() - start)
    return min(took)


def check_names(machine: Machine, sections: Mapping[str, object]) -> None:
    """Raises IncompatibleError unless there is a section for each part of the machine, and no other."""
    own = [MACHINE, *(_vcpu(index) for index in range(len(machine.board.vcpus))), VM]
    own += [str(device.name) for device in machine.board.moving]
    missing = [f"there is no state of {name}" for name in own if name not in sections]
    surplus = [
        f"there is a state of {name[:200]!r}, which this machine does not have" for name in sections.keys() - own
    ]
    if missing or surplus:
        raise IncompatibleError(*missing, *sorted(surplus))


def _vcpu(index: int) -> str:
    return f"vcpu{index}"
