"""One open function of the host: its regions, its interrupts, its reset. What the kernel says of them is checked too.

Registers are reached by pread and pwrite, which the kernel does as single accesses of that width, or by mapping a
region where it allows that. A device that has left its bus reads as all ones.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from kvmpy._native import ffi
from kvmpy.abi import vfio as abi
from kvmpy.abi.vfio import Extent
from kvmpy.devices.pci.config import CONFIG_SIZE, Command
from kvmpy.devices.vfio.config import HostConfig
from kvmpy.devices.vfio.container import DmaSpace
from kvmpy.devices.vfio.reset import Reset, choose
from kvmpy.errors import HostError, errno_name
from kvmpy.host.eventfd import EventFd
from kvmpy.log import Log

log = Log(__name__)

BARS: Final = range(6)
COMMAND: Final = 0x04
# What of the command register reaches the device; the rest is the kernel's, or only shown.
PASSED: Final = Command.IO | Command.MEMORY | Command.BUS_MASTER


class Region(msgspec.Struct, frozen=True):
    """Part of the device's descriptor, ``size`` bytes from ``offset`` on; ``areas`` may be mapped."""

    size: int
    offset: int
    flags: int
    areas: Sequence[Extent] = ()


class VfioDevice:
    """The function at ``address`` of the host, open. Any thread; the function's lock orders what must be in order.

    ``bars`` are those it has, ``rom`` its expansion ROM, of size 0 where there is none that can be read.
    """

    def __init__(self, address: str, group: int, space: DmaSpace) -> None:
        """Raises HostError, with nothing left open, where it cannot be passed through."""
        self.address, self._group, self._space = address, group, space
        self._maps: list[mmap.mmap] = []
        self.fd = space.open(address, group)
        try:
            info, _ = abi.VFIO_DEVICE_GET_INFO(self.fd)
            if not info.flags & abi.DEVICE_PCI or info.num_regions <= abi.CONFIG_REGION:
                raise HostError(f"{address}: is no PCI device to VFIO")
            self._irqs = info.num_irqs
            self.bars = {index: region for index in BARS if (region := self._region(index)).size}
            self._config = self._region(abi.CONFIG_REGION)
            self.rom = self._region(abi.ROM_REGION)
            self.config = HostConfig(address, self._read_config())
            self.pin = self.config.pin if self.interrupts(abi.INTX_IRQ) else 0
            self.resets: Reset = choose(address, self.config, resets=bool(info.flags & abi.DEVICE_RESETS))
            self.resets.check(self.fd)
        except BaseException:
            self.close()
            raise

    # Registers

    def read(self, region: Region, offset: int, size: int) -> int:
        """All ones where the device does not answer."""
        try:
            data = os.pread(self.fd, size, region.offset + offset)
        except OSError:
            data = b""
        return int.from_bytes(data, "little") if len(data) == size else (1 << 8 * size) - 1

    def write(self, region: Region, offset: int, size: int, value: int) -> bool:
        """Whether the device took it."""
        try:
            return os.pwrite(self.fd, value.to_bytes(size, "little"), region.offset + offset) == size
        except OSError:
            return False

    def config_read(self, offset: int, size: int) -> int:
        """A register of the function's own configuration space."""
        return self.read(self._config, offset, size)

    def set_command(self, bits: int) -> bool:
        """Let exactly these of PASSED be set in the function's command register."""
        command = self.config_read(COMMAND, 2)
        return command != 0xFFFF and self.write(self._config, COMMAND, 2, command & ~PASSED | bits)

    def map(self, region: Region, area: Extent) -> int:
        """Host-virtual address of a part of one of ``areas``, valid until `close`. Raises HostError."""
        readable, writable = region.flags & abi.REGION_READ, region.flags & abi.REGION_WRITE
        protection = (mmap.PROT_READ if readable else 0) | (mmap.PROT_WRITE if writable else 0)
        try:
            mapped = mmap.mmap(
                self.fd, area.size, flags=mmap.MAP_SHARED, prot=protection, offset=region.offset + area.offset
            )
        except (OSError, ValueError) as e:
            number = e.errno if isinstance(e, OSError) else None
            raise HostError(f"{self.address}: mmap: {errno_name(number or 0)}: its registers cannot be mapped") from e
        self._maps.append(mapped)
        return int(ffi.cast("uintptr_t", ffi.from_buffer(mapped)))

    # Interrupts

    def interrupts(self, index: int) -> int:
        """How many the kernel can deliver of ``index``, one of abi's ..._IRQ."""
        if index >= self._irqs:
            return 0
        info, _ = abi.VFIO_DEVICE_GET_IRQ_INFO(self.fd, index=index)
        return info.count if info.flags & abi.IRQ_EVENTFD else 0

    def enable(self, index: int, descriptors: Sequence[int]) -> None:
        """Have the first interrupts of ``index`` signal these eventfds. Raises HostError, with none enabled."""
        abi.bind(self.fd, index, abi.IRQ_TRIGGER, descriptors)

    def unmask_by(self, index: int, event: EventFd) -> None:
        """Have ``event`` unmask the level interrupt that masked itself. Raises HostError."""
        abi.bind(self.fd, index, abi.IRQ_UNMASK, [event.fd])

    def disable(self, index: int) -> None:
        """No more of them when this returns. Raises HostError."""
        abi.unbind(self.fd, index)

    # Life

    def map_memory(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Have its DMA reach the guest's RAM: seconds, unless that is mapped. Raises HostError, soon if not wanted."""
        self._space.map_memory(is_wanted)

    def reset(self) -> None:
        """All registers as at power-on: a tenth of a second for a function level reset, a second for a bus reset.

        Raises HostError where it was not to be had. Never while a vCPU waits.
        """
        self.resets.reset(self.fd, self._space.group_fd(self._group))

    def close(self) -> None:
        """Unmap and close it; the kernel resets it once more if it can: it takes as long. Closing twice is allowed."""
        for mapped in self._maps:
            mapped.close()
        self._maps.clear()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._space.close(fd, self._group)

    def _region(self, index: int) -> Region:
        info, data = abi.VFIO_DEVICE_GET_REGION_INFO(self.fd, index=index)
        areas: Sequence[Extent] = [Extent(0, info.size)]
        if info.flags & abi.REGION_CAPS:
            for kind, offset in abi.chain(data, info.cap_offset):
                if kind == abi.CAP_SPARSE_MMAP:
                    areas = abi.sparse_areas(data, offset)
        usable = [area for area in areas if _is_mappable(area, info.size)] if info.flags & abi.REGION_MMAP else []
        return Region(info.size, info.offset, info.flags, usable)

    def _read_config(self) -> bytes:
        """As much as there is: the kernel gives 4096 bytes, or 256 for a conventional device."""
        data, size = b"", min(self._config.size, CONFIG_SIZE)
        try:
            while len(data) < size:  # a read that goes beyond the end fails, and is not cut short
                piece = os.pread(self.fd, size - len(data), self._config.offset + len(data))
                if not piece:
                    break
                data += piece
        except OSError as e:
            raise HostError(f"{self.address}: {errno_name(e.errno or 0)}: reading its configuration space") from e
        return data


def _is_mappable(area: Extent, size: int) -> bool:
    """Whether it is whole pages within a region of ``size`` bytes."""
    inside = 0 <= area.offset <= size - area.size and area.size > 0
    return inside and not (area.offset | area.size) % mmap.PAGESIZE
