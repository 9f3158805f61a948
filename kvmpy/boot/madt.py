"""The MADT, signature "APIC": the interrupt controllers.

ACPI 6.5, section 5.2.12. One I/O APIC takes every GSI; the two PICs are there too (PCAT_COMPAT). ISA interrupts are
edge-triggered and active high and have their own numbers, but for the timer and the SCI.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

PCAT_COMPAT: Final = 1 << 0
ENABLED: Final = 1 << 0

LOCAL_APIC: Final = struct.Struct("<BBBBI")  # type 0: length, uid, APIC id, flags
IO_APIC: Final = struct.Struct("<BBBBII")  # type 1: length, id, reserved, gpa, first GSI
INTERRUPT_OVERRIDE: Final = struct.Struct("<BBBBIH")  # type 2: length, bus, IRQ, GSI, flags
LOCAL_APIC_NMI: Final = struct.Struct("<BBBHB")  # type 4: length, uid, flags, LINT
LOCAL_X2APIC: Final = struct.Struct("<BBHIII")  # type 9: length, reserved, x2APIC id, flags, uid
LOCAL_X2APIC_NMI: Final = struct.Struct("<BBHIB3x")  # type 10: length, flags, uid, LINT

X2APIC_FIRST: Final = 255  # APIC id 255 is the broadcast of the xAPIC
ALL_APICS: Final = 0xFF
ALL_X2APICS: Final = 0xFFFF_FFFF
NMI_LINT: Final = 1

ISA_BUS: Final = 0
TIMER_IRQ: Final = 0
TIMER_GSI: Final = 2  # where a PC wires the PIT, and where KVM's routing puts it
AS_THE_BUS: Final = 0
ACTIVE_HIGH_LEVEL: Final = 0b1101


def madt(*, apic_ids: Sequence[int], lapic: int, ioapic: int, ioapic_id: int, sci_irq: int) -> bytes:
    """The MADT behind its header; a processor's _UID is its APIC id."""
    entries = [struct.pack("<II", lapic, PCAT_COMPAT)]
    entries += [_processor(apic_id) for apic_id in apic_ids]
    entries += [
        IO_APIC.pack(1, IO_APIC.size, ioapic_id, 0, ioapic, 0),
        INTERRUPT_OVERRIDE.pack(2, INTERRUPT_OVERRIDE.size, ISA_BUS, TIMER_IRQ, TIMER_GSI, AS_THE_BUS),
        INTERRUPT_OVERRIDE.pack(2, INTERRUPT_OVERRIDE.size, ISA_BUS, sci_irq, sci_irq, ACTIVE_HIGH_LEVEL),
        LOCAL_APIC_NMI.pack(4, LOCAL_APIC_NMI.size, ALL_APICS, AS_THE_BUS, NMI_LINT),
    ]
    if any(apic_id >= X2APIC_FIRST for apic_id in apic_ids):
        entries.append(LOCAL_X2APIC_NMI.pack(10, LOCAL_X2APIC_NMI.size, AS_THE_BUS, ALL_X2APICS, NMI_LINT))
    return b"".join(entries)


def _processor(apic_id: int) -> bytes:
    if apic_id < X2APIC_FIRST:
        return LOCAL_APIC.pack(0, LOCAL_APIC.size, apic_id, apic_id, ENABLED)
    return LOCAL_X2APIC.pack(9, LOCAL_X2APIC.size, 0, apic_id, ENABLED, apic_id)
