"""The source's side of a migration, from the first connection to the last answer. One thread, which may wait.

Read `migrate` top to bottom: each step is a `with` that undoes itself, so whatever fails before GO leaves the guest
running here as it did, with its disks locked, nothing logged and nothing throttled. From GO on the guest is the
destination's, until that says that it could not run it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from kvmpy import __version__
from kvmpy.errors import HostError, IncompatibleError, MigrationCancelled, MigrationError, StreamError
from kvmpy.log import Log
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.migration import checksum, handover
from kvmpy.migration.aside import aside
from kvmpy.migration.channel import Channel
from kvmpy.migration.convergence import Convergence
from kvmpy.migration.description import Findings, describe, to_json
from kvmpy.migration.dirty import DirtyLog, DirtyPages
from kvmpy.migration.handover import Event, Handover, Source
from kvmpy.migration.keepalive import keepalive, silence
from kvmpy.migration.leaving import Leaving
from kvmpy.migration.main_channel import MainChannel, printable
from kvmpy.migration.messages import (
    TO_SOURCE,
    Accept,
    Arrived,
    BlockChecksums,
    Cancel,
    Checksums,
    Compression,
    EndOfState,
    Failed,
    Frame,
    Go,
    Header,
    Message,
    Origin,
    Phase,
    Prepared,
    Ready,
    Refuse,
    Refused,
    Round,
    RoundEnd,
    Started,
    prepare,
)
from kvmpy.migration.pages import PageSender
from kvmpy.migration.parameters import Parameters, Primaries
from kvmpy.migration.progress import Progress, Said
from kvmpy.migration.progress import Round as RoundMade
from kvmpy.migration.sections import MachineState, States, frames, save_machine
from kvmpy.migration.status import Status
from kvmpy.migration.stop import Deadline, Stop
from kvmpy.migration.transport import Connector

log = Log(__name__)

PAGE: Final = 4096
ELSEWHERE: Final = "the guest runs at the destination"
SHORTEST_ROUND: Final = 0.1
"""Seconds from one look at what is dirty to the next: each has a few of the guest's exits wait some 0.2 ms."""
UNKNOWN: Final = "outcome unknown: destination may be running"
# Phases of the switchover that the destination is told of
SWITCHOVER: Final = frozenset({"stop", "save state", "last pages", "send state", "disks"})

OnPass = Callable[[int], object]


