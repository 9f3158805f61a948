"""A machine whose host does not answer, a disk or the reset of a real device: it holds up nobody who need not wait."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kvmpy.config.schema import load
from kvmpy.devices.vfio import pci as vfio_pci
from kvmpy.devices.virtio.pci import VirtioPci
from kvmpy.errors import CommandError
from kvmpy.machine import machine as machine_module
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.monitor.ports import RootPortState, root_ports
from kvmpy.monitor.server import MonitorServer
from tests.fakes.disk import Hanging
from tests.fakes.hotplug_guest import CardDriver
from tests.fakes.loop import BOUND, Inbox, poll
from tests.fakes.monitor import Client
from tests.fakes.pci import Accesses
from tests.fakes.vfio import FakeNic
from tests.fakes.vfio_rig import NicRig
from tests.fakes.virtio_pci_driver import Reg
from tests.kvm.test_hotplug import BLK, RNG, Rig, config, hurried  # noqa: F401  fixtures

READ = bytes(16)
ALL_ONES = 0xFFFF_FFFF


class HungRig(Rig):
    """With vd1 in root2, of which the first disk request hangs; ``disk`` lets it go."""

    def __init__(self, machine: Machine, path: str) -> None:
        super().__init__(machine)
        self.path = path
        self.add(BLK)
        device: Any = machine.board.by_id["vd1"]
        self.disk = device.disk = Hanging(device.disk)
        self.blk = device
        self.head = self.driver.submit(0, [READ], [512, 1])
        self.disk.begun.wait()

    @property
    def driver(self) -> CardDriver:
        driver = self.guests["root2"].driver
        assert driver is not None
        return driver

    def status_of_request(self) -> int:
        gpa, _ = self.driver.queues[0].writable(self.head)[-1]
        return self.machine.board.memory.read(gpa, 1)[0]

    def everybody_else_gets_on(self) -> None:
        """The monitor answers, and so does configuration space, and a device beside it is plugged and unplugged."""
        with closing(Client(self.path)) as client:
            assert client.ask({"execute": "query-status"})["return"]["running"]
            assert client.ask({"execute": "query-pci"})["return"]
            assert client.ask({"execute": "query-machine"})["return"]
        assert Accesses(self.guests["root1"].bus, 0, 0).read(0, 2) == 0x1B36  # type: ignore[arg-type]
        self.add(RNG)
        self.remove("rng1", "root1")


@pytest.fixture
def rig(config: Path, tmp_path: Path, hurried: None) -> Iterator[HungRig]:  # noqa: F811
    path = str(tmp_path / "qmp.sock")
    with Machine(load(config)) as machine, closing(MonitorServer(machine, path)):
        machine.start()
        rig = HungRig(machine, path)
        yield rig
        rig.disk.go.set()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "END_PATIENCE", 0.1)


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_a_device_is_torn_out_and_is_gone_when_its_disk_answers(rig: HungRig) -> None:
    bar = rig.driver.common
    rig.machine.board.memory.write(rig.driver.queues[0].writable(rig.head)[-1][0], b"\xee")
    rig.machine.device_del("vd1", force=True)
    rig.everybody_else_gets_on()
    rig.guests["root2"].obeys = False
    # A driver that waits for its reset before it frees its buffers waits for the disk.
    assert rig.machine.board.mmio.read(bar + Reg.STATUS.value[0], 1) == 0xFF
    assert rig.deleted() == ["rng1"]
    assert rig.refused(BLK) == "Duplicate device ID 'vd1'"
    (root2,) = (port for port in root_ports(rig.machine) if port.id == "root2")
    assert (root2.state, root2.device) == (RootPortState.LEAVING, "vd1")

    rig.disk.go.set()
    rig.events.wait_until(lambda _: rig.deleted() == ["rng1", "vd1"])
    assert rig.machine.board.mmio.read(bar + Reg.STATUS.value[0], 1) == 0
    assert rig.status_of_request() == 0xEE
    assert rig.driver.queues[0].used() == []
    rig.guests["root2"].serve()
    rig.add(BLK)


@pytest.mark.parametrize("how", ["slot", "link", "master"])
def test_a_guest_that_takes_a_disk_from_the_bus_waits_for_nobody(rig: HungRig, how: str) -> None:
    guest, function = rig.guests["root2"], rig.blk.transport
    assert isinstance(function, VirtioPci)
    match how:
        case "slot":
            guest.driver = None  # it does not reset it
            guest.let_go()
        case "link":
            guest.above.write(guest.express + 0x10, 2, 0x0010)
        case "master":
            rig.driver.config.write(4, 2, 0x0002)
    rig.everybody_else_gets_on()
    assert rig.blk.busy
    assert not rig.blk.running
    rig.disk.go.set()
    poll(lambda: not rig.blk.busy)
    if how == "slot":
        rig.events.wait_until(lambda _: "vd1" in rig.deleted())


def test_a_driver_that_resets_its_disk_reads_when_it_is(rig: HungRig) -> None:
    rig.driver.put(Reg.STATUS, 0)
    assert rig.driver.get(Reg.STATUS) != 0
    rig.everybody_else_gets_on()
    rig.disk.go.set()
    rig.driver.start()
    rig.driver.submit(0, [READ], [512, 1])
    poll(lambda: rig.driver.queues[0].used())


def test_a_machine_that_is_to_pause_waits_for_its_disk_and_serves_others_meanwhile(rig: HungRig) -> None:
    with closing(Client(rig.path)) as one, closing(Client(rig.path)) as other:
        one.send({"execute": "stop", "id": 1})
        poll(lambda: not rig.blk.running)
        assert other.ask({"execute": "query-status"})["return"]["status"] == "running"
        other.send({"execute": "cont", "id": 2})
        answered = time.time()
        rig.disk.go.set()
        for client, own in ((one, 1), (other, 2)):
            messages = [client.receive() for _ in range(3)]
            stamps = {message["event"]: message["timestamp"] for message in messages if "event" in message}
            seconds = {event: stamp["seconds"] + stamp["microseconds"] / 1e6 for event, stamp in stamps.items()}
            assert seconds["STOP"] < answered < seconds["RESUME"], "the vCPUs stood still before the disk did"
            heard = [message.get("event", message.get("id")) for message in messages]
            assert sorted(heard, key=str) == [own, "RESUME", "STOP"]
            assert heard.index("STOP") < heard.index("RESUME")
            assert heard.index("STOP") < heard.index(own)
    assert rig.driver.queues[0].used() == [(rig.head, 513)]


def test_a_device_that_comes_while_a_pause_waits_comes_after_it(rig: HungRig) -> None:
    pausing = in_background(rig.machine.pause)
    poll(lambda: not rig.blk.running)
    adding = in_background(lambda: rig.machine.device_add(RNG))
    rig.disk.go.set()
    adding.join(BOUND)
    pausing.join(BOUND)
    assert rig.machine.state is RunState.PAUSED
    rng: Any = rig.machine.board.by_id["rng1"]
    assert not rng.running
    rig.machine.resume()


def test_a_reset_waits_for_the_disk_and_the_guest_begins_anew(rig: HungRig) -> None:
    resetting = in_background(rig.machine.reset)
    poll(lambda: not rig.blk.running)
    assert rig.machine.in_control(lambda: rig.machine.state) is RunState.RUNNING
    assert ("RESET" in {event for event, _ in rig.events.items}) is False
    rig.disk.go.set()
    resetting.join(BOUND)
    assert rig.events.items[-1][0] == "RESET"
    assert rig.machine.state is RunState.RUNNING


def test_a_machine_is_stopped_though_a_pause_waits_for_its_disk(rig: HungRig, impatient: None) -> None:
    with closing(Client(rig.path)) as one, closing(Client(rig.path)) as other:
        one.send({"execute": "stop"})
        poll(lambda: not rig.blk.running)
        other.send({"execute": "quit"})
        assert rig.machine.wait(BOUND) is Outcome.POWER_OFF
        told = [one.receive(), one.receive()]
    assert [message["event"] for message in told if "event" in message] == ["SHUTDOWN"]
    assert [m["error"]["desc"] for m in told if "error" in m] == ["the machine has been stopped meanwhile"]


def test_what_a_closed_machine_had_is_given_back_when_its_disk_answers(
    rig: HungRig, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    rig.machine.close()
    assert "a disk does not answer: what it uses of the host is kept until it does" in caplog.text
    assert rig.machine.outcome is Outcome.POWER_OFF
    backing = rig.machine.board.memory.blocks[0].backing
    assert len(backing.view)  # where the host may still write
    threads = {thread.name for thread in threading.enumerate()}
    assert "close-m" in threads
    rig.disk.go.set()
    poll(lambda: not any(thread.name in ("close-m", "blk-vd1-0") for thread in threading.enumerate()))
    assert not rig.machine.board.memory.blocks


def test_a_device_that_was_on_its_way_out_is_given_back_too(rig: HungRig, impatient: None) -> None:
    rig.machine.device_del("vd1", force=True)
    poll(lambda: "vd1" not in rig.machine.board.by_id)
    rig.machine.close()
    assert rig.machine.board.memory.blocks
    rig.disk.go.set()
    poll(lambda: not rig.machine.board.memory.blocks)


PROGRAM = """\
import sys
from pathlib import Path
from kvmpy.config.schema import load
from kvmpy.machine import machine as module
from tests.kvm.test_hang import HungRig
module.END_PATIENCE = 0.2
with module.Machine(load(Path(sys.argv[1]))) as machine:
    machine.start()
    HungRig(machine, "")
    machine.control.post(machine.stop)
    outcome = machine.wait()
