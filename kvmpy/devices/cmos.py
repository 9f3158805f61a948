"""CMOS RAM and real-time clock: an MC146818 with 128 bytes, at ports 0x70 and 0x71.

Models the Motorola MC146818A data sheet: BCD and binary, 12 and 24 hours, SET and the divider reset, alarm with "any"
bytes, update, alarm and periodic interrupts, register C. The century is in byte 0x32. Left out: daylight saving, the
square wave, the NMI mask (accepted, ignored) and the day and month alarms of later chips: the FADT must not name them.

The clock is the host's UTC plus an offset that the guest changes by setting the time. The flags of register C follow
from which guest time has passed since they were last brought up to date, so there is one rule for a register read, a
timer that fires late and a host that was away for an hour: what happened in between is flagged once.

- The timer runs only for an enabled interrupt whose flag the guest has acknowledged: a guest that does not listen costs
  nothing. Periodic flags are right at every rate, periodic interrupts come at most 64 times a second (Linux makes its
  periodic interrupts from a timer of its own; a Python host would not keep up with 8192 anyway).
- UIP is set in the last 244 us of each second, as the data sheet says, and never while the clock is stopped: a reader
  that waits for its end always sees it. Nothing blocks.
- A reset clears the interrupt enables and flags, as the RESET pin does. Time, RAM and index have a battery.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Final

from msgspec import Meta

from kvmpy.devices.base import Device, Timer
from kvmpy.irq import IrqLine
from kvmpy.latch import Latch
from kvmpy.state import State, u8

MakeTimer = Callable[[Callable[[], object]], Timer]

RAM_SIZE: Final = 128
SECOND: Final = 1_000_000  # guest time is in microseconds
UIP_LEAD: Final = 244
HALF_SECOND: Final = SECOND // 2
CRYSTAL_HZ: Final = 32768
FASTEST_PERIOD: Final = CRYSTAL_HZ // 64  # of periodic interrupts, in ticks of the crystal

# Bounds of what is loaded: beyond what the registers can express (the year 25755), and a sum stays within 64 bits.
Offset = Annotated[int, Meta(ge=-(2**60), le=2**60)]
Instant = Annotated[int, Meta(ge=-(2**61), le=2**61)]
u7 = Annotated[int, Meta(ge=0, le=0x7F)]
Ram = Annotated[bytes, Meta(min_length=RAM_SIZE, max_length=RAM_SIZE)]


class Port(IntEnum):
    INDEX, DATA = range(2)


class Reg(IntEnum):
    SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
    WEEKDAY, DAY, MONTH, YEAR, A, B, C, D = range(6, 14)
    BASE_MEMORY = 0x15
    EXTENDED_MEMORY = 0x17
    EXTENDED_MEMORY_TOO = 0x30
    CENTURY = 0x32
    MEMORY_ABOVE_16M = 0x34
    MEMORY_ABOVE_4G = 0x5B


TIME_REGS: Final = frozenset(
    {Reg.SECONDS, Reg.MINUTES, Reg.HOURS, Reg.WEEKDAY, Reg.DAY, Reg.MONTH, Reg.YEAR, Reg.CENTURY}
)


class A(IntEnum):
    RATE = 0x0F
    DIVIDER_RESET = 0x60  # both bits: the divider chain is held in reset
    WRITABLE = 0x7F
    UIP = 0x80


class B(IntEnum):
    HOURS_24 = 0x02
    BINARY = 0x04
    INTERRUPTS = 0x70  # PIE, AIE, UIE, each where register C has its flag
    SET = 0x80


class C(IntEnum):
    UPDATE = 0x10
    ALARM = 0x20
    PERIODIC = 0x40
    IRQ = 0x80


ANY: Final = 0xC0  # an alarm byte with both bits matches everything
PM: Final = 0x80  # in the hours of a 12-hour clock
VALID_RAM_AND_TIME: Final = 0x80  # register D


class CmosState(State):
    NAME = "cmos"
    VERSION = 1
    index: u7 = 0
    a: u7 = 0x26  # 32768 Hz crystal, rate 1024 Hz
    b: u8 = B.HOURS_24.value
    c: u8 = 0
    offset: Offset = 0  # guest time minus UTC
    flagged: Instant = 0  # register C is complete up to this guest time
    ram: Ram = bytes(RAM_SIZE)  # time registers: as of the stop, while the clock is stopped


class Cmos(Device[CmosState]):
    """Two ports, index and data. ``clock`` gives UTC seconds; ``make_timer`` a Timer for a callback.

    ``low_memory`` is the RAM below 4 GiB, ``high_memory`` that above, in bytes; CMOS RAM tells them as QEMU's does.
    """

    def __init__(
        self,
        name: str,
        irq: IrqLine,
        make_timer: MakeTimer,
        clock: Callable[[], float] = time.time,
        *,
        low_memory: int = 0,
        high_memory: int = 0,
    ) -> None:
        super().__init__(name, CmosState(ram=_memory_sizes(low_memory, high_memory)))
        self._irq, self._clock = irq, clock
        self.index = Latch(Port.INDEX, 1, mask=RAM_SIZE - 1)
        self._timer = make_timer(self.on_timer)
        self.state.flagged = self._now()
        self._select(self.state.index)

    def on_timer(self) -> None:
        """The next event is due. Any thread."""
        with self.lock:
            self._update_flags()
            self._update_irq()

    def read(self, offset: int, size: int) -> int:
        return self._read_register(self.index.value) if offset == Port.DATA else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == Port.INDEX:
            self._select(value)
        elif offset == Port.DATA:
            self._write_register(self.index.value, value & 0xFF)

    def reset(self) -> None:
        self.state.b &= ~B.INTERRUPTS
        self.state.c = 0
        self.post_load()

    def post_load(self) -> None:
        self._select(self.state.index)
        self._update_irq()

    def pause(self) -> None:
        self.state.index = self.index.value

    def close(self) -> None:
        self._timer.cancel()

    def _select(self, index: int) -> None:
        self.index.set(index, stores=True)

    def _read_register(self, index: int) -> int:
        s = self.state
        match index:
            case Reg.A:
                updating = not self._stopped and self._now() % SECOND >= SECOND - UIP_LEAD
                return s.a | (A.UIP if updating else 0)
            case Reg.B:
                return s.b
            case Reg.C:
                self._update_flags()
                value = s.c | (C.IRQ if s.c & s.b & B.INTERRUPTS else 0)
                s.c = 0
                self._update_irq()
                return value
            case Reg.D:
                return VALID_RAM_AND_TIME
            case _ if index in TIME_REGS and not self._stopped:
                return self._registers(self._now())[index]
            case _:
                return s.ram[index]

    def _write_register(self, index: int, value: int) -> None:
        s = self.state
        self._update_flags()
        match index:
            case Reg.A:
                self._control(value & A.WRITABLE, s.b)
            case Reg.B:
                self._control(s.a, value & ~C.UPDATE if value & B.SET else value)
            case Reg.C | Reg.D:
                return
            case _ if index in TIME_REGS and not self._stopped:
                now = self._now()
                self._store_time(now)
                self._store(index, value)
                self._take_time(now, phase=now % SECOND)
            case _:
                self._store(index, value)
        self._update_irq()

    def _control(self, a: int, b: int) -> None:
        """Set A and B. While SET or the divider reset holds the clock, the time registers are plain bytes.

        The first second after a divider reset is half a second long, which is why Linux sets the time at half past one.
        """
        s, now = self.state, self._now()
        was_stopped, was_reset = self._stopped, _divider_reset(s.a)
        if not was_stopped:
            self._store_time(now)  # in the old mode; if the clock goes on, nobody reads it
        s.a, s.b = a, b
        if was_stopped and not self._stopped:
            self._take_time(now, phase=HALF_SECOND if was_reset else now % SECOND)

    @property
    def _stopped(self) -> bool:
        return bool(self.state.b & B.SET) or _divider_reset(self.state.a)

    def _store_time(self, now: int) -> None:
        for index, value in self._registers(now).items():
            self._store(index, value)

    def _take_time(self, now: int, phase: int) -> None:
        """Go on from the time in RAM, ``phase`` microseconds into its second. Impossible dates carry over."""
        ram = self.state.ram
        year = self._decode(ram[Reg.CENTURY]) * 100 + self._decode(ram[Reg.YEAR])
        month = min(max(self._decode(ram[Reg.MONTH]), 1), 12)
        days = _days_from_civil(year, month, self._decode(ram[Reg.DAY]))
        hours, minutes = self._decode_hours(ram[Reg.HOURS]), self._decode(ram[Reg.MINUTES])
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + self._decode(ram[Reg.SECONDS])
        self.state.flagged = seconds * SECOND + phase
        self.state.offset += self.state.flagged - now

    def _now(self) -> int:
        return int(self._clock() * SECOND) + self.state.offset

    def _store(self, index: int, value: int) -> None:
        ram = self.state.ram
        self.state.ram = ram[:index] + bytes((value,)) + ram[index + 1 :]

    def _registers(self, micros: int) -> dict[int, int]:
        t = time.gmtime(micros // SECOND)
        return {
            Reg.SECONDS: self._encode(t.tm_sec),
            Reg.MINUTES: self._encode(t.tm_min),
            Reg.HOURS: self._encode_hours(t.tm_hour),
            Reg.WEEKDAY: self._encode((t.tm_wday + 1) % 7 + 1),
            Reg.DAY: self._encode(t.tm_mday),
            Reg.MONTH: self._encode(t.tm_mon),
            Reg.YEAR: self._encode(t.tm_year % 100),
            Reg.CENTURY: self._encode(t.tm_year // 100 % 100),
        }

    def _encode(self, value: int) -> int:
        return value if self.state.b & B.BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.state.b & B.BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _encode_hours(self, hours: int) -> int:
        if self.state.b & B.HOURS_24:
            return self._encode(hours)
        return self._encode(hours % 12 or 12) | (PM if hours >= 12 else 0)

    def _decode_hours(self, value: int) -> int:
        if self.state.b & B.HOURS_24:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _update_flags(self) -> None:
        """Flag in register C what happened in (flagged, now]."""
        s = self.state
        if self._stopped:
            return
        since, s.flagged = s.flagged, self._now()
        if s.flagged // SECOND > since // SECOND:
            s.c |= C.UPDATE
            alarm = self._next_alarm(since)
            if alarm is not None and alarm <= s.flagged:
                s.c |= C.ALARM
        period = _period(s.a)
        if period and _next_tick(since, period) <= s.flagged:
            s.c |= C.PERIODIC

    def _next_alarm(self, after: int) -> int | None:
        """The first second after ``after`` whose hour, minute and second match the alarm bytes, in guest time."""
        ram = self.state.ram
        hours = {h for h in range(24) if _matches(ram[Reg.HOURS_ALARM], self._encode_hours(h))}
        minutes = {m for m in range(60) if _matches(ram[Reg.MINUTES_ALARM], self._encode(m))}
        seconds = {s for s in range(60) if _matches(ram[Reg.SECONDS_ALARM], self._encode(s))}
        if not (hours and minutes and seconds):
            return None
        second = after // SECOND + 1
        while True:  # at most a day's hours, an hour's minutes and a minute's seconds, once more after midnight
            if second // 3600 % 24 not in hours:
                second += 3600 - second % 3600
            elif second // 60 % 60 not in minutes:
                second += 60 - second % 60
            elif second % 60 not in seconds:
                second += 1
            else:
                return second * SECOND

    def _update_irq(self) -> None:
        """The line follows from the flags; the timer waits for the next flag that would raise it."""
        s = self.state
        self._irq.set(level=bool(s.c & s.b & B.INTERRUPTS))
        awaited = s.b & ~s.c & B.INTERRUPTS
        due: list[int] = []
        if not self._stopped:
            if awaited & C.UPDATE:
                due.append((s.flagged // SECOND + 1) * SECOND)
            if awaited & C.ALARM and (alarm := self._next_alarm(s.flagged)) is not None:
                due.append(alarm)
            if awaited & C.PERIODIC and (period := _period(s.a)):
                due.append(_next_tick(s.flagged, max(period, FASTEST_PERIOD)))
        if due:
            self._timer.arm(max(min(due) - self._now(), 0) / SECOND)
        else:
            self._timer.cancel()


def _divider_reset(a: int) -> bool:
    return a & A.DIVIDER_RESET == A.DIVIDER_RESET


def _period(a: int) -> int:
    """Register A's periodic rate in ticks of the crystal; 0 is off. Rates 1 and 2 are those of 8 and 9."""
    rate = a & A.RATE
    if rate == 0:
        return 0
    return 1 << (rate + 7 if rate <= 2 else rate) - 1


