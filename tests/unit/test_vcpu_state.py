"""A vCPU's registers through KVM as other kernels have it, and what a hostile stream may say they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy._native import ffi
from kvmpy.abi import ioctl
from kvmpy.errors import IoctlError
from kvmpy.kvm import msrs, structs, vcpu_registers, vm_state
from kvmpy.kvm.tsc import load_tsc
from kvmpy.kvm.vcpu_registers import RegsState, SregsState, VcpuRegisters
from kvmpy.kvm.vcpu_state import load, save
from kvmpy.state import State, StateError
from kvmpy.state import load as decode
from kvmpy.state import save as encode
from tests.fakes.kvm import FakeVcpu
from tests.golden.make import OF_KVM

NEWEST = {
    "KVM_CAP_XSAVE2": 4096 + 2816 + 8192,
    "KVM_CAP_XCRS": 1,
    "KVM_CAP_SREGS2": 1,
    "KVM_CAP_GET_TSC_KHZ": 1,
    "KVM_CAP_TSC_CONTROL": 1,
    "KVM_CAP_NESTED_STATE": 128 + 8192,
    "KVM_CAP_EXCEPTION_PAYLOAD": 1,
    "KVM_CAP_X86_TRIPLE_FAULT_EVENT": 1,
}


def busy() -> VcpuRegisters:
    state = OF_KVM["vcpu"]()
    assert isinstance(state, VcpuRegisters)
    return state


def without_time(state: VcpuRegisters) -> dict[str, Any]:
    section: dict[str, Any] = encode(state)["state"]
    del section["tsc"]
    return section


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeVcpu]:
    """``make(**capabilities)``: a vCPU that keeps what is set, of a KVM that has just those."""

    def made(**capabilities: int) -> FakeVcpu:
        fake = FakeVcpu(capabilities, [index for index, _ in busy().msrs])
        monkeypatch.setattr(ioctl, "sys_ioctl", fake.kernel)
        return fake

    return made


def test_every_field_comes_back_where_kvm_has_them_all(make: Callable[..., FakeVcpu]) -> None:
    vcpu = make(**NEWEST).vcpu
    load(vcpu, busy())
    saved, wanted = without_time(save(vcpu)), busy()
    wanted.xsave = wanted.xsave.ljust(NEWEST["KVM_CAP_XSAVE2"], b"\0")
    assert saved == without_time(wanted)


def test_an_old_kvm_has_no_pdptrs_and_one_size_of_xsave(make: Callable[..., FakeVcpu]) -> None:
    vcpu = make().vcpu
    state = busy()
    state.xsave, state.nested, state.xcrs = state.xsave[:4096], None, ()
    state.events.flags &= 0xF
    load(vcpu, state)
    state.pdptrs = None
    assert without_time(save(vcpu)) == without_time(state)


def test_order_of_saving_is_mp_state_first_and_events_last(make: Callable[..., FakeVcpu]) -> None:
    fake = make(**NEWEST)
    save(fake.vcpu)
    asked = [name for name, _ in fake.kernel.seen if name.startswith("KVM_GET_")]
    assert (asked[0], asked[-1]) == ("KVM_GET_MP_STATE", "KVM_GET_VCPU_EVENTS")
    assert [name for name in fake.names() if name.startswith("KVM_SET_")] == []


def test_an_msr_that_the_vcpu_does_not_have_is_asked_for_once(make: Callable[..., FakeVcpu]) -> None:
    fake = make(**NEWEST)
    del fake.msrs[0x174]
    first = save(fake.vcpu)
    asked = len(fake.kernel.named("KVM_GET_MSRS"))
    second = save(fake.vcpu)
    assert len(fake.kernel.named("KVM_GET_MSRS")) - asked < asked
    assert 0x174 not in dict(second.msrs)
    assert without_time(second) == without_time(first)


def test_order_of_loading(make: Callable[..., FakeVcpu]) -> None:
    fake = make(**NEWEST)
    state = busy()
    state.msrs = ((0x174, 1), (msrs.FEATURE_CONTROL, 5))
    load(fake.vcpu, state)
    load_tsc([fake.vcpu], [state])
    assert [name for name in fake.names() if name.startswith("KVM_SET_")] == [
        *("KVM_SET_MSRS", "KVM_SET_TSC_KHZ", "KVM_SET_SREGS2", "KVM_SET_NESTED_STATE", "KVM_SET_REGS"),
        *("KVM_SET_XCRS", "KVM_SET_XSAVE", "KVM_SET_DEBUGREGS", "KVM_SET_LAPIC", "KVM_SET_MSRS", "KVM_SET_MP_STATE"),
        *("KVM_SET_VCPU_EVENTS", "KVM_SET_DEVICE_ATTR", "KVM_SET_MSRS"),
    ]
    first, second, deadline = fake.kernel.named("KVM_SET_MSRS")
    assert [entry["index"] for entry in first["entries"]] == [msrs.FEATURE_CONTROL]
    assert [entry["index"] for entry in second["entries"]] == [0x174]
    assert [entry["index"] for entry in deadline["entries"]] == [msrs.TSC_DEADLINE]


def test_a_deadline_that_expired_undelivered_is_due_at_once(make: Callable[..., FakeVcpu]) -> None:
    fake, state = make(**NEWEST), busy()
    state.tsc.deadline = 0
    page = bytearray(state.lapic)
    page[0x320:0x324] = (2 << 17 | 0xEC).to_bytes(4, "little")
    state.lapic = bytes(page)
    load_tsc([fake.vcpu], [state])
    assert fake.msrs[msrs.TSC_DEADLINE] == state.tsc.value
    page[0x320:0x324] = (2 << 17 | 1 << 16 | 0xEC).to_bytes(4, "little")
    state.lapic, fake.msrs[msrs.TSC_DEADLINE] = bytes(page), 0
    load_tsc([fake.vcpu], [state])
    assert fake.msrs[msrs.TSC_DEADLINE] == 0, "masked: nobody waits for it"


def test_vcpus_get_the_same_value_where_kvm_has_no_offset(make: Callable[..., FakeVcpu]) -> None:
    fake = make(**NEWEST)
    fake.kernel.fail("KVM_HAS_DEVICE_ATTR")
    load_tsc([fake.vcpu, fake.vcpu], [busy(), busy()])
    values = [table["entries"][0] for table in fake.kernel.named("KVM_SET_MSRS")]
    assert [value["index"] for value in values[:2]] == [msrs.TSC] * 2
    assert values[0] == values[1]
    assert fake.kernel.named("KVM_SET_DEVICE_ATTR") == []


def test_a_reset_puts_the_tsc_back_to_what_it_was(make: Callable[..., FakeVcpu]) -> None:
    fake, state = make(), busy()
    fake.kernel.fail("KVM_HAS_DEVICE_ATTR")
    load_tsc([fake.vcpu], [state], goes_on=False)
    assert fake.msrs[msrs.TSC] == state.tsc.value


def test_an_msr_that_is_refused_and_has_the_value_is_no_loss(make: Callable[..., FakeVcpu]) -> None:
    fake = make(**NEWEST)
    fake.msrs[0x8B], fake.constant = 7, {0x8B}
    state = busy()
    state.msrs = ((0x174, 1), (0x8B, 7), (0x175, 2))
    load(fake.vcpu, state)
    assert (fake.msrs[0x174], fake.msrs[0x175]) == (1, 2)
    state.msrs = ((0x8B, 8),)
    with pytest.raises(StateError, match="vCPU 3: KVM_SET_MSRS: this host's KVM refuses MSR 0x8b = 0x8"):
        load(fake.vcpu, state)


@pytest.mark.parametrize(
    ("capability", "spoil"),
    [
        ("KVM_CAP_XSAVE2", "xsave: 11264 bytes, and this host's area has 4096"),
        ("KVM_CAP_NESTED_STATE", "nested: 4224 bytes that say 4224, and this host's KVM takes 0 at most"),
        ("KVM_CAP_EXCEPTION_PAYLOAD", "events: one is pending that needs KVM_CAP_EXCEPTION_PAYLOAD"),
    ],
)
def test_what_this_kvm_lacks_is_named(make: Callable[..., FakeVcpu], capability: str, spoil: str) -> None:
    fake = make(**NEWEST | {capability: 0})
    with pytest.raises(StateError, match=f"^vCPU 3: {spoil}"):
        load(fake.vcpu, busy())


@pytest.mark.parametrize("size", [0, 127, 129, 0xFFFF_FFFF])
def test_no_nested_state_reaches_kvm_unless_its_size_is_right(make: Callable[..., FakeVcpu], size: int) -> None:
    fake, state = make(**NEWEST), busy()
    state.nested = bytes(4) + size.to_bytes(4, "little") + bytes(120)
    with pytest.raises(StateError, match=f"nested: 128 bytes that say {size}"):
        load(fake.vcpu, state)
    assert fake.kernel.named("KVM_SET_NESTED_STATE") == []


@pytest.mark.parametrize("request_name", ["KVM_SET_REGS", "KVM_SET_LAPIC", "KVM_SET_NESTED_STATE", "KVM_SET_TSC_KHZ"])
def test_a_failure_names_vcpu_request_and_errno(make: Callable[..., FakeVcpu], request_name: str) -> None:
    fake = make(**NEWEST)
    fake.kernel.fail(request_name)
    with pytest.raises(IoctlError, match=f"^vCPU 3: {request_name}: EINVAL$"):
        load(fake.vcpu, busy())


STRUCTS: dict[str, type[State]] = {
    "struct kvm_regs": RegsState,
    "struct kvm_sregs": SregsState,
    "struct kvm_sregs2": SregsState,
    "struct kvm_debugregs": vcpu_registers.DebugregsState,
    "struct kvm_vcpu_events": vcpu_registers.EventsState,
    "struct kvm_pic_state": vm_state.PicState,
    "struct kvm_ioapic_state": vm_state.IoapicState,
    "struct kvm_pit_state2": vm_state.PitState,
}
LEFT_OUT = ("flags", "pdptrs", "interrupt_bitmap", "pad", "reserved", "count_load_time")


def mismatches(kind: type[State], c: Any) -> Iterator[str]:
    """Fields whose width is not that of the struct's, and those that the State does not have."""
    hints = get_type_hints(kind, include_extras=True)
    for name, field in c.fields:
        if name not in hints:
            if name not in LEFT_OUT:
                yield f"{kind.__name__} has no {name}"
            continue
        hint, inner = hints[name], field.type
        while inner.kind == "array":
            hint, inner = get_args(get_args(hint)[0] if get_origin(hint) is Annotated else hint)[0], inner.item
        if inner.kind in ("struct", "union"):
            yield from mismatches(hint, inner)
        elif get_args(hint)[1] != "u64" and get_args(hint)[1].le >= 1 << 8 * ffi.sizeof(inner):
            yield f"{kind.__name__}.{name} holds more than {inner.cname}"