print(outcome)
"""


def test_the_process_of_a_machine_ends_though_its_disk_does_not_answer(config: Path) -> None:  # noqa: F811
    command = [sys.executable, "-c", PROGRAM, str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=BOUND)
    assert (ended.returncode, ended.stdout) == (0, "Outcome.POWER_OFF\n"), ended.stderr
    assert "a disk does not answer" in ended.stderr


# Real devices that are reset with the machine


@pytest.fixture
def nics(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Machine, list[NicRig]]]:  # noqa: F811
    """A machine, two real devices of which are another's as far as its bus is concerned: it only resets them."""
    with ExitStack() as resources, Machine(load(config)) as machine:
        rigs = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            rigs.append(NicRig(resources, monkeypatch, tmp_path / name, FakeNic()))
        machine.board.inventory.fix([rig.function for rig in rigs])
        machine.start()
        yield machine, rigs


def test_real_devices_are_reset_side_by_side_and_the_machine_serves_others_meanwhile(
    nics: tuple[Machine, list[NicRig]],
) -> None:
    machine, rigs = nics
    both, go = threading.Barrier(2), threading.Event()
    under_way = threading.Event()

    def reset() -> None:
        both.wait(BOUND)
        under_way.set()
        assert go.wait(BOUND)

    for rig in rigs:
        rig.nic.resetting = reset
    resetting = in_background(machine.reset)
    assert under_way.wait(BOUND)
    exits = [thread.other_exits for thread in machine.threads]
    assert machine.in_control(lambda: machine.state) is RunState.RUNNING
    assert [thread.other_exits for thread in machine.threads] == exits
    assert resetting.is_alive()
    go.set()
    resetting.join(BOUND)
    assert [rig.nic.resets for rig in rigs] == [["function"], ["function"]]
    assert [rig.function.info()["broken"] for rig in rigs] == [None, None]


