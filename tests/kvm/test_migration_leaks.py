"""Migrations that come to nothing leave nothing: no descriptor, no thread, and no circle of objects.

While vCPUs run nobody collects circles, so each would stay for the life of the machine.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmpy.errors import CommandError
from kvmpy.kvm.system import System
from kvmpy.migration import main_channel
from kvmpy.migration.descriptor import Offer
from kvmpy.migration.messages import prepare
from kvmpy.migration.parameters import OnNoConvergence
from kvmpy.migration.status import Status
from kvmpy.migration.wire import NEWEST
from tests.fakes.journey import Journey, Stop

TIMES = 5


@pytest.fixture
def source(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stop]:
    monkeypatch.setattr(main_channel, "LAST_WORDS", 0.1)  # else each that hangs takes a second more
    prepare(NEWEST)  # once in a process; what typing leaves behind is no migration's
    with ExitStack() as stack:
        yield Journey(tmp_path, stack).begin(
            x_timeout=0.2, downtime_limit=0, x_on_no_convergence=OnNoConvergence.CONTINUE
        )


def fails(source: Stop, uri: str, fd: Callable[[], int] = lambda: -1) -> None:
    source.migrations.migrate(uri, Offer(fd()))
    source.wait(Status.FAILED)


def pipe_that_nobody_reads() -> int:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    return write_fd


def two_at_once(source: Stop) -> None:
    source.migrations.migrate("exec:sleep 1000")
    with pytest.raises(CommandError, match="is being migrated"):
        source.migrations.migrate("fd:way", Offer(os.dup(0)))
    source.migrations.cancel()
    source.wait(Status.CANCELLED)


def asks(source: Stop) -> None:
    with pytest.raises(CommandError):
        source.migrations.check("fd:way", Offer(os.eventfd(0)))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda source: fails(source, "unix:/nonexistent/socket"),
        lambda source: fails(source, "exec:exit 3"),
        lambda source: fails(source, "exec:sleep 1000"),
        lambda source: fails(source, "file:/dev/full"),
        lambda source: fails(source, "fd:way", pipe_that_nobody_reads),
        lambda source: fails(source, "fd:way", lambda: os.eventfd(0)),
        lambda source: fails(source, "unix:/nonexistent/socket", lambda: os.dup(0)),
        asks,
        two_at_once,
    ],
    ids=["nobody", "fails", "hangs", "full", "closed", "wrong", "not taken", "asked", "two at once"],
)
def test_a_migration_that_fails_leaves_nothing(source: Stop, attempt: Callable[[Stop], None]) -> None:
    def all_there_is() -> tuple[int, int]:
        source.events.clear()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    attempt(source)
    gc.collect()
    gc.disable()
    try:
        before = all_there_is()
        for _ in range(TIMES):
            attempt(source)
        assert all_there_is() == before
        assert gc.collect() < TIMES, "circles"
    finally:
        gc.enable()
    source.wait_for_count()
