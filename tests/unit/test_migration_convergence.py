"""When a guest is stopped for its switchover, and what is done about one that writes faster than it can be sent."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpy.errors import MigrationError
from kvmpy.machine.machine import Machine
from kvmpy.migration.convergence import ALLOWANCE, MIB, STARTING, TRIES, TRIPS, Convergence
from kvmpy.migration.parameters import OnNoConvergence, Parameters
from kvmpy.migration.progress import Progress, Round

FIXED = ALLOWANCE * 1000
"""Milliseconds of the switchover of a machine that has no devices."""
FAST = 10_000 * 1.0


FIRST = Round(1, 0, 25_600, 0, 100 * MIB, 1.0, 0.0)


class Rig:
    """A migration whose rounds sent 100 MiB a second; one has been made. To load a state takes ``loading`` seconds."""

    def __init__(self, loading: float = 0.0) -> None:
        machine = SimpleNamespace(
            board=SimpleNamespace(devices=(), moving=(), vcpus=(0,)),
            threads=(),
            handoff=SimpleNamespace(rehearse=lambda: None),
        )
        self.progress = Progress(1 << 30)
        self.said: list[str] = []
        self.convergence = Convergence(cast(Machine, machine), self.progress, self.said.append, loading)
        self.progress.add(FIRST)

    def fits(self, left: int, *, pages: int = 25_600, rate: float = FAST, **parameters: Any) -> bool:
        """After a round of so many pages, in which ``left`` bytes became dirty."""
        self.progress.add(Round(1, 0, pages, 0, pages * 4096, pages * 4096 / (100 * MIB), rate))
        return self.convergence.fits(left, rate, Parameters(**parameters))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    with rig.convergence:
        yield rig


def test_a_guest_is_stopped_when_pages_and_switchover_fit_together(rig: Rig) -> None:
    assert not rig.fits(30 * MIB, downtime_limit=300)  # 300 ms, and the switchover
    assert rig.fits(25 * MIB, downtime_limit=300)
    assert rig.progress.expected_downtime == pytest.approx(250 + FIXED, abs=5)


def test_a_limit_shorter_than_the_switchover_alone_does_not_keep_a_guest_for_ever(rig: Rig) -> None:
    assert not rig.fits(MIB, downtime_limit=10)
    tries = [rig.fits(200 << 10, downtime_limit=10) for _ in range(TRIES)]  # 2 ms
    assert tries == [False] * (TRIES - 1) + [True]


def test_no_guest_is_gone_in_no_time(rig: Rig) -> None:
    assert not rig.fits(4096, downtime_limit=0)


def test_a_small_round_says_what_it_takes_to_be_heard_and_nothing_of_the_bandwidth(rig: Rig) -> None:
    rig.progress.add(Round(2, 0, 1, 0, 4096, 0.05, 1.0))
    assert rig.convergence.fits(10 * MIB, 1.0, Parameters(downtime_limit=400))
    assert rig.progress.expected_downtime == pytest.approx(100 + TRIPS * 50 + FIXED, abs=5)


def test_what_the_destination_has_measured_is_counted() -> None:
    rig = Rig(loading=0.1)
    with rig.convergence:
        assert not rig.fits(10 * MIB, downtime_limit=300)
        assert rig.fits(7 * MIB, downtime_limit=300)
        assert rig.progress.expected_downtime == pytest.approx(70 + (1 + STARTING) * 100 + FIXED, abs=5)


def test_no_guest_is_stopped_after_the_round_of_all_its_memory(rig: Rig) -> None:
    rig.progress.rounds.clear()
    assert not rig.fits(4096)
    assert rig.fits(4096)


def test_a_limit_that_cannot_be_kept_is_said_and_the_guest_goes() -> None:
    rig = Rig(loading=0.4)
    with rig.convergence:
        assert [rig.fits(4096, pages=1) for _ in range(TRIES)] == [False] * (TRIES - 1) + [True]
        assert rig.said == [
            f"the switchover alone takes about {(1 + STARTING) * 400 + FIXED:.0f} ms, and the downtime limit is 300 ms"
        ]
        assert rig.progress.not_converging == rig.said[0]


def test_or_it_stays() -> None:
    rig = Rig(loading=0.4)
    with rig.convergence:
        for _ in range(TRIES - 1):
            rig.fits(4096, pages=1, x_on_no_convergence=OnNoConvergence.CANCEL)
        with pytest.raises(MigrationError, match="does not converge: the switchover alone takes about"):
            rig.fits(4096, pages=1, x_on_no_convergence=OnNoConvergence.CANCEL)


def test_a_round_that_took_long_once_is_not_what_a_round_takes() -> None:
    rig = Rig()
    with rig.convergence:
        for seconds, fits in ((0.9, False), (0.05, True), (0.9, True)):
            rig.progress.add(Round(2, 0, 1, 0, 4096, seconds, 1.0))
            assert rig.convergence.fits(4096, 1.0, Parameters(downtime_limit=300)) is fits
        assert rig.said == []


def test_two_rounds_of_which_half_is_written_again_are_too_many(rig: Rig) -> None:
    for _ in range(2):
        assert rig.said == []
        assert not rig.fits(60 * MIB)
    assert rig.said == [
        "the guest writes 39.1 MiB/s, and 100.0 MiB/s can be sent; its vCPUs sleep 20 % of the time",
    ]
    assert rig.progress.not_converging == rig.said[0]


def test_one_that_gets_smaller_is_let_be(rig: Rig) -> None:
    for _ in range(10):
        assert not rig.fits(45 * MIB)
    assert rig.said == []


def test_the_throttle_grows_to_its_limit(rig: Rig) -> None:
    seen = []
    for _ in range(12):
        rig.fits(60 * MIB, cpu_throttle_initial=30, cpu_throttle_increment=25, max_cpu_throttle=70)
        seen.append(rig.progress.throttle)
    assert seen == [0, 30, 30, 55, 55, 70, 70, 70, 70, 70, 70, 70]


def test_it_is_taken_off_when_all_is_over() -> None:
    rig = Rig()
    with rig.convergence:
        for _ in range(2):
            rig.fits(60 * MIB)
        assert rig.progress.throttle == 20
    assert rig.progress.throttle == 0


def test_or_the_migration_ends(rig: Rig) -> None:
    rig.fits(60 * MIB, x_on_no_convergence=OnNoConvergence.CANCEL)
    with pytest.raises(MigrationError, match=r"does not converge: the guest writes 39\.1 MiB/s"):
        rig.fits(60 * MIB, x_on_no_convergence=OnNoConvergence.CANCEL)


def test_or_it_goes_on_and_that_is_said_once(rig: Rig) -> None:
    for _ in range(10):
        rig.fits(60 * MIB, x_on_no_convergence=OnNoConvergence.CONTINUE)
    assert rig.said == ["the guest writes 39.1 MiB/s, and 100.0 MiB/s can be sent"]
    assert rig.progress.throttle == 0
