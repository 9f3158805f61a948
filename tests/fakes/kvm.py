"""A vCPU of a KVM with given capabilities, at `kvmpy.abi.ioctl.sys_ioctl`: what is set is what is got."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from kvmpy._native import ffi, lib
from kvmpy.abi import kvm as abi
from kvmpy.kvm.system import REQUIRED, WELCOME, System
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.kvm.vm import Vm
from tests.fakes.kernel import Kernel

PAIRS = ("REGS", "SREGS", "SREGS2", "DEBUGREGS", "XCRS", "LAPIC", "MP_STATE", "VCPU_EVENTS", "XSAVE", "NESTED_STATE")
INDEX = 3


class FakeVcpu:
    """``vcpu`` is a Vcpu without its KVM_RUN; ``msrs`` the values it has, ``constant`` those that cannot be set."""

    def __init__(self, capabilities: dict[str, int], listed: list[int]) -> None:
        self.capabilities = {abi.capability(each.name): 0 for each in (*REQUIRED, *WELCOME)} | {
            abi.capability(name): value for name, value in capabilities.items()
        }
        self.listed = listed
        self.msrs: dict[int, int] = dict.fromkeys((0x10, 0x6E0, *listed), 0)
        self.constant: set[int] = set()
        self.kept: dict[str, bytes] = {"NESTED_STATE": bytes(128)}
        self.kernel = Kernel()
        self.kernel.answers |= {
            "KVM_CHECK_EXTENSION": lambda number: self.capabilities[int(ffi.cast("uintptr_t", number))],
            "KVM_GET_MSR_INDEX_LIST": self._list,
            "KVM_GET_MSRS": self._get_msrs,
            "KVM_SET_MSRS": self._set_msrs,
            "KVM_GET_TSC_KHZ": lambda _: 2_000_000,
            "KVM_GET_XSAVE2": partial(self._get, "XSAVE"),
        }
        for name in PAIRS:
            self.kernel.answers[f"KVM_GET_{name}"] = partial(self._get, name)
            self.kernel.answers[f"KVM_SET_{name}"] = partial(self._set, name)
        self.vcpu = self._make()

    def names(self) -> list[str]:
        return [name for name, _ in self.kernel.seen]

    def _make(self) -> Vcpu:
        def check(name: str) -> int:
            return self.capabilities[abi.capability(name)]

        system = object.__new__(System)
        system.fd = -1
        vm = cast(Vm, SimpleNamespace(fd=-1, system=system, check=check))
        vcpu = object.__new__(Vcpu)
        vcpu.fd, vcpu.index, vcpu.vm = -1, INDEX, vm
        vcpu.msr_limit = vcpu.msrs = None
        vcpu.cpuid, vcpu.can_nest = [], True
        return vcpu

    def _set(self, name: str, buffer: Any) -> int:
        size = self.capabilities[lib.KVM_CAP_XSAVE2] or 4096
        whole = ffi.buffer(buffer) if name in ("XSAVE", "NESTED_STATE") else ffi.buffer(buffer, ffi.sizeof(buffer[0]))
        self.kept[name] = bytes(whole[:size] if name == "XSAVE" else whole)
        return 0

    def _get(self, name: str, buffer: Any) -> int:
        kept = self.kept.get(name, b"")
        ffi.buffer(buffer, len(kept) or 1)[: len(kept)] = kept
        if name == "NESTED_STATE":
            ffi.cast("struct kvm_nested_state *", buffer).size = len(kept)
        return 0

    def _list(self, table: Any) -> int:
        table.nmsrs = len(self.listed)
        for place, index in enumerate(self.listed):
            table.indices[place] = index
        return 0

    def _get_msrs(self, table: Any) -> int:
        for place in range(table.nmsrs):
            if table.entries[place].index not in self.msrs:
                return place
            table.entries[place].data = self.msrs[table.entries[place].index]
        return int(table.nmsrs)

    def _set_msrs(self, table: Any) -> int:
        for place in range(table.nmsrs):
            if table.entries[place].index in self.constant:
                return place
            self.msrs[table.entries[place].index] = table.entries[place].data
        return int(table.nmsrs)