class Outgoing:
    """One migration of ``machine``, by what ``open_connector`` opens. Its thread calls `migrate`; any other `cancel`.

    ``on_pass`` is told the number of each round, ``on_stall`` in words of a guest that writes too fast.
    """

    def __init__(
        self,
        machine: Machine,
        open_connector: Callable[[Stop], Connector],
        parameters: Parameters,
        progress: Progress,
        *,
        on_pass: OnPass = lambda number: None,
        on_stall: Callable[[str], object] = lambda what: None,
    ) -> None:
        self._machine, self._open, self.progress = machine, open_connector, progress
        self.parameters = parameters
        self._compression = parameters.multifd_compression.value  # as the destination is told
        self._on_pass, self._on_stall = on_pass, on_stall
        self._stop = Stop()
        self._lock = threading.Lock()
        self._handover: Handover[Source] = handover.source()
        self._pages: PageSender | None = None
        self._stands_still = False
        self._page_channels: list[Channel] = []
        self._primaries = Leaving(machine.departure, progress, self._stop, parameters)
        self._loading: float | None = None
        self._kept: list[Message] = []  # what goes with the next message, for each wakes the other side

    @property
    def phase(self) -> Source:
        """Who has the guest."""
        return self._handover.phase

    def cancel(self, reason: str) -> bool:
        """Take everything back, soon; False where it is too late. Any thread; does not wait."""
        with self._lock:
            if not self.phase.may_cancel:
                return False
            self._stop.set(reason)
        if (pages := self._pages) is not None:
            pages.cancel()
        return True

    def discard(self) -> None:
        """It does not even begin."""
        self._stop.close()

    @property
    def cancelled_for(self) -> str | None:
        """Why everything was to be taken back, if `cancel` was in time."""
        return None if self.phase is Source.UNKNOWN else self._stop.reason

    def abandon(self, reason: str) -> None:
        """Wait for nothing any more, not even for the answer to GO: the machine is going. Any thread."""
        if not self.cancel(reason):
            self._stop.set(reason)

    def limit(self, parameters: Parameters) -> None:
        """Go on with other parameters, as far as that can be: nothing slows down a guest that stands still."""
        with self._lock:
            self.parameters = self._primaries.parameters = parameters
            if self._pages is not None and not self._stands_still:
                self._pages.max_bandwidth = parameters.max_bandwidth

    def forced(self) -> None:
        """Somebody who can know says that the destination does not run the guest."""
        with self._lock:
            self._handover.on(Event.FORCED)

    def release_primaries(self) -> None:
        """It is completed: free them, if that is wanted."""
        if self.parameters.x_release_primaries:
            self._primaries.release()

    # The migration

    def migrate(self) -> None:
        """Move the machine. Raises KvmpyError: then the guest is here, unless `phase` says otherwise."""
        with ExitStack() as undo:
            undo.callback(self._stop.close)
            main, self._page_channels = self._set_up(undo)
            if self._page_channels:  # else page records are between the messages
                undo.enter_context(keepalive(main, self.parameters.x_timeout))
                self._primaries.is_told_of = True
            with self._primaries.away(lambda: self.phase.may_run), self._kept_unless_gone(main):
                self._primaries.wait_unplug(main)
                self._start(main, undo)
                self._precopy(main)
                self._switch_over(main, undo)

    def check(self) -> Findings:
        """Why the machine cannot be moved there now, as the destination sees it too. Raises MigrationError."""
        with ExitStack() as undo:
            undo.callback(self._stop.close)
            problems = self._machine.handoff.blockers()
            connector = undo.enter_context(self._open(self._stop))
            if connector.main.can_answer:
                try:
                    self._introduce(connector, check_only=True)
                except IncompatibleError as e:
                    problems += e.problems
            return Findings(problems, self.progress.warnings)

    def _set_up(self, undo: ExitStack) -> tuple[MainChannel, list[Channel]]:
        progress = self.progress
        if problems := self._machine.handoff.blockers():
            raise IncompatibleError(*problems)
        with progress.phase("connect"):
            connector = undo.enter_context(self._open(self._stop))
        try:
            with progress.phase("compare"):
                token = self._introduce(connector, check_only=False)
            with progress.phase("page channels"):
                return connector.main, self._open_page_channels(connector, token)
        except MigrationCancelled as e:
            connector.main.fail(Cancel(reason=str(e)))
            raise

    def _open_page_channels(self, connector: Connector, token: bytes | None) -> list[Channel]:
        if token is None:
            return []
        try:
            return connector.open_page_channels(self._channels(connector), token)
        except MigrationError as e:
            connector.main.explain(e)
            raise

    def _channels(self, connector: Connector) -> int:
        return self.parameters.multifd_channels if connector.has_page_channels else 0

    def _introduce(self, connector: Connector, *, check_only: bool) -> bytes | None:
        """Say who comes; returns the token for the page channels, None where nobody answers.

        Raises IncompatibleError where the destination will not have it.
        """
        main = connector.main
        description = describe(self._machine, self._machine.handoff.describe_cpu())
        self._primaries.required = self.parameters.x_primaries is Primaries.REQUIRE
        main.send_message(
            Header(
                description=to_json(description),
                channels=self._channels(connector),
                compression=Compression(self._compression),
                checksum=self.parameters.x_checksum,
                check_only=check_only,
                require_primaries=self._primaries.required,
                source=Origin(host=description.host.name, version=__version__, name=description.name),
            )
        )
        prepare(main.version, TO_SOURCE)  # while the other side compares
        if not main.can_answer:
            return None
        limit = self.parameters.x_timeout if check_only else None  # who only asks can ask again
        answer: Message = main.receive_message(Accept, Refuse, limit=limit)
        if isinstance(answer, Refuse):
            raise IncompatibleError(*answer.problems)
        assert isinstance(answer, Accept)
        self._loading = answer.rehearsal_ns / 1e9 or None
        self.progress.preparing = main.version >= Prepared.SINCE and not check_only  # before, that was done by now
        self.progress.warnings = list(answer.warnings)
        for warning in answer.warnings:
            log.warning("warning: %s", printable(warning))
        return answer.token

    # Rounds, while the guest runs

    def _start(self, main: MainChannel, undo: ExitStack) -> None:
        """What rounds need; ``undo`` takes it back once the guest goes on, or has gone."""
        machine = self._machine
        self._convergence = undo.enter_context(Convergence(machine, self.progress, self._on_stall, self._loading))
        with self.progress.phase("start dirty log"):
            self._log = DirtyLog(machine.board.vm, machine.board.memory)
            undo.callback(self._log.stop)
            self._log.start()
        self._dirty = DirtyPages(machine.board.memory)
        pages = PageSender(self._page_channels or [main.channel], compression=self._compression)  # may load a library
        with self._lock:
            self._pages, pages.max_bandwidth = pages, self.parameters.max_bandwidth
        undo.enter_context(self.progress.following(pages))
        self._stop.check()  # or a cancel that came before there was a sender would be lost on it

    def _precopy(self, main: MainChannel) -> None:
        """Send pages until the rest, and the state, fit into the downtime limit; then stop the machine."""
        self.progress.become(Status.ACTIVE)
        start, has_waited = time.monotonic_ns(), False
        while True:
            self._log.collect(self._dirty)
            if self.progress.passes and self._fits():
                if has_waited or not self._wait_for_others(main):
                    self.progress.become(Status.DEVICE)
                    if self._stop_machine(start):
                        return
                    self.progress.become(Status.ACTIVE)
                has_waited = True
            elif self.progress.passes > 1:  # the first, of all pages, is none of few
                self._breathe()
            self._send_round(main, awaited=True)

    def _fits(self) -> bool:
        """Whether the rest can be sent in time; else what is to be done about it is done."""
        self._stop.check()
        return self._convergence.fits(self._dirty.count() * PAGE, self._dirty.rate, self.parameters)

    def _wait_for_others(self, main: MainChannel) -> bool:
        """For primaries there, and for disks here, which have little left to do then; False: there was nothing to."""
        if not self.progress.preparing and self._machine.handoff.is_durable:
            return False
        self._primaries.await_prepared(main)
        self._make_durable()
        return True

    def _breathe(self) -> None:
        """Rounds of a few pages that follow one another at once cost the guest more than they bring."""
        last = self.progress.rounds[-1]
        if last.seconds < SHORTEST_ROUND:
            self._stop.wait_any({}, Deadline(SHORTEST_ROUND - last.seconds))

    def _send_round(self, main: MainChannel, *, awaited: bool = False) -> None:
        """All that is dirty now; ``awaited``: until it is there, where the other side says so."""
        assert self._pages is not None
        progress, number = self.progress, self.progress.passes + 1
        progress.remaining = self._dirty.count() * PAGE
        progress.passes = number
        began = time.monotonic()
        self._kept.append(Round(number=number, remaining_bytes=progress.remaining))
        if awaited:  # else the guest stands still, and listeners can wait
            self._on_pass(number)
        if awaited or not self._page_channels:
            self._say(main)
        start = time.monotonic_ns()
        try:
            stats = self._pages.send_round(self._dirty, number)
        except MigrationError as e:
            self._stop.check()
            main.explain(e)
            raise
        seconds = stats.seconds
        if awaited and main.can_answer and main.version >= RoundEnd.SINCE:
            main.send_message(RoundEnd(number=number))
            self._primaries.hear(main, Arrived)
            seconds = time.monotonic() - began
        progress.add(RoundMade(number, start, stats.pages, stats.zero_pages, stats.bytes, seconds, stats.dirty_rate))

    def _stop_machine(self, start: int) -> bool:
        """Stop the machine; False where its guest was reset meanwhile, and it runs on."""
        before = time.monotonic_ns()
        stopped_ns = self._machine.handoff.stop()
        if stopped_ns is None:
            log.info("migration: the guest was reset: its RAM is sent anew")
            return False
        after = time.monotonic_ns()
        self.progress.stamp("precopy", start, before)
        self.progress.stamp("stop", before, after)
        self.progress.stopped, self.progress.stopped_ns = after - (time.time_ns() - stopped_ns), stopped_ns
        return True

    # The switchover, while it stands still

    def _switch_over(self, main: MainChannel, undo: ExitStack) -> None:
        """All that is left, and then the guest itself. Raises MigrationError."""
        progress, passes = self.progress, self.progress.passes
        for channel in (main.channel, *self._page_channels):  # the guest stands still: it is not left so for long
            channel.timeout = silence(channel.timeout, self._convergence.on_the_way, self._loading or 0.0)
        with progress.phase("save state"):
            running = self._machine.handoff.was_running
            settled_ns = self._machine.handoff.settled_ns
            states = save_machine(self._machine, MachineState(running=running, stopped_ns=settled_ns))
        with progress.phase("last pages"):
            assert self._pages is not None
            with self._lock:
                self._stands_still, self._pages.max_bandwidth = True, 0
            self._log.collect(self._dirty)  # after the last of KVM's own writes, which saving a vCPU may cause
            if self._dirty.count():  # or each page channel would be woken for nothing
                self._send_round(main)
            if not self._page_channels and main.can_answer:
                undo.enter_context(keepalive(main, self.parameters.x_timeout))
            if self.parameters.x_checksum:
                self._send_checksums(main)
        with progress.phase("send state"):
            self._send_state(main, states)
        self._on(Event.SENT)
        with progress.phase("disks"):
            self._make_durable()
            main.channel.settle()
            self._machine.handoff.give()
        with progress.phase("await READY"):
            if main.can_answer:
                # To compare RAM takes its time. Nothing else is worth that a guest stands still for longer.
                limit = None if self.parameters.x_checksum else self.parameters.x_timeout
                self._primaries.hear(main, Ready, limit=limit)
            main.channel.timeout = self.parameters.x_timeout
        self._on(Event.READY)
        with progress.phase("GO"):
            self._go(main)
        if progress.passes > passes:
            self._on_pass(progress.passes)

    def _make_durable(self) -> None:
        """A disk that does not answer keeps the guest for no longer than the other side would be waited for."""
        if self._machine.handoff.is_durable:
            return
        late = "a disk does not answer: what the guest has written is not on it"
        aside("flush", self._machine.handoff.make_durable, self._stop, Deadline(self.parameters.x_timeout), late)

    def _send_checksums(self, main: MainChannel) -> None:
        memory = self._machine.board.memory
        sums = zip(memory.blocks, checksum.checksums(memory), strict=True)
        blocks = tuple(BlockChecksums.of(block.gpa, checksum.CHUNK, each) for block, each in sums)
        self._say(main, Checksums(blocks=blocks))

    def _send_state(self, main: MainChannel, states: States) -> None:
        progress = self.progress
        said = [
            Phase(name=name, start_ns=progress.realtime(start), ns=end - start)
            for name, start, end in progress.phases
            if name in SWITCHOVER
        ]
        end = EndOfState(
            sections=len(states),
            stopped_ns=progress.stopped_ns,
            phases=tuple(said),
            primaries=self._primaries.attached,
        )
        self._say(main, *frames(states, main.version), end)

    def _say(self, main: MainChannel, *messages: Message | Frame) -> None:
        """Send these, behind those that have been kept."""
        kept, self._kept = self._kept, []
        main.send_messages([*kept, *messages])

    def _go(self, main: MainChannel) -> None:
        """Send GO, and hear what came of it."""
        with self._lock:
            self._stop.check()  # a cancel comes before this line, or is refused
            self._handover.on(Event.GO)
        self.progress.went = time.monotonic_ns()
        try:
            answer = self._say_go(main)
        except BaseException:
            self._on(Event.REFUSED if main.channel.withdraw() else Event.FAILED)
            raise
        if answer is None:
            self._on(Event.STARTED)
            return
        self.progress.heard = time.monotonic_ns()
        if not isinstance(answer, Started):
            self._on(Event.REFUSED)
            raise MigrationError(f"the destination could not run the guest: {printable(answer.reason)}")
        self._on(Event.STARTED)
        self.progress.first_run_ns = answer.first_run_ns
        self.progress.said = [Said(each.name, each.start_ns, each.ns) for each in answer.phases]

    def _say_go(self, main: MainChannel) -> Started | Refused | Failed | None:
        """The answer; None where nobody answers."""
        if not main.can_answer:
            main.send_message(Go())
            main.finish()
            return None
        with suppress(StreamError):  # it may have given up before, and said so: that is proof, too
            main.say(Go())
        answer = self._primaries.hear(main, Started, Refused, Failed)
        assert isinstance(answer, Started | Refused | Failed)
        return answer

    def _on(self, event: Event) -> None:
        with self._lock:
            self._handover.on(event)

    @contextmanager
    def _kept_unless_gone(self, main: MainChannel) -> Iterator[None]:
        """Within, the guest may be given away; afterwards it is said whose it is, and goes on here if it is ours."""
        handoff = self._machine.handoff
        try:
            yield
        except BaseException as e:
            with self._lock:
                if self._handover.allows(Event.FAILED):
                    self._handover.on(Event.FAILED)
            if self.phase is Source.UNKNOWN:
                handoff.let_go(RunState.PAUSED, UNKNOWN, self.forced)
                raise MigrationError(f"{UNKNOWN}: {e}") from e
            try:
                handoff.keep()
            except HostError as kept:
                raise MigrationError(f"{e}; and the guest stays paused here: {kept}") from e
            finally:
                main.fail(Cancel(reason=str(e)))
            raise
        handoff.let_go(RunState.POSTMIGRATE, ELSEWHERE, self.forced)
