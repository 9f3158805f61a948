"""virtio-pci: a virtio device as a PCI function (Virtio 1.2, section 4.1), modern only.

One 64-bit prefetchable BAR has everything: the common configuration, the ISR status byte, the device's own
configuration, a doorbell for each queue, and MSI-X. Vendor capabilities say where; one more is a window to it all from
configuration space, for a driver that cannot map memory yet.

Interrupts are MSI-X vectors, one for each queue and one for changes of the configuration, as the driver maps them.
Until it enables MSI-X they are INTx, with the reason in the ISR status byte; reading that acknowledges.
"""

from __future__ import annotations

from typing import Any, Final

from kvmpy.abi.virtio import NO_VECTOR, PCI_DEVICE, PCI_VENDOR, DeviceId, Isr, PciCap
from kvmpy.devices.base import Closable
from kvmpy.devices.pci.bar import Bar, BarKind
from kvmpy.devices.pci.config import PciIds, VendorCapability
from kvmpy.devices.pci.function import PciFunction, PciFunctionState
from kvmpy.devices.registers import Field, RegisterSpace
from kvmpy.devices.virtio.common import COMMON_SIZE, CommonConfig, CommonState
from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.host.eventfd import EventFd
from kvmpy.irq import MsiSink
from kvmpy.state import part, u8

BAR: Final = 0
BAR_SIZE: Final = 0x8000
PAGE: Final = 0x1000
COMMON, ISR, DEVICE, NOTIFY = (page * PAGE for page in range(4))
REGISTERS_END: Final = 4 * PAGE
MSIX_TABLE: Final = 0x4000
MSIX_PBA: Final = 0x7000
NOTIFY_MULTIPLIER: Final = 4  # bytes between two doorbells; queue_notify_off is the queue's number

# Revision 1 and a subsystem ID of 0x40 or more are what a device without the legacy interface has (section 4.1.2.1).
REVISION: Final = 1
CLASS_CODES: Final = {
    DeviceId.NET: 0x020000,
    DeviceId.BLOCK: 0x018000,
    DeviceId.CONSOLE: 0x078000,
    DeviceId.ENTROPY: 0xFF0000,
}


class VirtioPciState(PciFunctionState):
    NAME = "virtio-pci"
    VERSION = 1
    common: CommonState = part(CommonState)
    isr: u8 = 0


class RegionCapability(VendorCapability, size=16):
    """struct virtio_pci_cap: where in a BAR something is."""

    cfg_type = Field(3, 1)
    bar = Field(4, 1)
    region = Field(8, 4)
    region_size = Field(12, 4)


class NotifyCapability(RegionCapability, size=20):
    """struct virtio_pci_notify_cap."""

    multiplier = Field(16, 4)


class WindowCapability(RegionCapability, size=20):
    """struct virtio_pci_cfg_cap: the driver says where, and ``data`` is what is there (section 4.1.4.9)."""

    bar = Field(4, 1, writable=0xFF)
    region = Field(8, 4, writable=0xFFFF_FFFF)
    region_size = Field(12, 4, writable=0xFFFF_FFFF)
    data = Field(16, 4, writable=0xFFFF_FFFF)

    def __init__(self, space: RegisterSpace, offset: int, **resets: int) -> None:
        super().__init__(space, offset, **resets)
        self.function: VirtioPci | None = None

    @data.reading
    def _read(self) -> None:
        if self.function is not None and self._is_open():
            self.data = self.function.read(self.region, self.region_size)

    @data.written
    def _write(self, old: int, new: int) -> None:
        if self.function is not None and self._is_open():
            self.function.write(self.region, self.region_size, new & (1 << 8 * self.region_size) - 1)

    def _is_open(self) -> bool:
        """Whether it shows a part of our registers; the MSI-X table is not to be reached this way."""
        size = self.region_size
        return self.bar == BAR and size in (1, 2, 4) and not self.region % size and self.region < REGISTERS_END


