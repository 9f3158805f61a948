"""Vectors and doorbells without KVM: the same semantics, and what would have reached the guest."""

from __future__ import annotations

import select

from kvmpy.host.eventfd import EventFd
from kvmpy.irq import MsiMessage


class FakeVector:
    """A `kvmpy.irq.MsiVector`; ``delivered`` has what the guest got, as `KVM` would have merged it."""

    def __init__(self, owner: FakeSink) -> None:
        self._owner = owner
        self._event = EventFd()
        self.message: MsiMessage | None = None
        self.closed = False

    @property
    def fd(self) -> int:
        return self._event.fd

    @property
    def pending(self) -> bool:
        return self.message is None and bool(select.select([self._event], [], [], 0)[0])

    def signal(self) -> None:
        self._event.signal()
        self.settle()

    def route(self, message: MsiMessage | None) -> None:
        assert not self.closed
        if message is not None and self._owner.refuses is not None:
            raise self._owner.refuses
        self.message = message
        self.settle()

    def settle(self) -> None:
        """Deliver what somebody else signalled on the eventfd: KVM would have, at once."""
        if self.message is not None and self._event.take():
            self._owner.delivered.append(self.message)

    def discard(self) -> None:
        self._event.take()

    def close(self) -> None:
        self.message, self.closed = None, True
        self._event.close()


class FakeSink:
    """A `kvmpy.irq.MsiSink`. ``refuses`` is raised by the next route, where it is set."""

    def __init__(self) -> None:
        self.vectors: list[FakeVector] = []
        self.delivered: list[MsiMessage] = []
        self.refuses: Exception | None = None

    def vector(self) -> FakeVector:
        self.vectors.append(FakeVector(self))
        return self.vectors[-1]

    def take(self) -> list[MsiMessage]:
        """What has been delivered since the last call."""
        for vector in self.vectors:
            if not vector.closed:
                vector.settle()
        taken, self.delivered = self.delivered, []
        return taken

    def close(self) -> None:
        for vector in self.vectors:
            vector.close()


class FakeDoorbell:
    """One registered doorbell."""

    def __init__(self, owner: FakeDoorbells, gpa: int) -> None:
        self._owner, self._gpa = owner, gpa

    def close(self) -> None:
        self._owner.events.pop(self._gpa, None)


class FakeSlot:
    """One direct mapping."""

    def __init__(self, owner: FakeDoorbells, gpa: int) -> None:
        self._owner, self._gpa = owner, gpa

    def close(self) -> None:
        self._owner.slots.pop(self._gpa, None)


class FakeDoorbells:
    """`kvmpy.devices.base.Shortcuts`: ``events`` by address, and `ring` for the guest's write; ``slots`` are the direct
    mappings, size and host address by address. ``refuses`` is raised where it is set.
    """

    def __init__(self) -> None:
        self.events: dict[int, EventFd] = {}
        self.slots: dict[int, tuple[int, int]] = {}
        self.refuses: Exception | None = None

    def doorbell(self, gpa: int, event: EventFd) -> FakeDoorbell:
        assert gpa not in self.events, f"two doorbells at {gpa:#x}"
        self.events[gpa] = event
        return FakeDoorbell(self, gpa)

    def direct(self, gpa: int, size: int, hva: int) -> FakeSlot:
        if self.refuses is not None:
            raise self.refuses
        for other, (extent, _) in self.slots.items():
            assert not (gpa < other + extent and other < gpa + size), f"two slots at {gpa:#x}"
        self.slots[gpa] = size, hva
        return FakeSlot(self, gpa)

    def ring(self, gpa: int) -> None:
        self.events[gpa].signal()
