"""The destination's side of a migration, from HEADER to the guest's first instruction here. One thread, which may wait.

Whatever fails before GO leaves a machine that never ran, and ends. What fails after it is told to the source, as proof
that no vCPU ran here and none will, and ends too. The guest's disks are neither locked nor read before GO.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NamedTuple

from kvmpy.errors import IncompatibleError, KvmpyError, MigrationError, StreamError
from kvmpy.kvm.cpu_model import CpuDescription, describe_host
from kvmpy.log import Log
from kvmpy.machine.machine import Machine
from kvmpy.migration import checksum, handover
from kvmpy.migration.arrival import Arrival
from kvmpy.migration.description import compare, describe, parse, processor, to_json
from kvmpy.migration.handover import Destination, Event, Handover
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.keepalive import keepalive, silence
from kvmpy.migration.main_channel import MainChannel, printable
from kvmpy.migration.messages import (
    Accept,
    Arrived,
    BlockChecksums,
    Checksums,
    EndOfState,
    Failed,
    Go,
    Header,
    Message,
    Outcome,
    Prepared,
    Ready,
    Refuse,
    Refused,
    Round,
    RoundEnd,
    Section,
    Sections,
    Started,
    due,
    prepare,
)
from kvmpy.migration.messages import Phase as PhaseSaid
from kvmpy.migration.parameters import Parameters
from kvmpy.migration.preparation import Preparation
from kvmpy.migration.progress import Progress, Said
from kvmpy.migration.sections import MachineState, States, load_machine, rehearse, states_in
from kvmpy.migration.status import Status
from kvmpy.migration.wire import NEWEST

log = Log(__name__)


class Readiness(NamedTuple):
    """What a destination knows of itself before a source comes: its host's processor, and how long it takes to load."""

    cpu: CpuDescription
    rehearsal_ns: int


def get_ready(machine: Machine) -> Readiness:
    """Do what takes long and needs no source: it would wait for that, and its guest's pages with it. Raises KvmpyError.

    In the control thread, for a device may be added until a source comes.
    """
    vcpus = machine.board.vcpus
    cpu, rehearsal_ns = machine.in_control(lambda: (describe_host(vcpus[0], len(vcpus)), rehearse(machine)))
    ours = describe(machine, cpu)  # has read its kernel and initrd
    compare(parse(to_json(ours)), ours)
    prepare(NEWEST)
    return Readiness(cpu, rehearsal_ns)


