"""A host function's interrupts tied to the guest's: the kernel signals an eventfd, which KVM turns into an interrupt.

Which of the three kinds the device uses follows from what the guest has enabled; the others are off. MSI and MSI-X
signal the eventfds of our own vectors, so that masking and pending bits are as for any other function of ours. All
vectors of MSI-X are enabled at once: Linux fills the table only afterwards. INTx is a level: the kernel masks it when
it comes, and unmasks it when KVM says that the guest has ended its handler.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from enum import IntEnum

from kvmpy.abi import vfio as abi
from kvmpy.devices.pci.function import IntxPin
from kvmpy.devices.vfio.device import VfioDevice
from kvmpy.errors import HostError
from kvmpy.host.eventfd import EventFd
from kvmpy.host.warnings import Warnings
from kvmpy.log import Log

log = Log(__name__)


class Kind(IntEnum):
    """The kernel's index of each."""

    INTX = abi.INTX_IRQ
    MSI = abi.MSI_IRQ
    MSIX = abi.MSIX_IRQ


class Interrupts:
    """Those of ``device``, whose function is called ``name``. With the function's lock."""

    def __init__(self, name: str, device: VfioDevice, pin: IntxPin) -> None:
        self._name, self._device, self._pin = name, device, pin
        self._vectors: dict[Kind, Sequence[int]] = {}
        self._wanted: Kind | None = None
        self._enabled = ExitStack()
        self._warnings = Warnings(log)  # a guest can ask again and again

    @property
    def kind(self) -> Kind | None:
        """Which kind is in use."""
        return self._wanted

    def offer(self, kind: Kind, descriptors: Sequence[int]) -> None:
        """When ``kind`` is selected the device shall signal these eventfds. None for INTx, which brings its own."""
        self._vectors[kind] = descriptors

    def select(self, kind: Kind | None) -> None:
        """Use this kind from now on; a change of what is in use is when interrupts can be lost, as on hardware.

        A host that refuses costs the guest its interrupts, which is logged: nothing is raised.
        """
        if kind is not None and kind not in self._vectors:
            kind = None
        if kind is self._wanted:
            return
        self._wanted = kind
        self._enabled.close()
        if kind is None:
            return
        try:
            with ExitStack() as undo:
                self._enable(kind, undo)
                self._enabled = undo.pop_all()
        except HostError as e:
            self._warnings.say(f"{self._name}: its interrupts ({kind.name}) do not reach the guest: {e}")

    def _enable(self, kind: Kind, undo: ExitStack) -> None:
        if kind is Kind.INTX:
            self._enable_intx(undo)
        else:
            self._device.enable(kind, self._vectors[kind])
            undo.callback(self._disable, kind)

    def _enable_intx(self, undo: ExitStack) -> None:
        trigger, unmask = undo.enter_context(EventFd()), undo.enter_context(EventFd())
        attachment = self._pin.wire.attach(trigger, unmask)
        undo.callback(attachment.close)
        self._device.enable(Kind.INTX, [trigger.fd])
        undo.callback(self._disable, Kind.INTX)
        self._device.unmask_by(Kind.INTX, unmask)

    def _disable(self, kind: Kind) -> None:
        try:
            self._device.disable(kind)
        except HostError as e:
            self._warnings.say(f"{self._name}: its interrupts ({kind.name}) cannot be disabled: {e}")
