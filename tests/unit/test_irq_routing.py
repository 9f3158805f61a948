"""Interrupts and /dev/kvm as the kernel is asked for them: lines, routes, irqfds, ioeventfds, capabilities."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmpy.kvm.irq
from kvmpy._native import lib
from kvmpy.abi import ioctl
from kvmpy.abi import kvm as abi
from kvmpy.errors import HostError, IoctlError, MissingCapability
from kvmpy.host.eventfd import EventFd
from kvmpy.irq import MsiMessage, MsiVector
from kvmpy.kvm.irq import IOAPIC_PINS, IoEventFd, IrqFd, Line, Routing
from kvmpy.kvm.msi import Vector
from kvmpy.kvm.system import MOST_ENTRIES, REQUIRED, System
from tests.fakes.kernel import Kernel, copied
from tests.fakes.loop import open_descriptors

VM_FD = 77
MESSAGE = MsiMessage(0xFEE0_1000, 0x4021)


def waits(vector: MsiVector) -> bool:
    """Whether a signal waits, as a call: mypy believes that an attribute stays what an assert said."""
    return vector.pending


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)
    return kernel


@pytest.fixture
def event() -> Iterator[EventFd]:
    with EventFd() as event:
        yield event


def routes(kernel: Kernel) -> list[dict[str, Any]]:
    """The entries of the last table that KVM was given."""
    table = kernel.named("KVM_SET_GSI_ROUTING")[-1]
    entries: list[dict[str, Any]] = table["entries"][: table["nr"]]
    return entries


def messages(kernel: Kernel) -> dict[int, tuple[int, int, int]]:
    msi = {entry["gsi"]: entry["u"]["msi"] for entry in routes(kernel) if entry["type"] == abi.ROUTING_MSI}
    return {gsi: (message["address_lo"], message["address_hi"], message["data"]) for gsi, message in msi.items()}


def test_line_tells_kvm_of_changes_only(kernel: Kernel) -> None:
    line = Line(VM_FD, 4)
    for level in (False, True, True, False, False):
        line.set(level=level)
    assert kernel.named("KVM_IRQ_LINE") == [{"irq": 4, "level": 1}, {"irq": 4, "level": 0}]


def test_line_that_kvm_refused_to_drive_is_tried_again(kernel: Kernel) -> None:
    line = Line(VM_FD, 4)
    kernel.fail("KVM_IRQ_LINE", errno.EIO)
    with pytest.raises(IoctlError, match="KVM_IRQ_LINE: EIO"):
        line.set(level=True)
    kernel.recover("KVM_IRQ_LINE")
    line.set(level=True)
    assert len(kernel.named("KVM_IRQ_LINE")) == 2


def test_default_pins_are_those_of_a_pc(kernel: Kernel) -> None:
    Routing(VM_FD).commit()
    pins = {(e["u"]["irqchip"]["irqchip"], e["u"]["irqchip"]["pin"]): e["gsi"] for e in routes(kernel)}
    assert {entry["type"] for entry in routes(kernel)} == {abi.ROUTING_IRQCHIP}
    assert [pins[abi.IRQCHIP_PIC_MASTER, pin] for pin in range(8)] == list(range(8))
    assert [pins[abi.IRQCHIP_PIC_SLAVE, pin] for pin in range(8)] == list(range(8, 16))
    assert {pin: gsi for (chip, pin), gsi in pins.items() if chip == abi.IRQCHIP_IOAPIC} == {
        1: 1,
        2: 0,  # the timer, as every PC wires it
        **{pin: pin for pin in range(3, IOAPIC_PINS)},
    }


def test_each_message_gets_a_gsi_of_its_own_behind_the_pins(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    assert [routing.add(MESSAGE), routing.add(MsiMessage(0xFEE0_2000, 0x22))] == [24, 25]
    assert messages(kernel) == {24: (0xFEE0_1000, 0, 0x4021), 25: (0xFEE0_2000, 0, 0x22)}
    assert len(routes(kernel)) == 16 + 23 + 2


def test_address_above_4_gib_and_all_of_the_data_are_kept(kernel: Kernel) -> None:
    Routing(VM_FD).add(MsiMessage(0x1234_5678_FEE0_0000, 0xFFFF_FFFF))
    assert messages(kernel) == {24: (0xFEE0_0000, 0x1234_5678, 0xFFFF_FFFF)}


def test_changed_message_keeps_its_gsi_and_removed_one_frees_it(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    first, second = routing.add(MESSAGE), routing.add(MESSAGE)
    routing.change(first, MsiMessage(0xFEE0_0000, 1))
    routing.remove(second)
    assert messages(kernel) == {24: (0xFEE0_0000, 0, 1)}
    assert routing.add(MESSAGE) == second


@pytest.mark.parametrize("change", ["add", "change", "remove"])
def test_table_that_kvm_refused_changes_nothing(kernel: Kernel, change: str) -> None:
    routing = Routing(VM_FD)
    gsi = routing.add(MESSAGE)
    kernel.fail("KVM_SET_GSI_ROUTING", errno.EINVAL)
    steps: dict[str, Callable[[], object]] = {
        "add": lambda: routing.add(MESSAGE),
        "change": lambda: routing.change(gsi, MsiMessage(0, 0)),
        "remove": lambda: routing.remove(gsi),
    }
    with pytest.raises(IoctlError, match="KVM_SET_GSI_ROUTING: EINVAL"):
        steps[change]()
    assert routing.messages == {gsi: MESSAGE}


def test_threads_that_add_at_once_get_different_gsis(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    given: list[int] = []
    threads = [threading.Thread(target=lambda: given.extend(routing.add(MESSAGE) for _ in range(25))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(24, 124))
    assert sorted(messages(kernel)) == sorted(given)


def test_the_table_stays_right_while_routes_come_and_go_in_any_order(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    gsis = [routing.add(MsiMessage(0, n)) for n in range(6)]
    for n in (0, 5, 2):
        routing.remove(gsis[n])
    routing.change(gsis[4], MsiMessage(0, 40))
    again = routing.add(MsiMessage(0, 9))
    assert messages(kernel) == {gsi: (0, 0, message.data) for gsi, message in routing.messages.items()}
    assert sorted(message.data for message in routing.messages.values()) == [1, 3, 9, 40]
    assert again in gsis


def test_a_machine_out_of_routes_says_so(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvmpy.kvm.irq, "GSI_LIMIT", IOAPIC_PINS + 1)
    routing = Routing(VM_FD)
    routing.add(MESSAGE)
    with pytest.raises(HostError, match="all 25 interrupt routes of the machine are in use"):
        routing.add(MESSAGE)
    assert len(routing.messages) == 1


def test_a_vector_is_an_irqfd_while_it_has_a_route_and_keeps_signals_otherwise(kernel: Kernel) -> None:
    vector = Vector(VM_FD, routing := Routing(VM_FD))
    vector.signal()
    assert waits(vector)
    vector.route(MESSAGE)
    vector.route(MESSAGE)
    assert len(kernel.named("KVM_IRQFD")) == 1
    vector.route(MsiMessage(0, 1))
    assert (len(kernel.named("KVM_IRQFD")), list(routing.messages.values())) == (1, [MsiMessage(0, 1)])
    vector.route(None)
    assert waits(vector)
    vector.discard()
    assert not waits(vector)
    vector.close()
    vector.close()
    assert not routing.messages
    assert [request["flags"] for request in kernel.named("KVM_IRQFD")] == [0, abi.IRQFD_DEASSIGN]


def test_irqfd_is_assigned_and_taken_away(kernel: Kernel, event: EventFd) -> None:
    irqfd = IrqFd(VM_FD, 24, event)
    irqfd.close()
    on, off = kernel.named("KVM_IRQFD")
    assert (on["fd"], on["gsi"], on["flags"]) == (event.fd, 24, 0)
    assert (off["fd"], off["gsi"], off["flags"]) == (event.fd, 24, abi.IRQFD_DEASSIGN)
    event.signal()


def test_level_irqfd_has_its_resample_eventfd(kernel: Kernel, event: EventFd) -> None:
    with EventFd() as resample:
        IrqFd(VM_FD, 10, event, resample)
        (on,) = kernel.named("KVM_IRQFD")
        assert (on["flags"], on["resamplefd"]) == (abi.IRQFD_RESAMPLE, resample.fd)


@pytest.mark.parametrize(
    ("pio", "match", "flags"),
    [
        (False, None, 0),
        (True, None, abi.IOEVENTFD_PIO),
        (False, 0, abi.IOEVENTFD_DATAMATCH),
        (True, 5, abi.IOEVENTFD_PIO | abi.IOEVENTFD_DATAMATCH),
    ],
)
def test_ioeventfd_is_taken_away_exactly_as_it_was_assigned(
    kernel: Kernel, event: EventFd, pio: bool, match: int | None, flags: int
) -> None:
    IoEventFd(VM_FD, 0xC000_0000, 2, event, pio=pio, match=match).close()
    on, off = kernel.named("KVM_IOEVENTFD")
    assert on == {
        "addr": 0xC000_0000,
        "len": 2,
        "fd": event.fd,
        "flags": flags,
        "datamatch": match or 0,
    }
    assert off == {**on, "flags": flags | abi.IOEVENTFD_DEASSIGN}


# /dev/kvm


@pytest.fixture
def device(tmp_path: Path) -> str:
    """A file in the place of /dev/kvm."""
    (tmp_path / "kvm").touch()
    return str(tmp_path / "kvm")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOENT, "this host has no KVM: load kvm_intel or kvm_amd"),
        (errno.ENXIO, "this host has no KVM"),
        (errno.EACCES, "not permitted: run as root, or join the group"),
        (errno.EMFILE, "KVM cannot be opened"),
    ],
)
def test_device_that_cannot_be_opened_says_what_to_do(
    number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match=f"^/dev/kvm: {errno.errorcode[number]}: {advice}"):
        System()


def test_device_that_is_not_kvm_is_refused_and_closed() -> None:
    before = open_descriptors()
    with pytest.raises(HostError, match=r"^/dev/null: is not KVM \(KVM_GET_API_VERSION: ENOTTY\)$"):
        System(os.devnull)
    assert open_descriptors() == before


def test_api_of_another_version_is_refused_and_closed(kernel: Kernel, device: str) -> None:
    kernel.answers["KVM_GET_API_VERSION"] = lambda _: 11
    before = open_descriptors()
    with pytest.raises(HostError, match=r"KVM API version 11, where every kernel since 2.6.22 has 12"):
        System(device)
    assert open_descriptors() == before


def test_system_is_closed_once_and_not_inherited(kernel: Kernel, device: str) -> None:
    before = open_descriptors()
    with System(device) as system:
        assert not os.get_inheritable(system.fd)
        system.close()
    assert open_descriptors() == before


def test_missing_capability_is_named_with_the_kernel_that_has_it(kernel: Kernel, device: str) -> None:
    absent = {lib.KVM_CAP_IRQFD_RESAMPLE, lib.KVM_CAP_IMMEDIATE_EXIT}
    kernel.answers["KVM_CHECK_EXTENSION"] = lambda cap: int(copied(cap) not in absent)
    with System(device) as system:
        assert [capability.name for capability in system.missing()] == [
            "KVM_CAP_IRQFD_RESAMPLE",
            "KVM_CAP_IMMEDIATE_EXIT",
        ]
        with pytest.raises(
            MissingCapability, match=r"KVM_CAP_IRQFD_RESAMPLE: this kernel's KVM .*; Linux 3.8 and later do"
        ):
            system.require()


def test_every_required_capability_is_asked_for(kernel: Kernel, device: str) -> None:
    with System(device) as system:
        system.require()
    assert kernel.named("KVM_CHECK_EXTENSION") == [abi.capability(capability.name) for capability in REQUIRED]


@pytest.mark.parametrize(("max_", "nr", "limit"), [(1024, 8, 1024), (0, 8, 8), (0, 0, 4)])
def test_vcpu_limit_is_the_best_that_kvm_says(kernel: Kernel, device: str, max_: int, nr: int, limit: int) -> None:
    says = {lib.KVM_CAP_MAX_VCPUS: max_, lib.KVM_CAP_NR_VCPUS: nr}
    kernel.answers["KVM_CHECK_EXTENSION"] = lambda cap: says[copied(cap)]
    with System(device) as system:
        assert system.max_vcpus == limit


def test_supported_cpuid_is_what_kvm_filled_in_and_outlives_the_table(kernel: Kernel, device: str) -> None:
    def fill(table: Any) -> int:
        assert table.nent == MOST_ENTRIES
        table.nent = 2
        table.entries[0].function, table.entries[1].function, table.entries[1].edx = 7, 0x8000_0000, 0xFFFF_FFFF
        return 0

    kernel.answers["KVM_GET_SUPPORTED_CPUID"] = fill
    with System(device) as system:
        table = system.supported_cpuid()
    assert [(leaf.function, leaf.edx) for leaf in table] == [(7, 0), (0x8000_0000, 0xFFFF_FFFF)]
    assert all("owning" in repr(leaf) for leaf in table)


def test_msrs_are_those_that_kvm_lists(kernel: Kernel, device: str) -> None:
    def fill(table: Any) -> int:
        table.nmsrs, table.indices[0], table.indices[1] = 2, 0x10, 0xC000_0080
        return 0

    kernel.answers["KVM_GET_MSR_INDEX_LIST"] = fill
    with System(device) as system:
        assert system.msr_indices() == [0x10, 0xC000_0080]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTTY])
def test_kvm_that_does_not_list_feature_msrs_has_none(kernel: Kernel, device: str, number: int) -> None:
    kernel.fail("KVM_GET_MSR_FEATURE_INDEX_LIST", number)
    with System(device) as system:
        assert system.feature_msr_indices() == []


def test_other_failures_to_list_feature_msrs_are_failures(kernel: Kernel, device: str) -> None:
    kernel.fail("KVM_GET_MSR_FEATURE_INDEX_LIST", errno.E2BIG)
    with System(device) as system, pytest.raises(IoctlError, match="KVM_GET_MSR_FEATURE_INDEX_LIST: E2BIG"):
        system.feature_msr_indices()


def test_a_batch_is_one_table_and_the_irqfds_come_after_it(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    vectors = [Vector(VM_FD, routing) for _ in range(3)]
    with routing.batch():
        for vector in vectors:
            vector.route(MESSAGE)
        vectors[2].route(None)
        assert not kernel.seen
    names = [name for name, _ in kernel.seen]
    assert names == ["KVM_SET_GSI_ROUTING", "KVM_IRQFD", "KVM_IRQFD"]
    assert len(messages(kernel)) == 3
    for vector in vectors:
        vector.close()


def test_a_signal_of_before_waits_for_the_end_of_the_batch(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    vector = Vector(VM_FD, routing)
    vector.signal()
    with routing.batch():
        vector.route(MESSAGE)
        assert waits(vector)
    assert kernel.named("KVM_IRQFD")
    vector.close()


def test_a_batch_that_changes_nothing_is_not_told_to_kvm(kernel: Kernel) -> None:
    routing = Routing(VM_FD)
    with routing.batch():
        pass
    assert not kernel.seen