class Ingoing:
    """One migration into ``machine``, which got ready for it. Its thread calls `admit`, then `receive`."""

    def __init__(self, machine: Machine, readiness: Readiness, parameters: Parameters, progress: Progress) -> None:
        self._machine, self._readiness, self._parameters, self.progress = machine, readiness, parameters, progress
        self._handover: Handover[Destination] = handover.destination()
        self._cpu = CpuDescription()
        self._is_at_work = False

    def admit(self, main: MainChannel) -> Header | None:
        """Hear who comes; None where somebody only wanted to know whether it could. Before anything else moves.

        Raises IncompatibleError where it cannot come, which it is told, and StreamError.
        """
        header = main.receive_message(Header)
        prepare(main.version)
        said = f"{header.source.name} of {header.source.host} (kvmpy {header.source.version})"
        try:
            source = parse(header.description)
            with self._telling(main), self._working():  # our kernel and initrd may be read for it
                here = describe(self._machine, self._readiness.cpu)
                findings = compare(source, here, require_primaries=header.require_primaries)
            if findings.problems:
                raise IncompatibleError(*findings.problems)
        except IncompatibleError as e:
            main.fail(Refuse(problems=e.problems))
            if header.check_only:
                return None
            raise
        self.progress.warnings = findings.warnings
        if header.check_only:
            self._accept(main, bytes(16))
            return None
        log.info("migration: %s comes", printable(said))
        for warning in findings.warnings:
            log.warning("warning: %s", printable(warning))
        self._cpu = processor(source)
        return header

    def receive(self, arrival: Arrival, header: Header) -> None:
        """Take the guest in, and run it. Raises KvmpyError where that comes to nothing: no vCPU has run then."""
        main = arrival.main
        preparation = Preparation(self._machine, self.progress, lambda outcomes: self._tell(main, outcomes))
        with ExitStack() as undo:  # threads are ended once the guest runs, which stands still until then
            undo.callback(preparation.hush)  # the channel is not ours after this
            try:
                undo.enter_context(self._telling(main))
                with self.progress.phase("receive RAM"):
                    sections, end = self._receive(arrival, header, preparation, undo)
                with self.progress.phase("load state"), self._working():
                    state = load_machine(self._machine, sections)
                    self._expect(end.primaries)
                if not main.can_answer:
                    with self.progress.phase("await primaries"):
                        self._await(preparation, main, header)
                self._handover.on(Event.READY)
                with self.progress.phase("await GO"):
                    self._await_go(main)
            except KvmpyError as e:
                self._handover.on(Event.FAILED)
                main.fail(Failed(reason=str(e)))
                raise
            self._handover.on(Event.GO)
            self._run(main, state, end.stopped_ns)
        self.progress.said = [Said(each.name, each.start_ns, each.ns) for each in end.phases]

    def _accept(self, main: MainChannel, token: bytes, rehearsal_ns: int = 0) -> None:
        if main.can_answer:
            warnings = tuple(self.progress.warnings)
            main.send_message(Accept(token=token, version=main.version, warnings=warnings, rehearsal_ns=rehearsal_ns))

    # What comes

    def _receive(
        self, arrival: Arrival, header: Header, preparation: Preparation, undo: ExitStack
    ) -> tuple[States, EndOfState]:
        """RAM, checked where that was asked for, and the state."""
        main = arrival.main
        before = main.can_answer and main.version < Prepared.SINCE  # such a source asks its guest on ACCEPT, and goes
        if before:
            preparation.begin()
            with self._working():
                self._await(preparation, main, header)
        token = os.urandom(16)
        self._accept(main, token, self._readiness.rehearsal_ns)
        if not before:
            preparation.begin()
        channels = arrival.accept_page_channels(header.channels, token)
        self.progress.become(Status.ACTIVE)
        with self._heard_of(main) as on_failure:
            pages = PageReceiver(
                self._machine.board.memory, channels, compression=header.compression.value, on_failure=on_failure
            )
            undo.enter_context(closing(pages))
            main.channel.stop.then(pages.cancel)
            for channel in channels:  # or its thread would notice the end of it only by and by
                undo.callback(channel.shutdown, "all has come")
            pages.start()
            with self._working():
                self._machine.handoff.adopt_cpu(self._cpu)
            received = self._read(main, pages, inline=not channels)
        pages.finish()
        return received

    def _read(self, main: MainChannel, pages: PageReceiver, *, inline: bool) -> tuple[States, EndOfState]:
        sections: States = {}
        last = 0
        kinds = due(main.version, Round, RoundEnd, Checksums, Section, Sections, EndOfState)
        while True:
            message: Message = main.receive_message(*kinds)
            match message:
                case Round(number=number):
                    last = number
                    self.progress.note_round(number, message.remaining_bytes, pages.received)
                    if inline and pages.receive_inline(main.channel) != number:
                        raise StreamError(f"{main.channel.name}: the pages of another round than {number}")
                case RoundEnd(number=number):
                    with self._working():
                        self._wait(pages, number, inline=inline)
                    main.send_message(Arrived(number=number))
                case Checksums(blocks=blocks):
                    with self._working():
                        self._wait(pages, last, inline=inline)
                        checksum.compare(self._machine.board.memory, self._sums(blocks))
                case Section() | Sections():
                    self._take(main, sections, states_in(message))
                case EndOfState(sections=count):
                    if count != len(sections):
                        raise StreamError(f"{main.channel.name}: {len(sections)} sections of {count}")
                    with self._working():
                        self._wait(pages, last, inline=inline)
                    self.progress.note_round(last, 0, pages.received)
                    return sections, message

    def _take(self, main: MainChannel, states: States, came: Sequence[Section]) -> None:
        for each in came:
            if each.device in states:
                raise StreamError(f"{main.channel.name}: two sections of {each.device[:200]!r}")
            states[each.device] = each.section

    def _wait(self, pages: PageReceiver, number: int, *, inline: bool) -> None:
        """Until every page channel has brought all of a round."""
        if not number:
            raise StreamError("the state comes before any RAM")
        if not inline:
            pages.wait_round(number, self._parameters.x_timeout)

    def _sums(self, blocks: Sequence[BlockChecksums]) -> list[Sequence[int]]:
        ours = [(block.gpa, checksum.CHUNK) for block in self._machine.board.memory.blocks]
        if [(block.gpa, block.chunk) for block in blocks] != ours:
            raise StreamError("checksums of other blocks of RAM than this machine has")
        return [block.sums for block in blocks]

    @contextmanager
    def _heard_of(self, main: MainChannel) -> Iterator[Callable[[Exception], None]]:
        """Within, whoever waits for a message hears at once that a page channel has failed, of which this is told."""
        failures: list[Exception] = []
        lock, is_over = threading.Lock(), False

        def fail(e: Exception) -> None:
            with lock:
                if is_over or failures:
                    return
                failures.append(e)
            main.fail(Failed(reason=str(e)))
            main.shutdown(str(e))

        try:
            yield fail
        except MigrationError as e:
            if failures:
                raise failures.pop() from e
            raise
        finally:
            with lock:
                is_over = True

    # Primaries

    def _await(self, preparation: Preparation, main: MainChannel, header: Header) -> None:
        """Before it is too late, where the source does not wait for it."""
        seconds = self._parameters.x_prepare_timeout / 1000
        preparation.wait(main.channel.stop, seconds, require=header.require_primaries)

    def _tell(self, main: MainChannel, outcomes: tuple[Outcome, ...]) -> None:
        """By a thread of the last primary's."""
        if main.can_answer and main.version >= Prepared.SINCE:
            with suppress(MigrationError):  # whoever reads there hears of it too
                main.say(Prepared(primaries=outcomes))

    def _expect(self, primaries: tuple[str, ...]) -> None:
        """Have the guest see these, which it had, when it runs, whatever its driver is at (R34)."""
        departure = self._machine.departure
        for name in primaries if departure is None else departure.expect(primaries):
            log.warning("warning: device %s: the guest had this failover primary; it goes on without", printable(name))

    # The hand-over

    @contextmanager
    def _telling(self, main: MainChannel) -> Iterator[None]:
        """Within, the source is told whenever we are at work."""
        with ExitStack() as stack:
            if main.can_answer:
                timeout = silence(self._parameters.x_timeout)
                stack.enter_context(keepalive(main, timeout, lambda: self._is_at_work))
            yield

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Within, we are at work, and the source waits."""
        self._is_at_work = True
        try:
            yield
        finally:
            self._is_at_work = False

    def _await_go(self, main: MainChannel) -> None:
        if main.can_answer:
            main.send_message(Ready())
        main.receive_message(Go)
        if not main.can_answer:
            main.finish()

    def _run(self, main: MainChannel, state: MachineState, stopped_ns: int) -> None:
        """GO has come: run the guest, or say that it does not run. Raises KvmpyError then."""
        try:
            with self.progress.phase("run"):
                first_run_ns = self._machine.handoff.arrive(running=state.running)
        except KvmpyError as e:
            self._handover.on(Event.FAILED)
            main.fail(Refused(reason=str(e)))
            raise
        self._handover.on(Event.STARTED)
        self.progress.first_run_ns, self.progress.stopped_ns = first_run_ns, stopped_ns
        if main.can_answer:
            try:
                main.send_message(Started(first_run_ns=first_run_ns, phases=tuple(self._phases())))
            except MigrationError as e:
                log.warning("migration: the guest runs here, and its source may not have heard of it: %s", e)

    def _phases(self) -> Iterator[PhaseSaid]:
        progress = self.progress
        for name, start, end in progress.phases:
            yield PhaseSaid(name=name, start_ns=progress.realtime(start), ns=end - start)
