"""How long a migration waits for primaries, here and there: no longer than it was told, whatever keeps it busy."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.errors import MigrationCancelled, MigrationError
from kvmpy.host.eventfd import EventFd
from kvmpy.migration.parameters import Parameters
from kvmpy.migration.progress import Progress
from kvmpy.migration.source import Outgoing
from kvmpy.migration.stop import Deadline
from kvmpy.migration.wire import NEWEST
from tests.fakes.migration import Thread

NIC = "hostdev0"


class Busy:
    """A guest that keeps its primary, and a destination that never falls silent."""

    def __init__(self) -> None:
        self._event = EventFd()
        self._event.signal()
        self.fd = self._event.fd
        self.heard = self.asked = 0
        self.can_answer, self.channel, self.version, self.is_kept = True, self, NEWEST, True
        self.then: Any = lambda: None

    def staying(self) -> list[str]:
        self.asked += 1
        self.then()
        return [NIC]

    def receive_message(self, *kinds: Any) -> None:
        self.heard += 1

    def close(self) -> None:
        self._event.close()


@pytest.fixture
def busy() -> Iterator[Busy]:
    busy = Busy()
    yield busy
    busy.close()


@pytest.fixture
def outgoing(busy: Busy) -> Iterator[Outgoing]:
    machine: Any = SimpleNamespace(departure=SimpleNamespace(staying=busy.staying, fd=-1))
    quiet = EventFd()
    machine.departure.fd = quiet.fd
    outgoing = Outgoing(machine, lambda stop: None, Parameters(), Progress(0))  # type: ignore[arg-type, return-value]
    yield outgoing
    outgoing.discard()
    quiet.close()


def staying(outgoing: Outgoing, busy: Busy, seconds: float) -> Thread[list[str]]:
    main: Any = busy
    return Thread(lambda: outgoing._primaries.staying(main, Deadline(seconds)))


def test_r36_a_destination_that_never_falls_silent_does_not_make_it_longer(outgoing: Outgoing, busy: Busy) -> None:
    assert staying(outgoing, busy, 0.1).result() == [NIC]
    assert busy.heard > 1


def test_r36_nor_does_a_limit_that_is_over_at_once_have_it_wait(outgoing: Outgoing, busy: Busy) -> None:
    assert staying(outgoing, busy, 0.0).result() == [NIC]
    assert (busy.asked, busy.heard) == (1, 0)


def test_a_cancel_is_heard_meanwhile(outgoing: Outgoing, busy: Busy) -> None:
    busy.then = lambda: outgoing.cancel("cancelled") if busy.asked > 3 else None
    with pytest.raises(MigrationCancelled):
        staying(outgoing, busy, 600.0).result()


def test_r54_nor_does_it_make_the_wait_for_its_primaries_longer(outgoing: Outgoing, busy: Busy) -> None:
    main: Any = busy
    outgoing.limit(Parameters(x_prepare_timeout=100))
    outgoing.progress.preparing = True
    with pytest.raises(MigrationError, match=r"within 100 ms \(x-prepare-timeout\)"):
        Thread(lambda: outgoing._primaries.await_prepared(main)).result()
    assert busy.heard > 1
    assert [phase.name for phase in outgoing.progress.phases] == ["await primaries"]


def test_r54_a_destination_that_is_prepared_is_not_waited_for(outgoing: Outgoing, busy: Busy) -> None:
    main: Any = busy
    Thread(lambda: outgoing._primaries.await_prepared(main)).result()
    assert (busy.heard, outgoing.progress.phases) == (0, [])
