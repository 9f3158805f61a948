"""linux/kvm.h, typed: constants, structs and requests by their kernel names.

Values and layouts come from the compiler (kvm.cdef); this file only puts types on them. The API is described in the
kernel's Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import struct
from collections.abc import MutableSequence, Sequence
from itertools import chain
from typing import Any, Final

from kvmpy._native import ffi, lib
from kvmpy.abi import ioctl
from kvmpy.abi.ioctl import Call, Get, Layout, Put


class UserspaceMemoryRegion(Layout, c="struct kvm_userspace_memory_region"):
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int


class DirtyLog(Layout, c="struct kvm_dirty_log"):
    slot: int
    padding2: int  # the bitmap's address


class ClearDirtyLog(Layout, c="struct kvm_clear_dirty_log"):
    slot: int
    num_pages: int
    first_page: int
    padding2: int  # the bitmap's address


class Regs(Layout, c="struct kvm_regs"):
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class Segment(Layout, c="struct kvm_segment"):
    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  the field's name in the header: a 64-bit code segment
    g: int
    avl: int
    unusable: int


class Dtable(Layout, c="struct kvm_dtable"):
    base: int
    limit: int


class Sregs(Layout, c="struct kvm_sregs"):
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: MutableSequence[int]


class Sregs2(Layout, c="struct kvm_sregs2"):
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    flags: int
    pdptrs: MutableSequence[int]


class Xsave(Layout, c="struct kvm_xsave"):
    region: MutableSequence[int]


class Xcr(Layout, c="struct kvm_xcr"):
    xcr: int
    value: int


class Xcrs(Layout, c="struct kvm_xcrs"):
    nr_xcrs: int
    flags: int
    xcrs: MutableSequence[Xcr]


class Debugregs(Layout, c="struct kvm_debugregs"):
    db: MutableSequence[int]
    dr6: int
    dr7: int
    flags: int


class VcpuEvents(Layout, c="struct kvm_vcpu_events"):
    exception: object
    interrupt: object
    nmi: object
    sipi_vector: int
    flags: int
    smi: object
    triple_fault: object
    exception_has_payload: int
    exception_payload: int


class NestedState(Layout, c="struct kvm_nested_state"):
    flags: int
    format: int
    size: int


class MpState(Layout, c="struct kvm_mp_state"):
    mp_state: int


class LapicState(Layout, c="struct kvm_lapic_state"):
    regs: MutableSequence[bytes]


class MsrEntry(Layout, c="struct kvm_msr_entry"):
    index: int
    data: int


class Msrs(Layout, c="struct kvm_msrs"):
    nmsrs: int
    pad: int
    entries: MutableSequence[MsrEntry]


MSR_ENTRY: Final = struct.Struct("=I4xQ")
"""struct kvm_msr_entry: a vCPU has hundreds, and taken one by one they are what a guest stands still for."""
MOST_MSRS: Final = 255
"""In one request: KVM refuses more with E2BIG (MAX_IO_MSRS in arch/x86/kvm/x86.c)."""


def new_msrs(values: Sequence[tuple[int, int]]) -> Msrs:
    """A table of MSRs, by index, and their values."""
    table = Msrs.new(nmsrs=len(values), entries=len(values))
    packed = struct.pack("=" + MSR_ENTRY.format.removeprefix("=") * len(values), *chain.from_iterable(values))
    ffi.buffer(table.entries, len(packed))[:] = packed
    return table


def msr_values(table: Msrs, count: int) -> list[tuple[int, int]]:
    """Index and value of the first ``count`` MSRs of a table."""
    return [*MSR_ENTRY.iter_unpack(ffi.buffer(table.entries, count * MSR_ENTRY.size))]


class MsrList(Layout, c="struct kvm_msr_list"):
    nmsrs: int
    indices: MutableSequence[int]


class CpuidEntry2(Layout, c="struct kvm_cpuid_entry2"):
    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


class Cpuid2(Layout, c="struct kvm_cpuid2"):
    nent: int
    padding: int
    entries: MutableSequence[CpuidEntry2]


class IrqLevel(Layout, c="struct kvm_irq_level"):
    irq: int
    level: int


class Irqchip(Layout, c="struct kvm_irqchip"):
    chip_id: int
    chip: object  # pic or ioapic


class PitConfig(Layout, c="struct kvm_pit_config"):
    flags: int


class PitState2(Layout, c="struct kvm_pit_state2"):
    channels: MutableSequence[object]
    flags: int


class ClockData(Layout, c="struct kvm_clock_data"):
    clock: int
    flags: int
    realtime: int
    host_tsc: int


class EnableCap(Layout, c="struct kvm_enable_cap"):
    cap: int
    flags: int
    args: MutableSequence[int]


class Msi(Layout, c="struct kvm_msi"):
    address_lo: int
    address_hi: int
    data: int
    flags: int
    devid: int


class CreateDevice(Layout, c="struct kvm_create_device"):
    type: int
    fd: int
    flags: int


class DeviceAttr(Layout, c="struct kvm_device_attr"):
    flags: int
    group: int
    attr: int
    addr: int


class Irqfd(Layout, c="struct kvm_irqfd"):
    fd: int
    gsi: int
    flags: int
    resamplefd: int


class Ioeventfd(Layout, c="struct kvm_ioeventfd"):
    datamatch: int
    addr: int
    len: int
    fd: int
    flags: int


class RoutingEntry(Layout, c="struct kvm_irq_routing_entry"):
    gsi: int
    type: int
    flags: int
    pad: int
    u: object


class IrqRouting(Layout, c="struct kvm_irq_routing"):
    nr: int
    flags: int
    entries: MutableSequence[Any]  # RoutingEntry; a dict is taken too


API_VERSION: Final[int] = lib.KVM_API_VERSION

KVM_GET_API_VERSION = Call("KVM_GET_API_VERSION")
KVM_CREATE_VM = Call("KVM_CREATE_VM")
KVM_CHECK_EXTENSION = Call("KVM_CHECK_EXTENSION")
KVM_GET_VCPU_MMAP_SIZE = Call("KVM_GET_VCPU_MMAP_SIZE")
KVM_GET_SUPPORTED_CPUID = Put("KVM_GET_SUPPORTED_CPUID", Cpuid2)
KVM_GET_MSR_INDEX_LIST = Put("KVM_GET_MSR_INDEX_LIST", MsrList)
KVM_GET_MSR_FEATURE_INDEX_LIST = Put("KVM_GET_MSR_FEATURE_INDEX_LIST", MsrList)

KVM_CREATE_VCPU = Call("KVM_CREATE_VCPU")
KVM_SET_USER_MEMORY_REGION = Put("KVM_SET_USER_MEMORY_REGION", UserspaceMemoryRegion)
KVM_SET_TSS_ADDR = Call("KVM_SET_TSS_ADDR")
KVM_CREATE_IRQCHIP = Call("KVM_CREATE_IRQCHIP")
KVM_GET_IRQCHIP = Put("KVM_GET_IRQCHIP", Irqchip)
KVM_SET_IRQCHIP = Put("KVM_SET_IRQCHIP", Irqchip)
KVM_IRQ_LINE = Put("KVM_IRQ_LINE", IrqLevel)
KVM_SET_GSI_ROUTING = Put("KVM_SET_GSI_ROUTING", IrqRouting)
KVM_SIGNAL_MSI = Put("KVM_SIGNAL_MSI", Msi)
KVM_IRQFD = Put("KVM_IRQFD", Irqfd)
KVM_IOEVENTFD = Put("KVM_IOEVENTFD", Ioeventfd)
KVM_CREATE_PIT2 = Put("KVM_CREATE_PIT2", PitConfig)
KVM_GET_PIT2 = Get("KVM_GET_PIT2", PitState2)
KVM_SET_PIT2 = Put("KVM_SET_PIT2", PitState2)
KVM_GET_CLOCK = Get("KVM_GET_CLOCK", ClockData)
KVM_SET_CLOCK = Put("KVM_SET_CLOCK", ClockData)
KVM_CREATE_DEVICE = Put("KVM_CREATE_DEVICE", CreateDevice)
KVM_ENABLE_CAP = Put("KVM_ENABLE_CAP", EnableCap)
KVM_GET_DIRTY_LOG = Put("KVM_GET_DIRTY_LOG", DirtyLog)
KVM_CLEAR_DIRTY_LOG = Put("KVM_CLEAR_DIRTY_LOG", ClearDirtyLog)
KVM_SET_DEVICE_ATTR = Put("KVM_SET_DEVICE_ATTR", DeviceAttr)
KVM_GET_DEVICE_ATTR = Put("KVM_GET_DEVICE_ATTR", DeviceAttr)
KVM_HAS_DEVICE_ATTR = Put("KVM_HAS_DEVICE_ATTR", DeviceAttr)

KVM_GET_REGS = Get("KVM_GET_REGS", Regs)
KVM_SET_REGS = Put("KVM_SET_REGS", Regs)
KVM_GET_SREGS = Get("KVM_GET_SREGS", Sregs)
KVM_SET_SREGS = Put("KVM_SET_SREGS", Sregs)
KVM_GET_SREGS2 = Get("KVM_GET_SREGS2", Sregs2)
KVM_SET_SREGS2 = Put("KVM_SET_SREGS2", Sregs2)
KVM_GET_MSRS = Put("KVM_GET_MSRS", Msrs)
KVM_SET_MSRS = Put("KVM_SET_MSRS", Msrs)
KVM_GET_LAPIC = Get("KVM_GET_LAPIC", LapicState)
KVM_SET_LAPIC = Put("KVM_SET_LAPIC", LapicState)
KVM_SET_CPUID2 = Put("KVM_SET_CPUID2", Cpuid2)
KVM_GET_MP_STATE = Get("KVM_GET_MP_STATE", MpState)
KVM_SET_MP_STATE = Put("KVM_SET_MP_STATE", MpState)
KVM_GET_VCPU_EVENTS = Get("KVM_GET_VCPU_EVENTS", VcpuEvents)
KVM_SET_VCPU_EVENTS = Put("KVM_SET_VCPU_EVENTS", VcpuEvents)
KVM_GET_DEBUGREGS = Get("KVM_GET_DEBUGREGS", Debugregs)
KVM_SET_DEBUGREGS = Put("KVM_SET_DEBUGREGS", Debugregs)
KVM_GET_XSAVE = Get("KVM_GET_XSAVE", Xsave)
KVM_GET_XCRS = Get("KVM_GET_XCRS", Xcrs)
KVM_SET_XCRS = Put("KVM_SET_XCRS", Xcrs)
KVM_GET_TSC_KHZ = Call("KVM_GET_TSC_KHZ")
KVM_SET_TSC_KHZ = Call("KVM_SET_TSC_KHZ")
KVM_KVMCLOCK_CTRL = Call("KVM_KVMCLOCK_CTRL")

MEM_LOG_DIRTY_PAGES: Final[int] = lib.KVM_MEM_LOG_DIRTY_PAGES
DIRTY_LOG_MANUAL_PROTECT: Final[int] = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
DIRTY_LOG_INITIALLY_SET: Final[int] = lib.KVM_DIRTY_LOG_INITIALLY_SET
DEVICE_VFIO: Final[int] = lib.KVM_DEV_TYPE_VFIO
VFIO_GROUP: Final[int] = lib.KVM_DEV_VFIO_GROUP
VFIO_GROUP_ADD: Final[int] = lib.KVM_DEV_VFIO_GROUP_ADD
VFIO_GROUP_DEL: Final[int] = lib.KVM_DEV_VFIO_GROUP_DEL
IRQCHIP_PIC_MASTER: Final[int] = lib.KVM_IRQCHIP_PIC_MASTER
IRQCHIP_PIC_SLAVE: Final[int] = lib.KVM_IRQCHIP_PIC_SLAVE
IRQCHIP_IOAPIC: Final[int] = lib.KVM_IRQCHIP_IOAPIC
ROUTING_IRQCHIP: Final[int] = lib.KVM_IRQ_ROUTING_IRQCHIP
ROUTING_MSI: Final[int] = lib.KVM_IRQ_ROUTING_MSI
IRQFD_DEASSIGN: Final[int] = lib.KVM_IRQFD_FLAG_DEASSIGN
IRQFD_RESAMPLE: Final[int] = lib.KVM_IRQFD_FLAG_RESAMPLE
IOEVENTFD_DATAMATCH: Final[int] = lib.KVM_IOEVENTFD_FLAG_DATAMATCH
IOEVENTFD_PIO: Final[int] = lib.KVM_IOEVENTFD_FLAG_PIO
IOEVENTFD_DEASSIGN: Final[int] = lib.KVM_IOEVENTFD_FLAG_DEASSIGN
PIT_SPEAKER_DUMMY: Final[int] = lib.KVM_PIT_SPEAKER_DUMMY
CPUID_SIGNIFICANT_INDEX: Final[int] = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
TSC_CTRL: Final[int] = lib.KVM_VCPU_TSC_CTRL
TSC_OFFSET: Final[int] = lib.KVM_VCPU_TSC_OFFSET
CLOCK_REALTIME: Final[int] = lib.KVM_CLOCK_REALTIME
SREGS2_PDPTRS_VALID: Final[int] = lib.KVM_SREGS2_FLAGS_PDPTRS_VALID
EVENT_PAYLOAD: Final[int] = lib.KVM_VCPUEVENT_VALID_PAYLOAD
EVENT_TRIPLE_FAULT: Final[int] = lib.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
IDENTITY_MAP_REQUEST: Final[int] = lib.KVM_SET_IDENTITY_MAP_ADDR


def set_identity_map_addr(fd: int, gpa: int) -> None:
    """KVM_SET_IDENTITY_MAP_ADDR: the one request that takes a pointer to a bare number."""
    ioctl.sys_ioctl("KVM_SET_IDENTITY_MAP_ADDR", fd, IDENTITY_MAP_REQUEST, ffi.new("uint64_t *", gpa))


def set_vfio_group(fd: int, attr: int, group: int) -> None:
    """KVM_SET_DEVICE_ATTR of the VFIO device ``fd``: a group's descriptor, by its address."""
    value = ffi.new("int32_t *", group)
    KVM_SET_DEVICE_ATTR(fd, DeviceAttr.new(group=VFIO_GROUP, attr=attr, addr=int(ffi.cast("uintptr_t", value))))


