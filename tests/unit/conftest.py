"""What several modules of this tier share: a monitor that commands a fake machine, and its clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import pytest

from kvmpy.machine.machine import Machine
from kvmpy.monitor.server import MonitorServer
from tests.fakes.loop import running
from tests.fakes.monitor import Client, Connect, FakeMachine


@pytest.fixture
def machine() -> Iterator[FakeMachine]:
    with running("control") as control:
        yield FakeMachine(control)


@pytest.fixture
def server(machine: FakeMachine, tmp_path: Path) -> Iterator[MonitorServer]:
    with closing(MonitorServer(cast(Machine, machine), str(tmp_path / "qmp.sock"))) as server:
        yield server


@pytest.fixture
def connect(server: MonitorServer, tmp_path: Path) -> Iterator[Connect]:
    """``connect(negotiate=False)``: a new client, hung up at the end."""
    with ExitStack() as stack:

        def make(*, negotiate: bool = True) -> Client:
            return stack.enter_context(closing(Client(str(tmp_path / "qmp.sock"), negotiate=negotiate)))

        yield make
