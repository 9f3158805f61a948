"""A whole machine on the real kernel, its kernel a few bytes: it starts, stops, resets, fails, and leaves nothing."""

from __future__ import annotations

import gc
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmpy.config.schema import RESERVED, Config, load
from kvmpy.errors import CommandError, ConfigError, HostError, HostProblems
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.monitor.server import MonitorServer
from tests.counts import count
from tests.fakes.loop import BOUND, open_descriptors
from tests.fakes.pvh_kernel import POWER_OFF, pvh_kernel

SPIN = b"\xeb\xfe"
RESET = b"\x66\xba\xf9\x0c\xb0\x06\xee" + SPIN  # mov dx, 0xcf9; mov al, 6; out dx, al
PANIC = b"\x66\xba\x05\x05\xb0\x01\xee" + SPIN  # mov dx, 0x505; mov al, 1; out dx, al
TRIPLE_FAULT = b"\x0f\x0b"  # ud2, and there is no IDT
SAY_K = b"\x66\xba\xf8\x03\xb0\x4b\xee"  # mov dx, 0x3f8; mov al, 'K'; out dx, al
# Counts its own starts in a byte of RAM that a reset leaves alone, and powers off at the third.
THREE_STARTS = (
    b"\xfe\x05\x00\x00\x30\x00"  # inc byte [0x300000]
    + SAY_K
    + b"\x80\x3d\x00\x00\x30\x00\x03"  # cmp byte [0x300000], 3
    + b"\x75\x0c"  # jne to RESET
    + POWER_OFF
    + RESET
)

MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(system: System, tmp_path: Path) -> MakeConfig:
    """``make_config(code, "machine.cpus=2")``: a configuration whose kernel is ``code`` and whose console is a file."""

    def make(code: bytes, *overrides: str, more: str = "") -> Config:
        (tmp_path / "kernel").write_bytes(pvh_kernel(code))
        file = tmp_path / "machine.toml"
        tables = '[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n[console]\nserial = "file:console"\n'
        file.write_text(tables + more)
        return load(file, overrides)

    return make


def run_to_end(config: Config) -> tuple[Outcome | None, Machine]:
    with Machine(config) as machine:
        machine.start()
        outcome = machine.wait(60)
    return outcome, machine


@pytest.fixture
def spinning(make_config: MakeConfig) -> Iterator[Machine]:
    """A machine of two vCPUs whose first spins."""
    with Machine(make_config(SPIN, "machine.cpus=2")) as machine:
        machine.start()
        yield machine


def test_a_guest_that_powers_off_ends_the_machine(make_config: MakeConfig, tmp_path: Path) -> None:
    outcome, machine = run_to_end(make_config(SAY_K + POWER_OFF))
    assert outcome is Outcome.POWER_OFF
    assert machine.state is RunState.SHUTDOWN
    assert (tmp_path / "console").read_bytes() == b"K"


def test_a_guest_that_resets_starts_again_each_time(make_config: MakeConfig, tmp_path: Path) -> None:
    outcome, _ = run_to_end(make_config(THREE_STARTS))
    assert outcome is Outcome.POWER_OFF
    assert (tmp_path / "console").read_bytes() == b"KKK"


def test_a_guest_that_panics_is_told_apart(make_config: MakeConfig) -> None:
    outcome, machine = run_to_end(make_config(PANIC))
    assert outcome is Outcome.GUEST_PANIC
    assert machine.error is None


def test_a_triple_fault_ends_with_the_registers(make_config: MakeConfig) -> None:
    outcome, machine = run_to_end(make_config(TRIPLE_FAULT))
    assert outcome is Outcome.GUEST_PANIC
    assert "vcpu0: triple fault" in str(machine.error)
    kept = "rip 0000000000100000" in getattr(machine.error, "registers", "")
    assert kept is not ("resets its registers" in str(machine.error)), "AMD's KVM resets the vCPU, and we say so"


def test_no_device_can_be_called_what_a_part_of_every_machine_is(spinning: Machine) -> None:
    parts = {str(device.name) for device in spinning.board.devices}
    assert {"com1", "host-bridge"} < parts
    assert [name for name in (*parts, "machine", "vm", "vcpu0") if not re.fullmatch(RESERVED, name)] == []


def test_pause_stops_and_resume_goes_on(spinning: Machine) -> None:
    states = []
    for change in (spinning.pause, spinning.pause, spinning.resume, spinning.resume):
        change()
        states.append(spinning.state)
    assert states == [RunState.PAUSED, RunState.PAUSED, RunState.RUNNING, RunState.RUNNING]


def test_a_paused_machine_stays_paused_over_a_reset(spinning: Machine) -> None:
    spinning.pause()
    spinning.reset()
    assert spinning.state is RunState.PAUSED
    assert spinning.board.vcpus[0].regs.rip == 0x10_0000


def test_events_come_in_order_with_their_reasons(spinning: Machine) -> None:
    events: list[tuple[str, object]] = []
    spinning.listeners.append(lambda name, data, _: events.append((name, data)))
    spinning.pause()
    spinning.resume()
    spinning.reset()
    spinning.stop()
    assert events == [
        ("STOP", {}),
        ("RESUME", {}),
        ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}),
    ]