@pytest.mark.parametrize("c", STRUCTS)
def test_a_struct_and_its_state_have_the_same_fields_and_widths(c: str) -> None:
    assert list(mismatches(STRUCTS[c], ffi.typeof(c))) == []


@pytest.mark.parametrize("c", STRUCTS)
def test_a_struct_made_of_its_state_reads_as_it(c: str) -> None:
    power_on = STRUCTS[c]()
    struct = ffi.new(f"{c} *", structs.fields(power_on))
    assert structs.read(STRUCTS[c], struct) == power_on


u64s = st.integers(0, 2**64 - 1)


@given(st.builds(RegsState, **dict.fromkeys(RegsState.__struct_fields__, u64s)))
def test_every_value_of_a_register_travels(regs: RegsState) -> None:
    state = decode(VcpuRegisters, encode(VcpuRegisters(regs=regs)))
    struct = ffi.new("struct kvm_regs *", structs.fields(state.regs))
    assert structs.read(RegsState, struct) == regs


SPOILS: dict[str, Any] = {
    "lapic": "AAAA",
    "xsave": "AAAA",
    "nested": "AAAA",
    "pdptrs": [1, 2, 3],
    "msrs": [[1, 2, 3]],
    "xcrs": [[0, 1]] * 17,
    "mp_state": 2**32,
    "regs": {"rax": 2**64},
    "sregs": None,
    "tsc": {"khz": True},
    "events": {"exception": []},
    "debugregs": {"db": [0] * 5, "dr6": 0, "dr7": 0},
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_value_that_does_not_fit_is_refused_by_name(name: str) -> None:
    section = copy.deepcopy(encode(busy()))
    section["state"][name] = SPOILS[name]
    with pytest.raises(StateError, match=f"^vcpu.*{name}"):
        decode(VcpuRegisters, section)


@pytest.mark.parametrize("length", [0, 23, 25, 100_000])
def test_an_ioapic_has_24_pins(length: int) -> None:
    section = encode(vm_state.VmState())
    section["state"]["interrupts"]["ioapic"]["redirtbl"] = [{"bits": 0}] * length
    with pytest.raises(StateError, match="redirtbl"):
        decode(vm_state.VmState, section)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(VcpuRegisters.__struct_fields__), json_values)
def test_no_value_of_a_field_does_worse_than_be_refused(name: str, value: Any) -> None:
    section = encode(busy())
    section["state"][name] = value
    try:
        state = decode(VcpuRegisters, section)
    except StateError:
        return
    assert json.loads(json.dumps(encode(state)))["state"][name] == value
