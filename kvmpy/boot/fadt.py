"""The FADT, which says where the fixed ACPI hardware is, and the FACS it points at.

ACPI 6.5, section 5.2.9. Registers are I/O ports. What the machine does not have stays zero: SMI command, GPE blocks,
PM1b, PM2, the hardware-reduced sleep registers.
"""

from __future__ import annotations

import struct
from typing import Final

HYPERVISOR: Final = b"KVMPY\0\0\0"

PM1_EVENT_SIZE: Final = 4
PM1_CONTROL_SIZE: Final = 2
PM_TIMER_SIZE: Final = 4
NO_C2: Final = 101  # latencies above 100 and 1000 µs say that there is no such state
NO_C3: Final = 1001
CMOS_CENTURY: Final = 0x32

# IA-PC boot architecture flags, 5.2.9.3. The 8042 flag stays clear: only its reset command is modelled, and with the
# flag Linux would look for a keyboard.
LEGACY_DEVICES: Final = 1 << 0
VGA_NOT_PRESENT: Final = 1 << 2

# Fixed feature flags, table 5.10. PWR_BUTTON (bit 4) stays clear: the power button is fixed hardware.
WBINVD: Final = 1 << 0
PROC_C1: Final = 1 << 2
SLP_BUTTON: Final = 1 << 5  # no fixed sleep button
FIX_RTC: Final = 1 << 6  # no fixed wake-up by the clock
TMR_VAL_EXT: Final = 1 << 8  # the PM timer has 32 bits
RESET_REG_SUP: Final = 1 << 10
FLAGS: Final = WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP

# Generic address structure, 5.2.3.2: space, width and offset in bits, access size, address.
GENERIC_ADDRESS: Final = struct.Struct("<BBBBQ")
SYSTEM_IO: Final = 1
ACCESS_SIZE: Final = {1: 1, 2: 2, 4: 3}
NO_REGISTER: Final = bytes(GENERIC_ADDRESS.size)


def facs() -> bytes:
    """The FACS, version 2: no waking vector, the global lock free. 5.2.10."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def fadt(
    *,
    facs_gpa: int,
    dsdt_gpa: int,
    sci_irq: int,
    pm1a_event: int,
    pm1a_control: int,
    pm_timer: int,
    reset_port: int,
    reset_value: int,
) -> bytes:
    """The FADT, revision 6.0, behind its header. FACS and DSDT lie below 4 GiB."""
    return b"".join(
        (
            struct.pack("<IIBBHIBBBB", facs_gpa, dsdt_gpa, 0, 0, sci_irq, 0, 0, 0, 0, 0),
            struct.pack("<8I", pm1a_event, 0, pm1a_control, 0, 0, pm_timer, 0, 0),
            struct.pack("<8B", PM1_EVENT_SIZE, PM1_CONTROL_SIZE, 0, PM_TIMER_SIZE, 0, 0, 0, 0),
            struct.pack("<HHHHBBBBB", NO_C2, NO_C3, 0, 0, 0, 0, 0, 0, CMOS_CENTURY),
            struct.pack("<HBI", LEGACY_DEVICES | VGA_NOT_PRESENT, 0, FLAGS),
            _port(reset_port, 1),
            struct.pack("<BHB", reset_value, 0, 0),
            # Of the FACS only the 32-bit address is given: Linux takes a 64-bit one for a second FACS.
            struct.pack("<QQ", 0, dsdt_gpa),
            _port(pm1a_event, PM1_EVENT_SIZE, access_size=2),  # two registers of 16 bits, status and enable
            NO_REGISTER,
            _port(pm1a_control, PM1_CONTROL_SIZE),
            NO_REGISTER * 2,
            _port(pm_timer, PM_TIMER_SIZE),
            NO_REGISTER * 4,
            HYPERVISOR,
        )
    )


def _port(port: int, size: int, access_size: int | None = None) -> bytes:
    """The generic address of ``size`` bytes of ports."""
    return GENERIC_ADDRESS.pack(SYSTEM_IO, 8 * size, 0, ACCESS_SIZE[access_size or size], port)
