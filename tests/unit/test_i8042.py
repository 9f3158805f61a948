"""I8042, as Linux' i8042 driver and its reboot code see it."""

from __future__ import annotations

import pytest

from kvmpy.bus import Bus
from kvmpy.devices.i8042 import I8042
from tests.fakes.host import Switch

DATA, COMMAND = 0x60, 0x64


def make() -> tuple[Bus, Switch]:
    pio, power = Bus("pio"), Switch()
    controller = I8042("i8042", power)
    pio.map(DATA, 1, controller.data_port, widest=1)
    pio.map(COMMAND, 1, controller.command_port, widest=1)
    return pio, power


def ask(pio: Bus, command: int, *data: int) -> int:
    pio.write(COMMAND, 1, command)
    for value in data:
        pio.write(DATA, 1, value)
    assert pio.read(COMMAND, 1) & 0x01
    return pio.read(DATA, 1)


def test_pulse_of_the_reset_line_asks_for_a_reset() -> None:
    pio, power = make()
    pio.write(COMMAND, 1, 0xFE)
    assert power.requests == ["reset"]


def test_pulse_of_no_line_does_nothing() -> None:
    pio, power = make()
    pio.write(COMMAND, 1, 0xFF)
    assert power.requests == []


def test_low_reset_bit_in_the_output_port_asks_for_a_reset() -> None:
    pio, power = make()
    pio.write(COMMAND, 1, 0xD1)
    pio.write(DATA, 1, 0xFE)
    assert power.requests == ["reset"]


def test_output_port_keeps_what_is_written_while_reset_is_high() -> None:
    pio, power = make()
    pio.write(COMMAND, 1, 0xD1)
    pio.write(DATA, 1, 0xDF)
    assert ask(pio, 0xD0) == 0xDF
    assert power.requests == []


def test_input_buffer_is_never_full() -> None:
    pio, _ = make()
    pio.write(COMMAND, 1, 0x60)
    assert pio.read(COMMAND, 1) & 0x02 == 0


def test_self_test_passes() -> None:
    pio, _ = make()
    assert ask(pio, 0xAA) == 0x55


def test_keyboard_interface_test_passes() -> None:
    pio, _ = make()
    assert ask(pio, 0xAB) == 0x00


def test_command_byte_reads_back() -> None:
    pio, _ = make()
    pio.write(COMMAND, 1, 0x60)
    pio.write(DATA, 1, 0x47)
    assert ask(pio, 0x20) == 0x47


@pytest.mark.parametrize(("command", "expected"), [(0xA7, 0x34), (0xA8, 0x14), (0xAD, 0x34), (0xAE, 0x24)])
def test_enabling_and_disabling_shows_in_the_command_byte(command: int, expected: int) -> None:
    pio, _ = make()
    pio.write(COMMAND, 1, command)
    assert ask(pio, 0x20) == expected


def test_reading_data_empties_the_output_buffer() -> None:
    pio, _ = make()
    ask(pio, 0xAA)
    assert pio.read(COMMAND, 1) & 0x01 == 0


def test_status_tells_a_command_from_data() -> None:
    pio, _ = make()
    pio.write(COMMAND, 1, 0xAD)
    assert pio.read(COMMAND, 1) == 0x1C
    pio.write(DATA, 1, 0x00)
    assert pio.read(COMMAND, 1) == 0x14


def test_aux_loop_answers_without_the_mouse_bit_so_that_linux_finds_no_mouse() -> None:
    pio, _ = make()
    pio.write(COMMAND, 1, 0xD3)
    pio.write(DATA, 1, 0x5A)
    assert pio.read(COMMAND, 1) & 0x21 == 0x01
    assert pio.read(DATA, 1) == 0x5A
    assert ask(pio, 0xA9) == 0x01


def test_absent_keyboard_answers_nothing() -> None:
    pio, _ = make()
    pio.write(DATA, 1, 0xED)
    assert pio.read(COMMAND, 1) & 0x01 == 0


def test_new_command_withdraws_one_that_waits_for_data() -> None:
    pio, power = make()
    pio.write(COMMAND, 1, 0xD1)
    pio.write(COMMAND, 1, 0xAD)
    pio.write(DATA, 1, 0x00)
    assert power.requests == []


def test_port_between_the_two_is_not_claimed() -> None:
    pio, _ = make()
    assert pio.read(0x61, 1) == 0xFF
