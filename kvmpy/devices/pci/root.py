"""The root complex: who has which number, how configuration accesses find them, and whose interrupt wire is whose.

Bus 0 is ours; buses behind root ports have the numbers the guest (or we as firmware) gave them. ECAM is one window of
1 MiB for each bus, `ConfigPorts` the older pair of ports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from kvmpy.bus import Bus, Target
from kvmpy.devices.base import Closable, Shortcuts
from kvmpy.devices.pci.config import MULTI_FUNCTION
from kvmpy.devices.pci.decode import Decoder, PciWindows
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.intx import PINS, SharedLine, Unconnected, swizzle
from kvmpy.devices.pci.ports import ConfigPorts
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.irq import Wire

DEVICES: Final = range(32)
FUNCTIONS: Final = range(8)

Function = PciFunction[Any]


class PciRoot:
    """``lines`` are INTA to INTD of device 0 on bus 0; ``is_ram(gpa, size)`` whether any of that is RAM.

    ``lock`` keeps the numbers still: a configuration access holds it, a guest's because the bus does. `add` before the
    machine runs.
    """

    def __init__(
        self,
        mmio: Bus,
        pio: Bus,
        shortcuts: Shortcuts,
        lines: Sequence[Wire],
        windows: PciWindows,
        is_ram: Callable[[int, int], bool],
        reset_register: Target,
    ) -> None:
        if len(lines) != PINS:
            raise ValueError(f"PCI has {PINS} interrupt lines, not {len(lines)}")
        self.lock = threading.RLock()
        self.ecam = Ecam(self)
        self.ports = ConfigPorts("pci-config-ports", self, reset_register)
        self._lines = [SharedLine(line) for line in lines]
        self.decoder = Decoder(mmio, pio, shortcuts, windows, is_ram)
        self._bus0: Mapping[int, Function] = {}  # swapped whole
        self._ports: tuple[RootPort, ...] = ()  # in the order in which they are asked, should two have the same bus
        self._numbers: Mapping[int, Function] | None = None  # by bus << 8 | devfn; None: to be found out

    def add(self, function: Function, device: int, function_number: int = 0) -> None:
        """Put ``function`` on bus 0. Raises ValueError where that place is taken or none."""
        if device not in DEVICES or function_number not in FUNCTIONS:
            raise ValueError(f"{function.name}: no place {device:02x}.{function_number:x} on a bus")
        devfn = device << 3 | function_number
        with self.lock:
            if devfn in self._bus0:
                raise ValueError(f"{function.name}: {self._bus0[devfn].name} is at {device:02x}.{function_number:x}")
            self._bus0 = {**self._bus0, devfn: function}
            self._renumber()
            self._mark_multi_function(device)
            if isinstance(function, RootPort):
                self._ports = tuple(f for _, f in sorted(self._bus0.items()) if isinstance(f, RootPort))
                function.seats = Seats(self, function, device)
                function.on_numbers = self._renumber
            elif function.express is not None:
                function.express.integrate()
            self.connect(function, device, None)

    def connect(self, function: Function, device: int, port: RootPort | None) -> None:
        """Give ``function`` its interrupt wire and its windows; ``device`` is the one on bus 0. Used by Seats too."""
        if pin := function.header.interrupt_pin:
            function.intx.wire = self._lines[swizzle(pin, device) - 1].source()
        function.on_decode = self.decoder.update
        self.decoder.add(function, port)

    def disconnect(self, function: Function) -> None:
        """Undo `connect`."""
        self.decoder.remove(function)
        function.on_decode = lambda: None
        function.intx.wire.set(level=False)
        function.intx.wire = Unconnected()

    def find(self, bus: int, devfn: int) -> Function | None:
        """The function with that number now, None where there is none. With the lock."""
        numbers = self._numbers
        if numbers is None:
            numbers = self._numbers = self._number()
        return numbers.get(bus << 8 | devfn)

    def read(self, bus: int, devfn: int, offset: int, size: int) -> int:
        """A configuration read of any width; all ones where there is nothing. With the lock."""
        function = self.find(bus, devfn)
        return (1 << 8 * size) - 1 if function is None else function.config_read(offset, size)

    def write(self, bus: int, devfn: int, offset: int, size: int, value: int) -> None:
        """A configuration write of any width; ignored where there is nothing. With the lock."""
        function = self.find(bus, devfn)
        if function is not None:
            function.config_write(offset, size, value)

    def functions(self) -> Iterator[tuple[int, int, int, Function]]:
        """Bus, device, function number and function of all that can be reached by the numbers programmed now.

        Without the lock: an operator who looks is not kept waiting by an access that is under way.
        """
        for number, function in sorted(self._number().items()):
            yield number >> 8, number >> 3 & 0x1F, number & 7, function

    def _renumber(self) -> None:
        """Who has which number may have changed."""
        self._numbers = None

    def _number(self) -> Mapping[int, Function]:
        """Who has which number now. Behind a port there is one device, with the number 0, and no other bridge."""
        numbers = dict(self._bus0)
        for place, port in enumerate(self._ports):
            bus, behind = port.buses.start, port.behind
            hidden = not bus or any(bus in above.buses for above in self._ports[:place])
            if behind is not None and port.reachable and bus in port.buses and not hidden:
                numbers[bus << 8] = behind
        return numbers

    def _mark_multi_function(self, device: int) -> None:
        here = [function for devfn, function in self._bus0.items() if devfn >> 3 == device]
        if len(here) > 1:
            for function in here:
                function.header.preset(header_type=function.header.header_type | MULTI_FUNCTION)


class Seats:
    """The place behind ``port``, which is ``device`` on bus 0 (a `root_port.Seats`)."""

    def __init__(self, root: PciRoot, port: RootPort, device: int) -> None:
        self.lock = root.lock
        self._root, self._port, self._device = root, port, device

    def seat(self, function: Function) -> None:
        """``function`` is behind the port from now on. It is device 0 there, so its pins are the port's own."""
        self._root.connect(function, self._device, self._port)

    def unseat(self, function: Function) -> None:
        """It is not any more; none of its BARs is mapped and its interrupt is low."""
        self._root.disconnect(function)

    def places(self, function: Function) -> list[range]:
        """Where its BARs in memory are mapped now."""
        return self._root.decoder.places(function)

    def remains(self, function: Function, places: Sequence[range]) -> Closable:
        """Have ``places``, where ``function`` was, read as 0 once it is not busy, until what is returned is closed."""
        return self._root.decoder.remains(f"{self._port.name} (torn out)", function, places)


class Ecam:
    """Enhanced configuration access: the address is the number (a `kvmpy.bus.Target` with the root's lock)."""

    def __init__(self, root: PciRoot) -> None:
        self.name, self.lock = "pci-ecam", root.lock
        self._root = root

    def read(self, offset: int, size: int) -> int:
        """A guest's read of any width; one that goes beyond a function's 4096 bytes gets all ones."""
        return self._root.read(offset >> 20, offset >> 12 & 0xFF, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write of any width."""
        self._root.write(offset >> 20, offset >> 12 & 0xFF, offset & 0xFFF, size, value)
