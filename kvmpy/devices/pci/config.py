"""Configuration space: 4096 bytes of registers with a header of type 0 or 1 and a chain of capabilities.

PCI Express Base 5.0, section 7.5.1. Capabilities follow each other from 0x40 on in the order in which they are added,
which is part of what the guest sees: keep it stable. There are no extended capabilities: 0x100 and on read as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar, Final, TypeVar

import msgspec

from kvmpy.devices.registers import Field, RegisterBank, RegisterSpace

CONFIG_SIZE: Final = 4096
HEADER_SIZE: Final = 0x40
CHAIN_END: Final = 0x100
BAR0: Final = 0x10
ROM: Final = 0x30  # of an endpoint


class PciIds(msgspec.Struct, frozen=True):
    """Who made it and what it is; ``class_code`` is base class, subclass and interface in 24 bits."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class Command(IntEnum):
    IO = 0x0001
    MEMORY = 0x0002
    BUS_MASTER = 0x0004
    PARITY = 0x0040
    SERR = 0x0100
    INTX_DISABLE = 0x0400


COMMAND_BITS: Final = 0x0547  # all of the above; the others are hardwired to 0 in PCI Express


class Status(IntEnum):
    INTERRUPT = 0x0008
    CAPABILITIES = 0x0010
    ERRORS = 0xF900


MULTI_FUNCTION: Final = 0x80  # in the header type


class Header(RegisterBank, size=HEADER_SIZE):
    """What headers of both types share."""

    vendor = Field(0x00, 2)
    device = Field(0x02, 2)
    command = Field(0x04, 2, writable=COMMAND_BITS)
    status = Field(0x06, 2, clear=Status.ERRORS, hardware=Status.INTERRUPT)
    revision = Field(0x08, 1)
    class_code = Field(0x09, 3)
    cache_line_size = Field(0x0C, 1, writable=0xFF)
    header_type = Field(0x0E, 1)
    capabilities = Field(0x34, 1)
    interrupt_line = Field(0x3C, 1, writable=0xFF)
    interrupt_pin = Field(0x3D, 1)

    TYPE: ClassVar[int]
    BARS: ClassVar[int]

    def __init__(self, space: RegisterSpace, ids: PciIds, pin: int) -> None:
        super().__init__(
            space,
            vendor=ids.vendor,
            device=ids.device,
            class_code=ids.class_code,
            revision=ids.revision,
            header_type=self.TYPE,
            interrupt_pin=pin,
        )
        self.on_command: Callable[[], object] = lambda: None  # told when the guest has changed the command register

    @command.changed
    def _command_changed(self, old: int, new: int) -> None:
        self.on_command()


class EndpointHeader(Header):
    """Type 0."""

    subsystem_vendor = Field(0x2C, 2)
    subsystem = Field(0x2E, 2)

    TYPE = 0
    BARS = 6

    def __init__(self, space: RegisterSpace, ids: PciIds, pin: int) -> None:
        super().__init__(space, ids, pin)
        self.preset(subsystem_vendor=ids.subsystem_vendor, subsystem=ids.subsystem)


class Capability(RegisterBank, size=2):
    """An entry of the chain: a subclass says its ID and its further registers."""

    id = Field(0, 1)
    next = Field(1, 1)

    ID: ClassVar[int]

    def __init__(self, space: RegisterSpace, offset: int, **resets: int) -> None:
        super().__init__(space, offset, id=self.ID, **resets)


class VendorCapability(Capability, size=3):
    """Vendor specific: its third byte is its length."""

    length = Field(2, 1)

    ID = 0x09

    def __init__(self, space: RegisterSpace, offset: int, **resets: int) -> None:
        super().__init__(space, offset, length=self.SIZE, **resets)


C = TypeVar("C", bound=Capability)


class ConfigSpace(RegisterSpace):
    """A function's 4096 bytes. ``capabilities`` has the chain in its order."""

    def __init__(self, header: type[Header], ids: PciIds, pin: int) -> None:
        super().__init__(CONFIG_SIZE)
        self.header = header(self, ids, pin)
        self.capabilities: list[Capability] = []
        self._free = HEADER_SIZE

    def add_capability(self, kind: type[C], **resets: int) -> C:
        """Append a capability to the chain. ``resets`` are constants of this one. Raises ValueError if it is full."""
        offset, end = self._free, self._free + kind.SIZE
        if end > CHAIN_END:
            raise ValueError(f"no room for {kind.__name__} in configuration space")
        capability = kind(self, offset, **resets)
        if self.capabilities:
            self.capabilities[-1].preset(next=offset)
        else:
            self.header.preset(capabilities=offset, status=Status.CAPABILITIES)
        self.capabilities.append(capability)
        self._free = (end + 3) & ~3
        return capability
