"""Whether the guest can be stopped now and be gone within the downtime limit, and what to do if that never comes.

The guest stands still while the last pages are sent and while its state is saved, sent, loaded and answered. The first
is what is left over the bandwidth; the second is measured as far as it can be while the guest runs (saving all devices
and a vCPU, which stops it for a moment), taken as many times as both sides need, and the rest of it is an allowance.

A guest that writes more than half of what is sent, twice in a row, does not converge (QEMU's throttle-trigger).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Self

import msgspec

from kvmpy.errors import MigrationError
from kvmpy.machine.machine import Machine
from kvmpy.machine.throttle import Throttle
from kvmpy.migration.parameters import OnNoConvergence, Parameters
from kvmpy.migration.progress import Progress
from kvmpy.migration.sections import save_devices

MIB: Final = 1 << 20
ALLOWANCE: Final = 0.020
"""Seconds for what cannot be measured beforehand, such as two answers."""
TIMES: Final = 4
"""To load a state takes three times as long as to save it, and it is saved as well."""
BANDWIDTH: Final = 100 * MIB
"""Bytes a second, where no round has been large enough to tell."""
ENOUGH: Final = MIB
STRIKES: Final = 2
LEAST_SHARE: Final = 4
"""A limit that is shorter than the switchover alone is not kept, but all else is: pages have this part of it."""


class Convergence:
    """Decides after each round. ``on_stall`` is told, in words, of a guest that writes too fast."""

    def __init__(self, machine: Machine, progress: Progress, on_stall: Callable[[str], object]) -> None:
        self._machine, self._progress, self._on_stall = machine, progress, on_stall
        self._throttle = Throttle(machine.threads)
        self._bandwidth = float(BANDWIDTH)
        self._fixed: float | None = None
        self._strikes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._throttle.stop()
        self._progress.throttle = 0

    def fits(self, left: int, rate: float, parameters: Parameters) -> bool:
        """Whether ``left`` bytes and the state can be sent in time; if not, and it seems they never can, act on it.

        ``rate`` is how many pages become dirty a second. Raises MigrationError where that is what is to be done.
        """
        last = self._progress.rounds[-1]
        if last.size >= ENOUGH and last.seconds:
            self._bandwidth = last.size / last.seconds
        if self._fixed is None:
            self._fixed = self._rehearse()
        limit, pages = parameters.downtime_limit / 1000, left / self._bandwidth
        self._progress.remaining, self._progress.expected_downtime = left, (pages + self._fixed) * 1000
        if pages <= max(limit - self._fixed, limit / LEAST_SHARE):
            return True
        self._strikes = self._strikes + 1 if left * 2 > last.pages * 4096 else 0
        if self._strikes >= STRIKES:
            self._strikes = 0
            self._act(rate, parameters)
        return False

    def _act(self, rate: float, parameters: Parameters) -> None:
        said = f"the guest writes {rate * 4096 / MIB:.1f} MiB/s, and {self._bandwidth / MIB:.1f} MiB/s can be sent"
        match parameters.x_on_no_convergence:
            case OnNoConvergence.CANCEL:
                raise MigrationError(f"does not converge: {said}; throttle its vCPUs, or allow a longer downtime")
            case OnNoConvergence.THROTTLE:
                now = self._throttle.percentage
                step = parameters.cpu_throttle_increment if now else parameters.cpu_throttle_initial
                self._throttle.set(min(now + step, parameters.max_cpu_throttle))
                self._progress.throttle = self._throttle.percentage
                said += f"; its vCPUs sleep {self._throttle.percentage} % of the time"
        if self._progress.not_converging != said:
            self._progress.not_converging = said
            self._on_stall(said)

    def _rehearse(self) -> float:
        """Seconds of the switchover that do not depend on how many pages are left."""
        start = time.monotonic()
        for section in save_devices(self._machine).values():
            msgspec.json.encode(section)
        devices = time.monotonic()
        self._machine.handoff.rehearse()
        vcpus = (time.monotonic() - devices) * len(self._machine.board.vcpus)
        return TIMES * (devices - start + vcpus) + ALLOWANCE
