"""What it means that a vCPU cannot go on, for the operator."""

from __future__ import annotations

from kvmpy.errors import HostError
from kvmpy.kvm.exits import Exit, FailEntry, InternalError, TripleFault


def explain(what: Exit | HostError) -> str:
    """Why a vCPU has ended."""
    match what:
        case TripleFault():
            return "triple fault: the guest's kernel crashed so early, or so badly, that it could not say why"
        case InternalError(suberror, data):
            meaning = {1: "an instruction that KVM cannot emulate", 3: "a fault while delivering an event"}
            words = " ".join(f"{word:#x}" for word in data)
            return f"KVM_EXIT_INTERNAL_ERROR {suberror} ({meaning.get(suberror, 'see linux/kvm.h')}), data {words}"
        case FailEntry(reason, cpu):
            return f"KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state, reason {reason:#x} on cpu {cpu}"
        case HostError():
            return str(what)
        case _:
            return f"KVM_RUN returned {what}, which kvmpy did not ask for"
