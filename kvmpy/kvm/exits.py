"""What KVM_RUN returns, typed: one small class for each kind of exit, so that a `match` over them is checked."""

from __future__ import annotations

from typing import NamedTuple


class PioWrite(NamedTuple):
    """OUT or OUTS: ``values`` in order, each ``size`` (1, 2 or 4) bytes."""

    port: int
    size: int
    values: tuple[int, ...]


class PioRead(NamedTuple):
    """IN or INS: ``repeat`` reads of ``size`` bytes; answer with one int, the first read lowest."""

    port: int
    size: int
    repeat: int


class MmioWrite(NamedTuple):
    """A store to no RAM: ``size`` is 1 to 8 bytes."""

    gpa: int
    size: int
    value: int


class MmioRead(NamedTuple):
    """A load from no RAM: ``size`` is 1 to 8 bytes; answer with an int."""

    gpa: int
    size: int


class Interrupted(NamedTuple):
    """A kick, or a signal: look at what is asked, then run again."""


class Halted(NamedTuple):
    """HLT, where no irqchip is in the kernel to wait in."""


class TripleFault(NamedTuple):
    """KVM_EXIT_SHUTDOWN: the vCPU cannot deliver an exception and has stopped."""


class InternalError(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR: KVM gives up, most often on an instruction it cannot emulate."""

    suberror: int
    data: tuple[int, ...]


class FailEntry(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state."""

    reason: int
    cpu: int


class Unknown(NamedTuple):
    """An exit that kvmpy did not ask for and does not know."""

    reason: int


Exit = (
    PioWrite | PioRead | MmioWrite | MmioRead | Interrupted | Halted | TripleFault | InternalError | FailEntry | Unknown
)