def get_tsc_offset(fd: int) -> int:
    """KVM_GET_DEVICE_ATTR of a vCPU: what is added to the host's TSC, modulo 2**64."""
    value = ffi.new("uint64_t *")
    KVM_GET_DEVICE_ATTR(fd, DeviceAttr.new(group=TSC_CTRL, attr=TSC_OFFSET, addr=int(ffi.cast("uintptr_t", value))))
    return int(value[0])


def set_tsc_offset(fd: int, offset: int) -> None:
    """KVM_SET_DEVICE_ATTR of a vCPU: the same."""
    value = ffi.new("uint64_t *", offset)
    KVM_SET_DEVICE_ATTR(fd, DeviceAttr.new(group=TSC_CTRL, attr=TSC_OFFSET, addr=int(ffi.cast("uintptr_t", value))))


def get_xsave2(fd: int, size: int) -> bytes:
    """KVM_GET_XSAVE2: the ``size`` bytes that KVM_CAP_XSAVE2 says; the request's number says 4096 all the same."""
    return _get_bytes("KVM_GET_XSAVE2", fd, ffi.new("char[]", size))


def set_xsave(fd: int, area: bytes) -> None:
    """KVM_SET_XSAVE: as long as KVM_CAP_XSAVE2 says, for so much is read."""
    ioctl.sys_ioctl("KVM_SET_XSAVE", fd, lib.KVM_SET_XSAVE, ffi.from_buffer(area))


