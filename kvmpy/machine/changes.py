"""Changes of a machine's run state: made by the control thread, one after another, and waiting for nobody there.

A change is written top to bottom, as a generator. Where it has to wait for the host it yields what for (`Waiting`): a
thread made for that waits, the control thread serves everybody else meanwhile, and the change goes on when that is over
or its time is up. One that waits holds up those that come after it; `cut_in` is for the end of the machine, which does
not queue behind a disk that hangs (docs/adr/0013).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from kvmpy.errors import CommandError
from kvmpy.host.reactor import Reactor
from kvmpy.log import Log

log = Log(__name__)

T = TypeVar("T")


class Waiting(msgspec.Struct, frozen=True):
    """Calls to be made by a thread that may wait; with ``seconds``, the change goes on without them after so many."""

    calls: Sequence[Callable[[], object]]
    seconds: float | None = None


Steps = Generator[Waiting, None, T]


def at_once(call: Callable[[], T]) -> Steps[T]:
    """A change that has nothing to wait for."""
    yield from ()
    return call()


class Change(Generic[T]):
    """``steps`` and what came of them. ``last``: nothing may cut in on it."""

    def __init__(self, steps: Steps[T], *, last: bool = False) -> None:
        self.steps, self.last = steps, last
        self._over = threading.Event()
        self._result: list[T] = []
        self._failure: BaseException | None = None
        self._unheard = False

    @property
    def is_over(self) -> bool:
        """Whether it has been made, or has failed."""
        return self._over.is_set()

    def result(self) -> T:
        """Wait for it, by another thread than control's; returns what it returned, or raises what it raised. Once."""
        self._over.wait()
        if self._failure is None:
            return self._result[0]
        try:
            raise self._failure
        finally:
            self._failure = None  # its traceback holds us, and nobody collects circles while vCPUs run

    def forget(self) -> None:
        """Nobody waits for it, so a failure is logged. In the control thread."""
        self._unheard = True
        if self._failure is not None:
            self._log()

    def succeed(self, result: T) -> None:
        """Used by Changes."""
        self._result.append(result)
        self._over.set()

    def fail(self, failure: BaseException) -> None:
        """Used by Changes."""
        self._failure = failure
        if self._unheard:
            self._log()
        self._over.set()

    def _log(self) -> None:
        log.error("control thread: a change of the machine failed", exc_info=self._failure)


class Changes:
    """Those of one machine. Everything but `Change.result` is for the control thread.

    Whoever a change calls, such as a listener, may begin another: unless one waits, it is made there and then.
    """

    def __init__(self, control: Reactor) -> None:
        self._control = control
        self._queue: deque[Change[Any]] = deque()
        self._waiting: dict[Change[Any], object] = {}

    def begin(self, change: Change[Any]) -> None:
        """Make it, now or when those before it are over."""
        if self._waiting:
            self._queue.append(change)
        else:
            self.make(change)

    def cut_in(self, change: Change[Any]) -> None:
        """Make it now, and have the one that waits fail; unless that is a last one, which this then comes after."""
        for other in [waiting for waiting in self._waiting if not waiting.last]:
            del self._waiting[other]
            other.steps.close()
            other.fail(CommandError("the machine has been stopped meanwhile"))
        self.begin(change)
        self._make_queued()

    def make(self, change: Change[Any]) -> None:
        """Make it now, whatever waits."""
        try:
            waiting = next(change.steps)
        except StopIteration as e:
            change.succeed(e.value)
        except BaseException as e:  # noqa: BLE001  it is raised again, in the thread that waits, or logged
            change.fail(e)
        else:
            self._wait(change, waiting)

    def _wait(self, change: Change[Any], waiting: Waiting) -> None:
        token = self._waiting[change] = object()
        go_on = lambda: self._waited(change, token)  # noqa: E731
        if waiting.seconds is not None:
            self._control.timer(go_on).arm(waiting.seconds)
        thread = threading.Thread(target=_make, args=(waiting.calls, self._control, go_on), name="wait", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:  # "can't start new thread"
            log.warning("no thread to wait in (%s): nobody is served until what the machine waits for has come", e)
            _make(waiting.calls, self._control, go_on)

    def _waited(self, change: Change[Any], token: object) -> None:
        """It goes on, unless it has already, or was cut in on; then those that waited for it."""
        if self._waiting.get(change) is not token:
            return
        del self._waiting[change]
        self.make(change)
        self._make_queued()

    def _make_queued(self) -> None:
        while self._queue and not self._waiting:
            self.make(self._queue.popleft())


def _make(calls: Sequence[Callable[[], object]], control: Reactor, then: Callable[[], object]) -> None:
    for call in calls:
        try:
            call()
        except Exception:  # the change finds out by itself how things are
            log.exception("what a change of the machine waited for failed")
    with contextlib.suppress(RuntimeError):  # the machine is being closed
        control.post(then)
