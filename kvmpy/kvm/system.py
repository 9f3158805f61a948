"""/dev/kvm: what this host's KVM can do, probed, and the door to a VM."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

from kvmpy.abi import kvm as abi
from kvmpy.abi.ioctl import Put
from kvmpy.errors import HostError, IoctlError, MissingCapability, refusal

# A KVM that wants a bigger array says E2BIG; no KVM has been seen to want a quarter of this.
MOST_ENTRIES: Final = 4096


class Capability(NamedTuple):
    """A KVM_CAP by name and the kernel release that brought it."""

    name: str
    since: str


REQUIRED: Final = (
    Capability("KVM_CAP_USER_MEMORY", "2.6.25"),
    Capability("KVM_CAP_IRQCHIP", "2.6.20"),
    Capability("KVM_CAP_SET_TSS_ADDR", "2.6.24"),
    Capability("KVM_CAP_EXT_CPUID", "2.6.26"),
    Capability("KVM_CAP_MP_STATE", "2.6.27"),
    Capability("KVM_CAP_IRQ_ROUTING", "2.6.30"),
    Capability("KVM_CAP_IRQFD", "2.6.32"),
    Capability("KVM_CAP_IOEVENTFD", "2.6.32"),
    Capability("KVM_CAP_SET_IDENTITY_MAP_ADDR", "2.6.32"),
    Capability("KVM_CAP_PIT2", "2.6.31"),
    Capability("KVM_CAP_ADJUST_CLOCK", "2.6.33"),
    Capability("KVM_CAP_VCPU_EVENTS", "2.6.33"),
    Capability("KVM_CAP_DEBUGREGS", "2.6.35"),
    Capability("KVM_CAP_XSAVE", "2.6.36"),
    Capability("KVM_CAP_PIT_STATE2", "2.6.35"),
    Capability("KVM_CAP_SIGNAL_MSI", "3.5"),
    Capability("KVM_CAP_IRQFD_RESAMPLE", "3.8"),
    Capability("KVM_CAP_IMMEDIATE_EXIT", "4.11"),
)
"""What kvmpy cannot do without."""

WELCOME: Final = (
    Capability("KVM_CAP_XCRS", "2.6.36"),
    Capability("KVM_CAP_TSC_CONTROL", "2.6.39"),
    Capability("KVM_CAP_GET_TSC_KHZ", "2.6.39"),
    Capability("KVM_CAP_TSC_DEADLINE_TIMER", "3.1"),
    Capability("KVM_CAP_KVMCLOCK_CTRL", "3.4"),
    Capability("KVM_CAP_READONLY_MEM", "3.7"),
    Capability("KVM_CAP_IOEVENTFD_ANY_LENGTH", "4.4"),
    Capability("KVM_CAP_X2APIC_API", "4.8"),
    Capability("KVM_CAP_NESTED_STATE", "4.19"),
    Capability("KVM_CAP_EXCEPTION_PAYLOAD", "4.20"),
    Capability("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "5.2"),
    Capability("KVM_CAP_DIRTY_LOG_RING", "5.11"),
    Capability("KVM_CAP_SREGS2", "5.14"),
    Capability("KVM_CAP_XSAVE2", "5.17"),
    Capability("KVM_CAP_X86_TRIPLE_FAULT_EVENT", "6.1"),
    Capability("KVM_CAP_MEMORY_FAULT_INFO", "6.8"),
    Capability("KVM_CAP_PRE_FAULT_MEMORY", "6.11"),
)
"""What kvmpy uses where it is."""


def virtualization(proc: str = "/proc") -> str | None:
    """The processor's extension that KVM runs guests with, "vmx" or "svm"; None where /proc/cpuinfo shows neither.

    A KVM without one interprets, or rewrites, what a guest's kernel does, and a stock Linux seldom gets far on it. No
    KVM_CAP says so.
    """
    try:
        with open(f"{proc}/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return None
    return next((name for name in ("vmx", "svm") if name in flags), None)


class System:
    """An open /dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Raises HostError, with what to do, where ``path`` is missing, forbidden or not KVM."""
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise HostError(f"{path}: {refusal(e.errno, _open_advice(e.errno))}") from e
        try:
            version = abi.KVM_GET_API_VERSION(self.fd)
        except IoctlError as e:
            self.close()
            raise HostError(f"{path}: is not KVM ({e})") from e
        if version != abi.API_VERSION:
            self.close()
            raise HostError(f"{path}: KVM API version {version}, where every kernel since 2.6.22 has {abi.API_VERSION}")

    def close(self) -> None:
        """Close /dev/kvm; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, name: str) -> int:
        """What KVM_CHECK_EXTENSION says of "KVM_CAP_...": 0 is no, more is yes or a limit."""
        return abi.KVM_CHECK_EXTENSION(self.fd, abi.capability(name))

    def missing(self) -> list[Capability]:
        """The required capabilities that this KVM does not have."""
        return [capability for capability in REQUIRED if not self.check(capability.name)]

    def require(self) -> None:
        """Raises MissingCapability for the first required capability that is not there."""
        for capability in self.missing():
            raise MissingCapability(*capability)

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs one VM can have. Documentation/virt/kvm/api.rst says what absence means."""
        return self.check("KVM_CAP_MAX_VCPUS") or self.check("KVM_CAP_NR_VCPUS") or 4

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes of each vCPU's shared kvm_run area."""
        return abi.KVM_GET_VCPU_MMAP_SIZE(self.fd)

    def create_vm(self) -> int:
        """A new VM's file descriptor."""
        return abi.KVM_CREATE_VM(self.fd)

    def supported_cpuid(self) -> list[abi.CpuidEntry2]:
        """Every CPUID leaf this KVM can give a guest."""
        table = abi.Cpuid2.new(nent=MOST_ENTRIES, entries=MOST_ENTRIES)
        abi.KVM_GET_SUPPORTED_CPUID(self.fd, table)
        return [_copied(table.entries[i]) for i in range(table.nent)]

    def msr_indices(self) -> list[int]:
        """The MSRs whose values make up a vCPU's state."""
        return self._msr_list(abi.KVM_GET_MSR_INDEX_LIST)

    def feature_msr_indices(self) -> list[int]:
        """The MSRs that say what the processor can do; empty where KVM does not list them."""
        try:
            return self._msr_list(abi.KVM_GET_MSR_FEATURE_INDEX_LIST)
        except IoctlError as e:
            if e.errno in (errno.EINVAL, errno.ENOTTY):
                return []
            raise

    def feature_msrs(self) -> dict[int, int]:
        """The MSRs that say what the processor can do, with the most that KVM can give a guest."""
        return read_msrs(self.fd, self.feature_msr_indices())

    def _msr_list(self, request: Put[abi.MsrList]) -> list[int]:
        table = abi.MsrList.new(nmsrs=MOST_ENTRIES, indices=MOST_ENTRIES)
        request(self.fd, table)
        return [table.indices[i] for i in range(table.nmsrs)]


def read_msrs(fd: int, indices: Sequence[int]) -> dict[int, int]:
    """The values of those of ``indices`` that a vCPU has, or KVM itself of those that say what it can do."""
    values: dict[int, int] = {}
    rest = list(indices)
    while rest:
        asked = rest[: abi.MOST_MSRS]
        table = abi.new_msrs([(index, 0) for index in asked])
        done = abi.KVM_GET_MSRS(fd, table)
        values.update(abi.msr_values(table, done))
        rest = rest[done + (done < len(asked)) :]  # KVM stops at the first it does not have
    return values


def _copied(entry: abi.CpuidEntry2) -> abi.CpuidEntry2:
    """An entry that outlives the table it came in."""
    return abi.CpuidEntry2.new(**{name: getattr(entry, name) for name in abi.CpuidEntry2.__annotations__})


def _open_advice(number: int | None) -> str:
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return (
            "this host has no KVM: load kvm_intel or kvm_amd (modprobe), and switch virtualization on in the firmware, "
            "or nested virtualization in the hypervisor below"
        )
    if number in (errno.EACCES, errno.EPERM):
        return "not permitted: run as root, or join the group that owns it (usermod -aG kvm USER, then log in again)"
    return "KVM cannot be opened"
