"""A vCPU's registers at its first instruction, and as text when it fails."""

from __future__ import annotations

from typing import assert_never

from kvmpy.abi import kvm as abi
from kvmpy.boot.cpu_tables import CODE_SELECTOR, DATA_SELECTOR, GDT_SIZE
from kvmpy.boot.kernel import EntryMode
from kvmpy.boot.plan import Entry
from kvmpy.errors import IoctlError
from kvmpy.kvm.vcpu import Vcpu

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1
CODE = 0xB  # execute, read, accessed
DATA = 0x3  # read, write, accessed
TSS_BUSY = 0xB
# Intel SDM volume 3, table 10-1: where a processor begins
RESET_RIP = 0xFFF0
RESET_CS_BASE = 0xFFFF_0000


def enter(vcpu: Vcpu, entry: Entry) -> None:
    """Set the boot vCPU's registers as the kernel's boot protocol asks.

    LINUX64: Documentation/arch/x86/boot.rst, "64-bit boot protocol". PVH32: Xen's docs/misc/pvh.pandoc.
    """
    sregs = vcpu.sregs
    regs = abi.Regs.new(rip=entry.ip, rflags=RFLAGS_RESERVED)
    match entry.mode:
        case EntryMode.LINUX64:
            regs.rsi = entry.info
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG
            sregs.cr3 = entry.page_tables
            sregs.cr4 = CR4_PAE
            sregs.efer = EFER_LME | EFER_LMA
        case EntryMode.PVH32:
            regs.rbx = entry.info
            sregs.cr0 = CR0_PE | CR0_ET
            sregs.cr4 = 0
            sregs.efer = 0
        case other:
            assert_never(other)
    _flat(sregs.cs, CODE_SELECTOR, CODE, long_mode=entry.mode is EntryMode.LINUX64)
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        _flat(segment, DATA_SELECTOR, DATA)
    sregs.tr.type, sregs.tr.s, sregs.tr.present, sregs.tr.limit = TSS_BUSY, 0, 1, 0x67
    sregs.gdt.base, sregs.gdt.limit = entry.gdt, GDT_SIZE - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    vcpu.sregs = sregs
    vcpu.regs = regs


def are_lost(vcpu: Vcpu) -> bool:
    """Whether the registers are those of a reset: on AMD processors KVM resets a vCPU that shuts down."""
    try:
        return vcpu.regs.rip == RESET_RIP and vcpu.sregs.cs.base == RESET_CS_BASE
    except IoctlError:
        return False


def dump(vcpu: Vcpu) -> str:
    """The registers of a vCPU that does not run, for people; empty where KVM does not tell them any more."""
    try:
        regs, sregs = vcpu.regs, vcpu.sregs
    except IoctlError:  # EIO once KVM has given up the whole VM
        return ""
    words = [f"{name:>6} {getattr(regs, name):016x}" for name in abi.Regs.__annotations__]
    words += [f"{name:>6} {getattr(sregs, name):016x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")]
    lines = ["".join(f"{word}  " for word in words[i : i + 4]).rstrip() for i in range(0, len(words), 4)]
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment = getattr(sregs, name)
        lines.append(
            f"{name:>6} {segment.selector:04x} base {segment.base:016x} limit {segment.limit:08x} "
            f"type {segment.type:x} dpl {segment.dpl} {'64-bit' if segment.l else '32-bit' if segment.db else '16-bit'}"
        )
    return "\n".join(lines)


def _flat(segment: abi.Segment, selector: int, kind: int, *, long_mode: bool = False) -> None:
    """All of memory, privilege 0."""
    segment.base, segment.limit, segment.selector, segment.type = 0, 0xFFFF_FFFF, selector, kind
    segment.present, segment.dpl, segment.s, segment.g = 1, 0, 1, 1
    segment.l, segment.db = int(long_mode), int(not long_mode)
    segment.unusable = 0
