"""ResetRegister, as Linux' reboot code uses it."""

from __future__ import annotations

from kvmpy.devices.reset_register import RESET_VALUE, ResetRegister
from tests.fakes.host import Switch


def make() -> tuple[ResetRegister, Switch]:
    power = Switch()
    return ResetRegister("reset", power), power


def test_linux_cf9_sequence_resets_once() -> None:
    register, power = make()
    register.write(0, 1, register.read(0, 1) & ~0x06 | 0x02)
    assert power.requests == []
    register.write(0, 1, register.read(0, 1) | 0x06)
    assert power.requests == ["reset"]


def test_value_of_the_fadt_resets_from_power_on() -> None:
    register, power = make()
    register.write(0, 1, RESET_VALUE)
    assert power.requests == ["reset"]


def test_cpu_bit_that_is_set_already_does_not_reset_again() -> None:
    register, power = make()
    register.write(0, 1, 0x06)
    register.write(0, 1, 0x0E)
    assert power.requests == ["reset"]


def test_only_the_three_control_bits_are_kept() -> None:
    register, _ = make()
    register.write(0, 1, 0xFB)
    assert register.read(0, 1) == 0x0A


def test_reset_lowers_the_cpu_bit_so_that_the_next_boot_can_reset() -> None:
    register, power = make()
    register.write(0, 1, 0x06)
    register.reset()
    register.write(0, 1, 0x06)
    assert power.requests == ["reset", "reset"]
