"""Cmos, as Linux' rtc-cmos and mc146818 code see it. 1 700 000 000 is Tuesday, 2023-11-14 22:13:20 UTC."""

from __future__ import annotations

import pytest

from kvmpy.devices import cmos
from kvmpy.devices.cmos import Cmos
from kvmpy.state import load, save
from tests.fakes.host import Clock, Line

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR, A, B, C, D = range(6, 14)
CENTURY = 0x32
TIME = (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)

SET, PIE, AIE, UIE, BINARY, HOURS_24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
UIP = 0x80
ANY = 0xFF


class Bench:
    def __init__(self, utc: float = 1_700_000_000.0, low_memory: int = 0, high_memory: int = 0) -> None:
        self.line, self.clock = Line(), Clock(utc)
        self.rtc = Cmos(
            "rtc", self.line, self.clock.timer, self.clock.utc, low_memory=low_memory, high_memory=high_memory
        )
        self.timer = self.clock.timers[0]

    def read(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def write(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def time(self) -> str:
        """The time registers as BCD reads: century, year, month, day, hours, minutes, seconds."""
        return " ".join(f"{self.read(index):02x}" for index in TIME)

    def set_time(self, *values: int) -> None:
        """As mc146818_set_time: stopped by SET and the divider reset, which end in this order."""
        control, rate = self.read(B), self.read(A)
        self.write(B, control | SET)
        self.write(A, rate | 0x70)
        for index, value in zip(TIME, values, strict=True):
            self.write(index, value)
        self.write(B, control)
        self.write(A, rate)

    def set_alarm(self, hours: int, minutes: int, seconds: int) -> None:
        self.write(HOURS_ALARM, hours)
        self.write(MINUTES_ALARM, minutes)
        self.write(SECONDS_ALARM, seconds)

    def moved(self) -> Bench:
        """The same clock on another host."""
        there = Bench(self.clock.utc())
        there.rtc.state = load(type(self.rtc.state), save(self.rtc.state))
        there.rtc.post_load()
        return there


def test_time_is_the_hosts_utc_in_bcd() -> None:
    b = Bench()
    assert b.time() == "20 23 11 14 22 13 20"
    assert b.read(WEEKDAY) == 3


def test_time_in_binary() -> None:
    b = Bench()
    b.write(B, HOURS_24 | BINARY)
    assert [b.read(index) for index in TIME] == [20, 23, 11, 14, 22, 13, 20]


@pytest.mark.parametrize(
    ("hour", "expected"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (22, 0x90), (23, 0x91)]
)
def test_twelve_hour_clock_marks_the_afternoon(hour: int, expected: int) -> None:
    b = Bench(utc=hour * 3600)
    b.write(B, 0)
    assert b.read(HOURS) == expected


def test_time_set_as_linux_does_goes_on_half_a_second_later() -> None:
    b = Bench()
    b.set_time(0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x59)
    b.clock.pass_(0.49)
    assert b.time() == "20 24 02 29 23 59 59"
    b.clock.pass_(0.02)
    assert b.time() == "20 24 03 01 00 00 00"


@pytest.mark.parametrize(
    "values",
    [
        (0x19, 0x70, 0x01, 0x01, 0x00, 0x00, 0x00),
        (0x19, 0x69, 0x12, 0x31, 0x23, 0x59, 0x58),
        (0x20, 0x00, 0x02, 0x29, 0x12, 0x00, 0x01),
        (0x21, 0x00, 0x02, 0x28, 0x12, 0x00, 0x01),
        (0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58),
        (0x00, 0x01, 0x01, 0x01, 0x01, 0x01, 0x01),
    ],
)
def test_any_valid_time_reads_back_as_set(values: tuple[int, ...]) -> None:
    b = Bench()
    b.set_time(*values)
    assert b.time() == " ".join(f"{value:02x}" for value in values)


def test_time_set_in_the_twelve_hour_clock_is_the_afternoon() -> None:
    b = Bench()
    b.write(B, 0)
    b.set_time(0x20, 0x24, 0x05, 0x05, 0x92, 0x30, 0x00)
    b.write(B, HOURS_24)
    assert b.read(HOURS) == 0x12


def test_impossible_day_carries_over() -> None:
    b = Bench()
    b.set_time(0x20, 0x23, 0x02, 0x31, 0x00, 0x00, 0x00)
    assert b.time() == "20 23 03 03 00 00 00"


def test_single_register_written_while_running_keeps_the_others() -> None:
    b = Bench()
    b.write(MINUTES, 0x59)
    assert b.time() == "20 23 11 14 22 59 20"


def test_set_time_survives_reset_and_migration() -> None:
    b = Bench()
    b.set_time(0x20, 0x30, 0x01, 0x01, 0x00, 0x00, 0x00)
    b.rtc.reset()
    there = b.moved()
    there.clock.pass_(60)
    assert there.time() == "20 30 01 01 00 01 00"


def test_time_stands_still_while_set() -> None:
    b = Bench()
    b.write(B, HOURS_24 | SET)
    b.clock.pass_(5)
    assert b.time() == "20 23 11 14 22 13 20"
    assert b.read(A) & UIP == 0


def test_update_in_progress_shows_in_the_last_244_microseconds() -> None:
    b = Bench()
    b.clock.pass_(0.9997)
    assert b.read(A) & UIP == 0
    b.clock.pass_(0.0001)
    assert b.read(A) & UIP
    b.clock.pass_(0.001)
    assert b.read(A) & UIP == 0


def test_index_ignores_the_nmi_bit_and_cannot_be_read() -> None:
    b = Bench()
    assert b.read(0x80 | MINUTES) == 0x13
    assert b.rtc.read(0, 1) == 0xFF


def test_register_d_says_that_the_battery_is_good() -> None:
    b = Bench()
    b.write(D, 0)
    assert b.read(D) == 0x80


def test_update_interrupt_comes_each_second_while_acknowledged() -> None:
    b = Bench()
    b.write(B, HOURS_24 | UIE)
    b.clock.pass_(1.1)
    assert b.line.high()
    assert b.read(C) & 0x90 == 0x90
    assert not b.line.high()
    b.clock.pass_(1)
    assert b.line.high()


def test_flags_without_enables_are_seen_by_polling_and_need_no_timer() -> None:
    b = Bench()
    b.clock.pass_(1)
    assert b.read(C) & 0xF0 == 0x50
    assert b.read(C) == 0
    assert b.timer.rings == 0


def test_guest_that_never_acknowledges_costs_one_timer() -> None:
    b = Bench()
    b.write(B, HOURS_24 | UIE | PIE)
    b.clock.pass_(100)
    assert b.timer.rings == 2
    assert b.timer.due is None


def test_alarm_comes_at_its_time_and_not_before() -> None:
    b = Bench()
    b.set_alarm(0x22, 0x14, 0x05)
    b.write(B, HOURS_24 | AIE)
    b.clock.pass_(44.9)
    assert not b.line.high()
    b.clock.pass_(0.2)
    assert b.line.high()
    assert b.read(C) & 0xA0 == 0xA0


def test_alarm_of_a_time_gone_by_comes_tomorrow() -> None:
    b = Bench()
    b.set_alarm(0x22, 0x13, 0x20)
    b.write(B, HOURS_24 | AIE)
    b.clock.pass_(86399)
    assert not b.line.high()
    b.clock.pass_(2)
    assert b.line.high()


def test_alarm_with_any_hour_and_minute_comes_each_minute() -> None:
    b = Bench()
    b.set_alarm(ANY, 0xC0, 0x30)
    b.write(B, HOURS_24 | AIE)
    b.clock.pass_(10.1)
    assert b.read(C) & 0xA0 == 0xA0
    b.clock.pass_(59.8)
    assert not b.line.high()
    b.clock.pass_(0.2)
    assert b.line.high()


def test_alarm_with_an_impossible_byte_never_comes() -> None:
    b = Bench()
    b.set_alarm(ANY, ANY, 0x7A)
    b.write(B, HOURS_24 | AIE)
    assert b.timer.due is None


@pytest.mark.parametrize("alarm", [(0x7F, ANY, ANY), (ANY, 0x7F, ANY), (ANY, ANY, 0x7F), (0x00, 0x00, 0x00)])
def test_the_next_alarm_is_found_in_few_steps(alarm: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    b, compared = Bench(), 0

    def match(one: int, other: int) -> bool:
        nonlocal compared
        compared += 1
        return matches(one, other)

    matches = cmos._matches
    monkeypatch.setattr(cmos, "_matches", match)
    b.set_alarm(*alarm)
    b.write(B, HOURS_24 | AIE)
    assert compared <= 5 * (24 + 60 + 60)


def test_alarm_follows_the_time_when_it_is_set() -> None:
    b = Bench()
    b.set_alarm(0x00, 0x00, 0x00)
    b.write(B, HOURS_24 | AIE)
    b.set_time(0x20, 0x23, 0x11, 0x14, 0x23, 0x59, 0x58)
    b.clock.pass_(1.6)
    assert b.line.high()


def test_setting_the_clock_disables_the_update_interrupt() -> None:
    b = Bench()
    b.write(B, HOURS_24 | UIE)
    b.write(B, HOURS_24 | UIE | SET)
    assert b.read(B) == HOURS_24 | SET


def test_periodic_interrupt_comes_at_its_rate() -> None:
    b = Bench()
    b.write(A, 0x2F)
    b.write(B, HOURS_24 | PIE)
    b.clock.pass_(0.499)
    assert not b.line.high()
    b.clock.pass_(0.002)
    assert b.read(C) == 0xC0


def test_fast_periodic_interrupts_come_at_most_64_times_a_second() -> None:
    b = Bench()
    b.write(A, 0x23)
    b.write(B, HOURS_24 | PIE)
    for _ in range(1000):
        b.clock.pass_(0.001)
        b.read(C)
    assert 50 <= b.timer.rings <= 65


def test_fast_periodic_flag_is_right_for_polling() -> None:
    b = Bench()
    b.write(A, 0x26)
    b.read(C)
    b.clock.pass_(0.001)
    assert b.read(C) & 0x40


def test_reset_clears_enables_and_flags_and_nothing_else() -> None:
    b = Bench()
    b.write(0x40, 0x77)
    b.write(B, HOURS_24 | UIE | AIE | PIE)
    b.clock.pass_(2)
    b.rtc.reset()
    assert not b.line.high()
    assert b.timer.due is None
    assert (b.read(B), b.read(0x40)) == (HOURS_24, 0x77)


def test_alarm_that_passed_during_a_migration_comes_at_once() -> None:
    b = Bench()
    b.set_alarm(0x22, 0x13, 0x25)
    b.write(B, HOURS_24 | AIE)
    b.clock.timers.clear()
    b.clock.pass_(60)
    there = b.moved()
    there.clock.pass_(0.001)
    assert there.line.high()


def test_line_is_up_after_loading_a_flagged_interrupt() -> None:
    b = Bench()
    b.write(B, HOURS_24 | UIE)
    b.clock.pass_(2)
    assert b.moved().line.high()


def test_host_clock_that_steps_back_raises_nothing_twice() -> None:
    b = Bench()
    b.clock.pass_(100)
    b.read(C)
    b.clock.now_ns -= 50_000_000_000
    assert b.read(C) == 0


def test_close_cancels_the_timer() -> None:
    b = Bench()
    b.write(B, HOURS_24 | UIE)
    b.rtc.close()
    assert b.timer.due is None


def test_memory_sizes_are_where_firmware_leaves_them() -> None:
    b = Bench(low_memory=512 << 20, high_memory=3 << 30)
    assert [b.read(i) for i in (0x15, 0x16)] == [0x80, 0x02]
    assert [b.read(i) for i in (0x17, 0x18, 0x30, 0x31)] == [0xFF] * 4
    assert [b.read(i) for i in (0x34, 0x35)] == [0x00, 0x1F]
    assert [b.read(i) for i in (0x5B, 0x5C, 0x5D)] == [0x00, 0xC0, 0x00]
