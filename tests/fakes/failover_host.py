"""A host for machines with failover pairs: its taps and its NICs, bound to VFIO, are fakes. And the guest's side of it.

host = FailoverHost(directory, monkeypatch)  # for the machines that are made from here on
machine = Machine(load(config))
guest = NicGuest.of(machine, "root1")
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import pytest

from kvmpy._native import ffi
from kvmpy.abi import ioctl
from kvmpy.devices.pci.express import SlotStatus
from kvmpy.devices.vfio.container import Container
from kvmpy.errors import HostError, IoctlError
from kvmpy.host import tap as tap_module
from kvmpy.host.pci_function import VirtualFunction
from kvmpy.machine import passthrough
from kvmpy.machine.machine import Machine
from tests.fakes.hotplug_guest import BLINK, CONTROL, EVENTS, ON, STATUS, HotplugGuest
from tests.fakes.loop import BOUND
from tests.fakes.pci import Accesses
from tests.fakes.tap import FakeTap
from tests.fakes.vfio import ADDRESS, GROUP, FakeNic, VfioKernel
from tests.fakes.vfio_rig import reset_by

ADDRESSES: Final = (ADDRESS, "0000:5e:00.3")
PASSTHROUGH: Final = passthrough.Passthrough
INDICATOR: Final = 0x300


class UpTap(FakeTap):
    """One that can be taken up."""

    def set_up(self) -> None:
        """It is."""


class Claim:
    """A virtual function of the host; ``carried`` are the addresses that its PF has held it to."""

    vf: VirtualFunction | None = VirtualFunction("0000:5e:00.0", 2, "enp94s0f0")

    def __init__(self, group: int = GROUP) -> None:
        self.group = group
        self.carried: list[str | None] = []
        self.taken = False

    def assign(self, network: object, *, mac: str | None = None, vlan: int | None = None) -> None:
        raise AssertionError("nothing of it is in the configuration")

    def carry(self, network: object, mac: str | None) -> None:
        self.carried.append(mac)

    def bind(self) -> None:
        raise AssertionError("each has a group of its own")

    def withdraw(self) -> None:
        raise AssertionError("each has a group of its own")

    def close(self) -> None:
        self.taken = False


class NicsKernel(VfioKernel):
    """A kernel with a NIC at each of ADDRESSES. A request is about one of them: ``nic`` is it while that is served.

    ``before`` has what a request of that name waits for, while others are served.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.before: dict[str, Callable[[], object]] = {}
        self.nics: Final = {address: FakeNic() for address in ADDRESSES}
        self._one_at_a_time = threading.RLock()

    def __call__(self, name: str, fd: int, request: int, argument: Any) -> int:
        if not self._has(fd):
            return self._beside(name, fd, request, argument)
        if (wait := self.before.get(name)) is not None:
            wait()
        with self._one_at_a_time:
            self.nic = next((nic for nic in self.nics.values() if self._is(nic, fd)), self.nic)
            return super().__call__(name, fd, request, argument)

    def _has(self, fd: int) -> bool:
        return super()._has(fd) or any(self._is(nic, fd) for nic in self.nics.values())

    @staticmethod
    def _is(nic: FakeNic, fd: int) -> bool:
        return nic.fd >= 0 and os.path.sameopenfile(fd, nic.fd)

    def _vfio_group_get_device_fd(self, argument: Any) -> int:
        self.nic = self.nics[ffi.string(argument).decode()]
        return self.nic.open()

    def close(self) -> None:
        for nic in self.nics.values():
            nic.close()


class Held:
    """A request ``name`` that takes the kernel as long as a test likes; ``begun`` once it has been made.

    ``waiting`` is how many times by now.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting = 0
        self.begun = threading.Event()
        self._decided = threading.Event()
        self._refusal = 0

    def __call__(self) -> None:
        self.waiting += 1
        self.begun.set()
        assert self._decided.wait(2 * BOUND)
        if self._refusal:
            raise IoctlError(self.name, self._refusal)

    def let_go(self) -> None:
        """The kernel does what it is asked for."""
        self._decided.set()

    def refuse(self, number: int) -> None:
        """It does not."""
        self._refusal = number
        self.let_go()


class FailoverHost:
    """``claims`` are its virtual functions by their addresses. The host of all machines that are made from now on.

    Where it is ``lacking`` it has none of these to give.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, *, lacking: bool = False) -> None:
        self.lacking = lacking
        self._held: list[Held] = []
        (directory / "run").mkdir(mode=0o755, parents=True)
        (directory / "vfio").mkdir()
        self.kernel = NicsKernel(directory / "vfio")
        self.claims = {address: Claim(GROUP + n) for n, address in enumerate(ADDRESSES)}
        monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(directory / "run"))
        monkeypatch.setattr(ioctl, "sys_ioctl", self.kernel)
        monkeypatch.setattr("kvmpy.devices.vfio.device.choose", reset_by("flr"))
        monkeypatch.setattr(passthrough, "Passthrough", lambda host: PASSTHROUGH(host, self._claim))
        vfio = str(directory / "vfio")
        monkeypatch.setattr(passthrough, "Container", lambda memory, groups: Container(memory, self.kernel, vfio))
        monkeypatch.setattr(tap_module.Tap, "open", lambda *args, **more: UpTap())

    def _claim(self, address: str, journal_dir: str) -> Claim:
        if self.lacking:
            raise HostError(f"{address}: EBUSY: another machine has it")
        claim = self.claims[address]
        claim.taken = True
        return claim

    def hold(self, name: str = "VFIO_IOMMU_MAP_DMA") -> Held:
        """Have every request ``name`` wait until it is let go on or refused, at the latest when its machine closes."""
        held = self.kernel.before[name] = Held(name)
        self._held.append(held)
        return held

    def let_go(self) -> None:
        """Nothing waits any more."""
        while self._held:
            self._held.pop().let_go()

    @property
    def taken(self) -> set[str]:
        """The functions that the host does not have."""
        return {address for address, claim in self.claims.items() if claim.taken}

    def close(self) -> None:
        """After its machines."""
        self.kernel.close()
        assert self.taken == set()


class NicGuest(HotplugGuest):
    """The guest of a port with a NIC. Its driver of that turns on bus mastering, which is all it does."""

    @classmethod
    def of(cls, machine: Machine, port: str) -> Self:
        """That of ``port`` of ``machine``."""
        board = machine.board
        return cls(board.mmio, board.memory, board.ports[port], 1 + list(board.ports).index(port))

    def answer(self) -> bool:
        """Hear of a press, and begin to let the card go, or go back; no more for now. False if there was none."""
        events = self.above.read(self.express + STATUS, 2) & EVENTS
        self.above.write(self.express + STATUS, 2, events)
        if events & SlotStatus.BUTTON:
            blinks = self.above.read(self.express + CONTROL, 2) & INDICATOR == BLINK
            self._indicate(ON if blinks else BLINK)
        return bool(events & SlotStatus.BUTTON)

    def let_go(self) -> None:
        self._indicate(BLINK)
        super().let_go()

    def blink(self, *, on: bool) -> None:
        """Be at work at the slot, or be done with that."""
        self._indicate(BLINK if on else ON)

    def _begin(self) -> None:
        config = Accesses(self.bus, self.port.header.secondary, 0)  # type: ignore[arg-type]
        assert config.read(0, 2) == 0x8086
        config.enable()
        self._indicate(ON)
