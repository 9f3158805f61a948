"""ACPI fixed hardware: power button, soft-off and the power management timer.

Models the PM1 event and control blocks and PM_TMR of ACPI 6.5, section 4.8.3, in one window of 16 bytes; the FADT gives
their places. The system is in ACPI mode from the start (SCI_EN reads 1, there is no SMI command). Left out: general
purpose events, sleep states other than S5 (tried ones are traced), the sleep button and the RTC's fixed event (their
enable bits can be set, as drivers check, but their status never is).

The PM timer runs at 3.579545 MHz with 32 bits (the FADT says TMR_VAL_EXT). TMR_STS, which tells that bit 31 changed,
is brought up to date when the guest touches the block: with TMR_EN, which Linux does not use, the SCI is that late.

Time across a migration: the state holds the nanoseconds since power-on up to the last access. The machine calls
`settle` once the vCPUs stand still, so that the counter goes on from there, and `advance` on the other side with the
pause, if the guest's other clocks count it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from kvmpy.devices.base import Device, Power
from kvmpy.irq import IrqLine
from kvmpy.state import State, u16, u64
from kvmpy.trace import Tracepoint

trace_sleep = Tracepoint("acpi_pm.sleep", "device slp_typ")


class Reg(IntEnum):
    """Offsets in the window. The FADT's PM1a event block is PM1_STATUS and PM1_ENABLE: 4 bytes."""

    PM1_STATUS = 0
    PM1_ENABLE = 2
    PM1_CONTROL = 4
    PM_TIMER = 8


WINDOW_SIZE: Final = 16
PM_TIMER_HZ: Final = 3_579_545
SLP_TYP_S5: Final = 5  # the DSDT's \_S5 says this


class Event(IntEnum):
    """Bits of PM1_STATUS and PM1_ENABLE alike."""

    TIMER = 0x0001
    GLOBAL_LOCK = 0x0020
    POWER_BUTTON = 0x0100
    SLEEP_BUTTON = 0x0200
    RTC = 0x0400


class Control(IntEnum):
    SCI_EN = 0x0001
    BM_RLD = 0x0002
    GBL_RLS = 0x0004  # write-only; there is no firmware to tell
    SLP_TYP = 0x1C00
    SLP_EN = 0x2000  # write-only


ENABLE_BITS: Final = Event.TIMER | Event.GLOBAL_LOCK | Event.POWER_BUTTON | Event.SLEEP_BUTTON | Event.RTC
CONTROL_BITS: Final = Control.BM_RLD | Control.SLP_TYP
NS: Final = 1_000_000_000


class AcpiPmState(State):
    NAME = "acpi-pm"
    VERSION = 1
    status: u16 = 0
    enable: u16 = 0
    control: u16 = 0
    elapsed_ns: u64 = 0  # since power-on, at the last access


class AcpiPm(Device[AcpiPmState]):
    """``sci`` is the level interrupt of the FADT's SCI_INT; ``clock`` gives nanoseconds that only grow.

    Host side, any thread: `press_power_button`, `settle`, `advance`.
    """

    def __init__(self, name: str, sci: IrqLine, power: Power, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(name, AcpiPmState())
        self._sci, self._power, self._clock = sci, power, clock
        self._settled_at = clock()  # the host's time of state.elapsed_ns

    @property
    def power_button_enabled(self) -> bool:
        """Whether the guest listens to its power button."""
        return bool(self.state.enable & Event.POWER_BUTTON)

    def press_power_button(self) -> bool:
        """Latch the press and raise the SCI. False when the guest has not enabled the button: it may never look."""
        with self.lock:
            self.state.status |= Event.POWER_BUTTON
            self._update_irq()
            return self.power_button_enabled

    def settle(self) -> None:
        """Bring the state's time up to now: before a save, with the vCPUs stopped."""
        with self.lock:
            now = self._clock()
            self._pass(now - self._settled_at)
            self._settled_at = now

    def advance(self, nanoseconds: int) -> None:
        with self.lock:
            self._pass(nanoseconds)

    def read(self, offset: int, size: int) -> int:
        self.settle()
        s = self.state
        block = (
            s.status << 8 * Reg.PM1_STATUS
            | s.enable << 8 * Reg.PM1_ENABLE
            | (s.control | Control.SCI_EN) << 8 * Reg.PM1_CONTROL
            | (_ticks(s.elapsed_ns) & 0xFFFF_FFFF) << 8 * Reg.PM_TIMER
        )
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.settle()
        s = self.state
        mask = (1 << 8 * size) - 1
        ones, touched = (value & mask) << 8 * offset, mask << 8 * offset
        s.status &= ~(ones >> 8 * Reg.PM1_STATUS) & 0xFFFF  # ones clear
        s.enable = _merge(s.enable, ones >> 8 * Reg.PM1_ENABLE, touched >> 8 * Reg.PM1_ENABLE & ENABLE_BITS)
        control = ones >> 8 * Reg.PM1_CONTROL
        s.control = _merge(s.control, control, touched >> 8 * Reg.PM1_CONTROL & CONTROL_BITS)
        self._update_irq()
        if control & Control.SLP_EN:
            self._sleep((s.control & Control.SLP_TYP) >> 10)

    def pause(self) -> None:
        self.settle()

    def post_load(self) -> None:
        self._settled_at = self._clock()
        self._update_irq()

    def _sleep(self, slp_typ: int) -> None:
        if slp_typ == SLP_TYP_S5:
            self._power.request_shutdown()
        elif trace_sleep:
            trace_sleep(self.name, slp_typ)

    def _pass(self, nanoseconds: int) -> None:
        s = self.state
        before = _ticks(s.elapsed_ns)
        s.elapsed_ns = (s.elapsed_ns + max(nanoseconds, 0)) & 0xFFFF_FFFF_FFFF_FFFF
        if before >> 31 != _ticks(s.elapsed_ns) >> 31:
            s.status |= Event.TIMER
            self._update_irq()

    def _update_irq(self) -> None:
        self._sci.set(level=bool(self.state.status & self.state.enable))


def _ticks(nanoseconds: int) -> int:
    return nanoseconds * PM_TIMER_HZ // NS


def _merge(old: int, new: int, mask: int) -> int:
    return old & ~mask | new & mask