def test_an_event_says_when_it_happened_not_when_it_is_told(spinning: Machine) -> None:
    told: list[tuple[str, int]] = []
    spinning.listeners.append(lambda name, _, at_ns: told.append((name, at_ns)))
    is_late = threading.Event()
    spinning.control.post(lambda: is_late.wait(60))
    spinning.report("DEVICE_BROKEN", device="net1", reason="a test")
    happened = time.time_ns()
    is_late.set()
    spinning.pause()
    paused = time.time_ns()
    spinning.resume()
    assert [name for name, _ in told] == ["DEVICE_BROKEN", "STOP", "RESUME"]
    assert told[0][1] <= happened <= told[1][1] <= paused <= told[2][1] <= time.time_ns()


def test_a_guest_that_ignores_the_power_button_is_stopped_in_time(spinning: Machine) -> None:
    assert spinning.powerdown(limit=0.05) is False
    assert spinning.wait(60) is Outcome.POWER_OFF


def test_a_machine_stopped_before_it_ran_has_ended(make_config: MakeConfig) -> None:
    with Machine(make_config(SPIN)) as machine:
        machine.control.post(machine.stop)  # as the escape key does, before all else
        machine.start()
        assert machine.wait(60) is Outcome.POWER_OFF
        assert machine.state is RunState.SHUTDOWN


def test_an_ended_machine_refuses_commands_with_its_state(make_config: MakeConfig) -> None:
    with Machine(make_config(POWER_OFF)) as machine:
        machine.start()
        machine.wait(60)
        with pytest.raises(CommandError, match="shutdown"):
            machine.resume()


def test_a_kernel_that_is_gone_at_a_reset_ends_the_machine_and_says_so(make_config: MakeConfig, tmp_path: Path) -> None:
    with Machine(make_config(SPIN)) as machine:
        machine.start()
        (tmp_path / "kernel").unlink()
        machine.reset()
        assert machine.wait(60) is Outcome.HOST_ERROR
        assert re.search(r"\.toml:\d+: boot\.kernel: .*ENOENT", str(machine.error))


