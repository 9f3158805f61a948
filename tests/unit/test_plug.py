"""What is plugged in when a machine ends: all of it gives back what it has of the host."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.bus import Bus
from kvmpy.config.schema import load
from kvmpy.devices.pci.root import PciRoot
from kvmpy.devices.reset_register import ResetRegister
from kvmpy.errors import HostError
from kvmpy.host.reactor import Reactor
from kvmpy.machine.inventory import Inventory
from kvmpy.machine.plug import Host, Plugger
from kvmpy.memory import GuestMemory
from tests.fakes.host import Clock, Line, Switch
from tests.fakes.interrupts import FakeDoorbells, FakeSink
from tests.fakes.pci import WINDOWS

TEXT = """
name = "m"
[boot]
kernel = "kernel"
[[device]]
id = "rng0"
driver = "virtio-rng-pci"
[[device]]
id = "rng1"
driver = "virtio-rng-pci"
[[device]]
id = "rng2"
driver = "virtio-rng-pci"
"""


def failing(error: Exception) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [HostError("no such bridge"), OSError(errno.EIO, "gone"), KeyError("a mistake")], ids=["host", "os", "own"]
)
def test_a_device_that_cannot_be_closed_is_named_and_keeps_no_other_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    (tmp_path / "m.toml").write_text(TEXT)
    memory, io, sink, inventory, clock = GuestMemory(), Reactor("io"), FakeSink(), Inventory(), Clock()
    groups: Any = None  # of which these devices need nothing
    host = Host(memory, io, sink, None, lambda event, **data: None, clock.timer, groups, str(tmp_path), clock.utc)
    reset = ResetRegister("reset", Switch())
    lines = [Line() for _ in range(4)]
    pci = PciRoot(Bus("mmio"), Bus("pio"), FakeDoorbells(), lines, WINDOWS, lambda gpa, size: False, reset)
    closed: list[str] = []
    with ExitStack() as resources:
        for close in (memory.close, io.close, sink.close, lambda: closed.append("the rest")):
            resources.callback(close)
        Plugger(load(tmp_path / "m.toml"), pci, host, inventory, resources).plug_all()
        for name in ("rng0", "rng1", "rng2"):
            inventory.plugged[name].resources.callback(closed.append, name)
        inventory.plugged["rng1"].resources.callback(failing(error))
    assert closed == ["rng2", "rng1", "rng0", "the rest"]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("rng1: ")
