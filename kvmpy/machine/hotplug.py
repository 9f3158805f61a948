"""Devices and netdevs that come and go while the machine runs.

Work on the host (a tap, a disk and its lock, the network helper) is done by the thread that asks, one at a time; the
control thread makes the switch. When a guest has let a device go, whoever still uses it is waited for, then a thread of
its own gives back what it had of the host, and only then is it said to be deleted: its id, its netdev and its drive are
free again.

What a device may need is imported here, so that nothing is while vCPUs run: a machine without root ports, where nothing
can be plugged in, does not import this module.
"""

from __future__ import annotations

import contextlib
import difflib  # noqa: F401  what a mistake in a client's table is compared by
import gc
import hashlib  # noqa: F401  what a network device's MAC is chosen by
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar

import msgspec

# For machine/plug.py
import kvmpy.devices.vhost
import kvmpy.devices.virtio.blk
import kvmpy.devices.virtio.console
import kvmpy.devices.virtio.net
import kvmpy.devices.virtio.pci
import kvmpy.devices.virtio.rng
import kvmpy.host.disk
import kvmpy.host.network
import kvmpy.host.tap
import kvmpy.host.visit
import kvmpy.machine.passthrough  # noqa: F401
from kvmpy.config.added import ROOT_BUS, read_device, read_netdev
from kvmpy.config.schema import Config, Device
from kvmpy.devices.pci.function import PciFunction
from kvmpy.devices.pci.root_port import RootPort
from kvmpy.errors import CommandError, HostError
from kvmpy.host.reactor import Reactor
from kvmpy.machine.build import Board
from kvmpy.machine.departure import Departure
from kvmpy.machine.inventory import Plugged
from kvmpy.machine.pairs import Pairs
from kvmpy.machine.plug import give_back

T = TypeVar("T")
PERIPHERAL: Final = "/machine/peripheral/"  # where QEMU has them in its tree of objects
REFUSED: Final = (
    "the guest began to let it go, its power indicator blinking, and went back: somebody there pressed again, or its "
    "driver does not let go; its kernel log says more"
)
IO_BOUND: Final = 10.0
"""Seconds to wait for the io thread to be done with what it was about to do; it never takes as long."""


class Runs(Protocol):
    """The machine, as far as plugging needs it."""

    config: Config
    board: Board
    control: Reactor

    @property
    def is_incoming(self) -> bool:
        """It waits for another machine's state, or did."""

    @property
    def io(self) -> Reactor:
        """The loop of the io thread."""

    @property
    def is_running(self) -> bool:
        """The vCPUs run; asked by the control thread."""

    def in_control(self, call: Callable[[], T]) -> T:
        """Make a call in the control thread, and wait for it. Raises CommandError where there is none any more."""

    def in_turn(self, call: Callable[[], object]) -> None:
        """The same, after the changes of the run state that are under way."""

    def require_changeable(self) -> None:
        """Raises CommandError unless the machine runs or is paused, and is not being migrated."""

    def let_accesses_end(self) -> None:
        """By the control thread: wait until no vCPU is in an access that it has begun before."""

    def report(self, event: str, **data: Any) -> None:
        """Tell the listeners of an event."""


class Leaving:
    """A device that is out of its slot, with a thread that gives back what it has: ``table`` still takes its places."""

    def __init__(self, table: Device, give_back: Callable[[], object]) -> None:
        self.table, self._give_back = table, give_back
        self._thread = threading.Thread(target=give_back, name=f"unplug-{table.id}", daemon=True)

    def start(self) -> None:
        """Begin."""
        try:
            self._thread.start()
        except RuntimeError:  # no thread to be had: then it is done here, and takes as long as it takes
            self._give_back()

    def join(self) -> None:
        """Wait until it is done."""
        if self._thread.ident is not None:
            self._thread.join()


