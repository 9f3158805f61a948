"""A vCPU: its registers, and KVM_RUN.

A pending access. After an exit for IN or MMIO read KVM finishes the instruction only when KVM_RUN is entered again, so
before registers are read or set, `complete` enters it once with immediate_exit: the access is finished, no further
instruction runs. Whoever parks a vCPU does that first.

A kick. Another thread sets immediate_exit, then sends the no-op signal. Either KVM_RUN has not been entered, and
returns -EINTR at once, or it is interrupted. The vCPU's own thread clears immediate_exit before it looks at what is
asked of it, so a kick is never lost.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any, Final

from kvmpy._native import ffi, lib
from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.kvm.exits import (
    Exit,
    FailEntry,
    Halted,
    InternalError,
    Interrupted,
    MmioRead,
    MmioWrite,
    PioRead,
    PioWrite,
    TripleFault,
    Unknown,
)
from kvmpy.kvm.system import read_msrs
from kvmpy.kvm.vm import Vm

KICK_SIGNAL: Final[int] = lib.kvmpy_kick_signal()
EXIT_IO: Final[int] = lib.KVM_EXIT_IO
EXIT_HLT: Final[int] = lib.KVM_EXIT_HLT
EXIT_INTR: Final[int] = lib.KVM_EXIT_INTR
EXIT_IRQ_WINDOW_OPEN: Final[int] = lib.KVM_EXIT_IRQ_WINDOW_OPEN
EXIT_SHUTDOWN: Final[int] = lib.KVM_EXIT_SHUTDOWN
EXIT_FAIL_ENTRY: Final[int] = lib.KVM_EXIT_FAIL_ENTRY
EXIT_INTERNAL_ERROR: Final[int] = lib.KVM_EXIT_INTERNAL_ERROR
IO_IN: Final[int] = lib.KVM_EXIT_IO_IN
RARE: Final[int] = lib.KVMPY_RARE
PIO_WRITE: Final[int] = lib.KVMPY_PIO_WRITE
PIO_READ: Final[int] = lib.KVMPY_PIO_READ
MMIO_WRITE: Final[int] = lib.KVMPY_MMIO_WRITE
MMIO_READ: Final[int] = lib.KVMPY_MMIO_READ
INTERRUPTED: Final[int] = lib.KVMPY_INTERRUPTED
# How struct kvmpy_vcpu begins: kind, size, addr, value. tests/unit/test_abi.py holds it against the compiler.
ACCESS: Final = struct.Struct("=IIQQ")
ALL_ONES: Final = (1 << 64) - 1
NESTS: Final = {0x1: 1 << 5, 0x8000_0001: 1 << 2}  # VMX and SVM: the bit of ECX in which leaf of CPUID

_run = lib.kvmpy_run


class Vcpu:
    """vCPU ``index`` of ``vm``, with APIC id ``index``. `run` is for its own thread; `kick` for any."""

    def __init__(self, vm: Vm, index: int) -> None:
        """Raises IoctlError; EEXIST and EINVAL mean an index in use or beyond KVM's limit."""
        self.index = index
        self.vm = vm
        self.cpuid: list[dict[str, int]] = []
        self.can_nest = False  # whether the guest is told of VMX or SVM, and so can have guests of its own
        self.msr_limit: frozenset[int] | None = None  # where the guest may go next may have no more
        self.msrs: list[int] | None = None  # those that are saved, once that is known: CPUID has decided it
        self.fd = abi.KVM_CREATE_VCPU(vm.fd, index)
        try:
            self._mmap = mmap.mmap(self.fd, vm.system.vcpu_mmap_size)
        except BaseException:
            os.close(self.fd)
            raise
        self._shared = memoryview(self._mmap)
        self._kvm_run: Any = ffi.cast("struct kvm_run *", ffi.from_buffer(self._shared))
        self._last: Any = ffi.new("struct kvmpy_vcpu *", {"run": self._kvm_run, "fd": self.fd})
        self._access: Any = ffi.buffer(self._last, ACCESS.size)

    def close(self) -> None:
        """Close the descriptor and the shared area; closing twice is allowed."""
        if self.fd >= 0:
            self._kvm_run = self._access = None
            self._shared.release()
            self._mmap.close()
            os.close(self.fd)
            self.fd = -1

    # Running

    def answer(self, pio: Any, mmio: Any) -> None:
        """Have C answer what no device of these, each a ``struct kvmpy_bus *``, need hear of. Before the first run."""
        self._last.pio, self._last.mmio = self._buses = pio, mmio

    @property
    def pio_exits(self) -> int:
        """How many accesses of ports so far KVM_RUN has returned for. Any thread."""
        count: int = self._last.pio_exits
        return count

    @property
    def mmio_exits(self) -> int:
        """How many of memory that is not RAM."""
        count: int = self._last.mmio_exits
        return count

    def enter(self) -> tuple[int, int, int, int]:
        """Enter the guest until it needs Python: the kind of exit; of an access also its size, address and value.

        Ints and no object, because every access of the guest's comes through here. With `INTERRUPTED` something may be
        asked of the thread; of a `RARE` one `exit` says more. Raises IoctlError where KVM_RUN itself fails.
        """
        if result := _run(self._last):
            raise IoctlError("KVM_RUN", -result)
        access: tuple[int, int, int, int] = ACCESS.unpack_from(self._access)
        return access

    def reply(self, value: int) -> None:
        """Answer the read that `enter` returned: a little-endian int, of which KVM takes the access's size."""
        self._last.value = value & ALL_ONES

    def reply_all(self, values: Sequence[int]) -> None:
        """Answer the reads of an `Exit` with ``repeat``, each an int that fits its size."""
        io = self._kvm_run.io
        data = b"".join([value.to_bytes(io.size, "little") for value in values])
        self._mmap[io.data_offset : io.data_offset + len(data)] = data

    def reply_ones(self) -> None:
        """Answer whatever reads the last exit was with all ones. KVM does not look at what a write is answered."""
        self._last.value = ALL_ONES
        if self._kvm_run.exit_reason == EXIT_IO:
            at, size = self._kvm_run.io.data_offset, self._kvm_run.io.size * self._kvm_run.io.count
            self._mmap[at : at + size] = b"\xff" * size

    def exit(self) -> Exit:
        """What the last exit was, of whatever kind, by its name."""
        kind, size, addr, value = ACCESS.unpack_from(self._access)
        if kind == PIO_WRITE:
            return PioWrite(addr, size, (value,))
        if kind == PIO_READ:
            return PioRead(addr, size, 1)
        if kind == MMIO_WRITE:
            return MmioWrite(addr, size, value)
        if kind == MMIO_READ:
            return MmioRead(addr, size)
        return Interrupted() if kind == INTERRUPTED else self._rare(self._kvm_run.exit_reason)

    def kick(self, thread: int) -> None:
        """Make `run`, under way or about to begin in the thread of that native id, return `Interrupted`.

        The thread may have ended.
        """
        self._kvm_run.immediate_exit = 1
        lib.kvmpy_kick(thread, KICK_SIGNAL)

    def accept(self) -> None:
        """Called by the vCPU's thread before it looks at what is asked of it: kicks up to here are heard."""
        self._kvm_run.immediate_exit = 0

    def complete(self) -> None:
        """Finish the access of the last exit without running another instruction. By the vCPU's own thread.

        Of one that KVM asks for in parts, as it does across a page, the parts to come are answered with all ones.
        """
        self._kvm_run.immediate_exit = 1
        while True:
            if result := _run(self._last):
                raise IoctlError("KVM_RUN", -result)
            if self._last.kind in (INTERRUPTED, RARE):
                return
            self.reply_ones()

    def _rare(self, reason: int) -> Exit:
        if reason == EXIT_IO:
            io = self._kvm_run.io
            if io.direction == IO_IN:
                return PioRead(io.port, io.size, io.count)
            return PioWrite(io.port, io.size, _items(self._mmap[io.data_offset :][: io.size * io.count], io.size))
        if reason in (EXIT_INTR, EXIT_IRQ_WINDOW_OPEN):
            return Interrupted()
        if reason == EXIT_HLT:
            return Halted()
        if reason == EXIT_SHUTDOWN:
            return TripleFault()
        if reason == EXIT_FAIL_ENTRY:
            entry = self._kvm_run.fail_entry
            return FailEntry(entry.hardware_entry_failure_reason, entry.cpu)
        if reason == EXIT_INTERNAL_ERROR:
            internal = self._kvm_run.internal
            return InternalError(internal.suberror, tuple(internal.data[i] for i in range(min(internal.ndata, 16))))
        return Unknown(reason)

    # Registers: the vCPU must not be running, and have completed its last access.

    @property
    def regs(self) -> abi.Regs:
        """The general registers."""
        return abi.KVM_GET_REGS(self.fd)

    @regs.setter
    def regs(self, regs: abi.Regs) -> None:
        abi.KVM_SET_REGS(self.fd, regs)

    @property
    def sregs(self) -> abi.Sregs:
        """Segments, control registers, EFER and the APIC base."""
        return abi.KVM_GET_SREGS(self.fd)

    @sregs.setter
    def sregs(self, sregs: abi.Sregs) -> None:
        abi.KVM_SET_SREGS(self.fd, sregs)

    def set_cpuid(self, table: list[dict[str, int]]) -> None:
        """What CPUID answers on this vCPU, then found in ``cpuid``; before its first run."""
        abi.KVM_SET_CPUID2(self.fd, abi.Cpuid2.new(nent=len(table), entries=table))
        self.cpuid, self.msrs = table, None
        self.can_nest = any(leaf["ecx"] & NESTS.get(leaf["function"], 0) for leaf in table)

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        """The values of those of ``indices`` that this vCPU has."""
        return read_msrs(self.fd, indices)

    def set_msrs(self, values: dict[int, int]) -> list[int]:
        """Set MSRs; returns the indices that KVM refused."""
        refused: list[int] = []
        rest = list(values.items())
        while rest:
            given = rest[: abi.MOST_MSRS]
            done = abi.KVM_SET_MSRS(self.fd, abi.new_msrs(given))
            refused += [index for index, _ in given[done : done + 1]]
            rest = rest[done + (done < len(given)) :]
        return refused

    def tell_paused(self) -> None:
        """Tell the guest's kvmclock that it was stopped, so that its watchdogs do not bark at the gap."""
        try:
            abi.KVM_KVMCLOCK_CTRL(self.fd)
        except IoctlError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTTY):  # the guest does not use kvmclock
                raise


def accept_kicks() -> None:
    """Install the no-op handler of the kick signal, once for the process."""
    result = lib.kvmpy_accept_kicks(KICK_SIGNAL)
    if result < 0:
        raise IoctlError("sigaction", -result)


def _items(data: bytes, size: int) -> tuple[int, ...]:
    return tuple([int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)])