def _next_tick(after: int, period: int) -> int:
    """The first multiple of ``period`` ticks after the time ``after``, in microseconds, rounded up."""
    ticks = (after * CRYSTAL_HZ // SECOND // period + 1) * period
    return -(-ticks * SECOND // CRYSTAL_HZ)


def _matches(alarm: int, value: int) -> bool:
    return alarm == value or alarm & ANY == ANY


def _days_from_civil(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01 in the Gregorian calendar; ``day`` may be any number."""
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)  # years begin in March
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469


def _memory_sizes(low: int, high: int) -> bytes:
    """What firmware tells of the memory: KiB below and above 1 MiB, 64 KiB units above 16 MiB and above 4 GiB."""
    ram = bytearray(RAM_SIZE)

    def put(at: int, size: int, value: int) -> None:
        ram[at : at + size] = min(max(value, 0), (1 << 8 * size) - 1).to_bytes(size, "little")

    put(Reg.BASE_MEMORY, 2, min(low >> 10, 640))
    put(Reg.EXTENDED_MEMORY, 2, (low >> 10) - 1024)
    put(Reg.EXTENDED_MEMORY_TOO, 2, (low >> 10) - 1024)
    put(Reg.MEMORY_ABOVE_16M, 2, (low >> 16) - 256)
    put(Reg.MEMORY_ABOVE_4G, 3, high >> 16)
    return bytes(ram)
