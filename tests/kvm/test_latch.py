"""Accesses that C answers beside KVM_RUN, on the real kernel: the guest cannot tell, and cannot hide in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import trace
from kvmpy.config.schema import Config, load
from kvmpy.kvm.exits import MmioRead, PioRead
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome
from tests.fakes.pvh_kernel import POWER_OFF, pvh_kernel
from tests.kvm.conftest import MakeGuest, run

PORTS = {
    "the line's status": b"\x66\xba\xfd\x03\xec",  # mov dx, 0x3fd; in al, dx
    "a port that nobody has": b"\x66\xba\x00\x05\xec",
    "the debug port": b"\x66\xba\x80\x00\xec",
    "the debug port, twice the same": b"\x66\xba\x80\x00\xb0\x77\xee\xee\x30\xc0\xec",  # al, 0x77; out, out; in
    "a register of the clock": b"\x66\xba\x70\x00\xb0\x0d\xee\x66\xba\x71\x00\xec",  # D, of which bit 7 is set
    "another of them": b"\x66\xba\x70\x00\xb0\x34\xee\x66\xba\x71\x00\xec",
    "the vendor of 00:00.0": b"\x66\xba\xf8\x0c\xb8\x00\x00\x00\x80\xef\x66\xba\xfc\x0c\xec",
    "the address of that": b"\x66\xba\xf8\x0c\xb8\x03\x01\x00\xff\xef\x31\xc0\xed\xc1\xe8\x18",  # in eax; shr eax, 24
    "memory that nobody has": b"\xa0\x00\x00\x00\xd0",  # mov al, [0xd0000000]
}
SAY = b"\x66\xba\xf8\x03\xee"  # mov dx, 0x3f8; out dx, al
SPINS = {
    "port": b"\x66\xba\x00\x05\xec\xeb\xfd",  # mov dx, 0x500; again: in al, dx; jmp again
    "memory": b"\xa3\x00\x00\x00\xd0\xeb\xf9",  # again: mov [0xd0000000], eax; jmp again
    "debug port": b"\x66\xba\x80\x00\xee\xeb\xfd",  # mov dx, 0x80; again: out dx, al; jmp again
}

MakeMachine = Callable[[bytes], Config]


@pytest.fixture
def make(tmp_path: Path) -> MakeMachine:
    def make(code: bytes) -> Config:
        (tmp_path / "kernel").write_bytes(pvh_kernel(code))
        file = tmp_path / "machine.toml"
        file.write_text('[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n[console]\nserial = "file:console"\n')
        return load(file)

    return make


def test_the_guest_is_told_the_same_by_c_as_by_the_devices(make: MakeMachine, tmp_path: Path) -> None:
    config = make(b"".join(access + SAY for access in PORTS.values()) + POWER_OFF)

    def told() -> tuple[bytes, int]:
        with Machine(config) as machine:
            machine.start()
            assert machine.wait(60) is Outcome.POWER_OFF
            return (tmp_path / "console").read_bytes()[-len(PORTS) :], machine.threads[0].vcpu.pio_exits

    by_c, exits = told()
    heard: list[str] = []
    trace.enable("bus.*", heard.append)
    try:
        by_devices, all_exits = told()
    finally:
        trace.disable(heard.append)
    assert by_c == by_devices
    assert dict(zip(PORTS, by_c, strict=True)) == {
        "the line's status": 0x60,
        "a port that nobody has": 0xFF,
        "the debug port": 0,
        "the debug port, twice the same": 0x77,
        "a register of the clock": 0x80,
        "another of them": 0,
        "the vendor of 00:00.0": 0x36,
        "the address of that": 0x80,
        "memory that nobody has": 0xFF,
    }
    assert exits == all_exits > 20
    assert sum("bus.read" in line or "bus.write" in line or "bus=pio" in line for line in heard) >= all_exits


@pytest.mark.parametrize("code", SPINS.values(), ids=SPINS)
def test_a_guest_that_makes_only_such_accesses_can_be_paused_and_ended(make: MakeMachine, code: bytes) -> None:
    with Machine(make(code)) as machine:
        vcpu = machine.board.vcpus[0]

        def exits() -> int:
            return vcpu.pio_exits + vcpu.mmio_exits

        def runs() -> None:
            before, until = exits(), time.monotonic() + 60
            while exits() < before + 100:
                assert time.monotonic() < until, "the guest does not run"
                time.sleep(0.001)

        machine.start()
        runs()
        machine.pause()
        still = exits()
        time.sleep(0.01)  # in which it would make a thousand
        assert exits() == still
        machine.resume()
        runs()
        heard: list[str] = []
        trace.enable("bus.*", heard.append)
        try:
            runs()
        finally:
            trace.disable(heard.append)
        assert len(heard) >= 50


def test_without_buses_every_access_is_an_exit(make_guest: MakeGuest) -> None:
    vcpu = make_guest().load(b"\xe4\x80\xe4\x80\xf4")  # in al, 0x80, twice
    assert run(vcpu) == PioRead(0x80, 1, 1)
    assert run(vcpu) == PioRead(0x80, 1, 1)
    assert not isinstance(run(vcpu), PioRead | MmioRead)
    assert vcpu.pio_exits == 2