class HotPlug:
    """``netdevs`` of ``config`` and those added since; devices are in the board's inventory."""

    def __init__(self, machine: Runs) -> None:
        self._machine = machine
        self._inventory = machine.board.inventory
        self._ports = machine.board.ports
        self._netdevs = machine.config.netdev
        self._plugging = threading.Lock()
        self._leaving: dict[str, Leaving] = {}
        self._closed = self._left_circles = False
        self.pairs = Pairs(machine, self._ports, held=machine.is_incoming)
        self.departure = Departure(machine, self.pairs, self._released)
        for port in self._ports.values():
            port.on_used = lambda function: self._post(lambda: self.pairs.used(function))
            port.on_released = lambda function: self._post(lambda: self._released(function))
            port.on_kept = lambda function: self._post(lambda: self.pairs.kept(function))
            port.on_refused = self._refused
            port.on_failed = self._failed
        for plugged in self._inventory.plugged.values():
            self.pairs.came(plugged)
        machine.board.plugger.on_unasked = lambda function: self._post(lambda: self._take_hidden(function))

    # What an operator asks; by any thread but control's

    def device_add(self, table: Mapping[str, Any]) -> None:
        """Plug in the device that ``table`` says, which has the keys of a [[device]]. Raises CommandError."""
        with self._plugging:
            self._forget_failed()
            config = self._config()
            device = read_device(config, table)
            self._require_standby(device)
            self._left_circles = True
            try:
                plugged = self._machine.board.plugger.make(device, config)
            except HostError as e:
                raise CommandError(str(e)) from e
            try:
                self._machine.in_turn(lambda: self._plug(plugged))
            except BaseException:
                plugged.resources.close()
                raise
            self._left_circles = False

    def _require_standby(self, device: Device) -> None:
        """Not another device with the id of a standby: its primary would be hidden for good. Raises CommandError."""
        for plugged in self._inventory.plugged.values():
            if plugged.standby == device.id and not getattr(device, "failover", False):
                raise CommandError(
                    f"Device '{plugged.table.id}' waits for its standby '{device.id}': give this one failover=true or "
                    f"another id, or take '{plugged.table.id}' away first (device_del)"
                )

    def _forget_failed(self) -> None:
        """A device that could not be plugged in is full of cycles, which live on after the error it failed with."""
        if self._left_circles:
            self._left_circles = False
            _collect()

    def device_del(self, name: str, *, force: bool = False) -> None:
        """Ask the guest to let a device go; ``force``: take it away. DEVICE_DELETED follows. Raises CommandError."""
        self._machine.in_control(lambda: self._ask(name, force=force))

    def netdev_add(self, table: Mapping[str, Any]) -> None:
        """Have the netdev that ``table`` says, for a device to use. Raises CommandError."""
        with self._plugging:
            netdev = read_netdev(self._config(), table)
            self._netdevs = (*self._netdevs, netdev)

    def netdev_del(self, name: str) -> None:
        """Have that netdev no more. Raises CommandError."""
        with self._plugging:
            if name not in [netdev.id for netdev in self._netdevs]:
                raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
            for device in self._config().device:
                if getattr(device, "netdev", None) == name:
                    raise CommandError(f"Device '{name}' is in use by '{device.id}'")
            self._netdevs = tuple(netdev for netdev in self._netdevs if netdev.id != name)

    def config(self) -> Config:
        """The configuration as it would be written now. Any thread."""
        tables = [plugged.table for plugged in self._inventory.plugged.values()]
        tables += [leaving.table for leaving in tuple(self._leaving.values())]
        return msgspec.structs.replace(self._machine.config, netdev=self._netdevs, device=tuple(tables))

    @property
    def is_waiting(self) -> bool:
        """A device that is out of its slot still has something of the host."""
        return bool(self._leaving)

    def close(self) -> None:
        """With the control thread at its end: wait for the devices that were on their way out."""
        with self._plugging:
            self._closed = True
        for leaving in list(self._leaving.values()):
            leaving.join()

    def _config(self) -> Config:
        if self._closed:
            raise CommandError("the machine has been closed")
        return self.config()

    # By the control thread

    def _plug(self, plugged: Plugged) -> None:
        machine = self._machine
        machine.require_changeable()  # a migration may have begun while the host was at work
        try:
            machine.board.require_room(plugged)
        except HostError as e:
            raise CommandError(f"Device '{plugged.table.id}': a guest that reboots has no room for it: {e}") from e
        port = self._ports[str(plugged.table.bus)]
        self._inventory.add(plugged)
        try:
            if machine.is_running:
                for part in plugged.parts:
                    part.resume()
            if not self.pairs.came(plugged):
                port.insert(plugged.function)
        except BaseException:
            self._inventory.remove(plugged)
            raise

    def _ask(self, name: str, *, force: bool) -> None:
        plugged = self._inventory.plugged.get(name)
        leaves = plugged is not None and self.pairs.is_leaving(plugged)
        if plugged is None or not leaves:  # a primary that a migration waits for may be given up for good meanwhile
            self._machine.require_changeable()
        if plugged is not None:
            self.pairs.give_up(plugged)
        if plugged is not None and self.pairs.is_hidden(plugged):  # no guest has it
            self._released(plugged.function)
            return
        if leaves and not force:
            return  # it is asked for already
        port = self._port_of(name)
        if force:
            port.tear_out()
        elif port.is_releasing:
            raise CommandError(f"Device {name} is already in the process of unplug")
        else:
            if port.card is not None:
                self.pairs.asked(port.card)
            port.request()

    def _take_hidden(self, function: PciFunction[Any]) -> None:
        """The host wants a function back; if it is in no slot it can have it."""
        for plugged in self._inventory.plugged.values():
            if plugged.function is function and self.pairs.is_hidden(plugged):
                self.pairs.give_up(plugged)
                self._released(function)
                return

    def _port_of(self, name: str) -> RootPort:
        plugged = self._inventory.plugged.get(name)
        if name in self._leaving:
            raise CommandError(f"Device {name} is already in the process of unplug")
        if name in self._ports or (plugged is not None and plugged.table.bus is None):
            raise CommandError(f"Bus '{ROOT_BUS}' does not support hotplugging")
        if plugged is None:
            raise CommandError(f"Device '{name}' not found", "DeviceNotFound")
        port = self._ports[str(plugged.table.bus)]
        if port.card is not plugged.function:
            raise CommandError(f"Device {name} is already in the process of unplug")
        return port

    def _released(self, function: PciFunction[Any]) -> None:
        """Its port is empty; have it forgotten by everybody else."""
        plugged = next((each for each in self._inventory.plugged.values() if each.function is function), None)
        if plugged is None or self.pairs.returns(function):
            return
        name = str(plugged.table.id)
        self.pairs.left(plugged)
        last = [plugged]  # whoever takes it out has the last reference
        leaving = self._leaving[name] = Leaving(plugged.table, lambda: self._give_back(name, last))
        self._inventory.remove(plugged)
        self._machine.let_accesses_end()
        leaving.start()

    def _forget(self, name: str) -> None:
        self._leaving.pop(name, None)
        self.pairs.forgotten(name)
        self._machine.report("DEVICE_DELETED", device=name, path=PERIPHERAL + name)

    # By the thread that gives back

    def _give_back(self, name: str, last: list[Plugged]) -> None:
        self._close(name, last.pop())
        _collect()  # a device is full of cycles
        self._post(lambda: self._forget(name))

    def _close(self, name: str, plugged: Plugged) -> None:
        def close() -> None:
            for part in plugged.parts:
                part.pause()
            self._let_io_pass()
            plugged.resources.close()

        give_back(name, close)

    def _let_io_pass(self) -> None:
        """Wait until the io thread has done what it was about to do for the device."""
        passed = threading.Event()
        with contextlib.suppress(RuntimeError):  # it has ended
            self._machine.io.post(passed.set)
            passed.wait(IO_BOUND)

    # Under the locks of root and port

    def _refused(self, function: PciFunction[Any]) -> None:
        path = PERIPHERAL + function.name
        self._machine.report("DEVICE_UNPLUG_GUEST_ERROR", device=function.name, path=path, reason=REFUSED)
        self._post(lambda: self.pairs.refused(function, REFUSED))

    def _failed(self, function: PciFunction[Any], reason: str) -> None:
        path = PERIPHERAL + function.name
        self._machine.report("DEVICE_PLUG_GUEST_ERROR", device=function.name, path=path, reason=reason)
        self._post(lambda: self.pairs.failed(function, reason))

    def _post(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the machine is being closed, and gives back all there is
            self._machine.control.post(call)


def _collect() -> None:
    """Collect cycles where nobody else does; what was there at the start is frozen, so this takes a moment."""
    if not gc.isenabled():
        gc.collect()