def test_a_host_that_fails_a_reset_ends_the_machine(spinning: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise HostError("KVM_SET_IRQCHIP: EIO")

    monkeypatch.setattr("kvmpy.machine.machine.load_interrupts", fail)
    spinning.reset()
    assert spinning.wait(60) is Outcome.HOST_ERROR
    assert str(spinning.error) == "KVM_SET_IRQCHIP: EIO"


@pytest.mark.parametrize("change", ["resume", "reset"])
def test_nothing_is_told_of_a_change_that_a_device_refuses(
    spinning: Machine, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def fail() -> None:
        raise HostError("no thread for the disk")

    events: list[str] = []
    spinning.pause()
    spinning.listeners.append(lambda name, data, _: events.append(name))
    monkeypatch.setattr(spinning.board.devices[0], "resume", fail)
    if change == "reset":
        monkeypatch.setattr(spinning, "state", RunState.RUNNING)
    getattr(spinning, change)()
    assert spinning.wait(60) is Outcome.HOST_ERROR
    assert events == ["SHUTDOWN"]


def test_a_device_that_raises_costs_the_access_and_not_the_machine(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise IndexError("a bug")

    machine = Machine(make_config(SAY_K + POWER_OFF))
    monkeypatch.setattr(machine.board.serial, "write", fail)
    with machine:
        machine.start()
        assert machine.wait(60) is Outcome.POWER_OFF
        assert machine.threads[0].faults == 1
    assert "a bug" in caplog.text


@pytest.mark.parametrize("loop", ["control", "io"])
def test_a_loop_that_is_refused_its_thread_is_the_hosts_fault_and_all_is_given_back(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loop: str
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == loop:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = open_descriptors()
    machine = Machine(make_config(SPIN, "machine.cpus=2"))
    server = MonitorServer(machine, str(tmp_path / "qmp.sock"))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(HostError, match="EAGAIN: no thread for each of 2 vCPUs"):
            machine.start()

    def close() -> None:
        server.close()
        machine.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(BOUND)
    assert not closing.is_alive()
    assert open_descriptors() == before
    assert not any(thread.is_alive() for thread in machine.threads)


def test_more_vcpus_than_kvm_has_is_a_configuration_error(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(System, "max_vcpus", 3)
    with pytest.raises(ConfigError, match=r"machine\.cpus: 4 vCPUs, .* at most 3"):
        Machine(make_config(SPIN, "machine.cpus=4"))


LACKING = """
[[drive]]
id = "d0"
path = "/nowhere/disk"
format = "raw"
[[device]]
driver = "virtio-blk-pci"
id = "vd0"
drive = "d0"
[[device]]
driver = "virtio-rng-pci"
id = "rng0"
[[device]]
driver = "virtio-serial-pci"
id = "serial0"
chardev = "unix:/nowhere/socket"
"""


def test_all_that_devices_lack_here_is_said_at_once(make_config: MakeConfig) -> None:
    config = make_config(POWER_OFF, more=LACKING)
    with pytest.raises(HostProblems) as caught:
        Machine(config)
    disk, chardev = caught.value.problems
    assert "drive.d0.path: /nowhere/disk: ENOENT" in disk
    assert "device.serial0.chardev: /nowhere/socket: ENOENT" in chardev


def test_a_machine_that_is_to_come_is_missed_its_files_and_its_devices_at_once(make_config: MakeConfig) -> None:
    config = make_config(POWER_OFF, more=LACKING)
    Path(config.boot.kernel).unlink()
    with pytest.raises(ConfigError) as caught:
        Machine(config, incoming=True)
    kernel, disk, chardev = caught.value.problems
    assert "boot.kernel: " in kernel
    assert "/nowhere/disk" in disk
    assert "/nowhere/socket" in chardev


def test_more_memory_than_the_host_has_is_an_error_at_start(make_config: MakeConfig) -> None:
    with pytest.raises(HostError, match=r"machine\.memory: .* available"):
        Machine(make_config(SPIN, "machine.memory=1TiB"))


def test_all_the_vcpus_asked_for_are_made(make_config: MakeConfig) -> None:
    with Machine(make_config(POWER_OFF, "machine.cpus=16")) as machine:
        machine.start()
        assert [thread.name for thread in machine.threads] == [f"vcpu{n}" for n in range(16)]
        assert machine.wait(60) is Outcome.POWER_OFF


def test_a_machine_with_memory_above_4_gib_has_it_in_two_blocks(make_config: MakeConfig) -> None:
    with Machine(make_config(POWER_OFF, "machine.memory=4GiB")) as machine:
        assert [block.gpa for block in machine.board.memory.blocks] == [0, 0x1_0000_0000]
        assert machine.board.memory.size == 4 << 30


def test_machines_come_and_go_and_leave_nothing(make_config: MakeConfig) -> None:
    config = make_config(SAY_K + POWER_OFF, "machine.cpus=2")
    for _ in range(16):  # until caches and arenas have their size
        run_to_end(config)
    before = footprint()
    for _ in range(count(64, 1024)):
        run_to_end(config)
    after = footprint()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 4096, "KiB of memory more than before"


def footprint() -> tuple[int, int, int]:
    """File descriptors, threads, and KiB of resident memory of this process."""
    gc.collect()
    resident = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident


def test_a_listener_that_raises_stops_no_change(spinning: Machine, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise LookupError("listener's bug")

    spinning.listeners.append(fail)
    for change in (spinning.pause, spinning.resume, spinning.reset, spinning.stop):
        change()
    assert spinning.wait(60) is Outcome.POWER_OFF
    assert "listener's bug" in caplog.text


def test_a_listener_may_make_the_next_change(spinning: Machine) -> None:
    spinning.listeners.append(lambda name, *_: spinning.stop() if name == "RESUME" else None)
    spinning.pause()
    spinning.resume()
    assert spinning.wait(60) is Outcome.POWER_OFF
    assert spinning.state is RunState.SHUTDOWN


def test_a_machine_starts_once(spinning: Machine) -> None:
    with pytest.raises(CommandError, match="started already"):
        spinning.start()


def test_a_closed_machine_says_so(make_config: MakeConfig) -> None:
    machine = Machine(make_config(SPIN))
    machine.start()
    machine.close()
    machine.close()
    for change in (machine.pause, machine.resume, machine.reset, machine.stop, machine.start):
        with pytest.raises(CommandError, match="closed"):
            change()


def test_closing_from_many_threads_closes_once(make_config: MakeConfig) -> None:
    machine = Machine(make_config(SPIN, "machine.cpus=2"))
    machine.start()
    failures: list[BaseException] = []

    def close() -> None:
        try:
            machine.close()
        except BaseException as e:  # noqa: BLE001  it is what the test is about
            failures.append(e)

    threads = [threading.Thread(target=close) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert machine.state is RunState.SHUTDOWN


def test_a_forks_copy_of_a_machine_leaves_the_parents_alone(spinning: Machine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and later warn of a fork beside threads
        child = os.fork()
    if child == 0:
        spinning.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    spinning.pause()
    assert spinning.state is RunState.PAUSED


def test_a_panic_that_a_reset_overtook_is_not_the_next_boots(spinning: Machine) -> None:
    def panic_then_reset() -> None:
        spinning.report_panic()  # is posted
        spinning.reset()  # is made at once: this is the control thread

    spinning.control.post(panic_then_reset)
    spinning.pause()
    assert spinning.state is RunState.PAUSED


def test_a_client_that_quits_before_the_start_is_heard_after_it(make_config: MakeConfig, tmp_path: Path) -> None:
    with Machine(make_config(SPIN)) as machine, socket.socket(socket.AF_UNIX) as client:
        server = MonitorServer(machine, str(tmp_path / "qmp.sock"))
        client.connect(str(tmp_path / "qmp.sock"))
        client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        machine.start()
        assert machine.wait(60) is Outcome.POWER_OFF
        server.close()
