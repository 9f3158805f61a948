"""R49: the address of a pair is a virtual function's only while the guest drives that.

A switch in a NIC delivers frames to a virtual function from the moment its PF holds it to their address, whether or not
anybody looks at it: one that is prepared, hidden or released would swallow what the standby is there for. So the PF is
told when the guest turns on the function's bus mastering, and again when it is off. A driver does that before it asks
the PF for its address, which must be there by then. The PF is a network helper and a netlink request away, and a
device's access must not wait for those: the access ends, and its vCPU goes on with the next instruction when the
address is there, or after PATIENCE.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from kvmpy.errors import HostError
from kvmpy.host.pci_function import VirtualFunction
from kvmpy.log import Log
from kvmpy.machine.vcpu import hold_back

log = Log(__name__)

PATIENCE: Final = 5.0
"""Seconds for which a vCPU is held back at most."""
AGAIN: Final = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds after which an address is taken away again that could not be: until then the NIC keeps the pair's frames."""

Changed = Callable[[bool, HostError | None], object]


class Steering:
    """Has ``carry`` give the function ``name`` the address ``mac``, or None for none; ``carry`` may take a while.

    ``on_change(driven, problem)`` is told when that is done: by the thread that has done it, so it may only post.
    Without ``carry``, as for a NIC that is all the guest's, there is nothing to do but to tell: it has its own address,
    ``fixed``, if that is known. ``host`` and ``vf`` say which of the host's functions it is.

    ``since`` is when the guest began to drive it, or ceased to, and ``carried`` when that was done, by time.monotonic.
    ``on_receiving`` is told when a guest that drives it has an interrupt of it on: under locks, so it may only post.
    """

    def __init__(
        self,
        name: str,
        carry: Callable[[str | None], object] | None = None,
        *,
        fixed: str | None = None,
        host: str = "",
        vf: VirtualFunction | None = None,
    ) -> None:
        self._name, self._carry, self.fixed = name, carry, fixed
        self.host, self.vf = host, vf
        self.mac: str | None = None
        self.since = self.carried = 0.0
        self.on_change: Changed = lambda driven, problem: None
        self.on_receiving: Callable[[float], object] = lambda when: None
        self._receives = False
        self._lock = threading.Lock()
        self._driven = self._closed = self._failed = False
        self._working: threading.Thread | None = None
        self._woken = threading.Event()
        self._waiting: list[Callable[[], object]] = []

    def drive(self, driven: bool) -> None:
        """The guest drives it from now on, or no longer. Any thread, under any lock: it does not wait."""
        with self._lock:
            if self._closed or driven is self._driven:
                return
            self._driven, self._receives, self.since = driven, False, time.monotonic()
            self._woken.set()
            if self._carry is None:
                self._done(driven, None)
                return
            if driven:
                self._waiting.append(hold_back(PATIENCE))
            if self._working is None:
                self._working = threading.Thread(target=self._work, name=f"steer-{self._name}", daemon=True)
                try:
                    self._working.start()
                except RuntimeError as e:  # "can't start new thread"
                    self._working = None
                    self._done(driven, HostError(f"{self._name}: no thread to move its address: {e}"))

    def receives(self) -> None:
        """The guest has an interrupt of it on, as its driver does when it can take frames. Any thread, often."""
        if self._driven and not self._receives:
            with self._lock:
                first, self._receives = self._driven and not self._receives, self._driven
            if first:
                self.on_receiving(time.monotonic())

    def close(self) -> None:
        """Do no more, and wait for what is being done."""
        with self._lock:
            self._closed, working = True, self._working
            self._woken.set()
        if working is not None:
            working.join()

    def _work(self) -> None:
        done: bool | None = None
        waits = iter(AGAIN)
        tries = 0
        while True:
            with self._lock:
                if self._closed or done is self._driven:
                    self._working = None
                    self._let_go()
                    return
                done = self._driven
                self._woken.clear()
            problem = self._move(done)
            if problem is None or done:
                waits, tries = iter(AGAIN), 0
            with self._lock:
                if not tries:  # that it fails still is told once
                    self._done(done, problem)
            if problem is not None and not done and (wait := next(waits, None)) is not None:
                tries += 1
                self._woken.wait(wait)
                done = None

    def _move(self, driven: bool) -> HostError | None:
        assert self._carry is not None
        try:
            self._carry(self.mac if driven else None)
        except HostError as e:
            return e
        except Exception as e:
            if not self._failed:
                log.exception("%s: its address could not be moved", self._name)
            self._failed = True
            return HostError(f"{self._name}: {e!r}")
        return None

    def _done(self, driven: bool, problem: HostError | None) -> None:
        """With the lock."""
        if driven is self._driven:
            self.carried = time.monotonic()
            self._let_go()
        self.on_change(driven, problem)

    def _let_go(self) -> None:
        while self._waiting:
            self._waiting.pop()()
