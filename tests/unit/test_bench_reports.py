"""What bench/ reads from iperf3, fio, ping and the host's kernel, as they were captured. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from bench import boot, disk, failover, linux, linux_memory, network, watch
from bench.figures import Stack
from bench.rows import KVMPY, QEMU
from scripts.lab.host import EmulatedHost
from scripts.lab.process import Sink

SAMPLES: Final = Path(__file__).parent / "bench_samples"
RAM_KIB: Final = 256 << 10


def text(name: str) -> str:
    return (SAMPLES / name).read_text()


def report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text(f"{name}.json"))
    return found


@pytest.mark.parametrize(
    ("name", "unit", "arrived"),
    [
        ("iperf3-tcp", "bit/s", 96452410.4),
        ("iperf3-udp-reverse", "packet/s", 1307 / 2.007525),
        ("iperf3-udp", "packet/s", 3700 / 2.684633),
    ],
)
def test_a_rate_is_of_what_has_arrived(name: str, unit: str, arrived: float) -> None:
    assert network.rate(report(name), unit) == pytest.approx(arrived)


def test_an_iperf3_that_failed_is_no_rate() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        network.rate({"start": {}, "intervals": [], "end": {}, "error": "unable to connect to server"}, "bit/s")


def test_pings_are_seconds() -> None:
    assert network.round_trips(text("ping.txt")) == pytest.approx([0.024187, 0.01128, 0.010388, 0.001806, 0.006524])


def test_fio_has_a_figure_for_each_job_of_what_it_did() -> None:
    jobs = (disk.JOBS[0], disk.JOBS[4])
    found = disk.figures(report("fio"), jobs)
    assert found == pytest.approx({jobs[0].name: 485274.066798, jobs[1].name: 101507841.0})


def test_a_job_of_fio_that_failed_is_no_figure() -> None:
    broken = report("fio")
    broken["jobs"][1]["error"] = 5
    with pytest.raises(ValueError, match="error 5"):
        disk.figures(broken, (disk.JOBS[0], disk.JOBS[4]))


def test_what_lies_behind_a_report_on_the_disk_is_not_read() -> None:
    assert disk.first_document('\n{"jobs": []}\nold data } {') == {"jobs": []}


def test_a_guest_is_told_all_jobs_in_one_line_that_its_shell_takes() -> None:
    line = disk.command("/dev/vdd", disk.JOBS)
    assert line.count("--name=") == len(disk.JOBS)
    assert len(line) < 1000


def test_a_boot_has_its_stamps_from_the_trace() -> None:
    stamps = watch.read_stamps(text("trace.txt").splitlines())
    assert stamps == {"started": 12.359992, "first KVM_RUN": 34.531919, "/init": 42.865044, "ready": 46.945119}


def test_of_several_stamps_the_first_counts() -> None:
    lines = text("trace.txt").splitlines()
    later = [line.replace("34.531919", "40.000000") for line in lines]
    assert watch.read_stamps([*lines, *later]) == watch.read_stamps(lines)


def test_the_phases_of_a_boot_are_all_of_it() -> None:
    phases = boot.phases({"started": 1.0, "first KVM_RUN": 3.0, "/init": 7.0, "ready": 9.0}, uptime=5.0)
    assert phases[boot.TO_INIT] == 4.0
    assert phases[boot.BOTH] == 6.0
    assert [phases[part] for part in boot.PARTS] == [2.0, 1.0, 3.0, 2.0]


def test_exits_are_those_of_the_vmm_s_threads() -> None:
    assert watch.sum_exits(text("hist.txt"), frozenset({146, 147})) == 6517
    assert watch.sum_exits(text("hist.txt"), frozenset({146})) == 0


def test_a_histogram_that_did_not_count_is_no_count() -> None:
    with pytest.raises(ValueError, match="not counted"):
        watch.sum_exits(text("hist.txt").replace("[active]", "[paused]"), frozenset({147}))
    with pytest.raises(ValueError, match="not counted"):
        watch.sum_exits("", frozenset({147}))


def test_the_vmm_s_processor_time_has_vhost_s_in_it_and_not_the_vcpu_s() -> None:
    process = text("stat.txt").splitlines()[1]
    vcpu = process.replace(" 2607 1179 ", " 900 100 ")
    control = process.replace(" 2607 1179 ", " 700 79 ").replace(" 749 0 ", " 0 0 ")
    whole = text("stat.txt").rstrip()
    found = watch.read_processor(f"{whole}\n\n{control}\n{vcpu}\n")
    assert found.at == 70.47
    assert found.own == pytest.approx((2607 + 1179 - 1000 + 179) / 100)
    with pytest.raises(ValueError, match="no thread"):
        watch.read_processor(f"{whole}\n\n{control}\n")


def test_the_guest_s_ram_is_no_memory_of_the_vmm() -> None:
    memory = watch.sum_memory(text("smaps.txt"), RAM_KIB)
    assert 0 < memory.pss <= memory.rss < 16
    assert watch.sum_memory(text("smaps.txt"), RAM_KIB // 2).pss > 64


def test_exits_through_vhost_have_a_limit_and_a_rate_at_least_that_of_the_peer() -> None:
    taken = {"rate": [90.0, 90.0], "exits": [3.0, 3.0], "share": [0.5, 0.5]}
    theirs = {"rate": [100.0, 100.0], "exits": [1.0, 1.0], "share": [0.5, 0.5]}
    rows = network.traffic_rows("vhost", network.TRAFFICS[0], {KVMPY: taken, QEMU: theirs})
    assert [row.verdict for row in rows] == ["missed", "-", "met", "-"]


def test_memory_beside_ram_is_held_to_the_peer_s_and_to_the_allowance() -> None:
    taken = {KVMPY: {"pss": [40.0, 40.0], "rss": [50.0, 50.0]}, QEMU: {"pss": [39.0, 39.0], "rss": [60.0, 60.0]}}
    rows = linux_memory.rows(taken)
    assert [row.verdict for row in rows] == ["missed", "met", "-"]


def test_a_failover_pair_is_held_to_the_peer_and_to_a_guest_without_one() -> None:
    def turn(blackout: float, enslaved: float, linked: float) -> dict[str, list[float]]:
        return {
            "blackout": [blackout],
            "enslaved": [enslaved],
            "in service": [linked],
            "back": [blackout + linked],
            "in all": [20.0],
        }

    nothing = float("nan")
    taken = {KVMPY: turn(0.5, 2.0, 4.0), QEMU: turn(4.0, 0.1, 1.0), failover.ALONE: turn(0.4, nothing, nothing)}
    rows = failover.rows("igb", taken)
    assert [(row.budget, row.verdict) for row in rows] == [(0.25, "met"), (1.1, "missed"), (1.0, "met"), (None, "-")]
    assert isinstance(rows[2].figure, Stack)
    assert rows[2].figure.bars["kvmpy"] == {"blackout": 0.5, "without the primary": 2.0, "until it has a link": 2.0}


class SaysSomething:
    """A host on which each command says the same."""

    def __init__(self, code: int) -> None:
        self._code = code

    def spawn(self, words: list[str], sink: Sink) -> SimpleNamespace:
        for stream, data in ((1, b'{"QEMU": '), (2, b"QEMU is up\n"), (1, b"[1.5]}\n")):
            sink(stream, data)
        return SimpleNamespace(wait=lambda seconds: self._code)

    def run(self, words: list[str]) -> SimpleNamespace:
        return SimpleNamespace(stdout="it fell over")

    def console_tail(self) -> str:
        return "panic"


def test_what_a_program_says_on_a_host_is_its_answer_and_the_rest_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert linux.answer(cast(EmulatedHost, SaysSomething(0)), ["-m", "bench.x"], 1.0) == {"QEMU": [1.5]}
    assert capsys.readouterr() == ("", "QEMU is up\n")


def test_a_program_that_fails_on_a_host_is_an_error_with_what_the_vmms_said() -> None:
    with pytest.raises(RuntimeError, match=r"bench\.x:\nit fell over\npanic"):
        linux.answer(cast(EmulatedHost, SaysSomething(1)), ["-m", "bench.x"], 1.0)
