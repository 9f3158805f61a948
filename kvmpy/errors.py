"""The exceptions of kvmpy: the class says whose fault it is, and so who can act on it.

    KvmpyError
    ├── ConfigError          operator   the message starts with file:line and the TOML path; exit code 2
    ├── HostError            host       exit code 1; says what to do
    │   ├── HostProblems                several of them, found in one run
    │   ├── IoctlError       also an OSError: names the request, errno kept
    │   └── MissingCapability           names the KVM_CAP and the kernel release that has it
    ├── GuestError           guest      caught by the device; never fatal to the process
    ├── VcpuError            KVM        fail-entry, internal error, triple fault: registers are dumped
    ├── MigrationError       peer       the other side of a migration, or what lies between; the source keeps its guest
    │   ├── StreamError                 the stream ends, stalls, or has bytes that nobody of ours writes
    │   ├── IncompatibleError           a good stream of a machine that this one cannot hold
    │   └── MigrationCancelled          nobody's: somebody here asked for it
    └── CommandError         client     becomes an error reply on the monitor

Messages are sentences without a final stop, numbers in hex where they are addresses, the offender first. Anything else
that escapes is a bug of ours and shows a traceback.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# What to do about an errno that can come from anywhere.
ADVICE: Final = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the host's limit of open files (sysctl fs.file-max)",
    errno.ENOMEM: "free some of the host's memory, or give the guest less",
    errno.ENOSPC: "make room on that file system",
}


def errno_name(number: int) -> str:
    """The symbol of an errno: 13 is "EACCES"; an unknown one is its number."""
    return errno.errorcode.get(number, str(number))


def signal_name(number: int) -> str:
    """A signal's name: 9 is "SIGKILL", 40, which has none, "signal 40"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def refusal(number: int | None, what: str, advice: str = "") -> str:
    """How an errno is told: its name, ``what`` cannot be, and what to do. ``advice`` is for those not in ADVICE."""
    advice = ADVICE.get(number or 0, advice)
    return f"{errno_name(number or 0)}: {what}" + (f"; {advice}" if advice else "")


class KvmpyError(Exception):
    """Everything kvmpy raises on purpose."""


class ConfigError(KvmpyError):
    """The operator's configuration cannot be used. One message per mistake, all found in one run.

    Each entry of ``problems`` is one line, ``file:line: path: what is wrong``.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class HostError(KvmpyError):
    """This host cannot do what was asked: a missing device, right, resource or file. Says what to do."""


class HostProblems(HostError):
    """Several things that this host cannot do: each entry of ``problems`` is one, in a line."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems:
    """Collects what is wrong with things that do not depend on each other, so that all of it is said at once."""

    def __init__(self) -> None:
        self._config: list[str] = []
        self._host: list[str] = []
        self._only: KvmpyError | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, a ConfigError or HostError is for later."""
        try:
            yield
        except ConfigError as e:
            self._config += e.problems
            self._only = e
        except HostError as e:
            self._host += e.problems if isinstance(e, HostProblems) else [str(e)]
            self._only = e

    def raise_all(self) -> None:
        """Raise what was noted, as ConfigError if the operator has a part in it."""
        found, only = list(dict.fromkeys(self._config + self._host)), self._only
        self._only = None  # its traceback holds the frames of all who have us
        if only is None:
            return
        if len(found) == 1:
            raise only
        raise ConfigError(*found) if self._config else HostProblems(*found)


class IoctlError(HostError, OSError):
    """An ioctl failed. ``request`` is its kernel name, ``errno`` what the kernel said."""

    def __init__(self, request: str, number: int, hint: str = "") -> None:
        super().__init__(number, f"{request}: {errno_name(number)}{hint and ': '}{hint}")
        self.request = request
        self.errno = number

    def __str__(self) -> str:
        return str(self.args[1])


class MissingCapability(HostError):
    """KVM lacks a capability that kvmpy cannot do without.

    ``since`` is the kernel release that brought it, such as "2.6.32".
    """

    def __init__(self, name: str, since: str) -> None:
        super().__init__(f"{name}: this kernel's KVM does not have it; Linux {since} and later do")
        self.name, self.since = name, since


class GuestError(KvmpyError):
    """The guest broke a device's rules. The device stops or ignores it; the process goes on."""


class VcpuError(KvmpyError):
    """A vCPU cannot go on: KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR or a triple fault.

    ``registers`` is a multi-line dump for the operator, empty where the vCPU could not be read.
    """

    def __init__(self, message: str, registers: str = "") -> None:
        super().__init__(message)
        self.registers = registers


class MigrationError(KvmpyError):
    """A migration cannot go on. Whoever has the guest keeps it."""


class StreamError(MigrationError):
    """A migration stream ends or stalls, is corrupt, or hostile. The message has the place, in bytes from its start."""


class IncompatibleError(MigrationError):
    """This machine cannot become the one that a stream describes: each entry of ``problems`` is one difference."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MigrationCancelled(MigrationError):
    """Whoever waited in a migration was woken by somebody here, who knows why."""


class CommandError(KvmpyError):
    """A monitor client asked for something that cannot be done now. ``kind`` is QMP's error class."""

    def __init__(self, message: str, kind: str = "GenericError") -> None:
        super().__init__(message)
        self.kind = kind
