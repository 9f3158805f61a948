"""Which words of CPUID are sets of features, and what each bit is called.

A word here is a register of a leaf in which a bit says that the processor can do something: a guest needs every one
that it has been told of, and does without the others. Names are those of Linux's /proc/cpuinfo, where it has one, else
those of the manuals: Intel SDM volume 2 "CPUID" (and volume 4 for the MSR), AMD APM volume 3 appendix E, and the
kernel's Documentation/virt/kvm/x86/cpuid.rst for KVM's own leaf.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Word(msgspec.Struct, frozen=True):
    """A register of a leaf."""

    function: int
    subleaf: int
    register: str

    def bit(self, number: int) -> str:
        """ "CPUID 7.0 EBX bit 5 (avx2)"."""
        name = NAMES[self][number] if number < len(NAMES[self]) else "-"
        return f"CPUID {leaf_text(self.function, self.subleaf)} {self.register.upper()} bit {number}" + (
            f" ({name})" if name != "-" else ""
        )


def leaf_text(function: int, index: int) -> str:
    """ "7.1", "0x80000001": the index of a leaf that has several, numbers below ten as people say them."""
    number = f"{function:#x}" if function > 9 else str(function)
    return f"{number}.{index}" if function in INDEXED else number


INDEXED: Final = frozenset({0x4, 0x7, 0xB, 0xD, 0x12, 0x14, 0x1D, 0x1E, 0x1F, 0x24, 0x8000_001D})

_XSTATE: Final = (
    "x87 sse avx bndregs bndcsr avx512_opmask zmm_hi256 hi16_zmm pt pkru pasid cet_user cet_kernel hdc uintr lbr hwp "
    "xtile_cfg xtile_data"
)
_BITS: Final[dict[tuple[int, int, str], str]] = {
    (0x1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse "
        "sse2 ss ht tm ia64 pbe"
    ),
    (0x1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 "
        "sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    (0x6, 0, "eax"): "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req",
    (0x7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a "
        "avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er avx512cd "
        "sha_ni avx512bw avx512vl"
    ),
    (0x7, 0, "ecx"): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
        "avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri "
        "movdir64b enqcmd sgx_lc pks"
    ),
    (0x7, 0, "edx"): (
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear "
        "rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 "
        "avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities "
        "spec_ctrl_ssbd"
    ),
    (0x7, 1, "eax"): (
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred "
        "lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist"
    ),
    (0x7, 1, "ebx"): "intel_ppin",
    (0x7, 1, "ecx"): "",
    (0x7, 1, "edx"): (
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10"
    ),
    (0x7, 2, "edx"): "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_disable",
    (0xD, 0, "eax"): _XSTATE,
    (0xD, 0, "edx"): "",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0xD, 1, "ecx"): _XSTATE,
    (0xD, 1, "edx"): "",
    (0x12, 0, "eax"): "sgx1 sgx2",
    (0x14, 0, "ebx"): "",
    (0x14, 0, "ecx"): "",
    (0x4000_0001, 0, "eax"): (
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi "
        "kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield "
        "kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - "
        "kvm_clocksource_stable"
    ),
    (0x8000_0001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr "
        "fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x8000_0001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp "
        "fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"
    ),
    (0x8000_0007, 0, "edx"): (
        "ts fid vid ttp tm stc 100mhzsteps hwpstate nonstop_tsc cpb eff_freq_ro proc_feedback acc_power"
    ),
    (0x8000_0008, 0, "ebx"): (
        "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - amd_ibpb wbinvd_int amd_ibrs amd_stibp "
        "ibrs_always_on stibp_always_on ibrs_preferred ibrs_same_mode no_efer_lmsle tlb_flush_nested - amd_ppin "
        "amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs"
    ),
    (0x8000_000A, 0, "edx"): (
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists pmc_virt - pausefilter - "
        "pfthreshold avic - v_vmsave_vmload vgif gmet x2avic sss_check v_spec_ctrl rogpt - host_mce_override tlbictl "
        "vnmi ibs_virt"
    ),
    (0x8000_0021, 0, "eax"): (
        "no_nested_data_bp fsgs_non_serializing lfence_rdtsc smm_page_cfg_lock - verw_clear null_sel_clr_base "
        "upper_addr_ignore autoibrs no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl_msr - - - - - - prefetchi - - - - "
        "- - sbpb ibpb_brtype srso_no srso_user_kernel_no"
    ),
    (0x8000_0022, 0, "eax"): "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze",
    (0xC000_0001, 0, "edx"): "- - rng rng_en - - ace ace_en ace2 ace2_en phe phe_en pmm pmm_en",
}
NAMES: Final[dict[Word, list[str]]] = {Word(*word): names.split() for word, names in _BITS.items()}

# Bits that follow from what the guest does, or from how many vCPUs there are: no host has or lacks them.
VOLATILE: Final = {
    Word(0x1, 0, "ecx"): 1 << 27,  # osxsave
    Word(0x1, 0, "edx"): 1 << 28,  # ht
    Word(0x7, 0, "ecx"): 1 << 4,  # ospke
}

# IA32_ARCH_CAPABILITIES. INVERTED bits tell of a weakness, so a guest must know of one that any of its hosts has.
_ARCH_CAPABILITIES: Final = (
    "rdcl_no ibrs_all rsba skip_l1dfl_vmentry ssb_no mds_no if_pschange_mc_no tsx_ctrl taa_no mcu_control "
    "misc_package_ctls energy_filtering_ctl doitm sbdr_ssdp_no fbsdp_no psdp_no - fb_clear fb_clear_ctrl rrsba bhi_no "
    "xapic_disable_status - overclocking_status pbrsb_no gds_ctrl gds_no rfds_no rfds_clear"
)
ARCH_CAPABILITIES: Final = _ARCH_CAPABILITIES.split()
INVERTED: Final = 1 << 2 | 1 << 19  # rsba, rrsba


class Count(msgspec.Struct, frozen=True):
    """A number in a register: the guest must not have been told more than a host has."""

    function: int
    subleaf: int
    register: str
    shift: int
    width: int
    meaning: str

    def of(self, register: int) -> int:
        return register >> self.shift & (1 << self.width) - 1


COUNTS: Final = (
    Count(0xA, 0, "eax", 0, 8, "version of performance monitoring"),
    Count(0xA, 0, "eax", 8, 8, "general performance counters"),
    Count(0xA, 0, "eax", 16, 8, "bits of a general performance counter"),
    Count(0xA, 0, "edx", 0, 5, "fixed performance counters"),
    Count(0xA, 0, "edx", 5, 8, "bits of a fixed performance counter"),
    Count(0x24, 0, "ebx", 0, 8, "version of AVX10"),
    Count(0x8000_0008, 0, "eax", 0, 8, "bits of a physical address"),
    Count(0x8000_0008, 0, "eax", 8, 8, "bits of a linear address"),
    Count(0x8000_0022, 0, "ebx", 0, 4, "core performance counters"),
)
