"""Whether the guest can be stopped now and be gone within the downtime limit, and what to do if that never comes.

The guest stands still while the last pages are sent and while its state is saved, sent, loaded and answered. The first
is what is left over the bandwidth; the second is measured while the guest runs, by doing it. Here all devices and a
vCPU are saved, which stops it for a moment. There a state was decoded and loaded, and ACCEPT says how long that took.
A round of few pages, from its beginning until they have arrived, is what it takes to say anything and to hear the
answer; so the first round, which is of all memory, is never the last before the guest stops. The rest is an allowance.
Where nobody answers (a file), or an older kvmpy does, loading is reckoned by saving.

A limit that this alone exceeds cannot be kept. That is said as soon as it is known, and the guest goes nevertheless,
once its pages need next to nothing beside it; with `cancel` it stays.

A guest that writes more than half of what is sent, twice in a row, does not converge (QEMU's throttle-trigger).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Self

from kvmpy.errors import MigrationError
from kvmpy.machine.machine import Machine
from kvmpy.machine.throttle import Throttle
from kvmpy.migration.parameters import OnNoConvergence, Parameters
from kvmpy.migration.progress import Progress
from kvmpy.migration.sections import frames, save_devices
from kvmpy.trace import Tracepoint

trace_forecast = Tracepoint("migration.forecast", "pages_ms saving_ms trip_ms loading_ms")

MIB: Final = 1 << 20
ALLOWANCE: Final = 0.020
"""Seconds for what cannot be measured beforehand."""
LOADING: Final = 3
"""To load a state takes so many times as long as to save it, where nobody has measured it."""
SENDING: Final = 1
"""To stop devices, and to send what was saved, takes so many times as long as to save it."""
TRIPS: Final = 3
"""Times that a small round takes: for the last pages, for the state behind them, for READY and GO."""
STARTING: Final = 1
"""To take over what a machine has of the host, and to let it run, takes so much of what its loading takes."""
LEAST_ROUNDS: Final = 2
TRIES: Final = 3
"""Rounds of few pages before it is believed that the limit cannot be kept: a host may have been busy otherwise."""
REHEARSALS: Final = 2
"""What is done for the first time takes longer; the shortest counts, for a host may be busy otherwise."""
BANDWIDTH: Final = 100 * MIB
"""Bytes a second, where no round has been large enough to tell."""
ENOUGH: Final = MIB
STRIKES: Final = 2
LEAST_SHARE: Final = 4
"""A limit that is shorter than the switchover alone is not kept, but all else is: pages have this part of it."""


class Convergence:
    """Decides after each round. ``on_stall`` is told, in words, of a guest that writes too fast, or of a limit that
    cannot be kept. ``loading`` is the seconds that the destination takes for a state, if it has measured that;
    ``on_the_way`` those after which it can have begun with it.
    """

    def __init__(
        self, machine: Machine, progress: Progress, on_stall: Callable[[str], object], loading: float | None = None
    ) -> None:
        self._machine, self._progress, self._on_stall, self._loading = machine, progress, on_stall, loading
        self._throttle = Throttle(machine.threads)
        self._bandwidth = float(BANDWIDTH)
        self._saving: float | None = None
        self._trips: deque[float] = deque(maxlen=TRIES)
        self.on_the_way = 0.0
        self._strikes = self._doubts = 0

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
        else:
            self._trips.append(max(0.0, last.seconds - last.size / self._bandwidth))
        limit, pages, fixed = parameters.downtime_limit / 1000, left / self._bandwidth, self._fixed()
        self.on_the_way = pages + TRIPS * self._trip
        if trace_forecast:
            trace_forecast(*(int(each * 1000) for each in (pages, self._saving or 0, self._trip, self._loading or 0)))
        self._progress.remaining, self._progress.expected_downtime = left, (pages + fixed) * 1000
        if pages <= max(limit - fixed, limit / LEAST_SHARE):
            self._doubts += fixed > limit
            if (fixed > limit and self._doubts < TRIES) or len(self._progress.rounds) < LEAST_ROUNDS:
                return False
            self._judge(limit, fixed, parameters)
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
        self._say(said)

    def _judge(self, limit: float, fixed: float, parameters: Parameters) -> None:
        """Say so where the limit cannot be kept, however few pages are left."""
        if fixed <= limit:
            return
        said = (
            f"the switchover alone takes about {fixed * 1000:.0f} ms, and the downtime limit is {limit * 1000:.0f} ms"
        )
        if parameters.x_on_no_convergence is OnNoConvergence.CANCEL:
            raise MigrationError(f"does not converge: {said}; allow a longer downtime")
        self._say(said)

    def _say(self, said: str) -> None:
        if self._progress.not_converging != said:
            self._progress.not_converging = said
            self._on_stall(said)

    def _fixed(self) -> float:
        """Seconds of the switchover that do not depend on how many pages are left."""
        if self._saving is None:
            self._saving = min(self._rehearse() for _ in range(REHEARSALS))
        loading = LOADING * self._saving if self._loading is None else self._loading
        return (1 + SENDING) * self._saving + TRIPS * self._trip + (1 + STARTING) * loading + ALLOWANCE

    @property
    def _trip(self) -> float:
        """What a round of next to no pages takes: of the last ones the shortest."""
        return min(self._trips, default=0.0)

    def _rehearse(self) -> float:
        """Seconds to stop the machine and to save it, with one vCPU for all."""
        start = time.monotonic()
        frames(save_devices(self._machine))
        devices = time.monotonic()
        self._machine.handoff.rehearse()
        return devices - start + (time.monotonic() - devices) * len(self._machine.board.vcpus)
