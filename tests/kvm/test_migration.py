"""A guest that counts goes from one machine to another: it skips nothing, repeats nothing, and runs in one place."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmpy.errors import CommandError, IncompatibleError, MigrationError
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome, RunState
from kvmpy.migration import control, greeting, reception, transport
from kvmpy.migration.arrival import Incoming
from kvmpy.migration.descriptor import NOTHING, Offer
from kvmpy.migration.destination import Readiness, get_ready
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.messages import Sections
from kvmpy.migration.parameters import Compression, OnNoConvergence
from kvmpy.migration.sections import MachineState, load_machine, save_devices, save_machine
from kvmpy.migration.status import Status
from kvmpy.migration.wire import NEWEST, OLDEST, Preamble
from kvmpy.state import StateError
from tests.counts import count
from tests.fakes.certificates import Authority
from tests.fakes.counting_guest import COUNTS, COUNTS_BUSILY, WRITES
from tests.fakes.journey import Journey, Stop
from tests.fakes.loop import BOUND, poll

DEVICES = """
[[root_port]]
id = "root1"
[[root_port]]
id = "root2"
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
cache = "writeback"
[[device]]
driver = "virtio-blk-pci"
id = "vd0"
drive = "disk0"
bus = "root1"
[[device]]
driver = "virtio-rng-pci"
id = "rng0"
[[device]]
driver = "virtio-serial-pci"
id = "hvc0"
bus = "root2"
"""


ENDLESS = {"downtime_limit": 0, "x_on_no_convergence": OnNoConvergence.CONTINUE}


@pytest.fixture
def stack(system: System) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def journey(tmp_path: Path, stack: ExitStack) -> Journey:
    return Journey(tmp_path, stack)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"multifd_channels": 8}, {"multifd_compression": Compression.ZSTD}],
    ids=["two channels", "eight", "zstd"],
)
def test_a_guest_counts_on_where_it_has_gone(journey: Journey, parameters: dict[str, Any]) -> None:
    source = journey.begin(x_checksum=True, **parameters)
    source.wait_for_count()
    journey.move(source)
    journey.check()


@pytest.mark.parametrize("code", [COUNTS, COUNTS_BUSILY], ids=["mostly at rest", "never"])
def test_a_guest_goes_there_and_back_again_and_again(tmp_path: Path, stack: ExitStack, code: bytes) -> None:
    journey = Journey(tmp_path, stack, code)
    here = journey.begin(x_checksum=True)
    for _ in range(count(4, 20)):
        here.wait_for_count()
        here = journey.move(here, x_checksum=True)
    journey.check()


@pytest.mark.parametrize("version", range(OLDEST, NEWEST))
def test_a_guest_goes_where_an_older_version_of_the_stream_is_spoken(
    journey: Journey, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = journey.begin(x_checksum=True)
    source.wait_for_count()
    for module in (greeting, reception, transport):
        monkeypatch.setattr(module, "OURS", Preamble(OLDEST, version))
    journey.move(source)
    journey.check()


def test_states_that_are_too_much_for_one_frame_go_one_by_one(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sections, "CAP", 4096)
    source = journey.begin()
    source.wait_for_count()
    journey.move(source)
    journey.check()


def test_both_sides_report_the_blackout_and_what_it_was_spent_on(journey: Journey) -> None:
    source = journey.begin()
    there = journey.move(source)
    info, said = source.migrations.progress.info(), there.migrations.progress.info()
    assert 0 < info["blackout-ms"] < info["total-time"] + 1
    assert abs(said["blackout-ms"] - info["blackout-ms"]) < info["blackout-ms"] + 1
    names = [phase["name"] for phase in info["phases"]]
    assert names == [
        *("connect", "compare", "page channels", "start dirty log", "precopy"),
        *("stop", "save state", "last pages", "send state", "disks", "await READY", "GO"),
    ]
    assert [phase["name"] for phase in info["destination"]["phases"]] == [
        *("receive RAM", "load state", "await GO", "run")
    ]
    assert info["ram"]["total"] == 16 << 20
    assert sum(each["pages"] for each in info["rounds"]) == info["ram"]["normal"] + info["ram"]["duplicate"]


def test_states_and_events_are_qemus(journey: Journey) -> None:
    source = journey.begin()
    there = journey.move(source)
    journey.check()
    statuses = [data["status"] for name, data in source.events if name == "MIGRATION"]
    assert statuses == ["setup", "active", "device", "completed"]
    assert next(data["pass"] for name, data in source.events if name == "MIGRATION_PASS") == 1
    assert [data["status"] for name, data in there.events if name == "MIGRATION"][-1] == "completed"
    assert [name for name, _ in source.events if name in ("STOP", "RESUME")] == ["STOP"]
    assert [name for name, _ in there.events if name in ("STOP", "RESUME")] == ["RESUME"]


def test_a_machine_with_devices_goes_with_their_state(tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    journey = Journey(tmp_path, stack, extra=DEVICES)
    source = journey.begin()
    before = save_devices(source.machine)
    there = journey.move(source)
    there.machine.pause()
    after = save_devices(there.machine)
    assert before.keys() == after.keys()
    changes = {name for name in before if before[name] != after[name]}
    assert changes <= {"com1", "acpi-pm"}  # the guest talks on, and time passes
    journey.check()


def test_a_guest_can_be_reset_where_it_has_gone(journey: Journey) -> None:
    source = journey.begin()
    source.wait_for_count()
    there = journey.move(source)
    before = len(there.said)
    there.machine.reset()
    there.wait_for_count()
    there.machine.pause()
    said = there.said[before:]
    assert b"\x00\x01\x02\x03" in said, "it began anew"


@pytest.mark.parametrize("change", ["missing", "surplus", "field", "queue"])
def test_a_state_that_no_machine_of_ours_has_is_refused(tmp_path: Path, stack: ExitStack, change: str) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    journey = Journey(tmp_path, stack, extra=DEVICES)
    source, there = journey.begin(), journey.wait_at()
    source.machine.pause()
    sections = save_machine(source.machine, MachineState())
    match change:
        case "missing":
            del sections["vd0"]
        case "surplus":
            sections["vd1"] = sections["vd0"]
        case "field":
            sections["com1"]["state"]["ier"] = 256
        case "queue":
            sections["vd0"]["state"]["pci"]["config"] = ""
    with pytest.raises((StateError, IncompatibleError)):
        load_machine(there.machine, sections)


def test_a_paused_machine_arrives_paused(journey: Journey) -> None:
    source = journey.begin()
    source.wait_for_count()
    source.machine.pause()
    there = journey.wait_at()
    source.migrations.migrate(there.uri)
    there.wait(Status.COMPLETED)
    assert there.machine.state is RunState.PAUSED
    there.machine.resume()
    there.wait_for_count()
    journey.check()


def test_after_completion_the_source_goes_on_only_by_force(journey: Journey) -> None:
    source = journey.begin()
    there = journey.move(source)
    with pytest.raises(CommandError, match="runs at the destination"):
        source.machine.resume()
    assert source.machine.state is RunState.POSTMIGRATE
    there.machine.stop()
    source.machine.resume(force=True)
    source.wait_for_count()


def test_force_does_not_take_a_disk_that_the_destination_has(tmp_path: Path, stack: ExitStack) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    journey = Journey(tmp_path, stack, extra=DEVICES)
    source = journey.begin()
    there = journey.move(source)
    with pytest.raises(Exception, match=r"disk\.raw: locked by"):
        source.machine.resume(force=True)
    assert source.machine.state is RunState.POSTMIGRATE
    there.machine.close()
    source.machine.resume(force=True)
    source.wait_for_count()


def test_what_would_change_the_machine_is_refused_meanwhile(journey: Journey) -> None:
    source, there = journey.begin(**ENDLESS), journey.wait_at()
    source.migrations.migrate(there.uri)
    for change in (
        source.machine.pause,
        source.machine.resume,
        source.machine.reset,
        lambda: source.machine.device_del("x"),
        lambda: source.machine.device_add({}),
        lambda: source.migrations.migrate(there.uri),
    ):
        with pytest.raises(CommandError, match="is being migrated"):
            change()
    source.migrations.cancel()
    source.wait(Status.CANCELLED)
    source.machine.pause()


def test_a_device_whose_plugging_began_before_the_migration_is_refused_meanwhile(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    journey = Journey(tmp_path, stack, extra='[[root_port]]\nid = "root1"\n')
    source, there = journey.begin(**ENDLESS), journey.wait_at()
    plugger = source.machine.board.plugger
    make = plugger.make

    def make_slowly(*arguments: Any) -> Any:
        made = make(*arguments)
        source.migrations.migrate(there.uri)
        return made

    monkeypatch.setattr(plugger, "make", make_slowly)
    with pytest.raises(CommandError, match="is being migrated"):
        source.machine.device_add({"driver": "virtio-rng-pci", "id": "rng0", "bus": "root1"})
    source.migrations.set_parameters(downtime_limit=10_000)
    source.wait(Status.COMPLETED)
    there.wait_for_count()


def test_a_cancel_of_one_that_has_just_failed_is_not_too_late(journey: Journey) -> None:
    source = journey.begin()
    keep = source.machine.handoff.keep

    def cancel_and_keep() -> None:
        source.migrations.cancel()
        keep()

    source.machine.handoff.keep = cancel_and_keep  # type: ignore[method-assign]
    source.migrations.migrate("exec:head -c 100000 > /dev/null")
    source.wait(Status.FAILED)
    assert "EPIPE" in str(source.error)
    assert source.runs


def test_a_destination_that_cannot_have_page_channels_says_why(
    journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MigrationError("a connection: EMFILE: cannot be accepted")

    monkeypatch.setattr(Incoming, "accept_pages", refuse)
    source, there = journey.begin(), journey.wait_at()
    source.migrations.migrate(there.uri)
    source.wait(Status.FAILED)
    assert source.error == "the other side says: a connection: EMFILE: cannot be accepted"
    assert source.runs


def test_differences_are_all_named_before_anything_moves(journey: Journey) -> None:
    source = journey.begin()
    there = journey.wait_at("machine.memory=32MiB", "machine.cpus=2")
    asked = source.migrations.check(there.uri).problems
    source.migrations.migrate(there.uri)
    source.wait(Status.FAILED)
    assert source.migrations.progress.problems == asked
    assert "machine.cpus: the source has 1, the destination 2" in asked
    assert any(problem.startswith("memory map: RAM 0") for problem in asked)
    assert there.machine.wait(BOUND) is Outcome.HOST_ERROR
    assert "machine.cpus" in str(there.machine.error)
    source.wait_for_count()
    journey.stops.pop().machine.close()
    journey.move(source)
    journey.check()


def test_asking_whether_it_could_leaves_the_destination_waiting(journey: Journey) -> None:
    source, there = journey.begin(), journey.wait_at()
    assert source.migrations.check(there.uri) == ([], [])
    assert source.migrations.check(there.uri) == ([], [])
    source.migrations.migrate(there.uri)
    source.wait(Status.COMPLETED)
    there.wait_for_count()
    journey.check()


def test_a_destination_gets_ready_before_a_source_comes(journey: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[Readiness] = []

    def noted(machine: Machine) -> Readiness:
        ready.append(get_ready(machine))
        return ready[-1]

    monkeypatch.setattr(control, "get_ready", noted)
    there = journey.wait_at()
    poll(lambda: ready, lambda: "it waits for a source with that")
    source = journey.begin()
    source.migrations.migrate(there.uri)
    source.wait(Status.COMPLETED)
    there.wait_for_count()
    assert len(ready) == 1
    journey.stops.reverse()  # the destination was made first
    journey.check()


def test_another_kernel_at_the_destination_is_a_warning_on_both_sides(journey: Journey, tmp_path: Path) -> None:
    source = journey.begin()
    (tmp_path / "other").write_bytes((tmp_path / "kernel").read_bytes() + bytes(16))
    there = journey.wait_at("boot.kernel=other", "boot.cmdline=quiet")
    rest = "not the same here and there; a reset of the guest loads the destination's"
    said = [f"boot.cmdline: {rest}", f"boot.kernel: {rest}"]
    assert source.migrations.check(there.uri) == ([], said)
    source.migrations.migrate(there.uri)
    source.wait(Status.COMPLETED)
    there.wait(Status.COMPLETED)
    assert source.migrations.progress.warnings == there.migrations.progress.warnings == said


def test_a_saved_machine_is_restored_from_its_file(journey: Journey, tmp_path: Path) -> None:
    source = journey.begin()
    source.wait_for_count()
    source.migrations.migrate(f"file:{tmp_path / 'saved'}")
    source.wait(Status.COMPLETED)
    assert source.machine.state is RunState.POSTMIGRATE
    there = journey.wait_at(uri=f"file:{tmp_path / 'saved'}")
    there.wait(Status.COMPLETED)
    there.wait_for_count()
    journey.check()


def test_a_disk_that_fills_up_at_the_very_end_leaves_the_guest_here(
    journey: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can have read the file, so nobody runs the guest."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    source = journey.begin()
    with monkeypatch.context() as patch:
        patch.setattr("kvmpy.migration.saved._sync", full)
        source.migrations.migrate(f"file:{tmp_path / 'saved'}")
        source.wait(Status.FAILED)
    assert "ENOSPC: it may not be on the disk; make room" in str(source.error)
    assert source.runs
    assert not list(tmp_path.glob("saved*"))
    source.wait_for_count()
    journey.move(source)
    journey.check()


def test_a_save_is_called_off_though_the_disk_does_not_answer(
    journey: Journey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    journey.at_end(go.set)

    def hang(_: int) -> None:
        begun.set()
        go.wait()

    source = journey.begin()
    with monkeypatch.context() as patch:
        patch.setattr("kvmpy.migration.saved._sync", hang)
        source.migrations.migrate(f"file:{tmp_path / 'saved'}")
        assert begun.wait(BOUND)
        source.migrations.cancel()
        source.wait(Status.CANCELLED)
    assert source.runs
    assert not list(tmp_path.glob("saved*"))
    source.wait_for_count()
    journey.move(source)
    journey.check()


def test_a_machine_ends_while_pages_come_from_a_command(journey: Journey, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    source = journey.begin(max_bandwidth=100_000)
    there = journey.wait_at(uri=f"exec:cat {tmp_path / 'fifo'}")
    source.migrations.migrate(f"exec:cat > {tmp_path / 'fifo'}")
    poll(lambda: there.migrations.progress.status is Status.ACTIVE)
    closing = threading.Thread(target=there.machine.close, daemon=True)
    closing.start()
    closing.join(BOUND)
    assert not closing.is_alive(), "it waits until a round is over, which takes minutes"
    source.migrations.cancel()
    source.migrations.wait(BOUND)
    assert source.runs


def test_a_guest_may_go_on_before_its_arrival_is_done_with(journey: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    source, there, third = journey.begin(), journey.wait_at(), journey.wait_at()
    go, close = threading.Event(), PageReceiver.close

    def close_late(pages: PageReceiver) -> None:
        go.wait(BOUND)
        close(pages)

    monkeypatch.setattr(PageReceiver, "close", close_late)
    source.migrations.migrate(there.uri)
    there.wait_for(RunState.RUNNING)
    arrival = there.migrations._thread
    assert arrival is not None
    there.migrations.set_parameters(**ENDLESS)
    there.migrations.migrate(third.uri)
    poll(lambda: there.migrations.progress.passes)
    go.set()
    arrival.join(BOUND)
    assert there.migrations.progress.status is Status.ACTIVE, "it is over only when it is"
    there.migrations.set_parameters(downtime_limit=300)
    there.wait(Status.COMPLETED)
    third.wait_for_count()
    journey.check()


def test_what_has_been_sent_is_told_while_a_round_goes_on(journey: Journey) -> None:
    source, there = journey.begin(max_bandwidth=100_000, multifd_channels=1), journey.wait_at()
    source.migrations.migrate(there.uri)
    seen: list[dict[str, int]] = []

    def more() -> bool:
        ram = source.migrations.progress.info().get("ram", {})
        if ram.get("transferred") and (not seen or ram["transferred"] > seen[-1]["transferred"]):
            seen.append(ram)
        return len(seen) >= 3

    poll(more)
    assert source.migrations.progress.passes == 1
    assert seen[0]["remaining"] >= seen[1]["remaining"] >= seen[2]["remaining"]
    source.migrations.cancel()
    source.wait(Status.CANCELLED)
    assert source.migrations.progress.info()["ram"]["transferred"] >= seen[-1]["transferred"]


def test_a_command_can_keep_a_machine_and_bring_it_back(journey: Journey, tmp_path: Path) -> None:
    source = journey.begin(x_checksum=True)
    source.wait_for_count()
    source.migrations.migrate(f"exec:gzip -1 > {tmp_path / 'saved.gz'}")
    source.wait(Status.COMPLETED)
    there = journey.wait_at(uri=f"exec:gzip -dc {tmp_path / 'saved.gz'}")
    there.wait(Status.COMPLETED)
    there.wait_for_count()
    journey.check()


def test_a_command_has_its_time_to_end(journey: Journey, tmp_path: Path) -> None:
    """The guest has gone by then: it is not cut short as what a guest waits for is."""
    source = journey.begin()
    source.wait_for_count()
    source.migrations.migrate(f"exec:cat > {tmp_path / 'saved'}; sleep 2")
    source.wait(Status.COMPLETED)
    there = journey.wait_at(uri=f"exec:cat {tmp_path / 'saved'}")
    there.wait(Status.COMPLETED)
    there.wait_for_count()
    journey.check()


@pytest.mark.parametrize("uri", ["exec:cat > {}", "file:{}", "file:{},offset=0", "fd:kept"])
def test_who_cannot_be_asked_is_not_begun_and_nothing_is_written(journey: Journey, tmp_path: Path, uri: str) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"a guest that was saved")
    source = journey.begin()
    fds = Offer(os.open(kept, os.O_RDWR)) if uri.startswith("fd:") else NOTHING
    assert source.migrations.check(uri.format(kept), fds) == ([], [])
    assert kept.read_bytes() == b"a guest that was saved"
    assert sorted(tmp_path.glob("kept*")) == [kept]


def test_a_command_that_fails_leaves_the_guest_here(journey: Journey) -> None:
    source = journey.begin()
    source.migrations.migrate("exec:exit 3")
    source.wait(Status.FAILED)
    assert "status 3" in str(source.error)
    assert source.runs
    journey.move(source)
    journey.check()


def test_a_guest_goes_by_tcp_with_certificates_on_both_sides(journey: Journey, tmp_path: Path) -> None:
    credentials = Authority().credentials(tmp_path / "tls")
    source = journey.begin(tls_creds=credentials, x_checksum=True)
    source.wait_for_count()
    there = journey.wait_at(uri=f"tcp:localhost:{free_port()}", tls_creds=credentials)
    source.migrations.migrate(there.uri)
    source.wait(Status.COMPLETED)
    there.wait(Status.COMPLETED)
    there.wait_for_count()
    journey.check()


def test_a_certificate_of_somebody_else_is_turned_away_and_the_guest_stays(journey: Journey, tmp_path: Path) -> None:
    ours, others = Authority().credentials(tmp_path / "tls"), Authority().credentials(tmp_path / "other")
    source = journey.begin(tls_creds=others)
    there = journey.wait_at(uri=f"tcp:localhost:{free_port()}", tls_creds=ours)
    source.migrations.migrate(there.uri)
    source.wait(Status.FAILED)
    assert "certificate" in str(source.error)
    assert source.runs
    assert there.machine.state is RunState.INMIGRATE, "it goes on waiting for the right one"
    source.migrations.set_parameters(tls_creds=ours)
    source.migrations.migrate(there.uri)
    source.wait(Status.COMPLETED)
    there.wait_for_count()
    journey.check()


def test_tcp_without_certificates_must_be_asked_for(journey: Journey) -> None:
    source = journey.begin()
    with pytest.raises(CommandError, match="insecure"):
        journey.wait_at(uri="tcp:localhost:0")
    source.migrations.migrate("tcp:localhost:1")
    source.wait(Status.FAILED)
    assert "insecure" in str(source.error)
    assert source.runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# A guest that writes too fast


def writer(tmp_path: Path, stack: ExitStack, policy: OnNoConvergence) -> Stop:
    journey = Journey(tmp_path, stack, WRITES)
    source = journey.begin(max_bandwidth=12 << 20, downtime_limit=100, multifd_channels=1, x_on_no_convergence=policy)
    there = journey.wait_at()
    source.migrations.migrate(there.uri)
    return source


def test_a_guest_that_writes_too_fast_is_slowed_down_until_it_can_go(tmp_path: Path, stack: ExitStack) -> None:
    source = writer(tmp_path, stack, OnNoConvergence.THROTTLE)
    poll(lambda: source.migrations.progress.throttle)
    assert "sleep 20 %" in source.migrations.progress.info()["not-converging"]
    source.migrations.set_parameters(max_bandwidth=0)
    source.wait(Status.COMPLETED)
    assert [data["reason"] for name, data in source.events if name == "MIGRATION_NOT_CONVERGING"]
    assert all(not thread.napping for thread in source.machine.threads)


def test_or_it_stays(tmp_path: Path, stack: ExitStack) -> None:
    source = writer(tmp_path, stack, OnNoConvergence.CANCEL)
    source.wait(Status.FAILED)
    assert "does not converge: the guest writes" in str(source.error)
    assert source.runs


def test_or_its_pages_are_sent_until_somebody_ends_it(tmp_path: Path, stack: ExitStack) -> None:
    source = writer(tmp_path, stack, OnNoConvergence.CONTINUE)
    poll(lambda: source.migrations.progress.passes >= 5)
    assert source.migrations.progress.info()["not-converging"].startswith("the guest writes")
    assert source.migrations.progress.throttle == 0
    source.migrations.cancel()
    source.wait(Status.CANCELLED)
    assert source.runs
