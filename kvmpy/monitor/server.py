"""The monitor's socket: sessions that speak QMP, served in the control thread.

Each client has a session of its own, as many as there are descriptors for. A client that does not read is cut off when
its backlog is full: it never stalls the machine.

The socket is there before the guest runs, for that may fail. What sessions are made of, every command and its types, is
an eighth of all that is imported, and nobody but a client needs it: it comes in once the guest runs (`get_ready`).
"""

from __future__ import annotations

import resource
import threading
from typing import TYPE_CHECKING, Any, Final

from kvmpy.errors import HostError, refusal
from kvmpy.host.descriptors import Allowance, DescriptorSets
from kvmpy.host.stream import Listener, SocketStream
from kvmpy.log import Log
from kvmpy.machine.machine import Machine
from kvmpy.monitor.lazy import LazyMigrations
from kvmpy.monitor.throttle import Throttle
from kvmpy.monitor.worker import Workers

if TYPE_CHECKING:
    from kvmpy.migration.control import Migrations
    from kvmpy.monitor.session import Session

log = Log(__name__)

# A session takes a descriptor, and one more while what it was sent waits. The machine needs some, too: with sessions
# that are this part of the limit of open files, and descriptors kept for them that are half as many, most are its own.
SESSIONS_SHARE: Final = 8
FEWEST: Final = 8


class MonitorServer:
    """Serves ``machine`` at the unix socket ``path``."""

    def __init__(self, machine: Machine, path: str, migrations: Migrations | None = None) -> None:
        """``migrations`` are the machine's, where there are some already.

        Raises HostError where ``path`` cannot be bound.
        """
        self._machine = machine
        self._migrations = LazyMigrations(machine, migrations)
        self._sessions: list[Session] = []
        self._most = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SESSIONS_SHARE, FEWEST)
        self._told = False
        self._workers = Workers(machine.control)
        self._allowance = Allowance(self._most // 2)
        self._sets = DescriptorSets(self._allowance)
        try:
            self._listener = Listener(machine.control, path, self._accept)
        except OSError as e:
            raise HostError(f"monitor.qmp: {path}: {refusal(e.errno, 'cannot listen there')}") from e
        machine.listeners.append(Throttle(machine.control.timer, self._on_event).take)

    def get_ready(self) -> None:
        """Import what the first client would have to wait for. By the main thread, which no guest ever waits for.

        An exit meanwhile may wait for the interpreter as long as a small module takes to be read (0.2 ms); there are
        few so early. A client that is quicker waits until this is done.
        """
        import kvmpy.monitor.session  # noqa: F401

    def close(self) -> None:
        """Hang up on everybody, and wait for what is under way."""
        control, done = self._machine.control, threading.Event()
        try:
            if control.thread in (None, threading.current_thread()):
                self._hang_up(done)
            else:
                control.post(lambda: self._hang_up(done))
                done.wait()
        except RuntimeError:  # the loop has ended: nobody is at it any more
            self._hang_up(done)
        self._migrations.end_checks()  # another host need not ever answer
        self._workers.close()

    def _hang_up(self, done: threading.Event) -> None:
        """In the control thread, where sessions live, if there is one."""
        try:
            self._listener.close()
            for session in tuple(self._sessions):
                session.close()
        finally:
            done.set()

    def _accept(self, stream: SocketStream) -> None:
        from kvmpy.monitor.session import Session

        if len(self._sessions) < self._most:
            self._sessions.append(
                Session(
                    self._machine,
                    stream,
                    self._workers,
                    self._sets,
                    self._allowance,
                    self._forget,
                    self._migrations,
                )
            )
            return
        if not self._told:
            self._told = True
            log.warning("monitor: %d clients are connected: others are turned away", self._most)
        stream.close()

    def _forget(self, session: Session) -> None:
        self._sessions.remove(session)
        if not self._sessions:
            self._sets.close()

    def _on_event(self, name: str, data: dict[str, Any], at_ns: int) -> None:
        if self._sessions:
            from kvmpy.monitor import protocol

            message = protocol.event(name, data, at_ns)
            for session in tuple(self._sessions):
                session.send_event(message)
