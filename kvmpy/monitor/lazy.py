"""What migrates a machine, imported when it is first asked for.

It is a fifth of all that kvmpy imports, and most machines stay where they are. A machine that was started to come in
has it already. Else the import is beside running vCPUs, in the thread of a slow command, in many small pieces between
which others get the GIL.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvmpy.errors import CommandError
from kvmpy.machine.machine import Machine

if TYPE_CHECKING:
    from kvmpy.migration.control import Migrations


class LazyMigrations:
    """Those of ``machine``; ``made`` if they are there already. Any thread."""

    def __init__(self, machine: Machine, made: Migrations | None = None) -> None:
        self._machine, self.made = machine, made
        self._lock = threading.Lock()
        self._ended = False

    def make(self) -> Migrations:
        """Import and make them, the first time. Raises CommandError once the monitor closes."""
        with self._lock:
            if self._ended:
                raise CommandError("the machine has ended")
            if self.made is None:
                from kvmpy.migration.control import Migrations

                self.made = Migrations(self._machine)
            return self.made

    def end_checks(self) -> None:
        """The monitor closes: whoever waits for a destination's answer waits no more."""
        with self._lock:
            self._ended = True
            if self.made is not None:
                self.made.end_checks()
