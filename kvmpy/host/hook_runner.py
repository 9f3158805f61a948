"""The process that runs an operator's program for the VMM, whenever the path of a failover pair changes.

    python -m kvmpy.host.hook_runner PROGRAM MACHINE        descriptor 3 is a socket to the VMM

A line of JSON comes in for each change, {"standby": "net1", "path": "primary", "facts": {"MAC": ...}}, and one goes
back, {"error": ""}, when the program has ended. It gets what it is told as KVMPY_... in its environment, the path as
its first argument, and standard output is standard error. It has RUN_LIMIT seconds; then it is killed, with what it has
started. When the socket closes, also because the VMM was killed, it is run once more for each pair that is anywhere:
the guest is here no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any, Final

from kvmpy.errors import errno_name, signal_name
from kvmpy.host.companion import BLOCKED, CONTROL
from kvmpy.host.hook import LONGEST_LINE, NOWHERE, RUN_LIMIT

MOST_DESCRIPTORS: Final = 1 << 20
STDERR: Final = 2
ADVICE: Final = "it must be an executable file, and a script's first line name its interpreter"


class Runner:
    """Runs ``program`` for one machine; ``limit`` is in seconds."""

    def __init__(self, program: str, machine: str, *, limit: float = RUN_LIMIT) -> None:
        self._program, self._machine, self._limit = program, machine, limit
        self._last: dict[str, dict[str, Any]] = {}  # of each pair that is anywhere

    def run(self, request: dict[str, Any]) -> str:
        """Run it for one change; returns what went wrong, or nothing."""
        standby, path = str(request["standby"]), str(request["path"])
        if path == NOWHERE:
            self._last.pop(standby, None)
        else:
            self._last[standby] = request
        facts = {"EVENT": "path", "MACHINE": self._machine, "STANDBY": standby, "PATH": path}
        facts |= {str(name): str(value) for name, value in request["facts"].items()}
        environment = dict(os.environ) | {f"KVMPY_{name}": value for name, value in facts.items()}
        try:
            pid = os.posix_spawn(
                self._program,
                (self._program, path),
                environment,
                file_actions=((os.POSIX_SPAWN_DUP2, STDERR, 1),),
                setsid=True,
                setsigmask=(),
                setsigdef=(*BLOCKED, signal.SIGPIPE),
            )
        except (OSError, ValueError) as e:
            return f"{errno_name(e.errno or 0) if isinstance(e, OSError) else e}: cannot be run: {ADVICE}"
        return self._wait(pid)

    def close(self) -> list[str]:
        """The guest is gone: say so of every pair; returns what went wrong."""
        requests = [request | {"path": NOWHERE} for request in self._last.values()]
        return [error for request in requests if (error := self.run(request))]

    def _wait(self, pid: int) -> str:
        descriptor = os.pidfd_open(pid)
        try:
            ended, _, _ = select.select([descriptor], [], [], self._limit)
        finally:
            os.close(descriptor)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not ended:
            return f"killed, for it had not ended in {self._limit:g} s"
        if code < 0:
            return f"killed by {signal_name(-code)}"
        return f"exit code {code}; what it wrote is on standard error" if code else ""


def serve(control: socket.socket, runner: Runner) -> None:
    """Carry out each line until the socket closes."""
    with control.makefile("rb") as lines:
        try:
            while (line := lines.readline(LONGEST_LINE)).endswith(b"\n"):
                control.sendall(json.dumps({"error": runner.run(json.loads(line))}).encode() + b"\n")
        except OSError:  # the VMM has gone
            return


def main(arguments: list[str]) -> int:
    """Serve the VMM until it closes the socket."""
    os.closerange(CONTROL + 1, MOST_DESCRIPTORS)
    program, machine = arguments
    runner = Runner(program, machine)
    with socket.socket(fileno=CONTROL) as control:
        control.set_inheritable(False)
        serve(control, runner)
        for error in runner.close():
            sys.stderr.write(f"kvmpy: {machine}: failover_hook: {program}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
