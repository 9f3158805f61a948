"""What is around a failover standby, and is told which way its guest's frames go: bridge, NICs, an operator's program.

The network helper and that program take their time, so threads of their own ask them: the pair's owner says where the
path is now, and is told when the network has been. Of several changes that come faster than that, the last counts. The
program is told of each, in their order, as long as it keeps up with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Final, Protocol, Self

from kvmpy.errors import HostError
from kvmpy.host.hook import NOWHERE
from kvmpy.host.network import Network
from kvmpy.host.standby_port import StandbyPort
from kvmpy.host.tap import Tap
from kvmpy.host.warnings import Warnings
from kvmpy.log import Log
from kvmpy.machine.errands import Errands

log = Log(__name__)

MOST_HOOKS: Final = 16
"""Changes that wait for the program; it has seconds for each."""


class Path(Enum):
    """Where a guest's frames go."""

    STANDBY = "standby"
    PRIMARY = "primary"
    NOWHERE = NOWHERE  # not to this machine: it has ended, or been moved


class Port(Protocol):
    """The standby's: `kvmpy.host.standby_port.StandbyPort`."""

    ifname: str
    mac: str

    def steer(self, *, here: bool) -> list[str]: ...

    def leave(self) -> list[str]: ...

    def close(self) -> None: ...


class Program(Protocol):
    """The operator's: `kvmpy.host.hook.Hook`."""

    def run(self, standby: str, path: str, facts: Mapping[str, str]) -> None: ...


class StandbyNetwork:
    """The network of the standby ``name``; ``count`` says how many frames its guest has received and sent over it.

    ``path`` is what was said last. ``problem`` is why the network or the program could not be told, None if it was.
    """

    def __init__(
        self, name: str, port: Port, count: Callable[[], tuple[int, int]], program: Program | None = None
    ) -> None:
        self._name, self._port, self._count, self._program = name, port, count, program
        self.path = Path.NOWHERE
        self._problems: list[str] = []
        self._hook_problem = ""
        self._facts: Mapping[str, str] = {}
        self._steers, self._runs = Errands(f"steer-{name}", 1), Errands(f"hook-{name}", MOST_HOOKS)
        self._warnings = Warnings(log)

    @classmethod
    def of(
        cls, name: str, tap: Tap, mac: str, network: Network, directory: str, netns: str | None, program: Program | None
    ) -> Self:
        """That of the standby ``name`` on ``tap``, in a machine with that runtime ``directory``."""
        return cls(name, StandbyPort(network, directory, tap.name, mac, netns=netns), tap.frames, program)

    @property
    def problem(self) -> str | None:
        """What could not be told last."""
        return "; ".join(filter(None, (*self._problems, self._hook_problem))) or None

    def frames(self) -> tuple[int, int] | None:
        """How many its guest has received and sent over it, None where that cannot be found out."""
        try:
            return self._count()
        except HostError:
            return None

    def tell(self, path: Path, facts: Mapping[str, str], told: Callable[[], object] = lambda: None) -> None:
        """The guest's frames go that way now; ``told`` is called when the network knows, by the thread that told it.

        Does not wait. ``facts`` are for the program alone.
        """
        self.path, self._facts = path, facts
        self._steers.add(partial(self._steer, path, told))
        if self._program is not None:
            self._runs.add(partial(self._run, path, facts))
            if self._runs.left_out:
                self._warn("failover_hook: it takes longer than the guest's changes of path, and is not told of each")

    def close(self) -> None:
        """The guest is not here any more. Waits until everybody has been told of that, and of nothing before."""
        self._steers.close()
        self._port.close()
        self._runs.drop()  # or a guest that has changed its path often would keep its machine's end waiting
        if self._program is not None and self.path is not Path.NOWHERE:
            self._runs.add(partial(self._run, Path.NOWHERE, self._facts))
        self._runs.close()

    def _steer(self, path: Path, told: Callable[[], object]) -> None:
        self._problems = self._port.leave() if path is Path.NOWHERE else self._port.steer(here=path is Path.STANDBY)
        told()

    def _run(self, path: Path, facts: Mapping[str, str]) -> None:
        assert self._program is not None
        facts = {**facts, "MAC": self._port.mac, "TAP": self._port.ifname}
        try:
            self._program.run(self._name, path.value, facts)
            self._hook_problem = ""
        except HostError as e:
            self._hook_problem = str(e)
            self._warn(self._hook_problem)

    def _warn(self, problem: str) -> None:
        self._warnings.say(f"{self._name}: {problem}")
