"""AcpiPm, as ACPICA uses it: power button, S5, timer."""

from __future__ import annotations

from kvmpy.devices.acpi_pm import PM_TIMER_HZ, AcpiPm
from tests.fakes.host import Clock, Line, Switch

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
POWER_BUTTON = 0x0100
S5 = 5 << 10
SLP_EN = 0x2000


class Bench:
    def __init__(self) -> None:
        self.sci, self.power, self.clock = Line(), Switch(), Clock()
        self.pm = AcpiPm("acpi-pm", self.sci, self.power, self.clock.ns)

    def read(self, offset: int, size: int = 2) -> int:
        return self.pm.read(offset, size)

    def write(self, offset: int, value: int, size: int = 2) -> None:
        self.pm.write(offset, size, value)


def test_system_is_in_acpi_mode_and_stays_there() -> None:
    b = Bench()
    b.write(CONTROL, 0)
    assert b.read(CONTROL) == 0x0001


def test_power_button_raises_the_sci_until_its_status_is_cleared() -> None:
    b = Bench()
    b.write(ENABLE, POWER_BUTTON)
    assert b.pm.press_power_button()
    assert b.sci.high()
    assert b.read(STATUS) == POWER_BUTTON
    b.write(STATUS, POWER_BUTTON)
    assert not b.sci.high()


def test_press_that_the_guest_has_not_enabled_is_latched_and_said_so() -> None:
    b = Bench()
    assert not b.pm.press_power_button()
    assert not b.sci.high()
    b.write(ENABLE, POWER_BUTTON)
    assert b.sci.high()


def test_status_keeps_bits_where_zeros_are_written() -> None:
    b = Bench()
    b.pm.press_power_button()
    b.write(STATUS, 0x0021)
    assert b.read(STATUS) == POWER_BUTTON


def test_status_is_cleared_by_its_own_byte_only() -> None:
    b = Bench()
    b.pm.press_power_button()
    b.write(STATUS, 0xFF, size=1)
    assert b.read(STATUS) == POWER_BUTTON
    b.write(STATUS + 1, 0x01, size=1)
    assert b.read(STATUS) == 0


def test_every_enable_bit_that_acpica_checks_reads_back() -> None:
    b = Bench()
    b.write(ENABLE, 0xFFFF)
    assert b.read(ENABLE) == 0x0721


def test_dword_access_reaches_status_and_enable() -> None:
    b = Bench()
    b.write(STATUS, POWER_BUTTON << 16, size=4)
    b.pm.press_power_button()
    assert b.read(STATUS, 4) == POWER_BUTTON << 16 | POWER_BUTTON


def test_sleep_of_type_5_shuts_down() -> None:
    b = Bench()
    b.write(CONTROL, S5)
    assert b.power.requests == []
    b.write(CONTROL, S5 | SLP_EN)
    assert b.power.requests == ["shutdown"]


def test_sleep_enable_written_as_a_byte_takes_the_type_beside_it() -> None:
    b = Bench()
    b.write(CONTROL + 1, (S5 | SLP_EN) >> 8, size=1)
    assert b.power.requests == ["shutdown"]


def test_other_sleep_types_are_ignored() -> None:
    b = Bench()
    b.write(CONTROL, 1 << 10 | SLP_EN)
    assert b.power.requests == []


def test_sleep_enable_reads_zero_and_the_type_reads_back() -> None:
    b = Bench()
    b.write(CONTROL, 3 << 10 | SLP_EN)
    assert b.read(CONTROL) == 3 << 10 | 1


def test_timer_counts_at_its_rate() -> None:
    b = Bench()
    b.clock.pass_(10)
    assert b.read(TIMER, 4) == 10 * PM_TIMER_HZ


def test_timer_reads_at_any_width_and_ignores_writes() -> None:
    b = Bench()
    b.clock.pass_(100)
    whole = b.read(TIMER, 4)
    b.write(TIMER, 0, size=4)
    assert b.read(TIMER, 2) | b.read(TIMER + 2, 1) << 16 | b.read(TIMER + 3, 1) << 24 == whole


def test_timer_wraps_at_32_bits_and_latches_its_status() -> None:
    b = Bench()
    b.clock.pass_(2**31 / PM_TIMER_HZ + 1)
    assert b.read(STATUS) == 0x0001
    b.write(STATUS, 0x0001)
    b.clock.pass_(2**31 / PM_TIMER_HZ)
    assert b.read(TIMER, 4) < 2 * PM_TIMER_HZ
    assert b.read(STATUS) == 0x0001


def test_timer_goes_on_where_it_was_on_another_host() -> None:
    here, there = Bench(), Bench()
    there.clock.now_ns = 5
    here.clock.pass_(10)
    here.pm.settle()
    there.pm.state = here.pm.state
    there.pm.post_load()
    there.pm.advance(2_000_000_000)
    there.clock.pass_(1)
    assert there.read(TIMER, 4) == 13 * PM_TIMER_HZ


def test_loading_restores_the_sci() -> None:
    here, there = Bench(), Bench()
    here.write(ENABLE, POWER_BUTTON)
    here.pm.press_power_button()
    there.pm.state = here.pm.state
    there.pm.post_load()
    assert there.sci.high()


def test_reset_starts_the_timer_anew_and_lowers_the_sci() -> None:
    b = Bench()
    b.write(ENABLE, POWER_BUTTON)
    b.pm.press_power_button()
    b.clock.pass_(10)
    b.pm.reset()
    assert b.read(TIMER, 4) == 0
    assert not b.sci.high()


def test_timer_status_stays_clear_between_two_changes_of_bit_31() -> None:
    b = Bench()
    b.clock.pass_(2**31 / PM_TIMER_HZ + 1)
    b.read(STATUS)
    b.write(STATUS, 0x0001)
    b.clock.pass_(1)
    assert b.read(STATUS) == 0


def test_bits_beyond_the_size_of_a_write_are_ignored() -> None:
    b = Bench()
    b.write(CONTROL, (S5 | SLP_EN) << 16 | S5, size=1)
    assert b.power.requests == []
    b.write(ENABLE, SLP_EN << 16, size=2)
    assert b.power.requests == []
