"""How a device speaks of interrupts: a line it sets, and (from the PCI bus on) a message it sends.

Devices are given one of these; who implements it, KVM's irqchip or a test's list, is not their business.
"""

from __future__ import annotations

from typing import Protocol


class IrqLine(Protocol):
    """A wire to an interrupt controller. Setting it to the level it has is allowed and does nothing."""

    def set(self, *, level: bool) -> None:
        """Drive the line. Any thread; never blocks."""
