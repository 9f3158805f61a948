"""Which MSRs make up a vCPU's state.

KVM_GET_MSR_INDEX_LIST is KVM's answer, its own paravirtual range (0x4B56_4Dxx) included, but it leaves out the MTRRs
and the machine-check banks, which a guest sets and reads. TSC and TSC_DEADLINE are listed and handled apart (tsc.py).
Hyper-V's are listed and left out: no guest of ours is told of them, and two of them are clocks.
Names and numbers: Intel SDM volume 4, arch/x86/include/asm/msr-index.h.
"""

from __future__ import annotations

from typing import Final

TSC: Final = 0x10
FEATURE_CONTROL: Final = 0x3A
ARCH_CAPABILITIES: Final = 0x10A
MCG_CAP: Final = 0x179
PERF_CAPABILITIES: Final = 0x345
TSC_DEADLINE: Final = 0x6E0
VMX_CAPABILITIES: Final = range(0x480, 0x494)

HYPERV: Final = range(0x4000_0000, 0x4000_0200)
MTRRS: Final = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)

FEATURES: Final = (FEATURE_CONTROL, ARCH_CAPABILITIES, PERF_CAPABILITIES, *VMX_CAPABILITIES)
"""What the processor is, rather than what it does: set before anything that they allow. FEATURE_CONTROL first: at a
reset it is what takes a vCPU out of VMX operation."""

BANK_CONTROL: Final = 0x400  # MC0_CTL, then STATUS, ADDR and MISC, and the same of the next bank
BANK_CONTROL2: Final = 0x280
MOST_BANKS: Final = 32  # KVM_MAX_MCE_BANKS


def banks(mcg_cap: int) -> list[int]:
    """The machine-check banks of a vCPU with that MCG_CAP. CTL2 only where it says CMCI_P, bit 10."""
    count = min(mcg_cap & 0xFF, MOST_BANKS)
    indices = list(range(BANK_CONTROL, BANK_CONTROL + 4 * count))
    return indices + list(range(BANK_CONTROL2, BANK_CONTROL2 + count)) if mcg_cap & 1 << 10 else indices
