"""Slowing the vCPUs down, so that a migration can keep up with what they write.

As QEMU's cpu-throttle does it: at 20 %, each vCPU sleeps a fifth of the time. A thread of its own has every vCPU leave
the guest at a fixed pace and nap between two instructions, outside every lock; a stop or a request ends a nap at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from kvmpy.errors import HostError
from kvmpy.host.threads import begin
from kvmpy.machine.vcpu import VcpuThread

RUN: Final = 0.010
"""Seconds that a vCPU runs between two naps: QEMU's, and short beside what a person notices."""
MOST: Final = 99


class Throttle:
    """Makes ``threads`` sleep ``percentage`` of the time; 0 is full speed."""

    def __init__(self, threads: Sequence[VcpuThread]) -> None:
        self._threads = threads
        self._changed = threading.Condition()
        self._percentage = 0
        self._thread: threading.Thread | None = None

    @property
    def percentage(self) -> int:
        """What part of the time they sleep now."""
        return self._percentage

    def set(self, percentage: int) -> None:
        """Change it. Any thread. Raises HostError, and then it is full speed."""
        with self._changed:
            self._percentage = max(0, min(percentage, MOST))
            if self._percentage and self._thread is None:
                try:
                    self._thread = begin("throttle", self._work)
                except HostError:
                    self._percentage = 0
                    raise
            self._changed.notify_all()

    def stop(self) -> None:
        """Full speed, at once; when this returns the thread has gone."""
        self.set(0)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for thread in self._threads:
            thread.nap(0)

    def _work(self) -> None:
        while percentage := self._percentage:
            nap = RUN * percentage / (100 - percentage)
            for thread in self._threads:
                thread.nap(nap)
            with self._changed:
                self._changed.wait_for(lambda: not self._percentage, RUN + nap)
