"""The migrations of one machine: what an operator asks, and the thread that does it.

One at a time, in a thread named `migration`, which may wait for the other side. A machine that came in by a migration
can go by the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from kvmpy.errors import CommandError, HostError, IncompatibleError, KvmpyError, MigrationError
from kvmpy.log import Log
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.migration.arrival import Incoming
from kvmpy.migration.description import Findings
from kvmpy.migration.descriptor import NOTHING, Offer, Take
from kvmpy.migration.destination import Ingoing, get_ready
from kvmpy.migration.handover import Source
from kvmpy.migration.main_channel import printable
from kvmpy.migration.parameters import CAPABILITIES, Capability, OnNoConvergence, Parameters
from kvmpy.migration.progress import Progress
from kvmpy.migration.source import Outgoing
from kvmpy.migration.status import Status
from kvmpy.migration.stop import Stop
from kvmpy.migration.transport import Connector, connect
from kvmpy.migration.uri import Address, Exec, File, parse

if TYPE_CHECKING:
    from kvmpy.migration.tls import TlsCredentials

log = Log(__name__)

NOT_GIVEN_BACK: Final = "migration: the guest has moved, and not all is given back that it took: %s"
ENDED: Final = "the machine has ended"
BUSY: Final = "the machine is being migrated; wait until that is over, or cancel it (migrate_cancel)"


class Failure(NamedTuple):
    """Why a migration came to nothing. Not the exception, which holds the frames of all who have it: a circle, and
    nobody collects those while vCPUs run.
    """

    said: str
    problems: tuple[str, ...] = ()


class Migrations:
    """Of ``machine``. Any thread; nothing here waits for the other side but `check`.

    ``insecure``: the guest that comes may do so by tcp without TLS, whatever the parameters say of those that go.
    """

    def __init__(self, machine: Machine, *, insecure: bool = False) -> None:
        self._machine, self._insecure = machine, insecure
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._outgoing: Outgoing | None = None
        self._cancelled = False
        self._incoming_stop: Stop | None = None
        self._checks: set[Outgoing] = set()
        self._no_checks = False
        self.parameters = Parameters(tls_creds=str(machine.config.migration.tls_creds or ""))
        self.capabilities = dict(CAPABILITIES)
        self.progress = self._arriving = self._new_progress()
        machine.handoff.at_close(self.close)

    # What an operator asks

    def migrate(self, uri: str, fds: Offer = NOTHING) -> None:
        """Begin to move the machine to ``uri``. `progress` says what comes of it. Raises CommandError.

        ``fds`` is closed when it is over, if not before.
        """
        with ExitStack() as undo:
            undo.callback(fds.close)
            outgoing = self._outgoing_to(uri, fds, self._new_progress())
            undo.callback(outgoing.discard)
            self._machine.handoff.begin(BUSY, lambda reason: self._abort(outgoing, reason))
            # from here on it is the only one
            with self._lock:
                self.progress, self._outgoing, self._cancelled = outgoing.progress, outgoing, False
                outgoing.progress.become(Status.SETUP)
            try:
                self._start(lambda: self._send(outgoing, fds))
            except CommandError as e:
                self._end(outgoing, Failure(str(e)))
                raise
            undo.pop_all()

    def cancel(self) -> None:
        """End the one that goes on; nothing happens where there is none. Raises CommandError where it is too late."""
        if self._outgoing is None:
            return
        with self._lock:
            outgoing, progress = self._outgoing, self.progress
            if progress.is_over:
                return
            self._cancelled = True
            if not outgoing.cancel("cancelled"):
                self._cancelled = False
                if outgoing.phase is Source.KEPT:
                    return  # it has failed, and is about to say so
                raise CommandError("it is too late: the guest has been handed over to the destination")
        progress.cancelling()

    def check(self, uri: str, fds: Offer = NOTHING) -> Findings:
        """Why the machine cannot be moved to ``uri`` now: all that either side says. Raises CommandError.

        Waits for the destination, so not by the control thread.
        """
        with closing(fds):
            if isinstance(self._parse(uri), Exec | File):  # which would be begun, and written to
                return Findings(self._machine.handoff.blockers(), [])
            progress = Progress(self._machine.board.memory.size)
            try:
                with self._abandonable(self._outgoing_to(uri, fds, progress, asking=True)) as outgoing:
                    return outgoing.check()
            except (MigrationError, HostError) as e:
                raise CommandError(str(e)) from e

    def end_checks(self) -> None:
        """Nobody waits for an answer any more: each `check` under way fails, and those to come."""
        with self._lock:
            self._no_checks = True
            for outgoing in self._checks:
                outgoing.abandon(ENDED)

    def incoming(self, uri: str, fds: Offer = NOTHING) -> None:
        """Wait at ``uri`` for a machine that comes. Raises CommandError, also where nobody can listen there."""
        with ExitStack() as undo:
            undo.callback(fds.close)
            self._parse(uri)
            self._wait_at(uri, fds)
            undo.pop_all()
        log.info("migration: waiting for the guest at %s", uri)

    def _wait_at(self, uri: str, fds: Offer) -> None:
        with self._lock:
            if self._machine.state not in (RunState.PRELAUNCH, RunState.INMIGRATE) or not self._machine.is_incoming:
                raise CommandError("'-incoming' was not specified on the command line")
            if self._thread is not None:
                raise CommandError("The incoming migration has already been started")
            stop, parameters = Stop(), self._effective()
            try:
                incoming = Incoming(
                    uri,
                    self._credentials(parameters),
                    stop=stop,
                    timeout=parameters.x_timeout,
                    fds=fds,
                    insecure=self._insecure or parameters.x_insecure,
                )
            except (MigrationError, HostError) as e:
                stop.close()
                raise CommandError(str(e)) from e
            self._incoming_stop = stop
            self.progress = self._arriving = self._new_progress(other="source")
            try:
                self._start(lambda: self._take_in(incoming, stop, fds))
            except CommandError:
                incoming.close()
                stop.close()
                raise

    def set_parameters(self, **changes: Any) -> None:
        """Change some; what goes on goes on with them, as far as that can be. Raises CommandError."""
        with self._lock:
            self.parameters = msgspec.structs.replace(self.parameters, **changes)
            outgoing = self._outgoing
        if outgoing is not None:
            outgoing.limit(self._effective())

    def set_capability(self, capability: Capability, *, state: bool) -> None:
        """Raises CommandError where it cannot be so."""
        if not self.progress.is_over:
            raise CommandError("There's a migration process in progress")
        if capability is Capability.RETURN_PATH and not state:
            raise CommandError("return-path is always on: without it nobody knows which side has the guest")
        if capability is Capability.AUTO_CONVERGE:
            policy = OnNoConvergence.THROTTLE if state else OnNoConvergence.CONTINUE
            self.set_parameters(x_on_no_convergence=policy)
        self.capabilities[capability] = state

    def wait(self, timeout: float | None = None) -> Status:
        """Until the one that goes on is over, or ``timeout`` seconds. Returns what it is then."""
        if (thread := self._thread) is not None:
            thread.join(timeout)
        return self.progress.status

    def close(self) -> None:
        """The machine has ended: what goes on does so, too."""
        self.end_checks()
        if (stop := self._incoming_stop) is not None:
            stop.set(ENDED)
        if (outgoing := self._outgoing) is not None:
            outgoing.abandon(ENDED)
        if (thread := self._thread) is not None:
            thread.join()

    # The thread

    def _start(self, work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work, name="migration", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:
            raise CommandError("EAGAIN: no thread to migrate with; raise the limit of processes (ulimit -u)") from e
        self._thread = thread

    def _send(self, outgoing: Outgoing, fds: Offer) -> None:
        failure = self._carry_out(outgoing)
        if failure is not None and outgoing.phase is Source.GONE:
            log.warning(NOT_GIVEN_BACK, printable(failure.said))
            failure = None
        fds.close()
        if failure is None:
            log.info("migration: the guest runs at the destination")
        elif not self._cancelled:
            log.error("migration: %s", printable("; ".join(failure.said.splitlines())))
        self._end(outgoing, failure)
        if failure is None:
            outgoing.release_primaries()

    def _carry_out(self, outgoing: Outgoing) -> Failure | None:
        try:
            outgoing.migrate()
        except IncompatibleError as e:
            return Failure(str(e), e.problems)
        except KvmpyError as e:
            # What follows from a cancel or from the machine's end may be found before it is heard of.
            return Failure(outgoing.cancelled_for or str(e))
        except Exception as e:
            log.exception("migration failed")
            return Failure(f"kvmpy's own mistake: {e!r}")
        return None

    def _end(self, outgoing: Outgoing, failure: Failure | None) -> None:
        """It is over. Under the lock, or the next one could begin before what came of this one is known."""
        progress = outgoing.progress
        with self._lock:
            self._machine.handoff.end()
            if failure is None:
                progress.become(Status.COMPLETED)
                return
            said = "; ".join([failure.said, *progress.primaries])
            if self._cancelled:
                progress.cancelling()
                progress.fail(Status.CANCELLED, said)
            else:
                progress.problems = list(failure.problems)
                progress.fail(Status.FAILED, said)

    def _take_in(self, incoming: Incoming, stop: Stop, fds: Offer) -> None:
        try:
            with closing(fds), stop, incoming:
                self._receive(incoming)
        except KvmpyError as e:
            self._ended(e)
        except Exception as e:
            log.exception("migration failed")
            self._ended(MigrationError(f"kvmpy's own mistake: {e!r}"))
        else:
            self._arrived()

    def _ended(self, error: KvmpyError) -> None:
        if self._arriving.first_run_ns:  # the guest is here, and nowhere else
            log.warning(NOT_GIVEN_BACK, printable(str(error)))
            self._arrived()
        else:
            self._refused(error)

    def _arrived(self) -> None:
        """The guest may be on its way again: ``progress`` is of that migration then."""
        is_running = self._machine.state is RunState.RUNNING
        log.info("migration: the guest is here%s", "" if is_running else ", and does not run now")
        self._arriving.become(Status.COMPLETED)
        if is_running:
            with suppress(CommandError):  # it has ended already
                self._machine.announce(self.parameters.announcement)

    def _receive(self, incoming: Incoming) -> None:
        """Wait for the machine that is to come, and take it in; who only asks is answered."""
        readiness = get_ready(self._machine)
        while True:
            with incoming.accept() as arrival:
                self.progress = self._arriving = progress = self._new_progress(other="source")
                ingoing = Ingoing(self._machine, readiness, self.parameters, progress)
                try:
                    header = ingoing.admit(arrival.main)
                except IncompatibleError:
                    raise
                except MigrationError as e:
                    if not incoming.has_page_channels:
                        raise
                    log.warning("migration: turned away: %s", printable(str(e)))
                    continue
                if header is not None:
                    progress.become(Status.SETUP)
                    ingoing.receive(arrival, header)
                    return

    def _refused(self, error: KvmpyError) -> None:
        """Nothing came of it: the machine has nothing to run."""
        progress = self._arriving
        if isinstance(error, IncompatibleError):
            progress.problems = list(error.problems)
        if progress.status is Status.NONE:
            progress.become(Status.SETUP)
        progress.fail(Status.FAILED, str(error))
        try:
            self._machine.handoff.fail(MigrationError(f"incoming migration: {error}"))
        except CommandError:  # it has ended already
            log.info("incoming migration: %s", printable(str(error)))

    # Within

    def _abort(self, outgoing: Outgoing, reason: str) -> None:
        outgoing.cancel(f"the machine has ended ({reason})")

    @contextmanager
    def _abandonable(self, outgoing: Outgoing) -> Iterator[Outgoing]:
        """Have `end_checks` end it, also one that has come before."""
        with self._lock:
            self._checks.add(outgoing)
            if self._no_checks:
                outgoing.abandon(ENDED)
        try:
            yield outgoing
        finally:
            with self._lock:
                self._checks.discard(outgoing)

    def _effective(self) -> Parameters:
        if self.capabilities[Capability.MULTIFD]:
            return self.parameters
        return msgspec.structs.replace(self.parameters, multifd_channels=1)

    def _outgoing_to(self, uri: str, fds: Take, progress: Progress, *, asking: bool = False) -> Outgoing:
        self._parse(uri)
        parameters = self._effective()
        return Outgoing(
            self._machine,
            lambda stop: self._connect(uri, parameters, stop, fds, asking=asking),
            parameters,
            progress,
            on_pass=self._on_pass,
            on_stall=self._on_stall,
        )

    def _connect(self, uri: str, parameters: Parameters, stop: Stop, fds: Take, *, asking: bool) -> Connector:
        return connect(
            uri,
            self._credentials(parameters),
            stop=stop,
            timeout=parameters.x_timeout,
            fds=fds,
            insecure=parameters.x_insecure,
            tls_hostname=parameters.tls_hostname,
            asking=asking,
        )

    def _credentials(self, parameters: Parameters) -> TlsCredentials | None:
        if not parameters.tls_creds:
            return None
        from kvmpy.migration.tls import TlsCredentials  # ssl takes long to import: only who asked for it waits

        return TlsCredentials(parameters.tls_creds)

    def _parse(self, uri: str) -> Address:
        try:
            return parse(uri)
        except MigrationError as e:
            raise CommandError(str(e)) from e

    def _new_progress(self, *, other: str = "destination") -> Progress:
        return Progress(self._machine.board.memory.size, self._on_status, other=other)

    def _on_status(self, status: Status) -> None:
        if self.capabilities[Capability.EVENTS]:
            self._machine.report("MIGRATION", status=status.value)

    def _on_pass(self, number: int) -> None:
        if self.capabilities[Capability.EVENTS]:
            self._machine.report("MIGRATION_PASS", **{"pass": number})

    def _on_stall(self, what: str) -> None:
        log.warning("migration: %s", what)
        self._machine.report("MIGRATION_NOT_CONVERGING", reason=what)
