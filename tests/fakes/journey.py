"""Machines of one configuration, of which at most one is to run: a guest goes from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvmpy.config.schema import Config, load
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState
from kvmpy.migration.control import Migrations
from kvmpy.migration.status import Status
from tests.fakes.counting_guest import COUNTS, NEEDS, STEPS, gap
from tests.fakes.loop import BOUND, poll
from tests.fakes.pvh_kernel import pvh_kernel

PATIENCE = 2.0
"""Seconds that each side gives the other, in tests of one that does not answer."""


class Stop:
    """One of the machines, with its migrations; ``said`` is what its guest has sent so far."""

    def __init__(self, config: Config, console: Path, uri: str, *, incoming: bool, **parameters: Any) -> None:
        self.uri, self._console = uri, console
        self.machine = Machine(config, incoming=incoming)
        self.migrations = Migrations(self.machine)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.machine.listeners.append(lambda name, data, _: self.events.append((name, data)))
        self.migrations.set_parameters(**parameters)
        try:
            self.machine.start()
            if incoming:
                self.migrations.incoming(uri)
        except BaseException:
            self.machine.close()
            raise

    @property
    def said(self) -> bytes:
        return self._console.read_bytes()

    @property
    def runs(self) -> bool:
        return self.machine.state is RunState.RUNNING

    def wait(self, status: Status) -> None:
        """For a migration of this machine to end so."""
        assert self.migrations.wait(BOUND) is status, (self.migrations.progress.status, self.error)

    def wait_for(self, state: RunState) -> None:
        poll(lambda: self.machine.state is state, lambda: f"{self.machine.state}, not {state}: {self.error}")

    def wait_for_count(self, more: int = 2 * STEPS) -> None:
        """The guest runs here: it gets on."""
        enough = self._console.stat().st_size + more
        poll(lambda: self._console.stat().st_size >= enough, lambda: f"the guest does not count: {self.machine.state}")

    @property
    def error(self) -> str | None:
        return self.migrations.progress.error


class Journey:
    """``stops`` are the machines made so far. Those with ``extra`` tables have them all."""

    def __init__(self, directory: Path, stack: ExitStack, code: bytes = COUNTS, extra: str = "") -> None:
        self._directory, self._stack, self.extra = directory, stack, extra
        (directory / "kernel").write_bytes(pvh_kernel(code))
        self.stops: list[Stop] = []

    def config(self, *overrides: str) -> Config:
        file = self._directory / f"{len(self.stops)}.toml"
        file.write_text(
            f'name = "traveller"\n[boot]\nkernel = "kernel"\n[machine]\nmemory = "{NEEDS}"\n'
            f'[console]\nserial = "file:console{len(self.stops)}"\n{self.extra}'
        )
        return load(file, overrides)

    def begin(self, *overrides: str, **parameters: Any) -> Stop:
        """A machine that boots."""
        return self._make(overrides, parameters, incoming=False)

    def wait_at(self, *overrides: str, uri: str | None = None, **parameters: Any) -> Stop:
        """A machine that waits for one that comes, at ``uri`` or a place of its own."""
        return self._make(overrides, parameters, incoming=True, uri=uri)

    def at_end(self, call: Callable[[], object]) -> None:
        """Have ``call`` made after the test, before the machines are closed."""
        self._stack.callback(call)

    def socket(self, name: str) -> str:
        return str(self._directory / name)

    def move(self, source: Stop, uri: str | None = None, **parameters: Any) -> Stop:
        """A whole migration; returns where the guest is now."""
        there = self.wait_at(**parameters)
        source.migrations.migrate(uri or there.uri)
        assert source.migrations.wait(BOUND) is Status.COMPLETED, (source.error, there.error, there.machine.error)
        there.wait(Status.COMPLETED)
        assert source.machine.state is RunState.POSTMIGRATE
        assert there.machine.state is RunState.RUNNING
        there.wait_for_count()
        return there

    def check(self) -> None:
        """The guest's count, over all places it has been at, has no gap and no repetition."""
        for stop in self.stops:
            stop.machine.close()
        said = b"".join(stop.said for stop in self.stops)
        assert gap(said) is None, [len(stop.said) for stop in self.stops]

    def _make(
        self, overrides: tuple[str, ...], parameters: dict[str, Any], *, incoming: bool, uri: str | None = None
    ) -> Stop:
        number = len(self.stops)
        config = self.config(*overrides)
        console = self._directory / f"console{number}"
        uri = uri or f"unix:{self.socket(f'in{number}')}"
        stop = Stop(config, console, uri, incoming=incoming, **parameters)
        self._stack.callback(stop.machine.close)
        self.stops.append(stop)
        return stop
