"""The failover primaries of a migration, as its source sees them: the guest's leave, the destination's are to be ready.

No page is sent before the guest has let its own go, and it is not stopped before the destination has prepared its. If
the guest stays, it gets its own back. What a pair is, and how it is asked, is `kvmpy.machine.departure`'s.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from kvmpy.errors import CommandError, MigrationError
from kvmpy.log import Log
from kvmpy.machine.departure import Departure
from kvmpy.migration.keepalive import keepalive
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.messages import Keepalive, Message, Prepared, due
from kvmpy.migration.parameters import OnUnplugTimeout, Parameters
from kvmpy.migration.preparation import failures
from kvmpy.migration.progress import Progress
from kvmpy.migration.status import Status
from kvmpy.migration.stop import Deadline, Stop

log = Log(__name__)

TORN: Final = 5.0
"""Seconds that a primary which is torn out may take: that is kvmpy's own business."""


class Leaving:
    """For the migration's thread, but `release`. ``departure`` is None where the machine has no pair.

    ``parameters`` may change. ``required``: the guest needs a primary at the destination for each that it has, as that
    was told. ``is_told_of``: somebody tells the destination already that we are at work.
    """

    def __init__(self, departure: Departure | None, progress: Progress, stop: Stop, parameters: Parameters) -> None:
        self._departure, self._progress, self._stop, self.parameters = departure, progress, stop, parameters
        self.required, self.is_told_of = True, False

    @property
    def attached(self) -> tuple[str, ...]:
        """The ids of those that are to be plugged in where the guest goes."""
        return () if self._departure is None else self._departure.attached()

    def release(self) -> None:
        """The guest, which has gone, is not to come back: the host has them again."""
        if self._departure is not None:
            with suppress(CommandError):  # the machine has been closed meanwhile
                self._departure.release()

    @contextmanager
    def away(self, stays: Callable[[], bool]) -> Iterator[None]:
        """Within, they leave; if it fails and the guest ``stays`` they come back. It is said what became of each."""
        departure = self._departure
        if departure is None:
            yield
            return
        try:
            yield
        except BaseException:
            with suppress(CommandError):  # the machine has been closed meanwhile
                if not stays():
                    departure.gone()
                else:
                    with self._progress.phase("primaries back"):
                        self._progress.primaries = departure.come_back(self.parameters.x_unplug_timeout / 1000)
            raise
        with suppress(CommandError):
            departure.gone()

    def wait_unplug(self, main: MainChannel) -> None:
        """Wait until the guest has let its primaries go: no page is sent before. Raises MigrationError."""
        if self._departure is None or not self._departure.begin():
            return
        limit = self.parameters.x_unplug_timeout
        self._progress.become(Status.WAIT_UNPLUG)
        with self._progress.phase("wait-unplug"), self._awaited(main):
            if not (staying := self.staying(main, Deadline(limit / 1000))):
                return
            said = f"{' and '.join(staying)}: the guest has not let it go within {limit:g} ms"
            if self.parameters.x_on_unplug_timeout is OnUnplugTimeout.FAIL:
                raise MigrationError(
                    f"{said} (x-unplug-timeout); see what its kernel says, or have it torn out (x-on-unplug-timeout)"
                )
            log.warning("migration: %s: it is torn out", said)
            self._departure.tear_out()
            if staying := self.staying(main, Deadline(TORN)):
                raise MigrationError(f"{' and '.join(staying)}: cannot be torn out")

    def staying(self, main: MainChannel, deadline: Deadline) -> list[str]:
        """Those that the guest still has then; soon none. Raises MigrationError where the destination gives up."""
        assert self._departure is not None
        while (staying := self._departure.staying()) and deadline.left:  # whatever keeps us busy until then
            watched = {self._departure.fd: select.POLLIN}
            if main.can_answer:
                watched[main.channel.fd] = select.POLLIN
            if main.channel.fd in self._stop.wait_any(watched, deadline):
                self._listen(main)
        return staying

    def await_prepared(self, main: MainChannel) -> None:
        """R54: the guest is not stopped before the destination has its primaries prepared. Raises MigrationError."""
        deadline = Deadline(self.parameters.x_prepare_timeout / 1000)
        with ExitStack() as waiting:
            if self._progress.preparing:
                waiting.enter_context(self._progress.phase("await primaries"))
                waiting.enter_context(self._awaited(main))
            while self._progress.preparing and deadline.left:
                if self._stop.wait_any({main.channel.fd: select.POLLIN}, deadline):
                    self._listen(main)
        if not self._progress.preparing:
            return
        said = f"the destination has not prepared its primaries within {deadline.seconds * 1000:g} ms"
        if self.required:
            raise MigrationError(f"{said} (x-prepare-timeout); see its log, or go without (x-primaries best-effort)")
        self._warn(f"{said}: the guest goes on without until it has")

    def hear(self, main: MainChannel, *kinds: type[Message], limit: float | None = None) -> Message:
        """The next message that is one of ``kinds``; PREPARED may come before it. Raises MigrationError.

        ``limit`` is seconds, also for one that says all the time that it is at work.
        """
        whole = None if limit is None else Deadline(limit)
        expected = due(main.version, Prepared, *kinds)
        while True:
            message = main.receive_message(*expected, limit=None if whole is None else whole.left)
            if not isinstance(message, Prepared):
                return message
            self._note(message)

    @contextmanager
    def _awaited(self, main: MainChannel) -> Iterator[None]:
        """Within, nothing is sent; who waits for it is told that we are at work."""
        with ExitStack() as stack:
            if not self.is_told_of and not main.channel.is_kept:  # else nobody waits
                stack.enter_context(keepalive(main, self.parameters.x_timeout))
            yield

    def _listen(self, main: MainChannel) -> None:
        """Something has come: what the destination says when it likes."""
        message: Message = main.receive_message(*due(main.version, Keepalive, Prepared))
        if isinstance(message, Prepared):
            self._note(message)

    def _note(self, prepared: Prepared) -> None:
        """Raises MigrationError where a primary cannot be used there that must be."""
        self._progress.preparing, self._progress.prepared = False, list(prepared.primaries)
        if not (found := failures(prepared.primaries)):
            return
        if self.required:
            raise MigrationError("; ".join(found))
        for each in found:
            self._warn(f"{each}; the guest goes on without")

    def _warn(self, what: str) -> None:
        self._progress.warnings.append(what)
        log.warning("migration: %s", what)
