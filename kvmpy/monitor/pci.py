"""query-pci: the buses as the guest has numbered and programmed them."""

from __future__ import annotations

from typing import Any, Final

from kvmpy.devices.pci.bar import BarKind
from kvmpy.devices.pci.bridge import BridgeHeader
from kvmpy.devices.pci.config import EndpointHeader
from kvmpy.devices.pci.function import PciFunction
from kvmpy.monitor.table import Caller, NoArguments, Reply, command

# The classes a machine of ours can have, in QEMU's words
CLASSES: Final = {
    0x0100: "SCSI controller",
    0x0108: "NVMe controller",
    0x0200: "Ethernet controller",
    0x0600: "Host bridge",
    0x0604: "PCI bridge",
    0x0780: "Communication controller",
}
UNMAPPED: Final = -1


class PciMemoryRange(Reply, frozen=True, kw_only=True):
    """What a bridge forwards; nothing where the limit is below the base."""

    base: int  # the first address
    limit: int  # the last


class PciBusInfo(Reply, frozen=True, kw_only=True):
    """The buses behind a bridge."""

    number: int  # the bus it is on
    secondary: int  # the one behind it
    subordinate: int  # the highest one behind it
    io_range: PciMemoryRange  # ports
    memory_range: PciMemoryRange  # 32-bit addresses
    prefetchable_range: PciMemoryRange  # prefetchable memory


class PciMemoryRegion(Reply, frozen=True, kw_only=True):
    """A BAR."""

    bar: int  # its number
    type: str  # "io" or "memory"
    address: int  # where it is; -1 while it is not decoded
    size: int  # in bytes
    prefetch: bool | None = None  # of memory: it is prefetchable
    mem_type_64: bool | None = None  # of memory: it can be above 4 GiB


class PciDeviceClass(Reply, frozen=True, kw_only=True, rename={"class_": "class"}):
    """What kind of device it is."""

    class_: int  # base class and subclass
    desc: str | None = None  # in words


class PciDeviceId(Reply, frozen=True, kw_only=True, rename="kebab"):
    """Who made it."""

    device: int  # the device id
    vendor: int  # the vendor id
    subsystem: int | None = None  # of all but bridges: the subsystem id
    subsystem_vendor: int | None = None  # of all but bridges: the subsystem's vendor id


class PciDeviceInfo(Reply, frozen=True, kw_only=True):
    """A function."""

    bus: int  # its bus
    slot: int  # its device number
    function: int  # its function number
    class_info: PciDeviceClass  # what it is
    id: PciDeviceId  # who made it
    irq: int | None = None  # what the guest has written into the interrupt line register
    irq_pin: int  # 1 to 4 for INTA to INTD, 0 for none
    qdev_id: str  # its id
    pci_bridge: PciBridgeInfo | None = None  # of a bridge: what is behind it
    regions: list[PciMemoryRegion]  # its BARs


class PciBridgeInfo(Reply, frozen=True, kw_only=True):
    """A bridge."""

    bus: PciBusInfo  # its numbers and windows
    devices: list[PciDeviceInfo] | None = None  # what is behind it; left out while the guest has not numbered that bus


class PciInfo(Reply, frozen=True, kw_only=True):
    """A root bus."""

    bus: int  # its number
    devices: list[PciDeviceInfo]  # what is on it


Place = tuple[int, int, int, PciFunction[Any]]


@command("query-pci", NoArguments, list[PciInfo])
def query_pci(caller: Caller, _: NoArguments) -> list[PciInfo]:
    """List the PCI functions that the guest can reach, as it has programmed them."""
    places = list(caller.machine.board.pci.functions())
    return [PciInfo(bus=0, devices=[_device(place, places) for place in places if place[0] == 0])]


def _device(place: Place, places: list[Place]) -> PciDeviceInfo:
    bus, slot, number, function = place
    with function.lock:
        header = function.header
        endpoint = header if isinstance(header, EndpointHeader) else None
        kind, pin = header.class_code >> 8, header.interrupt_pin
        return PciDeviceInfo(
            bus=bus,
            slot=slot,
            function=number,
            class_info=PciDeviceClass(class_=kind, desc=CLASSES.get(kind)),
            id=PciDeviceId(
                device=header.device,
                vendor=header.vendor,
                subsystem=endpoint.subsystem if endpoint else None,
                subsystem_vendor=endpoint.subsystem_vendor if endpoint else None,
            ),
            irq=header.interrupt_line if pin else None,
            irq_pin=pin,
            qdev_id="" if function.express is None else function.name,  # the host bridge has no id
            pci_bridge=_bridge(bus, header, places) if isinstance(header, BridgeHeader) else None,
            regions=_regions(function),
        )


def _bridge(bus: int, header: BridgeHeader, places: list[Place]) -> PciBridgeInfo:
    behind = header.secondary
    return PciBridgeInfo(
        bus=PciBusInfo(
            number=bus,
            secondary=behind,
            subordinate=header.subordinate,
            io_range=_range(header.io),
            memory_range=_range(header.memory),
            prefetchable_range=_range(header.prefetchable),
        ),
        devices=[_device(place, places) for place in places if place[0] == behind] if behind else None,
    )


def _range(window: range) -> PciMemoryRange:
    return PciMemoryRange(base=window.start, limit=window.stop - 1)


def _regions(function: PciFunction[Any]) -> list[PciMemoryRegion]:
    regions = []
    for number, bar in sorted(function.bars.items()):
        memory = bar.kind is not BarKind.IO
        regions.append(
            PciMemoryRegion(
                bar=number,
                type="memory" if memory else "io",
                address=UNMAPPED if bar.programmed is None else bar.programmed,
                size=bar.size,
                prefetch=bar.kind is BarKind.MEM64_PREFETCHABLE if memory else None,
                mem_type_64=bar.kind.registers == 2 if memory else None,
            )
        )
    return regions