def get_nested_state(fd: int, size: int) -> bytes:
    """KVM_GET_NESTED_STATE: as long as its own ``size`` field says, at most ``size`` bytes."""
    buffer = ffi.new("char[]", size)
    ffi.cast("struct kvm_nested_state *", buffer).size = size
    data = _get_bytes("KVM_GET_NESTED_STATE", fd, buffer)
    return data[: ffi.cast("struct kvm_nested_state *", buffer).size]


def set_nested_state(fd: int, state: bytes) -> None:
    """KVM_SET_NESTED_STATE: its size is in it, and must be right."""
    ioctl.sys_ioctl("KVM_SET_NESTED_STATE", fd, lib.KVM_SET_NESTED_STATE, ffi.from_buffer(state))


def nested_state_size(state: bytes) -> int:
    """What its own ``size`` field says; ``state`` has a whole header."""
    return int(ffi.from_buffer("struct kvm_nested_state *", state).size)


def _get_bytes(name: str, fd: int, buffer: Any) -> bytes:
    ioctl.sys_ioctl(name, fd, getattr(lib, name), buffer)
    return bytes(ffi.buffer(buffer))


def capability(name: str) -> int:
    """The number of a KVM_CAP, such as "KVM_CAP_IRQFD"."""
    number: int = getattr(lib, name)
    return number
