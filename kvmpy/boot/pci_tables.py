"""What ACPI says of the PCI bus: the MCFG, and in the DSDT the host bridge and the memory that nothing else may use.

PCI Firmware Specification 3.3, chapter 4, and ACPI 6.5, sections 6.2.11 and 6.2.13. Interrupts are wired to GSIs for
good, without link devices, so _PRT is a constant. It lists the root bus only: below a bridge the operating system
swizzles the pins, as the bridges do. A PCI interrupt is level-triggered and active low by definition, and no entry of
the MADT could say otherwise; KVM's IOAPIC looks at the trigger mode alone.

Only the buses that the machine has are described: Linux looks for host bridges on each that the MCFG lists and that it
has not met, which are 64 exits for a bus.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntFlag
from typing import Final

from kvmpy.boot import aml, resources

DEVICES: Final = 32
PINS: Final = 4
ANY_FUNCTION: Final = 0xFFFF

HOST_BRIDGE_UUID: Final = "33db4d5b-1ff7-401c-9657-7441c03dd766"
OSC_REVISION: Final = 1


class OscStatus(IntFlag):
    """What _OSC returns in its first dword."""

    UNKNOWN_UUID = 1 << 2
    UNKNOWN_REVISION = 1 << 3
    MASKED = 1 << 4


class OscControl(IntFlag):
    """What an operating system can ask to control, in the third dword."""

    HOT_PLUG = 1 << 0
    SHPC_HOT_PLUG = 1 << 1
    PME = 1 << 2
    AER = 1 << 3
    CAPABILITY_STRUCTURE = 1 << 4
    LTR = 1 << 5


GRANTED: Final = (
    OscControl.HOT_PLUG | OscControl.PME | OscControl.AER | OscControl.CAPABILITY_STRUCTURE | OscControl.LTR
)
"""All that this firmware, gone once the guest runs, would do itself; there is no SHPC."""


def mcfg(ecam: int, *, buses: int) -> bytes:
    """The MCFG behind its header: ``ecam`` is the gpa of that of segment 0, from bus 0 on."""
    return struct.pack("<8xQHBB4x", ecam, 0, 0, buses - 1)


def dsdt(
    *,
    buses: int,
    io: Sequence[tuple[int, int]],
    mem32: tuple[int, int],
    mem64: tuple[int, int],
    irqs: Sequence[int],
    reserved: Sequence[tuple[int, int]],
) -> bytes:
    """The host bridge and the memory that is ``reserved``, ECAM above all: without that Linux does not use it.

    Windows are (base, size); ``irqs`` are the GSIs of device 0's INTA to INTD.
    """
    windows = resources.template(
        resources.word_bus_number(0, buses),
        *(resources.word_io(*ports) for ports in io),
        resources.dword_memory(*mem32),
        # Not said to be prefetchable, as a window that is takes no BAR that is not.
        resources.qword_memory(*mem64),
    )
    return aml.scope("\\_SB", _host_bridge(windows, irqs), _reserved(reserved))


def _host_bridge(windows: bytes, irqs: Sequence[int]) -> bytes:
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name("_SEG", 0),
        aml.name("_BBN", 0),
        aml.name("_CRS", windows),
        aml.name("_PRT", _interrupt_routing(irqs)),
        _osc(),
    )


def _interrupt_routing(irqs: Sequence[int]) -> bytes:
    return aml.package(
        *(
            aml.package(device << 16 | ANY_FUNCTION, pin, 0, irqs[(device + pin) % PINS])
            for device in range(DEVICES)
            for pin in range(PINS)
        )
    )


def _osc() -> bytes:
    """_OSC(uuid, revision, count, capabilities): what of the control asked for is given.

    A query, the first bit of the first dword, has the same answer: nothing here changes with it.
    """
    status, control = aml.path("CDW1"), aml.path("CDW3")
    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(aml.arg(3), 0, "CDW1"),
        aml.if_(
            aml.lequal(aml.arg(0), aml.to_uuid(HOST_BRIDGE_UUID)),
            aml.create_dword_field(aml.arg(3), 8, "CDW3"),
            aml.if_(aml.lnot(aml.lequal(aml.arg(1), OSC_REVISION)), _add(OscStatus.UNKNOWN_REVISION, status)),
            aml.and_(control, GRANTED, aml.local(0)),
            aml.if_(aml.lnot(aml.lequal(control, aml.local(0))), _add(OscStatus.MASKED, status)),
            aml.store(aml.local(0), control),
        ),
        aml.else_(_add(OscStatus.UNKNOWN_UUID, status)),
        aml.return_(aml.arg(3)),
        serialized=True,
    )


def _add(bits: int, target: bytes) -> bytes:
    return aml.or_(target, bits, target)


def _reserved(extents: Sequence[tuple[int, int]]) -> bytes:
    """A motherboard's resources, PNP0C02: memory that is taken, all of it below 4 GiB."""
    return aml.device(
        "MRES",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", 0),
        aml.name("_CRS", resources.template(*(resources.memory32_fixed(gpa, size) for gpa, size in extents))),
    )
