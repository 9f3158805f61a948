"""What is plugged in when a machine ends: all of it gives back what it has of the host."""

from __future__ import annotations

import errno
import json
import subprocess
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
from kvmpy.host.rundir import PCI_JOURNAL, RuntimeDirectory
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


def make(here: Path, text: str, resources: ExitStack, *, named: bool = False) -> tuple[Plugger, Inventory]:
    (here / "m.toml").write_text(text)
    memory, io, sink, inventory, clock = GuestMemory(), Reactor("io"), FakeSink(), Inventory(), Clock()
    for close in (memory.close, io.close, sink.close):
        resources.callback(close)
    groups: Any = None  # of which these devices need nothing
    report = lambda event, **data: None  # noqa: E731
    directory = str(here / "run" / "m")
    host = Host(memory, io, sink, None, report, clock.timer, groups, directory, clock.utc, named)
    reset = ResetRegister("reset", Switch())
    lines = [Line() for _ in range(4)]
    pci = PciRoot(Bus("mmio"), Bus("pio"), FakeDoorbells(), lines, WINDOWS, lambda gpa, size: False, reset)
    return Plugger(load(here / "m.toml"), pci, host, inventory, resources), inventory


@pytest.mark.parametrize(
    "error", [HostError("no such bridge"), OSError(errno.EIO, "gone"), KeyError("a mistake")], ids=["host", "os", "own"]
)
def test_a_device_that_cannot_be_closed_is_named_and_keeps_no_other_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    closed: list[str] = []
    with ExitStack() as resources:
        resources.callback(closed.append, "the rest")
        plugger, inventory = make(tmp_path, TEXT, resources)
        plugger.plug_all()
        for name in ("rng0", "rng1", "rng2"):
            inventory.plugged[name].resources.callback(closed.append, name)
        inventory.plugged["rng1"].resources.callback(failing(error))
    assert closed == ["rng2", "rng1", "rng0", "the rest"]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("rng1: ")


PASSED = """
name = "m"
[boot]
kernel = "kernel"
[[device]]
id = "hostdev0"
driver = "vfio-pci"
host = "ffff:fe:1f.7"
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of machine "m"."""
    (tmp_path / "run").mkdir(mode=0o755)
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run" / "m"


def test_a_program_that_passes_a_function_through_has_the_machines_name(tmp_path: Path, directory: Path) -> None:
    with ExitStack() as resources:
        plugger, _ = make(tmp_path, PASSED, resources)
        with pytest.raises(HostError, match=r"ffff:fe:1f\.7"):  # there is none
            plugger.plug_all()
        assert (directory / "pid").exists()
        with pytest.raises(HostError, match=r"name: 'm' is running already, process"):
            RuntimeDirectory("m")
        other, _ = make(tmp_path, PASSED, resources)
        with pytest.raises(HostError, match=r"m\.toml:2: name: 'm' is running already, process"):
            other.plug_all()
    assert not directory.exists()


def test_a_machine_whose_name_somebody_has_does_not_take_it(tmp_path: Path, directory: Path) -> None:
    with ExitStack() as resources, pytest.raises(HostError, match=r"ffff:fe:1f\.7"):
        make(tmp_path, PASSED, resources, named=True)[0].plug_all()
    assert not directory.exists()


def test_what_the_host_lacks_has_its_place_also_where_the_id_has_dots(tmp_path: Path, directory: Path) -> None:
    text = PASSED.replace("hostdev0", "slot.3.nic")
    with ExitStack() as resources, pytest.raises(HostError, match=r"m\.toml:8: device\.slot\.3\.nic\.host: "):
        make(tmp_path, text, resources, named=True)[0].plug_all()


def test_a_program_gives_back_what_a_machine_of_that_name_left(tmp_path: Path, directory: Path) -> None:
    directory.mkdir(mode=0o750)
    with subprocess.Popen(["true"]) as gone:  # a process that is no more
        record = {"address": "ffff:fe:1f.6", "rebound": True}
        journal = {"boot": "another", "machine": "m", "pid": gone.pid, "started": 1, "records": [record]}
        (directory / PCI_JOURNAL).write_text(json.dumps(journal))
    with ExitStack() as resources, pytest.raises(HostError, match=r"ffff:fe:1f\.7"):
        make(tmp_path, PASSED, resources)[0].plug_all()
    assert not directory.exists()
