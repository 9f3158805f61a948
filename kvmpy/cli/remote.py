"""The other host of `kvmpy migrate NAME ssh://HOST`: one ssh session, with `kvmpy receive` at its far end.

The session carries the questions and answers of `receive.py` on its standard input and output, and the migration's
connections through a forwarded unix socket, so that nothing listens on either network and nothing needs a key but
ssh's. ssh asks for what it needs on the terminal, and says there what is wrong.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from typing import Any, Final, NamedTuple, Self

from kvmpy.cli.receive import STREAM
from kvmpy.errors import ConfigError, HostError, HostProblems, errno_name

WORD: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
URI: Final = re.compile(rf"ssh://(?:({WORD})@)?({WORD}|\[[0-9A-Fa-f:.%\w]+\])(?::([0-9]{{1,5}}))?/?")
# A link that is cut is noticed in fifteen seconds, by both ends of the session.
OPTIONS: Final = (
    *("-T", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    *("-o", "ClearAllForwardings=no", "-o", "ControlPath=none"),
)
ANSWER_SECONDS: Final = 60.0
START_SECONDS: Final = 300.0  # a password may be asked for, and all of the guest's memory taken
END_SECONDS: Final = 60.0  # of the far end, which waits for a machine it was cut off from
LINE_MOST: Final = 1 << 20
SHOWN_MOST: Final = 200


class Target(NamedTuple):
    """Whom to call, in ssh's words."""

    user: str | None
    host: str
    port: str | None


def parse(uri: str) -> Target:
    """Raises ConfigError. What ssh could take for an option is no host."""
    match = URI.fullmatch(uri)
    if match is None or int(match[3] or 0) > 0xFFFF:
        raise ConfigError(f"{uri}: expected ssh://[USER@]HOST[:PORT]")
    return Target(match[1], match[2].strip("[]"), match[3])


class Remote:
    """The session, as a context manager. ``stream`` is the socket here that is the destination's there."""

    def __init__(self, uri: str, *, ssh: str = "ssh", kvmpy: str = "kvmpy") -> None:
        self.uri = uri
        self._target = parse(uri)
        self._ssh, self._kvmpy = _words(ssh), kvmpy
        self.directory = f"/tmp/kvmpy-{secrets.token_hex(8)}"  # there; it must not exist, and nobody can guess it
        self._resources = ExitStack()
        self._received = bytearray()
        self.stream = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            here = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmpy-"))
            self.stream = os.path.join(here, STREAM)
            try:
                self._process = subprocess.Popen(
                    self._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=_ignore_interrupts
                )
            except OSError as e:
                raise HostError(f"{self._ssh[0]}: {errno_name(e.errno or 0)}: it cannot be run") from e
            stack.callback(self._hang_up)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def start(self, **wanted: Any) -> dict[str, Any]:
        """Have the destination started; see `receive.Wanted`. Raises HostError with what went wrong there."""
        return self.ask({"start": {"directory": self.directory, **wanted}}, START_SECONDS)

    def outcome(self, seconds: float) -> str:
        """What has become of the destination: "ended", or its run state."""
        return str(self.ask({"outcome": seconds}, seconds + ANSWER_SECONDS)["status"])

    def primaries(self, seconds: float) -> dict[str, Any]:
        """What has become of the destination's primaries, at the latest after so long; see `receive.py`."""
        return self.ask({"primaries": seconds}, seconds + ANSWER_SECONDS)

    def end(self) -> str:
        """Have it ended unless it has its guest; returns what it is then."""
        return str(self.ask({"end": True}, ANSWER_SECONDS)["status"])

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises HostError where nobody answers, or with what is; HostProblems where no machine can be made there."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as e:
            raise self._gone() from e
        answer = self._understood(self._line(seconds))
        if "error" in answer:
            lines = [f"{self.uri}: {line}" for line in str(answer["error"]).splitlines()]
            raise HostProblems(*lines) if "problems" in answer else HostError("\n".join(lines))
        return answer

    def _understood(self, line: bytes) -> dict[str, Any]:
        with suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
        said = line[:SHOWN_MOST].decode(errors="replace")
        raise HostError(
            f"{self.uri}: {said!r} is no answer of kvmpy receive's; "
            "nothing there may print for a command, such as a shell's start-up file"
        )

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout
        end, out = time.monotonic() + seconds, self._process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([out], [], [], max(0.0, end - time.monotonic()))[0]:
                raise HostError(f"{self.uri}: no answer in {seconds:g} s")
            piece = os.read(out, 1 << 16)
            if not piece or len(self._received) > LINE_MOST:
                raise self._gone()
            self._received += piece
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        return line

    def _gone(self) -> HostError:
        try:
            code = str(self._process.wait(ANSWER_SECONDS))
        except subprocess.TimeoutExpired:
            code = "nothing"
        hint = "; give the path of kvmpy there with --remote-kvmpy" if code == "127" else ""
        return HostError(f"{self.uri}: the session has ended, ssh with {code}{hint}")

    def _command(self) -> list[str]:
        user, host, port = self._target
        return [
            *(*self._ssh, *OPTIONS, "-L", f"{self.stream}:{self.directory}/{STREAM}"),
            *(("-p", port) if port else ()),
            *(("-l", user) if user else ()),
            *(host, f"{self._kvmpy} receive"),
        ]

    def _hang_up(self) -> None:
        """Our end of the input is the far end's sign to clean up, for which it is given time."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _words(command: str) -> list[str]:
    """Raises ConfigError."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise ConfigError(f"--ssh: {command}: {e}") from e
    if not words:
        raise ConfigError("--ssh: expected a command, such as 'ssh -i FILE'")
    return words


def _ignore_interrupts() -> None:
    """Ctrl-C reaches ssh too; it is for us to say what that means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
