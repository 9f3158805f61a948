"""Work inside another network namespace, without a fork: by a thread that enters it and ends.

A descriptor keeps the namespace in which it was opened, so opening is all that has to happen there. Forking a VMM would
copy the page tables of the guest's RAM, and a thread never goes back: one that failed to would serve the wrong host.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from kvmpy._native import lib
from kvmpy.errors import HostError, refusal

T = TypeVar("T")

NAMED: Final = Path("/run/netns")  # where `ip netns add` keeps them

ADVICE: Final = {
    errno.ENOENT: "there is no such namespace; `ip netns add` makes one",
    errno.EACCES: "run as root",
    errno.EPERM: "needs CAP_SYS_ADMIN: run as root",
    errno.EINVAL: "is no network namespace",
}


def path_of(netns: str) -> Path:
    """The file of a namespace: ``netns`` is its name, as `ip netns` has it, or a path."""
    return Path(netns) if "/" in netns else NAMED / netns


def inside(netns: str | None, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, called inside ``netns`` (a name or a path; None is where we are).

    Raises HostError where the namespace cannot be entered.
    """
    if netns is None:
        return call()
    returned: list[T] = []
    raised: list[BaseException] = []

    def visit() -> None:
        try:
            _enter(netns)
            returned.append(call())
        except BaseException as e:  # noqa: BLE001  it is raised by the one who waits
            raised.append(e)

    thread = threading.Thread(target=visit, name="netns", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised.pop()
    return returned[0]


def _enter(netns: str) -> None:
    """Put the calling thread into ``netns``."""
    try:
        fd = os.open(path_of(netns), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise _refusal(netns, e.errno or 0) from e
    try:
        if (result := lib.kvmpy_enter_netns(fd)) < 0:
            raise _refusal(netns, -result)
    finally:
        os.close(fd)


def _refusal(netns: str, number: int) -> HostError:
    advice = ADVICE.get(number, "cannot enter it")
    return HostError(f"network namespace {path_of(netns)}: {refusal(number, advice)}")
