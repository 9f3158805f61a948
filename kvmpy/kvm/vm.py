"""A VM: its memory slots, its in-kernel interrupt controllers and timer, its clock."""

from __future__ import annotations

import os
import threading
from typing import Final, NamedTuple

from kvmpy.abi import kvm as abi
from kvmpy.host.eventfd import EventFd
from kvmpy.irq import MsiMessage
from kvmpy.kvm.irq import IoEventFd, Line, Routing
from kvmpy.kvm.msi import Vector
from kvmpy.kvm.system import System
from kvmpy.memory import Ram

# Each lets KVM tell of one more kind of event that a vCPU has pending.
EVENTS: Final = ("KVM_CAP_EXCEPTION_PAYLOAD", "KVM_CAP_X86_TRIPLE_FAULT_EVENT")


class Region(NamedTuple):
    """What a slot backs: [gpa, gpa+size) with host memory at ``hva``."""

    gpa: int
    size: int
    hva: int


class Vm:
    """One virtual machine of KVM. Owns its descriptor; vCPUs made from it must be closed first."""

    def __init__(self, system: System) -> None:
        """Raises IoctlError."""
        self.system = system
        self.fd = system.create_vm()
        self.routing = Routing(self.fd)
        self._slots: dict[int, Region] = {}
        self._slots_lock = threading.Lock()
        self._capabilities: dict[str, int] = {}
        self._any_length = bool(self.check("KVM_CAP_IOEVENTFD_ANY_LENGTH"))
        for name in EVENTS:
            if self.check(name):
                abi.KVM_ENABLE_CAP(self.fd, abi.EnableCap.new(cap=abi.capability(name), args=[1]))

    def check(self, name: str) -> int:
        """What KVM_CHECK_EXTENSION says of "KVM_CAP_..." for this VM."""
        if name not in self._capabilities:
            self._capabilities[name] = abi.KVM_CHECK_EXTENSION(self.fd, abi.capability(name))
        return self._capabilities[name]

    def close(self) -> None:
        """Close the descriptor; KVM frees the VM when the last vCPU's is closed too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def set_memory(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Back guest-physical [gpa, gpa+size) with host memory at ``hva``; size 0 removes the slot."""
        region = abi.UserspaceMemoryRegion.new(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva
        )
        abi.KVM_SET_USER_MEMORY_REGION(self.fd, region)

    def direct(self, gpa: int, size: int, hva: int) -> Slot:
        """Back [gpa, gpa+size) with host memory at ``hva``, by a slot of its own (`kvmpy.devices.base.Shortcuts`).

        RAM and what a device shows of its own memory are alike to KVM. Raises IoctlError, with no slot used.
        """
        with self._slots_lock:
            number = next(n for n in range(len(self._slots) + 1) if n not in self._slots)
            self.set_memory(number, gpa, size, hva)
            self._slots[number] = Region(gpa, size, hva)
        return Slot(self, number, gpa)

    def free_slot(self, number: int, gpa: int) -> None:
        """Used by Slot."""
        with self._slots_lock:
            self.set_memory(number, gpa, 0, 0)
            del self._slots[number]

    def slot_at(self, gpa: int) -> int:
        """The number of the slot that begins at ``gpa``."""
        with self._slots_lock:
            return next(number for number, region in self._slots.items() if region.gpa == gpa)

    def set_logging(self, number: int, *, enabled: bool) -> None:
        """Have KVM note which pages of a slot are written to, or not. Raises IoctlError."""
        with self._slots_lock:
            self.set_memory(number, *self._slots[number], abi.MEM_LOG_DIRTY_PAGES if enabled else 0)

    def create_irqchip(self, *, tss: int, identity_map: int) -> None:
        """PICs, IOAPIC, local APICs and PIT in the kernel, and the default routes.

        ``tss`` (three pages) and ``identity_map`` (one page) are guest-physical pages below 4 GiB that no RAM covers:
        Intel processors without unrestricted guest mode run real mode with their help.
        """
        abi.set_identity_map_addr(self.fd, identity_map)
        abi.KVM_SET_TSS_ADDR(self.fd, tss)
        abi.KVM_CREATE_IRQCHIP(self.fd)
        abi.KVM_CREATE_PIT2(self.fd, abi.PitConfig.new(flags=abi.PIT_SPEAKER_DUMMY))
        self.routing.commit()

    def line(self, gsi: int) -> Line:
        """The interrupt line of ``gsi``, for the one device that drives it."""
        return Line(self.fd, gsi)

    def vector(self) -> Vector:
        """A message-signalled interrupt for a function's use (`kvmpy.irq.MsiSink`). Raises HostError."""
        return Vector(self.fd, self.routing)

    def doorbell(self, gpa: int, event: EventFd) -> IoEventFd:
        """Let a guest's write at ``gpa`` only signal ``event`` (`kvmpy.devices.base.Doorbells`). Raises IoctlError.

        Of any width where KVM can match that, which also spares it decoding the instruction; else of 2 bytes.
        """
        return IoEventFd(self.fd, gpa, 0 if self._any_length else 2, event)

    def signal_msi(self, message: MsiMessage) -> None:
        """Deliver one message-signalled interrupt now."""
        abi.KVM_SIGNAL_MSI(
            self.fd,
            abi.Msi.new(address_lo=message.address & 0xFFFF_FFFF, address_hi=message.address >> 32, data=message.data),
        )


class Slot:
    """One memory slot (a `kvmpy.devices.base.Closable`)."""

    def __init__(self, vm: Vm, number: int, gpa: int) -> None:
        self._vm, self.number, self._gpa = vm, number, gpa
        self._closed = False

    def close(self) -> None:
        """Take it away: when this returns no vCPU reaches that memory. Raises IoctlError; twice is allowed."""
        if not self._closed:
            self._vm.free_slot(self.number, self._gpa)
            self._closed = True


class MemorySlots:
    """Gives KVM a slot for each block of RAM (a `MemoryListener`)."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._slots: dict[Ram, Slot] = {}

    def ram_added(self, block: Ram) -> None:
        """Raises IoctlError where KVM refuses, with no slot used."""
        self._slots[block] = self._vm.direct(block.gpa, block.size, block.hva)

    def ram_removed(self, block: Ram) -> None:
        """Take the block's slot away."""
        self._slots.pop(block).close()
