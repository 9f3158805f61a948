"""What the programs of bench/ read of what others say: guests, perf, the interpreter, the kernel, a monitor."""

from __future__ import annotations

from array import array

import pytest

from bench.exits import counted, ranks, split
from bench.guests import ACCESSES, POWER_OFF, TELL, loop_of, toucher
from bench.memory import beside
from bench.migration import blackout, growth, throughput
from bench.moves import Moved, Sample, parts
from bench.start import PHASES, between, read, slowest
from tests.fakes.pvh_kernel import LOAD_AT

SMAPS = """\
55d000000000-55d000400000 r-xp 00000000 fd:00 1 /usr/bin/qemu
Size:               4096 kB
Pss:                 300 kB
Pss_Dirty:             0 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Pss:              131000 kB
7f1000000000-7f1009000000 rw-p 00000000 00:00 0
Size:             147456 kB
Pss:                 724 kB
"""


def test_round_trips_are_told_apart_by_access_and_those_of_both_vcpus_put_together() -> None:
    trips = array("I", range(4 * len(ACCESSES)))
    found = split(trips.tobytes(), cpus=2)
    assert found["PIO write"] == [0, 1, 16, 17]
    assert found["in the kernel"] == [14, 15, 30, 31]


@pytest.mark.parametrize("said", [b"", bytes(4), bytes(4 * len(ACCESSES) + 4), bytes(4 * 3 * len(ACCESSES))])
def test_a_guest_that_has_not_said_all_is_an_error(said: bytes) -> None:
    with pytest.raises(ValueError, match="round trips"):
        split(said, cpus=2)


def test_quantiles_are_of_what_was_measured() -> None:
    assert dict(ranks(list(range(1000, 0, -1)))) == {"median": 501, "p99": 991, "p99.9": 1000}


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("1234567,,instructions:u,1001,100.00,,\n", 1234567),
        ("<not supported>,,instructions:u,0,100.00,,\n", None),
        ("kvmpy: warning: something\n99,,instructions:u,1,100.00,,\n", 99),
        ("", None),
    ],
)
def test_perf_says_a_count_or_that_it_cannot(said: str, count: int | None) -> None:
    assert counted(said) == count


def test_a_start_is_cut_into_phases_by_whole_lines_and_the_last_program() -> None:
    stamps = read("loaded 5\nloaded 1000000\nkvm 2000000\nvm 3000000\nvcpu 5000000\nrun 9000000\nru")
    assert list(between(0, stamps).items()) == list(
        zip(PHASES.values(), (0.001, 0.001, 0.001, 0.002, 0.004), strict=True)
    )


def test_a_start_that_was_not_seen_to_its_end_is_no_start() -> None:
    with pytest.raises(KeyError):
        between(0, read("loaded 5\n"))


def test_the_slowest_imports_come_first() -> None:
    said = "import time: self [us] | cumulative | imported package\nimport time:       200 |        200 |   b\n"
    said += "import time:      5000 |       5200 | a\nkvmpy: warning: no vmx\n"
    assert slowest(said) == "imports: 2 modules in 5 ms, most in a 5.0, b 0.2"


def test_guest_ram_is_what_has_most_of_the_mappings_that_are_as_large() -> None:
    assert beside(SMAPS, 128) == 1.0


def test_a_process_without_a_guest_has_none() -> None:
    with pytest.raises(ValueError, match="no mapping has 256 MiB"):
        beside(SMAPS, 256)


def test_the_parts_of_a_blackout_begin_when_the_guest_stands_still() -> None:
    phases = [
        {"name": "precopy", "start-ms": 10.0, "ms": 90.0},
        {"name": "stop", "start-ms": 100.0, "ms": 1.0},
        {"name": "save state", "start-ms": 101.0, "ms": 2.0},
    ]
    assert parts({"stopped-ms": 100.5, "phases": phases}) == {"stop": 0.5, "save state": 2.0}
    assert parts({"downtime": 5}) == {}


def moved(total: float, blackout: float, **told: float) -> Moved:
    return Moved(total, blackout, 1 << 20, [Sample(0.0, 0), Sample(0.5, 1 << 20), Sample(1.0, 3 << 20)], told)


def test_throughput_is_between_two_samples() -> None:
    assert throughput("a", {"kvmpy": [moved(1.0, 0.1)]}).lines == {"kvmpy": [(0.5, 2.0), (1.0, 4.0)]}


def test_what_no_phase_accounts_for_is_in_the_picture_too() -> None:
    bars = blackout("a", {"kvmpy": [moved(1.0, 0.01, stop=4.0)], "QEMU": [moved(1.0, 0.2)]}).bars
    assert bars == {"kvmpy": {"stop": 4.0, "the rest": 6.0}, "QEMU": {"STOP to RESUME": 200.0}}


def test_growth_is_beside_the_smallest_guest_that_stands_still() -> None:
    kept = {
        "256 MiB idle": {"kvmpy": [moved(1.0, 0.1)], "QEMU": [moved(2.0, 0.1)]},
        "8 GiB idle": {"kvmpy": [moved(8.0, 0.1)], "QEMU": [moved(32.0, 0.4)]},
    }
    rows = {row.name: (row.kvmpy, row.peer) for row in growth(kept)}
    assert rows["migration: growth of total from 256 MiB to 8 GiB"] == (8.0, 16.0)
    assert rows["migration: growth of blackout from 256 MiB to 8 GiB"] == (1.0, 4.0)


def test_a_loop_jumps_back_to_its_access() -> None:
    assert loop_of(b"\xee") == b"\xee\xeb\xfd"
    assert loop_of(b"\xee", 7) == b"\xb9\x07\x00\x00\x00\xee\xe2\xfd" + POWER_OFF


def test_a_guest_that_dirties_nothing_has_written_to_all_and_halts() -> None:
    code = toucher(17, 0, 10**9)
    assert code.startswith(b"\xbf" + (16 << 20).to_bytes(4, "little") + b"\xb9" + (256).to_bytes(4, "little"))
    assert code.endswith(b"\xfa\xf4\xeb\xfc")
    assert LOAD_AT + len(code) < 16 << 20


@pytest.mark.parametrize("memory", [17, 4096])
def test_a_guest_that_dirties_goes_on_after_it_has_said_so_and_jumps_back_to_where_it_began(memory: int) -> None:
    _, told, after = toucher(memory, 1000, 10**9).partition(TELL)
    assert told
    clock, again, jump = after[:4], after[4:-2], after[-2:]
    assert clock == b"\x0f\x31\x89\xc5"
    assert again.startswith(b"\xbf" + (16 << 20).to_bytes(4, "little"))
    assert (10**6).to_bytes(4, "little") in again
    assert jump == bytes((0xEB, 256 - len(again) - 2))
