"""An event loop for one thread: descriptors, timers, and calls posted by other threads.

The `control` and the `io` thread are one each (docs/adr/0002). epoll and a handful of timers are all it takes, and
importing asyncio would cost a third of the time to the first KVM_RUN. A callback must not block. One that raises is
logged with its traceback and the loop goes on: no guest or client input may end it.
"""

from __future__ import annotations

import itertools
import select
import threading
import time
from collections.abc import Callable
from typing import Final

from kvmpy.host.eventfd import EventFd
from kvmpy.log import Log

log = Log(__name__)

READABLE: Final = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
# An error counts as writable too: the write that follows says what it is.
WRITABLE: Final = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
# Late by one tick is early enough for any timer here, and epoll counts in milliseconds.
LONGEST_WAIT: Final = 3600.0

Callback = Callable[[], object]


class Reactor:
    """The loop of the thread that calls `run`. Everything but `run` may be called by any thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread: threading.Thread | None = None
        self._epoll = select.epoll()
        self._wake = EventFd()
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[Callback | None, Callback | None]] = {}
        self._posted: list[Callback] = []
        # One entry a timer, however often the guest has it re-armed: when it is due, and its turn among equals.
        self._armed: dict[ReactorTimer, tuple[float, int]] = {}
        self._order = itertools.count()
        self._ending = False
        self._epoll.register(self._wake.fd, select.EPOLLIN)

    def watch(self, fd: int, *, readable: Callback | None = None, writable: Callback | None = None) -> None:
        """Call back while ``fd`` is readable (or hung up), writable; replaces what was watched for ``fd``.

        Raises PermissionError for a regular file, which is always both.
        """
        events = (READABLE if readable else 0) | (WRITABLE if writable else 0)
        with self._lock:
            if fd in self._watched:
                self._epoll.modify(fd, events)
            else:
                self._epoll.register(fd, events)
            self._watched[fd] = (readable, writable)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``, before it is closed. A callback under way in another thread may still be finishing."""
        with self._lock:
            if self._watched.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def post(self, call: Callback) -> None:
        """Run ``call`` in the loop's thread, soon, after those posted before it. What is taken is run.

        Raises RuntimeError once the loop is ending: somebody may be about to wait for what ``call`` does.
        """
        with self._lock:
            if self._ending:
                raise RuntimeError(f"the {self.name} thread has ended")
            self._posted.append(call)
            self._wake.signal()

    def timer(self, callback: Callback) -> ReactorTimer:
        """A one-shot timer that calls ``callback`` in the loop's thread."""
        return ReactorTimer(self, callback)

    def start(self) -> None:
        """Run the loop in a thread of its own, named after the reactor. Raises RuntimeError where there is none."""
        thread = threading.Thread(target=self.run, name=self.name, daemon=True)
        thread.start()
        self.thread = thread  # not before, or who is refused one would be waited for

    def run(self) -> None:
        """Serve until `stop`."""
        self.thread = threading.current_thread()
        while not self._ending:
            for fd, events in self._epoll.poll(self._until_next_timer()):
                if fd == self._wake.fd:
                    self._wake.take()
                else:
                    self._dispatch(fd, events)
            self._run_posted()
            self._run_timers()
        self._run_posted()

    def stop(self) -> None:
        """End the loop after what has been posted, and wait for its thread; stopping twice is allowed."""
        with self._lock:
            if not self._ending:
                self._ending = True
                self._wake.signal()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def close(self) -> None:
        """Stop, then give the descriptors back; closing twice is allowed."""
        self.stop()
        self._watched.clear()
        self._epoll.close()
        self._wake.close()

    def _dispatch(self, fd: int, events: int) -> None:
        # Looked up afresh for each direction: the first callback may unwatch the descriptor.
        for index, mask in enumerate((READABLE, WRITABLE)):
            callback = self._watched.get(fd, (None, None))[index]
            if callback is not None and events & mask:
                self._call(callback)

    def _run_posted(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for call in posted:
            self._call(call)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while (timer := self._take_due(now)) is not None:
            self._call(timer.callback)

    def _take_due(self, now: float) -> ReactorTimer | None:
        """The timer that is due first, disarmed; None where none is due yet."""
        with self._lock:
            first = min(self._armed, key=self._armed.__getitem__, default=None)
            if first is None or self._armed[first][0] > now:
                return None
            del self._armed[first]
            return first

    def _until_next_timer(self) -> float:
        with self._lock:
            if self._posted:
                return 0
            if not self._armed:
                return LONGEST_WAIT
            due, _ = min(self._armed.values())
            return min(max(due - time.monotonic(), 0) + 0.001, LONGEST_WAIT)

    def arm(self, timer: ReactorTimer, due: float) -> None:
        """Used by ReactorTimer: call it back at ``due`` on the monotonic clock."""
        with self._lock:
            self._armed[timer] = (due, next(self._order))
            if not self._ending:
                self._wake.signal()

    def disarm(self, timer: ReactorTimer) -> None:
        """Used by ReactorTimer: do not call it back."""
        with self._lock:
            self._armed.pop(timer, None)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception:
            log.exception("%s thread: a callback failed", self.name)


class ReactorTimer:
    """A one-shot timer of a Reactor (a `kvmpy.devices.base.Timer`). Any thread."""

    def __init__(self, reactor: Reactor, callback: Callback) -> None:
        self._reactor = reactor
        self.callback = callback

    def arm(self, seconds: float) -> None:
        """Call back in ``seconds``; replaces an earlier arming."""
        self._reactor.arm(self, time.monotonic() + seconds)

    def cancel(self) -> None:
        """Do not call back; a callback already under way may still come."""
        self._reactor.disarm(self)