def noted(wait: Callable[[float | None], bool], waits: list[float | None]) -> Callable[[float | None], bool]:
    def note(seconds: float | None = None) -> bool:
        waits.append(seconds)
        return wait(seconds)

    return note


def test_real_devices_that_do_not_come_out_of_their_resets_have_one_time_together(
    nics: tuple[Machine, list[NicRig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, rigs = nics
    go = threading.Event()
    monkeypatch.setattr(vfio_pci, "RESET_SECONDS", 0.2)
    waits: list[float | None] = []
    for rig in rigs:
        rig.nic.resetting = lambda: go.wait(BOUND)
        monkeypatch.setattr(rig.function._resetter, "wait", noted(rig.function._resetter.wait, waits))
    machine.reset()
    assert [rig.function.broken is not None for rig in rigs] == [True, True]
    assert sum(seconds for seconds in waits if seconds is not None) < 0.3
    go.set()
    machine.reset()
    assert [rig.function.broken for rig in rigs] == [None, None]


def test_a_machine_is_stopped_though_a_reset_waits_for_a_real_device(
    nics: tuple[Machine, list[NicRig]],
) -> None:
    machine, rigs = nics
    go, begun = threading.Event(), threading.Event()

    def reset() -> None:
        begun.set()
        go.wait(BOUND)

    rigs[0].nic.resetting = reset
    refused: Inbox[str] = Inbox()

    def ask() -> None:
        with pytest.raises(CommandError) as e:
            machine.reset()
        refused.put(str(e.value))

    in_background(ask)
    assert begun.wait(BOUND)
    machine.stop()
    assert refused.wait() == ["the machine has been stopped meanwhile"]
    assert machine.outcome is Outcome.POWER_OFF
    go.set()