class VirtioPci(PciFunction[VirtioPciState]):
    """The function that carries ``device`` (its Transport), with the device's lock.

    Both are in the machine's list of devices: they are paused, saved and closed separately. ``vectors`` defaults to one
    for each queue and one more; 0 is no MSI-X.
    """

    # Linux's driver resets a device that it loses, and waits for the status to read 0, whether it is there or not: then
    # it frees its buffers.
    ZERO_WHEN_TORN_OUT = True

    def __init__(self, name: str, device: VirtioDevice[Any], sink: MsiSink, vectors: int | None = None) -> None:
        """Raises HostError where the host has not so many vectors."""
        ids = PciIds(
            vendor=PCI_VENDOR,
            device=PCI_DEVICE + device.DEVICE_ID,
            class_code=CLASS_CODES[device.DEVICE_ID],
            revision=REVISION,
            subsystem_vendor=PCI_VENDOR,
            subsystem=PCI_DEVICE + device.DEVICE_ID,
        )
        super().__init__(name, VirtioPciState(), ids, lock=device.lock)
        self.device = device
        self._common = CommonConfig(self)
        self._bar = self.add_bar(BAR, BAR_SIZE, BarKind.MEM64_PREFETCHABLE, self)
        self._add_capabilities(self._bar)
        if vectors != 0:
            count = len(device.queues) + 1 if vectors is None else vectors
            self.add_msix(count, sink, self._bar, MSIX_TABLE, MSIX_PBA).on_change = self._msix_changed
        self._uses_msix = False
        self._call: EventFd | None = None
        device.transport = self
        device.set_bus_master(enabled=False)

    # What the guest reads and writes in the BAR

    def read(self, offset: int, size: int) -> int:
        match offset & -PAGE:
            case 0x0000:
                return self._common.read(offset, size)
            case 0x1000 if offset == ISR and size == 1:
                return self._take_isr()
            case 0x2000:
                return self.device.config_read(offset - DEVICE, size)
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        match offset & -PAGE:
            case 0x0000:
                self._common.write(offset, size, value)
            case 0x2000:
                self.device.config_write(offset - DEVICE, size, value)
            case 0x3000 if not offset % NOTIFY_MULTIPLIER:
                self.device.notify((offset - NOTIFY) // NOTIFY_MULTIPLIER)

    # For the common configuration

    @property
    def common(self) -> CommonState:
        """What migrates of it."""
        return self.state.common

    def valid_vector(self, value: int) -> int:
        """``value`` if the function has such a vector, else NO_VECTOR."""
        return value if self.msix is not None and self.msix.vector(value) is not None else NO_VECTOR

    def vectors_changed(self) -> None:
        """The driver has mapped a queue to another vector."""
        self.device.calls_changed()

    def write_status(self, value: int) -> None:
        """The device's status; a reset of the device is one of its transport too."""
        self.device.write_status(value)
        if not value:
            self._reset_transport()

    # For the device: Transport

    def interrupt_queue(self, index: int) -> None:
        """By the queue's vector, or by INTx."""
        if self.msix is not None and self.msix.enabled:
            self._signal(self.device.queues[index].state.vector)
        else:
            self._set_isr(Isr.QUEUE)

    def interrupt_config(self) -> None:
        """By the configuration's vector, or by INTx; the ISR bit is set either way."""
        if self.msix is not None and self.msix.enabled:
            self._signal(self.state.common.config_vector)
        self._set_isr(Isr.CONFIG)

    def call_event(self, index: int) -> int:
        """The eventfd of the queue's vector; without MSI-X one that the io thread turns into INTx."""
        if self.msix is not None and self.msix.enabled:
            vector = self.msix.vector(self.device.queues[index].state.vector)
            return -1 if vector is None else vector.fd
        if self._call is None:
            call = EventFd()
            try:
                self.device.io.watch(call.fd, readable=self._called)
            except BaseException:
                call.close()
                raise
            self._call = call
        return self._call.fd

    def doorbell(self, index: int, kick: EventFd) -> Closable:
        """Wherever the BAR is, and whenever it is mapped."""
        return self._bar.add_doorbell(NOTIFY + NOTIFY_MULTIPLIER * index, kick)

    # The life cycle

    @property
    def busy(self) -> bool:
        return self.device.busy

    def on_bus_master(self, enabled: bool) -> None:
        self.device.set_bus_master(enabled=enabled)

    def reset(self) -> None:
        self.device.reset()
        self._reset_transport()
        super().reset()

    def post_load(self) -> None:
        super().post_load()
        self._msix_changed()
        self._drive()

    def close(self) -> None:
        with self.lock:
            if self._call is not None:
                self.device.io.unwatch(self._call.fd)
                self._call.close()
                self._call = None
        super().close()

    def _add_capabilities(self, bar: Bar) -> None:
        for kind, where, size in (
            (PciCap.COMMON, COMMON, COMMON_SIZE),
            (PciCap.ISR, ISR, 1),
            (PciCap.DEVICE, DEVICE, PAGE),
        ):
            self.config.add_capability(RegionCapability, cfg_type=kind, bar=bar.index, region=where, region_size=size)
        self.config.add_capability(
            NotifyCapability,
            cfg_type=PciCap.NOTIFY,
            bar=bar.index,
            region=NOTIFY,
            region_size=NOTIFY_MULTIPLIER * len(self.device.queues),
            multiplier=NOTIFY_MULTIPLIER,
        )
        self.config.add_capability(WindowCapability, cfg_type=PciCap.PCI).function = self

    def _reset_transport(self) -> None:
        """Selectors, vectors and interrupts as at power-on. Configuration space and the MSI-X table stay."""
        self.state.common, self.state.isr = CommonState(), 0
        if self._call is not None:
            self._call.take()
        self._drive()

    def _signal(self, index: int) -> None:
        vector = None if self.msix is None else self.msix.vector(index)
        if vector is not None:
            vector.signal()

    def _set_isr(self, bit: Isr) -> None:
        self.state.isr |= bit
        self._drive()

    def _take_isr(self) -> int:
        isr, self.state.isr = self.state.isr, 0
        self._drive()
        return isr

    def _drive(self) -> None:
        """INTx follows the ISR status byte, while the driver has not chosen MSI-X."""
        self.intx.set(level=bool(self.state.isr) and not self._uses_msix)

    def _called(self) -> None:
        """Somebody signalled the eventfd that we gave out as INTx."""
        with self.lock:
            if self._call is not None and self._call.take() and not self._uses_msix:
                self._set_isr(Isr.QUEUE)

    def _msix_changed(self) -> None:
        """Only whether MSI-X is used concerns us: a vector is the same, masked or not and whatever its message."""
        uses_msix = self.msix is not None and self.msix.enabled
        if uses_msix != self._uses_msix:
            self._uses_msix = uses_msix
            self._drive()
            self.device.calls_changed()
