"""A function of the host as the guest sees it.

Its registers are mapped straight into the guest wherever whole pages of a BAR allow that; the pages with MSI-X are
ours, since the vectors are. Configuration space is ours too: the IDs, the BARs and the interrupts are the device's, but
what the guest writes stays here, except for the three bits of the command register that let it answer and do DMA.

Left out, so that it cannot do harm: power states other than in name, link and payload settings (the host's), function
level reset by the guest, and every capability not named here: PCI Express, MSI, MSI-X, power management, and the serial
number. A guest sees a single function, whatever the device is one of.

While the machine is paused the device's DMA goes on: to stop it would break what its driver knows of it.

One that is only checked has no RAM mapped for it and was not reset by us; it answers nothing before `prepare`.

R26, release: the device's bus-master bit is cleared and its interrupts are off before anything else; then it answers
nothing, and a thread of its own resets it. Until that has ended it is not used again. A device that the host waits for
is not reset, for the kernel refuses to (`kvmpy.devices.vfio.reset`), and is not broken by that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from mmap import PAGESIZE
from typing import Any, Final

from kvmpy.abi import vfio as abi
from kvmpy.abi.vfio import Extent
from kvmpy.devices.pci.bar import BarKind, Rom
from kvmpy.devices.pci.config import Capability, Command, Status
from kvmpy.devices.pci.function import PciFunction, PciFunctionState
from kvmpy.devices.pci.msix import VECTORS, pba_size, table_size
from kvmpy.devices.registers import Field
from kvmpy.devices.vfio.config import MSI, MsixPlace
from kvmpy.devices.vfio.device import PASSED, Region, VfioDevice
from kvmpy.devices.vfio.interrupts import Interrupts, Kind
from kvmpy.devices.vfio.reset import ResetRefused
from kvmpy.devices.vfio.resetter import Resetter
from kvmpy.errors import HostError
from kvmpy.host.eventfd import EventFd
from kvmpy.host.reactor import Reactor
from kvmpy.irq import MsiSink
from kvmpy.log import Log

log = Log(__name__)

RESET_SECONDS: Final = 10.0  # the longest that a system reset waits for them all; PCI Express allows a device one
STATUS: Final = 0x06
EXTENDED: Final = 0x100
SERIAL_NUMBER: Final = 0x0001_0003  # ID and version of the extended capability, the last in the chain
FLR: Final = 1 << 28
DEAF: Final = "it does not answer: its command register cannot be set"


class VfioPciState(PciFunctionState):
    NAME = "vfio-pci"
    VERSION = 1


class PowerState(IntEnum):
    D0 = 0
    D3 = 3
    MASK = 3


class PowerCapability(Capability, size=8):
    """Power management 1.2: D0 and D3, in name only; no PME. Going to D3 and back loses nothing (No_Soft_Reset)."""

    capabilities = Field(0x02, 2, reset=0x0003)
    control = Field(0x04, 2, reset=0x0008, writable=PowerState.MASK)

    ID = 0x01

    @control.changed
    def _control_changed(self, old: int, new: int) -> None:
        if new & PowerState.MASK not in (PowerState.D0, PowerState.D3):
            self.control = old


class BarTarget:
    """A BAR whose accesses exit (a `kvmpy.bus.Target`): the kernel makes them for us."""

    def __init__(self, function: VfioPci, region: Region) -> None:
        self.name, self.lock = function.name, function.lock
        self._device, self._region = function.device, region

    def read(self, offset: int, size: int) -> int:
        """A guest's read; all ones where the device does not answer."""
        return self._device.read(self._region, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write."""
        self._device.write(self._region, offset, size, value)


class VfioPci(PciFunction[VfioPciState]):
    """``device``, which it owns; ``io`` watches for what the kernel says of it.

    ``on_broken`` is told why the device does no more, by any thread; ``on_wanted_back`` that the host waits for us to
    let go of it, by the io thread; ``on_driven`` whether the guest has it do DMA, and ``on_receiving``, often, that it
    has an interrupt on, both under the lock: they may only post. `close` takes as long as a reset.
    """

    blocks_migration: str | None = (
        "a passed-through device cannot be migrated: unplug it, or make it the primary of a failover pair"
    )

    def __init__(
        self, name: str, device: VfioDevice, sink: MsiSink, io: Reactor, *, rombar: bool = True, prepared: bool = True
    ) -> None:
        """Without ``rombar`` the guest sees no expansion ROM. ``prepared``: it is reset, and RAM is mapped.

        Raises HostError, the device closed, where the guest cannot be given it.
        """
        super().__init__(name, VfioPciState(), device.config.ids, pin=device.pin)
        self.device, self._io = device, io
        self.broken: str | None = None
        self.on_broken: Callable[[str], object] = lambda why: None
        self.on_wanted_back: Callable[[], object] = lambda: None
        self.on_driven: Callable[[bool], object] = lambda driven: None
        self.on_receiving: Callable[[], object] = lambda: None
        self._passed: int | None = 0  # what the device's command register has of PASSED; None if it did not answer
        self._answers = self.is_closing = False
        self.is_prepared = prepared
        self._preparing = False
        self._wanted_back = False  # by the host, which waits until it is closed
        self._reset_until: float | None = None  # how long a system reset that has begun waits for ours
        self._used = False  # the guest may have changed it since its last reset
        self._irqs = Interrupts(name, device, self.intx)
        self._resetter = Resetter(name, self._make_ready)
        self._watched: list[EventFd] = []
        try:
            self._add_bars()
            if rombar:
                self._add_rom()
            self._add_capabilities(sink)
            self._map_bars()
            self._watch(abi.ERROR_IRQ, self._failed)
            self._watch(abi.REQUEST_IRQ, self._host_wants_it)
            device.set_command(0)
            self._answers = prepared
        except BaseException:
            self.close()
            raise

    # What the guest sees

    def config_read(self, offset: int, size: int) -> int:
        if not self._answers:
            return (1 << 8 * size) - 1
        value = super().config_read(offset, size)
        if self._irqs.kind is Kind.INTX and offset <= STATUS < offset + size:
            asserted = self.device.config_read(STATUS, 2) & Status.INTERRUPT
            value |= asserted << 8 * (STATUS - offset)
        return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        with self.lock:  # or it could break, and be as at power-on, between these two
            if self._answers:
                super().config_write(offset, size, value)

    def info(self) -> dict[str, Any]:
        facts = super().info()
        ids = facts.pop("id")  # of a device of the configuration that is its name
        return facts | {
            "host": self.device.address,
            "ids": ids,
            "reset": self.device.resets.name,
            "broken": self.broken,
        }

    # Its life

    def on_bus_master(self, enabled: bool) -> None:
        self.on_driven(enabled)

    @property
    def is_ready(self) -> bool:
        """Whether it can be plugged in: no reset is under way, nor does it need one. Any thread."""
        return self._resetter.is_over and self._answers

    @property
    def problem(self) -> str | None:
        """Why it could not be used now, if so; one that is only to be prepared yet can. Any thread."""
        if self.is_ready or not (self.is_prepared or self.broken):
            return None
        return self.broken or ("the host takes it back" if self._resetter.is_over else "it is being reset")

    def prepare(self, then: Callable[[], object]) -> None:
        """Map RAM for it and reset it, unless that is done; ``then`` runs when it is, or could not be. Does not wait.

        By one thread, and ``then`` by the one that has done it. `close` gives it up.
        """
        if self.is_prepared:
            then()
            return
        self.is_prepared = self._preparing = True
        self._resetter.start(lambda: self._prepared(then))

    @property
    def is_wanted_back(self) -> bool:
        """The host waits until it is closed."""
        return self._wanted_back

    def begin_reset(self) -> bool:
        with self.lock:
            if self._preparing:  # the guest has never had it
                return True
            if self._reset_until is None:
                self._quiesce()
                self.broken = None
                self._resetter.start()
                self._reset_until = time.monotonic() + RESET_SECONDS
            return self._resetter.is_over

    def await_reset(self) -> None:
        if (until := self._reset_until) is not None:
            self._resetter.wait(max(until - time.monotonic(), 0))

    def reset(self) -> None:
        """A system reset: the device's too, no longer than RESET_SECONDS. No vCPU runs."""
        self.begin_reset()
        if self._preparing:
            return
        self.await_reset()
        self._reset_until = None
        if not self._resetter.is_over:
            self._break(f"it has not come out of its reset in {RESET_SECONDS:.0f} seconds")
        elif self.broken is None:  # else the host has said meanwhile that it is
            self._come_back()

    def bus_reset(self) -> None:
        """The link above went down. It answers again when its reset has ended, for which a driver waits."""
        if self._answers:  # else it is being reset, or broken, and is as at power-on to the guest
            self._quiesce()
            if self._used:
                self._resetter.start(self._after_bus_reset)
            else:
                self._answers = True

    def release(self) -> None:
        """R26, in this order: no DMA, no interrupts, no answers, a reset on a thread of its own.

        Closing waits for that, and so must whoever wants to plug it in again: `finish_reset`.
        """
        self.bus_reset()

    def finish_reset(self) -> bool:
        """Wait until no reset is under way; whether it can be plugged in. By a thread that may block, without locks."""
        self._resetter.join()
        return self._answers

    def close(self) -> None:
        """Give the device back, reset: it takes as long as that. Nothing happens if it is closed."""
        self.is_closing = True
        with self.lock:
            self.bus_reset()
        self._resetter.join()
        self._answers = False
        for event in self._watched:
            self._io.unwatch(event.fd)
        super().close()
        self.device.close()
        for event in self._watched:
            event.close()
        self._watched.clear()

    # Making it

    def _add_bars(self) -> None:
        upper: int | None = None
        for index, region in self.device.bars.items():
            kind = self.device.config.bar_kind(index)
            if index == upper or (kind.registers == 2 and index == 5) or region.size & region.size - 1:
                raise HostError(f"{self.device.address}: BAR {index}, {region.size:#x} bytes, makes no sense")
            upper = index + 1 if kind.registers == 2 else None
            if region.size not in kind.sizes:
                raise HostError(f"{self.device.address}: BAR {index} cannot have {region.size:#x} bytes")
            self.add_bar(index, region.size, kind, BarTarget(self, region))

    def _add_rom(self) -> None:
        region = self.device.rom
        if not region.size or not abi.REGION_READ & region.flags:
            return
        if region.size & region.size - 1 or region.size not in Rom.SIZES:
            log.warning("%s: has no ROM for the guest: %#x bytes make no sense", self.name, region.size)
            return
        self.add_rom(region.size, BarTarget(self, region))

    def _add_capabilities(self, sink: MsiSink) -> None:
        assert self.express is not None
        self.express.preset(device_capability=self.express.device_capability & ~FLR)
        self.config.add_capability(PowerCapability)
        if self.header.interrupt_pin:
            self._irqs.offer(Kind.INTX, ())
        if MSI in self.device.config.capabilities and self.device.interrupts(Kind.MSI):
            msi = self.add_msi(sink)
            msi.on_change = self._select
            msi.on_routed = lambda: self.on_receiving()
            self._irqs.offer(Kind.MSI, [msi.fd])
        place = self.device.config.msix
        if place is not None and self.device.interrupts(Kind.MSIX):
            self._add_host_msix(place, sink)
        if (serial := self.device.config.serial_number) is not None:
            self.config.define(EXTENDED, 4, reset=SERIAL_NUMBER)
            self.config.define(EXTENDED + 4, 8, reset=serial)

    def _add_host_msix(self, place: MsixPlace, sink: MsiSink) -> None:
        vectors = min(place.vectors, self.device.interrupts(Kind.MSIX))
        table, pba = self.bars.get(place.table_bar), self.bars.get(place.pba_bar)
        try:
            if table is None or pba is None or BarKind.IO in (table.kind, pba.kind) or vectors not in VECTORS:
                raise ValueError(f"{place}")
            msix = self.add_msix(vectors, sink, table, place.table_offset, place.pba_offset, pba)
        except ValueError as e:
            raise HostError(f"{self.device.address}: its MSI-X makes no sense: {e}") from e
        msix.on_change = self._select
        msix.on_routed = lambda: self.on_receiving()
        descriptors = [vector.fd for n in range(vectors) if (vector := msix.vector(n)) is not None]
        self._irqs.offer(Kind.MSIX, descriptors)

    def _map_bars(self) -> None:
        """Where a page cannot be mapped, the guest's accesses to it exit: slow, and right."""
        for index, region in self.device.bars.items():
            bar = self.bars[index]
            if bar.kind is BarKind.IO or not abi.REGION_READ & region.flags or not abi.REGION_WRITE & region.flags:
                continue
            for piece in without(region.areas, self._trapped(index)):
                try:
                    bar.add_direct(piece.offset, piece.size, self.device.map(region, piece))
                except HostError as e:
                    log.warning("%s: accesses to BAR %d exit: %s", self.name, index, e)

    def _trapped(self, index: int) -> list[Extent]:
        """What of a BAR is ours: MSI-X."""
        place = self.device.config.msix
        if place is None or self.msix is None:
            return []
        parts = (
            (place.table_bar, Extent(place.table_offset, table_size(self.msix.size))),
            (place.pba_bar, Extent(place.pba_offset, pba_size(self.msix.size))),
        )
        return [extent for bar, extent in parts if bar == index]

    def _watch(self, index: int, then: Callable[[EventFd], object]) -> None:
        """Have the kernel say so when ``index`` happens."""
        if not self.device.interrupts(index):
            return
        event = EventFd()
        self._watched.append(event)
        self.device.enable(index, [event.fd])
        self._io.watch(event.fd, readable=lambda: then(event))

    # What follows from what

    def _follow(self) -> None:
        """The device answers and does DMA as the guest's command register says; nothing is mapped that does not."""
        wanted = self.header.command & PASSED if self._answers else 0
        if (self._passed or 0) & ~wanted:
            self._decode()
        if not self._pass(wanted) and self._answers:
            self._break(DEAF)
            return
        super()._follow()
        self._select()

    def _pass(self, bits: int) -> bool:
        """Whether the device's command register says ``bits`` now."""
        if bits != self._passed:
            self._used = self._used or bool(bits)
            self._passed = bits if self.device.set_command(bits) else None
        return self._passed is not None

    def _select(self) -> None:
        self._irqs.select(self._kind() if self._answers else None)

    def _kind(self) -> Kind | None:
        if self.msix is not None and self.msix.enabled:
            return Kind.MSIX
        if self.msi is not None and self.msi.enabled:
            return Kind.MSI
        command = self.header.command
        in_use = command & (Command.MEMORY | Command.IO) and not command & Command.INTX_DISABLE
        return Kind.INTX if in_use else None

    def _stop(self) -> None:
        """No DMA and no interrupts when this returns: microseconds."""
        self._pass((self._passed or 0) & ~Command.BUS_MASTER)
        self._irqs.select(None)

    def _quiesce(self) -> None:
        """Stop it, and have it answer nothing. What the guest saw of it is as at power-on."""
        self._stop()
        self._answers = False
        super().reset()

    def _make_ready(self) -> None:
        """By the resetter's thread. RAM is mapped already, but the first time."""
        if not self.is_closing:
            self.device.map_memory(lambda: not self.is_closing)
        self.device.reset()

    def _prepared(self, then: Callable[[], object]) -> None:
        with self.lock:
            self._preparing = False
        if not self.is_closing:
            self._after_bus_reset()
        then()

    def _after_bus_reset(self) -> None:
        with self.lock:
            # Else another has begun since, or it broke meanwhile, or a system reset has seen to it.
            if not self._resetter.is_over or self.broken is not None or self._answers or self._reset_until is not None:
                return
            if self._wanted_back and isinstance(self._resetter.error, ResetRefused):
                log.info(
                    "%s: goes back to the host stopped, but not reset: the kernel resets nothing that it "
                    "waits to take back; whoever has it next does",
                    self.name,
                )
            else:
                self._come_back()

    def _come_back(self) -> None:
        """After its reset."""
        if self._resetter.error is not None:
            self._break(str(self._resetter.error))
        elif not self._pass(0):
            self._break(DEAF)
        else:
            self.broken, self._used, self._answers = None, False, True

    def _break(self, why: str) -> None:
        why = why.removeprefix(f"{self.device.address}: ")
        self._quiesce()
        self.broken = why
        log.error("%s: %s: %s", self.name, self.device.address, why)
        self.on_broken(why)

    def _failed(self, event: EventFd) -> None:
        with self.lock:
            if event.take():
                self._break("the host reports an error that the device cannot recover from (AER)")

    def _host_wants_it(self, event: EventFd) -> None:
        if event.take():
            self._wanted_back = True
            log.warning("%s: the host wants %s back", self.name, self.device.address)
            self.on_wanted_back()


def without(areas: Sequence[Extent], trapped: Sequence[Extent]) -> Iterator[Extent]:
    """The parts of ``areas`` that share no page with ``trapped``."""
    holes = sorted((t.offset & -PAGESIZE, -(-(t.offset + t.size) // PAGESIZE) * PAGESIZE) for t in trapped)
    for area in areas:
        start, end = area.offset, area.offset + area.size
        for first, last in holes:
            if start < first < end:
                yield Extent(start, first - start)
            if first < end:
                start = max(start, min(last, end))
        if start < end:
            yield Extent(start, end - start)
