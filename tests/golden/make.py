"""Write the golden files that are missing: python -m tests.golden.make"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.vfio.pci import VfioPci
from kvmpy.devices.virtio.net_state import NetFeature
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.kvm.cpu_model import CpuDescription
from kvmpy.kvm.cpuid import CpuidLeaf
from kvmpy.kvm.vcpu_registers import (
    DebugregsState,
    EventsState,
    ExceptionState,
    InterruptState,
    NmiState,
    RegsState,
    SegmentState,
    SmiState,
    SregsState,
    TripleFaultState,
    TscState,
    VcpuRegisters,
)
from kvmpy.kvm.vm_state import ClockState, PicState, VmState
from kvmpy.state import State, save
from tests.fakes.net_rig import CONTROLLED
from tests.fakes.rig import Rig
from tests.fakes.rigs import RIGS, made
from tests.fakes.virtio_rigs import VirtioRig

HERE: Final = Path(__file__).parent


def path(kind: type[State], version: int) -> Path:
    return HERE / f"{kind.NAME}-v{version}.json"


def _write(rig: Rig, *accesses: tuple[int, int]) -> None:
    for offset, value in accesses:
        rig.bus.write(offset, 1, value)


def _busy_serial(rig: Rig) -> None:
    """FIFOs on, both half full, an overrun, deltas, every interrupt enabled."""
    rig.screen.room_left = 0
    _write(rig, (3, 0x83), (0, 0x01), (3, 0x03), (7, 0xA5), (2, 0x81), (4, 0x1B))
    _write(rig, *((0, value) for value in range(17)))
    _write(rig, (4, 0x0B), (0, 0x41), (0, 0x42), (1, 0x0F))


def _busy_cmos(rig: Rig) -> None:
    """Another time, an alarm, binary mode, two interrupts, a flag pending."""
    for index, value in ((0x0B, 0x86), (0x09, 30), (0x07, 1), (0x0B, 0x06), (1, 5), (3, 0xFF), (5, 7), (0x40, 0x77)):
        _write(rig, (0, index), (1, value))
    _write(rig, (0, 0x0B), (1, 0x36))
    rig.clock.pass_(1.5)


def _busy_acpi_pm(rig: Rig) -> None:
    rig.bus.write(2, 2, 0x0121)
    rig.bus.write(4, 2, 5 << 10)
    rig.host["press"](0)
    rig.clock.pass_(1000)


def _busy_function(rig: Rig) -> None:
    """Bus master and INTx off, an interrupt line, an error seen."""
    rig.bus.write(0x04, 2, 0x0506)
    rig.bus.write(0x3C, 1, 0x0B)
    rig.bus.write(0x0C, 1, 0x10)


def _busy_root_port(rig: Rig) -> None:
    """Numbered, its windows open, the indicator blinking, MSI enabled, masked, and pending."""
    _busy_function(rig)
    rig.bus.write(0x18, 4, 0x0005_0500)
    rig.bus.write(0x20, 8, 0x0031_0021_C100_C000)
    rig.bus.write(0x28, 8, 0x0000_0011_0000_0010)
    function = rig.device
    assert isinstance(function, PciFunction)
    assert function.msi is not None
    express, msi = (capability.offset for capability in function.config.capabilities)
    rig.bus.write(express + 0x18, 2, 0x12E1)
    rig.bus.write(msi + 0x04, 8, 0xFEE0_1000)
    rig.bus.write(msi + 0x0C, 2, 0x4041)
    rig.bus.write(msi + 0x10, 1, 1)
    rig.bus.write(msi + 0x02, 2, 0x0181)
    function.msi.signal()


def _busy_virtio_pci(rig: Rig) -> None:
    """Placed, selectors used, an interrupt in the ISR, MSI-X enabled with one of its vectors masked and pending."""
    _busy_function(rig)
    rig.bus.write(0x10, 8, 0x40_0000_0000)
    function = rig.device
    assert isinstance(function, VirtioPci)
    assert function.msix is not None
    function.interrupt_config()
    with function.lock:
        for offset, size, value in ((0x00, 4, 1), (0x08, 4, 1), (0x16, 2, 1), (0x10, 2, 2)):
            function.write(offset, size, value)
    for offset, value in ((0, 0xFEE0_2000), (8, 0x4042), (16, 0xFEE0_3000), (24, 0x1_0000_4043)):
        function.msix.table.write(offset, 8, value)
    at = next(capability.offset for capability in function.config.capabilities if capability.id == 0x11)
    rig.bus.write(at + 2, 2, 0x8000)
    for index in (1, 2):
        vector = function.msix.vector(index)
        assert vector is not None
        vector.signal()


def _busy_vfio_pci(rig: Rig) -> None:
    """Placed, MSI-X enabled with one of its vectors masked and pending."""
    _busy_function(rig)
    rig.bus.write(0x10, 4, 0xC000_0000)
    rig.bus.write(0x18, 8, 0x40_0000_0000)
    function = rig.device
    assert isinstance(function, VfioPci)
    assert function.msix is not None
    for offset, value in ((0, 0xFEE0_2000), (8, 0x4042), (16, 0xFEE0_3000), (24, 0x1_0000_4043)):
        function.msix.table.write(offset, 8, value)
    at = next(capability.offset for capability in function.config.capabilities if capability.id == 0x11)
    rig.bus.write(at + 2, 2, 0x8000)
    rig.host["signal"](1)


def _busy_net(rig: Rig) -> None:
    """A driver that has set what can be set, two buffers lent; the cable pulled, an announcement wanted."""
    assert isinstance(rig, VirtioRig)
    guest = rig.guest
    guest.start(CONTROLLED | 1 << NetFeature.MTU)
    commands = (
        bytes((1, 1)) + bytes.fromhex("525400ABCDEF"),
        bytes((0, 0, 0)),
        bytes((2, 0)) + (100).to_bytes(2, "little"),
    )
    tables = (1).to_bytes(4, "little") + bytes.fromhex("525400000001") + (1).to_bytes(4, "little")
    for command in (*commands, bytes((1, 0)) + tables + bytes.fromhex("01005E000001")):
        guest.queues[2].offer([command[:2], command[2:]], [1])
        guest.kick(2)
        guest.queues[2].used()
    for _ in range(2):
        guest.queues[0].offer(writable=[500])
    guest.kick(0)
    rig.host["announce"](0)
    rig.host["link"](0)


def _busy_blk(rig: Rig) -> None:
    """Live, one queue ahead of the other, the cache switched off."""
    assert isinstance(rig, VirtioRig)
    rig.guest.start()
    rig.guest.queues[1].offer([bytes(16)], [16, 1])
    rig.guest.kick(1, run=False)
    rig.settle()
    rig.bus.write(32, 1, 0)


def _busy_rng(rig: Rig) -> None:
    assert isinstance(rig, VirtioRig)
    rig.guest.start()
    rig.guest.queues[0].offer(writable=[64])
    rig.guest.kick(0)


def _busy_console(rig: Rig) -> None:
    """Live, in the midst of a long buffer that the far end does not take, another behind it."""
    assert isinstance(rig, VirtioRig)
    rig.guest.room = 10_000
    rig.guest.start()
    for _ in range(2):
        rig.guest.queues[1].offer([bytes(10_000)])
    rig.guest.kick(1)


BUSY: Final[dict[str, Callable[[Rig], object]]] = {
    "serial": _busy_serial,
    "cmos": _busy_cmos,
    "acpi_pm": _busy_acpi_pm,
    "i8042": lambda rig: _write(rig, (4, 0x60), (0, 0x47), (4, 0xAA), (4, 0xD1)),
    "reset_register": lambda rig: _write(rig, (0, 0x02)),
    "pvpanic": lambda rig: _write(rig, (0, 0x01)),
    "debug_port": lambda rig: _write(rig, (0, 0x55)),
    "host_bridge": _busy_function,
    "root_port": _busy_root_port,
    "config_ports": lambda rig: rig.bus.write(0, 4, 0x8005_0034),
    "virtio_pci": _busy_virtio_pci,
    "vfio_pci": _busy_vfio_pci,
    "virtio_net": _busy_net,
    "virtio_blk": _busy_blk,
    "virtio_rng": _busy_rng,
    "virtio_console": _busy_console,
}


def _busy_vcpu() -> VcpuRegisters:
    """Every field is another than at power-on, and the optional ones are there."""
    return VcpuRegisters(
        mp_state=3,
        regs=RegsState(rax=2**64 - 1, rbx=2**63, rip=0xFFFF_FFFF_8100_0000, rflags=0x246),
        sregs=SregsState(cs=SegmentState(selector=0x10, type=11, l=1, g=1), cr0=0x8005_0033, cr4=0x20, efer=0xD01),
        pdptrs=(0x1001, 0x2001, 0x3001, 2**52 - 1),
        debugregs=DebugregsState(db=(1, 2, 3, 2**64 - 1), dr6=0xFFFF_0FF1, dr7=0x402),
        xcrs=((0, 7),),
        xsave=bytes(range(256)) * 44,
        lapic=bytes(reversed(range(256))) * 4,
        msrs=((0x174, 0x10), (0xC000_0082, 2**64 - 1), (0x4B56_4D01, 0x4001)),
        nested=bytes(4) + (128 + 4096).to_bytes(4, "little") + bytes(120 + 4096),
        events=EventsState(
            exception=ExceptionState(pending=1, nr=14, has_error_code=1, error_code=6),
            interrupt=InterruptState(injected=1, nr=0x31, shadow=2),
            nmi=NmiState(masked=1),
            flags=0x3D,
            smi=SmiState(latched_init=1),
            triple_fault=TripleFaultState(pending=1),
            exception_has_payload=1,
            exception_payload=0x1234_5000,
        ),
        tsc=TscState(khz=2_600_000, value=2**63, realtime=1_700_000_000 * 10**9, offset=2**64 - 5, deadline=2**63 + 1),
    )


def _busy_vm() -> VmState:
    state = VmState(clock=ClockState(nanoseconds=2**40, realtime=1_700_000_000 * 10**9))
    interrupts = state.interrupts
    interrupts.pic_master = PicState(imr=0xFB, irq_base=0x20, isr=1, elcr=0x20, elcr_mask=0xF8)
    interrupts.pic_slave = PicState(imr=0xFF, irq_base=0x28)
    interrupts.ioapic.redirtbl[4].bits, interrupts.ioapic.irr = 0xFF00_0000_0001_A031, 1 << 10
    interrupts.pit.channels[0].count, interrupts.pit.channels[0].mode, interrupts.pit.flags = 11932, 2, 2
    return state


def _busy_cpu() -> CpuDescription:
    return CpuDescription(
        cpuid=(CpuidLeaf(eax=0xD, ebx=0x756E_6547), CpuidLeaf(function=7, flags=1, ebx=0xFFFF_FFFF, edx=1)),
        msrs=(0x174, 0x4B56_4D01),
        feature_msrs=((0x10A, 2**64 - 1),),
        tsc_khz=2_600_000,
        tsc_control=True,
        xsave_size=11_264,
        nested_size=4224,
    )


OF_KVM: Final[dict[str, Callable[[], State]]] = {"vcpu": _busy_vcpu, "vm": _busy_vm, "cpu": _busy_cpu}
NAMES: Final = (*RIGS, *OF_KVM)


def kind_of(name: str) -> type[State]:
    """The State of the device in that rig, or KVM's of that name."""
    if name in OF_KVM:
        return type(OF_KVM[name]())
    with made(name) as rig:
        return type(rig.device.state)


def sections(name: str) -> dict[str, Any]:
    if name in OF_KVM:
        return {"power_on": save(kind_of(name)()), "busy": save(OF_KVM[name]())}
    with made(name) as rig:
        power_on = save(rig.device.state)
        BUSY[name](rig)
        rig.before_save()
        return {"power_on": power_on, "busy": save(rig.device.state)}


def main() -> None:
    for name in NAMES:
        kind = kind_of(name)
        file = path(kind, kind.VERSION)
        if not file.exists():
            file.write_text(json.dumps(sections(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
