"""The ABI that the compiler gave us: each typed name is the header's, each number the one a C program prints."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kvmpy._native import ffi, lib
from kvmpy.abi import block, ioctl, tun, vfio, vhost
from kvmpy.abi import kvm as abi
from kvmpy.abi.ioctl import Call, Get, GetNumber, Layout, Number, Put, PutNumber, Request, Unsized
from kvmpy.errors import HostError, IoctlError
from kvmpy.kvm import vcpu
from kvmpy.kvm.system import REQUIRED, WELCOME
from tests.conftest import skip_or_fail
from tests.fakes.kernel import Kernel

ABI = Path(abi.__file__).parent
LAYOUTS = sorted(Layout.__subclasses__(), key=lambda layout: layout.__name__)
MODULES = (abi, vhost, vfio, block, tun)
CDEFS = ("kvm.cdef", "vhost.cdef", "vfio.cdef", "block.cdef", "tun.cdef")
REQUESTS = {name: each for module in MODULES for name, each in vars(module).items() if isinstance(each, Request)}
# The numbers of tun's requests say "an int" whatever they take, and those for interfaces say nothing.
HONEST = {name: request for name, request in REQUESTS.items() if name not in vars(tun)}
CONSTANTS = [
    name for cdef in CDEFS for name in re.findall(r"^#define (\w+) \.\.\.", (ABI / cdef).read_text(), re.MULTILINE)
]
STRUCTS = [
    kind for kind in ffi.list_types()[1] if kind.startswith(("kvm_", "vhost_", "vfio_", "tun_", "ethtool_", "if"))
]


def fields_of(struct: str) -> dict[str, Any]:
    return {name: field for name, field in ffi.typeof(struct).fields if name}


@pytest.fixture(scope="module")
def compiler_says(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Every constant, size and offset that the cdefs name, from one small C program."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        skip_or_fail("cc", "needs a C compiler: install gcc")
    expressions = [*CONSTANTS]
    for struct in STRUCTS:
        expressions.append(f"sizeof(struct {struct})")
        expressions += [f"offsetof(struct {struct}, {name})" for name in fields_of(f"struct {struct}")]
    directory = tmp_path_factory.mktemp("abi")
    prints = "\n".join(f'printf("%s=%llu\\n", "{text}", (unsigned long long)({text}));' for text in expressions)
    (directory / "says.c").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "compat.h"\nint main(void) {{\n{prints}\nreturn 0;\n}}\n'
    )
    subprocess.run([compiler, f"-I{ABI}", "-o", directory / "says", directory / "says.c"], check=True)
    lines = subprocess.run([directory / "says"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {text: int(value) for text, _, value in (line.rpartition("=") for line in lines)}


def test_layouts_annotations_are_the_structs_fields() -> None:
    assert len(LAYOUTS) > 40
    for layout in LAYOUTS:
        annotated = [name for name in layout.__annotations__ if name != "C"]
        assert set(annotated) <= set(fields_of(layout.C)), layout.__name__
        assert annotated == [name for name in fields_of(layout.C) if name in annotated], layout.__name__


def test_layouts_annotations_claim_the_kind_of_field_that_it_is() -> None:
    kinds = {"primitive": "int", "array": "MutableSequence", "union": "object"}
    structs = {layout.C: layout.__name__ for layout in LAYOUTS}
    for layout in LAYOUTS:
        claimed = {name: kind.partition("[")[0] for name, kind in layout.__annotations__.items() if name != "C"}
        found = {
            name: kinds.get(field.type.kind) or structs.get(field.type.cname, "object")
            for name, field in fields_of(layout.C).items()
        }
        assert claimed.items() <= found.items(), layout.__name__


def test_every_struct_of_the_cdef_is_as_the_compiler_lays_it_out(compiler_says: dict[str, int]) -> None:
    ours = {f"sizeof(struct {struct})": ffi.sizeof(f"struct {struct}") for struct in STRUCTS}
    for struct in STRUCTS:
        for name in fields_of(f"struct {struct}"):
            ours[f"offsetof(struct {struct}, {name})"] = ffi.offsetof(f"struct {struct}", name)
    assert len(ours) > 150
    assert ours == {text: value for text, value in compiler_says.items() if "(" in text}


def test_every_constant_is_the_compilers(compiler_says: dict[str, int]) -> None:
    assert len(CONSTANTS) > 100
    assert {name: getattr(lib, name) for name in CONSTANTS} == {name: compiler_says[name] for name in CONSTANTS}


def test_requests_are_named_as_they_are_called_and_have_the_kernels_numbers(compiler_says: dict[str, int]) -> None:
    assert len(REQUESTS) > 100
    assert {name: (request.name, request.number) for name, request in REQUESTS.items()} == {
        name: (name, compiler_says[name]) for name in REQUESTS
    }


def sizes(requests: Mapping[str, Request]) -> dict[str, int]:
    """What their numbers say of what is passed."""
    return {name: request.number >> 16 & 0x3FFF for name, request in requests.items()}


def test_size_in_a_requests_number_is_that_of_its_layout() -> None:
    typed = {name: request for name, request in HONEST.items() if not isinstance(request, Call | Number | Unsized)}
    assert len(typed) > 40
    assert sizes(typed) == {
        name: ffi.sizeof(request.layout.C) for name, request in typed.items() if isinstance(request, Get | Put)
    }


def test_size_in_a_requests_number_is_that_of_its_bare_number() -> None:
    bare = {name: request for name, request in HONEST.items() if isinstance(request, Number)}
    assert bare
    assert sizes(bare) == {
        name: ffi.sizeof(request.c) for name, request in bare.items() if isinstance(request, GetNumber | PutNumber)
    }


def test_request_that_only_gets_is_one_that_the_kernel_writes() -> None:
    """The header says "in" of some requests whose answer comes back in the same struct, and "out" of none."""
    getting = {name: request for name, request in HONEST.items() if isinstance(request, Get | GetNumber)}
    assert len(getting) > 10
    assert {name: request.number >> 30 for name, request in getting.items()} == dict.fromkeys(getting, 2)


def test_request_that_takes_a_number_has_no_struct() -> None:
    plain = {name: request for name, request in HONEST.items() if isinstance(request, Call | Unsized)}
    assert len(plain) > 20
    assert {name: request.number >> 16 for name, request in plain.items()} == dict.fromkeys(plain, 0)


def test_every_capability_that_is_asked_for_is_known(compiler_says: dict[str, int]) -> None:
    names = [capability.name for capability in (*REQUIRED, *WELCOME)]
    assert len(names) > 20
    assert {name: abi.capability(name) for name in names} == {name: compiler_says[name] for name in names}


def test_failure_names_the_request_and_the_errno() -> None:
    with pytest.raises(IoctlError) as caught:
        abi.KVM_GET_REGS(-1)
    assert str(caught.value) == "KVM_GET_REGS: EBADF"
    assert caught.value.errno == errno.EBADF
    assert caught.value.request == "KVM_GET_REGS"
    assert isinstance(caught.value, HostError)
    assert isinstance(caught.value, OSError)


def test_failure_on_what_is_no_kvm_is_the_kernels_word() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(IoctlError, match=r"^KVM_CREATE_VM: ENOTTY$"):
        abi.KVM_CREATE_VM(fd)
    os.close(fd)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)
    return kernel


def test_call_passes_its_number_as_the_argument_itself(kernel: Kernel) -> None:
    abi.KVM_SET_TSS_ADDR(3, 0xFEFF_D000)
    abi.KVM_CREATE_IRQCHIP(3)
    assert kernel.seen == [("KVM_SET_TSS_ADDR", 0xFEFF_D000), ("KVM_CREATE_IRQCHIP", 0)]


def test_get_returns_what_the_kernel_wrote_into_a_zeroed_struct(kernel: Kernel) -> None:
    def answer(regs: Any) -> int:
        regs.rip = 2**64 - 1
        return 0

    kernel.answers["KVM_GET_REGS"] = answer
    regs = abi.KVM_GET_REGS(3)
    assert (regs.rip, regs.rax) == (2**64 - 1, 0)
    assert kernel.named("KVM_GET_REGS")[0]["rip"] == 0


def test_put_passes_the_struct_and_returns_the_kernels_answer(kernel: Kernel) -> None:
    kernel.answers["KVM_SIGNAL_MSI"] = lambda _: 1
    assert abi.KVM_SIGNAL_MSI(3, abi.Msi.new(data=7)) == 1
    assert kernel.named("KVM_SIGNAL_MSI")[0]["data"] == 7


def test_identity_map_is_passed_by_address(kernel: Kernel) -> None:
    abi.set_identity_map_addr(3, 0xFEFF_C000)
    assert kernel.seen == [("KVM_SET_IDENTITY_MAP_ADDR", [0xFEFF_C000])]


def test_bare_number_is_passed_by_address_both_ways(kernel: Kernel) -> None:
    def answer(number: Any) -> int:
        number[0] = 2**64 - 1
        return 0

    kernel.answers["VHOST_GET_FEATURES"] = answer
    assert vhost.VHOST_GET_FEATURES(3) == 2**64 - 1
    vhost.VHOST_SET_FEATURES(3, 1 << 32)
    assert kernel.seen == [("VHOST_GET_FEATURES", [0]), ("VHOST_SET_FEATURES", [1 << 32])]


def test_struct_refuses_a_value_that_its_field_cannot_hold() -> None:
    with pytest.raises(OverflowError):
        abi.Irqfd.new(gsi=1 << 32)
    with pytest.raises(OverflowError):
        abi.Regs.new(rip=-1)


def test_flexible_array_takes_a_list_or_a_length() -> None:
    listed, counted = abi.MsrList.new(nmsrs=2, indices=[7, 9]), abi.MsrList.new(nmsrs=3, indices=3)
    assert [listed.indices[0], listed.indices[1]] == [7, 9]
    assert [counted.indices[n] for n in range(3)] == [0, 0, 0]


def capability_bytes(kind: int, following: int, body: bytes = b"") -> bytes:
    return kind.to_bytes(2, "little") + bytes(2) + following.to_bytes(4, "little") + body


def test_a_chain_of_vfio_capabilities_ends_where_it_is_wrong() -> None:
    data = bytes(8) + capability_bytes(1, 16) + capability_bytes(2, 8)
    assert list(vfio.chain(data, 8)) == [(1, 8), (2, 16)], "in circles"
    assert list(vfio.chain(bytes(8) + capability_bytes(1, 9999), 8)) == [(1, 8)], "outside"
    assert list(vfio.chain(data, 0)) == [], "none"
    assert list(vfio.chain(data, 20)) == [], "not all there"


@pytest.mark.parametrize("claimed", [0, 1, 2, 3, 0xFFFF_FFFF])
def test_no_more_entries_are_believed_than_there_are(claimed: int) -> None:
    numbers = b"".join(number.to_bytes(8, "little") for number in (0x1000, 0x2000, 0x5000, 0x1000))
    data = capability_bytes(1, 0, claimed.to_bytes(4, "little") + bytes(4) + numbers)
    assert vfio.sparse_areas(data, 0) == [(0x1000, 0x2000), (0x5000, 0x1000)][:claimed]
    assert vfio.iova_ranges(data, 0) == [range(0x1000, 0x2001), range(0x5000, 0x1001)][:claimed]
    assert not vfio.sparse_areas(data[:12], 0)
    assert not vfio.iova_ranges(data[:12], 0)
    assert vfio.dma_available(data[:8], 0) is None


def test_an_answer_that_wants_more_room_gets_it(kernel: Kernel) -> None:
    def answer(info: Any) -> int:
        info.cap_offset = 32 if info.argsz >= 40 else 0
        info.argsz = 40
        return 0

    kernel.answers["VFIO_DEVICE_GET_REGION_INFO"] = answer
    info, data = vfio.VFIO_DEVICE_GET_REGION_INFO(3, index=7)
    assert (info.index, info.cap_offset, len(data)) == (7, 32, 40)
    assert [seen["argsz"] for seen in kernel.named("VFIO_DEVICE_GET_REGION_INFO")] == [32, 40]


def test_an_answer_that_wants_more_room_than_anything_needs_is_taken_as_it_is(kernel: Kernel) -> None:
    def answer(info: Any) -> int:
        info.argsz = 0xFFFF_FFFF
        return 0

    kernel.answers["VFIO_DEVICE_GET_REGION_INFO"] = answer
    assert len(vfio.VFIO_DEVICE_GET_REGION_INFO(3).data) == 32


def test_fewer_vectors_than_wanted_are_a_failure(kernel: Kernel) -> None:
    kernel.answers["VFIO_DEVICE_SET_IRQS"] = lambda _: 3
    with pytest.raises(IoctlError, match="ENOSPC: the host has 3 interrupt vectors left"):
        vfio.bind(3, vfio.MSIX_IRQ, vfio.IRQ_TRIGGER, [7, -1])
    assert kernel.seen[0][1]["data"] == [7, 0, 0, 0, 255, 255, 255, 255]
    assert kernel.seen[0][1]["argsz"] == 28


def test_msrs_are_packed_as_the_header_has_them() -> None:
    values = [(0x10, 1 << 63), (0xC000_0080, 0xD01)]
    table = abi.new_msrs(values)
    assert abi.MSR_ENTRY.size == ffi.sizeof("struct kvm_msr_entry")
    assert [(entry.index, entry.data) for entry in (table.entries[0], table.entries[1])] == values
    table.entries[1].data = 7
    assert abi.msr_values(table, table.nmsrs) == [values[0], (0xC000_0080, 7)]


def test_an_access_is_unpacked_as_the_compiler_has_it() -> None:
    last = ffi.new("struct kvmpy_vcpu *", {"kind": 1, "size": 2, "addr": 1 << 40, "value": (1 << 64) - 2})
    assert vcpu.ACCESS.unpack_from(ffi.buffer(last)) == (1, 2, 1 << 40, (1 << 64) - 2)
