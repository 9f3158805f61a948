"""What KVM_RUN returns, typed: one small class for each kind of exit, so that a `match` over them is checked.

msgspec makes and matches them several times as fast as a NamedTuple, and every exit makes one.
"""

from __future__ import annotations

from msgspec import Struct


class PioWrite(Struct, frozen=True, gc=False):
    """OUT or OUTS: ``values`` in order, each ``size`` (1, 2 or 4) bytes."""

    port: int
    size: int
    values: tuple[int, ...]


class PioRead(Struct, frozen=True, gc=False):
    """IN or INS: ``repeat`` reads of ``size`` bytes; answer with one int, the first read lowest."""

    port: int
    size: int
    repeat: int


class MmioWrite(Struct, frozen=True, gc=False):
    """A store to no RAM: ``size`` is 1 to 8 bytes."""

    gpa: int
    size: int
    value: int


class MmioRead(Struct, frozen=True, gc=False):
    """A load from no RAM: ``size`` is 1 to 8 bytes; answer with an int."""

    gpa: int
    size: int


class Interrupted(Struct, frozen=True, gc=False):
    """A kick, or a signal: look at what is asked, then run again."""


class Halted(Struct, frozen=True, gc=False):
    """HLT, where no irqchip is in the kernel to wait in."""


class TripleFault(Struct, frozen=True, gc=False):
    """KVM_EXIT_SHUTDOWN: the vCPU cannot deliver an exception and has stopped."""


class InternalError(Struct, frozen=True, gc=False):
    """KVM_EXIT_INTERNAL_ERROR: KVM gives up, most often on an instruction it cannot emulate."""

    suberror: int
    data: tuple[int, ...]


class FailEntry(Struct, frozen=True, gc=False):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state."""

    reason: int
    cpu: int


class Unknown(Struct, frozen=True, gc=False):
    """An exit that kvmpy did not ask for and does not know."""

    reason: int


Exit = (
    PioWrite | PioRead | MmioWrite | MmioRead | Interrupted | Halted | TripleFault | InternalError | FailEntry | Unknown
)
