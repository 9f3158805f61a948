"""An operator's program that is told which way the frames of a failover pair go, for what kvmpy cannot tell itself.

    hook = Hook("/etc/kvmpy/path-changed", "web1")
    hook.start()
    hook.run("net1", "primary", {"MAC": "52:54:00:6f:55:cc"})       # waits until it has ended; HostError if it failed
    hook.close()

A process beside the VMM runs it (`kvmpy.host.hook_runner`), one at a time: to start a program here would keep every
vCPU that needs Python waiting meanwhile. That process has the program's path from its own start, so nothing that the
monitor is asked for chooses what is run, and it outlives us to say that the guest is here no more.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from kvmpy.errors import HostError, errno_name, refusal
from kvmpy.host.companion import spawn

# Seconds for which the program may run; then it is killed, with all that it has started.
RUN_LIMIT: Final = 10.0
# How long the runner itself may take over the rest: it starts on a busy host.
GRACE: Final = 20.0
REAP_LIMIT, REAP_POLL = 5.0, 0.01
LONGEST_LINE: Final = 1 << 16
NOWHERE: Final = "none"
"""The path of a pair whose guest has ended, or is on another host."""


class Ran(msgspec.Struct, frozen=True):
    """What the runner says: why it was no success, empty if it was one."""

    error: str


class Hook:
    """Runs ``program`` for the machine ``machine``. Any thread; a call waits for those before it."""

    def __init__(self, program: str, machine: str) -> None:
        self._program, self._machine = program, machine
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._pid = 0
        self._closed = False
        # Made now: nothing is built beside running vCPUs.
        self._decode = msgspec.json.Decoder(Ran).decode
        self._encode = msgspec.json.Encoder().encode

    def start(self) -> None:
        """Start the process that runs it, and do not wait for that. Raises HostError."""
        with self._lock:
            self._start()

    def run(self, standby: str, path: str, facts: Mapping[str, str]) -> None:
        """Run it for the pair of that standby, and wait. ``facts`` go into its environment, as KVMPY_NAME.

        Raises HostError where it failed, or was killed for taking more than RUN_LIMIT seconds.
        """
        with self._lock:
            if self._closed:
                return
            self._start()
            error = self._ask({"standby": standby, "path": path, "facts": dict(facts)})
        if error:
            raise HostError(f"failover_hook: {self._program}: {error} (path {path} of {standby})")

    def close(self) -> None:
        """Have it told of each pair that is not at NOWHERE that it is, and wait for that. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            if self._socket is None:
                return
            with self._socket as ours:
                ours.settimeout(RUN_LIMIT + GRACE)
                try:
                    ours.shutdown(socket.SHUT_WR)
                    while ours.recv(LONGEST_LINE):
                        pass
                except OSError:  # it takes too long, and goes on without us, or has been killed
                    pass
            self._socket = None
            self._reap()

    def _start(self) -> None:
        if self._socket is not None or self._closed:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._pid = spawn("kvmpy.host.hook_runner", theirs.fileno(), self._program, self._machine)
            except OSError as e:
                ours.close()
                raise HostError(f"failover_hook: {refusal(e.errno, 'what runs it cannot be started')}") from e
        ours.settimeout(RUN_LIMIT + GRACE)
        self._socket = ours

    def _ask(self, request: dict[str, object]) -> str:
        """What the runner says of it. Where it says nothing it is given up: the next call starts another."""
        assert self._socket is not None
        try:
            self._socket.sendall(self._encode(request) + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                if not (data := self._socket.recv(LONGEST_LINE)) or len(line) > LONGEST_LINE:
                    raise HostError("what runs it has ended")
                line += data
            return self._decode(line).error
        except TimeoutError:
            why = f"not done in {RUN_LIMIT + GRACE:g} s"
        except OSError as e:
            why = errno_name(e.errno or 0)
        except (HostError, msgspec.DecodeError) as e:
            why = str(e)
        with suppress(ProcessLookupError):  # or it would take the closed socket for our end, and say so to the program
            os.kill(self._pid, signal.SIGKILL)
        self._socket.close()
        self._socket = None
        self._reap()
        return why

    def _reap(self) -> None:
        """Our end is closed, and the runner ends."""
        deadline = time.monotonic() + REAP_LIMIT
        while time.monotonic() < deadline:
            try:
                if os.waitpid(self._pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:  # a program that uses us ignores SIGCHLD, and the kernel has reaped it
                return
            time.sleep(REAP_POLL)
